"""Fixed statistics of a degraded image that tell its damage: what the degradation encoder F need not learn to compute.

JPEG writes every coefficient of a block as a multiple of a step, and the table of steps of each quality is known: how
well the coefficients of y fit a table's multiples gives the quality away, and no small network of rectifiers finds that
by itself. The same coefficients, band by band, say how fast the spectrum of y falls, which is what a blur changes.

| code | symbol |
| --- | --- |
| `coefficients` | c_uv: DCT of the 8x8 blocks of the luma of y, in 8-bit levels |
| `steps` | Q_uv(q): JPEG's table for the quality q |
| `_combs` | mean of cos(2 pi c_uv / Q_uv(q)) over the coefficients that a step of that size leaves non-zero |
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentindigo.filters import dct_matrix, luma
from latentindigo.jpeg import luma_tables

__all__ = ["TRACES", "traces"]

COMB_QUALITIES = (*range(10, 100, 5), 98)
_BLOCK = 8
_STRIP_PIXELS = 512 * 1024  # At a time; an image of up to half a megapixel is one strip.
_BANDS = 2 * _BLOCK - 1  # Frequencies of a block by u + v.
_HIGHEST_COMB_BAND = 5  # Above it few coefficients survive a quantisation.
TRACES = 2 * _BLOCK + 2 * len(COMB_QUALITIES) + _BANDS - 1


def traces(y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
    """Blockiness, combs and spectrum of degraded images, side by side *(ours)*.

    All three are means over the image, taken strip by strip, so that a large image costs no more memory than a strip.

    Args:
        y: Degraded images (B, 3, h, w) in [0, 1], h and w at least 8.

    Returns:
        (B, TRACES) numbers of about unit size, in float32 at least.

    Raises:
        ValueError: If a side is shorter than a block of 8 pixels.
    """
    height, width = y.shape[-2:]
    if min(height, width) < _BLOCK:
        raise ValueError(f"sides of at least {_BLOCK} pixels expected, got {(height, width)}; repeat the border")
    rows = max(1, _STRIP_PIXELS // (width * _BLOCK)) * _BLOCK
    combs, bands, columns, down = [], [], [], []
    for top in range(0, height, rows):
        # One row more, for the step across the border between this strip and the next.
        strip = y[..., top : top + rows + 1, :]
        strip = strip if y.dtype == torch.float64 else strip.float()
        grey = strip.mean(1)
        columns.append(grey[..., :rows, :].diff(dim=-1).abs().sum(-2))
        down.append(grey.diff(dim=-2).abs().mean(-1))
        if min(strip.shape[-2], rows) >= _BLOCK:
            coefficients = _block_coefficients(strip[..., :rows, :])
            combs.append(_comb_sums(coefficients))
            bands.append(_band_sums(coefficients))
    steps = [torch.stack(columns).sum(0) / height, torch.cat(down, dim=-1)]
    blocks = (height // _BLOCK) * (width // _BLOCK)
    sums, logs = (torch.stack(found).sum(0) for found in (combs, bands))
    return torch.cat((_blockiness(steps), _combs(sums, blocks), _spectrum(logs / blocks)), dim=1)


def _block_coefficients(y: Tensor) -> Float[Tensor, "b blocks 64"]:
    """Orthonormal DCT of the whole 8x8 blocks of the luma of y, in 8-bit levels."""
    height, width = (side // _BLOCK * _BLOCK for side in y.shape[-2:])
    levels = luma(y[..., :height, :width]) * 255 - 128
    blocks = F.unfold(levels, _BLOCK, stride=_BLOCK).transpose(1, 2)
    waves = dct_matrix(_BLOCK)
    return blocks @ torch.kron(waves, waves).to(blocks).T


def _bands(device: torch.device) -> Tensor:
    place = torch.arange(_BLOCK, device=device)
    return (place[:, None] + place[None]).flatten()


def _low(device: torch.device) -> Tensor:
    band = _bands(device)
    return (band > 0) & (band <= _HIGHEST_COMB_BAND)


def _comb_sums(coefficients: Float[Tensor, "b blocks 64"]) -> Float[Tensor, "b n"]:
    """How well coefficients fit the multiples of each quality's steps: sums of cosines, then numbers of coefficients.

    A coefficient that is a multiple of its step has cosine 1, one that is anywhere has mean cosine 0. Those below half
    a step fit any larger step and are left out.
    """
    low = _low(coefficients.device)
    c = coefficients[..., low]
    sums, counts = [], []
    for steps in luma_tables(COMB_QUALITIES).to(c).flatten(1)[:, low]:
        ratio = c / steps
        taken = (ratio.abs() > 0.5).to(c.dtype)
        counts.append(taken.sum((1, 2)))
        sums.append((taken * torch.cos(2 * math.pi * ratio)).sum((1, 2)))
    return torch.stack((*sums, *counts), dim=1)


def _combs(sums: Tensor, blocks: int) -> Tensor:
    """Mean cosines of all blocks, then the root of the share of coefficients that took part."""
    cosines, count = sums.chunk(2, dim=1)
    everything = blocks * int(_low(sums.device).sum())
    return torch.cat((cosines / (count + 4), (count / everything).sqrt()), dim=1)


def _band_sums(coefficients: Tensor) -> Tensor:
    """Sums over the blocks of the logarithm of the energy of each band u + v, (B, 14).

    Band 0, the mean of a block, says nothing about damage and is left out.
    """
    band = _bands(coefficients.device)
    energy = coefficients.square()
    return torch.stack([(energy[..., band == k].mean(-1) + 0.25).log().sum(1) for k in range(1, _BANDS)], dim=1)


def _spectrum(logs: Tensor) -> Tensor:
    """Mean logarithms of the bands' energies: the first, the rest less the first."""
    return 0.2 * torch.cat((logs[:, :1], logs[:, 1:] - logs[:, :1]), dim=1)


def _blockiness(steps: list[Tensor]) -> Tensor:
    """How the mean step between neighbouring pixels differs among the 8 places in a block, (B, 16).

    Logarithms less their mean, for columns and rows, in falling order: where the grid of blocks begins does not matter.
    Zero for images of fewer than 9 pixels.

    Args:
        steps: Mean absolute step of each column to the next, and of each row.
    """
    found: list[Tensor] = []
    for means in steps:
        whole = means.shape[-1] // _BLOCK * _BLOCK
        if not whole:
            found.append(means.new_zeros(len(means), _BLOCK))
            continue
        places = (means[:, :whole].unflatten(-1, (-1, _BLOCK)).mean(1) + 1e-3).log()
        found.append((places - places.mean(-1, keepdim=True)).sort(dim=-1, descending=True).values)
    return 4 * torch.cat(found, dim=1)
