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
    channels = x.shape[1]
    smooth = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    kernel = smooth.new_tensor([0.25, 0.5, 0.25])
    column = kernel.view(1, 1, 3, 1).expand(channels, 1, 3, 1)
    row = kernel.view(1, 1, 1, 3).expand(channels, 1, 1, 3)
    for level in range(levels):
        hole = 2**level
        smooth = F.pad(smooth, (hole, hole, hole, hole), mode="replicate")
        smooth = F.conv2d(smooth, column, dilation=(hole, 1), groups=channels)
        smooth = F.conv2d(smooth, row, dilation=(1, hole), groups=channels)
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
