"""The latent diffusion prior: the one narrow door to diffusers' autoencoders, denoisers and schedulers.

Everything outside this module speaks **canonical coordinates**, z_t = α_t z_0 + σ_t ε, pixels in [0, 1] and float32.
What a scheduler stores instead (Euler: z/α), what a network predicts (ε, v, z_0 or a flow velocity), the pixel range
and the dtype of the networks are converted here and nowhere else; `latentindigo.schedules` knows the schedulers.

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
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.backbones import Capabilities, backbone_of
from latentindigo.conditioning import Conditioning
from latentindigo.latents import dtype_of, latent_affine, latent_from, latent_grid
from latentindigo.offloading import execution_device, private_copy
from latentindigo.schedules import (
    PredictionType,
    checked_eta,
    family_of,
    network_type,
    noise_levels,
    output_from_z0,
    place_grid,
    prepare_scheduler,
    scheduler_type,
    set_stride,
    shift_exponent,
    state_dtype,
    strength_of,
    z0_from_output,
)
from latentindigo.tiling import TilingConfig, tiled_map

__all__ = ["Calls", "LatentPrior", "Prediction", "Trajectory", "in_full_precision"]

Network = TypeVar("Network")

_PURE_NOISE = 0.99  # Stable Diffusion's noisiest level is 0.998 and its 10-step grid starts at 0.99.
_SMALLEST_ALPHA = 1e-6  # Below this, (z − σε)/α is noise of float32 and nothing else.


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


class LatentPrior:
    """A latent diffusion model seen as five verbs: encode, decode, trajectory, predict and step.

    It holds references only: the networks and the scheduler passed in are never changed, and each trajectory works on
    its own copy of the scheduler, so that several threads may share one prior.
    """

    def __init__(
        self,
        vae: Any,
        denoiser: Any,
        scheduler: Any,
        *,
        prediction_type: str | None = None,
        conditioning: Conditioning | None = None,
        guidance_vae: Any = None,
    ) -> None:
        """Wrap an autoencoder, a denoiser and a scheduler.

        Args:
            vae: An autoencoder with diffusers' `encode(x)` / `decode(z)`, pixels in [-1, 1] on its side.
            denoiser: A network of one of the families in `latentindigo.backbones`, or one called as `denoiser(z, t)`
                whose result has `.sample` of z's shape.
            scheduler: One of diffusers' one-evaluation-per-step schedulers.
            prediction_type: What the network predicts: "epsilon", "v_prediction", "sample" or "flow_prediction"; None
                takes it from the scheduler's configuration.
            conditioning: What a text-conditioned denoiser is told; it may be missing until a trajectory is planned.
            guidance_vae: A cheap autoencoder of the same latents (AutoencoderTiny), see `for_guidance`.

        Raises:
            ValueError: If the scheduler is of a kind that cannot be driven step by step, or the parts do not fit.
        """
        self.vae = vae
        self.denoiser = denoiser
        self.calls = Calls()
        self._tiling: TilingConfig | None = None
        self._tile_batch = 1
        self._canvas: tuple[int, int] | None = None
        self.scheduler = copy.deepcopy(scheduler)
        self._family = family_of(self.scheduler)
        self.prediction_type: PredictionType = network_type(self.scheduler, self._family, prediction_type)
        prepare_scheduler(self.scheduler, self._family, self.prediction_type)
        self.downsampling, self.latent_channels = latent_grid(vae)
        self._backbone = backbone_of(denoiser)
        self._latent_multiple = self._backbone.multiple
        _check_channels(self._backbone.channels, self.latent_channels)
        self.conditioning = conditioning
        if conditioning is not None:
            self._backbone.check(conditioning)
        self._guidance_vae = guidance_vae
        if guidance_vae is not None and latent_grid(guidance_vae) != (self.downsampling, self.latent_channels):
            factor, channels = latent_grid(guidance_vae)
            raise ValueError(
                f"expected a guidance autoencoder of {self.latent_channels} latent channels, {self.downsampling} "
                f"pixels per cell, like the full one, got {channels} and {factor}; pick the one made for this model"
            )

    @property
    def size_multiple(self) -> int:
        """The number of pixels that height and width must be multiples of."""
        return self.downsampling * self._latent_multiple

    @property
    def capabilities(self) -> Capabilities:
        """What this model is and needs, as data."""
        backbone = self._backbone
        return Capabilities(
            family=backbone.family,
            prediction_type=self.prediction_type,
            latent_channels=self.latent_channels,
            downsampling=self.downsampling,
            size_multiple=self.size_multiple,
            text_encoders=backbone.text_encoders,
            token_width=backbone.token_width,
            pooled_width=backbone.pooled_width,
            distilled_guidance=backbone.distilled,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the denoiser computes in; what goes in and comes out of this class is float32 all the same."""
        return dtype_of(self.denoiser)

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return execution_device(self.denoiser)

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

    def for_guidance(self) -> LatentPrior:
        """Return a view whose `decode` and `encode` are those of the guidance autoencoder, if there is one.

        Guidance in pixels decodes in every step; a small autoencoder that was trained to imitate the full one does it
        for a fraction of the cost, and the picture itself still comes from the full decoder.

        Returns:
            A light copy that shares networks and counter.
        """
        view = copy.copy(self)
        if self._guidance_vae is not None:
            view.vae = self._guidance_vae
        return view

    def tiled(self, tiling: TilingConfig | None, batch: int = 1) -> LatentPrior:
        """Return a view of this prior that runs encoder, decoder and denoiser on overlapping tiles.

        Args:
            tiling: Tile and overlap in pixels of the image, multiples of `size_multiple`; None = whole images.
            batch: Most tiles that go through a network at once.

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
        view._tiling, view._tile_batch = tiling, batch
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
        state, device = state_dtype(x), self.device

        def encode(part: Tensor) -> Tensor:
            pixels = 2.0 * part.to(device, state) - 1.0
            return in_full_precision(self.vae, lambda vae: latent_from(vae.encode(pixels.to(dtype_of(vae)))))

        if self._tiling is None:
            latent = encode(x)
        else:
            tile, overlap = self._tiling.tile, self._tiling.overlap
            latent = tiled_map(encode, x, tile, overlap, scale_den=self.downsampling, batch=self._tile_batch)
        latent = latent.to(state)
        scale, shift = latent_affine(self.vae, latent)
        return (latent - shift) * scale

    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Decode scaled latents into pixels (decoder D); differentiable.

        Args:
            z: Scaled latents, (B, C, h, w).

        Returns:
            Images, (B, 3, fh, fw), float32, on the [0, 1] scale but not clamped to it, so that gradients survive.
        """
        self.calls.decoder += 1
        scale, shift = latent_affine(self.vae, z)
        latent = z / scale + shift

        def decode(part: Tensor) -> Tensor:
            return in_full_precision(self.vae, lambda vae: vae.decode(part.to(dtype_of(vae))).sample)

        decoded = self._on_latent_tiles(decode, latent, self.downsampling)
        calls = self.calls

        def count(_: Tensor) -> None:
            calls.decoder_backward += 1

        if decoded.requires_grad:
            decoded.register_hook(count)
        return (decoded.to(state_dtype(z)) + 1.0) / 2.0

    def trajectory(
        self, steps: int, strength: float = 1.0, *, eta: float = 0.0, latent_size: tuple[int, int] | None = None
    ) -> Trajectory:
        """Plan a descent from a noise level to a clean latent in exactly `steps` denoiser evaluations.

        At strength 1 the scheduler's own full grid is used as it is. Below, the trajectory starts at the trained time
        step whose level is nearest to the wish and goes down in equal steps of time, whatever the scheduler, so that
        schedulers can be compared on the same time steps. Schedulers with a special spacing (Karras, exponential, ...)
        keep it: their own grid is refined until its last `steps` entries start nearest to the wish.

        Args:
            steps: Number of denoiser evaluations, at least 1.
            strength: σ/√(α²+σ²) at the start, in (0, 1]; 1 = pure noise.
            eta: Share of fresh noise in each step, 0 = deterministic; only schedulers like DDIM know it.
            latent_size: (height, width) of the latent, for flow schedules whose time shift depends on it (FLUX).

        Returns:
            The trajectory; `start_strength` tells the level that was reached.

        Raises:
            ValueError: If the level cannot be reached in that many steps, if the scheduler knows no `eta`, if an
                ε-predicting network would be asked about pure noise (α = 0), where ε says nothing about z_0, if a
                text-conditioned denoiser has no conditioning, or if the time shift needs `latent_size`.
        """
        if self._backbone.token_width is not None and self.conditioning is None:
            raise ValueError(self._backbone.needs_text())
        view = copy.copy(self)
        if latent_size is not None:
            view._canvas = latent_size[0] * self.downsampling, latent_size[1] * self.downsampling
        return Trajectory(view, steps, strength, eta, self._tokens(latent_size))

    def _tokens(self, latent_size: tuple[int, int] | None) -> int | None:
        """How many image tokens a transformer sees at once: those of the latent, or of one tile."""
        if latent_size is None:
            return None
        height, width = latent_size
        if self._tiling is not None:
            tile = self._tiling.tile // self.downsampling
            height, width = min(height, tile), min(width, tile)
        return (height // self._latent_multiple) * (width // self._latent_multiple)

    def _on_latent_tiles(self, fn: Callable[[Tensor], Tensor], z: Tensor, scale: int) -> Tensor:
        """Run a network on latents, tile by tile if this view is tiled."""
        if self._tiling is None:
            return fn(z)
        tile, overlap = self._tiling.tile // self.downsampling, self._tiling.overlap // self.downsampling
        multiple, batch = self._latent_multiple, self._tile_batch
        return tiled_map(fn, z, tile, overlap, scale_num=scale, multiple=multiple, batch=batch)

    def _denoise(self, z: Tensor, t: Tensor) -> Tensor:
        """Run the denoiser once, in its own dtype, and count the call and any later backward pass."""
        height, width = z.shape[-2:]
        if height % self._latent_multiple or width % self._latent_multiple:
            raise ValueError(
                f"expected latent sides that are multiples of {self._latent_multiple}, got {height}x{width}; "
                f"pad the image to multiples of {self.size_multiple} pixels"
            )
        self.calls.denoiser += 1
        time, canvas = t.to(z.device), self._canvas or (height * self.downsampling, width * self.downsampling)

        def denoise(part: Tensor) -> Tensor:
            times, conditioning = time.expand(part.shape[0]), self.conditioning
            return in_full_precision(
                self.denoiser,
                lambda net: self._backbone.evaluate(net, part.to(dtype_of(net)), times, conditioning, canvas),
            )

        output = self._on_latent_tiles(denoise, z, 1)
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

    def __init__(self, prior: LatentPrior, steps: int, strength: float, eta: float, tokens: int | None) -> None:
        """Plan the trajectory; use `LatentPrior.trajectory`, which documents the arguments."""
        if steps < 1:
            raise ValueError(f"expected at least 1 step, got {steps}")
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"expected a strength in (0, 1], 1 = pure noise, got {strength}")
        self.prior = prior
        self._family = prior._family
        self._scheduler = copy.deepcopy(prior.scheduler)
        self._accepted: PredictionType = scheduler_type(self._scheduler)
        arguments = inspect.signature(self._scheduler.step).parameters
        self._takes_generator = "generator" in arguments
        self._eta = checked_eta(self._scheduler, arguments, eta)
        self._draws = self._family.draws(self._scheduler.config, eta)

        mu = shift_exponent(self._scheduler, tokens)
        even = prior._backbone.even_grid
        begin, self._is_stock_grid = place_grid(self._scheduler, self._family, steps, strength, mu=mu, even=even)
        if hasattr(self._scheduler, "set_begin_index"):
            # Counting from a known index is exact; looking a time step up is not when two steps share one.
            self._scheduler.set_begin_index(begin)
        self.timesteps: Tensor = self._scheduler.timesteps[begin : begin + steps]
        if len(self.timesteps) != steps:
            raise ValueError(
                f"expected {steps} time steps, but {type(self._scheduler).__name__} gives {len(self.timesteps)}; "
                "choose another number of steps or another timestep_spacing"
            )
        self._levels = noise_levels(self._scheduler, self._family, begin, steps)
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
        return strength_of(*self._levels[0])

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
        output = self.prior._denoise(z_t, self.timesteps[i]).to(state_dtype(z_t))
        return Prediction(z0_from_output(output, z_t, alpha, sigma, self.prior.prediction_type), output)

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
                output = output_from_z0(z0_new.detach(), z_t.detach(), *self._levels[i], self._accepted)
            output = output.to(state_dtype(z_t))
            z_next = self._scheduler_step(output, z_t.detach().to(state_dtype(z_t)), i, keywords)
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
            set_stride(scheduler, self.timesteps, i)
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


# --- what the networks are ------------------------------------------------------------------------------------------


def in_full_precision(network: Network, run: Callable[[Network], Tensor]) -> Tensor:
    """Run a network, and once more in float32 if half precision gave numbers that are not finite.

    Args:
        network: A network; it is not changed, a float32 copy is made when it is needed.
        run: Calls the network it is given, in that network's dtype.

    Returns:
        What it gave.
    """
    output = run(network)
    dtype = dtype_of(network)
    # To look at values is to wait for the accelerator, and bfloat16 reaches as far as float32 does.
    trusted = dtype == torch.bfloat16 and output.device.type != "cpu"
    if dtype not in (torch.float16, torch.bfloat16) or trusted or bool(output.isfinite().all()):
        return output
    warnings.warn(
        f"{type(network).__name__} gave numbers that are not finite in {dtype_of(network)}; this part is computed "
        "again in float32. Load the model with float32 (--dtype float32) to save the time",
        stacklevel=2,
    )
    full: Any = private_copy(network)
    return run(full.float())


def _same_values(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and (a is b or (a.shape == b.shape and torch.equal(a, b.to(a))))


def _check_channels(channels: tuple[int | None, int | None], latent_channels: int) -> None:
    """Refuse a denoiser that does not map latents of this autoencoder to latents of this autoencoder."""
    for name, count in zip(("in_channels", "out_channels"), channels, strict=True):
        if count is not None and count != latent_channels:
            raise ValueError(
                f"expected a denoiser with {name}={latent_channels} to suit the autoencoder, got {count}; pick the "
                "autoencoder it was trained with (learned variances and extra conditions are not supported)"
            )
