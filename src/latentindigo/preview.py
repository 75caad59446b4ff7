"""A quick look at an estimate while sampling goes on: what the sampler believes in, as a small picture.

A full decode at every step would take about as long as the step. The embedded autoencoder has a linear branch, a
hundredth of its work, that shows everything but the last sharpness. Others decode the latent after it was averaged to
few cells, by the cheap autoencoder if there is one: neighbouring cells of such latents mean neighbouring colours.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentindigo.autoencoder import PatchAutoencoder
from latentindigo.latents import dtype_of, latent_affine
from latentindigo.prior import LatentPrior

__all__ = ["preview"]


def preview(
    prior: LatentPrior, z0: Float[Tensor, "b c h w"], size: tuple[int, int], side: int = 512
) -> Float[Tensor, "3 H W"]:
    """Make a small picture of the first estimate of a batch.

    Args:
        prior: The latent diffusion model that samples.
        z0: Estimates z_{0,t} on the canvas, scaled latents, (B, c, h, w); the canvas may be padded to the right and
            below.
        size: (width, height) of the output; the padding is cut off.
        side: Longest side of the picture in pixels; smaller outputs keep their size.

    Returns:
        Pixels (3, H, W) in [0, 1], float32 on the CPU.
    """
    factor = prior.downsampling
    height, width = (factor * cells for cells in z0.shape[-2:])
    # An earlier pass of several has a smaller canvas of the same shape.
    share = min(1.0, width / size[0], height / size[1])
    kept = max(1, round(size[1] * share)), max(1, round(size[0] * share))
    small = min(1.0, side / max(kept))
    one = z0[:1]
    if isinstance(prior.vae, PatchAutoencoder):
        scale, shift = latent_affine(prior.vae, one)
        latent = (one / scale + shift).to(dtype_of(prior.vae))
        x = (prior.vae.decode_linear(latent).float() + 1.0) / 2.0
    else:
        step = max(1, math.floor(1 / small))
        one = F.avg_pool2d(one, step, ceil_mode=True, count_include_pad=False)
        x = prior.for_guidance().decode(one).float()
        kept = math.ceil(kept[0] / step), math.ceil(kept[1] / step)
        small = min(1.0, side / max(kept))
    x = x[..., : kept[0], : kept[1]]
    if small < 1:
        x = F.interpolate(x, size=[max(1, round(n * small)) for n in x.shape[-2:]], mode="area")
    return x[0].clamp(0, 1).cpu()
