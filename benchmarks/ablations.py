"""What each part of the method brings: parts taken out or exchanged one by one, everything else alike.

    python benchmarks/ablations.py sampling --dtype bfloat16 --batch 10            # settings of the sampler
    python benchmarks/ablations.py train --runs ../runs/ablations                  # short trainings of LatentINN
    python benchmarks/ablations.py trained --runs ../runs/ablations --dtype bfloat16 --batch 10

`sampling` leaves the weights as they are. Its rows have two bases. `paper` is the method as published, without what
this package adds around it: it starts from the encoding of the bicubic enlargement, so that whatever the result knows
of the damage came from guidance. `default` is the preset that ships.

`trained` compares networks that were all trained alike and briefly (`VARIANTS`, by `train`; a run that was cut goes on
where it stopped), on the base `paper`. Both write a result file as `foundation.py` does; every difference is paired.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench import ROOT, Bench, entry_of, say
from methods import bicubic, estimator_alone, pipeline
from networks import without_noise
from torch import Tensor

from latentindigo.evaluation import Protocol, bootstrap_interval, make_row, markdown_table, ratio_of_sums
from latentindigo.images import pil_resize
from latentindigo.inn import InvertibleNet
from latentindigo.report import plot_steps
from latentindigo.training import train

STRENGTH = 0.83 / math.sqrt(1 + 0.83**2)  # sigma/alpha = 0.83, as in the suite `guided`.
# The published method: no stage-one estimate, nothing drawn around it, nothing of the start mixed in afterwards.
PAPER: dict[str, Any] = {
    "method": "latent-inn", "update": "projection", "init": "encode", "strength": STRENGTH, "steps": 10,
    "residual": 0.0, "spread": 0.0, "texture": 1.0, "chroma": 1.0, "coarse": 1.0, "ensemble": 1,
}  # fmt: skip
REGULARISERS: tuple[dict[str, Any], ...] = (
    {"regulariser": "consistency", "regulariser_weight": 0.1},
    {"regulariser": "gluing", "regulariser_weight": 0.1},
    {"regulariser": "renoise", "regulariser_weight": 0.2},
    {"regulariser": "trust", "regulariser_weight": 0.1},
)
RULES = ("projection", "stopped", "through")
# Label -> what differs from the base. "guidance" changes single fields, "gamma" hides the damage from every network.
SAMPLING: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "unguided": {"method": "unguided"},
        **{f"latent-inn, {rule}": {"update": rule} for rule in RULES[1:]},
        **{f"pixel-inn, {rule}": {"method": "pixel-inn", "update": rule} for rule in RULES},
        "refinement": {"guidance": {"refine": True}},
        "latent-inn, stopped, w_d = 0": {"update": "stopped", "guidance": {"w_d": 0.0}},
        "target not shrunk": {"guidance": {"shrink": 0.0}},
        **{f"regulariser {r['regulariser']}": {"guidance": r} for r in REGULARISERS},
        "mean gamma": {"gamma": "mean"},
        "start from noise": {"init": "noise"},
        "start from g⁻¹(y, 0)": {"init": "inverse"},
        "start from the estimator": {"init": "estimator"},
        "start from the estimator, unguided": {"init": "estimator", "method": "unguided"},
    },
    "default": {
        "unguided": {"method": "unguided"},
        "stopped": {"update": "stopped"},
        "pixel-inn": {"method": "pixel-inn"},
        "refinement": {"guidance": {"refine": True}},
        **{f"regulariser {r['regulariser']}": {"guidance": r} for r in REGULARISERS},
        "mean gamma": {"gamma": "mean"},
        "no estimator": {"init": "encode"},
        "no ensemble": {"ensemble": 1},
        "no spread": {"spread": 0.0},
        "colours as sampled (chroma 1)": {"chroma": 1.0},
        "seen bands as sampled (coarse 1)": {"coarse": 1.0},
        **{f"strength {s:g}": {"strength": s} for s in (0.3, 0.5, 0.8, 1.0)},
        **{f"{n} steps": {"steps": n} for n in (4, 6, 12, 20, 50, 100)},
    },
}
# Networks trained alike but for one thing: changes of the recipe's [model] and [objective].
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}),
    "lazy split, no Haar, no mix": ({"haar": False, "mix": False}, {}),
    "Haar, no mix": ({"mix": False}, {}),
    "K = 1": ({"num_steps": 1}, {}),
    "K = 4": ({"num_steps": 4}, {}),
    "no gamma": ({}, {"conditioned": False}),
    "no inverse loss": ({}, {"inverse_weight": 0.0}),
}
COLUMNS = ("psnr", "ssim", "gradient_energy", "swd", "seconds")


# ------------------------------------------------------------------------------------------------------------ sampling


def sampling(bench: Bench) -> Sequence[str]:
    """Both bases and everything that differs from them in one setting."""
    protocol = Protocol("medium", "medium", 4, "val")
    pairs = bench.pairs(protocol)
    bench.run(protocol, pairs, "bicubic", "", bicubic(4))
    bench.run(protocol, pairs, "estimator", "", estimator_alone(bench.pipe, 4))
    mean = _mean_gamma(bench)
    for base, changes in SAMPLING.items():
        for label, change in {"": {}, **changes}.items():
            call = {key: value for key, value in change.items() if key not in ("gamma", "guidance")}
            call = {**(PAPER if base == "paper" else {}), "preset": "default", **call}
            call["guidance"] = bench.guidance("default", **change.get("guidance", {}))
            # A name of their own for those that differ in steps alone: `report.plot_steps` joins what has one name.
            name = "steps" if label.endswith("steps") else base
            with _told(bench, mean if "gamma" in change else None):
                bench.run(protocol, pairs, name, label, pipeline(bench.pipe, 4, **call))
            bench.difference(protocol.name, (name, label), (base, ""), "base")
    bench.save()
    plot_steps(json.loads(bench.path.read_text()), bench.path.with_suffix(".png"))
    return (*COLUMNS, "psnr_minus_base")


def _mean_gamma(bench: Bench) -> Tensor:
    """The mean embedding (1, d) of the tuning photographs, each under a draw of the second-order recipe."""
    protocol = Protocol("mean-gamma", "random", 4, "tune", crop=192)
    pairs = bench.pairs(protocol)
    bench.protocols.pop()
    return torch.cat([bench.gamma(pair.y) for pair in pairs]).mean(0, keepdim=True)


@contextmanager
def _told(bench: Bench, gamma: Tensor | None) -> Iterator[None]:
    """Inside, the degradation encoder says `gamma` of every image; None leaves it as it is."""
    encoder = bench.pipe.degradation_encoder
    handle = None
    if gamma is not None:
        handle = encoder.register_forward_hook(lambda module, inputs, output: gamma.expand_as(output).to(output))
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


# ------------------------------------------------------------------------------------------------------------- trained


def train_variants(args: argparse.Namespace) -> None:
    """Train every variant, one after the other; what is finished is not trained again."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    recipe = ROOT / "recipes" / "latent-inn.toml"
    values = tomllib.loads(recipe.read_text())
    for label, (model, objective) in VARIANTS.items():
        if args.only and not any(part in label for part in args.only):
            continue
        say(f"{label}: {args.steps} steps")
        overrides = {
            "steps": args.steps,
            # The spread is a network of its own beside g and takes no part in what is compared here.
            "model": {**values["model"], "spread": False, **model},
            "objective": {**values["objective"], **objective},
        }
        train("latent-inn", args.data / "train", recipe, _run(args, label), overrides=overrides, progress=False)


def _run(args: argparse.Namespace, label: str) -> Path:
    words = "".join(c if c.isalnum() else " " for c in label).split()
    return args.runs / "-".join(words)


def trained(bench: Bench) -> Sequence[str]:
    """Coarse part, and guided restoration from the same start, of every network that `train` has finished."""
    shipped = bench.pipe.latent_inn
    if shipped is None:
        raise SystemExit("this model has no latent INN to compare with")
    protocol = Protocol("medium", "medium", 4, "val")
    pairs = bench.pairs(protocol)
    settings = {**PAPER, "preset": "default", "guidance": bench.guidance("default")}
    bench.run(protocol, pairs, "unguided", "", pipeline(bench.pipe, 4, **{**settings, "method": "unguided"}))
    networks: dict[str, InvertibleNet] = {}
    for label in VARIANTS:
        folder = _run(bench.args, label) / "final" / "latent_inn"
        if folder.is_dir():
            network = InvertibleNet.from_pretrained(folder).to(shipped.device, shipped.dtype)
            networks[label] = network.eval().requires_grad_(False)
    for label, network in {"shipped": shipped, **networks}.items():
        bench.pipe.latent_inn = network
        bench.run(protocol, pairs, "latent-inn", label, pipeline(bench.pipe, 4, **settings))
        bench.difference(protocol.name, ("latent-inn", label), ("unguided", ""), "unguided")
        bench.difference(protocol.name, ("latent-inn", label), ("latent-inn", "base"), "base")
    bench.pipe.latent_inn = shipped
    _coarse_parts(bench, {"shipped": shipped, **networks})
    return (*COLUMNS, "psnr_minus_unguided", "psnr_minus_base", "mse_over_bicubic", "mse_over_base")


def _coarse_parts(bench: Bench, networks: dict[str, InvertibleNet]) -> None:
    """Error of each coarse part against E of the noise- and JPEG-free y, over that of E(bicubic) and of the base."""
    protocol = Protocol("random", "random", 4, "val")
    pairs, prior = bench.pairs(protocol), bench.prior
    errors: dict[str, list[float]] = {"E(bicubic)": []} | {label: [] for label in networks}
    for pair in pairs:
        x = pair.clean[None]
        z, wanted = prior.encode(x), prior.encode(without_noise(pair))
        small = prior.encode(pil_resize(x, (x.shape[-1] // 4, x.shape[-2] // 4)))
        gamma = bench.gamma(pair.y)
        for label, network in networks.items():
            errors[label].append(float((network(z.to(gamma), gamma, 2)[0].float() - wanted).square().mean()))
        errors["E(bicubic)"].append(float((small - wanted).square().mean()))
    for label, found in errors.items():
        rows = [make_row("coarse", label, protocol.name, p.name, mse=e) for p, e in zip(pairs, found, strict=True)]
        entry = {"mse": bootstrap_interval(found)}
        for other, name in (("E(bicubic)", "bicubic"), ("base", "base")):
            if other in errors and other != label:
                samples = list(zip(found, errors[other], strict=True))
                entry[f"mse_over_{name}"] = bootstrap_interval(samples, statistic=ratio_of_sums)
        bench.add(rows, entry_of(rows[0], **entry))


# ---------------------------------------------------------------------------------------------------------------- main

SUITES = {"sampling": sampling, "trained": trained}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one suite, or train."""
    data = Path(os.environ.get("LATENTINDIGO_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("suite", choices=("sampling", "train", "trained"))
    parser.add_argument("--runs", type=Path, default=ROOT.parent / "runs" / "ablations", help="folder of the trainings")
    parser.add_argument("--steps", type=int, default=360, help="optimiser steps of each training")
    parser.add_argument("--limit", type=int, help="first N images only")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--only", nargs="+", help="variants whose name contains one of these")
    parser.add_argument("--data", type=Path, default=data, help="folder with train and val")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.suite == "train":
        train_variants(args)
        return
    suite, args.suite = SUITES[args.suite], f"ablation-{args.suite}"
    bench = Bench(args)
    with torch.no_grad():
        columns = suite(bench)
    bench.save()
    say("\n" + markdown_table(bench.summary, columns, bench.rows))


if __name__ == "__main__":
    main()
