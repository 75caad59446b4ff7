"""Laws of tiling: plans cover evenly, windows sum to one, and what tiles compute is what the whole image would give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from latentindigo import tiling
from latentindigo.tiling import TilingConfig, blend_windows, plan_tiles, tiled_map
from tolerances import assert_close

Plan = Callable[..., list[tuple[int, int]]]
Windows = Callable[..., list[Tensor]]
Tiled = Callable[..., Tensor]
RAMPS: tuple[tiling.Ramp, ...] = ("cosine", "linear")

few = settings(max_examples=20, deadline=None)
sizes = st.integers(1, 40)
tiles_and_overlaps = st.integers(1, 16).flatmap(lambda tile: st.tuples(st.just(tile), st.integers(0, (tile - 1) // 2)))


def picture(height: int, width: int, dtype: torch.dtype = torch.float32, channels: int = 2) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(3)).to(dtype)


# ------------------------------------------------------------------------------------------------------------ laws


def check_plan(plan: Plan, size: int, tile: int, overlap: int, multiple: int = 1) -> None:
    """Tiles have one length within the limit, start and end with the axis, share enough, and lie evenly."""
    spans = plan(size, tile, overlap, multiple)
    starts, stops = zip(*spans, strict=True)
    assert starts[0] == 0 and stops[-1] == size
    assert len({stop - start for start, stop in spans}) == 1
    assert stops[0] <= max(tile, multiple)
    assert all(value % multiple == 0 for span in spans for value in span)
    assert all(stop - start >= 2 * overlap for stop, start in zip(stops[:-1], starts[1:], strict=True))
    steps = [b - a for a, b in zip(starts[:-1], starts[1:], strict=True)]
    assert all(step > 0 for step in steps)
    assert not steps or max(steps) - min(steps) <= multiple


def check_windows_sum_to_one(
    windows: Windows, spans: Sequence[tuple[int, int]], reach: float, ramp: tiling.Ramp
) -> None:
    """At every pixel the weights of all tiles are non-negative and sum to one."""
    total = torch.zeros(spans[-1][1], dtype=torch.float64)
    for (start, stop), window in zip(spans, windows(spans, reach=reach, ramp=ramp), strict=True):
        assert bool((window >= 0).all())
        total[start:stop] += window
    assert_close(total, torch.ones_like(total))


def check_weight_vanishes_within_reach(windows: Windows, spans: Sequence[tuple[int, int]], reach: int) -> None:
    """Pixels that saw a tile's artificial border do not count."""
    result = windows(spans, reach=reach)
    for index, window in enumerate(result):
        before = window[:reach] if index > 0 else window[:0]
        after = window[window.numel() - reach :] if index < len(spans) - 1 else window[:0]
        assert float(before.sum() + after.sum()) == 0


def check_identity(tiled: Tiled, x: Tensor, tile: int, overlap: int) -> None:
    """Tiling the identity gives the image back, up to rounding."""
    assert_close(tiled(lambda t: t, x, tile, overlap), x)


def check_local_operation(tiled: Tiled, x: Tensor, tile: int, overlap: int, reach: int) -> None:
    """A convolution that looks no further than the overlap does not notice the tiles."""
    kernel = torch.randn(
        x.shape[1], 1, 2 * reach + 1, 2 * reach + 1, generator=torch.Generator().manual_seed(5), dtype=x.dtype
    ) / (2 * reach + 1)

    def blur(t: Tensor) -> Tensor:
        return F.conv2d(t, kernel, padding=reach, groups=t.shape[1])

    assert_close(tiled(blur, x, tile, overlap, reach=reach), blur(x))


def check_scaled_operation(tiled: Tiled, x: Tensor, tile: int, overlap: int, num: int, den: int) -> None:
    """A function that changes the size by num/den gives what it gives on the whole image."""

    def rescale(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, den).repeat_interleave(num, dim=-1).repeat_interleave(num, dim=-2)

    assert_close(tiled(rescale, x, tile, overlap, num, den), rescale(x))


def check_low_precision(tiled: Tiled) -> None:
    """A bfloat16 function is fused in float32: the identity stays exact where many tiles meet."""
    x = picture(23, 29, torch.bfloat16)
    assert torch.equal(tiled(lambda t: t, x, 9, 4), x)


def check_input_unchanged(tiled: Tiled) -> None:
    x = picture(12, 20)
    before = x.clone()
    tiled(lambda t: 2 * t, x, 8, 2)
    assert torch.equal(x, before)


# ------------------------------------------------------------------------------------------- the laws on real things


@few
@given(sizes, tiles_and_overlaps, st.integers(1, 4))
def test_plan(units: int, pair: tuple[int, int], multiple: int) -> None:
    tile, overlap = pair
    assume(tile // multiple > math.ceil(2 * overlap / multiple))
    check_plan(plan_tiles, units * multiple, tile, overlap, multiple)


@few
@given(sizes, tiles_and_overlaps, st.floats(0, 1), st.sampled_from(RAMPS))
def test_windows_sum_to_one(size: int, pair: tuple[int, int], part: float, ramp: tiling.Ramp) -> None:
    spans = plan_tiles(size, *pair)
    check_windows_sum_to_one(blend_windows, spans, part * pair[1], ramp)
    check_weight_vanishes_within_reach(blend_windows, spans, pair[1])


@few
@given(sizes, sizes, tiles_and_overlaps, st.sampled_from(RAMPS))
def test_identity(height: int, width: int, pair: tuple[int, int], ramp: tiling.Ramp) -> None:
    check_identity(partial(tiled_map, ramp=ramp), picture(height, width), *pair)


@few
@given(sizes, sizes, tiles_and_overlaps, st.floats(0, 1))
def test_local_operation(height: int, width: int, pair: tuple[int, int], part: float) -> None:
    check_local_operation(tiled_map, picture(height, width, torch.float64), *pair, reach=round(part * pair[1]))


def test_local_operation_may_reach_as_far_as_the_overlap() -> None:
    for overlap in (1, 2, 3):
        check_local_operation(tiled_map, picture(31, 18, torch.float64), 8, overlap, reach=overlap)


@few
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_scaled_operation(rows: int, columns: int, num: int, den: int) -> None:
    check_scaled_operation(tiled_map, picture(rows * den, columns * den), 4 * den, den, num, den)


def test_low_precision() -> None:
    check_low_precision(tiled_map)


def test_input_unchanged() -> None:
    check_input_unchanged(tiled_map)


def test_gradient_is_that_of_the_whole_image() -> None:
    x = picture(13, 17, torch.float64).requires_grad_()
    tiled_map(lambda t: t.square(), x, 6, 1).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, 2 * x.detach())


def test_an_image_that_fits_goes_through_untouched() -> None:
    x = picture(7, 9)
    seen: list[tuple[int, ...]] = []

    def fn(t: Tensor) -> Tensor:
        seen.append(tuple(t.shape))
        return t - t.mean(dim=(-2, -1), keepdim=True)

    assert torch.equal(tiled_map(fn, x, 16, 4), fn(x))
    assert seen == [(2, 2, 7, 9)] * 2


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_tiles_in_batches_are_the_same_tiles(batch: int) -> None:
    """Batches cross rows of tiles, and images of a batch of pictures stay with their pictures."""
    x, sizes = picture(40, 31), []

    def fn(t: Tensor) -> Tensor:
        sizes.append(len(t))
        return t - t.mean(dim=(-2, -1), keepdim=True)

    assert_close(tiled_map(fn, x, 16, 3, batch=batch), tiled_map(fn, x, 16, 3))
    assert max(sizes) > len(x)


def test_tiles_have_one_size_and_no_more_of_them_than_needed() -> None:
    seen: list[tuple[int, int]] = []

    def fn(t: Tensor) -> Tensor:
        seen.append((t.shape[-2], t.shape[-1]))
        return t

    tiled_map(fn, picture(65, 20), 64, 4)
    assert seen == [(37, 20)] * 2


# ---------------------------------------------------------------------------------------------------- planted defects


def sliver_plan(size: int, tile: int, overlap: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Full tiles from the left; whatever is left over makes the last one."""
    step = tile - 2 * overlap
    return [(start, min(start + tile, size)) for start in range(0, max(size - 2 * overlap, 1), step)]


def clamped_plan(size: int, tile: int, overlap: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Full tiles from the left, the last one pushed back inside: covered, but unevenly."""
    starts = [min(start, size - tile) for start, _ in sliver_plan(size, tile, overlap)]
    return [(start, start + tile) for start in starts]


def ramp_without_partner(spans: Sequence[tuple[int, int]], **options: object) -> list[Tensor]:
    """A window that falls off on both sides but is not divided by the sum."""
    return [torch.hann_window(stop - start + 2, periodic=False, dtype=torch.float64)[1:-1] for start, stop in spans]


def deaf_windows(spans: Sequence[tuple[int, int]], *, reach: float = 0, **options: tiling.Ramp) -> list[Tensor]:
    """Windows that ignore the reach."""
    return blend_windows(spans, reach=0, **options)


def fuse_in_own_dtype(fn: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int) -> Tensor:
    """Fusion in the function's dtype."""
    rows, columns = plan_tiles(x.shape[-2], tile, overlap), plan_tiles(x.shape[-1], tile, overlap)
    fused = torch.zeros_like(x)
    for (top, bottom), row in zip(rows, blend_windows(rows), strict=True):
        for (left, right), column in zip(columns, blend_windows(columns), strict=True):
            fused[..., top:bottom, left:right] += torch.outer(row, column).to(x.dtype) * fn(
                x[..., top:bottom, left:right]
            )
    return fused


def write_back(fn: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int) -> Tensor:
    """A version that stores each tile where it found it."""
    for start, stop in plan_tiles(x.shape[-1], tile, overlap):
        x[..., start:stop] = fn(x[..., start:stop])
    return x


def plan_off_the_grid(size: int, tile: int, overlap: int, multiple: int = 1) -> list[tuple[int, int]]:
    """A plan that forgets that the function halves the size."""
    return plan_tiles(size, tile, overlap)


@pytest.mark.parametrize("plan", [sliver_plan, clamped_plan])
def test_plan_catches(plan: Plan) -> None:
    with pytest.raises(AssertionError):
        check_plan(plan, 37, 16, 2)


def test_plan_catches_ignored_multiple() -> None:
    with pytest.raises(AssertionError):
        check_plan(plan_off_the_grid, 44, 16, 2, 4)


def test_windows_catch_a_missing_partner() -> None:
    with pytest.raises(AssertionError):
        check_windows_sum_to_one(ramp_without_partner, plan_tiles(40, 16, 3), 0.0, "cosine")


def test_windows_catch_an_ignored_reach() -> None:
    with pytest.raises(AssertionError):
        check_weight_vanishes_within_reach(deaf_windows, plan_tiles(40, 16, 3), 2)


def test_identity_catches_unnormalised_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "blend_windows", ramp_without_partner)
    with pytest.raises(AssertionError):
        check_identity(tiled_map, picture(20, 33), 16, 3)


def test_local_operation_catches_an_ignored_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "blend_windows", deaf_windows)
    with pytest.raises(AssertionError):
        check_local_operation(tiled_map, picture(20, 33, torch.float64), 16, 3, reach=2)


def test_scaled_operation_catches_misplaced_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every other tile lands one pixel off, as rounding of scaled starts would do.
    def misplaced(spans: Sequence[tuple[int, int]], num: int, den: int) -> list[tuple[int, int]]:
        exact = [(a * num // den, b * num // den) for a, b in spans]
        return [(a + i % 2, b + i % 2) if 0 < i < len(exact) - 1 else (a, b) for i, (a, b) in enumerate(exact)]

    monkeypatch.setattr(tiling, "_scaled", misplaced)
    with pytest.raises(AssertionError):
        check_scaled_operation(tiled_map, picture(4, 40), 8, 2, 3, 2)


def test_low_precision_catches_fusion_in_bfloat16() -> None:
    with pytest.raises(AssertionError):
        check_low_precision(fuse_in_own_dtype)


def test_input_unchanged_catches_writing_back() -> None:
    with pytest.raises(AssertionError):
        check_input_unchanged(write_back)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("tile", "overlap"), [(8, 4), (0, 0), (16, -1)])
def test_tiles_without_a_share_of_their_own_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="larger tiles or a smaller overlap"):
        TilingConfig(tile=tile, overlap=overlap)
    with pytest.raises(ValueError, match="larger tiles or a smaller overlap"):
        plan_tiles(100, tile, overlap)


def test_sizes_off_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="pad the image"):
        tiled_map(lambda t: F.avg_pool2d(t, 2), picture(9, 8), 8, 2, 1, 2)


def test_reach_beyond_the_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="raise the overlap"):
        tiled_map(lambda t: t, picture(9, 8), 8, 2, reach=3)
    with pytest.raises(ValueError, match="larger overlap"):
        blend_windows([(0, 6), (4, 10)], reach=2)
    with pytest.raises(ValueError, match="at least one tile"):
        blend_windows([])


def test_a_function_of_another_size_is_refused() -> None:
    with pytest.raises((ValueError, TypeCheckError), match="scale_num/scale_den"):
        tiled_map(lambda t: t[..., 1:], picture(9, 30), 8, 2)
