"""What each family of denoisers says about itself, and how it is told a prompt."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, POOLED_WIDTH, TOKEN_WIDTH, build, flux_transformer, text_unet, tokens_for, xl_unet
from latentindigo.backbones import Backbone, Capabilities, backbone_of
from latentindigo.conditioning import Conditioning, PromptEmbeddings
from latentindigo.loading import load_prior
from latentindigo.prior import LatentPrior
from latentindigo.tiling import TilingConfig

CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
TOLD: dict[str, Any] = {"token_width": TOKEN_WIDTH}
POOLED: dict[str, Any] = {**TOLD, "pooled_width": POOLED_WIDTH}
TABLE = {
    "unconditional": Capabilities("unconditional", "epsilon", 4, 4, 8),
    "dc": Capabilities("unconditional", "epsilon", 8, 4, 8),
    "sd15": Capabilities("stable-diffusion", "epsilon", 4, 4, 8, (CLIP,), **TOLD),
    "sd21": Capabilities("stable-diffusion", "v_prediction", 4, 4, 8, (CLIP,), **TOLD),
    "sdxl": Capabilities("sdxl", "epsilon", 4, 4, 8, (CLIP, PROJECTED), **POOLED),
    "sd3": Capabilities("stable-diffusion-3", "flow_prediction", 4, 4, 8, (PROJECTED, PROJECTED, T5), **POOLED),
    "flux": Capabilities("flux", "flow_prediction", 4, 4, 8, (CLIP, T5), **POOLED, distilled_guidance=True),
    "flux-schnell": Capabilities("flux", "flow_prediction", 4, 4, 8, (CLIP, T5), **POOLED),
}


def denoiser(name: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[name].denoiser().eval()


def evaluate(network: Any, z: Tensor, told: Conditioning | None, t: float = 500.0) -> Tensor:
    with torch.no_grad():
        return backbone_of(network).evaluate(
            network, z, torch.full((len(z),), t), told, (4 * z.shape[2], 4 * z.shape[3])
        )


@pytest.mark.parametrize("name", TABLE)
def test_capabilities_are_data(name: str, tmp_path: Path) -> None:
    parts = load_prior(build(name, tmp_path))
    assert parts.capabilities == TABLE[name]
    # What is claimed holds: the network runs on the smallest canvas of that multiple, and not on half of it.
    prior = LatentPrior(parts.vae, parts.denoiser, parts.scheduler, conditioning=tokens_for(name))
    side = prior.size_multiple // prior.downsampling
    trajectory = prior.trajectory(2, 0.5, latent_size=(side, side))
    z = torch.randn(1, prior.latent_channels, side, side)
    with torch.no_grad():
        assert trajectory.predict(z, 0).z0.shape == z.shape
    with pytest.raises(ValueError, match="expected latent sides that are multiples of 2, got 1x1"):
        trajectory.predict(z[..., :1, :1], 0)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux-schnell"])
def test_guidance_without_a_classifier(name: str) -> None:
    """One batched pass equals the two passes of the definition, and images do not see each other."""
    network, told = denoiser(name), tokens_for(name, scale=4.0)
    assert told is not None
    assert told.negative is not None
    z = torch.randn(2, 4, 8, 8)
    positive = evaluate(network, z, Conditioning(told.positive))
    negative = evaluate(network, z, Conditioning(told.negative))
    got = evaluate(network, z, told)
    torch.testing.assert_close(got, negative + 4.0 * (positive - negative), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(evaluate(network, z[1:], told), got[1:], atol=1e-5, rtol=1e-5)
    assert float((got - positive).abs().max()) > 1e-3
    # Prompts of different lengths cannot share a batch.
    short = PromptEmbeddings(told.negative.tokens[:, :3], told.negative.pooled)
    longer = evaluate(network, z, Conditioning(told.positive, short, 4.0))
    negative = evaluate(network, z, Conditioning(short))
    torch.testing.assert_close(longer, negative + 4.0 * (positive - negative), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_the_pooled_embedding_matters(name: str) -> None:
    network, told = denoiser(name), tokens_for(name, negative=False)
    assert told is not None
    assert told.positive.pooled is not None
    other = Conditioning(PromptEmbeddings(told.positive.tokens, -told.positive.pooled), None, told.guidance_scale)
    z = torch.randn(1, 4, 8, 8)
    assert float((evaluate(network, z, told) - evaluate(network, z, other)).abs().max()) > 1e-4


def test_distilled_networks_take_the_scale_as_an_input_and_run_once() -> None:
    told = tokens_for("flux", scale=3.5)
    assert told is not None
    z, sizes = torch.randn(1, 4, 8, 8), []
    network = flux_transformer(guidance=True).eval()
    network.register_forward_hook(lambda _, __, output: sizes.append(len(output.sample)))
    first = evaluate(network, z, told)
    assert sizes == [1]
    assert not torch.equal(first, evaluate(network, z, Conditioning(told.positive, told.negative, 7.0)))


def test_lcm_is_told_the_scale_as_diffusers_tells_it() -> None:
    network = text_unet(time_cond_proj_dim=8).eval()
    told = tokens_for("sd15", scale=5.0)
    assert told is not None
    z = torch.randn(2, 4, 8, 8)
    pipe: Any = diffusers.LatentConsistencyModelPipeline
    scale = pipe.get_guidance_scale_embedding(None, torch.tensor([4.0, 4.0]), embedding_dim=8)
    with torch.no_grad():
        want = network(
            z,
            torch.tensor(500.0),
            encoder_hidden_states=told.positive.tokens.expand(2, -1, -1),
            timestep_cond=scale,
        ).sample
    assert torch.equal(evaluate(network, z, told), want)
    assert not torch.equal(evaluate(network, z, Conditioning(told.positive, None, 1.0)), want)


def test_a_tile_is_told_the_size_of_the_whole() -> None:
    network, told = denoiser("sdxl"), tokens_for("sdxl", negative=False)
    backbone, z, t = backbone_of(network), torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        small, large = (backbone.evaluate(network, z, t, told, size) for size in ((32, 32), (32, 64)))
    assert float((small - large).abs().max()) > 1e-5


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_large_pictures_go_in_tiles(name: str, tmp_path: Path) -> None:
    parts = load_prior(build(name, tmp_path))
    prior = LatentPrior(parts.vae, parts.denoiser, parts.scheduler, conditioning=tokens_for(name))
    tiled = prior.tiled(TilingConfig(tile=64, overlap=16))
    z = torch.randn(1, 4, 36, 12)
    trajectory = tiled.trajectory(2, 0.5, latent_size=(36, 12))
    with torch.no_grad():
        z0 = trajectory.predict(z, 0).z0
    assert z0.shape == z.shape
    assert z0.isfinite().all()
    # A transformer sees one tile's tokens at a time, and its time shift is that of a tile.
    alone = prior.trajectory(2, 0.5, latent_size=(16, 12))
    assert torch.equal(trajectory.timesteps, alone.timesteps)
    if name == "flux":
        larger = prior.trajectory(2, latent_size=(36, 12)).timesteps
        assert larger[1] > prior.trajectory(2, latent_size=(16, 12)).timesteps[1]
    if name == "sd3":
        with torch.no_grad(), pytest.raises(ValueError, match=r"latent sides of at most 32.*got 36x12.*--tile"):
            prior.trajectory(2, 0.5).predict(z, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_half_precision_stays_near(name: str, dtype: torch.dtype) -> None:
    network, told = denoiser(name), tokens_for(name, scale=2.0)
    z = torch.randn(1, 4, 8, 8)
    want = evaluate(network, z, told)
    half: Any = network.to(dtype)
    got = evaluate(half, z.to(dtype), told).float()
    assert float((got - want).square().mean().sqrt()) < 0.05 * float(want.std())


# --- what is refused ------------------------------------------------------------------------------------------------


def test_embeddings_of_another_model_are_refused() -> None:
    backbone = backbone_of(xl_unet())
    wide = PromptEmbeddings(torch.zeros(1, 5, 768), torch.zeros(1, POOLED_WIDTH))
    with pytest.raises(ValueError, match="expected token embeddings of width 16 for this sdxl denoiser, got 768"):
        backbone.check(Conditioning(wide))
    bare = PromptEmbeddings(torch.zeros(1, 5, TOKEN_WIDTH))
    good = PromptEmbeddings(torch.zeros(1, 5, TOKEN_WIDTH), torch.zeros(1, POOLED_WIDTH))
    with pytest.raises(ValueError, match="expected a pooled embedding of width 12 for this sdxl denoiser, got None"):
        backbone.check(Conditioning(good, bare))
    backbone.check(Conditioning(good))
    with pytest.raises(ValueError, match="expected no conditioning for a denoiser of the unconditional family"):
        Backbone().check(Conditioning(good))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: text_unet(class_embed_type="timestep"), "wants class labels"),
        (lambda: text_unet(encoder_hid_dim=8, encoder_hid_dim_type="text_proj"), "like Stable Diffusion's or SDXL's"),
    ],
)
def test_networks_that_want_more_than_a_prompt_are_refused(network: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone_of(network())


def test_a_networks_of_ones_own_keeps_to_the_plain_contract() -> None:
    class Own(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=z * t.view(-1, 1, 1, 1))

    z = torch.randn(2, 4, 3, 5)
    assert torch.equal(evaluate(Own(), z, None, 2.0), 2 * z)


# --- the page about it ----------------------------------------------------------------------------------------------


def test_the_table_of_families_is_true(root: Path) -> None:
    """Each row: family, class, text encoders, pooled, what it predicts."""
    text = (root / "docs" / "priors.md").read_text()
    rows = {
        cells[0].strip("`"): cells
        for cells in ([c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if "| `" in line)
        if len(cells) == 5
    }
    for name, capabilities in TABLE.items():
        cells = rows[capabilities.family]
        assert type(denoiser(name)).__name__ in cells[1]
        assert tuple(re.findall(r"`(\w+)`", cells[2])) == capabilities.text_encoders, name
        assert cells[3] == ("yes" if capabilities.pooled_width else "no"), name
        assert capabilities.prediction_type in cells[4], name
    assert set(rows) == {c.family for c in TABLE.values()}
