"""How far a sample may go: its limit, the band that y shows, and where the spread lies; each with a planted defect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentindigo.texture import MAX_DEPARTURE, keep_coarse, keep_texture, uneven
from tolerances import assert_close

# --- no coefficient departs by more than so many standard deviations ------------------------------------------------


def check_departure(keep: Callable[..., Tensor]) -> None:
    """No coefficient of what is kept departs from the start by more than so many standard deviations."""
    start, spread = torch.randn(2, 4, 5, 6), torch.rand(2, 4, 5, 6)
    for size in (0.1, 10.0):
        z = start + size * torch.randn(start.shape)
        kept = keep(z, start, spread, 0.8) - start
        assert bool((kept.abs() <= 0.8 * MAX_DEPARTURE * spread + 1e-6).all())
        near = (z - start).abs() < spread
        assert_close(kept[near], 0.8 * (z - start)[near], torch.float32)
        assert_close(keep(z, start, None, 0.8) - start, 0.8 * (z - start), torch.float32)


def test_departures_are_limited() -> None:
    check_departure(keep_texture)


def test_an_unlimited_departure_is_found() -> None:
    with pytest.raises(AssertionError):
        check_departure(lambda z, start, spread, share: start + share * (z - start))


# --- the band that y shows keeps the estimate, the band above keeps the sample --------------------------------------


def wave(cycles: int, size: int = 64) -> Tensor:
    """A horizontal cosine, (1, 3, size, size), of so many cycles over the width."""
    x = (torch.arange(size) + 0.5) / size
    return (0.2 * torch.cos(2 * torch.pi * cycles * x)).expand(1, 3, size, size)


def check_coarse(keep: Callable[..., Tensor]) -> None:
    """A slow change goes with its share, a fast one stays; share 1 changes nothing. Four pixels to one of y's grid."""
    begin = torch.rand(1, 3, 64, 64)
    assert_close(keep(begin + wave(2), begin, 4, 1.0), begin + wave(2), torch.float32)
    inner = (..., slice(8, -8), slice(8, -8))
    for share in (0.0, 0.5):
        slow, fast = (keep(begin + wave(cycles), begin, 4, share) - begin for cycles in (2, 24))
        assert float((slow - share * wave(2))[inner].abs().max()) < 0.02
        assert float((fast - wave(24))[inner].abs().max()) < 0.02


def test_the_coarse_band_is_kept_by_a_share() -> None:
    check_coarse(keep_coarse)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, begin, factor, share: begin + share * (x - begin),
        lambda x, begin, factor, share: x,
        lambda x, begin, factor, share: x - (1 - share) * F.avg_pool2d(F.pad(x - begin, (1, 1, 1, 1)), 3, 1),
        lambda x, begin, factor, share: keep_coarse(x, begin, 2 * factor, share),
    ],
    ids=["all bands", "no band", "narrow window", "wrong grid"],
)
def test_the_wrong_band_is_found(wrong: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_coarse(wrong)
        check_edge(wrong)


def check_edge(keep: Callable[..., Tensor]) -> None:
    """Five cycles on a grid of 16 pixels are still seen there."""
    begin, inner = torch.rand(1, 3, 64, 64), (..., slice(8, -8), slice(8, -8))
    left = keep(begin + wave(5), begin, 4, 0.0) - begin
    assert float(left[inner].abs().mean()) < 0.5 * float(wave(5)[inner].abs().mean())


def test_the_band_reaches_as_far_as_the_grid() -> None:
    check_edge(keep_coarse)


def test_tiny_images_have_a_coarse_band_too() -> None:
    x, begin = torch.rand(1, 3, 1, 2), torch.rand(1, 3, 1, 2)
    assert bool(keep_coarse(x, begin, 4, 0.0).isfinite().all())


# --- the spread grows uneven and keeps its mean square --------------------------------------------------------------


def check_uneven(change: Callable[[Tensor], Tensor]) -> None:
    """Each image keeps its mean square and its ratios between channels; large places grow, small ones shrink."""
    spread = torch.rand(2, 4, 6, 5) + 0.05
    spread[1] *= 3
    changed = change(spread)
    assert_close(changed.square().mean((1, 2, 3)), spread.square().mean((1, 2, 3)), torch.float32)
    ratio = changed / spread
    assert_close(ratio, ratio[:, :1].expand_as(ratio), torch.float32)
    for before, factor in zip(spread.square().mean(1).flatten(1), ratio[:, 0].flatten(1), strict=True):
        assert bool((factor[before.argsort()].diff() > 0).all())


def test_the_spread_grows_uneven() -> None:
    check_uneven(uneven)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda spread: spread,
        lambda spread: spread * spread.square().mean(1, keepdim=True) ** 0.25,
        lambda spread: uneven(spread.flatten(0, 1)[None]).view_as(spread),
        lambda spread: torch.cat([uneven(spread[:, c : c + 1]) for c in range(spread.shape[1])], 1),
    ],
    ids=["unchanged", "another mean square", "over the batch", "by channel"],
)
def test_another_spread_is_found(wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_uneven(wrong)


def test_no_spread_stays_none() -> None:
    assert float(uneven(torch.zeros(1, 4, 3, 3)).abs().max()) == 0.0
