"""Reports of a comparison: Markdown tables, plots of quality against time and steps, grids of images with zoomed crops.

Everything but the image grid is drawn from the dictionary of a result file, so that a committed file can be drawn
again at any time. Plots need Matplotlib (`pip install 'latentindigo[benchmark]'`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from latentindigo.evaluation import markdown_table
from latentindigo.images import contact_sheet

__all__ = ["NoMatplotlibError", "image_grid", "plot_quality", "plot_steps", "tables"]

COLUMNS = ("psnr", "ssim", "ms_ssim", "gmsd", "niqe", "swd", "gradient_energy", "consistency", "seconds", "extra_mb")
LABELS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "gmsd": "GMSD (lower is better)",
    "niqe": "NIQE (lower is better)",
    "swd": "swd (lower is better)",
    "gradient_energy": "gradient energy (1 = clean)",
    "consistency": "consistency with y (lower is better)",
}
_OURS = "latentindigo"


class NoMatplotlibError(RuntimeError):
    """Matplotlib is missing."""


def tables(result: Mapping[str, Any]) -> str:
    """All protocols of a result file as Markdown, one table each, best PSNR first.

    Args:
        result: The decoded JSON.

    Returns:
        Tables with the measures that at least one method has; cells are "mean [low, high]".
    """
    parts: list[str] = []
    for name, protocol in result["protocols"].items():
        entries = [e for e in result["summary"] if e["protocol"] == name]
        entries.sort(key=lambda e: -(e.get("psnr") or {"mean": 0.0})["mean"])
        columns = [c for c in COLUMNS if any(c in e for e in entries)]
        columns += sorted({k for e in entries for k in e if "_minus_" in k})
        count = len({r["image"] for r in result["rows"] if r["protocol"] == name})
        cut = f"crops of {protocol['crop']}²" if protocol.get("crop") else "whole images"
        head = (
            f"`{name}` (version {protocol['version']}): ×{protocol['scale']}, {count} images of {protocol['images']}, "
        )
        rows = [r for r in result["rows"] if r["protocol"] == name]
        parts.append(f"{head}{cut}, RGB, seed {protocol['seed']}\n\n{markdown_table(entries, columns, rows)}")
    return "\n\n".join(parts) + "\n"


def _figure(columns: int, width: float = 5.5, height: float = 4.4) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlibError(
            "plots need Matplotlib, which is not installed; pip install 'latentindigo[benchmark]'"
        ) from error
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def plot_quality(result: Mapping[str, Any], target: Path, metrics: Sequence[str] = ("psnr", "swd")) -> None:
    """Quality against seconds per image, one panel per protocol and measure.

    Args:
        result: The decoded JSON.
        target: Picture to write; the suffix decides the format.
        metrics: Measures; what a method lacks is left out.

    Raises:
        NoMatplotlibError: If Matplotlib is missing.
    """
    names = list(result["protocols"])
    figure, axes = _figure(len(metrics) * len(names))
    for panel, axis in enumerate(axes):
        protocol, metric = names[panel // len(metrics)], metrics[panel % len(metrics)]
        for entry in result["summary"]:
            if entry["protocol"] != protocol or metric not in entry or "seconds" not in entry:
                continue
            x, y = entry["seconds"]["median"] or entry["seconds"]["mean"], entry[metric]
            ours = entry["method"].startswith(_OURS)
            bars = None if y["low"] is None else [[y["mean"] - y["low"]], [y["high"] - y["mean"]]]
            axis.errorbar(
                x, y["mean"], yerr=bars, fmt="o" if ours else "s", color="tab:blue" if ours else "tab:gray",
                markersize=5, elinewidth=0.8,
            )  # fmt: skip
            label = f"{entry['method']} {entry['variant']}".strip()
            axis.annotate(label, (x, y["mean"]), xytext=(4, 3), textcoords="offset points", fontsize=6)
        axis.set(title=protocol, xlabel="seconds per image", ylabel=LABELS.get(metric, metric), xscale="log")
        axis.grid(alpha=0.3)
    figure.savefig(target, dpi=90)


def plot_steps(result: Mapping[str, Any], target: Path, metrics: Sequence[str] = ("psnr", "swd")) -> None:
    """Quality against denoiser evaluations: one line per method that was run with several.

    Args:
        result: The decoded JSON; its rows carry `nfe`, or counted `calls`.
        target: Picture to write.
        metrics: One panel each.

    Raises:
        NoMatplotlibError: If Matplotlib is missing.
        ValueError: If no method was run with two numbers of evaluations.
    """
    nfe = {(r["protocol"], r["method"], r["variant"]): _evaluations(r) for r in result["rows"]}
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in result["summary"]:
        if nfe.get((entry["protocol"], entry["method"], entry["variant"])):
            lines.setdefault((entry["protocol"], entry["method"]), []).append(entry)
    lines = {
        key: entries for key, entries in lines.items() if len({nfe[(*key, entry["variant"])] for entry in entries}) > 1
    }
    if not lines:
        raise ValueError("a method with at least two numbers of denoiser evaluations expected, got none")
    figure, axes = _figure(len(metrics))
    for axis, metric in zip(axes, metrics, strict=True):
        for (protocol, method), entries in lines.items():
            points = sorted((nfe[protocol, method, e["variant"]], e[metric]["mean"]) for e in entries if metric in e)
            axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"{method}, {protocol}")
        axis.set(xlabel="denoiser evaluations", ylabel=LABELS.get(metric, metric), xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(target, dpi=90)


def _evaluations(row: Mapping[str, Any]) -> int | None:
    return row["nfe"] if "nfe" in row else (row.get("calls") or {}).get("denoiser")


def image_grid(columns: Mapping[str, Sequence[Float[Tensor, "3 h w"]]], crop: int = 64, cell: int = 256) -> Image.Image:
    """A grid of images, one column per method, one row per image, with a crop at the centre enlarged below each.

    Args:
        columns: Label -> images, the same images in the same order in each column.
        crop: Side of the part that is enlarged, in pixels.
        cell: Side of a cell, in pixels.

    Returns:
        The picture; enlarged parts show pixels as they are.

    Raises:
        ValueError: If the columns differ in length or there is none.
    """
    lengths = {len(images) for images in columns.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"columns of one length, at least 1, expected, got lengths {sorted(lengths)}")
    rows: list[list[Tensor]] = []
    for k in range(lengths.pop()):
        images = [column[k] for column in columns.values()]
        rows.append(images)
        rows.append([_enlarged(x, crop, cell) for x in images])
    return contact_sheet(rows, list(columns), cell)


def _enlarged(x: Tensor, crop: int, cell: int) -> Tensor:
    top, left = (max(0, side - crop) // 2 for side in x.shape[-2:])
    return F.interpolate(x[None, :, top : top + crop, left : left + crop], size=(cell, cell), mode="nearest")[0]
