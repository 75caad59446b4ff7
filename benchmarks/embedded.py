"""The embedded model against its bars: autoencoder, refinement, calibration, and everything in one run."""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import Bench, entry_of, say
from methods import pipeline
from torch import Tensor

from latentindigo.degradations import blur, gaussian_kernel
from latentindigo.evaluation import Protocol, Restored, bootstrap_interval, make_row
from latentindigo.metrics import round8

BEYOND = ("beyond-jpeg5", "beyond-blur4", "beyond-noise40")
CALIBRATION_SAMPLES = 8


def autoencoder(bench: Bench) -> Sequence[str]:
    """The round trip D(E(x)) of clean images: no restoration can be sharper."""
    protocol = Protocol("autoencoder", "none", 1, "val")
    pairs = bench.pairs(protocol, lambda x, generator: x)
    prior = bench.prior

    def round_trip(images: list[Tensor], numbers: list[int]) -> Restored:
        x = torch.stack(images).to(prior.device)
        return Restored(list(prior.decode(prior.encode(x)).clamp(0, 1).cpu()))

    bench.run(protocol, pairs, "autoencoder", "round trip", round_trip)
    return ("psnr", "ssim", "gradient_energy", "swd")


def refinement(bench: Bench) -> Sequence[str]:
    """Refinement of the INN on against off, on damage outside every training range."""
    for name in BEYOND:
        protocol = Protocol(name, name, 4, "val")
        pairs = bench.pairs(protocol)
        for variant, refine in (("off", False), ("on", True)):
            restore = pipeline(bench.pipe, 4, preset="default", guidance=bench.guidance("default", refine=refine))
            bench.run(protocol, pairs, "default refinement", variant, restore)
        bench.difference(name, ("default refinement", "on"), ("default refinement", "off"), "unrefined")
    return ("psnr", "gradient_energy", "swd", "psnr_minus_unrefined")


def calibration(bench: Bench) -> Sequence[str]:
    """Does the spread of samples tell where the error is? Pearson correlation over all pixels of each image.

    A standard deviation of 8 samples is off by a quarter at each pixel; "pooled" takes the mean square over neighbours.
    """
    protocol = Protocol("medium", "medium", 4, "val")
    pairs = bench.pairs(protocol)
    rows, of_mean, of_one, of_pooled = [], [], [], []
    neighbours = gaussian_kernel(13, 1.5)
    for pair in pairs:
        out = bench.pipe(pair.y, 4, num_samples=CALIBRATION_SAMPLES, seed=pair.number, output_type="pt")
        samples = torch.stack([round8(x) for x in out.images])
        spread = samples.std(0).mean(0)
        error = (samples.mean(0) - pair.clean).abs().mean(0)
        pooled = blur(samples.var(0)[None], neighbours)[0].mean(0).sqrt()
        of_mean.append(_correlation(spread, error))
        of_one.append(_correlation(spread, (samples[0] - pair.clean).abs().mean(0)))
        of_pooled.append(_correlation(pooled, error))
        values = {
            "correlation": of_mean[-1],
            "correlation_one_sample": of_one[-1],
            "correlation_pooled": of_pooled[-1],
            "calls": out.calls["total"],
        }
        rows.append(make_row("calibration", "default", protocol.name, pair.name, **values))
    intervals = {"correlation": of_mean, "correlation_one_sample": of_one, "correlation_pooled": of_pooled}
    bench.add(rows, entry_of(rows[0], **{k: bootstrap_interval(v) for k, v in intervals.items()}))
    return tuple(intervals)


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


# ---------------------------------------------------------------------------------------------------------------- bars


@dataclass(frozen=True)
class Bar:
    """A figure that the embedded model should reach.

    Attributes:
        name: What is measured.
        entry: (protocol, method, variant) of the summary that holds it.
        metric: Key of the entry.
        limit: The bar.
        at_most: Whether the figure must lie below it.
        over: (protocol, method, variant) of an entry whose same metric divides it.
    """

    name: str
    entry: tuple[str, str, str]
    metric: str
    limit: float
    at_most: bool = False
    over: tuple[str, str, str] | None = None

    def measured(self, summary: Sequence[dict[str, Any]]) -> float | None:
        """The figure, None where it was not measured."""
        value = _mean(summary, self.entry, self.metric)
        if value is None or self.over is None:
            return value
        base = _mean(summary, self.over, self.metric)
        return value / base if base else None


def _mean(summary: Sequence[dict[str, Any]], key: tuple[str, str, str], metric: str) -> float | None:
    for entry in summary:
        if (entry["protocol"], entry["method"], entry["variant"]) == key and metric in entry:
            return entry[metric]["mean"]
    return None


def _preset_bars() -> list[Bar]:
    bars: list[Bar] = []
    for name, gain in (("mild", 0.4), ("medium", 0.7), ("severe", 0.9)):
        bicubic, estimator = (name, "bicubic", ""), (name, "estimator", "")
        faithful, default, vivid = ((name, "preset", preset) for preset in ("faithful", "default", "vivid"))
        bars += [
            Bar(f"faithful x4 {name}: PSNR over bicubic, dB", faithful, "psnr_minus_bicubic", gain),
            Bar(f"faithful x4 {name}: PSNR over the estimator, dB", faithful, "psnr_minus_estimator", -0.02),
            # One of these two is asked for.
            Bar(f"faithful x4 {name}: swd over the estimator's (or SSIM)", faithful, "swd", 1, True, estimator),
            Bar(f"faithful x4 {name}: SSIM over the estimator's (or swd)", faithful, "ssim", 1, False, estimator),
            Bar(f"default x4 {name}: gradient energy", default, "gradient_energy", 0.4),
            Bar(f"default x4 {name}: PSNR over bicubic, dB", default, "psnr_minus_bicubic", -1.0),
            Bar(f"default x4 {name}: swd over bicubic's", default, "swd", 0.5, True, bicubic),
            Bar(f"vivid x4 {name}: gradient energy", vivid, "gradient_energy", 0.75),
            Bar(f"vivid x4 {name}: gradient energy, not above", vivid, "gradient_energy", 1.15, True),
            Bar(f"vivid x4 {name}: PSNR over bicubic, dB", vivid, "psnr_minus_bicubic", -2.7),
            Bar(f"vivid x4 {name}: swd over bicubic's", vivid, "swd", 0.35, True, bicubic),
        ]
        for preset in ("default", "vivid"):
            for control in ("grain on bicubic", "grain on estimator", "unsharp on estimator"):
                key, rival = (name, "preset", preset), (name, control, f"as rough as {preset}")
                label = f"{preset} x4 {name} against {control}"
                bars.append(Bar(f"{label}: PSNR ratio", key, "psnr", 1, over=rival))
                bars.append(Bar(f"{label}: swd ratio", key, "swd", 1, True, rival))
    for name, gain in (("noise15", 4.0), ("jpeg15", 0.6), ("blur1.5-noise5", 0.8)):
        key = (name, "preset", "faithful")
        bars.append(Bar(f"faithful x1 {name}: PSNR over the input, dB", key, "psnr_minus_bicubic", gain))
    return bars


def _bars() -> list[Bar]:
    linear, joint = ("random", "best linear map", "latents"), ("probe-joint", "linear probe", "joint")
    alone = ("probe-blur alone", "linear probe", "blur alone")
    fifty = ("medium", "preset", "default, 50 steps")
    return [
        Bar("autoencoder: PSNR, dB", ("autoencoder", "autoencoder", "round trip"), "psnr", 31),
        Bar("autoencoder: gradient energy", ("autoencoder", "autoencoder", "round trip"), "gradient_energy", 0.75),
        Bar("PixelINN coarse: MSE over bicubic's", ("random", "pixel-inn", "pixels"), "mse_over_bicubic", 0.35, True),
        Bar(
            "LatentINN coarse: MSE over the linear map's", ("random", "latent-inn", "latents"), "mse", 0.6, True, linear
        ),
        Bar("probe, joint: R² of noise", joint, "r2_noise", 0.9),
        Bar("probe, joint: R² of JPEG", joint, "r2_jpeg", 0.85),
        Bar("probe, joint: R² of blur", joint, "r2_blur", 0.55),
        Bar("probe, blur alone: R² of blur", alone, "r2_blur", 0.9),
        Bar("LatentINN guided over unguided, dB", ("medium", "latent-inn", "stopped"), "psnr_minus_unguided", 1.0),
        Bar("PixelINN guided over unguided, dB", ("medium", "pixel-inn", "stopped"), "psnr_minus_unguided", 1.2),
        *_preset_bars(),
        Bar(
            "default over default with 50 steps: PSNR, dB", ("medium", "preset", "default"), "psnr_minus_50 steps", -0.1
        ),
        Bar("default over default with 50 steps: swd", ("medium", "preset", "default"), "swd", 1.05, True, fifty),
        *(
            Bar(
                f"refinement on over off, {name}: PSNR, dB",
                (name, "default refinement", "on"),
                "psnr_minus_unrefined",
                0,
            )
            for name in BEYOND
        ),
        Bar("calibration, default: correlation", ("medium", "calibration", "default"), "correlation", 0.4),
    ]


def bars_table(summary: Sequence[dict[str, Any]]) -> str:
    """All bars as a Markdown table: bar, figure, met or not."""
    lines = ["| what | bar | measured | met |", "| --- | --- | --- | --- |"]
    for bar in _bars():
        value = bar.measured(summary)
        meets: Callable[[float, float], bool] = operator.le if bar.at_most else operator.ge
        sign = "≤" if bar.at_most else "≥"
        shown = "not measured" if value is None else f"{value:.4g}"
        met = "" if value is None else "yes" if meets(value, bar.limit) else "**no**"
        lines.append(f"| {bar.name} | {sign} {bar.limit:g} | {shown} | {met} |")
    return "\n".join(lines) + "\n"


def show_bars(bench: Bench) -> str:
    """Write the table of bars beside the result file, and show it."""
    text = bars_table(bench.summary)
    (bench.args.out / f"{bench.args.date}-{bench.args.suite}-bars.md").write_text(text)
    say("\n" + text)
    return text


if __name__ == "__main__":
    # The bars of suites that were run one by one: python benchmarks/embedded.py benchmarks/results/<date>-*.json
    found = [json.loads(Path(name).read_text())["summary"] for name in sys.argv[1:]]
    say(bars_table([entry for summary in found for entry in summary]))
