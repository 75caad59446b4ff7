"""The embedded autoencoder: a principal-component patch transform plus a convolutional residual, both ways.

A latent diffusion model can never be better than its autoencoder, sharpness first. Written as "PCA + residual" the
network starts at the quality of the best *linear* latent of its size (8x8 RGB patches to 48 numbers: 34.5 dB and 83 %
of the gradient energy on test photographs) instead of at noise, and training only has to add what is not linear.

Notation (names as in `docs/paper_map.md`):

    E, D            encoder and decoder of the latent diffusion model
    z = E(x)        (B, c, H/f, W/f), f = `patch_size`, c = `latent_channels`
    V (c, 3*f*f)    principal directions of the patches, s their standard deviations
    base of E       z_i = V_i (patch - mean) * s_i**(p-1) / norm,  p = `whitening`
    base of D       the exact inverse on the span of V

`whitening` p sets the metric of the latent space: p = 1 keeps pixel distances (details are then drowned by little
noise), p = 0 gives every direction unit variance (details count as much as structure). In between, sampling works
coarse to fine and details still carry weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentindigo.offloading import entry

__all__ = ["AutoencoderOutput", "PatchAutoencoder", "fit_patch_basis"]


@dataclass
class AutoencoderOutput(BaseOutput):
    """Output of `PatchAutoencoder.encode`.

    Attributes:
        latents: (B, c, H/f, W/f) scaled latents, about unit variance over natural images.
    """

    latents: Tensor


@dataclass
class DecoderOutput(BaseOutput):
    """Output of `PatchAutoencoder.decode`.

    Attributes:
        sample: (B, 3, H, W) image, about [-1, 1], not clamped.
    """

    sample: Tensor


class _ResidualBlock(nn.Module):
    """x + conv(act(conv(x))), without normalisation: statistics over the image would make tiles disagree."""

    gradient_checkpointing = False  # diffusers' switch finds it by this name.

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        if self.conv_out.bias is not None:
            nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return x + checkpoint(self._residual, x, use_reentrant=False, preserve_rng_state=False)
        return x + self._residual(x)

    def _residual(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_in(F.silu(x))))


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Autoencoder of the embedded model (ours): patch PCA + convolutional residual, latents on a grid of 1/8.

    It has the interface of diffusers' autoencoders: `encode(x).latents`, `decode(z).sample`, pixels in [-1, 1].

    Args:
        latent_channels: Channels c of the latent.
        patch_size: Side f of a patch, the downsampling factor. Only 8 is supported by the residual branches.
        encoder_channels: Widths of the residual encoder at 1/4 and 1/8 of the image.
        decoder_channels: Widths of the residual decoder at 1/8, 1/4 and 1/2 of the image.
        decoder_blocks: Residual blocks at the same three sizes.
        scaling_factor: As in diffusers; 1, since the base transform is already scaled.
        shift_factor: As in diffusers; 0.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 48,
        patch_size: int = 8,
        encoder_channels: Sequence[int] = (48, 96),
        decoder_channels: Sequence[int] = (160, 96, 32),
        decoder_blocks: Sequence[int] = (3, 2, 1),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size != 8:
            raise ValueError(
                f"patch_size must be 8 (the residual branches halve the image three times), got {patch_size}"
            )
        c, f = latent_channels, patch_size
        self.encode_base = nn.Conv2d(3, c, f, stride=f)
        self.decode_base = nn.ConvTranspose2d(c, 3, f, stride=f)
        fine, coarse = encoder_channels
        self.encode_residual = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, fine, 3, padding=1),
            _ResidualBlock(fine),
            _ResidualBlock(fine),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * fine, coarse, 1),
            _ResidualBlock(coarse),
            _ResidualBlock(coarse),
            nn.SiLU(),
            nn.Conv2d(coarse, c, 3, padding=1),
        )
        eighth, quarter, half = decoder_channels
        n_eighth, n_quarter, n_half = decoder_blocks
        self.decode_residual = nn.Sequential(
            nn.Conv2d(c, eighth, 3, padding=1),
            *[_ResidualBlock(eighth) for _ in range(n_eighth)],
            nn.Conv2d(eighth, 4 * quarter, 1),
            nn.PixelShuffle(2),
            *[_ResidualBlock(quarter) for _ in range(n_quarter)],
            nn.Conv2d(quarter, 4 * half, 1),
            nn.PixelShuffle(2),
            *[_ResidualBlock(half) for _ in range(n_half)],
            nn.SiLU(),
            nn.Conv2d(half, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        for branch, index in ((self.encode_residual, -1), (self.decode_residual, -2)):
            last = branch[index]
            if isinstance(last, nn.Conv2d) and last.bias is not None:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent cell, under the name that diffusers' autoencoders use."""
        return int(self.config["patch_size"])

    @torch.no_grad()
    def set_patch_basis(self, basis: Tensor, mean: Tensor, gains: Tensor) -> None:
        """Write a fitted patch basis (see `fit_patch_basis`) into the linear branches.

        Args:
            basis: (c, 3*f*f) orthonormal rows, patch layout (channel, row, column).
            mean: (3*f*f,) mean patch, pixels in [-1, 1].
            gains: (c,) factor from principal coordinate to latent.
        """
        c, f = self.config["latent_channels"], self.config["patch_size"]
        encode = (basis * gains[:, None]).reshape(c, 3, f, f)
        self.encode_base.weight.copy_(encode)
        self.decode_base.weight.copy_((basis / gains[:, None]).reshape(c, 3, f, f))
        if self.encode_base.bias is not None and self.decode_base.bias is not None:
            self.encode_base.bias.copy_(-(basis * gains[:, None]) @ mean)
            # A transposed convolution has one bias per colour, so the mean patch enters as its mean colour.
            self.decode_base.bias.copy_(mean.reshape(3, -1).mean(1))

    @entry
    def encode(self, x: Float[Tensor, "b 3 h w"], return_dict: bool = True) -> AutoencoderOutput | tuple[Tensor]:
        """Encode an image: z = E(x).

        Args:
            x: (B, 3, H, W), H and W multiples of 8, in [-1, 1].
            return_dict: False gives a plain tuple.

        Returns:
            Latents of shape (B, c, H/8, W/8).

        Raises:
            ValueError: If H or W is no multiple of 8.
        """
        if x.shape[-1] % 8 or x.shape[-2] % 8:
            raise ValueError(f"image sides must be multiples of 8, got {tuple(x.shape[-2:])}; pad the image first")
        z = self.encode_base(x) + self.encode_residual(x)
        return AutoencoderOutput(latents=z) if return_dict else (z,)

    @entry
    def decode(
        self, z: Float[Tensor, "b c h w"], return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents: x = D(z).

        Args:
            z: (B, c, h, w) latents.
            return_dict: False gives a plain tuple.
            generator: Unused, there for the interface of diffusers' autoencoders.

        Returns:
            Image (B, 3, 8h, 8w), about [-1, 1], not clamped.
        """
        x = self.decode_base(z) + self.decode_residual(z)
        return DecoderOutput(sample=x) if return_dict else (x,)

    @entry
    def decode_linear(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Decode latents by the linear branch alone: a hundredth of the work, without what is not linear.

        Args:
            z: (B, c, h, w) latents.

        Returns:
            Image (B, 3, 8h, 8w), about [-1, 1], not clamped.
        """
        return self.decode_base(z)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Round trip D(E(x)), pixels in [-1, 1]; what training calls."""
        z = self.encode_base(x) + self.encode_residual(x)
        return self.decode_base(z) + self.decode_residual(z)


def fit_patch_basis(
    patches: Float[Tensor, "n d"], latent_channels: int, whitening: float
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " d"], Float[Tensor, " c"]]:
    """Principal directions of image patches, with the gains that make them a latent.

    Args:
        patches: (N, 3*f*f) patches, pixels in [-1, 1].
        latent_channels: Directions c to keep.
        whitening: Exponent p in [0, 1] of the module's notation; 0 = unit variance everywhere, 1 = pixel metric.

    Returns:
        basis (c, 3*f*f) with orthonormal rows, mean (3*f*f,), gains (c,); the latents' mean variance is 1.

    Raises:
        ValueError: If a patch does not have that many directions.
    """
    if not 1 <= latent_channels <= patches.shape[1]:
        raise ValueError(f"latent_channels must lie in 1..{patches.shape[1]}, got {latent_channels}")
    mean = patches.mean(0)
    centred = (patches - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    order = torch.argsort(values, descending=True)[:latent_channels]
    std = values[order].clamp_min(1e-12).sqrt()
    gains = std ** (whitening - 1.0)
    gains = gains / ((gains * std) ** 2).mean().sqrt()
    return vectors[:, order].T.float(), mean, gains.float()
