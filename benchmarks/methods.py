"""Methods that the benchmarks run: the pipeline, the baselines, and the controls that no claim may lose to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentindigo import RestorationPipeline
from latentindigo.data import sample_generator
from latentindigo.degradations import blur, gaussian_kernel
from latentindigo.evaluation import Restored
from latentindigo.images import pil_resize
from latentindigo.metrics import gradient_energy, round8

Restore = Callable[[list[Tensor], list[int]], Restored]
Control = Callable[[Tensor, float, int, torch.Generator], Tensor]


def pipeline(pipe: RestorationPipeline, scale: int, **settings: Any) -> Restore:
    """The pipeline with fixed settings (arguments of its call)."""

    def restore(images: list[Tensor], seeds: list[int]) -> Restored:
        out = pipe(images, scale, seed=seeds, output_type="pt", **settings)
        return Restored(list(out.images), out.calls["total"], out.calls["loop"], out.settings)

    return restore


def bicubic(scale: int) -> Restore:
    """Pillow's bicubic enlargement; at scale 1 the degraded image itself."""

    def restore(images: list[Tensor], seeds: list[int]) -> Restored:
        return Restored([pil_resize(y, (y.shape[-1] * scale, y.shape[-2] * scale)).clamp(0, 1) for y in images])

    return restore


def estimator_alone(pipe: RestorationPipeline, scale: int) -> Restore:
    """The stage-one estimate without any sampling; scale 1, 2 or 4."""
    estimator, encoder = pipe.estimator, pipe.degradation_encoder

    @torch.no_grad()
    def restore(images: list[Tensor], seeds: list[int]) -> Restored:
        outputs: list[Tensor] = []
        for y in images:
            y = y[None].to(estimator.device)
            gamma = encoder(y.to(encoder.dtype)).to(estimator.dtype)
            outputs.append(estimator(y, gamma, round(math.log2(scale)))[0])
        return Restored([x.float().clamp(0, 1).cpu() for x in outputs])

    return restore


def unsharp(x: Tensor, amount: float, scale: int, generator: torch.Generator) -> Tensor:
    """Control: unsharp mask x + amount (x - blur(x)), the cheapest way to more gradient energy."""
    sigma = max(1.0, 0.5 * scale)
    smooth = blur(x, gaussian_kernel(2 * math.ceil(3 * sigma) + 1, sigma))
    return (x + amount * (x - smooth)).clamp(0, 1)


def grain(x: Tensor, amount: float, scale: int, generator: torch.Generator) -> Tensor:
    """Control: grey noise in the band that y's grid (at least 2 pixels) cannot hold, scaled by the local contrast."""
    noise = torch.randn((x.shape[0], 1, *x.shape[-2:]), generator=generator).to(x)
    coarse = [max(1, side // max(2, scale)) for side in x.shape[-2:]]
    low = F.interpolate(noise, size=coarse, mode="bicubic", antialias=True)
    band = noise - F.interpolate(low, size=x.shape[-2:], mode="bicubic", antialias=True)
    window = gaussian_kernel(13, 2.0)
    contrast = (blur(x.square(), window) - blur(x, window).square()).clamp_min(0).sqrt().mean(1, keepdim=True)
    return (x + amount * contrast * band).clamp(0, 1)


def matched(base: Sequence[Tensor], clean: Sequence[Tensor], energy: float, control: Control, scale: int) -> Restore:
    """A control whose gradient energy over the whole set is that of the method it is compared with.

    Args:
        base: Images to start from in the order of the pairs, each (3, H, W): bicubic, or the stage-one estimate.
        clean: The clean images.
        energy: Gradient energy to reach; where the base has more, the base stays as it is.
        control: `unsharp` or `grain`; its amount is found by bisection, 8-bit rounding included.
        scale: Scale of the protocol.

    Returns:
        The restoration of image i, by its number, whatever is passed in.
    """

    def at(amount: float) -> list[Tensor]:
        return [round8(control(x[None], amount, scale, sample_generator(0, i))[0]) for i, x in enumerate(base)]

    low, high = 0.0, 16.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if gradient_energy(at(middle), clean) < energy else (low, middle)
    images = at(low)

    def restore(_: list[Tensor], numbers: list[int]) -> Restored:
        return Restored([images[n] for n in numbers], settings={"amount": round(low, 4)})

    return restore
