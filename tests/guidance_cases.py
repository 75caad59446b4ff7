"""Data terms on small, exactly known priors, for the laws of guidance."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from latentindigo.guidance import DataTerm, GuidanceConfig, LatentINN, LearnedForward, PixelINN
from latentindigo.inn import InvertibleNet
from latentindigo.prior import LatentPrior
from tolerances import in_dtype, randomise_
from toys import ConvDenoiser, LinearVAE, randn

GAMMA_DIM = 6
KINDS: dict[str, type[DataTerm]] = {"pixel": PixelINN, "latent": LatentINN}


def make_inn(channels: int, *, dtype: torch.dtype = torch.float64, scale: float = 0.5, steps: int = 2) -> InvertibleNet:
    net = InvertibleNet(channels=channels, gamma_dim=GAMMA_DIM, hidden=6, blocks=1, num_steps=steps, offset=0.0)
    return in_dtype(randomise_(net, 1, scale).eval().requires_grad_(False), dtype)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to a matrix."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def make_prior(dtype: torch.dtype = torch.float64, kind: str = "v_prediction", **vae: Any) -> LatentPrior:
    autoencoder = in_dtype(LinearVAE(**vae), dtype)
    # Orthogonal to the precision of float32 only until here; the laws below need E to undo D in float64 as well.
    autoencoder.matrix.data = orthogonal(autoencoder.matrix.data)
    denoiser = in_dtype(ConvDenoiser(autoencoder.config.latent_channels), dtype)
    scheduler = DDIMScheduler(clip_sample=False)
    return LatentPrior(autoencoder, denoiser, scheduler, prediction_type=kind)


def latents(batch: int = 2, size: int = 8, dtype: torch.dtype = torch.float64, channels: int = 12) -> Tensor:
    return 0.5 * randn(batch, channels, size, size, seed=5, dtype=dtype)


def make_data(
    name: str,
    z0: Tensor,
    *,
    config: GuidanceConfig | None = None,
    levels: int = 1,
    kind: type[DataTerm] | None = None,
    residual: float | Tensor = 0.2,
    noise: Tensor | None = None,
    steps: int = 2,
    vae: dict[str, Any] | None = None,
) -> DataTerm:
    """Build a data term whose measurement is the coarse part of `z0` plus a residual (its size, or the values)."""
    prior = make_prior(z0.dtype, **(vae or {}))
    channels = 3 if name == "pixel" else z0.shape[1]
    gamma = randn(len(z0), GAMMA_DIM, seed=6, dtype=z0.dtype)
    model = LearnedForward(make_inn(channels, dtype=z0.dtype, steps=steps), gamma, levels)
    pixels = z0.shape[-1] * z0.shape[-2] * prior.downsampling**2
    u = prior.decode(z0) if name == "pixel" else z0
    coarse, _ = model.split(u)
    if isinstance(residual, float):
        residual = residual * randn(*coarse.shape, seed=7, dtype=z0.dtype)
    noise = torch.zeros(len(z0), dtype=z0.dtype) if noise is None else noise
    return (kind or KINDS[name])(prior, model, coarse + residual, pixels, config or GuidanceConfig(), noise)


def ones(z0: Tensor) -> Tensor:
    return torch.ones(len(z0), dtype=z0.dtype)
