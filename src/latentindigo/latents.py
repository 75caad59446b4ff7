"""What an autoencoder of diffusers says about its latents: grid, scale and shift, and where its networks compute.

Autoencoders name these things differently: AutoencoderKL has a scaling and a shift factor or means and deviations per
channel, AutoencoderTiny works on scaled latents already, AutoencoderDC and AutoencoderTiny return no distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.offloading import execution_device

__all__ = [
    "decode_latents",
    "dtype_of",
    "encode_pixels",
    "latent_affine",
    "latent_from",
    "latent_grid",
]


def dtype_of(network: Any) -> torch.dtype:
    """The dtype a network computes in; float32 for one without weights."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def latent_from(encoded: Any) -> Float[Tensor, "b c h w"]:
    """Take the latents out of whatever an autoencoder's `encode` returns; the mode of a distribution.

    Args:
        encoded: What `encode` returned.

    Returns:
        Latents, not scaled yet, (B, C, h, w).

    Raises:
        ValueError: If it is nothing that diffusers' autoencoders return.
    """
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    for name in ("latents", "latent"):
        if hasattr(encoded, name):
            return getattr(encoded, name)
    raise ValueError(
        f"expected encode() to return .latent_dist, .latents or .latent, got {type(encoded).__name__}; "
        "wrap the autoencoder so that it follows diffusers"
    )


def latent_affine(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of scaled latents = (latents − shift) · scale, per channel where the model has it so.

    Args:
        vae: An autoencoder with a configuration.
        like: A tensor of the wanted dtype and device.

    Returns:
        Scale and shift, numbers or (1, C, 1, 1).
    """
    config = vae.config
    scale = like.new_tensor(getattr(config, "scaling_factor", None) or 1.0)
    shift = like.new_tensor(getattr(config, "shift_factor", None) or 0.0)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shift = shift + like.new_tensor(mean).view(1, -1, 1, 1)
        scale = scale / like.new_tensor(std).view(1, -1, 1, 1)
    return scale, shift


def latent_grid(vae: Any) -> tuple[int, int]:
    """Return (pixels per latent cell, latent channels), from the configuration or, failing that, from a trial.

    Args:
        vae: An autoencoder with a configuration.

    Returns:
        The number of pixels along one side of a cell, and the number of channels.
    """
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
        blank = torch.zeros(1, 3, size, size, dtype=dtype_of(vae), device=execution_device(vae))
        latent = latent_from(vae.encode(blank))
    return size // latent.shape[-1], latent.shape[1]


def encode_pixels(vae: Any, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
    """Encode whole images with an autoencoder alone, without a denoiser; `LatentPrior.encode` can tile and counts.

    Args:
        vae: An autoencoder of diffusers or of ours.
        x: Images in [0, 1], sides multiples of its downsampling.

    Returns:
        Scaled latents, float32.
    """
    latent = latent_from(vae.encode((x * 2 - 1).to(dtype_of(vae)))).float()
    scale, shift = latent_affine(vae, latent)
    return (latent - shift) * scale


def decode_latents(vae: Any, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
    """Decode whole latents with an autoencoder alone.

    Args:
        vae: An autoencoder of diffusers or of ours.
        z: Scaled latents.

    Returns:
        Images on the [0, 1] scale, not clamped, float32.
    """
    scale, shift = latent_affine(vae, z)
    return (vae.decode((z / scale + shift).to(dtype_of(vae))).sample.float() + 1) / 2
