"""Degradations as data: the steps a drawn degradation consists of, and how they are applied to images.

A degradation is drawn first, as data (`Degradation`, a tuple of steps), and applied second, so the same draw can be
applied with and without its noise and its JPEG: the second form is what the coarse part of the invertible network is
meant to simulate.

| symbol | here | meaning |
| --- | --- | --- |
| x | `x` | clean image, (B, C, H, W), [0, 1] |
| y | return value of `apply` | degraded image, (B, C, H/s, W/s), [0, 1] |
| s | `Degradation.scale` | integer downsampling factor |
| k | `BlurStep.kernel` | blur kernel, (k, k) or (B, k, k), sums to 1 |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.filters import Number, ResizeMode, add_gaussian_noise, add_poisson_noise, blur, resize, round8

# `apply` has a switch named `jpeg`, which hides the function of that name inside it.
from latentindigo.jpeg import jpeg as tensor_jpeg

__all__ = [
    "BlurStep",
    "Degradation",
    "JpegFunction",
    "JpegStep",
    "NoiseStep",
    "PoissonStep",
    "ResizeStep",
    "RoundStep",
    "Step",
    "Summary",
    "apply",
]

JpegFunction = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class BlurStep:
    """Blur on the grid of the moment; `sigma` is the larger nominal axis, `spread` the sigma of a Gaussian like it."""

    kernel: Tensor
    sigma: Number
    spread: Number


@dataclass(frozen=True)
class ResizeStep:
    """Resize to `factor` times the size of y, so 1 ends on y's grid whatever came before."""

    factor: Number
    mode: ResizeMode = "bicubic"
    antialias: bool = True


@dataclass(frozen=True, eq=False)
class NoiseStep:
    """Gaussian noise of standard deviation `sigma` in [0, 1] units; `mix` makes it correlated across channels."""

    sigma: Number
    grey: bool = False
    mix: Tensor | None = None


@dataclass(frozen=True)
class PoissonStep:
    """Shot noise, see `add_poisson_noise`."""

    strength: Number
    grey: bool = False


@dataclass(frozen=True)
class RoundStep:
    """Rounding to 8 bit; counts as noise."""


@dataclass(frozen=True)
class JpegStep:
    """JPEG 4:2:0 of the given quality."""

    quality: int


Step = BlurStep | ResizeStep | NoiseStep | PoissonStep | RoundStep | JpegStep


class Summary(NamedTuple):
    """The three numbers a degradation is described by.

    Attributes:
        blur: Gaussian-equivalent sigma in quarter pixels of y: the sigma in output pixels at scale 4, 4 sigma/s at s.
            At most 8, two pixels of y: what is blurred more looks the same.
        noise: Standard deviation in [0, 1] units that reaches y.
        jpeg: (100 - quality)/100 of the last JPEG, 0 without one.
    """

    blur: float
    noise: float
    jpeg: float


@dataclass(frozen=True)
class Degradation:
    """A drawn degradation: plain numbers and kernels, nothing random left but the noise samples themselves."""

    scale: int
    steps: tuple[Step, ...]

    def summary(self) -> Summary:
        """Return blur, noise and JPEG strength as they arrive on y's grid.

        Exact for one blur, one downsampling, one noise and one JPEG. For recipes with several of each it is an
        estimate: variances are carried through the steps as if all noise were white.
        """
        pitch = 1 / self.scale
        blur_variance = noise_variance = jpeg_strength = 0.0
        for step in self.steps:
            match step:
                case BlurStep():
                    blur_variance += (step.spread * pitch) ** 2
                    noise_variance *= float((step.kernel**2).sum())
                case ResizeStep():
                    new_pitch = 1 / step.factor
                    # A grid coarser than y's cannot be undone by going back up: it blurs like 0.375 of its pixel,
                    # the Gaussian whose response halves at that grid's Nyquist frequency.
                    blur_variance += 0.375**2 * max(0.0, max(new_pitch, 1) ** 2 - max(pitch, 1) ** 2)
                    if new_pitch > pitch and (step.antialias or step.mode == "area"):
                        noise_variance *= (pitch / new_pitch) ** 2
                    pitch = new_pitch
                case NoiseStep():
                    noise_variance += step.sigma**2
                case PoissonStep():
                    noise_variance += step.strength**2 * 0.5 / 256
                case JpegStep():
                    jpeg_strength = (100 - step.quality) / 100
                case RoundStep():
                    pass
        return Summary(min(8.0, 4 * math.sqrt(blur_variance)), math.sqrt(noise_variance), jpeg_strength)


def apply(
    x: Float[Tensor, "b c h w"],
    params: Degradation,
    generator: torch.Generator,
    noise: bool = True,
    jpeg: bool | JpegFunction = True,
) -> Float[Tensor, "b c h2 w2"]:
    """Apply one drawn degradation to every image of a batch.

    Args:
        x: Clean images, (B, C, H, W), [0, 1]; H and W must be multiples of the scale.
        params: What to do, from one of the `draw_*` functions or `StandardDegradation.params`.
        generator: Source of the noise samples.
        noise: False leaves out noise and 8-bit rounding but keeps blurs and resizes.
        jpeg: False leaves JPEG out, True takes the tensor codec, a function (x, quality) -> x takes that one.

    Returns:
        (B, C, H/s, W/s) images in [0, 1].

    Raises:
        ValueError: If the size is not a multiple of the scale.
    """
    height, width = x.shape[-2:]
    if height % params.scale or width % params.scale:
        raise ValueError(f"image size must be a multiple of scale {params.scale}, got {height}x{width}; crop it first")
    target = (height // params.scale, width // params.scale)
    codec: JpegFunction | None = tensor_jpeg if jpeg is True else (jpeg or None)
    y = x
    for step in params.steps:
        match step:
            case BlurStep():
                y = blur(y, step.kernel).clamp(0, 1)
            case ResizeStep():
                size = (max(1, round(step.factor * target[0])), max(1, round(step.factor * target[1])))
                y = resize(y, size, step.mode, antialias=step.antialias).clamp(0, 1)
            case NoiseStep() if noise:
                y = add_gaussian_noise(y, step.sigma, generator, grey=step.grey, mix=step.mix)
            case PoissonStep() if noise:
                y = add_poisson_noise(y, step.strength, generator, grey=step.grey)
            case RoundStep() if noise:
                y = round8(y)
            case JpegStep() if codec is not None:
                y = codec(y, step.quality)
            case _:
                pass  # noise or JPEG that the caller left out
    if tuple(y.shape[-2:]) != target:
        y = resize(y, target)
    return y.clamp(0, 1)
