"""Laws of every family of latent diffusion models, on tiny checkpoints of the real classes, loaded as a user would."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from families import FAMILIES, autoencoder, build, tiny_autoencoder, tokens_for
from latentindigo.conditioning import Conditioning
from latentindigo.guidance import DataTerm, GuidanceConfig, PixelINN, Regulariser
from latentindigo.loading import PriorParts, load_prior
from latentindigo.pipeline import RestorationPipeline
from latentindigo.prior import LatentPrior
from latentindigo.sampler import restore_latent
from tolerances import assert_close

NAMES = tuple(FAMILIES)
TEXT_NAMES = tuple(name for name, family in FAMILIES.items() if family.tokens)
STEPS = 10
HEIGHT, WIDTH = 8, 12  # Of latents; not square, so that swapped sides show.
CLOSE = 1e-4  # Of latents of size 1, after ten steps: what the bar for agreement with diffusers' pipelines is.


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a family, written once."""
    root, written = tmp_path_factory.mktemp("families"), {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = build(name, root / name)
        return written[name]

    return folder


@cache
def parts_of(folder: Path) -> PriorParts:
    return load_prior(folder)


def prior_of(folder: Path, conditioning: Conditioning | None = None) -> LatentPrior:
    parts = parts_of(folder)
    return LatentPrior(parts.vae, parts.denoiser, parts.scheduler, conditioning=conditioning)


def start_and_noise(channels: int = 4, seed: int = 3) -> tuple[Tensor, Tensor]:
    """A clean latent, and the noise that a generator of this seed draws."""
    shape = (1, channels, HEIGHT, WIDTH)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)), noise


@torch.no_grad()
def unguided(prior: LatentPrior, strength: float, seed: int = 3, steps: int = STEPS) -> Tensor:
    """Our loop, without guidance."""
    start, _ = start_and_noise(prior.latent_channels, seed)
    trajectory = prior.trajectory(steps, strength, latent_size=(HEIGHT, WIDTH))
    generator = torch.Generator().manual_seed(seed)
    return restore_latent(trajectory, start, None, "projection", Regulariser(0.0, prior), [generator])


# --- the stock loop, by hand ----------------------------------------------------------------------------------------


def mu_of(scheduler: Any) -> float:
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return (HEIGHT // 2) * (WIDTH // 2) * slope + config.base_shift - slope * config.base_image_seq_len


def by_hand(name: str, network: Any, z: Tensor, t: Tensor, told: Conditioning | None) -> Tensor:
    """The network call as that family's own pipeline writes it."""
    if told is None:
        return network(z, t).sample
    prompts = [p for p in (told.negative, told.positive) if p is not None]
    tokens = torch.cat([p.tokens for p in prompts])
    pooled = torch.cat([p.pooled for p in prompts if p.pooled is not None]) if FAMILIES[name].pooled else None
    batch = torch.cat([z] * len(prompts))
    times = t.expand(len(batch))
    if name in ("sd15", "sd21"):
        output = network(batch, t, encoder_hidden_states=tokens).sample
    elif name == "sdxl":
        sizes = torch.tensor([[4.0 * HEIGHT, 4.0 * WIDTH, 0, 0, 4.0 * HEIGHT, 4.0 * WIDTH]]).repeat(len(batch), 1)
        added = {"text_embeds": pooled, "time_ids": sizes}
        output = network(batch, t, encoder_hidden_states=tokens, added_cond_kwargs=added).sample
    elif name == "sd3":
        output = network(
            hidden_states=batch, timestep=times, encoder_hidden_states=tokens, pooled_projections=pooled
        ).sample
    else:
        pipe = diffusers.FluxImg2ImgPipeline
        packed = pipe._pack_latents(batch, len(batch), 4, HEIGHT, WIDTH)
        output = network(
            hidden_states=packed,
            timestep=times / 1000,
            guidance=torch.full((len(batch),), told.guidance_scale) if network.config.guidance_embeds else None,
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(1, HEIGHT // 2, WIDTH // 2, z.device, z.dtype),
        ).sample
        output = pipe._unpack_latents(output, 4 * HEIGHT, 4 * WIDTH, 4)
    if len(prompts) == 1:
        return output
    negative, positive = output.chunk(2)
    return negative + told.guidance_scale * (positive - negative)


@torch.no_grad()
def stock_loop(name: str, prior: LatentPrior, told: Conditioning | None) -> Tensor:
    """Ten steps of the family's scheduler on its full grid, without any of our code."""
    scheduler = copy.deepcopy(prior.scheduler)
    if name.startswith("flux"):
        sigmas = np.linspace(1.0, 1 / STEPS, STEPS)
        shift = {"mu": mu_of(scheduler)} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(sigmas=sigmas, **shift)
    else:
        scheduler.set_timesteps(STEPS)
    start, noise = start_and_noise(prior.latent_channels)
    if hasattr(scheduler, "alphas_cumprod"):
        alpha_bar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[0])])
        clean = start if math.sqrt(1 - alpha_bar) < 0.99 else torch.zeros_like(start)
        z = math.sqrt(alpha_bar) * clean + math.sqrt(1 - alpha_bar) * noise
    else:
        z = noise
    for t in scheduler.timesteps:
        z = scheduler.step(by_hand(name, prior.denoiser, z, t, told), t, z, return_dict=False)[0]
    return z


@pytest.mark.parametrize("name", NAMES)
def test_the_unguided_loop_is_the_stock_scheduler_loop_bit_for_bit(name: str, folders: Callable[[str], Path]) -> None:
    # FLUX.1-dev is told the scale and runs once; the others run negative and positive side by side.
    told = tokens_for(name, negative=name != "flux")
    prior = prior_of(folders(name), told)
    want = stock_loop(name, prior, told)
    assert torch.equal(unguided(prior, 1.0), want)
    assert want.isfinite().all()


# --- diffusers' own pipelines ---------------------------------------------------------------------------------------


def img2img(name: str, prior: LatentPrior) -> Any:
    """The family's own image-to-image pipeline, without text encoders."""
    vae, denoiser, scheduler = prior.vae, prior.denoiser, copy.deepcopy(prior.scheduler)
    text: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    if name in ("sd15", "sd21"):
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionImg2ImgPipeline(vae=vae, unet=denoiser, scheduler=scheduler, **text, **rest)
    else:
        text |= {"text_encoder_2": None, "tokenizer_2": None}
        if name == "sdxl":
            pipe = diffusers.StableDiffusionXLImg2ImgPipeline(vae=vae, unet=denoiser, scheduler=scheduler, **text)
        elif name == "sd3":
            text |= {"text_encoder_3": None, "tokenizer_3": None}
            pipe = diffusers.StableDiffusion3Img2ImgPipeline(vae=vae, transformer=denoiser, scheduler=scheduler, **text)
        else:
            pipe = diffusers.FluxImg2ImgPipeline(vae=vae, transformer=denoiser, scheduler=scheduler, **text)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(name: str, prior: LatentPrior, told: Conditioning, start: Tensor, steps: int, strength: float) -> Tensor:
    """What that pipeline makes of the same start and noise, as latents."""
    keywords: dict[str, Any] = {"prompt_embeds": told.positive.tokens}
    if told.negative is not None:
        keywords["negative_prompt_embeds"] = told.negative.tokens
    if FAMILIES[name].pooled:
        keywords["pooled_prompt_embeds"] = told.positive.pooled
        if told.negative is not None:
            keywords["negative_pooled_prompt_embeds"] = told.negative.pooled
    if name == "flux-schnell":
        keywords["true_cfg_scale"] = told.guidance_scale
    if name not in ("sd15", "sd21", "sdxl"):
        keywords |= {"height": 4 * HEIGHT, "width": 4 * WIDTH}
    if name == "sd3" and strength < 1:
        # By default it walks the scheduler's grid, whose steps are uneven towards the end.
        keywords["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    latent = img2img(name, prior)(
        image=start,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=told.guidance_scale,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **keywords,
    ).images
    if name.startswith("flux"):
        return diffusers.FluxImg2ImgPipeline._unpack_latents(latent, 4 * HEIGHT, 4 * WIDTH, 4)
    return latent


def halfway(scheduler: Any) -> float:
    """Strength at the middle of a grid of even steps, where the pipelines' "strength 0.5" starts."""
    if hasattr(scheduler, "alphas_cumprod"):
        return float((1 - scheduler.alphas_cumprod[499]).sqrt())
    shift = math.exp(mu_of(scheduler)) if scheduler.config.use_dynamic_shifting else scheduler.config.shift
    sigma = shift * 0.5 / (1 + (shift - 1) * 0.5)
    return sigma / math.hypot(1 - sigma, sigma)


@pytest.mark.parametrize("whole", [False, True], ids=["from the start image", "from noise"])
@pytest.mark.parametrize("name", TEXT_NAMES)
def test_the_unguided_loop_equals_the_familys_own_pipeline(
    name: str, whole: bool, folders: Callable[[str], Path]
) -> None:
    """The last ten of twenty even steps from a start image, or the pipeline's own ten steps from noise."""
    told = tokens_for(name, negative=name != "flux")
    assert told is not None
    prior = prior_of(folders(name), told)
    if not whole and hasattr(prior.scheduler, "alphas_cumprod"):
        prior.scheduler.register_to_config(timestep_spacing="trailing")
    strength = 1.0 if whole else halfway(prior.scheduler)
    start, _ = start_and_noise()
    if prior.trajectory(STEPS, strength, latent_size=(HEIGHT, WIDTH)).pure_noise:
        start = torch.zeros_like(start)
    want = sampled(name, prior, told, start, STEPS if whole else 2 * STEPS, 1.0 if whole else 0.5)
    got = unguided(prior, strength)
    assert float((got - want).abs().max()) <= CLOSE
    # What it is told matters to what was compared.
    other = prior_of(folders(name), tokens_for(name, seed=8, negative=name != "flux"))
    other.scheduler.register_to_config(**prior.scheduler.config)
    assert float((unguided(other, strength) - got).abs().max()) > 10 * CLOSE


# --- restoring ------------------------------------------------------------------------------------------------------


def photo(side: int = 8) -> Tensor:
    """A small picture with an edge, a ramp and some grain."""
    ramp = torch.linspace(0.2, 0.8, side).expand(3, side, side).clone()
    ramp[:, side // 2 :, : side // 3] = 0.9
    grain = 0.05 * torch.randn(ramp.shape, generator=torch.Generator().manual_seed(0))
    return (ramp + grain).clamp(0, 1)[None]


def loaded(folder: Path, name: str, **keywords: Any) -> RestorationPipeline:
    pipe = RestorationPipeline.from_pretrained("embedded", prior=folder, **keywords)
    pipe.conditioning = tokens_for(name)
    return pipe


class Spy:
    """Records the loss of the estimate that guidance was given, and of the one that took its place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: list[float] = []
        self.after: list[float] = []
        self.data: DataTerm | None = None
        descent, spy = PixelINN.descent, self

        def watched(data: PixelINN, z0: Tensor, gain: Tensor) -> Tensor:
            spy.data = data
            with torch.no_grad():
                spy.before.append(float(data.loss(z0).sum()))
            return descent(data, z0, gain)

        monkeypatch.setattr(PixelINN, "descent", watched)

    def __call__(self, pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> None:
        assert self.data is not None
        with torch.no_grad():
            self.after.append(float(self.data.loss(tensors["z0"]).sum()))


@pytest.mark.parametrize("name", NAMES)
def test_a_restoration_is_guided_and_survives_saving(
    name: str, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = loaded(folders(name), name)
    # A step that is small enough for random networks; they are nothing like the flat landscape of trained ones.
    guidance = GuidanceConfig(zeta=0.02)
    settings: dict[str, Any] = {"scale": 4, "output_type": "pt", "update": "stopped", "guidance": guidance}
    spy = Spy(monkeypatch)
    result = pipe(photo(), **settings, steps=STEPS, callback_on_step_end=spy)
    assert result.settings["method"] == "pixel-inn"
    assert result.images[0].shape == (3, 32, 32)
    assert result.images[0].isfinite().all()
    assert result.images[0].std() > 0.01
    assert len(spy.before) == len(spy.after) == STEPS
    assert all(after < before for before, after in zip(spy.before, spy.after, strict=True))

    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["denoiser"] == ["diffusers", type(pipe.denoiser).__name__]
    again = RestorationPipeline.from_pretrained(tmp_path)
    again.conditioning = pipe.conditioning
    assert again.weights_hash() == pipe.weights_hash()
    settings["steps"] = 2
    # Loaded weights may lie elsewhere in memory, which can move the last bit of a sum.
    assert_close(again(photo(), **settings).images[0], pipe(photo(), **settings).images[0])
