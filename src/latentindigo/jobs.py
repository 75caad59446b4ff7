"""Restoring files: load → restore → save for one picture, and the same for many.

The doors (command line, later a web page and a batch engine) parse, build a `RestoreSettings` and call this module, so
that one picture takes one path whoever asks. A picture that fails is reported and the others are done.

The pipeline's job is pixels; this module keeps what lies around them: opacity, greyness, bit depth, colour profile,
EXIF, and the settings that made the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo import __version__
from latentindigo.canvas import SMALLEST_TILE, centre_crop, output_size
from latentindigo.failures import FAILURES, failure_kind, say_failure
from latentindigo.images import LoadedImage, load_image, pil_resize, save_image
from latentindigo.model_folder import model_folder
from latentindigo.planning import Task
from latentindigo.quick_import import import_diffusers
from latentindigo.safe_files import make_folder
from latentindigo.targets import FullDisks, check_names, check_room

__all__ = [
    "MAP_GAIN",
    "OFFLOADS",
    "Outcome",
    "Restoration",
    "RestoreSettings",
    "Restorer",
    "fast_dtype",
    "load_pipeline",
    "pictures_to_write",
    "resolve_settings",
    "restore_file",
    "restore_files",
    "restore_picture",
    "size_of_result",
]

# Invented detail is mostly a few grey levels strong: maps are written brighter by this factor, always the same one, so
# that two maps can be compared. They are written with 16 bits, so dividing by it gives the values back.
MAP_GAIN = 4.0

OFFLOADS = ("none", "model", "sequential")

# As in presets.py, guidance.py and few_steps.py, whose import costs seconds; a test compares them.
_PRESETS = ("faithful", "default", "vivid")
_METHODS = (None, "latent-inn", "pixel-inn", "unguided")
_UPDATES = (None, "projection", "stopped", "through")
_INITS = (None, "estimator", "encode", "inverse", "noise")
_SCHEDULERS = ("model", "ddim", "dpm++", "unipc", "euler", "lcm")


@dataclasses.dataclass(frozen=True)
class RestoreSettings:
    """How to restore: the arguments of `RestorationPipeline.__call__` that a door offers, under the same names.

    Attributes:
        scale: Output size over input size, 1 to 16.
        size: (width, height) of the output in pixels; overrides `scale`.
        crop: Cut the picture to the aspect of `size` instead of fitting it inside.
        preset: "faithful", "default" or "vivid"; what follows overrides it, None keeps its value.
        method: "latent-inn", "pixel-inn" or "unguided".
        update: "projection", "stopped" or "through".
        init: "estimator", "encode", "inverse" or "noise".
        steps: Denoiser evaluations.
        strength: Share of noise at the start, sigma / sqrt(alpha^2 + sigma^2), above 0 up to 1.
        fidelity: 0 (vivid) to 1 (faithful).
        num_samples: Results for each picture.
        seed: Seed of the first result; sample k uses seed + k.
        tile: "auto", "off", or the side of a tile in output pixels.
        prompt: Prompt of a text-conditioned prior, None for the prior's default.
        negative_prompt: Its negative prompt, likewise.
        guidance_scale: Strength of classifier-free guidance, 1 to 50.
        scheduler: "model", "ddim", "dpm++", "unipc", "euler" or "lcm".
    """

    scale: float = 4.0
    size: tuple[int, int] | None = None
    crop: bool = False
    preset: str = "default"
    method: str | None = None
    update: str | None = None
    init: str | None = None
    steps: int | None = None
    strength: float | None = None
    fidelity: float | None = None
    num_samples: int = 1
    seed: int = 0
    tile: str | int = "auto"
    prompt: str | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    scheduler: str = "model"

    def __post_init__(self) -> None:
        for name, choices in (
            ("preset", _PRESETS),
            ("method", _METHODS),
            ("update", _UPDATES),
            ("init", _INITS),
            ("scheduler", _SCHEDULERS),
        ):
            if getattr(self, name) not in choices:
                named = ", ".join(choice for choice in choices if choice is not None)
                raise ValueError(f"{name}: expected one of {named}, got {getattr(self, name)!r}")
        for name, low, high in (
            ("scale", 1, 16),
            ("steps", 1, 1000),
            ("strength", 0, 1),
            ("fidelity", 0, 1),
            ("num_samples", 1, 64),
            ("guidance_scale", 1, 50),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}: expected a value from {low} to {high}, got {value}")
        if self.strength == 0:
            raise ValueError("strength: expected more than 0 (at 0 nothing would be sampled), got 0; try 0.3")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size: expected a width and a height of at least 1 pixel, got {self.size}")
        if self.crop and self.size is None:
            raise ValueError("crop: cuts to the aspect of size, and no size was given; give one")
        if isinstance(self.tile, str) and self.tile not in ("auto", "off"):
            raise ValueError(f"tile: expected 'auto', 'off' or a number of pixels, got {self.tile!r}")
        if not isinstance(self.tile, str) and self.tile < SMALLEST_TILE:
            raise ValueError(
                f"tile: expected at least {SMALLEST_TILE} pixels, got {self.tile}; 'off' does without tiles"
            )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one task.

    Attributes:
        task: The task.
        status: "done" or "failed".
        error: Why it failed, one sentence, or None.
        kind: "input", "memory" or "disk" for a failure, else None.
        seconds: Wall time, reading and writing included.
        input_size: (width, height) of the upright input, or None if it could not be read.
        output_size: (width, height) of the result, or None.
        settings: The resolved settings that made the result; given back, they make it again.
        model_hash: Hash of all weights used, or None.
    """

    task: Task
    status: str
    error: str | None = None
    kind: str | None = None
    seconds: float = 0.0
    input_size: tuple[int, int] | None = None
    output_size: tuple[int, int] | None = None
    settings: dict[str, Any] | None = None
    model_hash: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The outcome as plain values, one JSON object per picture."""
        return {
            "input": str(self.task.source),
            "status": self.status,
            "outputs": [str(path) for path in self.task.targets],
            "detail_maps": [str(path) for path in self.task.detail_maps],
            "uncertainty_map": None if self.task.uncertainty_map is None else str(self.task.uncertainty_map),
            "error": self.error,
            "kind": self.kind,
            "seconds": round(self.seconds, 3),
            "input_size": self.input_size,
            "output_size": self.output_size,
            "settings": self.settings,
            "model_hash": self.model_hash,
            "version": __version__,
        }


@runtime_checkable
class Restoration(Protocol):
    """What this module needs of a `RestorationOutput`."""

    @property
    def images(self) -> Sequence[Tensor]:
        """Restored images, (3, H, W) in [0, 1], one per sample."""
        ...

    @property
    def detail_maps(self) -> Sequence[Tensor]:
        """Maps of invented detail, (1, H, W) in [0, 1], one per sample."""
        ...

    @property
    def uncertainty(self) -> Sequence[Tensor] | None:
        """One map of the samples' standard deviation, (1, H, W), or None for one sample."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with every default filled in."""
        ...


@runtime_checkable
class Restorer(Protocol):
    """What this module needs of a `RestorationPipeline`: the call, with these keywords, and the hash."""

    def __call__(
        self,
        image: Any,
        *,
        scale: float,
        size: tuple[int, int] | None,
        crop: bool,
        preset: str,
        method: Any,
        update: Any,
        init: Any,
        steps: int | None,
        strength: float | None,
        fidelity: float | None,
        num_samples: int,
        seed: int,
        tile: Any,
        prompt: Any,
        negative_prompt: Any,
        guidance_scale: float | None,
        scheduler: Any,
        output_type: Any,
        detail_maps: bool,
        callback_on_step_end: Any,
    ) -> Restoration:
        """Restore one image; the callback is called as f(pipe, step, timestep, tensors)."""
        ...

    def weights_hash(self) -> str:
        """Hash of all weights."""
        ...


# -------------------------------------------------------------------------------------------------------- restoring


def load_pipeline(
    model: str = "embedded",
    *,
    prior: str | None = None,
    prior_config: str | None = None,
    guidance_vae: str | None = None,
    latent_inn: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    offload: str = "none",
    compiled: bool = False,
    checkpointing: bool = False,
    init_model: str | None = None,
) -> Restorer:
    """Load a model for use by this module.

    Args:
        model: "embedded", a folder, or a hub id.
        prior: Another latent diffusion model to sample with, or None.
        prior_config: Folder with the configurations of a prior that is a single file, or None.
        guidance_vae: Cheap autoencoder for guidance in pixels, or None.
        latent_inn: Folder of a latent INN for its autoencoder, or None.
        dtype: "float32", "bfloat16", "float16", or None for what is fast here, see `fast_dtype`.
        device: "cpu", "cuda", "cuda:1", "mps", ..., or None for an accelerator if there is one.
        offload: What stays on the CPU until it is called: "none", "model" (networks) or "sequential" (their layers).
        compiled: Whether `torch.compile` compiles the networks.
        checkpointing: Whether gradients are computed with less memory in more time.
        init_model: A .safetensors file of a classical restorer that makes the stage-one estimate, or None.

    Returns:
        The pipeline.

    Raises:
        ValueError: The device is unknown or absent, or offloading was asked for without an accelerator.
        ModelLoadError: The model cannot be loaded (defined in `latentindigo.pipeline`).
    """
    # Imported here: planning and dry runs must not pay for diffusers.
    import_diffusers(optional=prior is not None or model != "embedded")
    from latentindigo.pipeline import RestorationPipeline

    place = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=place)
    # PyTorch says AssertionError where it was built without the device.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {place!r} cannot be used here ({reason}); `info` lists the devices") from error
    if offload not in OFFLOADS:
        raise ValueError(f"offload: expected one of {', '.join(OFFLOADS)}, got {offload!r}")
    if offload != "none" and torch.device(place).type == "cpu":
        raise ValueError(
            f"offload: {offload!r} keeps weights on the CPU until an accelerator needs them, and the device is 'cpu'; "
            "leave it out, or name an accelerator"
        )
    torch_dtype = fast_dtype(torch.device(place)) if dtype is None else getattr(torch, dtype)
    # Offloaded weights go to the device when they are needed, and not before.
    resident = place if offload == "none" else "cpu"
    pipe = RestorationPipeline.from_pretrained(
        model,
        prior=prior,
        prior_config=prior_config,
        guidance_vae=guidance_vae,
        latent_inn=latent_inn or "model",
        torch_dtype=torch_dtype,
        device=resident,
        init_model=init_model,
    )
    if checkpointing:
        pipe.enable_checkpointing()
    if offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=place)
    return pipe.compile_networks() if compiled else pipe


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which networks run fast on a device and as well: bfloat16 where it is in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # PyTorch has no public question for this; a version that lacks these answers gets float32.
    asks = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    in_hardware = device.type == "cpu" and any(ask is not None and ask() for ask in asks)
    return torch.bfloat16 if in_hardware else torch.float32


def resolve_settings(settings: RestoreSettings, model: str = "embedded", *, foreign: bool = False) -> dict[str, Any]:
    """Fill in what the preset decides, without loading any weights.

    Args:
        settings: Settings with gaps.
        model: "embedded", a folder, or a hub id; it may bring its own presets.
        foreign: Whether a prior without a latent INN is sampled with.

    Returns:
        The settings that a run would report.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: The model's presets are no presets.
    """
    from latentindigo.presets import blend_presets, load_presets  # late, as in load_pipeline

    presets = load_presets(model_folder(model))
    preset = presets[settings.preset]
    if settings.fidelity is not None:
        preset = blend_presets(presets["vivid"], presets["faithful"], settings.fidelity)
    if foreign:
        preset = dataclasses.replace(preset, method="pixel-inn" if preset.method == "latent-inn" else preset.method)
    given = dataclasses.asdict(settings)
    return {**dataclasses.asdict(preset), **{name: value for name, value in given.items() if value is not None}}


def restore_file(
    pipe: Restorer,
    task: Task,
    settings: RestoreSettings,
    *,
    overwrite: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Outcome:
    """Load, restore and save one picture.

    Args:
        pipe: The pipeline.
        task: What to read and what to write.
        settings: How to restore.
        overwrite: Replace existing files.
        on_step: Called after every denoiser step with the number of steps done.

    Returns:
        The outcome, with status "done".

    Raises:
        FileExistsError: A file to write exists and `overwrite` is False.
        ImageReadError: The picture cannot be read.
        ValueError: The pipeline or the format refuses the picture.
        OSError: The disk is full or cannot be written to.
    """
    started = time.perf_counter()
    check_names(task, overwrite)
    picture = load_image(task.source)
    check_room(task, size_of_result(picture, settings), picture.bits)
    return _restore(pipe, pipe.weights_hash(), task, picture, settings, overwrite, on_step, started)


def restore_files(
    get_pipe: Callable[[], Restorer],
    tasks: Sequence[Task],
    settings: RestoreSettings,
    *,
    overwrite: bool = False,
    on_step: Callable[[Task, int], None] | None = None,
) -> Iterator[Outcome]:
    """Restore pictures one after the other; one that fails is reported and the rest is done.

    That holds for a full disk too: what plainly has no room left is reported without being computed, smaller pictures
    and those that go to another disk are done.

    Args:
        get_pipe: Gives the pipeline; called once, when the first readable picture is at hand.
        tasks: From `plan_tasks`.
        settings: How to restore.
        overwrite: Replace existing files.
        on_step: Called after every denoiser step with the task and the number of steps done.

    Yields:
        One outcome per task, in order, as soon as it is known.

    Raises:
        ModelLoadError: The model cannot be loaded (raised by `get_pipe`).
    """
    pipe: Restorer | None = None
    model_hash = ""
    full = FullDisks()
    for task in tasks:
        started = time.perf_counter()
        try:
            check_names(task, overwrite)
            picture = load_image(task.source)
            target_size = size_of_result(picture, settings)
            check_room(task, target_size, picture.bits, full)
        except FAILURES as error:
            yield _failed(task, error, started)
            continue
        if pipe is None:
            before = time.perf_counter()
            pipe = get_pipe()
            model_hash = pipe.weights_hash()  # Seconds for a large prior, so once for all pictures.
            started += time.perf_counter() - before  # The first picture does not pay for the model.
        step = None if on_step is None else _for_task(on_step, task)
        try:
            outcome = _restore(pipe, model_hash, task, picture, settings, overwrite, step, started)
        except FAILURES as error:
            outcome = _failed(task, error, started)
            if outcome.kind == "disk":
                full.note(task, target_size[0] * target_size[1])
            elif outcome.kind == "memory" and torch.cuda.is_available():
                torch.cuda.empty_cache()
        yield outcome


def _for_task(on_step: Callable[[Task, int], None], task: Task) -> Callable[[int], None]:
    return lambda done: on_step(task, done)


def size_of_result(picture: LoadedImage, settings: RestoreSettings) -> tuple[int, int]:
    """(width, height) of what settings make of a picture, before anything is computed."""
    if settings.crop and settings.size is not None:
        return settings.size
    return output_size(*picture.size, settings.scale, settings.size, settings.crop)


def restore_picture(
    pipe: Restorer,
    picture: LoadedImage,
    settings: RestoreSettings,
    *,
    detail_maps: bool = False,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
) -> Restoration:
    """Call the pipeline on one picture.

    Args:
        pipe: The pipeline.
        picture: The picture.
        settings: How to restore.
        detail_maps: Whether to make maps of invented detail; the pixels do not depend on it.
        on_step: Called after every denoiser step with the number of steps done and the sampler's tensors, "latents"
            and "z0", each (num_samples, c, h, w). What it raises ends the restoration.

    Returns:
        The pipeline's output, tensors.

    Raises:
        ValueError: The pipeline refuses the picture.
    """

    def after_step(_pipe: Any, step_index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step_index + 1, values)
        return values

    return pipe(
        picture.rgb,
        scale=settings.scale,
        size=settings.size,
        crop=settings.crop,
        preset=settings.preset,
        method=settings.method,
        update=settings.update,
        init=settings.init,
        steps=settings.steps,
        strength=settings.strength,
        fidelity=settings.fidelity,
        num_samples=settings.num_samples,
        seed=settings.seed,
        tile=None if settings.tile == "off" else settings.tile,
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt,
        guidance_scale=settings.guidance_scale,
        scheduler=settings.scheduler,
        output_type="pt",
        detail_maps=detail_maps,
        callback_on_step_end=after_step,
    )


def pictures_to_write(
    pipe: Restorer,
    model_hash: str,
    task: Task,
    picture: LoadedImage,
    result: Restoration,
    settings: RestoreSettings,
) -> Iterator[tuple[Path, LoadedImage, dict[str, Any]]]:
    """Everything a task writes, one after the other, so that only one is held at a time.

    Args:
        pipe: The pipeline that restored.
        model_hash: Hash of its weights.
        task: Which files to write.
        picture: The source.
        result: What `restore_picture` made of it.
        settings: How it was restored.

    Yields:
        File name, picture and metadata: samples, maps of invented detail, the map of uncertainty.
    """
    metadata: dict[str, Any] = {"software": "latentindigo", "version": __version__, "model_hash": model_hash}
    # No part of the model, so its hash does not tell.
    init_model = getattr(pipe, "init_model", None)
    if init_model is not None:
        metadata["init_model"] = {"name": init_model.name, "sha256": init_model.sha256}
    for index, target in enumerate(task.targets):
        told = {**metadata, "settings": result.settings, "sample": index, "seed": settings.seed + index}
        yield target, _dress(picture, result.images[index], settings.crop), told
    for index, target in enumerate(task.detail_maps):
        told = {**metadata, "map": "invented detail", "gain": MAP_GAIN}
        yield target, _map_picture(result.detail_maps[index]), told
    uncertainty = result.uncertainty
    if task.uncertainty_map is not None and uncertainty is not None:
        told = {**metadata, "map": "standard deviation of the samples", "gain": MAP_GAIN}
        yield task.uncertainty_map, _map_picture(uncertainty[0]), told


def _restore(
    pipe: Restorer,
    model_hash: str,
    task: Task,
    picture: LoadedImage,
    settings: RestoreSettings,
    overwrite: bool,
    on_step: Callable[[int], None] | None,
    started: float,
) -> Outcome:
    def after_step(done: int, _tensors: dict[str, Any]) -> None:
        if on_step is not None:
            on_step(done)

    result = restore_picture(pipe, picture, settings, detail_maps=bool(task.detail_maps), on_step=after_step)
    written: list[Path] = []
    try:
        for folder in {path.parent for path in task.files}:
            make_folder(folder)
        for target, image, metadata in pictures_to_write(pipe, model_hash, task, picture, result, settings):
            taken = os.path.lexists(target)
            save_image(image, target, metadata=metadata, overwrite=overwrite)
            if not taken:
                written.append(target)
    except BaseException:  # A later run must not find half of a task in its way.
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    height, width = result.images[0].shape[-2:]
    return Outcome(
        task,
        "done",
        seconds=time.perf_counter() - started,
        input_size=picture.size,
        output_size=(width, height),
        settings=result.settings,
        model_hash=model_hash,
    )


def _dress(picture: LoadedImage, restored: Float[Tensor, "3 h w"], crop: bool) -> LoadedImage:
    """Give the restored colours what the source had beside its colours: greyness, opacity, profile, EXIF, depth."""
    rgb = restored.detach().cpu()
    if picture.mode == "L":
        rgb = rgb.float().mean(0, keepdim=True).expand(3, -1, -1)
    alpha = picture.alpha
    if alpha is not None:
        size = (rgb.shape[2], rgb.shape[1])
        full = output_size(alpha.shape[2], alpha.shape[1], 1.0, size, crop) if crop else size
        alpha = centre_crop(pil_resize(alpha, full, "bicubic"), size).clamp(0, 1)
    return picture.replace_pixels(rgb, alpha)


def _map_picture(values: Float[Tensor, "*c h w"]) -> LoadedImage:
    """Make a 16-bit grey picture of a map, `MAP_GAIN` times brighter."""
    plane = values.detach().to("cpu", torch.float32)
    plane = plane.reshape(-1, *plane.shape[-2:]).mean(0, keepdim=True) * MAP_GAIN
    return LoadedImage(plane.clamp(0, 1).expand(3, -1, -1).contiguous(), mode="L", bits=16)


def _failed(task: Task, error: BaseException, started: float) -> Outcome:
    kind = failure_kind(error)
    return Outcome(task, "failed", error=say_failure(error), kind=kind, seconds=time.perf_counter() - started)
