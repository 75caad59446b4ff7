"""Laws of guidance on tiles: with tiles that see far enough it is the guidance of the whole image, in every rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from guidance_cases import KINDS, make_data, make_inn, ones
from latentindigo.guidance import DataTerm, GuidanceConfig, LearnedForward
from latentindigo.tiled_guidance import TiledData, simulate
from latentindigo.tiling import Tiles, TilingConfig
from toys import randn

REACH = 36  # Two levels of one lifting step look this far in the latent, forth and back.


def latent() -> Tensor:
    return 0.5 * randn(2, 12, 8, 192, seed=5, dtype=torch.float64)


def tiles_of(z0: Tensor, reach: int = REACH) -> Tiles:
    return Tiles(z0.shape[-2:], TilingConfig(tile=108, overlap=REACH), 2, reach=reach)


def case(name: str, z0: Tensor, **config: Any) -> tuple[DataTerm, TiledData]:
    data = make_data(name, z0, levels=1, steps=1, config=GuidanceConfig(**config))
    return data, TiledData(data, tiles_of(z0), 1)


def check_close(found: Tensor, wanted: Tensor) -> None:
    scale = float(wanted.abs().max())
    assert scale > 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("name", KINDS)
def test_every_correction_is_that_of_the_whole_image(name: str) -> None:
    z0 = latent()
    whole, tiled = case(name, z0)
    assert len(tiled.tiles) > 2
    gain = 0.7 * ones(z0)
    check_close(tiled.loss(z0), whole.loss(z0))
    check_close(tiled.projection(z0, gain), whole.projection(z0, gain))
    check_close(tiled.descent(z0, gain), whole.descent(z0, gain))


@pytest.mark.parametrize("name", KINDS)
def test_through_the_denoiser_too(name: str) -> None:
    z0 = latent()
    whole, tiled = case(name, z0)
    trajectory = whole.prior.trajectory(4, 0.6)
    z_t = trajectory.noise(z0, randn(*z0.shape, seed=8, dtype=z0.dtype)).requires_grad_()

    def predict(part: Tensor) -> Tensor:
        return trajectory.predict(part, 0).z0

    wanted = whole.descent_through(predict(z_t), z_t, ones(z0))
    check_close(tiled.descent_through(predict(z_t).detach(), z_t.detach(), ones(z0), predict), wanted)
    with pytest.raises(ValueError, match="predict"):
        tiled.descent_through(z0, z_t, ones(z0))


@pytest.mark.parametrize("name", KINDS)
def test_refinement_learns_from_all_tiles_at_once(name: str) -> None:
    z0 = latent()
    whole, _ = case(name, z0, refine=True)
    learned: list[Tensor] = []
    channels = 3 if name == "pixel" else z0.shape[1]
    for tiled in (False, True):
        model: Any = whole.forward_model
        term = copy.copy(whole)
        term.forward_model = LearnedForward(make_inn(channels, steps=1), model.gamma, 1, refine_lr=1e-2)
        (TiledData(term, tiles_of(z0), 1) if tiled else term).refine(z0)
        learned.append(torch.cat([p.flatten() for net in term.forward_model._private for p in net.parameters()]))
    before = torch.cat([p.flatten() for p in make_inn(channels, steps=1).parameters()])
    assert (learned[0][: len(before)] - before).abs().max() > 5e-3
    # Adam divides by the root of the square: where a gradient is next to nothing, rounding decides its sign.
    assert (learned[0] - learned[1]).abs().mean() < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_coarse_parts_agree(name: str) -> None:
    z0 = latent()
    data, _ = case(name, z0)
    fine = data.prior.downsampling if name == "pixel" else 1
    u = data.open(z0)
    check_close(simulate(data.forward_model, u, tiles_of(z0), fine, 2, z0), data.forward_model.split(u)[0])


@pytest.mark.parametrize("name", KINDS)
def test_calls_count_as_for_one_image(name: str) -> None:
    z0 = latent()
    counts = []
    for tiled in (False, True):
        whole, parts = case(name, z0)
        data = parts if tiled else whole
        data.projection(z0, ones(z0))
        counts.append(copy.copy(data.prior.calls))
    assert counts[0] == counts[1]


def test_tiles_that_cut_the_reach_are_seen() -> None:
    z0 = latent()
    whole, _ = case("latent", z0)
    short = TiledData(whole, Tiles(z0.shape[-2:], TilingConfig(tile=40, overlap=2), 2), 1)
    with pytest.raises(AssertionError):
        check_close(short.projection(z0, ones(z0)), whole.projection(z0, ones(z0)))


class LocalNorms(TiledData):
    """Defect: every tile divides by its own norm."""

    def _norms(self, z0: Tensor) -> list[tuple[float, Tensor]]:
        return [(w, n / len(self.tiles)) for w, n in super()._norms(z0)]


def test_norms_of_tiles_are_not_the_norm_of_the_image() -> None:
    z0 = latent()
    whole, _ = case("latent", z0)
    with pytest.raises(AssertionError):
        check_close(LocalNorms(whole, tiles_of(z0), 1).descent(z0, ones(z0)), whole.descent(z0, ones(z0)))
