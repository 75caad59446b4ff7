"""Overlapping tiles: plan them, weight them, run a function on each and fuse the results.

A tile is a stretch of `tile` pixels that reaches `overlap` pixels beyond its own share wherever it has a neighbour, so
two neighbours have at least twice that in common. Drawn along one axis, for two tiles A and B::

    A: |------------ share of A ------------|-- overlap --|
    B:                       |-- overlap --|------------ share of B ------------|
                             |.reach.|/ ramp /|.reach.|

In the common stretch the weight passes from A to B. A function that knows how far it looks can say so (`reach`): the
outermost `reach` pixels of a tile, which saw its artificial border, then get the weight 0, and the result is that of
the whole image as long as `reach` is at most `overlap`. A function that looks arbitrarily far (attention, group norm)
keeps `reach` at 0 and gets the widest ramp, which hides seams best.

All tiles of an image have one size: `tile` is an upper limit, and no tile is a sliver that sees hardly any context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Ramp", "TilingConfig", "blend_windows", "plan_tiles", "tiled_map"]

Ramp = Literal["cosine", "linear"]


@dataclass(frozen=True)
class TilingConfig:
    """How to cut an image into tiles.

    Attributes:
        tile: Largest side of a tile in pixels of the input, margins included.
        overlap: Pixels by which a tile reaches beyond its own share on every inner side.
    """

    tile: int = 512
    overlap: int = 32

    def __post_init__(self) -> None:
        _require_valid(self.tile, self.overlap)


def _require_valid(tile: int, overlap: int, multiple: int = 1) -> None:
    if multiple < 1 or overlap < 0 or tile < 1 or _units(tile, overlap, multiple)[0] <= 0:
        raise ValueError(
            f"tiling: expected tile > 2 * overlap >= 0, also with tile rounded down and 2 * overlap rounded up to "
            f"multiples of {multiple}, got tile={tile}, overlap={overlap}; take larger tiles or a smaller overlap"
        )


def _units(tile: int, overlap: int, multiple: int) -> tuple[int, int]:
    """What a tile adds beyond what it shares, and what neighbours share, in multiples."""
    shared = math.ceil(2 * overlap / multiple)
    return tile // multiple - shared, shared


def plan_tiles(size: int, tile: int, overlap: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Spread tiles of one length evenly over one axis.

    | here | meaning |
    |---|---|
    | `count` | fewest tiles of at most `tile` pixels that share at least 2 · `overlap` and cover `size` |
    | `length` | the shortest common length with which `count` tiles still do |

    Args:
        size: Length of the axis, a multiple of `multiple`.
        tile: Upper limit of a tile's length; larger than 2 · `overlap`.
        overlap: Pixels by which a tile reaches beyond its share on each inner side.
        multiple: All starts and lengths are multiples of this.

    Returns:
        (start, stop) of each tile, in order; one tile if the axis is no longer than `tile`.

    Raises:
        ValueError: The size, tile, overlap and multiple do not fit together.
    """
    _require_valid(tile, overlap, multiple)
    if size < 1 or size % multiple:
        raise ValueError(f"plan_tiles: expected a positive multiple of {multiple}, got {size}; pad the image first")
    total = size // multiple
    fresh, shared = _units(tile, overlap, multiple)
    count = max(1, math.ceil((total - shared) / fresh))
    if count == 1:
        return [(0, size)]
    length = math.ceil((total + (count - 1) * shared) / count)
    starts = [i * (total - length) // (count - 1) for i in range(count)]
    return [(start * multiple, (start + length) * multiple) for start in starts]


def blend_windows(
    spans: Sequence[tuple[int, int]],
    *,
    reach: int | float = 0,
    ramp: Ramp = "cosine",
) -> list[Float[Tensor, " _"]]:
    """One weight per pixel of each tile along one axis; over all tiles the weights of a pixel sum to 1.

    | here | meaning |
    |---|---|
    | `shared` | pixels in common with a neighbour |
    | `t` | how far a pixel's centre lies into the ramp (the shared pixels less `reach` at either end), 0 to 1 |
    | rise | t (linear) or sin²(π·t / 2) (cosine); the neighbour's fall at the same place is 1 − rise |

    Where more than two tiles meet the products of rise and fall are divided by their sum (partition of unity).

    Args:
        spans: (start, stop) of each tile in order, covering the axis without a gap.
        reach: Outermost pixels on each inner side that get the weight 0; at most half of what neighbours share.
        ramp: Shape of the transition.

    Returns:
        One float64 window per tile, of that tile's length.

    Raises:
        ValueError: There are no spans, or `reach` leaves pixels that no tile covers.
    """
    if not spans:
        raise ValueError("blend_windows: expected at least one tile, got none; plan the tiles first")
    raw: list[Tensor] = []
    total = torch.zeros(spans[-1][1] - spans[0][0], dtype=torch.float64)
    for index, (start, stop) in enumerate(spans):
        centre = torch.arange(stop - start, dtype=torch.float64) + 0.5
        window = torch.ones_like(centre)
        if index > 0:
            window = window * _rise(centre, spans[index - 1][1] - start, float(reach), ramp)
        if index < len(spans) - 1:
            window = window * _rise(stop - start - centre, stop - spans[index + 1][0], float(reach), ramp)
        raw.append(window)
        total[start - spans[0][0] : stop - spans[0][0]] += window
    if not bool((total > 0).all()):
        raise ValueError(
            f"blend_windows: expected tiles that share at least 2 * reach = {2 * reach} pixels, got {list(spans)}; "
            "plan them with a larger overlap"
        )
    return [
        window / total[start - spans[0][0] : stop - spans[0][0]]
        for window, (start, stop) in zip(raw, spans, strict=True)
    ]


def _rise(distance: Tensor, shared: int, reach: float, ramp: Ramp) -> Tensor:
    """Weight as a function of the distance of a pixel's centre from the tile's inner edge."""
    width = shared - 2 * reach
    if width <= 0:  # nothing to spare for a ramp: both tiles are right, and the seam is a plain cut
        return (distance > reach).to(distance.dtype)
    t = ((distance - reach) / width).clamp(0, 1)
    return t if ramp == "linear" else torch.sin(t * (math.pi / 2)).square()


def tiled_map(
    fn: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b c h w"],
    tile: int,
    overlap: int,
    scale_num: int = 1,
    scale_den: int = 1,
    *,
    reach: int = 0,
    multiple: int = 1,
    ramp: Ramp = "cosine",
) -> Float[Tensor, "b c2 h2 w2"]:
    """Apply an image-to-image function tile by tile and fuse the results by a partition of unity.

    Result = Σ_i w_i · f(x_i), with weights that sum to 1 at every pixel; the sum is taken in float32 (float64 if the
    function returns float64). An image that fits into one tile goes through the function as it is. Gradients pass.

    Args:
        fn: Takes (B, C, h, w) and returns (B, C', h · num / den, w · num / den). It is handed views of `x` and must not
            write into them.
        x: Image, (B, C, H, W).
        tile: Largest side of a tile, in pixels of `x`.
        overlap: Pixels by which a tile reaches beyond its share on each inner side; 2 · `overlap` < `tile`.
        scale_num: Numerator of the function's spatial scale.
        scale_den: Denominator of the function's spatial scale; it divides H and W.
        reach: How many pixels of `x` around a pixel the function looks at, if that is known and at most `overlap`: the
            result then equals `fn(x)`. 0 gives the widest ramp.
        multiple: Tile sides and starts are multiples of this as well; it divides H and W.
        ramp: "cosine" or "linear".

    Returns:
        (B, C', H · num / den, W · num / den) in the dtype and on the device of the function's result.

    Raises:
        ValueError: Tile, overlap, reach and scale do not fit together, or the function returns another size.
    """
    if scale_num < 1 or scale_den < 1 or not 0 <= reach <= overlap:
        raise ValueError(
            f"tiled_map: expected a positive scale and 0 <= reach <= overlap, got {scale_num}/{scale_den}, "
            f"reach={reach}, overlap={overlap}; raise the overlap to the reach of the function"
        )
    height, width = x.shape[-2:]
    grid = math.lcm(multiple, scale_den)
    rows, columns = (plan_tiles(side, tile, overlap, grid) for side in (height, width))
    scale = scale_num / scale_den
    out_rows, out_columns = (_scaled(spans, scale_num, scale_den) for spans in (rows, columns))
    row_windows, column_windows = (blend_windows(s, reach=reach * scale, ramp=ramp) for s in (out_rows, out_columns))

    fused: Tensor | None = None
    dtype = x.dtype
    for (top, bottom), (out_top, out_bottom), row_weight in zip(rows, out_rows, row_windows, strict=True):
        for (left, right), (out_left, out_right), column_weight in zip(
            columns, out_columns, column_windows, strict=True
        ):
            result = fn(x[..., top:bottom, left:right])
            expected = (out_bottom - out_top, out_right - out_left)
            if result.ndim != 4 or tuple(result.shape[-2:]) != expected:
                raise ValueError(
                    f"tiled_map: expected the function to return (B, C, {expected[0]}, {expected[1]}) for a tile of "
                    f"{bottom - top}x{right - left}, got {tuple(result.shape)}; check scale_num/scale_den"
                )
            if len(rows) == len(columns) == 1:
                return result
            if fused is None:
                dtype = result.dtype
                total = torch.float64 if dtype == torch.float64 else torch.float32
                size = (out_rows[-1][1], out_columns[-1][1])
                fused = torch.zeros(*result.shape[:2], *size, dtype=total, device=result.device)
            weight = torch.outer(row_weight, column_weight).to(fused)
            fused[..., out_top:out_bottom, out_left:out_right] += weight * result.to(fused.dtype)
    if fused is None:  # plan_tiles never returns an empty plan
        raise ValueError("tiled_map: no tile was planned; pass an image with at least one pixel")
    return fused.to(dtype)


def _scaled(spans: Sequence[tuple[int, int]], num: int, den: int) -> list[tuple[int, int]]:
    return [(start * num // den, stop * num // den) for start, stop in spans]
