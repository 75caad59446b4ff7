"""The tables of results in README.md, benchmarks/README.md and pages of docs/, from committed result files.

    python benchmarks/tables.py                # print them, from the newest file of each suite
    python benchmarks/tables.py --write        # put them into their pages

Each stands between two comments of its page; a test compares them with the newest committed files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from embedded import bars_table

from latentindigo.evaluation import paired_difference

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
LIMITS = HERE.parent / "docs" / "limits.md"
RESULTS = HERE / "results"
PRESETS = ("faithful", "default", "vivid")
METHODS = {"LatentINN": "latent-inn", "PixelINN": "pixel-inn"}
UPDATES = ("projection", "stopped", "through")
PROTOCOLS = ("mild", "medium", "severe", "random", "noise15", "jpeg15", "blur1.5-noise5")

Summary = Sequence[dict[str, Any]]


def tables(summary: Summary) -> str:
    """All three tables as Markdown; a dash stands for what the file does not hold."""
    return "\n\n".join((_medium(summary), _all_protocols(summary), _guidance(summary)))


def _medium(summary: Summary) -> str:
    metrics = (("psnr", 2), ("ssim", 3), ("gradient_energy", 2), ("swd", 4), ("seconds", 2))
    wanted = [("bicubic", ("bicubic", "")), ("stage-one estimator alone", ("estimator", ""))]
    for preset in PRESETS:
        wanted.append((f"`{preset}`", ("preset", preset)))
        if preset != "faithful":
            for control in ("grain", "unsharp"):
                label = f"control: {control} on the estimator, as rough as `{preset}`"
                wanted.append((label, (f"{control} on estimator", f"as rough as {preset}")))
    wanted.append(("`default` in 50 steps", ("preset", "default, 50 steps")))
    rows = [
        [label, *(_figure(summary, "medium", *key, metric, digits) for metric, digits in metrics)]
        for label, key in wanted
    ]
    head = "Scale 4, `medium` damage (blur σ 1.5, noise 10 of 255, JPEG 70):"
    return f"{head}\n\n" + _table(["Method", "PSNR", "SSIM", "Gradient energy", "swd", "Seconds"], rows)


def _all_protocols(summary: Summary) -> str:
    wanted = [("bicubic", ""), ("estimator", ""), *(("preset", preset) for preset in PRESETS)]
    rows = [
        [f"×{4 if k < 4 else 1} `{name}`", *(_figure(summary, name, *key, "psnr", 2) for key in wanted)]
        for k, name in enumerate(PROTOCOLS)
    ]
    heads = ["PSNR", "bicubic or input", "estimator", *(f"`{preset}`" for preset in PRESETS)]
    return "All standard degradations:\n\n" + _table(heads, rows)


def _guidance(summary: Summary) -> str:
    metrics = (("psnr", 2), ("psnr_minus_unguided", 2), ("gradient_energy", 2), ("swd", 4), ("seconds", 2))
    wanted = [("unguided", [("unguided", "")])]
    wanted += [(f"{m}, {' / '.join(UPDATES)}", [(k, u) for u in UPDATES]) for m, k in METHODS.items()]
    rows = [
        [
            label,
            *(" / ".join(_figure(summary, "medium", *k, metric, digits) for k in keys) for metric, digits in metrics),
        ]
        for label, keys in wanted
    ]
    head = (
        "What guidance adds, at scale 4 and `medium` damage: the same start (σ/α = 0.83, from the estimator),\n"
        "10 steps, same seeds."
    )
    return f"{head}\n\n" + _table(["", "PSNR", "Gain over unguided", "Gradient energy", "swd", "Seconds"], rows)


def _figure(summary: Summary, protocol: str, method: str, variant: str, metric: str, digits: int) -> str:
    for entry in summary:
        if (entry["protocol"], entry["method"], entry["variant"]) == (protocol, method, variant) and metric in entry:
            sign = "+" if metric.startswith("psnr_minus") else ""
            return f"{entry[metric]['mean']:{sign}.{digits}f}"
    return "–"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------------------------------------------------- comparison

OURS = "latentindigo"
CONTESTS = ("contest-medium", "contest-severe")


def comparison(results: Sequence[dict[str, Any]]) -> str:
    """Every method of the contests, the rivals that are told bicubic only against ours, and what PSLD costs.

    Args:
        results: Decoded result files, one protocol each.
    """
    return "\n\n".join((_contestants(results), _against_rivals(results), _cost(results[0])))


def _contestants(results: Sequence[dict[str, Any]]) -> str:
    protocols = [next(iter(result["protocols"])) for result in results]
    entries = [{(e["method"], e["variant"]): e for e in result["summary"]} for result in results]
    keys = sorted(entries[0], key=lambda key: -entries[0][key]["psnr"]["mean"])
    calls = {(r["method"], r["variant"]): (r.get("calls") or {}).get("denoiser") for r in results[0]["rows"]}

    def both(key: tuple[str, str], metric: str, digits: int, factor: float = 1.0) -> str:
        found = [e.get(key, {}).get(metric) for e in entries]
        return " / ".join("–" if f is None else f"{factor * f['mean']:.{digits}f}" for f in found)

    rows = []
    for key in keys:
        method, variant = key
        name = f"**{variant}**" if method == OURS else f"{method}, {variant}" if variant else method
        cost = [both(key, metric, digits).split(" / ")[0] for metric, digits in (("seconds", 2), ("extra_mb", 0))]
        figures = [both(key, "psnr", 2), both(key, "ms_ssim", 3), both(key, "niqe", 1), both(key, "swd", 1, 1000)]
        rows.append([name, *figures, both(key, "gradient_energy", 2), str(calls.get(key) or "–"), *cost])
    heads = ["Method, told", "PSNR", "MS-SSIM", "NIQE", "swd · 1000", "Energy", "Denoiser", "Seconds", "MB"]
    head = (
        f"All on the same prior, `{'` / `'.join(protocols)}`, best PSNR first. Bold: ours. Denoiser: evaluations. MB: "
        "peak memory above\nthe loaded model. Seconds, MB and evaluations are those of the first protocol."
    )
    return f"{head}\n\n" + _table(heads, rows)


def _against_rivals(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    keys = [(e["method"], e["variant"]) for e in results[0]["summary"]]
    for key in [k for k in keys if k[1].startswith("bicubic") or k[0] in ("sdedit", "diffbir")]:
        cells = []
        for metric, ours in (
            *(("psnr", name) for name in ("faithful", "fidelity 0.6", "default")),
            *(("swd", name) for name in ("fidelity 0.6", "default")),
        ):
            factor, digits = (1, 2) if metric == "psnr" else (1000, 1)
            for result in results:
                entry = next(e for e in result["summary"] if (e["method"], e["variant"]) == key)
                found = entry.get(f"{metric}_minus_{ours}")
                if found is None:
                    protocol = next(iter(result["protocols"]))
                    found = paired_difference(result["rows"], key, (OURS, ours), protocol, metric)._asdict()
                # Rival minus ours turned round, so that a plus is always a win of ours.
                sign = -factor if metric == "psnr" else factor
                low, high = sorted((sign * found["low"], sign * found["high"]))
                mark = "" if low > 0 else "lost: " if high < 0 else "open: "
                cells.append(f"{mark}{sign * found['mean']:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        rows.append(
            [
                ", ".join(filter(None, key)),
                *(" / ".join(cells[k : k + len(results)]) for k in range(0, len(cells), len(results))),
            ]
        )
    heads = [
        "Rival",
        "PSNR, `faithful` over it",
        "PSNR, `fidelity` 0.6 over it",
        "PSNR, `default` over it",
        "swd · 1000, `fidelity` 0.6 under it",
        "swd · 1000, `default` under it",
    ]
    head = (
        "Against the rivals that know what a user knows, the scale; *realistic*: set to be as realistic as `default`. "
        "A plus is a\nwin of ours; 95 % intervals, paired by image; *open*: the interval holds zero."
    )
    return f"{head}\n\n" + _table(heads, rows)


def _cost(result: dict[str, Any]) -> str:
    entries = {(e["method"], e["variant"]): e for e in result["summary"]}
    calls = {(r["method"], r["variant"]): r["nfe"] for r in result["rows"]}
    ours = entries[OURS, "default"]
    rows = []
    for key in ((OURS, "default"), ("psld", "true"), ("psld", "bicubic")):
        seconds, memory = (entries[key][m]["mean"] for m in ("seconds", "extra_mb"))
        per_call = seconds / calls[key]
        cells = [f"{seconds:.2f}", f"{seconds / ours['seconds']['mean']:.1f}", f"{1000 * per_call:.0f}"]
        whole = "–" if key[0] == OURS else f"{1000 * per_call / ours['seconds']['mean']:.0f}"
        rows.append([", ".join(key), str(calls[key]), *cells, whole, f"{memory / ours['extra_mb']['mean']:.1f}"])
    heads = [
        "",
        "Evaluations",
        "Seconds",
        "Times `default`",
        "ms an evaluation",
        "Times `default` in the paper's 1000",
        "Memory, times `default`",
    ]
    head = (
        "What PSLD costs. The sweep gave it few evaluations; its paper takes 1000, whose time follows from one. "
        "Memory is\nthe peak above the loaded model."
    )
    return f"{head}\n\n" + _table(heads, rows)


# ----------------------------------------------------------------------------------------------------------- ablations

ABLATIONS = ("ablation-sampling", "ablation-trained")


def ablations(results: Sequence[dict[str, Any]]) -> str:
    """What each part brings: rows of `ablations.py`, each against its base."""
    parts = []
    for result, label in zip(results, ("base", "unguided"), strict=True):
        names = {"psnr": "PSNR", "gradient_energy": "Energy", "swd": "swd · 1000", "seconds": "Seconds"}
        heads = ["", "", *names.values(), f"PSNR over {label}"]
        rows = []
        for entry in result["summary"]:
            if "psnr" in entry:
                figures = [
                    f"{entry[m]['mean'] * (1000 if m == 'swd' else 1):.{d}f}"
                    for m, d in (("psnr", 2), ("gradient_energy", 2), ("swd", 1), ("seconds", 2))
                ]
                rows.append([entry["method"], entry["variant"], *figures, _interval(entry.get(f"psnr_minus_{label}"))])
        parts.append(_table(heads, rows))
    coarse = [e for e in results[1]["summary"] if "mse" in e]
    rows = [
        [e["variant"], f"{e['mse']['mean']:.4f}", *(_interval(e.get(f"mse_over_{n}"), 3) for n in ("bicubic", "base"))]
        for e in coarse
    ]
    parts.append(_table(["Coarse part of", "Squared error", "Over E(bicubic)'s", "Over the base's"], rows))
    return "\n\n".join(parts)


def _interval(found: dict[str, Any] | None, digits: int = 2) -> str:
    if found is None:
        return "–"
    sign = "+" if digits == 2 else ""
    return f"{found['mean']:{sign}.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


# --------------------------------------------------------------------------------------------------------------- speed

SPEED = ("guidance", "pixel", "every", "rrdbnet", "sizes", "overhead", "startup", "dtypes", "seams", "tiles")
SPEED_SUITES = (*(f"speed-{name}" for name in SPEED), "gpu-priors", "speed-profile-before", "speed-profile")
MISSED = ("embedded", *(f"speed-{name}" for name in SPEED), "gpu-priors")


def speed(results: Sequence[dict[str, Any]]) -> str:
    """Every bar of speed and memory, and where the time of a restoration goes, before and after."""
    *suites, before, after = results
    rows = [
        [
            what,
            bar["bar"],
            f"{bar['measured']:.4g}",
            {True: "yes", False: "**no**", None: ""}[bar["met"]],
            _machine(found),
        ]
        for found in suites
        for what, bar in found["settings"]["bars"].items()
    ]
    parts = [_table(["What", "Bar", "Measured", "Met", "On"], rows)]
    shares = [{e["variant"]: e for e in found["summary"] if e["method"] == "of it"} for found in (before, after)]
    totals = [next(e for e in found["summary"] if e["method"] == "preset")["seconds"] for found in (before, after)]
    rows = [
        [name, *(f"{s[name]['seconds']['mean']:.3f} s, {s[name]['percent']['mean']:.0f} %" for s in shares)]
        for name in shares[1]
    ]
    rows.append(["**all of it**", *(f"{total['mean']:.3f} s" for total in totals)])
    parts.append("Where the time of a `default` restoration from 128² to 512² goes, one thread:")
    parts.append(_table(["Part", "Before", "After"], rows))
    return "\n\n".join(parts)


def _machine(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return str(machine.get("accelerator") or machine.get("gpu") or "CPU, one thread")


# -------------------------------------------------------------------------------------------------------------- limits


def missed(results: Sequence[dict[str, Any]]) -> str:
    """Every bar that was missed, of quality first, then of speed and memory."""
    quality, *suites = results
    rows = [line.strip("| ").split(" | ") for line in bars_table(quality["summary"]).splitlines()[2:]]
    rows = [[*row[:3], "50 photographs"] for row in rows if row[3] == "**no**"]
    rows += [
        [what, bar["bar"], f"{bar['measured']:.4g}", _machine(found)]
        for found in suites
        for what, bar in found["settings"]["bars"].items()
        if bar["met"] is False
    ]
    return _table(["What", "Wanted", "Measured", "On"], rows)


def costs(results: Sequence[dict[str, Any]]) -> str:
    """Seconds and memory of a `default` restoration by size of the result."""
    summary = results[0]["summary"]
    processes = {e["variant"]: e["peak_mb"]["mean"] for e in summary if "peak_mb" in e}
    sizes = {e["variant"]: e for e in summary if "seconds" in e}
    rows = [
        [
            name.replace(" x ", " × "),
            f"{sizes[name]['seconds']['mean']:.1f}" if name in sizes else "–",
            f"{processes[name]:.0f}" if name in processes else "–",
        ]
        for name in dict.fromkeys([*sizes, *processes])
    ]
    return _table(["Result, pixels", "Seconds", "Memory of the whole process, MB"], rows)


# --------------------------------------------------------------------------------------------------------------- pages


def newest(suite: str) -> dict[str, Any] | None:
    """The newest committed result file of a suite, None if there is none."""
    found = sorted(path for path in RESULTS.glob("*.json") if re.sub(r"^\d{4}-\d{2}-\d{2}-", "", path.stem) == suite)
    return json.loads(found[-1].read_text()) if found else None


# ---------------------------------------------------------------------------------------------------------------- fuzz


def fuzz(results: Sequence[dict[str, Any]]) -> str:
    """What became of the damaged files, by format."""
    settings, formats = results[0]["settings"], results[0]["rows"]
    kinds = list(formats[0]["outcomes"])
    rows = [
        [
            row["method"],
            *(str(n) for n in (row["tried"], *row["outcomes"].values())),
            f"{row['peak_mb']:.0f}",
            f"{row['slowest_seconds']:.1f}",
        ]
        for row in formats
    ]
    counts = [sum(row["outcomes"][kind] for row in formats) for kind in kinds]
    peak, slowest = (max(row[key] for row in formats) for key in ("peak_mb", "slowest_seconds"))
    rows.append(["**all**", *(str(n) for n in (settings["inputs"], *counts)), f"{peak:.0f}", f"{slowest:.1f}"])
    reasons: dict[str, int] = {}
    for row in formats:
        for reason, count in row["refused_as"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    named = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    found = {name: number for name, number in settings["versions"].items() if number}
    head = (
        f"{settings['inputs']} inputs, seed {settings['seed']}; limit {settings['max_pixels']} pixels, memory bound "
        f"{settings['bound_mb']} MB. MB: most memory for one input,\nencoders included. Seconds: the slowest input on "
        f"one busy core. Decoders: {', '.join(f'{name} {number}' for name, number in found.items())}."
    )
    table = _table(["Format", "Tried", *(kind.capitalize() for kind in kinds), "MB", "Seconds"], rows)
    return f"{head}\n\n{table}\n\nRefused as: {named}."


# --------------------------------------------------------------------------------------------- folders and the page

SCALE = ("batch-kills", "batch-kills-ray", "batch-ray", "load-app")


def scale(results: Sequence[dict[str, Any]]) -> str:
    """Jobs that are killed, one worker against two, and many visitors at once."""
    kills, engines, page = results[:2], results[2], results[3]["settings"]["app"]
    rows = []
    for result, what in zip(kills, ("`kill -9` of the job", "`kill -9` of a Ray actor"), strict=True):
        facts = result["settings"]["facts"]
        bad = [len(facts[name]) for name in ("missing", "damaged", "without_need", "stray")]
        rows.append([what, *(str(number) for number in (facts["photos"], facts["kills"], *bad))])
    killed = _table(["", "Photos", "Kills", "Missing", "Damaged", "Restored without need", "Stray files"], rows)
    speeds = {entry["method"]: entry["photos_per_second"]["mean"] for entry in engines["summary"]}
    same = engines["settings"]["facts"]["same_bytes_as_local"]
    cluster = _table(
        ["Engine", "Photos a second", "Bytes"],
        [[name, f"{speed:.2f}", "the same" if same[name] else "others"] for name, speed in speeds.items()],
    )
    found = page["found"]
    counts = [str(found[name]) for name in ("sent", "accepted", "answered", "refused politely", "wrong")]
    memory = found["memory_mb"]
    memories = [f"{memory[name]}" for name in ("start", "median of the second third", "median of the last third")]
    head = ["Sent", "Accepted", "Answered", "Told that the queue is full", "Wrong answers", "MB at first", "MB midway"]
    visitors = _table([*head, "MB at the end", "Most MB"], [[*counts, *memories, f"{memory['peak']}"]])
    loaded = (
        f"{page['clients']} visitors at once for {page['seconds']:g} seconds, {page['concurrency']} photos at a time, "
        f"{page['queue']} waiting:"
    )
    return f"{killed}\n\n{cluster}\n\n{loaded}\n\n{visitors}"


# Name of the place -> page, suites, and what makes the text of their results.
PLACES: dict[str, tuple[Path, tuple[str, ...], Callable[[Sequence[dict[str, Any]]], str]]] = {
    "results": (README, ("embedded",), lambda results: tables(results[0]["summary"])),
    "comparison": (HERE / "README.md", CONTESTS, comparison),
    "ablations": (HERE / "README.md", ABLATIONS, ablations),
    "speed": (HERE / "README.md", SPEED_SUITES, speed),
    "fuzz": (HERE.parent / "docs" / "formats.md", ("fuzz-images",), fuzz),
    "scale": (HERE / "README.md", SCALE, scale),
    "missed": (LIMITS, MISSED, missed),
    "costs": (LIMITS, ("speed-sizes",), costs),
}


def marks(place: str) -> tuple[str, str]:
    """The two comments around a place."""
    return f"<!-- {place}: written by benchmarks/tables.py -->", f"<!-- end of {place} -->"


def insert(text: str, place: str, content: str) -> str:
    """A page's text with new content in one of its places.

    Raises:
        ValueError: If the two comments do not stand in it, in this order.
    """
    begin, end = marks(place)
    pattern = re.compile(f"({re.escape(begin)}\n).*?(\n?{re.escape(end)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"two lines {begin!r} and {end!r} expected around the tables")
    return pattern.sub(lambda match: f"{match[1]}\n{content}\n\n{end}", text, count=1)


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into their pages")
    args = parser.parse_args()
    for place, (page, suites, make) in PLACES.items():
        results = [result for result in map(newest, suites) if result is not None]
        if len(results) < len(suites):
            sys.stdout.write(f"{place}: no result file for every one of {', '.join(suites)}\n")
        elif args.write:
            page.write_text(insert(page.read_text(), place, make(results)))
        else:
            sys.stdout.write(f"{make(results)}\n\n")


if __name__ == "__main__":
    main()
