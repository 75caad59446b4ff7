"""The latent diffusion prior: the one narrow door to diffusers' autoencoders, denoisers and schedulers.

Everything outside this module speaks **canonical coordinates**, z_t = α_t z_0 + σ_t ε, pixels in [0, 1] and float32.
What a scheduler stores instead (Euler: z/α), what a network predicts (ε, v, z_0 or a flow velocity), the pixel range
and the dtype of the networks are converted here and nowhere else.

| code | symbol | meaning |
| --- | --- | --- |
| `x` | x | image, (B, 3, H, W), [0, 1] |
| `z0` | z_0, z_{0,t} | clean latent, or the denoiser's estimate of it, scaled latents, (B, C, H/f, W/f) |
| `z_t` | z_t | noisy latent, z_t = α z_0 + σ ε |
| `alpha`, `sigma` | α_t, σ_t | variance preserving: √ᾱ, √(1−ᾱ); rectified flow: 1−t, t |
| `strength` | σ/√(α²+σ²) | noise level at the start of a trajectory, 1 = pure noise |
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.tiling import TilingConfig, tiled_map

__all__ = ["Calls", "LatentPrior", "Prediction", "Trajectory"]

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]

_PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "flow_prediction")
_PURE_NOISE = 0.99  # Stable Diffusion's noisiest level is 0.998 and its 10-step grid starts at 0.99.
_SMALLEST_ALPHA = 1e-6  # Below this, (z − σε)/α is noise of float32 and nothing else.
_STRENGTH_MISS = 0.05  # A grid that starts further than this from the wish is an error, not an approximation.


@dataclass
class Calls:
    """How often each network ran: one count for each forward or backward pass of a whole batch."""

    denoiser: int = 0
    denoiser_backward: int = 0
    decoder: int = 0
    decoder_backward: int = 0
    encoder: int = 0
    inn: int = 0


@dataclass(frozen=True)
class Prediction:
    """What the denoiser said about one noisy latent: the estimate of z_0 and the raw network output behind it."""

    z0: Float[Tensor, "b c h w"]
    model_output: Float[Tensor, "b c h w"]

    def detach(self) -> Prediction:
        """Return the same prediction without its graph; `step` still knows its `z0` as untouched."""
        return Prediction(self.z0.detach(), self.model_output.detach())


@dataclass(frozen=True)
class _Family:
    """What has to be known about a class of schedulers before it can be driven from outside.

    Attributes:
        levels: Where the noise levels are: "alphas" = a table ᾱ[t] looked up by time step; "sigmas" = a list σ/α
            walked by index; "flow" = a list σ = t with α = 1−t.
        scaled: Whether the scheduler stores z/α instead of z.
        strides: Whether `step` finds the next level by a fixed stride in time instead of a list of time steps.
        accepts: Kinds of network output that its `step` understands.
        draws: Whether `step` draws noise, as a function of (config, eta).
    """

    levels: Literal["alphas", "sigmas", "flow"]
    scaled: bool = False
    strides: bool = False
    accepts: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
    draws: Callable[[Any, float], bool] = lambda config, eta: False


# By name, so that this module needs no diffusers import; subclasses are found through their bases.
_FAMILIES: dict[str, _Family] = {
    "DDIMScheduler": _Family("alphas", strides=True, draws=lambda config, eta: eta > 0),
    "DDIMParallelScheduler": _Family("alphas", strides=True, draws=lambda config, eta: eta > 0),
    "DDPMScheduler": _Family("alphas", draws=lambda config, eta: True),
    "LCMScheduler": _Family("alphas", draws=lambda config, eta: True),
    "DPMSolverMultistepScheduler": _Family(
        "sigmas", accepts=_PREDICTION_TYPES, draws=lambda config, eta: config.algorithm_type.startswith("sde")
    ),
    "DEISMultistepScheduler": _Family("sigmas", accepts=_PREDICTION_TYPES),
    "UniPCMultistepScheduler": _Family("sigmas", accepts=_PREDICTION_TYPES),
    "EulerDiscreteScheduler": _Family("sigmas", scaled=True),
    "EulerAncestralDiscreteScheduler": _Family(
        "sigmas", scaled=True, accepts=("epsilon", "v_prediction"), draws=lambda config, eta: True
    ),
    "LMSDiscreteScheduler": _Family("sigmas", scaled=True),
    "FlowMatchEulerDiscreteScheduler": _Family(
        "flow", accepts=("flow_prediction",), draws=lambda config, eta: bool(config.stochastic_sampling)
    ),
}


class LatentPrior:
    """A latent diffusion model seen as five verbs: encode, decode, trajectory, predict and step.

    It holds references only: the networks and the scheduler passed in are never changed, and each trajectory works on
    its own copy of the scheduler, so that several threads may share one prior.
    """

    def __init__(self, vae: Any, denoiser: Any, scheduler: Any, *, prediction_type: str | None = None) -> None:
        """Wrap an autoencoder, a denoiser and a scheduler.

        Args:
            vae: An autoencoder with diffusers' `encode(x)` / `decode(z)`, pixels in [-1, 1] on its side.
            denoiser: A network called as `denoiser(z, t)` whose result has `.sample` of z's shape.
            scheduler: One of diffusers' one-evaluation-per-step schedulers.
            prediction_type: What the network predicts: "epsilon", "v_prediction", "sample" or "flow_prediction"; None
                takes it from the scheduler's configuration.

        Raises:
            ValueError: If the scheduler is of a kind that cannot be driven step by step, or the parts do not fit.
        """
        self.vae = vae
        self.denoiser = denoiser
        self.calls = Calls()
        self._tiling: TilingConfig | None = None
        self.scheduler = copy.deepcopy(scheduler)
        self._family = _family_of(self.scheduler)
        self.prediction_type: PredictionType = _network_type(self.scheduler, self._family, prediction_type)
        _prepare_scheduler(self.scheduler, self._family, self.prediction_type)
        self.downsampling, self.latent_channels = _latent_grid(vae)
        self._latent_multiple = _latent_multiple(denoiser)
        _check_channels(denoiser, self.latent_channels)

    @property
    def size_multiple(self) -> int:
        """The number of pixels that height and width must be multiples of."""
        return self.downsampling * self._latent_multiple

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the denoiser computes in; what goes in and comes out of this class is float32 all the same."""
        return _dtype_of(self.denoiser)

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return _device_of(self.denoiser)

    def counting(self, calls: Calls) -> LatentPrior:
        """Return a view of this prior that shares its networks but counts into `calls`.

        Args:
            calls: The counter of one restoration; with one each, threads do not see each other's calls.

        Returns:
            A light copy; trajectories made from it count into `calls` too.
        """
        view = copy.copy(self)
        view.calls = calls
        return view

    def tiled(self, tiling: TilingConfig | None) -> LatentPrior:
        """Return a view of this prior that runs encoder, decoder and denoiser on overlapping tiles.

        Args:
            tiling: Tile and overlap in pixels of the image, multiples of `size_multiple`; None = whole images.

        Returns:
            A light copy that shares networks and counter; one call of a network counts once, however many tiles.

        Raises:
            ValueError: If tile or overlap is no multiple of `size_multiple`.
        """
        if tiling is not None and (tiling.tile % self.size_multiple or tiling.overlap % self.size_multiple):
            raise ValueError(
                f"expected a tile and an overlap that are multiples of {self.size_multiple} pixels, got "
                f"{tiling.tile} and {tiling.overlap}"
            )
        view = copy.copy(self)
        view._tiling = tiling
        return view

    def encode(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Encode pixels into scaled latents (encoder E); differentiable.

        Args:
            x: Images, (B, 3, H, W), [0, 1], sizes a multiple of `downsampling`.

        Returns:
            Latents, (B, C, H/f, W/f), float32; the mode where the autoencoder gives a distribution.

        Raises:
            ValueError: If a side is not a multiple of `downsampling`.
        """
        height, width = x.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"expected a height and width that are multiples of {self.downsampling}, got {height}x{width}; "
                "pad the image first"
            )
        self.calls.encoder += 1
        dtype = _dtype_of(self.vae)
        pixels = (2.0 * x - 1.0).to(dtype)
        if self._tiling is None:
            latent = _latent_from(self.vae.encode(pixels))
        else:
            tile, overlap = self._tiling.tile, self._tiling.overlap
            latent = tiled_map(
                lambda part: _latent_from(self.vae.encode(part)),
                pixels,
                tile,
                overlap,
                scale_den=self.downsampling,
            )
        latent = latent.to(_state_dtype(x))
        scale, shift = _latent_affine(self.vae, latent)
        return (latent - shift) * scale

    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Decode scaled latents into pixels (decoder D); differentiable.

        Args:
            z: Scaled latents, (B, C, h, w).

        Returns:
            Images, (B, 3, fh, fw), float32, on the [0, 1] scale but not clamped to it, so that gradients survive.
        """
        self.calls.decoder += 1
        scale, shift = _latent_affine(self.vae, z)
        latent = (z / scale + shift).to(_dtype_of(self.vae))
        decoded = self._on_latent_tiles(lambda part: self.vae.decode(part).sample, latent, self.downsampling)
        calls = self.calls

        def count(_: Tensor) -> None:
            calls.decoder_backward += 1

        if decoded.requires_grad:
            decoded.register_hook(count)
        return (decoded.to(_state_dtype(z)) + 1.0) / 2.0

    def trajectory(self, steps: int, strength: float = 1.0, *, eta: float = 0.0) -> Trajectory:
        """Plan a descent from a noise level to a clean latent in exactly `steps` denoiser evaluations.

        At strength 1 the scheduler's own full grid is used as it is. Below, the trajectory starts at the trained time
        step whose level is nearest to the wish and goes down in equal steps of time, whatever the scheduler, so that
        schedulers can be compared on the same time steps. Schedulers with a special spacing (Karras, exponential, ...)
        keep it: their own grid is refined until its last `steps` entries start nearest to the wish.

        Args:
            steps: Number of denoiser evaluations, at least 1.
            strength: σ/√(α²+σ²) at the start, in (0, 1]; 1 = pure noise.
            eta: Share of fresh noise in each step, 0 = deterministic; only schedulers like DDIM know it.

        Returns:
            The trajectory; `start_strength` tells the level that was reached.

        Raises:
            ValueError: If the level cannot be reached in that many steps, if the scheduler knows no `eta`, or if an
                ε-predicting network would be asked about pure noise (α = 0), where ε says nothing about z_0.
        """
        return Trajectory(self, steps, strength, eta)

    def _on_latent_tiles(self, fn: Callable[[Tensor], Tensor], z: Tensor, scale: int) -> Tensor:
        """Run a network on latents, tile by tile if this view is tiled."""
        if self._tiling is None:
            return fn(z)
        tile, overlap = self._tiling.tile // self.downsampling, self._tiling.overlap // self.downsampling
        return tiled_map(fn, z, tile, overlap, scale_num=scale, multiple=self._latent_multiple)

    def _denoise(self, z: Tensor, t: Tensor) -> Tensor:
        """Run the denoiser once, in its own dtype, and count the call and any later backward pass."""
        height, width = z.shape[-2:]
        if height % self._latent_multiple or width % self._latent_multiple:
            raise ValueError(
                f"expected latent sides that are multiples of {self._latent_multiple}, got {height}x{width}; "
                f"pad the image to multiples of {self.size_multiple} pixels"
            )
        self.calls.denoiser += 1
        times = t.to(z.device).expand(z.shape[0])
        output = self._on_latent_tiles(lambda part: self.denoiser(part, times).sample, z.to(self.dtype), 1)
        calls = self.calls

        def count(_: Tensor) -> None:
            calls.denoiser_backward += 1

        if output.requires_grad:
            output.register_hook(count)
        return output


class Trajectory:
    """One descent through the noise levels, with a scheduler of its own.

    The evaluations are numbered 0 … steps−1 from noisy to clean; level `steps` is where the last step arrives.
    Multistep schedulers remember what they were given: call `step` for i = 0, 1, 2, … in this order. The latest step
    may be repeated (time travel: noise the result again and go down once more); the memory is then wound back.

    Attributes:
        prior: The prior whose networks are used and whose counter counts.
        timesteps: The time step of each evaluation as the denoiser sees it, (steps,).
        start_strength: The noise level σ/√(α²+σ²) at the start, as reached.
    """

    def __init__(self, prior: LatentPrior, steps: int, strength: float, eta: float) -> None:
        """Plan the trajectory; use `LatentPrior.trajectory`, which documents the arguments."""
        if steps < 1:
            raise ValueError(f"expected at least 1 step, got {steps}")
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"expected a strength in (0, 1], 1 = pure noise, got {strength}")
        self.prior = prior
        self._family = prior._family
        self._scheduler = copy.deepcopy(prior.scheduler)
        self._accepted: PredictionType = _scheduler_type(self._scheduler)
        arguments = inspect.signature(self._scheduler.step).parameters
        self._takes_generator = "generator" in arguments
        self._eta = _checked_eta(self._scheduler, arguments, eta)
        self._draws = self._family.draws(self._scheduler.config, eta)

        begin, self._is_stock_grid = _place_grid(self._scheduler, self._family, steps, strength)
        if hasattr(self._scheduler, "set_begin_index"):
            # Counting from a known index is exact; looking a time step up is not when two steps share one.
            self._scheduler.set_begin_index(begin)
        self.timesteps: Tensor = self._scheduler.timesteps[begin : begin + steps]
        if len(self.timesteps) != steps:
            raise ValueError(
                f"expected {steps} time steps, but {type(self._scheduler).__name__} gives {len(self.timesteps)}; "
                "choose another number of steps or another timestep_spacing"
            )
        self._levels = _levels(self._scheduler, self._family, begin, steps)
        self._check_epsilon()
        self._next = 0
        self._before: tuple[dict[str, Any], Tensor | None] = ({}, None)
        self._arrived: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of denoiser evaluations."""
        return len(self.timesteps)

    @property
    def start_strength(self) -> float:
        """The noise level σ/√(α²+σ²) of the first evaluation."""
        return _strength(*self._levels[0])

    @property
    def pure_noise(self) -> bool:
        """Whether the start is so noisy (≥ 0.99) that nothing of a start image survives."""
        return self.start_strength >= _PURE_NOISE

    def alpha_sigma(self, i: int) -> tuple[float, float]:
        """Return the canonical (α, σ) of level i.

        Args:
            i: 0 … steps; `steps` is the level the last step arrives at: (1, 0), except for schedulers that are
                configured to stop at their smallest noise level (`set_alpha_to_one=False`, "sigma_min").

        Returns:
            The two factors in z_t = α z_0 + σ ε.

        Raises:
            ValueError: If there is no such level.
        """
        if not 0 <= i <= len(self):
            raise ValueError(f"expected a level in 0..{len(self)}, got {i}")
        return self._levels[i]

    def noise(
        self, z0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], i: int = 0
    ) -> Float[Tensor, "b c h w"]:
        """Diffuse a clean latent to level i: z_t = α z_0 + σ ε.

        Args:
            z0: Clean latents, (B, C, h, w).
            noise: ε, standard normal, same shape.
            i: The level, by default that of the first evaluation.

        Returns:
            Noisy latents in canonical coordinates.
        """
        alpha, sigma = self.alpha_sigma(i)
        return alpha * z0 + sigma * noise

    def predict(self, z_t: Float[Tensor, "b c h w"], i: int) -> Prediction:
        """Estimate z_0 from z_t; differentiable with respect to z_t and without side effects on the trajectory.

        Args:
            z_t: Noisy latents at level i, canonical, (B, C, h, w).
            i: Index of the evaluation, 0 … steps−1.

        Returns:
            The estimate and the network output, float32.

        Raises:
            ValueError: If i is not an evaluation of this trajectory or the latent size does not suit the network.
        """
        self._check_index(i)
        alpha, sigma = self._levels[i]
        output = self.prior._denoise(z_t, self.timesteps[i]).to(_state_dtype(z_t))
        return Prediction(_z0_from_output(output, z_t, alpha, sigma, self.prior.prediction_type), output)

    def step(
        self,
        prediction: Prediction,
        z0_new: Float[Tensor, "b c h w"],
        z_t: Float[Tensor, "b c h w"],
        i: int,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Let the scheduler go from level i to level i+1, believing that the clean latent is `z0_new`.

        If `z0_new` is the very object `prediction.z0`, the network output goes to the scheduler untouched; otherwise
        the output that would have meant `z0_new` is written in its place. No gradient passes through a step.

        Args:
            prediction: What `predict(z_t, i)` returned.
            z0_new: The clean latent to steer to, (B, C, h, w).
            z_t: The noisy latent the prediction was made from, canonical.
            i: Index of the step: the next one, or the latest once more.
            generators: One per image, for schedulers that draw noise.

        Returns:
            z_{t−1}, the noisy latent at level i+1, canonical, float32.

        Raises:
            ValueError: If i is out of order, or generators are needed but missing or not one per image.
        """
        self._check_index(i)
        self._wind_to(i)
        keywords = self._noise_arguments(z_t, generators)
        with torch.no_grad():
            if z0_new is prediction.z0 and self.prior.prediction_type == self._accepted:
                output = prediction.model_output.detach()
            else:
                output = _output_from_z0(z0_new.detach(), z_t.detach(), *self._levels[i], self._accepted)
            output = output.to(_state_dtype(z_t))
            z_next = self._scheduler_step(output, z_t.detach().to(_state_dtype(z_t)), i, keywords)
        self._arrived = z_next
        self._next = i + 1
        return z_next

    def _scheduler_step(self, output: Tensor, z_t: Tensor, i: int, keywords: dict[str, Any]) -> Tensor:
        """Convert to the scheduler's coordinates, step, and convert back."""
        scheduler, t = self._scheduler, self.timesteps[i]
        if getattr(scheduler, "last_sample", None) is not None and not _same_values(z_t, self._arrived):
            # UniPC's corrector recomputes z_t from the step before and would silently undo what was done to z_t since.
            scheduler.last_sample = None
        if self._family.strides and not self._is_stock_grid:
            _set_stride(scheduler, self.timesteps, i)
        if not self._family.scaled:
            return scheduler.step(output, t, z_t, return_dict=False, **keywords)[0]
        stored = z_t / self._levels[i][0]
        scheduler.scale_model_input(stored, t)  # predict() feeds z_t itself, which is what this would return.
        return scheduler.step(output, t, stored, return_dict=False, **keywords)[0] * self._levels[i + 1][0]

    def _noise_arguments(self, z_t: Tensor, generators: Sequence[torch.Generator] | None) -> dict[str, Any]:
        """Check the generators and collect the keyword arguments of the scheduler's step."""
        keywords: dict[str, Any] = dict(self._eta)
        if self._draws and generators is None:
            raise ValueError(
                f"expected one torch.Generator per image, got none; {type(self._scheduler).__name__} draws noise in "
                "each step: pass generators=[...], or use a deterministic scheduler (DDIM with eta=0, DPM-Solver++)"
            )
        if generators is not None and len(generators) != z_t.shape[0]:
            raise ValueError(f"expected one generator for each of {z_t.shape[0]} images, got {len(generators)}")
        if self._draws and self._takes_generator and generators is not None:
            keywords["generator"] = list(generators)
        return keywords

    def _wind_to(self, i: int) -> None:
        """Bring the scheduler's memory to just before step i."""
        if i == self._next - 1:
            memory, self._arrived = self._before
            vars(self._scheduler).update(memory)
        elif i != self._next:
            raise ValueError(f"expected step {self._next} (or the latest step once more), got step {i}")
        # Multistep schedulers shift their lists in place, hence the copies; tensors are replaced and can be shared.
        state = vars(self._scheduler).items()
        memory = {name: list(value) if isinstance(value, list) else value for name, value in state}
        self._before = (memory, self._arrived)

    def _check_index(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise ValueError(f"expected an evaluation in 0..{len(self) - 1}, got {i}")

    def _check_epsilon(self) -> None:
        if "epsilon" not in (self.prior.prediction_type, self._accepted):
            return
        terminal = bool(getattr(self._scheduler.config, "rescale_betas_zero_snr", False))
        # Index-based schedulers replace a terminal ᾱ of 0 by 2⁻²⁴ to stay finite; it means 0 all the same.
        limit = 2.0**-11 if terminal else _SMALLEST_ALPHA
        if self._levels[0][0] < limit:
            raise ValueError(
                "expected α > 0 at the first time step of an ε-predicting network, got pure noise (zero terminal SNR), "
                "where ε does not determine z_0; use a v-predicting network, a strength below 1, or a schedule "
                "without rescale_betas_zero_snr"
            )


# --- network output <-> z_0 -----------------------------------------------------------------------------------------


def _z0_from_output(output: Tensor, z_t: Tensor, alpha: float, sigma: float, kind: PredictionType) -> Tensor:
    """Read z_{0,t} off the network output (all kinds follow from z_t = α z_0 + σ ε).

    | kind | output | z_0 |
    | --- | --- | --- |
    | epsilon | ε | (z_t − σ ε)/α |
    | v_prediction | v = α ε − σ z_0, α²+σ²=1 | α z_t − σ v |
    | sample | z_0 | z_0 |
    | flow_prediction | u = ε − z_0 | (z_t − σ u)/(α+σ) |
    """
    if kind == "epsilon":
        return (z_t - sigma * output) / alpha
    if kind == "v_prediction":
        return alpha * z_t - sigma * output
    if kind == "flow_prediction":
        return (z_t - sigma * output) / (alpha + sigma)
    return output


def _output_from_z0(z0: Tensor, z_t: Tensor, alpha: float, sigma: float, kind: PredictionType) -> Tensor:
    """Write a changed z_{0,t} back as the network output that would have meant it; inverse of `_z0_from_output`."""
    dtype = _state_dtype(z_t)
    z0, z_t = z0.to(dtype), z_t.to(dtype)
    if kind == "epsilon":
        return (z_t - alpha * z0) / sigma
    if kind == "v_prediction":
        return (alpha * z_t - z0) / sigma
    if kind == "flow_prediction":
        return (z_t - (alpha + sigma) * z0) / sigma
    return z0


# --- what a scheduler is --------------------------------------------------------------------------------------------


def _family_of(scheduler: Any) -> _Family:
    """Look the scheduler up; refuse what would need two evaluations per step or is not understood."""
    name = type(scheduler).__name__
    way_out = f"use one of {', '.join(_FAMILIES)}"
    if getattr(scheduler, "order", 1) != 1:
        raise ValueError(
            f"expected a scheduler with one denoiser evaluation per step, got {name} with {scheduler.order}: guidance "
            f"would act on half a step; {way_out}"
        )
    family = next((_FAMILIES[base.__name__] for base in type(scheduler).__mro__ if base.__name__ in _FAMILIES), None)
    if family is None:
        raise ValueError(f"expected a scheduler whose coordinates are known, got {name}; {way_out}")
    config = scheduler.config
    if getattr(config, "use_flow_sigmas", False):
        family = replace(family, levels="flow")
    if getattr(config, "use_dynamic_shifting", False):
        raise ValueError(
            f"expected a fixed time shift, got {name} with use_dynamic_shifting=True, which depends on the image size; "
            "set use_dynamic_shifting=False and the shift of your size"
        )
    if getattr(config, "invert_sigmas", False):
        raise ValueError(f"expected time to run from noise to image, got {name} with invert_sigmas=True; set it False")
    return family


def _scheduler_type(scheduler: Any) -> PredictionType:
    """Return the kind of network output that the scheduler's step expects."""
    named = getattr(scheduler.config, "prediction_type", "flow_prediction")
    return _checked_kind("sample" if named == "original_sample" else named)


def _checked_kind(named: str) -> PredictionType:
    for kind in _PREDICTION_TYPES:
        if named == kind:
            return kind
    raise ValueError(f"expected a prediction_type among {', '.join(_PREDICTION_TYPES)}, got {named!r}")


def _network_type(scheduler: Any, family: _Family, asked: str | None) -> PredictionType:
    """Settle what the network predicts."""
    kind = _scheduler_type(scheduler) if asked is None else _checked_kind(asked)
    if kind == "v_prediction" and family.levels == "flow":
        raise ValueError(
            "expected ε, sample or flow prediction with a flow schedule, got v_prediction, which is defined for "
            "α²+σ²=1 only; use a variance-preserving scheduler"
        )
    return kind


def _prepare_scheduler(scheduler: Any, family: _Family, kind: PredictionType) -> None:
    """Configure our own copy: the network's kind of output where understood, and no clipping of latents."""
    expected = kind if kind in family.accepts else family.accepts[0]
    if expected != _scheduler_type(scheduler):
        scheduler.register_to_config(prediction_type=expected)
    clipping = [name for name in ("clip_sample", "thresholding") if getattr(scheduler.config, name, False)]
    if clipping:
        warnings.warn(
            f"{type(scheduler).__name__} has {' and '.join(clipping)} on, which is meant for pixels and would clip "
            "latents; it is switched off in this prior's own copy",
            stacklevel=3,
        )
        scheduler.register_to_config(**dict.fromkeys(clipping, False))


def _checked_eta(scheduler: Any, arguments: Any, eta: float) -> dict[str, float]:
    """Return eta as a keyword argument for schedulers that know it, refuse it for the others."""
    if "eta" in arguments:
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"expected eta in [0, 1], 0 = deterministic, got {eta}")
        return {"eta": eta}
    if eta != 0.0:
        raise ValueError(f"expected eta=0, got {eta}: {type(scheduler).__name__} does not know eta; use DDIMScheduler")
    return {}


# --- noise levels and grids -----------------------------------------------------------------------------------------


def _strength(alpha: float, sigma: float) -> float:
    return sigma / math.hypot(alpha, sigma)


def _level_from_sigma(family: _Family, sigma: float) -> tuple[float, float]:
    """Return the canonical (α, σ) for an entry of a scheduler's `sigmas`."""
    if family.levels == "flow":
        return 1.0 - sigma, sigma
    alpha = 1.0 / math.sqrt(1.0 + sigma * sigma)
    return alpha, sigma * alpha


def _levels(scheduler: Any, family: _Family, begin: int, steps: int) -> list[tuple[float, float]]:
    """Return the canonical (α, σ) of all steps + 1 levels of the grid in use."""
    if family.levels != "alphas":
        return [_level_from_sigma(family, float(s)) for s in scheduler.sigmas[begin : begin + steps + 1]]
    alpha_bars = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps[begin : begin + steps]]
    # LCM and DDPM end in z_0 itself; only DDIM may be told to end at the smallest trained level.
    alpha_bars.append(float(scheduler.final_alpha_cumprod) if family.strides else 1.0)
    return [(math.sqrt(a), math.sqrt(1.0 - a)) for a in alpha_bars]


def _place_grid(scheduler: Any, family: _Family, steps: int, strength: float) -> tuple[int, bool]:
    """Give the scheduler a grid of time steps; return where the trajectory begins in it and whether it is stock."""
    if strength == 1.0:
        scheduler.set_timesteps(steps)
        return 0, True
    if _has_special_spacing(scheduler.config):
        return _search_grid(scheduler, family, steps, strength), True
    if family.levels == "flow":
        _set_flow_grid(scheduler, steps, strength)
    else:
        _set_even_grid(scheduler, family, steps, strength)
    return 0, False


def _has_special_spacing(config: Any) -> bool:
    """Return whether the user asked for a spacing of levels that an even grid of time steps would throw away."""
    flags = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "shift_terminal")
    return (
        any(getattr(config, flag, False) for flag in flags)
        or getattr(config, "interpolation_type", "linear") != "linear"
        or getattr(config, "timestep_type", "discrete") != "discrete"
        or getattr(config, "lambda_min_clipped", -math.inf) != -math.inf
    )


def _search_grid(scheduler: Any, family: _Family, steps: int, strength: float) -> int:
    """Refine the scheduler's own grid until its last `steps` levels start nearest to the strength.

    The level at which the last `steps` entries start falls as the grid gets finer, so bisection finds it.
    """

    def start(size: int) -> float:
        scheduler.set_timesteps(size)
        return _strength(*_level_from_sigma(family, float(scheduler.sigmas[size - steps])))

    coarse, fine = steps, max(steps, int(scheduler.config.num_train_timesteps))
    while fine - coarse > 1:
        middle = (coarse + fine) // 2
        coarse, fine = (middle, fine) if start(middle) > strength else (coarse, middle)
    best = min((coarse, fine), key=lambda size: abs(start(size) - strength))
    reached = start(best)
    if abs(reached - strength) > _STRENGTH_MISS:
        raise ValueError(
            f"expected a strength that {steps} steps of {type(scheduler).__name__} can start from, got {strength}; "
            f"the nearest is {reached:.3f}: change strength or steps"
        )
    return best - steps


def _set_even_grid(scheduler: Any, family: _Family, steps: int, strength: float) -> None:
    """Replace the grid by `steps` evenly spaced trained time steps, the first one nearest to the strength."""
    scheduler.set_timesteps(steps)
    trained = _trained_timesteps(scheduler)
    strengths = (1.0 - scheduler.alphas_cumprod[trained]).double().sqrt()
    start = int((strengths - strength).abs().argmin())
    lowest = float(strengths[min(steps, len(trained)) - 1])
    if steps > len(trained) or start < steps - 1 or strength < 0.9 * float(strengths[0]):
        raise ValueError(
            f"expected a strength of at least {lowest:.3f} for {steps} steps of {type(scheduler).__name__} with "
            f"{len(trained)} trained levels, got {strength}; take fewer steps or a larger strength"
        )
    # The "trailing" rule: the last step ends at the clean image, no evaluation is spent at almost no noise.
    picks = [math.floor((start + 1) * (steps - k) / steps + 0.5) - 1 for k in range(steps)]
    timesteps = trained[picks]
    scheduler.timesteps = timesteps.to(scheduler.timesteps.dtype)
    if family.levels == "sigmas":
        alpha_bar = scheduler.alphas_cumprod[timesteps]
        scheduler.sigmas = torch.cat([((1.0 - alpha_bar) / alpha_bar).sqrt(), scheduler.sigmas[-1:]])


def _trained_timesteps(scheduler: Any) -> Tensor:
    """Return, ascending, the time steps a trajectory may visit: all of them, or those LCM was distilled on."""
    total = int(scheduler.config.num_train_timesteps)
    distilled = getattr(scheduler.config, "original_inference_steps", None)
    if distilled is None:
        return torch.arange(total)
    return torch.arange(1, distilled + 1) * (total // distilled) - 1


def _set_flow_grid(scheduler: Any, steps: int, strength: float) -> None:
    """Replace the grid of a flow schedule by an even one in unshifted time that starts at the strength.

    With σ = t and α = 1−t, strength σ/√(α²+σ²) is reached at t = r/(1+r), r = strength/√(1−strength²); the time shift
    s maps even time u to t = s u/(1+(s−1) u).
    """
    scheduler.set_timesteps(steps)
    total = int(scheduler.config.num_train_timesteps)
    ratio = strength / math.sqrt(1.0 - strength * strength)
    start = min(ratio / (1.0 + ratio), float(scheduler.sigmas[0]))
    if start < 1.0 / total:
        raise ValueError(
            f"expected a strength of at least {_strength(1.0 - 1.0 / total, 1.0 / total):.4f}, the smallest trained "
            f"noise level of {type(scheduler).__name__}, got {strength}"
        )
    shift = float(getattr(scheduler, "shift", None) or getattr(scheduler.config, "flow_shift", 1.0))
    even = start / (shift - (shift - 1.0) * start) * (1.0 - torch.arange(steps, dtype=torch.float64) / steps)
    sigmas = shift * even / (1.0 + (shift - 1.0) * even)
    scheduler.timesteps = (sigmas * total).to(scheduler.timesteps.dtype)
    scheduler.sigmas = torch.cat([sigmas.float(), scheduler.sigmas[-1:]])


def _set_stride(scheduler: Any, timesteps: Tensor, i: int) -> None:
    """Make step i of DDIM, on our own copy, arrive at the next entry of `timesteps`.

    DDIM goes down by num_train_timesteps // num_inference_steps, its only use of both numbers once its tables are
    built. Setting them is what lets it follow any grid. The last step goes to −1, which DDIM reads as the clean image.
    """
    following = int(timesteps[i + 1]) if i + 1 < len(timesteps) else -1
    scheduler.num_inference_steps = 1
    scheduler.register_to_config(num_train_timesteps=int(timesteps[i]) - following)


# --- what the networks are ------------------------------------------------------------------------------------------


def _state_dtype(z: Tensor) -> torch.dtype:
    """The sampler's state is float32 whatever the networks use; float64 stays, for tests."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _dtype_of(network: Any) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def _device_of(network: Any) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _same_values(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and (a is b or (a.shape == b.shape and torch.equal(a, b.to(a))))


def _latent_from(encoded: Any) -> Tensor:
    """Take the latents out of whatever an autoencoder's `encode` returns; the mode of a distribution."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    for name in ("latents", "latent"):
        if hasattr(encoded, name):
            return getattr(encoded, name)
    raise ValueError(
        f"expected encode() to return .latent_dist, .latents or .latent, got {type(encoded).__name__}; "
        "wrap the autoencoder so that it follows diffusers"
    )


def _latent_affine(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of scaled latents = (latents − shift) · scale, per channel where the model has it so."""
    config = vae.config
    scale = like.new_tensor(getattr(config, "scaling_factor", None) or 1.0)
    shift = like.new_tensor(getattr(config, "shift_factor", None) or 0.0)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shift = shift + like.new_tensor(mean).view(1, -1, 1, 1)
        scale = scale / like.new_tensor(std).view(1, -1, 1, 1)
    return scale, shift


def _latent_grid(vae: Any) -> tuple[int, int]:
    """Return (pixels per latent cell, latent channels), from the configuration or, failing that, from a trial."""
    config = vae.config
    channels = getattr(config, "latent_channels", None)
    factor = getattr(config, "downsampling", None) or getattr(vae, "spatial_compression_ratio", None)
    blocks = getattr(config, "block_out_channels", None)
    if factor is None and blocks is not None:
        factor = 2 ** (len(blocks) - 1)
    if factor is not None and channels is not None:
        return int(factor), int(channels)
    with torch.no_grad():
        size = 64
        latent = _latent_from(vae.encode(torch.zeros(1, 3, size, size, dtype=_dtype_of(vae), device=_device_of(vae))))
    return size // latent.shape[-1], latent.shape[1]


def _latent_multiple(denoiser: Any) -> int:
    """Return what latent sides must be multiples of: the U-Net's downsamplings, or a transformer's patch."""
    config = getattr(denoiser, "config", None)
    blocks = getattr(config, "block_out_channels", None)
    if blocks is not None:
        return 2 ** (len(blocks) - 1)
    return int(getattr(config, "patch_size", None) or 1)


def _check_channels(denoiser: Any, latent_channels: int) -> None:
    """Refuse a denoiser that does not map latents of this autoencoder to latents of this autoencoder."""
    config = getattr(denoiser, "config", None)
    for name in ("in_channels", "out_channels"):
        channels = getattr(config, name, None)
        if channels is not None and channels != latent_channels:
            raise ValueError(
                f"expected a denoiser with {name}={latent_channels} to suit the autoencoder, got {channels}; pick the "
                "autoencoder it was trained with (learned variances and extra conditions are not supported)"
            )
