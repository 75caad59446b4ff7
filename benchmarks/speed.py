"""Speed and memory against their bars, every figure a ratio inside one run.

    python benchmarks/speed.py guidance                  # what each rule of guidance costs
    python benchmarks/speed.py profile --repeats 9       # where the time of a restoration goes
    python benchmarks/speed.py sizes --sides 256 512     # a quick look

Seconds depend on the machine and on what else it does. So what is compared is run in turn (A B C, B C A, ...), the
ratio is taken repeat by repeat, and its median counts. Each suite writes `benchmarks/results/<date>-speed-<suite>.json`
and prints two Markdown tables: the bars, and the means behind them. In a file, rows are repeats.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import operator
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench import ROOT, Bench, entry_of, say
from processes import FIRST_STEP, run_python, stand_ins
from rrdbnet import RRDBNet
from seams import line_steps, seam_pictures
from torch import Tensor

from latentindigo import RestorationPipeline
from latentindigo.baselines import Pipeline
from latentindigo.canvas import AUTO_TILE, overlapping, tiling_from
from latentindigo.comparison import Contender, compare, compared_to, release_memory, summary_of
from latentindigo.evaluation import (
    Pair,
    Protocol,
    Row,
    bootstrap_interval,
    make_row,
    markdown_table,
    peak_mb,
    reset_peak,
)
from latentindigo.guidance import UPDATES, LearnedForward
from latentindigo.images import LoadedImage, list_images, load_image, pil_resize, save_image
from latentindigo.metrics import psnr, round8
from latentindigo.pipeline import MOST_TILES_AT_ONCE
from latentindigo.tiling import TilingConfig, plan_tiles

STEPS = 10
# Encode, denoise, decode: nothing drawn before sampling, nothing of the start image mixed in or added back at the end.
SAMPLER = {"steps": STEPS, "residual": 0.0, "spread": 0.0, "texture": 1.0, "chroma": 1.0, "coarse": 1.0, "ensemble": 1}
SEAM_TILE = 512
SMALLEST_STEP = 0.1  # Of 1/255: a seam below it cannot be seen, and a ratio of two such steps says nothing.
NOT_NEEDED = ("transformers", "gradio", "ray")  # Packages that a restoration by the embedded model must not import.

Part = tuple[str, str]  # (method, variant)
Work = Callable[[int], dict[str, Any]]  # Number of the repeat -> values of its row.
NETWORKS = {
    "denoiser": {"forward": "denoiser"},
    "vae": {"encode": "encoder", "decode": "decoder"},
    "estimator": {"forward": "estimator"},
    "degradation_encoder": {"forward": "degradation encoder", "estimate": "degradation encoder"},
    "pixel_inn": {"forward": "pixel INN", "split": "pixel INN", "inverse": "pixel INN"},
    "latent_inn": {"forward": "latent INN", "split": "latent INN", "inverse": "latent INN", "spread": "latent INN"},
}


def now() -> float:
    """Seconds on a clock, once the accelerator (if there is one) has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timers:
    """Seconds that a call spends in the forward passes of each network, taken in that very call.

    A network that runs inside another counts once. Backward passes are nobody's.

    Attributes:
        seconds: Network -> seconds so far.
    """

    def __init__(self, pipe: RestorationPipeline) -> None:
        self.seconds = {label: 0.0 for methods in NETWORKS.values() for label in methods.values()}
        found: list[tuple[Any, dict[str, str]]] = [(getattr(pipe, name), NETWORKS[name]) for name in NETWORKS]
        self._wrapped = [
            (net, method, label) for net, methods in found if net is not None for method, label in methods.items()
        ]
        self._inside = False

    def __enter__(self) -> Timers:
        for network, method, label in self._wrapped:
            setattr(network, method, self._timed(label, getattr(network, method)))
        return self

    def __exit__(self, *_: object) -> None:
        for network, method, _label in self._wrapped:
            delattr(network, method)  # The instance's own; the class's shows again.

    def _timed(self, label: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            if self._inside:
                return method(*args, **keywords)
            self._inside, start = True, now()
            try:
                return method(*args, **keywords)
            finally:
                self.seconds[label] += now() - start
                self._inside = False

        return call


class SpeedBench(Bench):
    """A run that compares what things cost, and the bars that it met."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.settings["bars"] = {}

    def photo(self, side: int, number: int = 0) -> Tensor:
        """A photo of val, brought to side x side pixels."""
        paths = list_images(self.folder("val"))
        return pil_resize(load_image(paths[number % len(paths)]).rgb, (side, side)).clamp(0, 1)

    def restoring(self, y: Tensor, **settings: Any) -> Work:
        """The work of restoring y at x4."""
        return lambda _: {"calls": self.pipe(y, 4, output_type="pt", **settings).calls["total"]}

    def take_turns(self, protocol: str, parts: Mapping[Part, Work]) -> dict[Part, list[Row]]:
        """Run every part once to warm up, then again and again, beginning with another one each time."""
        self.protocols.append(Protocol(protocol, "none", 4, "val"))
        for work in parts.values():
            work(0)
        names, rows = list(parts), {part: [] for part in parts}
        for k in range(self.args.repeats):
            for part in (names[(n + k) % len(names)] for n in range(len(names))):
                release_memory()
                reset_peak()
                held, start = peak_mb(), now()
                values = parts[part](k)
                cost = {"seconds": now() - start, "peak_mb": peak_mb()}
                cost["extra_mb"] = round(cost["peak_mb"] - held, 1)
                rows[part].append(make_row(*part, protocol, f"repeat {k}", **{**cost, **values}))
        return rows

    def report(self, rows: Sequence[Row], *keys: str, **figures: Sequence[float]) -> None:
        """Take in the rows of one part; keys of the rows and further figures as means with intervals and medians."""
        named = {key: [row[key] for row in rows] for key in keys} | figures
        spread = {k: bootstrap_interval(v)._asdict() | {"median": statistics.median(v)} for k, v in named.items()}
        self.add(rows, entry_of(rows[0]) | spread)

    def bar(
        self, what: str, value: float | Sequence[float], limit: float | None = None, *, least: bool = False
    ) -> None:
        """Hold a figure, or the median of several, against its bar (the most, or the least); None = only tell it."""
        measured = float(value) if isinstance(value, (int, float)) else statistics.median(value)
        meets: Callable[[float, float], bool] = operator.ge if least else operator.le
        shown = "none" if limit is None else f"{'≥' if least else '≤'} {limit:g}"
        met = None if limit is None else meets(measured, limit)
        self.settings["bars"][what] = {"bar": shown, "measured": measured, "met": met}

    def bars_table(self) -> str:
        """All bars as a Markdown table."""
        lines = ["| what | bar | measured | met |", "| --- | --- | --- | --- |"]
        for what, bar in self.settings["bars"].items():
            met = "" if bar["met"] is None else "yes" if bar["met"] else "**no**"
            lines.append(f"| {what} | {bar['bar']} | {bar['measured']:.4g} | {met} |")
        return "\n".join(lines) + "\n"


def ratios(ours: Sequence[Row], theirs: Sequence[Row], key: str) -> list[float]:
    """Quotients of a figure, repeat by repeat; NaN where the divisor is 0."""
    return [a[key] / b[key] if b[key] else math.nan for a, b in zip(ours, theirs, strict=True)]


# ------------------------------------------------------------------------------------------------------------ guidance


def guidance(bench: SpeedBench) -> Sequence[str]:
    """What guidance in latents costs over the unguided run, in time and in memory above the loaded model."""
    y, settings = bench.photo(128), {"init": "encode", **SAMPLER}
    parts = {("unguided", ""): bench.restoring(y, method="unguided", **settings)}
    for update in UPDATES:
        parts["latent-inn", update] = bench.restoring(y, method="latent-inn", update=update, **settings)
    plain, *guided = bench.take_turns("512", parts).values()
    bench.report(plain, "seconds", "extra_mb")
    for update, rows, limits in zip(UPDATES, guided, ((1.25, 1.1), (1.5, 1.3), (3.0, 3.0)), strict=True):
        slower, larger = (ratios(rows, plain, key) for key in ("seconds", "extra_mb"))
        bench.report(rows, "seconds", "extra_mb", seconds_over_unguided=slower, extra_mb_over_unguided=larger)
        bench.bar(f"LatentINN {update} over unguided: time", slower, limits[0])
        bench.bar(f"LatentINN {update} over unguided: peak memory above the model", larger, limits[1])
    return ("seconds", "seconds_over_unguided", "extra_mb", "extra_mb_over_unguided")


def pixel(bench: SpeedBench) -> Sequence[str]:
    """A step guided by PixelINN against the sum of its parts, and against one guided by LatentINN.

    A guided step is the time between the ends of two steps of one call, median over the call. Its guidance is what is
    left without the denoiser, which is timed in the same step. The parts are timed alone, at the same size.
    """
    pipe, prior, y = bench.pipe, bench.prior, bench.photo(128)
    latent = prior.encode(bench.photo(512)[None].to(prior.device))
    x, t = prior.decode(latent).clamp(0, 1), torch.tensor([300], device=prior.device)
    target, inn = y[None].to(x), LearnedForward(pipe.pixel_inn, bench.gamma(y).to(pipe.pixel_inn.dtype), 2)

    def guided(method: str) -> Work:
        def work(_: int) -> dict[str, Any]:
            moments: list[tuple[float, float]] = []
            with Timers(pipe) as timers:
                bench.restoring(
                    y, method=method, update="stopped", init="encode", **SAMPLER,
                    callback_on_step_end=lambda *_: moments.append((now(), timers.seconds["denoiser"])),
                )(0)  # fmt: skip
            steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(moments)]
            rest = statistics.median(whole - denoiser for whole, denoiser in steps)
            return {"step": statistics.median(whole for whole, _ in steps), "guidance": rest}

        return work

    def alone(run: Callable[[], Any]) -> Work:
        def work(_: int) -> dict[str, Any]:
            moments = [now()]
            for _ in range(STEPS):
                run()
                moments.append(now())
            return {"step": statistics.median(b - a for a, b in pairwise(moments))}

        return work

    @torch.enable_grad()
    def decoder() -> None:
        leaf = latent.detach().requires_grad_()
        decoded = prior.decode(leaf)
        torch.autograd.grad(decoded, leaf, torch.ones_like(decoded))

    @torch.enable_grad()
    def pixel_inn() -> None:
        leaf = x.detach().requires_grad_()
        coarse, details = inn.split(leaf)
        loss = (target - coarse).square().sum() + (inn.merge(target, details) - leaf).square().sum()
        torch.autograd.grad(loss, leaf)

    parts: dict[Part, Work] = {(method, "stopped"): guided(method) for method in ("pixel-inn", "latent-inn")}
    parts["alone", "denoiser: forward"] = alone(lambda: pipe.denoiser(latent.to(prior.dtype), t).sample)
    parts["alone", "decoder: forward and backward"] = alone(decoder)
    parts["alone", "pixel INN: forward, inverse and backward"] = alone(pixel_inn)
    ours, theirs, *pieces = bench.take_turns("512", parts).values()
    for rows in (ours, theirs, *pieces):
        bench.report(rows, *(("step",) if rows in pieces else ("step", "guidance")))
    sums = [{"step": sum(row["step"] for row in group)} for group in zip(*pieces, strict=True)]
    bench.bar("PixelINN stopped, a guided step over the sum of its parts", ratios(ours, sums, "step"), 1.15)
    bench.bar("LatentINN over PixelINN, guidance of a step", ratios(theirs, ours, "guidance"), 1 / 8)
    bench.bar("LatentINN over PixelINN, a whole guided step", ratios(theirs, ours, "step"))
    return ("step", "guidance")


def every(bench: SpeedBench) -> Sequence[str]:
    """PixelINN in the last of every three steps against every step, in 10 steps and in 20, photo by photo.

    Photos of val are small: four of them, damaged one by one, make a picture of 512 x 512, the other suites' size. Of
    10 steps 3 are guided, of 20 there are 6.
    """
    protocol = Protocol("medium", "medium", 4, "val")
    pairs, settings = (
        _in_fours(bench.pairs(protocol)),
        {"method": "pixel-inn", "update": "stopped", "init": "estimator"} | SAMPLER,
    )
    for steps in (10, 20):
        contenders = [
            Contender(
                "pixel-inn",
                f"{name}, {steps} steps",
                Pipeline(bench.pipe, guidance=bench.guidance("default", every_k=k), **{**settings, "steps": steps}),
            )
            for k, name in ((1, "every"), (3, "every third"))
        ]
        always, third = compare(contenders, protocol, pairs)
        for measured in (always, third):
            bench.add(measured.rows, summary_of(measured, pairs))
        saved = [100 * (1 - ratio) for ratio in ratios(third.rows, always.rows, "seconds")]
        lost = compared_to(always, third)["psnr"].mean
        bench.bar(f"PixelINN every third of {steps} steps: time saved, %", saved, 55, least=True)
        bench.bar(f"PixelINN every third of {steps} steps: mean PSNR lost, dB", lost, 0.1)
    return ("psnr", "seconds")


def _in_fours(pairs: Sequence[Pair]) -> list[Pair]:
    """Pictures of two by two photos of one size."""

    def square(four: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.cat(list(row), -1) for row in (four[:2], four[2:])], -2)

    groups = [pairs[k : k + 4] for k in range(0, len(pairs) - 3, 4)]
    return [
        Pair(" + ".join(p.name for p in four), square([p.clean for p in four]), square([p.y for p in four]), k)
        for k, four in enumerate(groups)
    ]


# ----------------------------------------------------------------------------------------------------- whole restoring


def rrdbnet(bench: SpeedBench) -> Sequence[str]:
    """A default restoration against one pass of Real-ESRGAN's network, both from 128 x 128 pixels."""
    y, prior = bench.photo(128), bench.prior
    # Channels last is how this network is fastest on a CPU.
    net = RRDBNet().eval().to(prior.device, prior.dtype)
    small = y[None].to(prior.device, prior.dtype).contiguous(memory_format=torch.channels_last)

    def forward(_: int) -> dict[str, Any]:
        return {"pixels": net(small)[0, 0].numel()}

    parts: dict[Part, Work] = {("preset", "default"): bench.restoring(y), ("rrdbnet", "23 blocks"): forward}
    ours, theirs = bench.take_turns("512", parts).values()
    over = ratios(ours, theirs, "seconds")
    bench.report(theirs, "seconds", "extra_mb")
    bench.report(ours, "seconds", "extra_mb", seconds_over_rrdbnet=over)
    bench.bar("default 128 to 512 over one pass of RRDBNet: time", over, 1.5)
    bench.bar("the same: peak memory above the model", ratios(ours, theirs, "extra_mb"))
    return ("seconds", "seconds_over_rrdbnet", "extra_mb")


def sizes(bench: SpeedBench) -> Sequence[str]:
    """Time and memory as the output grows; each peak is that of a process of its own, model and libraries included."""
    low, *_, high = bench.args.sides
    parts = {("default", f"{side} x {side}"): bench.restoring(bench.photo(side // 4)) for side in bench.args.sides}
    for rows in (found := bench.take_turns("sizes", parts)).values():
        bench.report(rows, "seconds", "extra_mb")
    over = ratios(found["default", f"{high} x {high}"], found["default", f"{low} x {low}"], "seconds")
    bench.bar(f"time at {high}² over {low}²", over, 1.125 * (high / low) ** 2)  # 18 for 16 times the pixels.
    peaks: list[float] = []
    for side in bench.args.peak_sides:
        command = [__file__, "peak", "--side", str(side), "--data", str(bench.args.data), *same_options(bench.args)]
        peaks.append(float(run_python(command)))
        row = make_row("default, a process of its own", f"{side} x {side}", "sizes", "repeat 0", peak_mb=peaks[-1])
        bench.report([row], "peak_mb")
    low, high = bench.args.peak_sides
    bench.bar(f"peak memory at {high}² minus {low}², GiB", (peaks[1] - peaks[0]) * 1e6 / 2**30, 0.8)
    return ("seconds", "extra_mb", "peak_mb")


def peak(bench: SpeedBench) -> None:
    """Print the peak memory of this process after one restoration, in MB; what `sizes` calls."""
    bench.restoring(bench.photo(bench.args.side // 4))(0)
    say(str(peak_mb()))


def _files(bench: SpeedBench) -> list[Row]:
    """Read a photo of 128 x 128, restore it, write the result; rows with the time that each network took in it."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "photo.png", Path(folder) / "restored.png"
        save_image(LoadedImage(rgb=bench.photo(128), mode="RGB"), source)

        def work(_: int) -> dict[str, Any]:
            with Timers(bench.pipe) as timers:
                start = now()
                picture = load_image(source)
                loaded = now()
                out = bench.pipe(picture.rgb, 4, output_type="pt")
                restored = now()
                save_image(picture.replace_pixels(out.images[0], None), target, overwrite=True)
            files = loaded - start + now() - restored
            return {"calls": out.calls["total"], "networks": timers.seconds, "files": files}

        return bench.take_turns("512", {("preset", "default"): work})["preset", "default"]


def overhead(bench: SpeedBench) -> Sequence[str]:
    """Reading a photo, restoring it and writing the result, over the time that its networks take in the same call."""
    rows = _files(bench)
    over = [row["seconds"] / sum(row["networks"].values()) for row in rows]
    bench.report(rows, "seconds", "files", over_networks=over)
    bench.bar("read, restore, write over the networks' time", over, 1.3)
    return ("seconds", "files", "over_networks")


def profile(bench: SpeedBench) -> Sequence[str]:
    """Where the time of a default restoration from 128 to 512 pixels goes, network by network."""
    rows = _files(bench)
    bench.report(rows, "seconds")
    parts = {name: [row["networks"][name] for row in rows] for name in rows[0]["networks"]}
    parts["reading and writing"] = [row["files"] for row in rows]
    rest = zip(rows, zip(*parts.values(), strict=True), strict=True)
    parts["all else"] = [row["seconds"] - sum(seconds) for row, seconds in rest]
    for name, seconds in parts.items():
        of_part = [
            make_row("of it", name, "512", row["image"], seconds=s) for row, s in zip(rows, seconds, strict=True)
        ]
        bench.report(of_part, "seconds", percent=[100 * share for share in ratios(of_part, rows, "seconds")])
    return ("seconds", "percent")


def dtypes(bench: SpeedBench) -> Sequence[str]:
    """The chosen dtype against float32, same seeds: how much faster, and how far apart; each repeat another photo."""
    args, images = bench.args, {}
    if args.dtype == "float32":
        sys.exit("dtypes compares another dtype with float32; give --dtype bfloat16")
    exact = RestorationPipeline.from_pretrained(args.model, torch_dtype=torch.float32, device=args.device)

    def restoring(pipe: RestorationPipeline, name: str) -> Work:
        def work(k: int) -> dict[str, Any]:
            out = pipe(bench.photo(128, k), 4, seed=k, output_type="pt")
            images[name, k] = round8(out.images[0])[None]
            return {"calls": out.calls["total"]}

        return work

    parts = {(name, ""): restoring(pipe, name) for name, pipe in ((args.dtype, bench.pipe), ("float32", exact))}
    ours, theirs = bench.take_turns("512", parts).values()
    faster = ratios(theirs, ours, "seconds")
    close = [float(psnr(images[args.dtype, k], images["float32", k])) for k in range(args.repeats)]
    bench.report(theirs, "seconds")
    bench.report(ours, "seconds", times_faster=faster, psnr_to_float32=close)
    bench.bar(f"{args.dtype}: times faster than float32", faster, 1.5, least=True)
    bench.bar(f"{args.dtype}: PSNR to float32, dB", close, 40, least=True)
    return ("seconds", "times_faster", "psnr_to_float32")


def seams(bench: SpeedBench) -> Sequence[str]:
    """Tiled against untiled, same seed: how far apart, and whether the borders of tiles show.

    What tiling changes is D = tiled - untiled; edges and texture of the picture itself are not in it. Two figures per
    line between two columns (or rows) of pixels, from the first differences of D across it, in units of 1/255:

    | figure | meaning |
    | --- | --- |
    | step | mean of their absolute values along the line, over colours: grain that differs counts as much as a seam |
    | jump | absolute value of their mean along a tile and over seeds, largest over tiles and colours: grain cancels |

    Border lines are all lines of the stretches that two neighbouring tiles share, for somewhere in there one tile gives
    way to the other, be it by a ramp or by a cut; all other lines are inside. Ratios are of the largest border line to
    the largest inside, where what is too small to be seen counts as `SMALLEST_STEP`.
    """
    side, tiling = bench.args.side, tiling_from(SEAM_TILE)
    spans = [(0, side)]
    if isinstance(tiling, TilingConfig):
        spans = plan_tiles(side, tiling.tile, tiling.overlap, bench.prior.size_multiple)
    if len(spans) < 2:
        sys.exit(f"one tile has no seams; give a --side above {SEAM_TILE}")
    bench.protocols.append(Protocol("seams", "none", 4, "real, and drawn"))
    for name, y in seam_pictures(bench.folder("real"), side // 4).items():
        differences: list[Tensor] = []
        close: list[float] = []
        for seed in range(bench.args.seeds):
            tiled, whole = (
                bench.pipe(y, 4, seed=seed, tile=tile, output_type="pt").images[0] for tile in (SEAM_TILE, None)
            )
            differences.append(tiled - whole)
            close.append(float(psnr(round8(tiled)[None], round8(whole)[None])))
        values = line_steps(differences, spans)
        values["psnr_to_untiled"] = min(close)
        for kind in ("step", "jump"):
            border, inside = (max(SMALLEST_STEP, values[f"{place}_{kind}"]) for place in ("border", "inside"))
            values[f"{kind}_ratio"] = border / inside
        bench.report([make_row("seams", name, "seams", "all seeds", **values)], *values)
        if name != "flat grey":
            bench.bar(f"{name}: PSNR of tiled to untiled, dB", min(close), 35, least=True)
            for kind in ("step", "jump"):
                bench.bar(f"{name}: largest {kind} at borders over inside", values[f"{kind}_ratio"], 1.1)
        if name in ("gradient", "flat grey"):
            bench.bar(f"{name}: largest jump at borders, 1/255", values["border_jump"], 1)
    return ("psnr_to_untiled", "border_step", "inside_step", "border_jump", "inside_jump")


def tiles(bench: SpeedBench) -> Sequence[str]:
    """Tiles per second of the denoiser on a canvas, against its bare forward passes on tiles at the best batch size."""
    side, prior = bench.args.side, bench.prior
    tiling = overlapping(AUTO_TILE, multiple=prior.size_multiple)
    factor = prior.downsampling
    spans = plan_tiles(side // factor, tiling.tile // factor, tiling.overlap // factor, prior.size_multiple // factor)
    count, cells = len(spans) ** 2, spans[0][1] - spans[0][0]
    z = torch.randn(1, prior.latent_channels, side // factor, side // factor, device=prior.device)
    t, denoiser = torch.tensor([500], device=prior.device), bench.pipe.denoiser

    def bare(batch: int) -> Work:
        part = torch.randn(batch, z.shape[1], cells, cells, device=prior.device, dtype=prior.dtype)
        part, times = part.contiguous(memory_format=torch.channels_last), t.expand(batch)

        def work(_: int) -> dict[str, Any]:
            start = now()
            for _ in range(-(-count // batch)):
                denoiser(part, times)
            return {"tiles_per_second": -(-count // batch) * batch / (now() - start)}

        return work

    def tiled(batch: int) -> Work:
        trajectory = prior.tiled(tiling, batch).trajectory(STEPS, 0.5)

        def work(_: int) -> dict[str, Any]:
            start = now()
            trajectory.predict(z, 0)
            return {"tiles_per_second": count / (now() - start)}

        return work

    batches = [1] if prior.device.type == "cpu" else [1, 2, 4, 8, 16]
    alone = {("bare", f"batch {b}"): bare(b) for b in batches}
    ours = {("tiled", f"batch {b}"): tiled(b) for b in batches if b <= MOST_TILES_AT_ONCE}
    found = bench.take_turns(f"{side}", {**alone, **ours})
    speeds = {part: statistics.median(row["tiles_per_second"] for row in rows) for part, rows in found.items()}
    best = max(alone, key=lambda part: speeds[part])
    for rows in found.values():
        bench.report(rows, "tiles_per_second", over_best=ratios(rows, found[best], "tiles_per_second"))
    chosen = found["tiled", f"batch {max(b for b in batches if b <= MOST_TILES_AT_ONCE)}"]
    bench.bar(
        "tiles over bare forward passes at the best batch",
        ratios(chosen, found[best], "tiles_per_second"),
        0.8,
        least=True,
    )
    return ("tiles_per_second", "over_best")


# ------------------------------------------------------------------------------------------------------------- startup


def same_options(args: argparse.Namespace) -> list[str]:
    """The options of this run that a process of its own needs too, whether this script or the command line."""
    threads = ["--threads", str(args.threads)] if args.threads else []
    return ["--model", args.model, "--dtype", args.dtype, "--device", args.device, *threads]


def startup(bench: SpeedBench) -> Sequence[str]:
    """From the command line to the first step of the denoiser, against `import torch`, each in a process of its own.

    The photo is small, 32 x 32, so that loading counts and not restoring. Both times end inside the process: what
    leaving Python costs is in neither. Packages that are not needed get a stand-in, so that the check could fail.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_image(LoadedImage(rgb=bench.photo(32), mode="RGB"), folder / "photo.png")
        files = ["restore", str(folder / "photo.png"), "--out", str(folder / "restored.png"), "--overwrite"]
        names = [",".join(NOT_NEEDED), type(bench.pipe.denoiser).__name__]
        restore = ["-c", FIRST_STEP, *files, *same_options(bench.args), *names]
        torch_alone = ["-c", "import time, torch; print(time.time())"]

        def first_step(*paths: Path) -> dict[str, Any]:
            start = time.time()
            told = json.loads(run_python(restore, *paths))
            return {"seconds": told["first"] - start, "imported": told["imported"]}

        parts: dict[Part, Work] = {
            ("import torch", ""): lambda _: {"seconds": -time.time() + float(run_python(torch_alone))},
            ("restore", "first step"): lambda _: first_step(),
            ("python", "nothing"): lambda _: {"printed": len(run_python(["-c", "pass"]))},
            ("latentindigo", "help"): lambda _: {"printed": len(run_python(["-m", "latentindigo", "--help"]))},
        }
        alone, first, nothing, helping = (found := bench.take_turns("startup", parts)).values()
        imported = {
            "as installed here": first[0]["imported"],
            "with stand-ins": first_step(stand_ins(folder, NOT_NEEDED))["imported"],
        }
    for rows in found.values():
        bench.report(rows, "seconds")
    bench.bar("command line to the first step over import torch: time", ratios(first, alone, "seconds"), 2.5)
    bench.bar("latentindigo --help: seconds", [row["seconds"] for row in helping], 0.4)
    bench.bar("latentindigo --help over python -c pass: time", ratios(helping, nothing, "seconds"))
    for where, packages in imported.items():
        bench.bar(f"packages of {', '.join(NOT_NEEDED)} that a restoration imports, {where}", len(packages), 0)
    bench.settings["imported"] = imported
    return ("seconds",)


# ---------------------------------------------------------------------------------------------------------------- main

SUITES: dict[str, Callable[[SpeedBench], Sequence[str]]] = {
    suite.__name__: suite
    for suite in (guidance, pixel, every, rrdbnet, sizes, overhead, startup, dtypes, seams, profile, tiles)
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    data = os.environ.get("LATENTINDIGO_DATA", ROOT.parent / "shared" / "data")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", default="embedded", help="embedded, a folder or a hub id")
    common.add_argument("--data", type=Path, default=Path(data), help="folder with val and real")
    common.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    common.add_argument("--date", default=datetime.date.today().isoformat(), help="start of its name")
    common.add_argument("--repeats", type=int, default=5, help="measurements of each part, after one to warm up")
    common.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    common.add_argument("--device", default="cpu")
    common.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    suites = parser.add_subparsers(dest="suite", required=True, metavar=f"{{{','.join(SUITES)}}}")
    helps = {name: (suite.__doc__ or "").split("\n")[0] for name, suite in SUITES.items()}
    parts = {name: suites.add_parser(name, parents=[common], help=text) for name, text in helps.items()}
    parts["peak"] = suites.add_parser("peak", parents=[common])  # Without a help text it is not listed.
    parts["every"].add_argument("--limit", type=int, default=40, help="first N photos, four to a picture and repeat")
    parts["sizes"].add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048], help="sides of the outputs")
    parts["sizes"].add_argument("--peak-sides", type=int, nargs=2, default=[1024, 4096], help="the same, for memory")
    for name, side in (("seams", 1024), ("peak", 1024), ("tiles", 4096)):
        parts[name].add_argument("--side", type=int, default=side, help="side of the output")
    parts["seams"].add_argument("--seeds", type=int, default=3, help="restorations of each picture")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one suite."""
    args = _parse(argv)
    name, args.suite = args.suite, f"speed-{args.suite}"
    bench = SpeedBench(args)
    with torch.no_grad():
        if name == "peak":
            peak(bench)
            return
        columns = SUITES[name](bench)
    bench.save()
    if bench.settings["bars"]:
        say("\n" + bench.bars_table())
    say("\n" + markdown_table(bench.summary, columns, bench.rows))


if __name__ == "__main__":
    main()
