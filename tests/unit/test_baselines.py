"""Simple restorers, the pipeline as a restorer, the true operators, and what solvers refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from latentindigo.baselines import (
    Bicubic,
    Downsampled,
    EstimatorAlone,
    Lanczos,
    Pipeline,
    Restorer,
    RoundTrip,
    true_noise,
    true_operator,
)
from latentindigo.degradations import STANDARD, degrade, gaussian_kernel
from latentindigo.images import pil_resize
from latentindigo.operators import Operator, Scale
from latentindigo.pipeline import RestorationPipeline
from latentindigo.prior import LatentPrior
from latentindigo.rivals import DiffBIRGuidance, LatentDPS, SDEdit
from latentindigo.solver import LatentSolver
from tolerances import assert_close
from toys import gaussian_prior

FIXED = [name for name, degradation in STANDARD.items() if not degradation.second_order]


def photos(height: int, width: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def toy_prior() -> LatentPrior:
    return gaussian_prior(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), "v_prediction")


# --- restorers -------------------------------------------------------------------------------------------------------

RESTORERS: dict[str, Callable[[RestorationPipeline], Restorer]] = {
    "bicubic": lambda pipe: Bicubic(),
    "lanczos": lambda pipe: Lanczos(),
    "round-trip": lambda pipe: RoundTrip(pipe.prior),
    "estimator": EstimatorAlone,
    "latentindigo": lambda pipe: Pipeline(pipe, steps=2),
    "latent-dps": lambda pipe: LatentDPS(pipe.prior, Scale(2), steps=2),
    "diffbir": lambda pipe: DiffBIRGuidance(pipe.prior, EstimatorAlone(pipe), steps=2),
}


@pytest.mark.parametrize("name", RESTORERS)
def test_restorers_keep_the_contract(name: str, tiny_pipeline: RestorationPipeline) -> None:
    restorer, y, weights = RESTORERS[name](tiny_pipeline), photos(5, 7), tiny_pipeline.weights_hash()
    kept = y.clone()
    restored = restorer(y, 2, [0, 1])
    assert isinstance(restorer, Restorer)
    assert restorer.name == name
    assert restored.shape == (2, 3, 10, 14)
    assert float(restored.min()) >= 0
    assert float(restored.max()) <= 1
    assert torch.equal(restorer(y, 2, [0, 1]), restored)
    assert_close(restorer(y[1:], 2, [1])[0], restored[1])
    assert torch.equal(y, kept)
    assert tiny_pipeline.weights_hash() == weights


def test_one_class_is_enough_to_be_compared() -> None:
    class Grey:
        name, nfe = "grey", 0

        def __call__(self, y: Tensor, scale: int, seeds: Sequence[int]) -> Tensor:
            return torch.full((len(y), 3, y.shape[-2] * scale, y.shape[-1] * scale), 0.5)

    restorer: Restorer = Grey()
    assert isinstance(restorer, Restorer)
    assert not isinstance(object(), Restorer)


def test_enlargements_are_pillows() -> None:
    y = photos(6, 9)
    assert torch.equal(Bicubic()(y, 3), pil_resize(y, (27, 18)).clamp(0, 1))
    assert torch.equal(Lanczos()(y, 3), pil_resize(y, (27, 18), "lanczos").clamp(0, 1))
    assert torch.equal(Bicubic()(y, 1), y)


def test_a_lossless_autoencoder_gives_the_image_back_whatever_its_size() -> None:
    y = photos(5, 7)
    assert_close(RoundTrip(toy_prior())(y, 1), y)


def test_the_estimator_is_the_pipelines(tiny_pipeline: RestorationPipeline) -> None:
    y = photos(8, 8)
    with torch.no_grad():
        gamma = tiny_pipeline.degradation_encoder(y)
        expected = tiny_pipeline.estimator(y, gamma, 2).clamp(0, 1)
    assert torch.equal(EstimatorAlone(tiny_pipeline)(y, 4), expected)
    with pytest.raises(ValueError, match="1, 2 or 4, got 3"):
        EstimatorAlone(tiny_pipeline)(y, 3)


def test_the_pipeline_is_called_with_its_settings(tiny_pipeline: RestorationPipeline) -> None:
    y, settings = photos(8, 8), {"steps": 3, "method": "unguided", "init": "encode"}
    out = tiny_pipeline(y, 2.0, seed=[5, 6], output_type="pt", **settings)
    assert torch.equal(Pipeline(tiny_pipeline, **settings)(y, 2, [5, 6]), torch.stack(out.images))
    with pytest.raises(ValueError, match="num_samples, seed"):
        Pipeline(tiny_pipeline, seed=1, num_samples=2)


@pytest.mark.parametrize(
    "settings", [{}, {"preset": "faithful"}, {"fidelity": 0.8}, {"steps": 2}, {"preset": "vivid", "steps": None}]
)
def test_the_pipeline_states_its_evaluations(settings: dict[str, Any], tiny_pipeline: RestorationPipeline) -> None:
    out = tiny_pipeline(photos(8, 8, 1), 2.0, output_type="pt", **settings)
    assert Pipeline(tiny_pipeline, **settings).nfe == out.calls["total"]["denoiser"]


# --- true operators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
def test_the_true_operator_is_what_the_degradation_does(name: str) -> None:
    x = photos(32, 32)
    operator = true_operator(name)
    y = degrade(x, name, torch.Generator(), jpeg=False, noise=False)
    assert isinstance(operator, Operator)
    assert operator.scale == STANDARD[name].scale
    # y is rounded to 8 bits and clamped, the operator does neither.
    torch.testing.assert_close(operator.forward(x).clamp(0, 1), y, atol=0.501 / 255, rtol=0)


@pytest.mark.parametrize("name", FIXED)
def test_the_true_noise_is_what_the_degradation_adds(name: str) -> None:
    assert true_noise(name) * 255 == pytest.approx(STANDARD[name].noise)


@pytest.mark.parametrize("truth", [true_operator, true_noise])
def test_no_truth_is_told_where_there_is_none(truth: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"anew for each image.*operators\.Scale"):
        truth("random")
    with pytest.raises(ValueError, match="unknown degradation 'medum'; known: mild"):
        truth("medum")


def test_without_blur_and_scale_the_operator_is_the_identity() -> None:
    x = photos(6, 9)
    for operator in (true_operator("noise15"), Downsampled(None, 1)):
        assert torch.equal(operator.forward(x), x)
        assert torch.equal(operator.adjoint(x), x)
        assert torch.equal(operator.initial(x), x)
        assert_close(operator.project(torch.zeros_like(x), x), x)


def test_downsampling_without_blur_is_scale() -> None:
    x = photos(8, 12)
    assert torch.equal(Downsampled(None, 2).forward(x), Scale(2).forward(x))
    assert_close(Downsampled(None, 2).pinv(x, 0.05), Scale(2).pinv(x, 0.05))


def test_half_precision_is_inverted_in_single() -> None:
    operator, y = Downsampled(gaussian_kernel(5, 0.8), 2), photos(8, 12)
    inverse = operator.pinv(y.bfloat16())
    assert inverse.dtype == torch.bfloat16
    assert_close(inverse.float(), operator.pinv(y.bfloat16().float()), torch.bfloat16)


# --- refusals --------------------------------------------------------------------------------------------------------


def no_estimator(pipe: RestorationPipeline) -> RestorationPipeline:
    parts = {name: part for name, part in pipe.components.items() if name != "estimator"}
    return RestorationPipeline(estimator=None, **parts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda prior, y: SDEdit(prior, steps=0), "at least 1 step"),
        (lambda prior, y: SDEdit(prior, strength=0.0), r"\(0, 1\]"),
        (lambda prior, y: SDEdit(prior, strength=1.5), "strength=1.5"),
        (lambda prior, y: LatentDPS(prior, Scale(2), zeta=-1.0), "zeta must be a finite number of at least 0, got -1"),
        (lambda prior, y: LatentDPS(prior, Scale(2), noise=float("nan")), "noise must be"),
        (lambda prior, y: SDEdit(prior, steps=2)(y, 2, [1]), "1 seeds for 2 images"),
        (lambda prior, y: LatentDPS(prior, Scale(2), steps=2)(y, 4, [1, 2]), "operator, 2, got 4"),
        (lambda prior, y: SDEdit(prior, steps=2, eta=2.0)(y, 2, [1, 2]), "lower eta or zeta"),
        (lambda prior, y: Downsampled(None, 2).pinv(y, -0.1), ">= 0"),
        (lambda prior, y: Downsampled(torch.ones(2, 2) / 4, 2), "odd sides"),
        (lambda prior, y: Downsampled(None, 0), "at least 1"),
    ],
)
def test_refusals_say_what_to_do(call: Callable[[LatentPrior, Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(toy_prior(), photos(4, 4))


def test_an_estimator_is_needed_to_be_one(tiny_pipeline: RestorationPipeline) -> None:
    with pytest.raises(ValueError, match="use Bicubic"):
        EstimatorAlone(no_estimator(tiny_pipeline))


def test_settings_are_frozen_and_a_solver_has_to_say_how_it_advances() -> None:
    solver = SDEdit(toy_prior())
    with pytest.raises(FrozenInstanceError):
        solver.steps = 3  # pyright: ignore[reportAttributeAccessIssue]  # the refusal is what is tested
    with pytest.raises(NotImplementedError):
        LatentSolver(toy_prior(), steps=1)(photos(4, 4), 2, [0, 1])
