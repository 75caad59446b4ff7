"""Toy networks with known answers: a linear autoencoder and the exact denoiser of a Gaussian prior.

Both speak diffusers' language (`encode(x).latents`, `decode(z).sample`, `denoiser(z, t).sample`), so that
`LatentPrior` takes them as it takes real networks. For z_0 ~ N(m, s²) per element everything has a closed form:

| quantity | closed form |
| --- | --- |
| z_{0,t} | m + α s²/(α² s² + σ²) · (z_t − α m) |
| probability-flow path | (z_t − α m)/√(α² s² + σ²) is constant along it |
| end of the path | m + s · (z_T − α_T m)/√(α_T² s² + σ_T²) |
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from latentindigo.prior import LatentPrior

MEAN, STD = 0.3, 0.6  # Of the toy Gaussian; away from 0 and 1, where a forgotten mean or scale would not show.


@dataclass
class ToyOutput:
    """What a toy network returns, with diffusers' field names."""

    sample: Tensor


@dataclass
class ToyLatents:
    """What a toy encoder returns, with diffusers' field name."""

    latents: Tensor


class LinearVAE(nn.Module):
    """An exactly invertible linear autoencoder: blocks of factor × factor RGB pixels times an orthogonal matrix.

    With factor 1 and `identity=True` it is the identity up to the pixel range, scale and shift.
    """

    matrix: nn.Parameter

    def __init__(
        self,
        factor: int = 2,
        *,
        scaling_factor: float = 0.5,
        shift_factor: float = 0.1,
        identity: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        channels = 3 * factor * factor
        generator = torch.Generator().manual_seed(seed)
        square = torch.eye(channels)
        if not identity:
            square = torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q
        self.matrix = nn.Parameter(square, requires_grad=False)
        self.factor = factor
        self.config = SimpleNamespace(
            scaling_factor=scaling_factor, shift_factor=shift_factor, latent_channels=channels, downsampling=factor
        )

    def encode(self, x: Tensor) -> ToyLatents:
        """Map pixels in [-1, 1], (B, 3, H, W), to latents, (B, 3f², H/f, W/f)."""
        blocks = nn.functional.pixel_unshuffle(x, self.factor)
        return ToyLatents(torch.einsum("ij,bjhw->bihw", self.matrix, blocks))

    def decode(self, z: Tensor) -> ToyOutput:
        """Map latents back to pixels in [-1, 1]; the exact inverse of `encode`."""
        blocks = torch.einsum("ij,bihw->bjhw", self.matrix, z)
        return ToyOutput(nn.functional.pixel_shuffle(blocks, self.factor))


class GaussianDenoiser(nn.Module):
    """The exact denoiser of z_0 ~ N(mean, std²), speaking any of the four prediction types.

    Args:
        scheduler: A scheduler whose trained noise levels the denoiser was "trained" on.
        kind: What it predicts: epsilon, v_prediction, sample or flow_prediction.
        mean: m, a number or a tensor that broadcasts against the latents.
        std: s, likewise.
    """

    def __init__(self, scheduler: Any, kind: str, mean: float | Tensor = MEAN, std: float | Tensor = STD) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.kind = kind
        self.total = int(scheduler.config.num_train_timesteps)
        alpha_bar = getattr(scheduler, "alphas_cumprod", None)
        flow = alpha_bar is None or getattr(scheduler.config, "use_flow_sigmas", False)
        self.alpha_bar = None if flow or alpha_bar is None else alpha_bar.double()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (α, σ) at time steps t, whole or between two trained ones, shaped to broadcast over latents."""
        t = t.double().view(-1, 1, 1, 1)
        if self.alpha_bar is None:
            return 1.0 - t / self.total, t / self.total
        # Between trained steps σ/α is interpolated linearly, which is how diffusers' σ-based schedulers define it.
        ratio = ((1.0 - self.alpha_bar) / self.alpha_bar).sqrt()
        low = t.floor().long().clamp(0, self.total - 2)
        share = t - low
        # The highest ratio may be infinite (zero terminal SNR), and 0 · ∞ is not a number.
        between = torch.where(share > 0, ratio[low] + share * (ratio[low + 1] - ratio[low]), ratio[low])
        alpha = (1.0 + between * between).rsqrt()
        return alpha, (1.0 - alpha * alpha).sqrt()

    def z0(self, z_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Return the posterior mean of z_0 given z_t."""
        variance = self.std * self.std
        return self.mean + alpha * variance / (alpha * alpha * variance + sigma * sigma) * (z_t - alpha * self.mean)

    def path_end(self, z_t: Tensor, alpha: float, sigma: float, to: tuple[float, float] = (1.0, 0.0)) -> Tensor:
        """Follow the probability flow exactly from level (alpha, sigma) to level `to`."""
        spread = (alpha**2 * self.std**2 + sigma**2) ** 0.5
        target = (to[0] ** 2 * self.std**2 + to[1] ** 2) ** 0.5
        return to[0] * self.mean + target / spread * (z_t - alpha * self.mean)

    def forward(self, z_t: Tensor, t: Tensor) -> ToyOutput:
        """Predict ε, v, z_0 or the flow velocity at z_t, (B, C, h, w), for time steps t, (B,)."""
        alpha, sigma = self.alpha_sigma(t)
        state = z_t.double()
        z0 = self.z0(state, alpha, sigma)
        epsilon = (state - alpha * z0) / sigma
        output = {
            "epsilon": epsilon,
            "v_prediction": alpha * epsilon - sigma * z0,
            "sample": z0,
            "flow_prediction": epsilon - z0,
        }[self.kind]
        return ToyOutput(output.to(z_t.dtype))


class ConvDenoiser(nn.Module):
    """A small nonlinear random network that depends on time, where no closed form is wanted."""

    def __init__(self, channels: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Conv2d(channels, 16, 3, padding=1)
        self.outer = nn.Conv2d(16, channels, 3, padding=1)
        for parameter in self.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5

    def forward(self, z_t: Tensor, t: Tensor) -> ToyOutput:
        """Return something of z_t's shape."""
        time = (t.to(z_t.dtype) / 1000.0).view(-1, 1, 1, 1)
        return ToyOutput(self.outer(torch.tanh(self.inner(z_t) + time)))


def gaussian_prior(
    scheduler: Any,
    kind: str | None = None,
    *,
    vae: LinearVAE | None = None,
    mean: float | Tensor = MEAN,
    std: float | Tensor = STD,
) -> LatentPrior:
    """Build a prior whose samples are known: linear autoencoder, exact Gaussian denoiser, any scheduler.

    Args:
        scheduler: A diffusers scheduler.
        kind: The prediction type; None takes the scheduler's.
        vae: The autoencoder; by default the linear one at factor 2.
        mean: Mean of the scaled latents.
        std: Standard deviation of the scaled latents.

    Returns:
        The prior; its exact denoiser is `prior.denoiser`.
    """
    known: str = kind or getattr(scheduler.config, "prediction_type", "flow_prediction")
    denoiser = GaussianDenoiser(scheduler, known, mean, std)
    return LatentPrior(vae or LinearVAE(), denoiser, scheduler, prediction_type=known)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard normal numbers from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
