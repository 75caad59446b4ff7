"""What guidance costs on full-size priors: seconds and memory of a step, as ratios to an unguided step of the same run.

    python benchmarks/gpu_priors.py                              # on a GPU: three models at 512² and 1024²
    python benchmarks/gpu_priors.py --model sdxl --side 1024     # one of them
    python benchmarks/gpu_priors.py --tiny                       # the same script in miniature, on any CPU

The networks have the published sizes (`prior_configs/`) and random weights, which cost as much as trained ones; nothing
is downloaded. Batch 1, one denoiser pass per step (no classifier-free guidance, which would double the step that
guidance is compared with). Methods take turns, a ratio is taken round by round, and the median counts. The result file
is written anew after each model and size, and what does not fit into memory is recorded and skipped.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from latentindigo.canvas import is_out_of_memory
from latentindigo.conditioning import Conditioning, PromptEmbeddings
from latentindigo.evaluation import (
    Protocol,
    Row,
    bootstrap_interval,
    make_row,
    markdown_table,
    peak_mb,
    reset_peak,
    write_results,
)
from latentindigo.guidance import DataTerm, GuidanceConfig, LatentINN, LearnedForward, PixelINN, Regulariser
from latentindigo.inn import InvertibleNet
from latentindigo.prior import Calls, LatentPrior
from latentindigo.sampler import restore_latent

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = Path(__file__).resolve().parent / "prior_configs"
MODELS = ("sd21", "sdxl", "sd35-medium")
LEVELS = 2  # x4
STRENGTH = 0.7
GAMMA = 64
# As the embedded model's, whose pixel INN serves every prior.
PIXEL_INN = {"channels": 3, "gamma_dim": GAMMA, "hidden": 32, "blocks": 1, "num_steps": 2}
LATENT_INN = {"gamma_dim": GAMMA, "hidden": 64, "blocks": 1, "num_steps": 2, "offset": 0.0, "mix": True, "gain": True}
# method, variant, the most that a step may cost in units of an unguided one (None = only told)
METHODS: tuple[tuple[str, str, float | None], ...] = (
    ("unguided", "", None),
    ("latent-inn", "stopped", 1.1),
    ("latent-inn", "through", None),
    ("pixel-inn", "stopped", None),
    ("pixel-inn", "through", None),
    ("pixel-inn", "stopped, tiny decoder", None),
)
COLUMNS = ("step", "step_over_unguided", "extra_mb", "extra_mb_over_unguided", "peak_mb")
SMALL: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {"norm_num_groups": 8, "attention_head_dim": 2, "cross_attention_dim": 16},
    "SD3Transformer2DModel": {
        **{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "dual_attention_layers": [0]},
        **{"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16},
        **{"sample_size": 32, "pos_embed_max_size": 32},
    },
    "FluxTransformer2DModel": {
        **{"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16},
        **{"joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": [4, 6, 6]},
    },
    "AutoencoderKL": {"block_out_channels": [16] * 4, "layers_per_block": 1, "norm_num_groups": 8},
    "AutoencoderTiny": {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4},
}


def published(name: str, *, tiny: bool = False) -> dict[str, Any]:
    """The configurations of a published model, or of a miniature with the same parts."""
    model: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    if not tiny:
        return model
    for part in ("denoiser", "vae", "guidance_vae"):
        model[part] |= SMALL[model[part]["_class_name"]]
    denoiser, text = model["denoiser"], model["text"]
    text["width"] = 16
    if "block_out_channels" in denoiser:
        denoiser["block_out_channels"] = [16] * len(denoiser["block_out_channels"])
        if "transformer_layers_per_block" in denoiser:
            denoiser |= {"transformer_layers_per_block": 1, "addition_time_embed_dim": 8}
            denoiser["projection_class_embeddings_input_dim"] = 16 + 6 * 8
    if "pooled" in text:
        text["pooled"] = 16
    return model


def build(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A network or scheduler of diffusers, made where it will run, with random weights."""
    settings = dict(config)
    kind = getattr(diffusers, settings.pop("_class_name"))
    if not issubclass(kind, torch.nn.Module):
        return kind(**settings)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network: Any = kind(**settings)
    finally:
        torch.set_default_dtype(before)
    # Some buffers insist on float32.
    return network.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


@dataclass
class Place:
    """Where everything is computed, and how finely."""

    device: torch.device
    dtype: torch.dtype

    def now(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers that are the same on every device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(self.device)


def load(name: str, place: Place, *, tiny: bool) -> LatentPrior:
    """A prior of published size, told random embeddings."""
    model = published(name, tiny=tiny)
    text = model["text"]
    pooled = place.random(1, text["pooled"]) if "pooled" in text else None
    prompt = PromptEmbeddings(place.random(1, text["tokens"], text["width"]), pooled)
    parts = {part: build(model[part], place.device, place.dtype) for part in ("vae", "denoiser", "scheduler")}
    cheap = build(model["guidance_vae"], place.device, place.dtype)
    return LatentPrior(**parts, conditioning=Conditioning(prompt), guidance_vae=cheap)


def inn_of(config: Mapping[str, Any], place: Place) -> InvertibleNet:
    """An invertible network whose last layers are not zero, weights in float32 as in a loaded model."""
    torch.manual_seed(0)
    network: Any = InvertibleNet(**config)
    for name, parameter in network.named_parameters():
        if name.endswith("tail.weight"):
            torch.nn.init.normal_(parameter, std=0.01)
    network = network.to(place.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return network.compute_in(place.dtype)


class Steps:
    """Guided and unguided steps of one prior at one size.

    Args:
        prior: The prior.
        side: Side of the square output in pixels.
        place: Device and dtype.
    """

    def __init__(self, prior: LatentPrior, side: int, place: Place) -> None:
        self.place, self.calls = place, Calls()
        self.prior = prior.counting(self.calls)
        channels, cells = prior.latent_channels, side // prior.downsampling
        self.start = 0.5 * place.random(1, channels, cells, cells)
        gamma, noise, config = place.random(1, GAMMA), torch.full((1,), 0.02, device=place.device), GuidanceConfig()
        latent = LearnedForward(inn_of({**LATENT_INN, "channels": channels}, place), gamma, LEVELS, None, self._count)
        pixel = LearnedForward(inn_of(PIXEL_INN, place), gamma, LEVELS, None, self._count)
        small, y = cells >> LEVELS, side >> LEVELS
        latents = 0.5 * place.random(1, channels, small, small)
        pixels = place.random(1, 3, y, y).sigmoid()
        common = (side * side, config, noise)
        self.data: dict[tuple[str, str], DataTerm | None] = {("unguided", ""): None}
        for update in ("stopped", "through"):
            self.data["latent-inn", update] = LatentINN(self.prior, latent, latents, *common)
            self.data["pixel-inn", update] = PixelINN(self.prior, pixel, pixels, *common)
        self.data["pixel-inn", "stopped, tiny decoder"] = PixelINN(self.prior.for_guidance(), pixel, pixels, *common)

    def _count(self, passes: int) -> None:
        self.calls.inn += passes

    @torch.no_grad()
    def run(self, method: str, variant: str, steps: int) -> dict[str, Any]:
        """Sample for some steps.

        Args:
            method: See `METHODS`.
            variant: See `METHODS`.
            steps: How many, at least 2; the first is not measured.

        Returns:
            "step", the median of seconds per step, peak memory, and what of it lies above the networks.
        """
        data, place = self.data[method, variant], self.place
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
        reset_peak()
        held = torch.cuda.memory_allocated() / 1e6 if place.device.type == "cuda" else peak_mb()
        vars(self.calls).update(vars(Calls()))
        trajectory = self.prior.trajectory(steps, STRENGTH, latent_size=tuple(self.start.shape[-2:]))
        moments: list[float] = []
        begun = place.now()
        z = restore_latent(
            trajectory, self.start, data, variant.split(",")[0] or "stopped", Regulariser(0.0, self.prior),
            [torch.Generator().manual_seed(0)], lambda *_: moments.append(place.now()),
        )  # fmt: skip
        if not bool(z.isfinite().all()):
            raise RuntimeError("the sample is not finite")
        peak = peak_mb()
        return {
            "step": statistics.median(b - a for a, b in itertools.pairwise(moments)),
            "seconds": moments[-1] - begun,
            "peak_mb": peak,
            "extra_mb": round(peak - held, 1),
            "calls": vars(self.calls).copy(),
        }


class Run:
    """What has been measured so far."""

    def __init__(self, args: argparse.Namespace, place: Place) -> None:
        self.args, self.place = args, place
        self.protocols: list[Protocol] = []
        self.rows: list[Row] = []
        self.summary: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {
            "steps": args.steps, "rounds": args.rounds, "turns": args.turns, "tiny": args.tiny,
            "dtype": str(place.dtype).removeprefix("torch."), "bars": {}, "failed": {},
        }  # fmt: skip

    def measure(self, name: str, side: int, steps: Steps) -> None:
        """All methods at one size, in turns."""
        protocol = f"{name} {side}"
        self.protocols.append(Protocol(protocol, "none", 2**LEVELS, "random", crop=side))
        able = [key[:2] for key in METHODS if self._works(protocol, key[:2], lambda key=key: steps.run(*key[:2], 2))]
        found: dict[tuple[str, str], list[Row]] = {key: [] for key in able}
        barred = [key[:2] for key in METHODS if key[2] is not None]
        for k in range(max(self.args.rounds, self.args.turns)):
            # A bar is a matter of a few milliseconds, and the processor that starts the kernels wavers by more than
            # that from second to second: short turns in quick succession waver alike.
            due = able if k < self.args.rounds else [key for key in able if key in (("unguided", ""), *barred)]
            for method, variant in (due[(n + k) % len(due)] for n in range(len(due))):
                values = steps.run(method, variant, self.args.steps)
                found[method, variant].append(make_row(method, variant, protocol, f"round {k}", **values))
        for method, variant, limit in METHODS:
            if (method, variant) in found:
                self._report(protocol, found[method, variant], found.get(("unguided", "")), limit)

    def _works(self, protocol: str, key: tuple[str, str], warm_up: Callable[[], Any]) -> bool:
        """Run once to warm up; what fails is told and left out."""
        reason = self.attempt(warm_up)
        if reason is not None:
            self.settings["failed"][f"{protocol}: {' '.join(key).strip()}"] = reason
            say(f"{protocol}: {' '.join(key)} left out: {reason}")
        return reason is None

    @staticmethod
    def attempt(work: Callable[[], Any]) -> str | None:
        """Do something that may need too much memory; None, or why it failed."""
        try:
            work()
        except (MemoryError, RuntimeError, ValueError, Warning) as error:
            return "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {str(error)[:200]}"
        return None

    def _report(self, protocol: str, rows: list[Row], plain: list[Row] | None, limit: float | None) -> None:
        first = rows[0]
        figures = {key: [row[key] for row in rows] for key in ("step", "extra_mb", "peak_mb")}
        if plain is not None and first["method"] != "unguided":
            for key in ("step", "extra_mb"):
                quotients = [a[key] / b[key] for a, b in zip(rows, plain, strict=False) if b[key] > 0]
                if quotients:
                    figures[f"{key}_over_unguided"] = quotients
        spread = {k: bootstrap_interval(v)._asdict() | {"median": statistics.median(v)} for k, v in figures.items()}
        self.rows += rows
        self.summary.append({k: first[k] for k in ("method", "variant", "protocol")} | spread)
        if "step_over_unguided" in figures:
            measured = statistics.median(figures["step_over_unguided"])
            what = f"{protocol}: {first['method']} {first['variant']} over unguided, time of a step"
            met = None if limit is None else measured <= limit
            shown = "none" if limit is None else f"≤ {limit:g}"
            self.settings["bars"][what] = {"bar": shown, "measured": measured, "met": met}

    def save(self) -> None:
        """Write the result file and the tables beside it."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        stem = self.args.out / f"{self.args.date}-gpu-priors{'-tiny' if self.args.tiny else ''}"
        content = (self.protocols, self.rows, self.summary)
        write_results(stem.with_suffix(".json"), "gpu-priors", *content, settings=self.settings)
        stem.with_suffix(".md").write_text(self.tables())

    def tables(self) -> str:
        """The bars and the means behind them, in Markdown."""
        lines = ["| what | bar | measured | met |", "| --- | --- | --- | --- |"]
        for what, bar in self.settings["bars"].items():
            met = "" if bar["met"] is None else "yes" if bar["met"] else "**no**"
            lines.append(f"| {what} | {bar['bar']} | {bar['measured']:.4g} | {met} |")
        failed = [f"- {what}: {reason}" for what, reason in self.settings["failed"].items()]
        return "\n".join([*lines, "", markdown_table(self.summary, COLUMNS, self.rows), "", *failed, ""])


def say(text: str) -> None:
    """Print a line at once, so that a redirected log can be followed."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def measure_model(run: Run, name: str) -> None:
    """Build one prior and measure it at every size; the file is written after each."""
    begun = time.perf_counter()
    prior = load(name, run.place, tiny=run.args.tiny)
    say(f"{name}: built in {time.perf_counter() - begun:.1f} s")
    for side in run.args.side:
        begun = time.perf_counter()
        reason = run.attempt(lambda side=side: run.measure(name, side, Steps(prior, side, run.place)))
        if reason is not None:
            run.settings["failed"][f"{name} {side}"] = reason
        run.save()
        say(f"{name} {side}: {time.perf_counter() - begun:.1f} s{f', {reason}' if reason else ''}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every model at every size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=sorted(p.stem for p in CONFIGS.glob("*")))
    parser.add_argument("--side", type=int, nargs="+", help="sides of the outputs in pixels")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run; the first is not measured")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method")
    parser.add_argument("--turns", type=int, default=15, help="runs of unguided and of methods with a bar")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="start of its name")
    parser.add_argument("--tiny", action="store_true", help="miniatures in float32 on the CPU, to try the script")
    args = parser.parse_args(argv)
    args.side = args.side or ([64, 128] if args.tiny else [512, 1024])
    if args.steps < 2:
        parser.error("--steps: at least 2, for the first is not measured")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny tries the script in miniature")
    place = Place(torch.device("cpu"), torch.float32) if args.tiny else Place(torch.device("cuda"), torch.bfloat16)
    run = Run(args, place)
    diffusers.utils.logging.set_verbosity_error()
    # A network computed again in float32 would be timed as two.
    warnings.filterwarnings("error", message=".*not finite.*")
    for name in args.model:
        reason = run.attempt(lambda name=name: measure_model(run, name))
        if reason is not None:
            run.settings["failed"][name] = reason
            say(f"{name}: {reason}")
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    say("\n" + run.tables())


if __name__ == "__main__":
    main()
