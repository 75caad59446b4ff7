"""The picture of an estimate while sampling goes on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from latentindigo.pipeline import RestorationPipeline
from latentindigo.preview import preview
from toys import LinearVAE, gaussian_prior, randn


@pytest.fixture(scope="module")
def embedded() -> RestorationPipeline:
    """The model in the package: only trained weights have a linear branch that shows something."""
    return RestorationPipeline.from_pretrained()


def check_likeness(shown: torch.Tensor, full: torch.Tensor) -> None:
    """Raise AssertionError unless a preview shows what the full decoder shows."""
    small = F.interpolate(full[None], size=shown.shape[-2:], mode="area")[0]
    alike = torch.corrcoef(torch.stack([shown.flatten(), small.flatten()]))[0, 1]
    assert alike > 0.98, f"the preview is no picture of the estimate: correlation {alike:.3f}"


def picture(height: int, width: int) -> torch.Tensor:
    """Coloured ramps and a disc, (1, 3, H, W)."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.05).float()
    return torch.stack([x, y, disc])[None]


@pytest.mark.parametrize("side", [32, 512])
def test_it_shows_the_estimate_of_the_embedded_model(embedded: RestorationPipeline, side: int) -> None:
    """And cuts off the padding of the canvas to the right and below."""
    with torch.no_grad():
        z0 = embedded.prior.encode(picture(64, 96))
        shown = preview(embedded.prior, z0, (90, 50), side)
        full = embedded.prior.decode(z0)[0, :, :50, :90]
    assert shown.shape == ((3, 50, 90) if side == 512 else (3, 18, 32))
    assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
    check_likeness(shown, full)
    with pytest.raises(AssertionError, match="no picture"):
        check_likeness(shown.flip(-1), full)


def test_other_autoencoders_decode_few_cells() -> None:
    """A latent of 64 x 96 cells is averaged to 32 x 48 before it is decoded."""
    prior = gaussian_prior(DDIMScheduler(prediction_type="epsilon", clip_sample=False), vae=LinearVAE())
    x = picture(128, 192)
    sizes: list[tuple[int, ...]] = []
    decode = prior.vae.decode
    prior.vae.decode = lambda z: (sizes.append(tuple(z.shape[-2:])), decode(z))[1]
    shown = preview(prior, prior.encode(x), (192, 128), side=96)
    assert sizes == [(32, 48)]
    assert shown.shape == (3, 64, 96)
    check_likeness(shown, x[0])


def test_the_smaller_canvas_of_an_earlier_pass_is_shown_whole() -> None:
    prior = gaussian_prior(DDIMScheduler(prediction_type="epsilon", clip_sample=False), vae=LinearVAE())
    shown = preview(prior, randn(2, 12, 8, 16), (128, 64))
    assert shown.shape == (3, 16, 32)
