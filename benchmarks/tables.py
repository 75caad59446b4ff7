"""The tables of results in README.md, from a file of the suite `embedded`.

    python benchmarks/tables.py benchmarks/results/<date>-embedded.json           # print them
    python benchmarks/tables.py benchmarks/results/<date>-embedded.json --write   # put them into README.md

They stand between two comments in README.md; a test compares them with the newest committed file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- results: written by benchmarks/tables.py -->", "<!-- end of results -->"
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


def insert(text: str, summary: Summary) -> str:
    """README's text with the tables put in place of the old ones.

    Raises:
        ValueError: If the two comments do not stand in it, in this order.
    """
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*?(\n{re.escape(END)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"two lines {BEGIN!r} and {END!r} expected around the tables")
    return pattern.sub(lambda match: f"{match[1]}\n{tables(summary)}\n{match[2]}", text, count=1)


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    args = parser.parse_args()
    summary = json.loads(args.result.read_text())["summary"]
    if args.write:
        README.write_text(insert(README.read_text(), summary))
    else:
        sys.stdout.write(tables(summary) + "\n")


if __name__ == "__main__":
    main()
