"""`RestorationPipeline`: a degraded image in, restored images and maps of what was invented out.

One pass, in this order: plan the output grid, bring y to it, gamma = F(y), a start image, its latent, the sampling loop
(`latentindigo.sampler`), decode, colour correction against y, crop, map of invented detail.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float
from torch import Tensor

from latentindigo.autoencoder import PatchAutoencoder
from latentindigo.color import wavelet_color_fix
from latentindigo.guidance import (
    DataTerm,
    GuidanceConfig,
    LatentINN,
    LearnedForward,
    LinearForward,
    PixelINN,
    Regulariser,
    Update,
    make_regulariser,
)
from latentindigo.images import LoadedImage, from_pil, to_pil
from latentindigo.inn import DegradationEncoder, Estimator, InvertibleNet
from latentindigo.model_folder import model_folder
from latentindigo.operators import Operator
from latentindigo.presets import Init, Method, Preset, blend_presets, load_presets, save_presets
from latentindigo.prior import Calls, LatentPrior
from latentindigo.sampler import restore_latent
from latentindigo.tiling import TilingConfig, tiled_map

__all__ = ["ModelLoadError", "RestorationOutput", "RestorationPipeline"]

MAX_LEVELS = 3
MAX_SCALE = 8.0
AUTO_TILE_PIXELS = 1536 * 1536  # Above this many output pixels, "auto" tiles; below, all stages fit in about 2 GiB.
AUTO_TILE = 1024
SMALLEST_TILE = 256
TILE_OVERLAP = 128
BATCH_PIXELS = 1024 * 1024

ImageInput = PIL.Image.Image | np.ndarray | Tensor
StepEndCallback = Callable[["RestorationPipeline", int, int, dict[str, Tensor]], Any]


class ModelLoadError(RuntimeError):
    """A model could not be loaded; the message says what was expected and what to do."""


@dataclass
class RestorationOutput(BaseOutput):
    """What a restoration gives.

    Attributes:
        images: Restored images, sample by sample for each input: PIL images, arrays (H, W, 3) or tensors (3, H, W).
        detail_maps: Map of invented detail |x - g⁻¹(x_c, 0, gamma)| per image, (1, H, W) in [0, 1], mean over colours.
        uncertainty: Per-pixel standard deviation over the samples of each input, (1, H, W); None for one sample.
        settings: The call's settings with every default filled in; given back, they reproduce the output.
        calls: Counted network calls, "total" and those inside the sampling "loop".
    """

    images: list[Any]
    detail_maps: list[Tensor]
    uncertainty: list[Tensor] | None
    settings: dict[str, Any]
    calls: dict[str, dict[str, int]]


@dataclass(frozen=True)
class _Plan:
    """Geometry of one pass: y (any size) -> coarse grid (padded) -> canvas = coarse * 2^levels -> output."""

    levels: int
    width: int
    height: int
    coarse_width: int
    coarse_height: int
    padded_width: int
    padded_height: int

    @property
    def pixels(self) -> int:
        """Pixels of the canvas."""
        return self.padded_height * self.padded_width * 4**self.levels


@dataclass(frozen=True)
class _Run:
    """Everything about a call that does not depend on the image."""

    preset: Preset
    operator: Operator | None
    tile: TilingConfig | None | Literal["auto"]
    callback: StepEndCallback | None


class RestorationPipeline(DiffusionPipeline):
    """Blind restoration by a latent diffusion model guided by an invertible network *(paper: LatentINDIGO)*.

    Args:
        vae: Autoencoder of the latent diffusion model.
        denoiser: Its denoiser.
        scheduler: Any one-evaluation-per-step scheduler of diffusers.
        estimator: Stage-one estimate, for init="estimator".
        degradation_encoder: F.
        pixel_inn: g in pixels; serves every latent diffusion model.
        latent_inn: g in the latent space of this autoencoder, or None.
    """

    model_cpu_offload_seq = "degradation_encoder->estimator->vae->denoiser->pixel_inn->latent_inn"
    _optional_components = ["latent_inn", "estimator"]  # noqa: RUF012 (the attribute that diffusers reads)

    def __init__(
        self,
        vae: ModelMixin,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        estimator: Estimator | None,
        degradation_encoder: DegradationEncoder,
        pixel_inn: InvertibleNet,
        latent_inn: InvertibleNet | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            denoiser=denoiser,
            scheduler=scheduler,
            estimator=estimator,
            degradation_encoder=degradation_encoder,
            pixel_inn=pixel_inn,
            latent_inn=latent_inn,
        )
        self.presets = load_presets(Path(os.devnull))
        for network in self._networks().values():
            network.eval().requires_grad_(False)

    # ------------------------------------------------------------------------------------------------ loading, saving

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "embedded",
        *,
        prior: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> RestorationPipeline:
        """Load a model.

        Args:
            model: "embedded" (ships in the package), a folder, or a hub id.
            prior: Folder or hub id of another latent diffusion model to sample with (its vae, denoiser or unet, and
                scheduler); guidance then defaults to PixelINN, which serves any of them.
            torch_dtype: Dtype of the networks, float32 by default; the sampler's state is always float32.
            device: Where to put the networks, the CPU by default.
            **kwargs: Passed to diffusers.

        Returns:
            The pipeline, ready to be called.

        Raises:
            ModelLoadError: If files are missing, broken or do not fit each other.
        """
        dtype = torch_dtype or torch.float32
        try:
            folder = model_folder(model)
            if not (folder / "model_index.json").is_file():
                raise FileNotFoundError(f"{folder.name!r} holds no model_index.json; give the folder of a saved model")
            parts = {} if prior is None else _load_prior(model_folder(prior), dtype)
            if prior is not None:
                parts["latent_inn"] = None  # It belongs to the other autoencoder.
            with _quiet_loading():
                pipe = super().from_pretrained(folder, dtype=dtype, use_safetensors=True, **{**parts, **kwargs})
            pipe.presets = load_presets(folder)
            pipe._build_prior()
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise ModelLoadError(f"model {str(model)!r} could not be loaded: {error}") from error
        return pipe if device is None else pipe.to(device)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save all parts, safetensors in shards of at most 15 MB, and the presets.

        Args:
            save_directory: Folder, made if missing.
            **kwargs: Passed to diffusers.
        """
        super().save_pretrained(save_directory, **{"max_shard_size": "15MB", **kwargs})
        save_presets(self.presets, Path(save_directory))

    @property
    def prior(self) -> LatentPrior:
        """The latent diffusion model as five verbs; built anew from the registered parts."""
        return self._build_prior()

    def _build_prior(self) -> LatentPrior:
        return LatentPrior(self.vae, self.denoiser, self.scheduler)

    def _networks(self) -> dict[str, torch.nn.Module]:
        return {n: c for n, c in self.components.items() if isinstance(c, torch.nn.Module)}

    def weights_hash(self) -> str:
        """SHA-256 over names and values of all weights, as hexadecimal text; any change of a weight changes it."""
        digest = hashlib.sha256()
        for name, network in sorted(self._networks().items()):
            for key, value in sorted(network.state_dict().items()):
                digest.update(f"{name}.{key}:{value.dtype}:{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------------------- the call

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
        scale: float = 4.0,
        size: tuple[int, int] | None = None,
        *,
        crop: bool = False,
        preset: str = "default",
        method: Method | str | None = None,
        update: Update | str | None = None,
        init: Init | str | None = None,
        steps: int | None = None,
        strength: float | None = None,
        guidance: GuidanceConfig | dict[str, Any] | None = None,
        fidelity: float | None = None,
        operator: Operator | None = None,
        num_samples: int = 1,
        seed: int | Sequence[int] = 0,
        tile: Literal["auto"] | int | None = "auto",
        output_type: Literal["pil", "np", "pt"] | str = "pil",
        callback_on_step_end: StepEndCallback | None = None,
        eta: float | None = None,
        residual: float | None = None,
    ) -> RestorationOutput:
        """Restore one image, a batch, or a list of images of any sizes.

        Args:
            image: PIL image, (H, W, C) array (uint8, or float in [0, 1]), (B, 3, H, W) or (3, H, W) tensor in [0, 1],
                or a list of them.
            scale: Output size over input size; any positive number.
            size: (width, height) of the output instead of `scale`; the aspect is kept, the image fits inside.
            crop: With `size`, fill it and crop the rest.
            preset: "faithful", "default" or "vivid"; what follows overrides it, None = the preset's value.
            method: "latent-inn", "pixel-inn" or "unguided".
            update: "projection", "stopped" or "through".
            init: "estimator", "encode", "inverse" or "noise".
            steps: Denoiser evaluations.
            strength: Noise level sigma/sqrt(alpha² + sigma²) at the start; 1 = pure noise.
            guidance: Weights, steps, regulariser and refinement.
            fidelity: 0..1, moves between "vivid" and "faithful" and replaces the preset's numbers.
            operator: None = blind; a `latentindigo.operators` object = the known degradation, which replaces the
                coarse branch (pixel guidance only).
            num_samples: Samples per image; sample k uses seed + k.
            seed: One seed for all images, or one per image.
            tile: "auto", the side of a tile in output pixels, or None to never tile.
            output_type: "pil", "np" or "pt".
            callback_on_step_end: Called as f(pipe, step, timestep, {"latents": z_t, "z0": z0}) after each step; what
                it raises ends the call.
            eta: Share of fresh noise in each step, for schedulers that know it.
            residual: Share of what the autoencoder lost of the start image that is added back, 0..1.

        Returns:
            Images, maps of invented detail, uncertainty, and the settings used.

        Raises:
            ValueError: For images or settings that do not fit; the message says what was expected.
        """
        images, is_grey = _to_tensors(image)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        seeds = [seed] * len(images) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(images):
            raise ValueError(f"one seed, or one per image, expected: got {len(seeds)} seeds for {len(images)} images")
        chosen = self._resolve(
            preset, fidelity, operator, method=method, update=update, init=init, steps=steps, strength=strength,
            guidance=guidance, eta=eta, residual=residual,
        )  # fmt: skip
        run = _Run(chosen, operator, _tiling(tile), callback_on_step_end)
        jobs = [(k, s + n) for k, s in enumerate(seeds) for n in range(num_samples)]
        restored: list[Tensor] = [torch.empty(0)] * len(jobs)
        maps: list[Tensor] = [torch.empty(0)] * len(jobs)
        calls, loop_calls = Calls(), Calls()
        # An operator's pseudo-inverse is damped by one noise level, so its images go one by one.
        for group in _groups(jobs, images, scale, size) if operator is None else [[n] for n in range(len(jobs))]:
            batch = torch.stack([images[jobs[n][0]] for n in group])
            target = _output_size(batch.shape[-1], batch.shape[-2], scale, size, crop)
            outputs = self._restore(batch, target, [jobs[n][1] for n in group], run, calls, loop_calls)
            for n, x, detail in zip(group, *outputs, strict=True):
                restored[n], maps[n] = (_centre_crop(t, size) if crop and size else t for t in (x, detail))
        uncertainty = None
        if num_samples > 1:
            samples = [torch.stack(restored[k : k + num_samples]) for k in range(0, len(jobs), num_samples)]
            uncertainty = [s.std(0).mean(0, keepdim=True) for s in samples]
        settings: dict[str, Any] = {
            "scale": float(scale), "size": size, "crop": crop, "preset": preset, "fidelity": fidelity,
            "operator": operator, "num_samples": num_samples, "seed": seed if isinstance(seed, int) else seeds,
            "tile": tile, **dataclasses.asdict(chosen),
        }  # fmt: skip
        grey = [is_grey[k] for k, _ in jobs]
        return RestorationOutput(
            images=[_from_tensor(x, output_type, g) for x, g in zip(restored, grey, strict=True)],
            detail_maps=maps,
            uncertainty=uncertainty,
            settings=settings,
            calls={"total": dataclasses.asdict(calls), "loop": dataclasses.asdict(loop_calls)},
        )

    def _resolve(
        self, preset: str, fidelity: float | None, operator: Operator | None, **overrides: Any
    ) -> Preset:
        """The preset with everything that overrides it."""
        if preset not in self.presets:
            raise ValueError(f"preset must be one of {', '.join(self.presets)}, got {preset!r}")
        base = self.presets[preset]
        if fidelity is not None:
            base = blend_presets(self.presets["vivid"], self.presets["faithful"], fidelity)
        if isinstance(overrides.get("guidance"), dict):
            overrides["guidance"] = GuidanceConfig(**overrides["guidance"])
        given = {name: value for name, value in overrides.items() if value is not None}
        if operator is not None:
            if given.setdefault("method", "pixel-inn") == "latent-inn":
                raise ValueError("a known operator acts on pixels; use method='pixel-inn' (or 'unguided') with operator")
            given.setdefault("update", "projection")
        chosen = dataclasses.replace(base, **given)
        if chosen.method == "latent-inn" and self.latent_inn is None:
            if overrides.get("method") is not None:
                raise ValueError("this model has no latent INN; use method='pixel-inn' or train one for its autoencoder")
            chosen = dataclasses.replace(chosen, method="pixel-inn")
        if chosen.init == "estimator" and self.estimator is None:
            chosen = dataclasses.replace(chosen, init="encode")
        return chosen

    @torch.no_grad()
    def _restore(
        self, y: Tensor, target: tuple[int, int], seeds: Sequence[int], run: _Run, calls: Calls, loop_calls: Calls
    ) -> tuple[Tensor, Tensor]:
        """Restore a batch of images of one size; passes of at most x8, each from the last one's output."""
        operator = run.operator
        while operator is None and max(target[0] / y.shape[-1], target[1] / y.shape[-2]) > MAX_SCALE * math.sqrt(2):
            y, _ = self._pass(y, (4 * y.shape[-1], 4 * y.shape[-2]), seeds, run, calls, loop_calls)
        return self._pass(y, target, seeds, run, calls, loop_calls)

    def _pass(
        self, y: Tensor, target: tuple[int, int], seeds: Sequence[int], run: _Run, calls: Calls, loop_calls: Calls
    ) -> tuple[Tensor, Tensor]:
        """One pass: a batch (B, 3, h, w) to images (B, 3, H, W) and maps of invented detail (B, 1, H, W)."""
        device = self.denoiser.device
        settings, operator = run.preset, run.operator
        prior = self._build_prior().counting(calls)
        plan = _make_plan(y.shape[-1], y.shape[-2], target, prior, operator)
        tiling = _tiling_for(run.tile, plan.pixels)
        if tiling is not None:
            prior = prior.tiled(tiling)
        y = y.to(device)
        # Holes and known blur are no unknown damage: gamma describes what the operator does not explain.
        coarse = _resample(y, target, plan) if operator is None else operator.initial(y)
        network_dtype = self.degradation_encoder.dtype
        gamma = self.degradation_encoder(coarse.to(network_dtype))
        noise = self.degradation_encoder.estimate(gamma).noise.float()
        gamma = gamma.to(self.pixel_inn.dtype)
        padded = y if operator is not None else _pad(coarse, plan.padded_width, plan.padded_height)
        begin = self._start(padded, gamma, plan, settings.init, operator, tiling)
        start = prior.encode(begin)
        trajectory = prior.trajectory(
            settings.steps, 1.0 if settings.init == "noise" else settings.strength, eta=settings.eta
        )
        data = self._data_term(prior, padded, gamma, noise, plan, settings, operator, calls)
        generators = [torch.Generator().manual_seed(s) for s in seeds]

        def on_step(i: int, z_t: Tensor, z0: Tensor) -> None:
            if run.callback is not None:
                run.callback(self, i, int(trajectory.timesteps[i]), {"latents": z_t, "z0": z0})

        before = copy.copy(calls)
        regulariser = make_regulariser(settings.guidance, prior)
        z = restore_latent(trajectory, start, data, settings.update, regulariser, generators, on_step)
        for name, value in dataclasses.asdict(calls).items():
            setattr(loop_calls, name, getattr(loop_calls, name) + value - getattr(before, name))

        x = prior.decode(z)
        if settings.residual and settings.init != "noise":
            # What the autoencoder alone loses of the start image is no judgement of the prior's: give it back.
            x = x + settings.residual * (begin - prior.decode(start))
        if operator is not None and data is not None:
            # What was measured is kept to the pixel; only the rest is the prior's.
            x = _OnCanvas(operator, plan).project(x, y, float(noise.mean()))
        if operator is None:
            reference = F.interpolate(padded, size=x.shape[-2:], mode="bicubic", antialias=True)
            x = wavelet_color_fix(x, reference)
        x = x.clamp(0, 1)
        detail = self._invented_detail(x, gamma, plan.levels)
        return x[..., : plan.height, : plan.width].cpu(), detail[..., : plan.height, : plan.width].cpu()

    def _start(
        self, y: Tensor, gamma: Tensor, plan: _Plan, init: Init | str, operator: Operator | None, tiling: TilingConfig | None
    ) -> Tensor:
        """The image that sampling starts from, on the canvas."""
        size = (plan.padded_height * 2**plan.levels, plan.padded_width * 2**plan.levels)
        if operator is not None:
            return _pad(operator.initial(y), size[1], size[0]).clamp(0, 1)
        if init == "estimator" and self.estimator is not None:
            levels, estimator = min(plan.levels, 2), self.estimator
            weights = gamma.to(estimator.dtype)
            if tiling is None:
                x = estimator(y.to(estimator.dtype), weights, levels)
            else:
                x = tiled_map(
                    lambda part: estimator(part.to(estimator.dtype), weights, levels).float(),
                    y,
                    tiling.tile >> levels,
                    tiling.overlap >> levels,
                    scale_num=2**levels,
                    multiple=4 if levels == 0 else 2 if levels == 1 else 1,
                )
            x = x.float().clamp(0, 1)
        elif init == "inverse":
            # g⁻¹(y, 0, gamma): y with every detail set to zero.
            x = self.pixel_inn.inverse(
                y.to(self.pixel_inn.dtype), self._no_details(y, plan.levels), gamma, plan.levels
            ).float().clamp(0, 1)  # fmt: skip
        else:
            x = y
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return x

    def _data_term(
        self,
        prior: LatentPrior,
        y: Tensor,
        gamma: Tensor,
        noise: Tensor,
        plan: _Plan,
        settings: Preset,
        operator: Operator | None,
        calls: Calls,
    ) -> DataTerm | None:
        """PixelINN, LatentINN, the known operator, or nothing."""
        if settings.method == "unguided":
            return None

        def count(passes: int) -> None:
            calls.inn += passes

        lr = settings.guidance.refine_lr if settings.guidance.refine else None
        if operator is not None:
            model = LinearForward(_OnCanvas(operator, plan), float(noise.mean()))
            return PixelINN(prior, model, y, plan.pixels, settings.guidance, noise)
        if settings.method == "latent-inn" and self.latent_inn is not None:
            model = LearnedForward(self.latent_inn, gamma.to(self.latent_inn.dtype), plan.levels, lr, count)
            return LatentINN(prior, model, prior.encode(y), plan.pixels, settings.guidance, noise)
        model = LearnedForward(self.pixel_inn, gamma, plan.levels, lr, count)
        return PixelINN(prior, model, y, plan.pixels, settings.guidance, noise)

    def _no_details(self, coarse: Tensor, levels: int) -> tuple[Tensor, ...]:
        """Details of zero that belong to a coarse part (B, C, h, w), finest first."""
        b, c, h, w = coarse.shape
        sizes = [(h << j, w << j) for j in range(levels)][::-1] or [(h, w)]
        return tuple(coarse.new_zeros(b, 3 * c, *s, dtype=self.pixel_inn.dtype) for s in sizes)

    def _invented_detail(self, x: Tensor, gamma: Tensor, levels: int) -> Tensor:
        """Map of invented detail |x - g⁻¹(x_c, 0, gamma)|, mean over the colours *(ours: provenance of detail)*."""
        x = x.to(self.pixel_inn.dtype)
        coarse, _ = self.pixel_inn(x, gamma, levels)
        measured = self.pixel_inn.inverse(coarse, self._no_details(coarse, levels), gamma, levels)
        return (x - measured).abs().mean(1, keepdim=True).float().clamp(0, 1)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide diffusers' progress bar: seven small files load in an instant and the bar only litters logs."""
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


class _OnCanvas:
    """A known operator on a padded canvas: acts on the part of the canvas that is the image."""

    def __init__(self, operator: Operator, plan: _Plan) -> None:
        self.operator, self.height, self.width = operator, plan.height, plan.width

    def forward(self, x: Tensor) -> Tensor:
        """Y = A (crop of x)."""
        return self.operator.forward(x[..., : self.height, : self.width])

    def project(self, x: Tensor, y: Tensor, noise: float = 0.0) -> Tensor:
        """X with its image part projected."""
        out = x.clone()
        out[..., : self.height, : self.width] = self.operator.project(x[..., : self.height, : self.width], y, noise)
        return out


# ---------------------------------------------------------------------------------------------------- inputs, geometry


def _to_tensors(image: ImageInput | Sequence[ImageInput]) -> tuple[list[Tensor], list[bool]]:
    """All images as (3, H, W) float32 in [0, 1], and which of them are grey PIL images."""
    if isinstance(image, Tensor) and image.ndim == 4:
        image = list(image)
    elif isinstance(image, (PIL.Image.Image, np.ndarray, Tensor)):
        image = [image]
    if not image:
        raise ValueError("at least one image expected, got an empty list")
    pairs = [_to_tensor(item) for item in image]
    return [t for t, _ in pairs], [g for _, g in pairs]


def _to_tensor(image: ImageInput) -> tuple[Tensor, bool]:
    if isinstance(image, PIL.Image.Image):
        loaded = from_pil(image)
        return loaded.rgb, loaded.mode == "L"
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise ValueError(f"an array (H, W, 3), (H, W, 1) or (H, W) expected, got shape {image.shape}")
        if image.dtype.kind == "u":
            image = image.astype(np.float32) / np.iinfo(image.dtype).max
        image = torch.from_numpy(np.ascontiguousarray(image.astype(np.float32))).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ValueError(f"a PIL image, an array or a tensor expected, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.is_floating_point():
        raise ValueError(f"a float tensor (3, H, W) or (B, 3, H, W) expected, got {tuple(image.shape)} {image.dtype}")
    if image.numel() == 0:
        raise ValueError(f"an image of at least one pixel expected, got shape {tuple(image.shape)}")
    low, high = float(image.min()), float(image.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"pixels in [0, 1] expected, got values from {low:.3g} to {high:.3g}; divide by 255 first")
    return image.detach().float().cpu().clamp(0, 1).expand(3, -1, -1), False


def _from_tensor(x: Tensor, output_type: str, grey: bool) -> Any:
    if output_type == "pt":
        return x
    if output_type == "np":
        return x.permute(1, 2, 0).numpy()
    if output_type != "pil":
        raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
    return to_pil(LoadedImage(rgb=x, mode="L" if grey else "RGB"))


def _output_size(
    width: int, height: int, scale: float, size: tuple[int, int] | None, crop: bool
) -> tuple[int, int]:
    """(width, height) of the output before a crop."""
    if size is not None:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be (width, height) of at least 1 pixel each, got {size}")
        choose = max if crop else min
        scale = choose(size[0] / width, size[1] / height)
    if not (math.isfinite(scale) and 0 < scale <= 64):
        raise ValueError(f"scale must lie in (0, 64], got {scale}")
    return max(1, round(width * scale)), max(1, round(height * scale))


def _make_plan(
    width: int, height: int, target: tuple[int, int], prior: LatentPrior, operator: Operator | None
) -> _Plan:
    """Choose J, the integer nearest to log2 of the scale, at most 3, and the padded coarse grid."""
    if operator is not None:
        # The operator fixes the grid; the canvas is only padded for the networks, with J = 0 for the detail map.
        width, height = round(width * operator.scale), round(height * operator.scale)
        multiple = prior.size_multiple
        padded = (-(-width // multiple) * multiple, -(-height // multiple) * multiple)
        return _Plan(0, width, height, width, height, *padded)
    scale = math.sqrt((target[0] / width) * (target[1] / height))
    levels = min(MAX_LEVELS, max(0, round(math.log2(scale))))
    factor = 2**levels
    coarse = (-(-target[0] // factor), -(-target[1] // factor))
    # E(y) needs y to be a multiple of the autoencoder's factor, the canvas one of the denoiser's.
    multiple = max(prior.downsampling, prior.size_multiple // factor)
    padded = tuple(-(-side // multiple) * multiple for side in coarse)
    return _Plan(levels, *target, *coarse, padded[0], padded[1])


def _resample(y: Tensor, target: tuple[int, int], plan: _Plan) -> Tensor:
    """Bring y to the coarse grid, output / 2^J, antialiased; as it is when it already lies there.

    The grid's last row and column may lie partly beyond the image, when the output is no multiple of 2^J. So y is
    continued by repeated pixels, resampled by the exact factor, and cut: the picture is never stretched to fit.
    """
    factor = 2**plan.levels
    ratios = (target[1] / factor / y.shape[-2], target[0] / factor / y.shape[-1])
    if ratios == (1.0, 1.0):
        return y
    size = (plan.coarse_height, plan.coarse_width)
    grown = [max(0, math.ceil(n / r) + 1 - side) for n, r, side in zip(size, ratios, y.shape[-2:], strict=True)]
    y = F.pad(y, (0, grown[1], 0, grown[0]), mode="replicate")
    y = F.interpolate(y, scale_factor=ratios, mode="bicubic", antialias=True)
    return y[..., : size[0], : size[1]].clamp(0, 1)


def _pad(x: Tensor, width: int, height: int) -> Tensor:
    """Pad right and below: mirrored where the image is large enough, its last pixels repeated where not."""
    right, bottom = width - x.shape[-1], height - x.shape[-2]
    if right == 0 and bottom == 0:
        return x
    mode = "reflect" if right < x.shape[-1] and bottom < x.shape[-2] else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)


def _groups(
    jobs: Sequence[tuple[int, int]], images: Sequence[Tensor], scale: float, size: tuple[int, int] | None
) -> list[list[int]]:
    """Jobs whose images have one size, in batches of a bounded number of output pixels."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for n, (k, _) in enumerate(jobs):
        by_size.setdefault(tuple(images[k].shape), []).append(n)
    groups: list[list[int]] = []
    for shape, members in by_size.items():
        width, height = _output_size(shape[-1], shape[-2], scale, size, crop=True)
        count = max(1, BATCH_PIXELS // max(1, width * height))
        groups += [members[i : i + count] for i in range(0, len(members), count)]
    return groups


def _centre_crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    left, top = (x.shape[-1] - size[0]) // 2, (x.shape[-2] - size[1]) // 2
    return x[..., max(0, top) : max(0, top) + size[1], max(0, left) : max(0, left) + size[0]]


def _tiling(tile: Literal["auto"] | int | None) -> TilingConfig | None | Literal["auto"]:
    if tile is None or tile == "auto":
        return tile
    if not isinstance(tile, int) or tile < SMALLEST_TILE:
        raise ValueError(f"tile must be 'auto', None or a side of at least {SMALLEST_TILE} output pixels, got {tile!r}")
    return TilingConfig(tile=tile // 32 * 32, overlap=min(TILE_OVERLAP, tile // 4 // 32 * 32))


def _tiling_for(tile: TilingConfig | None | Literal["auto"], pixels: int) -> TilingConfig | None:
    if tile != "auto":
        return tile
    return TilingConfig(tile=AUTO_TILE, overlap=TILE_OVERLAP) if pixels > AUTO_TILE_PIXELS else None


def _load_prior(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The vae, denoiser and scheduler of another latent diffusion model."""
    denoiser = next((n for n in ("denoiser", "unet") if (folder / n).is_dir()), None)
    missing = [n for n in ("vae", "scheduler") if not (folder / n).is_dir()]
    if denoiser is None or missing:
        raise FileNotFoundError(
            f"a prior needs the folders vae, denoiser (or unet) and scheduler; {folder.name!r} lacks "
            f"{', '.join(missing + ([] if denoiser else ['denoiser']))}"
        )
    network = _load_part(folder / denoiser, dtype)
    if getattr(network.config, "cross_attention_dim", None) is not None:
        raise ValueError(f"an unconditional denoiser expected, got {type(network).__name__}, which needs text")
    return {
        "vae": _load_part(folder / "vae", dtype),
        "denoiser": network,
        "scheduler": _load_part(folder / "scheduler", None),
    }


def _load_part(folder: Path, dtype: torch.dtype | None) -> Any:
    """A network or scheduler, of the class that its configuration names: one of diffusers' or of ours."""
    config = next((c for c in ("config.json", "scheduler_config.json") if (folder / c).is_file()), None)
    if config is None:
        raise FileNotFoundError(f"expected a configuration in {folder.parent.name}/{folder.name}, found none")
    name = json.loads((folder / config).read_text()).get("_class_name", "")
    kind = PatchAutoencoder if name == "PatchAutoencoder" else getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"{folder.parent.name}/{folder.name} is of class {name!r}, which diffusers does not have")
    return kind.from_pretrained(folder) if dtype is None else kind.from_pretrained(folder, dtype=dtype)
