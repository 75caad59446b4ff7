"""Latent diffusion models of every family in miniature, as folders that a user would have: diffusers' own classes,
random weights, milliseconds per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from latentindigo.conditioning import Conditioning, PromptEmbeddings

__all__ = [
    "FAMILIES",
    "POOLED_WIDTH",
    "TOKEN_WIDTH",
    "Family",
    "build",
    "flux_transformer",
    "text_unet",
    "tiny_autoencoder",
    "tokens_for",
    "xl_unet",
]

TOKENS = 5
TOKEN_WIDTH, POOLED_WIDTH = 16, 12


@dataclass(frozen=True)
class Family:
    """How to build one family, and what is known about it.

    Attributes:
        folder: Name of the denoiser's folder in diffusers' layout.
        denoiser: Builds the denoiser.
        scheduler: Builds the scheduler.
        vae: Builds the autoencoder.
        pooled: Whether it is told a pooled embedding.
        tokens: Whether it is told a prompt at all.
    """

    folder: str
    denoiser: Callable[[], Any]
    scheduler: Callable[[], Any]
    vae: Callable[[], Any]
    pooled: bool = False
    tokens: bool = True


def autoencoder(shift: float | None = None, scale: float = 0.18215) -> AutoencoderKL:
    """A KL autoencoder of factor 4 with 4 channels."""
    kind: Any = AutoencoderKL  # Its signature says that there is one block.
    return kind(
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=scale,
        shift_factor=shift,
        sample_size=32,
    )


def tiny_autoencoder(channels: int = 4) -> AutoencoderTiny:
    """A cheap autoencoder of the same latents."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=channels,
    )


def dc_autoencoder() -> AutoencoderDC:
    """A deep-compression autoencoder of factor 4 with 8 channels."""
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.5,
    )


def plain_unet(channels: int = 4) -> UNet2DModel:
    """An unconditional U-Net."""
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def text_unet(**extra: Any) -> UNet2DConditionModel:
    """Stable Diffusion's U-Net."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=TOKEN_WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **extra,
    )


def xl_unet() -> UNet2DConditionModel:
    """SDXL's U-Net: told six numbers of 8 features and the pooled prompt."""
    return text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED_WIDTH,
    )


def sd3_transformer() -> SD3Transformer2DModel:
    """Stable Diffusion 3's transformer."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TOKEN_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=16,
    )


def flux_transformer(guidance: bool = True) -> FluxTransformer2DModel:
    """FLUX's transformer on packed latents."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TOKEN_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )


def ddim(
    kind: Literal["epsilon", "v_prediction"], spacing: Literal["leading", "trailing"] = "leading"
) -> DDIMScheduler:
    """Stable Diffusion's noise levels."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing=spacing,
    )


FAMILIES: dict[str, Family] = {
    "unconditional": Family("unet", plain_unet, lambda: ddim("epsilon"), autoencoder, tokens=False),
    "dc": Family("unet", lambda: plain_unet(8), lambda: ddim("epsilon"), dc_autoencoder, tokens=False),
    "sd15": Family("unet", text_unet, lambda: ddim("epsilon"), autoencoder),
    "sd21": Family("unet", text_unet, lambda: ddim("v_prediction", "trailing"), autoencoder),
    "sdxl": Family("unet", xl_unet, lambda: ddim("epsilon"), lambda: autoencoder(scale=0.13025), pooled=True),
    "sd3": Family(
        "transformer",
        sd3_transformer,
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        lambda: autoencoder(0.0609, 1.5305),
        pooled=True,
    ),
    "flux": Family(
        "transformer",
        flux_transformer,
        lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64),
        lambda: autoencoder(0.1159, 0.3611),
        pooled=True,
    ),
    "flux-schnell": Family(
        "transformer",
        lambda: flux_transformer(guidance=False),
        lambda: FlowMatchEulerDiscreteScheduler(shift=1.0),
        lambda: autoencoder(0.1159, 0.3611),
        pooled=True,
    ),
}


@torch.no_grad()
def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a model of a family to disk as its authors publish it.

    Args:
        name: A key of `FAMILIES`.
        folder: Where to.
        seed: Seed of the weights.

    Returns:
        The folder.
    """
    torch.manual_seed(seed)
    family = FAMILIES[name]
    denoiser, vae = family.denoiser(), family.vae()
    for network in (denoiser, vae):
        # Away from the initial zeros and ones, so that every weight matters.
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    denoiser.save_pretrained(folder / family.folder)
    vae.save_pretrained(folder / "vae")
    family.scheduler().save_pretrained(folder / "scheduler")
    return folder


def tokens_for(name: str, scale: float = 3.0, seed: int = 7, *, negative: bool = True) -> Conditioning | None:
    """Embeddings that stand for a prompt and a negative prompt; None for families without text."""
    family = FAMILIES[name]
    if not family.tokens:
        return None
    generator = torch.Generator().manual_seed(seed)

    def prompt() -> PromptEmbeddings:
        tokens = torch.randn(1, TOKENS, TOKEN_WIDTH, generator=generator)
        return PromptEmbeddings(tokens, torch.randn(1, POOLED_WIDTH, generator=generator) if family.pooled else None)

    return Conditioning(prompt(), prompt() if negative else None, scale)
