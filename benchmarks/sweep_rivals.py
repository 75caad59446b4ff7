"""Settings of the rivals, chosen on the tuning photographs as ours were, and written where the benchmark finds them.

    python benchmarks/sweep_rivals.py --dtype bfloat16 --threads 1 --only psld daps     # some of them
    python benchmarks/sweep_rivals.py --dtype bfloat16 --threads 1 --choose             # write rivals.json

Each rival draws settings from the ranges below, with a fixed seed, until its budget of seconds is spent: the time that
the sweep over our own settings took (`sweep.json`, 1100 s on one thread). The first try is the paper's own setting,
with its steps cut to what is affordable. Both of what an operator method is told, the truth and plain bicubic, get the
budget. Tries go into `benchmarks/results/<date>-rivals.json` one by one; a run that was cut goes on where it stopped.

The choice: among the tries within 0.3 dB of the rival's best PSNR, the one with the lowest swd. Most rivals are smooth
then. So that the preset `default` meets its like, a rival that is not told the truth is chosen once more, "realistic":
the best PSNR among the tries whose swd is no higher than that of `default` on the same crops (`--only ours` measures
it), or else the lowest swd that it reached. A rival whose swd does not fall by a third that way is not chosen twice.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from bench import ROOT, Bench, say
from methods import pipeline
from torch import Tensor

from latentindigo.baselines import Restorer
from latentindigo.evaluation import Protocol, Restored
from latentindigo.model_folder import EMBEDDED
from latentindigo.roster import OURS, REALISTIC, TOLD, recruit

PROTOCOL = Protocol("tune-medium", "medium", 4, "tune", crop=128)
SLACK_DB = 0.3
WORTH_TWICE = 0.65
STEPS, STRENGTH = [10, 20, 40], [0.5, 0.65, 0.8, 1.0]
# What a method that is told bicubic only may believe about the noise; the truth has its own.
NOISE = [0.0, 0.01, 0.02, 0.04, 0.08]
SPACES: dict[str, dict[str, list[Any]]] = {
    "sdedit": {"steps": STEPS, "strength": [0.3, 0.4, 0.5, 0.65, 0.8], "eta": [0.0, 0.5, 1.0]},
    "diffbir": {
        "steps": STEPS,
        "strength": STRENGTH,
        "s": [0.1, 0.3, 0.5, 1.0, 2.0, 4.0],
        "space": ["rgb", "latent"],
        "eta": [0.0, 1.0],
    },
    "ldps": {"steps": STEPS, "strength": STRENGTH, "zeta": [0.3, 1.0, 3.0, 10.0, 20.0], "eta": [0.0, 1.0]},
    "psld": {"steps": STEPS, "strength": STRENGTH, "omega": [0.3, 1.0, 3.0, 10.0], "gamma": [0.03, 0.1, 0.3, 1.0]},
    "resample": {
        "steps": STEPS,
        "strength": STRENGTH,
        "nudge": [0.5, 1.0, 2.0, 5.0],
        "gamma": [5.0, 40.0, 200.0],
        "every": [2, 4, 10],
        "look_ahead": [0, 2, 5],
        "pixel_iterations": [20, 50],
        "latent_iterations": [20, 50],
    },
    "diffpir": {
        "steps": STEPS,
        "strength": STRENGTH,
        "lam": [0.1, 1.0, 3.0, 10.0, 30.0],
        "zeta": [0.0, 0.1, 0.25, 0.5, 1.0],
    },
    "ddnm": {"steps": STEPS, "strength": STRENGTH, "eta": [0.0, 0.5, 0.85, 1.0]},
    "daps": {
        "steps": [5, 10, 20],
        "strength": STRENGTH,
        "ode_steps": [1, 2, 4],
        "mcmc_steps": [5, 10, 20],
        "lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        "lr_min_ratio": [0.01, 0.1, 1.0],
        "tau": [0.01, 0.05, 0.1],
    },
    "latino": {"steps": [4, 8, 16], "strength": STRENGTH, "delta": [0.03, 0.1, 0.3, 1.0, 3.0]},
}
# The paper's settings where its steps cannot be afforded; everything else is the class's default.
PAPERS: dict[str, dict[str, Any]] = {
    name: {"steps": steps}
    for name, steps in {"sdedit": 40, "diffbir": 40, "ldps": 40, "psld": 40, "diffpir": 40, "ddnm": 40}.items()
} | {
    "resample": {"steps": 40, "pixel_iterations": 50, "latent_iterations": 50},
    "daps": {"steps": 20, "mcmc_steps": 20},
    "latino": {},
}


def draw(name: str, told: str, number: int) -> dict[str, Any]:
    """Try `number` of a rival: the paper's, then draws that depend on (name, told, number) alone."""
    if number == 0:
        return dict(PAPERS[name])
    chance = random.Random(f"{name} {told} {number}")  # noqa: S311  # a sweep, no secret
    settings = {key: chance.choice(values) for key, values in SPACES[name].items()}
    return settings | ({"noise": chance.choice(NOISE)} if told == "bicubic" else {})


def restore_with(restorer: Restorer, settings: dict[str, Any]) -> Any:
    """The restorer as a function of a list of images, all in one batch."""

    def restore(images: list[Tensor], seeds: list[int]) -> Restored:
        restored = restorer(torch.stack(images), PROTOCOL.scale, seeds)
        return Restored(list(restored), settings=settings)

    return restore


def sweep(bench: Bench, name: str, told: str) -> None:
    """Spend one budget on one rival; tries that the file holds already count, and are not made again."""
    pairs = bench.pairs(PROTOCOL)
    del bench.protocols[1:]
    for number in range(bench.args.tries):
        tried = [r["seconds"] for r in bench.rows if r["method"] == name and r["variant"].startswith(told)]
        if sum(tried) >= bench.args.seconds and number >= bench.args.fewest:
            return
        settings = draw(name, told, number)
        key = f"{name} bicubic" if told == "bicubic" else name
        chosen = recruit([name], bench.pipe, PROTOCOL.degradation, PROTOCOL.scale, {key: settings})
        restorer = next(c.restorer for c in chosen if c.variant == told)
        bench.run(PROTOCOL, pairs, name, f"{told} {number:02d}".strip(), restore_with(restorer, settings))


def resume(bench: Bench) -> None:
    """Take in what an earlier run has measured, with the same weights."""
    path = bench.args.out / f"{bench.args.date}-{bench.args.suite}.json"
    if path.exists():
        result = json.loads(path.read_text())
        if result["versions"]["weights"] != bench.pipe.weights_hash()[:16]:
            raise SystemExit(f"{path.name} holds other weights; move it away, or name another --date")
        bench.rows, bench.summary, bench.settings = result["rows"], result["summary"], result["settings"]


def sweep_ours(bench: Bench) -> None:
    """Our presets, and what lies between them, on the same crops."""
    pairs = bench.pairs(PROTOCOL)
    del bench.protocols[1:]
    made = {preset: {"preset": preset} for preset in ("faithful", "default", "vivid")}
    made |= {f"fidelity {share:g}": {"fidelity": share} for share in (0.25, 0.5, 0.6, 0.75, 0.9)}
    for variant, settings in made.items():
        bench.run(PROTOCOL, pairs, OURS, variant, pipeline(bench.pipe, PROTOCOL.scale, **settings))


def choose(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings to keep, by the key that `roster.load_settings` knows."""
    chosen: dict[str, dict[str, Any]] = {}
    ours = next(e for e in result["summary"] if (e["method"], e["variant"]) == (OURS, "default"))
    for name in SPACES:
        for told in ("true", "bicubic") if name in TOLD else ("",):
            tries = [e for e in result["summary"] if e["method"] == name and e["variant"].startswith(told)]
            tries = [e for e in tries if e["psnr"]["mean"] is not None]
            if not tries:
                continue
            best = max(e["psnr"]["mean"] for e in tries)
            near = [e for e in tries if e["psnr"]["mean"] >= best - SLACK_DB]
            key = f"{name} bicubic" if told == "bicubic" else name
            picks = {key: min(near, key=lambda e: e["swd"]["mean"])}
            if told != "true":
                smooth = picks[key]
                sharp = [e for e in tries if e["swd"]["mean"] <= ours["swd"]["mean"]]
                picks[f"{key} {REALISTIC}"] = (
                    max(sharp, key=lambda e: e["psnr"]["mean"]) if sharp else min(tries, key=lambda e: e["swd"]["mean"])
                )
                if picks[f"{key} {REALISTIC}"]["swd"]["mean"] > WORTH_TWICE * smooth["swd"]["mean"]:
                    del picks[f"{key} {REALISTIC}"]
            for place, entry in picks.items():
                chosen[place] = result["settings"][f"{PROTOCOL.name}: {name} {entry['variant']}"]
                figures = ", ".join(f"{m} {entry[m]['mean']:.4g}" for m in ("psnr", "swd", "seconds"))
                say(f"{place}: {figures}, {chosen[place]}")
    return chosen


def main() -> None:
    """Sweep, or choose."""
    data = os.environ.get("LATENTINDIGO_DATA", ROOT.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*SPACES, "ours"], default=["ours", *SPACES], metavar="NAME")
    parser.add_argument("--told", nargs="+", choices=("true", "bicubic"), default=["true", "bicubic"])
    parser.add_argument("--seconds", type=float, default=1100, help="budget of a rival, for each thing it is told")
    parser.add_argument("--fewest", type=int, default=6, help="tries that are made even if they cost more")
    parser.add_argument("--tries", type=int, default=60, help="most tries")
    parser.add_argument("--limit", type=int, default=16, help="tuning photographs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--choose", action="store_true", help="read the results and write rivals.json")
    args = parser.parse_args()
    args.suite = "rivals"
    if args.choose:
        chosen = choose(json.loads((args.out / f"{args.date}-rivals.json").read_text()))
        (EMBEDDED / "rivals.json").write_text(json.dumps(chosen, indent=2) + "\n")
        return
    # `Bench` has a filter of the same name, by what the methods are called.
    names, args.only = args.only, None
    bench = Bench(args)
    resume(bench)
    with torch.no_grad():
        for name in names:
            if name == "ours":
                sweep_ours(bench)
                continue
            for told in args.told if name in TOLD else ("",):
                sweep(bench, name, told)
    say(f"tries: {len(bench.summary)}")


if __name__ == "__main__":
    main()
