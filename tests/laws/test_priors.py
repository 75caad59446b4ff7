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

from families import FAMILIES, build, tokens_for
from latentindigo.backbones import Backbone, FluxTransformer, SDXLUNet
from latentindigo.conditioning import Conditioning
from latentindigo.guidance import GuidanceConfig, PixelINN, Regulariser
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


def check_stock_loop(name: str, prior: LatentPrior, told: Conditioning | None) -> None:
    """The unguided loop is the stock scheduler loop, bit for bit."""
    want = stock_loop(name, prior, told)
    assert want.isfinite().all()
    assert torch.equal(unguided(prior, 1.0), want)


def told_to(name: str, seed: int = 7) -> Conditioning | None:
    """FLUX.1-dev is told the scale and runs once; the others run negative and positive side by side."""
    return tokens_for(name, seed=seed, negative=name != "flux")


@pytest.mark.parametrize("name", NAMES)
def test_the_unguided_loop_is_the_stock_scheduler_loop(name: str, folders: Callable[[str], Path]) -> None:
    told = told_to(name)
    check_stock_loop(name, prior_of(folders(name), told), told)


def turned(self: FluxTransformer, network: Any, z: Tensor, *rest: Any) -> Tensor:
    """FLUX on a picture that lies on its side."""
    return RUN_FLUX(self, network, z.mT, *rest).mT


RUN_FLUX, TOKENS_OF, POOLED_OF, SIZES_OF = (
    FluxTransformer._run,
    Backbone._tokens,
    Backbone._pooled,
    SDXLUNet._added,
)
DEFECTS: dict[str, tuple[str, Any, str, Any]] = {
    "negative and positive exchanged": (
        "sd15", Backbone, "_tokens", staticmethod(lambda z, prompts: TOKENS_OF(z, prompts[::-1])),
    ),
    "pooled embeddings exchanged": (
        "sd3", Backbone, "_pooled", staticmethod(lambda z, prompts: POOLED_OF(z, prompts[::-1])),
    ),
    "height and width exchanged": (
        "sdxl", SDXLUNet, "_added", lambda self, z, prompts, canvas: SIZES_OF(self, z, prompts, canvas[::-1]),
    ),
    "positions of another picture": ("flux", FluxTransformer, "_run", turned),
    "the scheduler's uneven grid": ("flux-schnell", FluxTransformer, "even_grid", False),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_family_that_is_told_something_else_is_seen(
    defect: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, owner, attribute, replacement = DEFECTS[defect]
    told = told_to(name)
    prior = prior_of(folders(name), told)
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError):
        check_stock_loop(name, prior, told)


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


def check_own_pipeline(name: str, prior: LatentPrior, told: Conditioning, whole: bool) -> None:
    """The last ten of twenty even steps from a start image, or the pipeline's own ten steps from noise."""
    strength = 1.0 if whole else halfway(prior.scheduler)
    start, _ = start_and_noise()
    if prior.trajectory(STEPS, strength, latent_size=(HEIGHT, WIDTH)).pure_noise:
        start = torch.zeros_like(start)
    want = sampled(name, prior, told, start, STEPS if whole else 2 * STEPS, 1.0 if whole else 0.5)
    assert float((unguided(prior, strength) - want).abs().max()) <= CLOSE


def pipeline_case(name: str, folder: Path, whole: bool, seed: int = 7) -> tuple[LatentPrior, Conditioning]:
    told = told_to(name, seed)
    assert told is not None
    prior = prior_of(folder, told)
    if not whole and hasattr(prior.scheduler, "alphas_cumprod"):
        prior.scheduler.register_to_config(timestep_spacing="trailing")
    return prior, told


@pytest.mark.parametrize("whole", [False, True], ids=["from the start image", "from noise"])
@pytest.mark.parametrize("name", TEXT_NAMES)
def test_the_unguided_loop_equals_the_familys_own_pipeline(
    name: str, whole: bool, folders: Callable[[str], Path]
) -> None:
    check_own_pipeline(name, *pipeline_case(name, folders(name), whole), whole)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_another_prompt_is_seen_to_differ(name: str, folders: Callable[[str], Path]) -> None:
    prior, _ = pipeline_case(name, folders(name), False)
    _, other = pipeline_case(name, folders(name), False, seed=8)
    with pytest.raises(AssertionError):
        check_own_pipeline(name, prior, other, False)


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
        self.data: PixelINN | None = None
        self.loss, spy = PixelINN.loss, self

        def watched(data: PixelINN, z0: Tensor) -> Tensor:
            spy.data = data
            loss = spy.loss(data, z0)
            spy.before.append(float(loss.detach().sum()))
            return loss

        monkeypatch.setattr(PixelINN, "loss", watched)

    def __call__(self, pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> None:
        assert self.data is not None
        with torch.no_grad():
            self.after.append(float(self.loss(self.data, tensors["z0"]).sum()))


def check_data_term_falls(spy: Spy) -> None:
    """In each of the steps the guided estimate agrees better with the measurement than the one it replaced."""
    assert len(spy.before) == len(spy.after) == STEPS
    assert all(after < before for before, after in zip(spy.before, spy.after, strict=True))


def check_same_picture(pipe: RestorationPipeline, other: RestorationPipeline) -> None:
    """Two pipelines give the same picture."""
    # Loaded weights may lie elsewhere in memory, which can move the last bit of a sum.
    first, second = (p(photo(), **SETTINGS, steps=2).images[0] for p in (pipe, other))
    assert_close(first, second)


# A step that is small enough for random networks; they are nothing like the flat landscape of trained ones.
SETTINGS: dict[str, Any] = {
    "scale": 4,
    "output_type": "pt",
    "update": "stopped",
    "guidance": GuidanceConfig(zeta=0.02),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_restoration_is_guided_and_survives_saving(
    name: str, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = loaded(folders(name), name)
    spy = Spy(monkeypatch)
    result = pipe(photo(), **SETTINGS, steps=STEPS, callback_on_step_end=spy)
    assert result.settings["method"] == "pixel-inn"
    assert result.images[0].shape == (3, 32, 32)
    assert result.images[0].isfinite().all()
    assert result.images[0].std() > 0.01
    check_data_term_falls(spy)

    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["denoiser"] == ["diffusers", type(pipe.denoiser).__name__]
    again = RestorationPipeline.from_pretrained(tmp_path)
    again.conditioning = pipe.conditioning
    assert again.weights_hash() == pipe.weights_hash()
    check_same_picture(pipe, again)


def test_guidance_that_climbs_and_another_prompt_are_seen(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = loaded(folders("sd15"), "sd15")
    other = loaded(folders("sd15"), "sd15")
    other.conditioning = tokens_for("sd15", seed=8)
    with pytest.raises(AssertionError):
        check_same_picture(pipe, other)
    descent = PixelINN.descent
    monkeypatch.setattr(PixelINN, "descent", lambda data, z0, gain: -descent(data, z0, gain))
    spy = Spy(monkeypatch)
    pipe(photo(), **SETTINGS, steps=STEPS, callback_on_step_end=spy)
    with pytest.raises(AssertionError):
        check_data_term_falls(spy)
