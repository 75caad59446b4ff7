"""Methods that the benchmarks run, as functions of a list of images: the pipeline, the baselines, and the controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from latentindigo import RestorationPipeline, controls
from latentindigo.baselines import Bicubic, EstimatorAlone, Restorer
from latentindigo.evaluation import Restored

Restore = Callable[[list[Tensor], list[int]], Restored]


def pipeline(pipe: RestorationPipeline, scale: int, **settings: Any) -> Restore:
    """The pipeline with fixed settings (arguments of its call)."""

    def restore(images: list[Tensor], seeds: list[int]) -> Restored:
        out = pipe(images, scale, seed=seeds, output_type="pt", **settings)
        return Restored(list(out.images), out.calls["total"], out.calls["loop"], out.settings)

    return restore


def _one_by_one(restorer: Restorer, scale: int) -> Restore:
    def restore(images: list[Tensor], seeds: list[int]) -> Restored:
        return Restored([restorer(y[None], scale, [s])[0].cpu() for y, s in zip(images, seeds, strict=True)])

    return restore


def bicubic(scale: int) -> Restore:
    """Pillow's bicubic enlargement; at scale 1 the degraded image itself."""
    return _one_by_one(Bicubic(), scale)


def estimator_alone(pipe: RestorationPipeline, scale: int) -> Restore:
    """The stage-one estimate without any sampling; scale 1, 2 or 4."""
    return _one_by_one(EstimatorAlone(pipe), scale)


def matched(
    base: Sequence[Tensor], clean: Sequence[Tensor], energy: float, control: controls.Control, scale: int
) -> Restore:
    """The images of `controls.matched`, found by their number whatever is passed in."""
    images, amount = controls.matched(base, clean, energy, control, scale)

    def restore(_: list[Tensor], numbers: list[int]) -> Restored:
        return Restored([images[n] for n in numbers], settings={"amount": round(amount, 4)})

    return restore
