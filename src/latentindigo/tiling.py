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
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Fusion", "Ramp", "Tile", "Tiles", "TilingConfig", "blend_windows", "plan_tiles", "tiled_map"]

Ramp = Literal["cosine", "linear"]
MAPPED_BYTES = 2**30  # A canvas beyond this lies in a memory-mapped file.


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


@dataclass(frozen=True)
class Tile:
    """One tile of a canvas.

    Attributes:
        rows: (top, bottom) on the canvas.
        columns: (left, right) on the canvas.
        place: Its row and column among the tiles.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    place: tuple[int, int]

    def cut(self, x: Float[Tensor, "b c h w"], num: int = 1, den: int = 1) -> Float[Tensor, "b c h2 w2"]:
        """The part of `x` that the tile covers; `x` lies on a grid num / den times as fine as the canvas (a view)."""
        (top, bottom), (left, right) = (_scaled([span], num, den)[0] for span in (self.rows, self.columns))
        return x[..., top:bottom, left:right]


class Tiles:
    """The tiles of a canvas in reading order, their weights on any related grid, and how results are fused.

    A canvas that fits into one tile has one tile with weight 1 everywhere, so that the code for tiles is the code for
    whole images.

    Args:
        size: (height, width) of the canvas, multiples of `multiple`.
        tiling: Tile and overlap in units of the canvas; None = one tile.
        multiple: Tile sides and starts are multiples of this.
        reach: Outermost units of a tile, on its inner sides, that get the weight 0; at most the overlap.
        ramp: Shape of the transition between neighbours.

    Raises:
        ValueError: If the numbers do not fit together.
    """

    def __init__(
        self,
        size: Sequence[int],
        tiling: TilingConfig | None,
        multiple: int = 1,
        *,
        reach: int = 0,
        ramp: Ramp = "cosine",
    ) -> None:
        if tiling is not None and not 0 <= reach <= tiling.overlap:
            raise ValueError(
                f"Tiles: expected 0 <= reach <= overlap, got reach={reach} and overlap={tiling.overlap}; raise the "
                "overlap to the reach of the function"
            )
        height, width = size
        self.reach = reach
        self.ramp: Ramp = ramp
        tile, overlap = (tiling.tile, tiling.overlap) if tiling is not None else (max(height, width), 0)
        self.rows, self.columns = (
            plan_tiles(side, tile, overlap, multiple) if tiling is not None else [(0, side)] for side in (height, width)
        )
        self._windows: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
        self._there: dict[tuple[int, int, torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[Tile]:
        """Yield the tiles row by row."""
        for i, rows in enumerate(self.rows):
            for j, columns in enumerate(self.columns):
                yield Tile(rows, columns, (i, j))

    def windows(self, num: int = 1, den: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        """Weights of the rows and of the columns of tiles on a grid num / den times as fine as the canvas."""
        if (num, den) not in self._windows:
            spans = (_scaled(spans, num, den) for spans in (self.rows, self.columns))
            rows, columns = (blend_windows(s, reach=self.reach * num / den, ramp=self.ramp) for s in spans)
            self._windows[num, den] = rows, columns
        return self._windows[num, den]

    def windows_like(self, x: Tensor, num: int = 1, den: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        """The same weights in the dtype and on the device of `x`; an accelerator gets them once."""
        key = (num, den, x.dtype, x.device)
        if key not in self._there:
            rows, columns = self.windows(num, den)
            self._there[key] = [w.to(x) for w in rows], [w.to(x) for w in columns]
        return self._there[key]

    def weight(self, tile: Tile, num: int = 1, den: int = 1) -> Float[Tensor, "h w"]:
        """A tile's weight at each place; over all tiles they sum to 1."""
        rows, columns = self.windows(num, den)
        return torch.outer(rows[tile.place[0]], columns[tile.place[1]])

    def fusion(
        self,
        num: int = 1,
        den: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Fusion:
        """An empty canvas, num / den times as fine, that takes in the results of all tiles in order.

        Args:
            num: Numerator of its scale.
            den: Denominator of its scale.
            dtype: What it is kept in; None = as the results are, float16 halves the memory of a large picture.
            device: Where it is kept; None = where the results are. One tile stays where it is.
        """
        return Fusion(self, num, den, dtype, device)


class Fusion:
    """The weighted sum of the tiles' results, Σ_i w_i r_i, built row of tiles by row of tiles.

    Sums are taken in float32 (float64 for float64) on one row of tiles at a time; only what is finished is kept in the
    canvas's own dtype. Gradients pass. Use `Tiles.fusion`.
    """

    def __init__(
        self, tiles: Tiles, num: int, den: int, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        self._tiles, self._scale, self._dtype, self._device = tiles, (num, den), dtype, device
        self._spans = [_scaled(spans, num, den) for spans in (tiles.rows, tiles.columns)]
        self._strip: Tensor | None = None
        self._carry: Tensor | None = None
        self._canvas: Tensor | None = None
        self._result = torch.float32

    def add(self, tile: Tile, result: Float[Tensor, "b c h w"]) -> None:
        """Take in a tile's result; tiles come in the order of `Tiles`.

        Args:
            tile: Which.
            result: (B, C, h, w), as large as the tile on this canvas's grid.

        Raises:
            ValueError: If the size is another.
        """
        (top, bottom), (left, right) = (spans[k] for spans, k in zip(self._spans, tile.place, strict=True))
        if result.ndim != 4 or tuple(result.shape[-2:]) != (bottom - top, right - left):
            raise ValueError(
                f"expected a result of (B, C, {bottom - top}, {right - left}) for this tile, got "
                f"{tuple(result.shape)}; check scale_num/scale_den"
            )
        if len(self._tiles) == 1:
            self._canvas = result if self._dtype is None else result.to(self._dtype)
            return
        self._result = result.dtype
        total = torch.float64 if result.dtype == torch.float64 else torch.float32
        if tile.place[1] == 0:
            size = (*result.shape[:2], bottom - top, self._spans[1][-1][1])
            self._strip = torch.zeros(size, dtype=total, device=result.device)
        if self._strip is None:
            raise ValueError("tiles must be added row by row, from the left")
        columns = self._tiles.windows_like(self._strip, *self._scale)[1][tile.place[1]]
        self._strip[..., left:right] += columns * result.to(total)
        if tile.place[1] == len(self._tiles.columns) - 1:
            self._finish_row(tile.place[0])

    def _finish_row(self, i: int) -> None:
        """Weigh a finished row of tiles, add what the last one left, and keep what no later row reaches."""
        strip, rows = self._strip, self._spans[0]
        if strip is None:
            return
        weighted = strip * self._tiles.windows_like(strip, *self._scale)[0][i][:, None]
        top, bottom = rows[i]
        if self._carry is not None:
            shared = min(self._carry.shape[-2], bottom - top)
            weighted[..., :shared, :] += self._carry[..., :shared, :]
        done = (rows[i + 1][0] if i + 1 < len(rows) else bottom) - top
        kept = weighted[..., :done, :]
        if self._canvas is None:
            size = (*strip.shape[:2], rows[-1][1], strip.shape[-1])
            self._canvas = _empty(size, self._dtype or self._result, self._device or strip.device)
        self._canvas[..., top : top + done, :] = kept.to(self._canvas)
        self._carry = weighted[..., done:, :].clone()
        self._strip = None

    def result(self) -> Float[Tensor, "b c h w"]:
        """The canvas, once every tile is in.

        Raises:
            ValueError: If tiles are missing.
        """
        if self._canvas is None or self._strip is not None:
            raise ValueError("tiles are missing; add every one before asking for the result")
        return self._canvas


def _empty(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a canvas; a very large one on the CPU lies in a file that goes when the tensor does."""
    count = math.prod(size)
    if device.type != "cpu" or count * dtype.itemsize <= MAPPED_BYTES:
        return torch.empty(size, dtype=dtype, device=device)
    with tempfile.NamedTemporaryFile() as file:
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(*size)


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
    dtype: torch.dtype | None = None,
    batch: int = 1,
) -> Float[Tensor, "b c2 h2 w2"]:
    """Apply an image-to-image function tile by tile and fuse the results by a partition of unity.

    Result = Σ_i w_i · f(x_i), with weights that sum to 1 at every pixel; the sum is taken in float32 (float64 if the
    function returns float64). An image that fits into one tile goes through the function as it is. Gradients pass.

    Args:
        fn: Takes (n B, C, h, w) and returns (n B, C', h · num / den, w · num / den), for any n up to `batch`; images of
            a batch must not see each other. It may be handed views of `x` and must not write into them.
        x: Image, (B, C, H, W).
        tile: Largest side of a tile, in pixels of `x`.
        overlap: Pixels by which a tile reaches beyond its share on each inner side; 2 · `overlap` < `tile`.
        scale_num: Numerator of the function's spatial scale.
        scale_den: Denominator of the function's spatial scale; it divides H and W.
        reach: How many pixels of `x` around a pixel the function looks at, if that is known and at most `overlap`: the
            result then equals `fn(x)`. 0 gives the widest ramp.
        multiple: Tile sides and starts are multiples of this as well; it divides H and W.
        ramp: "cosine" or "linear".
        dtype: What the result is kept in; None = the dtype of the function's result.
        batch: Most tiles that go through the function at once; an accelerator is not busy with one small tile.

    Returns:
        (B, C', H · num / den, W · num / den) on the device of the function's result.

    Raises:
        ValueError: Tile, overlap, reach and scale do not fit together, or the function returns another size.
    """
    if scale_num < 1 or scale_den < 1:
        raise ValueError(f"tiled_map: expected a positive scale, got {scale_num}/{scale_den}")
    grid = math.lcm(multiple, scale_den)
    tiles = Tiles(x.shape[-2:], TilingConfig(tile, overlap), grid, reach=reach, ramp=ramp)
    fusion = tiles.fusion(scale_num, scale_den, dtype)
    order = list(tiles)
    for k in range(0, len(order), batch):
        group = order[k : k + batch]
        parts = [part.cut(x) for part in group]
        results = fn(parts[0] if len(parts) == 1 else torch.cat(parts)).chunk(len(group))
        for part, result in zip(group, results, strict=True):
            fusion.add(part, result)
    return fusion.result()


def _scaled(spans: Sequence[tuple[int, int]], num: int, den: int) -> list[tuple[int, int]]:
    return [(start * num // den, stop * num // den) for start, stop in spans]
