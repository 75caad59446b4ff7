"""The grids of a restoration: pictures to tensors, y to the coarse grid, the padded canvas, and back.

    y (any size) --resample--> coarse grid (output / 2^J) --pad--> padded coarse grid --x 2^J--> canvas --crop--> output

J is the integer nearest to log2 of the scale, at most 3. The padded coarse grid suits the encoder, the canvas suits the
denoiser; both only ever grow to the right and below, so that nothing moves.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from latentindigo.images import LoadedImage, from_pil, to_pil
from latentindigo.operators import Operator
from latentindigo.tiling import TilingConfig

__all__ = [
    "ImageInput",
    "OnCanvas",
    "Plan",
    "centre_crop",
    "free_memory",
    "from_tensor",
    "group_by_size",
    "halved",
    "is_out_of_memory",
    "make_plan",
    "output_size",
    "overlapping",
    "pad_to",
    "tiling_for",
    "tiling_from",
    "to_coarse_grid",
    "to_tensors",
]

MAX_LEVELS = 3
# Above this many output pixels "auto" tiles. Below, all stages fit in a GiB; a larger whole takes more time per
# pixel than tiles do, overlap included.
AUTO_TILE_PIXELS = 1536 * 1536
AUTO_TILE = 1280
SMALLEST_TILE = 256
TILE_GRID = 64  # Sides of tiles: a latent cell of the coarsest grid, at scale 8.
OVERLAP_GRID = 32
# The embedded networks' reach, measured (`reach.py`): denoiser 56 pixels, latent INN 64, estimator 26, encoder 16,
# decoder 13, map 16, colours 31.
TILE_OVERLAP = 64
BATCH_PIXELS = 1024 * 1024

ImageInput = PIL.Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Plan:
    """Geometry of one pass: y (any size) -> coarse grid (padded) -> canvas = coarse * 2^levels -> output."""

    levels: int
    width: int
    height: int
    coarse_width: int
    coarse_height: int
    padded_width: int
    padded_height: int

    @property
    def pixels(self) -> int:
        """Pixels of the canvas."""
        return self.padded_height * self.padded_width * 4**self.levels


class OnCanvas:
    """A known operator on a padded canvas: acts on the part of the canvas that is the image."""

    def __init__(self, operator: Operator, plan: Plan) -> None:
        self.operator, self.height, self.width = operator, plan.height, plan.width

    def forward(self, x: Tensor) -> Tensor:
        """Y = A (crop of x)."""
        return self.operator.forward(x[..., : self.height, : self.width])

    def project(self, x: Tensor, y: Tensor, noise: float = 0.0) -> Tensor:
        """X with its image part projected."""
        out = x.clone()
        out[..., : self.height, : self.width] = self.operator.project(x[..., : self.height, : self.width], y, noise)
        return out


def to_tensors(image: ImageInput | Sequence[ImageInput]) -> tuple[list[Tensor], list[bool]]:
    """All images as (3, H, W) float32 in [0, 1], and which of them are grey PIL images."""
    if isinstance(image, Tensor) and image.ndim == 4:
        image = list(image)
    elif isinstance(image, (PIL.Image.Image, np.ndarray, Tensor)):
        image = [image]
    if not image:
        raise ValueError("at least one image expected, got an empty list")
    pairs = [_to_tensor(item) for item in image]
    return [t for t, _ in pairs], [g for _, g in pairs]


def _to_tensor(image: ImageInput) -> tuple[Tensor, bool]:
    if isinstance(image, PIL.Image.Image):
        loaded = from_pil(image)
        return loaded.rgb, loaded.mode == "L"
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise ValueError(f"an array (H, W, 3), (H, W, 1) or (H, W) expected, got shape {image.shape}")
        if image.dtype.kind == "u":
            image = image.astype(np.float32) / np.iinfo(image.dtype).max
        image = torch.from_numpy(np.ascontiguousarray(image.astype(np.float32))).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ValueError(f"a PIL image, an array or a tensor expected, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.is_floating_point():
        raise ValueError(f"a float tensor (3, H, W) or (B, 3, H, W) expected, got {tuple(image.shape)} {image.dtype}")
    if image.numel() == 0:
        raise ValueError(f"an image of at least one pixel expected, got shape {tuple(image.shape)}")
    low, high = float(image.min()), float(image.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"pixels in [0, 1] expected, got values from {low:.3g} to {high:.3g}; divide by 255 first")
    return image.detach().float().cpu().clamp(0, 1).expand(3, -1, -1), False


def from_tensor(x: Tensor, output_type: str, grey: bool) -> Any:
    """A restored image (3, H, W) in the form that was asked for: "pil" (grey if `grey`), "np" (H, W, 3) or "pt"."""
    if output_type == "pt":
        return x.float()
    if output_type == "np":
        return x.float().permute(1, 2, 0).numpy()
    if output_type != "pil":
        raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
    return to_pil(LoadedImage(rgb=x, mode="L" if grey else "RGB"))


def output_size(width: int, height: int, scale: float, size: tuple[int, int] | None, crop: bool) -> tuple[int, int]:
    """(width, height) of the output before a crop."""
    if size is not None:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be (width, height) of at least 1 pixel each, got {size}")
        choose = max if crop else min
        scale = choose(size[0] / width, size[1] / height)
    if not (math.isfinite(scale) and 0 < scale <= 64):
        raise ValueError(f"scale must lie in (0, 64], got {scale}")
    return max(1, round(width * scale)), max(1, round(height * scale))


def make_plan(
    width: int, height: int, target: tuple[int, int], downsampling: int, size_multiple: int, operator: Operator | None
) -> Plan:
    """Choose J, the integer nearest to log2 of the scale, at most 3, and the padded coarse grid."""
    if operator is not None:
        # The operator fixes the grid; the canvas is only padded for the networks, with J = 0 for the detail map.
        width, height = round(width * operator.scale), round(height * operator.scale)
        multiple = size_multiple
        padded = (-(-width // multiple) * multiple, -(-height // multiple) * multiple)
        return Plan(0, width, height, width, height, *padded)
    scale = math.sqrt((target[0] / width) * (target[1] / height))
    levels = min(MAX_LEVELS, max(0, round(math.log2(scale))))
    factor = 2**levels
    coarse = (-(-target[0] // factor), -(-target[1] // factor))
    # E(y) needs y to be a multiple of the autoencoder's factor, the canvas one of the denoiser's.
    multiple = max(downsampling, size_multiple // factor)
    padded = tuple(-(-side // multiple) * multiple for side in coarse)
    return Plan(levels, *target, *coarse, padded[0], padded[1])


def to_coarse_grid(y: Tensor, target: tuple[int, int], plan: Plan) -> Tensor:
    """Bring y to the coarse grid, output / 2^J, antialiased; as it is when it already lies there.

    The grid's last row and column may lie partly beyond the image, when the output is no multiple of 2^J. So y is
    continued by repeated pixels, resampled by the exact factor, and cut: the picture is never stretched to fit.
    """
    factor = 2**plan.levels
    ratios = (target[1] / factor / y.shape[-2], target[0] / factor / y.shape[-1])
    if ratios == (1.0, 1.0):
        return y
    size = (plan.coarse_height, plan.coarse_width)
    grown = [max(0, math.ceil(n / r) + 1 - side) for n, r, side in zip(size, ratios, y.shape[-2:], strict=True)]
    y = F.pad(y, (0, grown[1], 0, grown[0]), mode="replicate")
    y = F.interpolate(y, scale_factor=ratios, mode="bicubic", antialias=True)
    return y[..., : size[0], : size[1]].clamp(0, 1)


def pad_to(x: Tensor, width: int, height: int) -> Tensor:
    """Pad right and below: mirrored where the image is large enough, its last pixels repeated where not."""
    right, bottom = width - x.shape[-1], height - x.shape[-2]
    if right == 0 and bottom == 0:
        return x
    mode = "reflect" if right < x.shape[-1] and bottom < x.shape[-2] else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)


def group_by_size(
    jobs: Sequence[tuple[int, int]], images: Sequence[Tensor], scale: float, size: tuple[int, int] | None
) -> list[list[int]]:
    """Jobs whose images have one size, in batches of a bounded number of output pixels."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for n, (k, _) in enumerate(jobs):
        by_size.setdefault(tuple(images[k].shape), []).append(n)
    groups: list[list[int]] = []
    for shape, members in by_size.items():
        width, height = output_size(shape[-1], shape[-2], scale, size, crop=True)
        count = max(1, BATCH_PIXELS // max(1, width * height))
        groups += [members[i : i + count] for i in range(0, len(members), count)]
    return groups


def centre_crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle (width, height) of an image (..., H, W)."""
    left, top = (x.shape[-1] - size[0]) // 2, (x.shape[-2] - size[1]) // 2
    return x[..., max(0, top) : max(0, top) + size[1], max(0, left) : max(0, left) + size[0]]


def tiling_from(tile: Literal["auto"] | int | None) -> TilingConfig | None | Literal["auto"]:
    """Check the setting `tile` and turn a side in output pixels into tiles with a suitable overlap."""
    if tile is None:
        return None
    if tile == "auto":
        return "auto"
    if not isinstance(tile, int) or tile < SMALLEST_TILE:
        raise ValueError(f"tile must be 'auto', None or a side of at least {SMALLEST_TILE} output pixels, got {tile!r}")
    return overlapping(tile // TILE_GRID * TILE_GRID)


def overlapping(tile: int, overlap: float = TILE_OVERLAP, multiple: int = OVERLAP_GRID) -> TilingConfig:
    """Tiles of a side with as much overlap as is wanted, or a quarter of the side where that is less.

    Args:
        tile: Side in pixels of the canvas.
        overlap: Pixels wanted.
        multiple: What side and overlap are multiples of.
    """
    wanted, largest = math.ceil(overlap / multiple) * multiple, tile // 4 // multiple * multiple
    return TilingConfig(tile=tile // multiple * multiple, overlap=min(wanted, largest))


def tiling_for(tile: TilingConfig | None | Literal["auto"], pixels: int, free: float, cost: int) -> TilingConfig | None:
    """The tiling for a canvas; "auto" tiles what is large, or larger than half of the free memory can hold at once.

    Args:
        tile: From `tiling_from`.
        pixels: Pixels of the canvas.
        free: Free memory in bytes.
        cost: Bytes that a pixel of a tile needs while it is worked on.

    Returns:
        Tile and overlap in pixels of the canvas; None = no tiles.
    """
    if tile != "auto":
        return tile
    affordable = 0.5 * free / cost
    if pixels <= min(AUTO_TILE_PIXELS, affordable):
        return None
    side = int(min(AUTO_TILE, math.sqrt(affordable))) // TILE_GRID * TILE_GRID
    return overlapping(max(SMALLEST_TILE, side))


def halved(tile: TilingConfig | None | Literal["auto"], pixels: int) -> TilingConfig | None:
    """A tiling of half the side, for when memory ran out; None if tiles cannot get smaller.

    Args:
        tile: What was used.
        pixels: Pixels of the output, for tilings that do not name a side.
    """
    largest = math.sqrt(pixels) if tile is None else min(AUTO_TILE, math.sqrt(pixels)) if tile == "auto" else tile.tile
    side = int(largest / 2) // TILE_GRID * TILE_GRID
    if side < SMALLEST_TILE:
        return None
    return overlapping(side)


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch's CPU allocator and MPS say so in plain RuntimeErrors."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    signs = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
