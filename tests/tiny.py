"""A complete model in miniature: every part of the real one, random weights away from zero, milliseconds per step."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DModel

from latentindigo.autoencoder import PatchAutoencoder
from latentindigo.inn import DegradationEncoder, Estimator, InvertibleNet
from latentindigo.pipeline import RestorationPipeline
from tolerances import randomise_

__all__ = ["LATENT_CHANNELS", "tiny_pipeline"]

LATENT_CHANNELS = 4
GAMMA_DIM = 8


def tiny_pipeline(seed: int = 0) -> RestorationPipeline:
    """Build a pipeline of tiny networks.

    Args:
        seed: Seed of the weights.

    Returns:
        The pipeline, on the CPU in float32.
    """
    vae = PatchAutoencoder(
        latent_channels=LATENT_CHANNELS,
        encoder_channels=(8, 8),
        decoder_channels=(8, 8, 8),
        decoder_blocks=(1, 1, 1),
    )
    denoiser = UNet2DModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    networks = {
        "vae": vae,
        "denoiser": denoiser,
        "estimator": Estimator(width=8, blocks=1, gamma_dim=GAMMA_DIM),
        "degradation_encoder": DegradationEncoder(gamma_dim=GAMMA_DIM, width=4),
        "pixel_inn": InvertibleNet(gamma_dim=GAMMA_DIM, hidden=4, blocks=1, num_steps=1),
        "latent_inn": InvertibleNet(
            channels=LATENT_CHANNELS,
            gamma_dim=GAMMA_DIM,
            hidden=4,
            blocks=1,
            num_steps=1,
            offset=0.0,
            mix=True,
            gain=True,
            spread=True,
        ),
    }
    for index, network in enumerate(networks.values()):
        # Small enough that a stack of random layers keeps pixels near [0, 1], large enough that every part matters.
        randomise_(network, seed + index, scale=0.5)
    # A random matrix may be nearly singular; a rotation with gains is as invertible as a trained mix.
    mix = networks["latent_inn"].band_mix.matrix
    mix.data = torch.linalg.qr(mix.detach()).Q * torch.linspace(0.7, 1.4, len(mix))
    return RestorationPipeline(scheduler=scheduler, **networks)
