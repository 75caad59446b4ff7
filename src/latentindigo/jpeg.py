"""JPEG 4:2:0 on tensors: libjpeg's arithmetic up to the (lossless) entropy coding, differentiable and batched.

Training and guidance need a JPEG that runs on tensors, takes a quality per image and passes gradients, which no file
codec does. It follows libjpeg's integer arithmetic closely, because the rounding of a coefficient decides about a whole
block: an ideal real-valued transform would land on other levels than the files that the method meets.

| symbol | here | meaning |
| --- | --- | --- |
| x | `x` | images, (B, 3, H, W) or (B, 1, H, W), [0, 1] |
| q | `quality` | 1..100, one for all images or one per image |
| Q | return value of `_quantisation` | the standard's 8x8 quantisation table, scaled by quality as libjpeg does |
| Y, Cb, Cr | `luma`, `chroma` | planes in [0, 255]; both chroma planes at half size |
| D | `dct` | orthonormal 8x8 DCT matrix; the coefficients of a block b are D b D^T |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentindigo.filters import Number, dct_matrix, straight_through

__all__ = ["jpeg", "luma_tables"]

# Annex K of the JPEG standard, which libjpeg scales by quality.
_LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
) + ((99,) * 8,) * 4
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def _quantisation(table: tuple[tuple[int, ...], ...], quality: Tensor) -> Tensor:
    """Return libjpeg's table for each quality, (B, 1, 1, 1, 8, 8)."""
    scale = torch.where(quality < 50, torch.floor(5000 / quality), 200 - 2 * quality).reshape(-1, 1, 1, 1, 1, 1)
    base = torch.tensor(table, dtype=quality.dtype, device=quality.device)
    return torch.floor((base * scale + 50) / 100).clamp(1, 255)


def luma_tables(qualities: Sequence[float]) -> Float[Tensor, "n 8 8"]:
    """Steps of the luma's coefficients for each quality, rows of vertical frequency, as libjpeg scales them.

    Args:
        qualities: Qualities, 1..100.

    Returns:
        (n, 8, 8) whole numbers, float32.
    """
    return _quantisation(_LUMA_TABLE, torch.tensor(qualities, dtype=torch.float32)).reshape(-1, 8, 8)


def _code_plane(plane: Tensor, table: Tensor) -> Tensor:
    """Transform, quantise and transform back planes (B, C, h, 8n) in [0, 255]; h is padded to a multiple of 8."""
    plane = F.pad(plane, (0, 0, 0, -plane.shape[-2] % 8), mode="replicate")
    batch, channels, height, width = plane.shape
    dct = dct_matrix(8).to(plane)
    blocks = (plane - 128).reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    coefficients = dct @ blocks @ dct.T
    # libjpeg's integer transform gives rows in units of 1/(4 sqrt 8) and coefficients in units of 1/8, and its
    # quantiser rounds halves away from zero. On that grid halves are frequent, so the result hangs on doing the same.
    with torch.no_grad():
        rows = torch.floor(4 * math.sqrt(8) * (blocks @ dct.T) + 0.5)
        eighths = torch.floor(math.sqrt(8) / 4 * (dct @ rows) + 0.5)
        levels = torch.floor((eighths.abs() + 4 * table) / (8 * table)) * eighths.sign()
    coefficients = straight_through(coefficients, levels * table)
    blocks = (dct.T @ coefficients @ dct).transpose(3, 4)
    out = blocks.reshape(plane.shape) + 128
    return straight_through(out, torch.round(out)).clamp(0, 255)


def _halve_chroma(chroma: Tensor) -> Tensor:
    """Average 2x2 pixels with libjpeg's rounding, whose bias alternates 1, 2 along a row to cancel on average."""
    total = F.avg_pool2d(chroma, 2) * 4
    bias = 1 + torch.arange(total.shape[-1], dtype=total.dtype, device=total.device) % 2
    mean = total / 4
    return straight_through(mean, torch.floor((torch.round(total) + bias) / 4))


def _double_chroma(chroma: Tensor) -> Tensor:
    """Double the size with libjpeg's "fancy" triangle filter: 3/4 of the nearer and 1/4 of the farther sample."""
    batch, channels, height, width = chroma.shape
    padded = F.pad(chroma, (1, 1, 1, 1), mode="replicate")
    centre = padded[..., 1:-1, :] * 3
    rows = torch.stack((centre + padded[..., :-2, :], centre + padded[..., 2:, :]), dim=-2)
    rows = rows.reshape(batch, channels, 2 * height, width + 2)
    centre = rows[..., 1:-1] * 3
    total = torch.stack((centre + rows[..., :-2], centre + rows[..., 2:]), dim=-1)
    bias = torch.tensor([8.0, 7.0], dtype=chroma.dtype, device=chroma.device)
    value = torch.floor((torch.round(total) + bias) / 16)
    return straight_through(total / 16, value).reshape(batch, channels, 2 * height, 2 * width)


def jpeg(x: Float[Tensor, "b c h w"], quality: Number | Float[Tensor, " n"]) -> Float[Tensor, "b c h w"]:
    """Pass images through JPEG 4:2:0 as libjpeg codes it, without the (lossless) entropy coding.

    Steps: 8-bit rounding, RGB to YCbCr, 2x2 mean of chroma, 8x8 DCT, quantisation by the standard tables at libjpeg's
    quality scaling, and back with the triangle upsampling of chroma. Each rounding passes its gradient straight
    through, so the result is differentiable in `x`. Agrees with Pillow's codec far above 40 dB.

    Args:
        x: Images, (B, 3, H, W) or one grey channel, [0, 1]; any size, padded to whole blocks by repeating borders.
        quality: 1..100, one for all images or one per image.

    Returns:
        Decoded images of the same shape, in [0, 1] on the 8-bit grid.

    Raises:
        ValueError: If a quality is outside 1..100, there is not one per image, or channels are neither 1 nor 3.
    """
    batch, channels, height, width = x.shape
    if channels not in (1, 3):
        raise ValueError(f"jpeg needs 1 or 3 channels, got {channels}; split off alpha first")
    work = x.to(torch.promote_types(x.dtype, torch.float32)) * 255
    factor = torch.as_tensor(quality, dtype=work.dtype, device=work.device).reshape(-1)
    if factor.numel() not in (1, batch):
        raise ValueError(f"jpeg needs one quality or one per image, got {factor.numel()} for {batch} images")
    if bool(((factor < 1) | (factor > 100)).any()):
        raise ValueError(f"jpeg quality must be in 1..100, got {factor.tolist()}")
    work = straight_through(work, torch.round(work)).clamp(0, 255)
    # libjpeg extends the width before it halves the chroma, but the height, beyond an even number, only after it.
    unit = 8 if channels == 1 else 16
    work = F.pad(work, (0, -width % unit, 0, -height % (unit // 8)), mode="replicate")
    if channels == 1:
        decoded = _code_plane(work, _quantisation(_LUMA_TABLE, factor))
    else:
        offset = torch.tensor([0.0, 128.0, 128.0], dtype=work.dtype, device=work.device).reshape(1, 3, 1, 1)
        to_ycc, to_rgb = (torch.tensor(m, dtype=work.dtype, device=work.device) for m in (_TO_YCC, _TO_RGB))
        ycc = torch.einsum("ij,bjhw->bihw", to_ycc, work) + offset
        ycc = straight_through(ycc, torch.round(ycc)).clamp(0, 255)
        luma = _code_plane(ycc[:, :1], _quantisation(_LUMA_TABLE, factor))[..., :height, :width]
        chroma = _code_plane(_halve_chroma(ycc[:, 1:]), _quantisation(_CHROMA_TABLE, factor))
        # The decoder knows the true size of the halved planes, so the padding must not leak into the upsampling.
        chroma = _double_chroma(chroma[..., : (height + 1) // 2, : (width + 1) // 2])[..., :height, :width]
        decoded = torch.einsum("ij,bjhw->bihw", to_rgb, torch.cat((luma, chroma), dim=1) - offset)
        decoded = straight_through(decoded, torch.round(decoded))
    return (decoded[..., :height, :width].clamp(0, 255) / 255).to(x.dtype)
