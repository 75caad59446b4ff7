"""How far a network looks, measured: what tiles must overlap by, for networks that nobody here has built.

A network's receptive field on paper says little. Attention and group normalisation look everywhere in principle and
hardly anywhere in effect. So one place of the input is changed, and the reach is the distance beyond which the output
moves by less than a small share of what it moves by at that place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["reach_of"]

SHARE = 0.01
STEP = 0.5


@torch.no_grad()
def reach_of(
    fn: Callable[[Tensor], Tensor], x: Float[Tensor, "b c h w"], share: float = SHARE, step: float = STEP
) -> float:
    """Distance at which an image-to-image function stops noticing a change.

    Args:
        fn: Takes `x` and returns (B, C', h s, w s) for some scale s.
        x: An input as the function meets it.
        share: Of the largest response; what lies below it counts as nothing.
        step: The change, added to every channel of the middle pixel.

    Returns:
        Pixels of `x` from the middle of the changed one to the middle of the farthest that still answers, at most half
        of the longer side; 0 for a function that does not answer at all.
    """
    changed = x.clone()
    row, column = x.shape[-2] // 2, x.shape[-1] // 2
    changed[..., row, column] += step
    # On the CPU from here: an accelerator may lack float64, and the middle below lies on the CPU.
    response = (fn(changed).float() - fn(x).float()).abs().amax((0, 1)).cpu()
    seen = (response > share * response.max()).nonzero().to(torch.float64)
    if not len(seen):
        return 0.0
    scale = response.shape[-1] / x.shape[-1]
    # The changed pixel covers `scale` pixels of the output, or a part of one.
    distance = ((seen + 0.5) / scale - torch.tensor([row + 0.5, column + 0.5], dtype=torch.float64)).abs().amax()
    return float(distance)
