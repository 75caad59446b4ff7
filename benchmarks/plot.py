"""Draw a result file: fidelity against gradient energy, beside the best that a sampler can do.

    python benchmarks/plot.py benchmarks/results/<date>-embedded.json docs/images/tradeoff.png

The curve. Let the stage-one estimate be the posterior mean, with squared error m and a share e of the clean image's
gradient energy. An exact posterior sample departs from it by as much as the truth does; a share a of that departure
gives the error m (1 + a²) and the energy e + a² (1 - e). What lies above it keeps less of the departure in low bands
than in high ones, where a squared error buys more gradient energy; the controls do the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

SHOWN = {"bicubic": "x", "estimator": "s", "preset": "o"}


def draw(result: dict[str, Any], target: Path, protocols: tuple[str, ...] = ("mild", "medium", "severe")) -> None:
    """Write one panel for each protocol."""
    figure = Figure(figsize=(5 * len(protocols), 4.2), layout="constrained")
    for axis, protocol in zip(figure.subplots(1, len(protocols), squeeze=False)[0], protocols, strict=True):
        entries = [e for e in result["summary"] if e["protocol"] == protocol and "gradient_energy" in e]
        mean = next(e for e in entries if e["method"] == "estimator")
        best, kept = mean["psnr"]["mean"], mean["gradient_energy"]["mean"]
        share = np.linspace(0, 1, 50) ** 2
        axis.plot(kept + share * (1 - kept), best - 10 * np.log10(1 + share), "k--", linewidth=1, label="exact sampler")
        for entry in entries:
            x, y = entry["gradient_energy"]["mean"], entry["psnr"]["mean"]
            control = entry["method"].startswith(("grain", "unsharp"))
            if not control and entry["method"] not in SHOWN:
                continue
            name = entry["variant"] if entry["method"] == "preset" else entry["method"]
            marker = "^" if control else SHOWN[entry["method"]]
            axis.plot(x, y, marker, color="tab:orange" if control else "tab:blue", markersize=6)
            axis.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
        axis.set(title=f"×4 {protocol}", xlabel="gradient energy (1 = clean)", ylabel="PSNR, dB")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left", fontsize=8)
    figure.savefig(target, dpi=90)


def main() -> None:
    """Draw one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.target)


if __name__ == "__main__":
    main()
