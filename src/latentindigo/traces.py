"""Fixed statistics of a degraded image that tell its damage: what the degradation encoder F need not learn to compute.

JPEG writes every coefficient of a block as a multiple of a step, and the table of steps of each quality is known: how
well the coefficients of y fit a table's multiples gives the quality away, and no small network of rectifiers finds that
by itself. The same coefficients, band by band, say how fast the spectrum of y falls, which is what a blur changes.

| code | symbol |
| --- | --- |
| `coefficients` | c_uv: DCT of the 8x8 blocks of the luma of y, in 8-bit levels |
| `steps` | Q_uv(q): JPEG's table for the quality q |
| `jpeg_combs` | mean of cos(2 pi c_uv / Q_uv(q)) over the coefficients that a step of that size leaves non-zero |
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
_BANDS = 2 * _BLOCK - 1  # Frequencies of a block by u + v.
_HIGHEST_COMB_BAND = 5  # Above it few coefficients survive a quantisation.
TRACES = 2 * _BLOCK + 2 * len(COMB_QUALITIES) + _BANDS - 1


def traces(y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
    """Blockiness, combs and spectrum of degraded images, side by side *(ours)*.

    Args:
        y: Degraded images (B, 3, h, w) in [0, 1], h and w at least 8.

    Returns:
        (B, TRACES) numbers of about unit size, in float32 at least.

    Raises:
        ValueError: If a side is shorter than a block of 8 pixels.
    """
    if min(y.shape[-2:]) < _BLOCK:
        raise ValueError(f"sides of at least {_BLOCK} pixels expected, got {tuple(y.shape[-2:])}; repeat the border")
    y = y if y.dtype == torch.float64 else y.float()
    coefficients = _block_coefficients(y)
    return torch.cat((_blockiness(y), jpeg_combs(coefficients), _spectrum(coefficients)), dim=1)


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


def jpeg_combs(coefficients: Float[Tensor, "b blocks 64"]) -> Float[Tensor, "b n"]:
    """How well coefficients fit the multiples of each quality's steps.

    A coefficient that is a multiple of its step has cosine 1, one that is anywhere has mean cosine 0. Those below half
    a step fit any larger step and are left out; how many are left is the second half of the result.

    Args:
        coefficients: (B, blocks, 64), see `traces`.

    Returns:
        (B, 2 * len(COMB_QUALITIES)): mean cosines, then the root of the share of coefficients that took part.
    """
    band = _bands(coefficients.device)
    low = (band > 0) & (band <= _HIGHEST_COMB_BAND)
    c = coefficients[..., low]
    means, shares = [], []
    for steps in luma_tables(COMB_QUALITIES).to(c).flatten(1)[:, low]:
        ratio = c / steps
        taken = (ratio.abs() > 0.5).to(c.dtype)
        count = taken.sum((1, 2))
        means.append((taken * torch.cos(2 * math.pi * ratio)).sum((1, 2)) / (count + 4))
        shares.append((count / c[0].numel()).sqrt())
    return torch.stack((*means, *shares), dim=1)


def _spectrum(coefficients: Tensor) -> Tensor:
    """Mean logarithms over the blocks of the energy of each band u + v, (B, 14): the first, the rest less the first.

    Band 0, the mean of a block, says nothing about damage and is left out.
    """
    band = _bands(coefficients.device)
    energy = coefficients.square()
    logs = [(energy[..., band == k].mean(-1) + 0.25).log().mean(1) for k in range(1, _BANDS)]
    return 0.2 * torch.stack((logs[0], *(log - logs[0] for log in logs[1:])), dim=1)


def _blockiness(y: Tensor) -> Tensor:
    """How the mean step between neighbouring pixels differs among the 8 places in a block, (B, 16).

    Logarithms less their mean, for columns and rows, in falling order: where the grid of blocks begins does not matter.
    Zero for images of fewer than 9 pixels.
    """
    grey = y.mean(1)
    found: list[Tensor] = []
    for image in (grey, grey.transpose(-2, -1)):
        steps = image.diff(dim=-1).abs().mean(-2)
        whole = steps.shape[-1] // _BLOCK * _BLOCK
        if not whole:
            found.append(steps.new_zeros(len(steps), _BLOCK))
            continue
        places = (steps[:, :whole].unflatten(-1, (-1, _BLOCK)).mean(1) + 1e-3).log()
        found.append((places - places.mean(-1, keepdim=True)).sort(dim=-1, descending=True).values)
    return 4 * torch.cat(found, dim=1)
