"""Controls: sharpness that knows nothing. A claim of realism must beat them at equal gradient energy.

`grain` adds noise in the band that y's grid cannot hold, `unsharp` amplifies what is there. `matched` gives either as
much as it takes to be as rough as the method it stands beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentindigo.data import sample_generator
from latentindigo.degradations import blur, gaussian_kernel
from latentindigo.metrics import gradient_energy, round8

__all__ = ["CONTROLS", "Control", "grain", "matched", "unsharp"]

Control = Callable[[Tensor, float, int, torch.Generator], Tensor]


def unsharp(
    x: Float[Tensor, "b c h w"], amount: float, scale: int, generator: torch.Generator
) -> Float[Tensor, "b c h w"]:
    """Unsharp mask x + amount (x - blur(x)), the cheapest way to more gradient energy.

    Args:
        x: Images in [0, 1].
        amount: Strength, at least 0.
        scale: Output size over input size; the blur is half of it wide, at least 1 pixel.
        generator: Not used.

    Returns:
        Images in [0, 1].
    """
    sigma = max(1.0, 0.5 * scale)
    smooth = blur(x, gaussian_kernel(2 * math.ceil(3 * sigma) + 1, sigma))
    return (x + amount * (x - smooth)).clamp(0, 1)


def grain(
    x: Float[Tensor, "b c h w"], amount: float, scale: int, generator: torch.Generator
) -> Float[Tensor, "b c h w"]:
    """Grey noise in the band that y's grid (at least 2 pixels) cannot hold, scaled by the local contrast.

    Args:
        x: Images in [0, 1].
        amount: Strength, at least 0.
        scale: Output size over input size.
        generator: Draws the noise.

    Returns:
        Images in [0, 1].
    """
    noise = torch.randn((x.shape[0], 1, *x.shape[-2:]), generator=generator).to(x)
    coarse = [max(1, side // max(2, scale)) for side in x.shape[-2:]]
    low = F.interpolate(noise, size=coarse, mode="bicubic", antialias=True)
    band = noise - F.interpolate(low, size=x.shape[-2:], mode="bicubic", antialias=True)
    window = gaussian_kernel(13, 2.0)
    contrast = (blur(x.square(), window) - blur(x, window).square()).clamp_min(0).sqrt().mean(1, keepdim=True)
    return (x + amount * contrast * band).clamp(0, 1)


CONTROLS: dict[str, Control] = {"grain": grain, "unsharp": unsharp}


def matched(
    base: Sequence[Float[Tensor, "3 _ _"]],
    clean: Sequence[Float[Tensor, "3 _ _"]],
    energy: float,
    control: Control,
    scale: int,
) -> tuple[list[Tensor], float]:
    """A control whose gradient energy over the whole set is that of the method it is compared with.

    Args:
        base: Images to start from: bicubic, or the stage-one estimate.
        clean: The clean images, in the same order.
        energy: Gradient energy to reach; where the base has more, the base stays as it is.
        control: `unsharp` or `grain`; its amount is found by bisection, 8-bit rounding included.
        scale: Scale of the protocol.

    Returns:
        The images, rounded to 8 bits, and the amount. Image i has a generator of its own.
    """

    def at(amount: float) -> list[Tensor]:
        return [round8(control(x[None], amount, scale, sample_generator(0, i))[0]) for i, x in enumerate(base)]

    low, high = 0.0, 16.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if gradient_energy(at(middle), clean) < energy else (low, middle)
    return at(low), low
