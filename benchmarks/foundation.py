"""Benchmarks of the embedded model, by suite: guided, presets, coarse, nonblind, real, tune, probe, and others.

    python benchmarks/foundation.py embedded               # everything that has a bar, all of val
    python benchmarks/foundation.py guided                 # two methods x three update rules
    python benchmarks/foundation.py presets --limit 4      # a quick look
    python benchmarks/foundation.py tune --settings '[{"preset": "default"}, {"preset": "default", "strength": 0.3}]'

Each suite writes `benchmarks/results/<date>-<suite>.json` and prints a Markdown table. `benchmarks/README.md` says how
the numbers are made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import torch
from bench import ROOT, Bench, entry_of, say
from embedded import autoencoder, calibration, refinement, show_bars
from methods import bicubic, estimator_alone, matched, pipeline
from networks import coarse, denoising, probe
from torch import Tensor

from latentindigo.controls import grain, unsharp
from latentindigo.data import sample_generator
from latentindigo.degradations import STANDARD
from latentindigo.evaluation import (
    METRICS,
    Pair,
    Protocol,
    Restored,
    Result,
    Row,
    bootstrap_interval,
    make_row,
    markdown_table,
    peak_mb,
    reset_peak,
)
from latentindigo.images import contact_sheet, list_images, load_image, pil_resize, save_image
from latentindigo.metrics import round8
from latentindigo.operators import Blur, Mask, Operator
from latentindigo.pipeline import RestorationOutput

STRENGTH = 0.83 / math.sqrt(1 + 0.83**2)  # sigma/alpha = 0.83
COLUMNS = (*METRICS, "seconds")


# -------------------------------------------------------------------------------------------------- guided and presets


def guided(bench: Bench) -> Sequence[str]:
    """Both methods x three update rules against the unguided run of the same start, steps and seeds."""
    args, pipe, protocol = bench.args, bench.pipe, Protocol("medium", "medium", 4, "val")
    pairs = bench.pairs(protocol)
    baselines(bench, protocol, pairs)
    zetas = {"latent-inn": args.zeta_latent, "pixel-inn": args.zeta_pixel}
    # What the sampling alone gives: nothing drawn before it, nothing of the start image mixed in at the end. With its
    # colours or its coarse band mixed in, the unguided run would already have part of what guidance gives.
    start = {
        "init": "estimator",
        "strength": STRENGTH,
        "steps": args.steps,
        "residual": 0.0,
        "spread": 0.0,
        "texture": 1.0,
        "chroma": 1.0,
        "coarse": 1.0,
    }
    unguided = ("unguided", "")
    bench.run(protocol, pairs, *unguided, pipeline(pipe, 4, method="unguided", **start))
    for method, zeta in zetas.items():
        guidance = bench.guidance("default", zeta=zeta, beta=args.beta)
        for update in ("projection", "stopped", "through"):
            settings = {"method": method, "update": update, "guidance": guidance, **start}
            bench.run(protocol, pairs, method, update, pipeline(pipe, 4, **settings))
            bench.difference(protocol.name, (method, update), unguided, "unguided")
    return _against_baselines(bench, (*COLUMNS, "psnr_minus_unguided"))


def baselines(bench: Bench, protocol: Protocol, pairs: Sequence[Pair]) -> tuple[Result | None, Result | None]:
    """Bicubic and the stage-one estimate alone."""
    scale = protocol.scale
    return (
        bench.run(protocol, pairs, "bicubic", "", bicubic(scale)),
        bench.run(protocol, pairs, "estimator", "", estimator_alone(bench.pipe, scale)),
    )


def _against_baselines(bench: Bench, columns: Sequence[str]) -> Sequence[str]:
    """Add the differences to bicubic and to the estimator alone to every entry."""
    for entry in bench.summary:
        for baseline in ("bicubic", "estimator"):
            bench.difference(entry["protocol"], (entry["method"], entry["variant"]), (baseline, ""), baseline)
    return (*columns, "psnr_minus_bicubic", "psnr_minus_estimator")


def presets(bench: Bench) -> Sequence[str]:
    """The presets on the standard degradations, at scale 4 beside their controls and medium in 50 steps."""
    columns: Sequence[str] = COLUMNS
    for name in ("mild", "medium", "severe", "random", "noise15", "jpeg15", "blur1.5-noise5"):
        scale = STANDARD[name].scale
        protocol = Protocol(name, name, scale, "val")
        pairs = bench.pairs(protocol)
        clean = [pair.clean for pair in pairs]
        plain, stage_one = baselines(bench, protocol, pairs)
        for preset in ("faithful", "default", "vivid"):
            ran = bench.run(protocol, pairs, "preset", preset, pipeline(bench.pipe, scale, preset=preset))
            if preset == "faithful" or scale == 1 or ran is None or plain is None or stage_one is None:
                continue
            # Each control gets the preset's gradient energy: what it costs to be as rough without knowing anything.
            energy = bench.summary[-1]["gradient_energy"]["mean"]
            for control, base, label in (
                (grain, plain, "grain on bicubic"),
                (grain, stage_one, "grain on estimator"),
                (unsharp, stage_one, "unsharp on estimator"),
            ):
                control_of = matched(base.images, clean, energy, control, scale)
                bench.run(protocol, pairs, label, f"as rough as {preset}", control_of)
        if name == "medium":
            many = pipeline(bench.pipe, scale, preset="default", steps=50)
            bench.run(protocol, pairs, "preset", "default, 50 steps", many)
            bench.difference(name, ("preset", "default"), ("preset", "default, 50 steps"), "50 steps")
        # After each protocol, so that a run that is cut short keeps the differences of what it has.
        columns = _against_baselines(bench, COLUMNS)
        bench.save()
    return columns


def tune(bench: Bench) -> Sequence[str]:
    """A sweep over settings on the images kept for choices.

    Settings are arguments of the pipeline's call, and `scheduler`: a scheduler's class, in place of the model's.
    """
    shipped = bench.pipe.scheduler
    text = bench.args.settings
    sweep: list[dict[str, Any]] = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    for name in bench.args.degradations:
        scale = STANDARD[name].scale
        protocol = Protocol(f"tune-{name}", name, scale, "tune", crop=256)
        pairs = bench.pairs(protocol)
        baselines(bench, protocol, pairs)
        for settings in sweep:
            label = json.dumps(settings, sort_keys=True).replace('"', "").strip("{}")
            call = {key: value for key, value in settings.items() if key != "scheduler"}
            scheduler = getattr(diffusers, settings.get("scheduler", type(shipped).__name__))
            bench.pipe.scheduler = scheduler.from_config(shipped.config)
            call["guidance"] = bench.guidance(settings.get("preset", "default"), **settings.get("guidance", {}))
            bench.run(protocol, pairs, "setting", label, pipeline(bench.pipe, scale, **call))
    bench.pipe.scheduler = shipped
    return _against_baselines(bench, COLUMNS)


def embedded(bench: Bench) -> Sequence[str]:
    """Everything that the embedded model has a bar for, in one run and one file."""
    presets(bench)
    for suite in (guided, autoencoder, coarse, probe, refinement, calibration):
        suite(bench)
    show_bars(bench)
    return _against_baselines(bench, (*COLUMNS, "psnr_minus_unguided"))


# ----------------------------------------------------------------------------------------------------------- non-blind


def nonblind(bench: Bench) -> Sequence[str]:
    """Known operators, told against blind. Blind is an ordinary restoration at scale 1 that is told nothing."""
    motion = Blur(torch.full((1, 9), 1 / 9))

    def blurred(x: Tensor, generator: torch.Generator) -> Tensor:
        return round8(motion.forward(x) + torch.randn(x.shape, generator=generator) * (2 / 255))

    def mask(size: Sequence[int], generator: torch.Generator) -> Mask:
        return Mask((torch.rand(*size, generator=generator) >= 0.3).float())

    _told_and_blind(bench, "motion9-noise2", blurred, lambda y, number: motion)
    # A pair's generator is sample_generator(0, its number), so the mask can be drawn again from the number.
    _told_and_blind(
        bench,
        "mask30",
        lambda x, generator: mask(x.shape[-2:], generator).forward(x),
        lambda y, number: mask(y.shape[-2:], sample_generator(0, number)),
    )
    return (*COLUMNS, "psnr_minus_blind", "psnr_minus_start")


def _told_and_blind(
    bench: Bench, name: str, degrader: Callable[..., Tensor], operator: Callable[[Tensor, int], Operator]
) -> None:
    protocol = Protocol(name, name, 1, "val")
    pairs = bench.pairs(protocol, degrader)

    def start(images: list[Tensor], numbers: list[int]) -> Restored:
        return Restored([operator(y, n).initial(y[None])[0] for y, n in zip(images, numbers, strict=True)])

    bench.run(protocol, pairs, "input", "", bicubic(1))
    bench.run(protocol, pairs, "told", "start image alone", start)
    for preset in ("default", "faithful"):
        bench.run(protocol, pairs, "blind", preset, pipeline(bench.pipe, 1, preset=preset))
        bench.run(protocol, pairs, "told", preset, _told(bench, preset, operator))
        bench.difference(name, ("told", preset), ("blind", preset), "blind")
        bench.difference(name, ("told", preset), ("told", "start image alone"), "start")


def _told(bench: Bench, preset: str, operator: Callable[[Tensor, int], Operator]) -> Callable[..., Restored]:
    def restore(images: list[Tensor], numbers: list[int]) -> Restored:
        if len(images) != 1:
            raise ValueError(f"each image has its own operator: a batch of 1 expected, got {len(images)}")
        return pipeline(bench.pipe, 1, preset=preset, operator=operator(images[0], numbers[0]))(images, numbers)

    return restore


# --------------------------------------------------------------------------------------------------------- real photos


def real(bench: Bench) -> Sequence[str]:
    """Every real photo at scale 2 and 4, smallest first; what is done already is not done again."""
    folder, keep = bench.folder("real"), bench.args.keep
    keep.mkdir(parents=True, exist_ok=True)
    log = keep / "log.jsonl"
    done = {
        (r["image"], r["protocol"]): r for r in map(json.loads, log.read_text().splitlines() if log.exists() else [])
    }
    sizes = {path.relative_to(folder).as_posix(): _pixels(path) for path in list_images(folder)}
    names = sorted(sizes, key=lambda name: (sizes[name], name))[: bench.args.limit]
    bench.protocols = [Protocol(f"real-x{s}", "unknown", s, "real", count=bench.args.limit) for s in (2, 4)]
    for name in names:
        for protocol in bench.protocols:
            target = keep / f"x{protocol.scale}" / (name.replace("/", "_") + ".jpg")
            old = done.get((name, protocol.name))
            if old is None or old["failed"] or not target.exists():
                row = _restore_file(bench, folder / name, target, name, protocol)
                done[name, protocol.name] = row
                with log.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                say(f"{name} x{protocol.scale}: {row['seconds']:.1f} s, {row['peak_mb']:.0f} MB {row['error'] or ''}")
    for protocol in bench.protocols:
        rows = [done[name, protocol.name] for name in names]
        numbers = {k: bootstrap_interval([r[k] for r in rows]) for k in ("seconds", "peak_mb", "megapixels", "failed")}
        bench.add(rows, entry_of(rows[0], **numbers))
    _contact_sheet(sorted(n for n in names if not done[n, "real-x4"]["failed"]), folder, keep)
    return ("seconds", "peak_mb", "megapixels", "failed")


def _pixels(path: Path) -> int:
    try:
        with PIL.Image.open(path) as image:
            return image.width * image.height
    except OSError:  # The restoration will meet it again and count it as a failure.
        return 0


def _restore_file(bench: Bench, source: Path, target: Path, name: str, protocol: Protocol) -> Row:
    """Restore one file and describe what happened; a failure is a row too."""
    target.parent.mkdir(exist_ok=True)
    values: dict[str, Any] = {"failed": 0, "error": None, "megapixels": 0.0}
    reset_peak()
    start = time.perf_counter()
    try:
        picture = load_image(source)
        out: RestorationOutput = bench.pipe(picture.rgb, protocol.scale, preset=bench.args.preset, output_type="pt")
        x: Tensor = out.images[0]
        wanted = (picture.size[1] * protocol.scale, picture.size[0] * protocol.scale)
        if tuple(x.shape[-2:]) != wanted or not bool(x.isfinite().all()):
            raise ValueError(f"{wanted} finite pixels expected, got {tuple(x.shape)}")
        values |= {"calls": out.calls["total"], "megapixels": x[0].numel() / 1e6}
        save_image(picture.replace_pixels(x, None), target, overwrite=True)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        values |= {"failed": 1, "error": type(error).__name__}
        sys.stderr.write(f"{name} x{protocol.scale}: {error}\n")
    values |= {"seconds": round(time.perf_counter() - start, 3), "peak_mb": peak_mb()}
    return make_row("preset", bench.args.preset, protocol.name, name, **values)


def _contact_sheet(names: Sequence[str], folder: Path, keep: Path) -> None:
    """Twelve results at x4, evenly spread over the names: the central 320 x 320 pixels, bicubic | restored."""
    chosen = [names[k] for k in sorted({round(k * (len(names) - 1) / 11) for k in range(12)})] if names else []
    cells: list[Tensor] = []
    for name in chosen:
        y = load_image(folder / name).rgb
        enlarged = pil_resize(y, (y.shape[-1] * 4, y.shape[-2] * 4)).clamp(0, 1)
        for x in (enlarged, load_image(keep / "x4" / (name.replace("/", "_") + ".jpg")).rgb):
            top, left = max(0, x.shape[-2] - 320) // 2, max(0, x.shape[-1] - 320) // 2
            cells.append(x[:, top : top + 320, left : left + 320])
    if cells:
        rows = [cells[i : i + 6] for i in range(0, len(cells), 6)]
        contact_sheet(rows, ["bicubic", "restored"] * 3, 320).save(keep / "sheet.png")


# ---------------------------------------------------------------------------------------------------------------- main

SUITES: dict[str, Callable[[Bench], Sequence[str]]] = {
    suite.__name__: suite
    for suite in (
        embedded,
        guided,
        presets,
        autoencoder,
        coarse,
        probe,
        denoising,
        refinement,
        calibration,
        nonblind,
        real,
        tune,
    )
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    data = os.environ.get("LATENTINDIGO_DATA", ROOT.parent / "shared" / "data")
    common = argparse.ArgumentParser(add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    common.add_argument("--model", default="embedded", help="embedded, a folder or a hub id")
    common.add_argument("--data", type=Path, default=Path(data), help="folder with train, val and real")
    common.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    common.add_argument("--date", default=datetime.date.today().isoformat(), help="start of its name")
    common.add_argument("--limit", type=int, help="first N images only")
    common.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    common.add_argument("--batch", type=int, default=1, help="images of one size per call")
    common.add_argument("--device", default="cpu")
    common.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    common.add_argument("--only", nargs="+", help="run the baselines and the methods whose name contains one of these")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    suites = parser.add_subparsers(dest="suite", required=True)
    parts = {
        n: suites.add_parser(n, parents=[common], help=(f.__doc__ or "").split("\n")[0]) for n, f in SUITES.items()
    }
    for name in ("guided", "embedded"):
        parts[name].add_argument("--zeta-latent", type=float, help="zeta of latent-inn, else the preset's")
        parts[name].add_argument("--zeta-pixel", type=float, help="zeta of pixel-inn, else the preset's")
        parts[name].add_argument("--beta", type=float, help="beta of the projections, else the preset's")
        parts[name].add_argument("--steps", type=int, default=10)
    for name in ("coarse", "embedded"):
        parts[name].add_argument("--fit-images", type=int, default=256, help="training images for the linear map")
    parts["real"].add_argument("--keep", type=Path, required=True, help="folder for outputs, outside the checkout")
    parts["real"].add_argument("--preset", default="default")
    parts["tune"].add_argument("--settings", required=True, help="JSON list of call arguments, or @file")
    parts["tune"].add_argument("--degradations", nargs="+", default=["medium", "mild", "severe"])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one suite."""
    args = _parse(argv)
    bench = Bench(args)
    with torch.no_grad():
        columns = SUITES[args.suite](bench)
    bench.save()
    say("\n" + markdown_table(bench.summary, columns, bench.rows))


if __name__ == "__main__":
    main()
