"""Colour correction: give a restored image the low frequencies of a trusted reference.

Diffusion models drift in colour and brightness over large areas, while the degraded input is right there. The à-trous
wavelet transform splits both images into fine detail and a smooth rest; the result has the detail of the one and the
rest of the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["low_pass", "wavelet_color_fix"]

DEFAULT_LEVELS = 5


def low_pass(x: Float[Tensor, "b c h w"], levels: int = DEFAULT_LEVELS) -> Float[Tensor, "b c h w"]:
    """Smooth rest of the à-trous ("with holes") wavelet transform.

    | here | formula |
    |---|---|
    | `kernel` | h = [1, 2, 1] / 4 along both axes, its taps 2^j pixels apart at level j |
    | return value | c_J, with c_0 = x and c_{j+1} = h_j ∗ c_j |

    The cascade is close to a Gaussian whose variance is Σ_j 4^j / 2, so σ is 13 pixels for 5 levels. The border is
    continued by its outermost pixels, which works for an image of any size, and a constant stays constant.

    Args:
        x: Image, (B, C, H, W), any range.
        levels: Number of levels J, at least 1.

    Returns:
        The smooth part, same shape and dtype; float16 and bfloat16 are summed in float32.

    Raises:
        ValueError: `levels` is below 1.
    """
    if levels < 1:
        raise ValueError(f"low_pass: expected at least 1 level, got {levels}; 5 is usual")
    smooth = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    for level in range(levels):
        hole = 2**level
        for dim in (-2, -1):
            side = smooth.shape[dim]
            pad = (hole, hole, 0, 0) if dim == -1 else (0, 0, hole, hole)
            # Sums of shifted copies: a twentieth of the time of a convolution with holes on a CPU.
            wide = F.pad(smooth, pad, mode="replicate")
            neighbours = wide.narrow(dim, 0, side) + wide.narrow(dim, 2 * hole, side)
            smooth = neighbours.mul_(0.25).add_(smooth, alpha=0.5)
    return smooth.to(x.dtype)


def wavelet_color_fix(
    x: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"], levels: int = DEFAULT_LEVELS
) -> Float[Tensor, "b c h w"]:
    """Wavelet colour correction: x − low(x) + low(reference).

    Args:
        x: Restored image, (B, C, H, W), whose detail is kept.
        reference: Image of the same size, for instance the degraded input enlarged, whose colours are trusted.
        levels: Levels of the transform; each doubles the size of what counts as detail.

    Returns:
        The corrected image, same shape; not clamped, so the correction can be undone or averaged.

    Raises:
        ValueError: The shapes differ or `levels` is below 1.
    """
    if x.shape != reference.shape:
        raise ValueError(
            f"wavelet_color_fix: expected one shape, got {tuple(x.shape)} and {tuple(reference.shape)}; resize the "
            "reference to the restored image first"
        )
    # The transform is linear, so one pass over the difference does for both images.
    return x + low_pass(reference - x, levels)
