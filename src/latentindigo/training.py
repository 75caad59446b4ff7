"""Training of the model's parts: one loop, one objective per part, resumable to the same numbers.

A run is a folder:

    settings.json        the settings it was started with
    log.jsonl            one line per logged step
    curves.png           loss curves
    samples/<step>.png   a grid of what the part does to fixed images
    checkpoint/          weights, average weights, optimiser state, step (replaced as a whole)
    final/               the averaged weights in diffusers' format, ready for a model folder

Every sample depends on (seed, sample number) alone and the optimiser's state is kept, so a run killed at any time and
resumed gives the weights of the run that was never killed (same machine, same number of threads).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentindigo.data import PhotoFolder
from latentindigo.objectives import OBJECTIVES, Objective

__all__ = ["PARTS", "TrainConfig", "load_recipe", "train"]

PARTS = tuple(OBJECTIVES)
"""Parts of a model that can be trained."""


# What a recipe may write for a field of each type; 1 is welcome as 1.0.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str | None": (str, type(None)),
    "tuple[str, ...]": (tuple,),
    "dict[str, Any]": (dict,),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; a recipe file holds exactly these fields.

    Attributes:
        part: Which part to train, one of `PARTS`.
        steps: Optimiser steps.
        batch_size: Samples per step and process.
        crop: Side of the clean crops in pixels.
        learning_rate: Peak learning rate of AdamW.
        warmup: Steps of linear warm-up; a cosine to a twentieth of the peak follows.
        weight_decay: AdamW's.
        grad_clip: Largest norm of the gradient.
        ema_decay: Decay of the average of the weights (smaller at the start of the run).
        bf16: Autocast to bfloat16.
        seed: Seed of data, noise and initial weights.
        min_scale: Smallest factor by which photos are shrunk before the crop.
        exclude: Glob patterns of photos never trained on.
        tune_file: List of the photos kept for choices, never trained on; relative to the recipe.
        log_every, save_every, sample_every: Steps between log lines, checkpoints and sample grids.
        model: Constructor arguments of the part's network.
        objective: Settings of the part's objective.
    """

    part: str
    steps: int
    batch_size: int = 16
    crop: int = 128
    learning_rate: float = 3e-4
    warmup: int = 100
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    bf16: bool = True
    seed: int = 0
    min_scale: float = 0.5
    exclude: tuple[str, ...] = ()
    tune_file: str | None = None
    log_every: int = 20
    save_every: int = 200
    sample_every: int = 1000
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {self.part!r}")
        known = OBJECTIVES[self.part].settings
        unknown = sorted(set(self.objective) - known)
        if unknown:
            raise ValueError(
                f"[objective] has unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        for name in ("steps", "batch_size", "crop", "log_every", "save_every", "sample_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; mend the recipe")
        if self.crop % 32:
            raise ValueError(f"crop must be a multiple of 32 (the latent grid at scale 4), got {self.crop}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie between 0 and 1, got {self.learning_rate}")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to a twentieth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        cosine = 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())
        return self.learning_rate * (0.05 + 0.95 * cosine)


def load_recipe(part: str, recipe: Path | None, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Read a recipe file (TOML), the packaged one of the part when none is given.

    Args:
        part: Part to train.
        recipe: Path of a recipe, or None.
        overrides: Values that replace the recipe's (None values are ignored).

    Returns:
        The run's settings, paths made absolute.

    Raises:
        ValueError: If the file is missing, is no TOML, names an unknown setting or another part.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    path = recipe or _recipe_folder() / f"{part}.toml"
    if not path.is_file():
        raise ValueError(f"expected a recipe file at {path}, found none; give one with --recipe")
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no valid TOML: {error}") from error
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path} has unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if values.setdefault("part", part) != part:
        raise ValueError(f"{path} is a recipe for {values['part']!r}, not for {part!r}")
    values.update({k: v for k, v in (overrides or {}).items() if v is not None})
    if "steps" not in values:
        raise ValueError(f"{path} lacks the setting steps, the number of optimiser steps")
    exclude = values.get("exclude", [])
    values["exclude"] = tuple(exclude) if isinstance(exclude, (list, tuple)) else exclude
    for name, kind in ((field.name, str(field.type)) for field in dataclasses.fields(TrainConfig)):
        value, kinds = values.get(name), _KINDS[kind]
        if name in values and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise ValueError(f"{path}: {name} must be of type {kind}, got {value!r}")
    if values.get("tune_file"):
        values["tune_file"] = str((path.parent / values["tune_file"]).resolve())
    return TrainConfig(**values)


def _recipe_folder() -> Path:
    """Recipes lie in the package when it is installed from a wheel, and at the root of a checkout."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


class _Average:
    """Exponential moving average of the trainable weights, faster while the run is young."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.weights[name].lerp_(parameter.detach(), 1 - decay)

    def swap(self, module: nn.Module) -> None:
        """Exchange the module's weights with the average (call twice to undo)."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                live = parameter.detach().clone()
                parameter.data.copy_(self.weights[name])
                self.weights[name] = live


def _has_checkpoint(out: Path) -> bool:
    return any((out / name).exists() for name in ("checkpoint", "checkpoint.old"))


def _check_same_run(out: Path, config: TrainConfig) -> None:
    """Refuse to go on in a run folder whose samples or network were others; length and learning rate may change."""
    path = out / "settings.json"
    if not path.is_file() or not _has_checkpoint(out):
        return
    before, now = json.loads(path.read_text()), json.loads(json.dumps(dataclasses.asdict(config)))
    names = ("part", "batch_size", "crop", "seed", "min_scale", "exclude", "model", "objective")
    changed = [name for name in names if before.get(name) != now[name]]
    if changed:
        raise ValueError(f"{out} is a run with another {', '.join(changed)}; choose another folder with --out")


def _save_checkpoint(
    out: Path, objective: Objective, optimizer: torch.optim.Optimizer, average: _Average, step: int
) -> None:
    """Write the whole state beside the old one, then put it in its place: a kill leaves one of the two complete."""
    fresh, old, final = out / "checkpoint.new", out / "checkpoint.old", out / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    weights = {n: p.detach().contiguous().clone() for n, p in objective.named_parameters() if p.requires_grad}
    save_file(weights, fresh / "model.safetensors")
    save_file({n: w.contiguous() for n, w in average.weights.items()}, fresh / "average.safetensors")
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{k}": torch.as_tensor(v).contiguous() for i, s in state.items() for k, v in s.items()}
    save_file(moments, fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps({"step": step}))
    # Without `final` the old one is the only complete checkpoint (a kill between the renames): it goes last.
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(fresh, final)
    shutil.rmtree(old, ignore_errors=True)


def _load_checkpoint(out: Path, objective: Objective, optimizer: torch.optim.Optimizer, average: _Average) -> int:
    """Restore the state written by `_save_checkpoint`; returns the number of finished steps (0 without one)."""
    folder = next((out / n for n in ("checkpoint", "checkpoint.old") if (out / n / "state.json").is_file()), None)
    if folder is None:
        return 0
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    device = next(objective.parameters()).device
    average.weights = {n: w.to(device) for n, w in load_file(folder / "average.safetensors").items()}
    state = optimizer.state_dict()
    state["state"] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state)
    return int(json.loads((folder / "state.json").read_text())["step"])


def _draw_curves(log: Path, target: Path) -> None:
    """Plot every logged quantity against the step; needs matplotlib (the extra `train`)."""
    if not log.exists():
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.stderr.write("no loss curves: matplotlib is missing; install latentindigo[train]\n")
        return
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    names = sorted({k for line in lines for k in line} - {"step", "seconds", "samples_per_second"})
    figure = Figure(figsize=(4 * max(1, len(names)), 3), layout="constrained")
    axes = figure.subplots(1, max(1, len(names)), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set(title=name, xlabel="step")
        if min(v for _, v in points) > 0:
            axis.set_yscale("log")
    figure.savefig(target, dpi=80)


def train(
    part: str,
    data: Path,
    recipe: Path | None = None,
    out: Path = Path("runs"),
    init_from: str | None = None,
    resume: bool = True,
    overrides: dict[str, Any] | None = None,
    device: str | None = None,
    progress: bool = True,
    prior: str | None = None,
) -> Path:
    """Train one part of the model on a folder of photographs.

    Args:
        part: "autoencoder", "denoiser", "estimator", "pixel-inn" or "latent-inn".
        data: Folder with photographs, searched recursively.
        recipe: Recipe file; None takes the packaged one of the part.
        out: Run folder.
        init_from: Model folder (or "embedded") whose weights to start from; ignored when a checkpoint is resumed.
        resume: Go on from `out`'s checkpoint if there is one; False starts anew and refuses to overwrite one.
        overrides: Recipe values to replace.
        device: "cpu" or "cuda"; None lets accelerate choose.
        progress: Show a progress bar with throughput and remaining time.
        prior: For "latent-inn": another latent diffusion model, a folder or a hub id, for whose autoencoder to train.

    Returns:
        The folder `out/final` with the averaged weights.

    Raises:
        ValueError: For a bad recipe, an unusable data folder, or a run folder of other settings.
    """
    if prior is not None and part != "latent-inn":
        raise ValueError(
            f"prior: only 'latent-inn' is trained for another autoencoder, got part {part!r}; leave it out (the pixel "
            "INN serves every prior)"
        )
    if prior is not None and recipe is None:
        recipe = _recipe_folder() / "latent-inn-prior.toml"
    config = load_recipe(part, recipe, overrides)
    if prior is not None:
        config = dataclasses.replace(config, objective={**config.objective, "prior": prior})
    out.mkdir(parents=True, exist_ok=True)
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}; choose a card with CUDA_VISIBLE_DEVICES")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for and this machine has none; use 'cpu'")
    _check_same_run(out, config)
    if not resume and _has_checkpoint(out):
        raise ValueError(f"{out} already holds a checkpoint; resume it or choose another folder with --out")
    # DDP wraps `forward` only; every network of an objective is called inside the objective's forward. A batch has one
    # scale, and the weights of the other scales get no gradient from it.
    accelerator = Accelerator(
        mixed_precision="bf16" if config.bf16 else "no",
        cpu=device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    torch.manual_seed(config.seed)
    photos = PhotoFolder(
        data,
        exclude=config.exclude,
        exclude_file=Path(config.tune_file) if config.tune_file else None,
        min_side=min(config.crop, 160),
    )
    try:
        objective = OBJECTIVES[part](config.model, config.objective)
    except TypeError as error:
        raise ValueError(f"the recipe's [model] does not fit the part {part!r}: {error}") from error
    objective.prepare(photos, config.seed)
    if init_from is not None:
        objective.load_weights(init_from)
    objective.to(accelerator.device)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
    )
    average = _Average(objective, config.ema_decay)
    first = _load_checkpoint(out, objective, optimizer, average) if resume else 0
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    writer = accelerator.is_main_process
    if writer:
        (out / "settings.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
        _truncate_log(out / "log.jsonl", first)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not (progress and writer),
    )
    with bar:
        task = bar.add_task(part, total=config.steps, completed=first, status="")
        started, since = time.perf_counter(), first
        per_step = config.batch_size * accelerator.num_processes
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            offset = step * per_step + accelerator.process_index * config.batch_size
            batch = objective.batch(photos, config, range(offset, offset + config.batch_size))
            with accelerator.autocast():
                logs: dict[str, Tensor] = wrapped({k: v.to(accelerator.device) for k, v in batch.items()})
            accelerator.backward(logs["loss"])
            accelerator.clip_grad_norm_(trainable, config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(objective, step)
            done = step + 1
            if not writer:
                continue
            if done % config.log_every == 0 or done == config.steps:
                elapsed = time.perf_counter() - started
                rate = (done - since) * per_step / elapsed
                line = {k: round(v.item(), 6) for k, v in logs.items()}
                if not all(torch.isfinite(v).all() for v in logs.values()):
                    raise RuntimeError(f"the loss of step {done} is not finite; lower learning_rate and resume {out}")
                line |= {"step": done, "seconds": round(elapsed, 1), "samples_per_second": round(rate, 2)}
                with (out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                bar.update(task, status=f"loss {line['loss']:.4f} · {rate:.1f} samples/s")
            bar.update(task, completed=done)
            if done % config.save_every == 0 or done == config.steps:
                _save_checkpoint(out, objective, optimizer.optimizer, average, done)
            if done % config.sample_every == 0 or done == config.steps:
                average.swap(objective)
                objective.save_samples(photos, config, out / "samples" / f"{done:07d}.png")
                objective.save_networks(out / "final")
                average.swap(objective)
                _draw_curves(out / "log.jsonl", out / "curves.png")
    accelerator.wait_for_everyone()
    return out / "final"


def _truncate_log(log: Path, step: int) -> None:
    """Drop log lines after the step that is resumed, so that the curve has one line per step."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except json.JSONDecodeError:  # A kill may have cut the last line short.
            break
        kept.append(line)
    log.write_text("".join(line + "\n" for line in kept))
