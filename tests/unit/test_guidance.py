"""Guidance's plain behaviour: settings and their messages, known operators, regularisers by name, half precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from latentindigo.guidance import (
    REGULARISERS,
    ForwardModel,
    GuidanceConfig,
    LatentINN,
    LearnedForward,
    LinearForward,
    PixelINN,
    Regulariser,
    draw_noise,
    make_regulariser,
)
from latentindigo.inn import InvertibleNet
from latentindigo.operators import Blur, Mask, Scale
from latentindigo.prior import Calls, LatentPrior
from tolerances import assert_close, in_dtype, randomise_
from toys import gaussian_prior, randn

GAMMA_DIM = 6


def make_inn(channels: int = 3) -> InvertibleNet:
    net = InvertibleNet(channels=channels, gamma_dim=GAMMA_DIM, hidden=6, blocks=1, num_steps=1, offset=0.0)
    return randomise_(net, 1, 0.5).eval().requires_grad_(False)


def make_prior() -> LatentPrior:
    return gaussian_prior(DDIMScheduler(clip_sample=False)).counting(Calls())


def pixels(batch: int = 1, size: int = 16) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["w_c", "w_d", "zeta", "noise_weight", "shrink", "regulariser_weight", "refine_lr"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0, got"):
        dataclasses.replace(GuidanceConfig(), **{name: value})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 1.5}, r"beta must lie in \[0, 1\].*got 1.5"),
        ({"beta": float("nan")}, "beta must lie in"),
        ({"every_k": 0}, "every_k must be at least 1, got 0"),
        ({"regulariser": "glue"}, "one of consistency, gluing, renoise, trust, got 'glue'"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**wrong)


@pytest.mark.parametrize("name", REGULARISERS)
def test_regularisers_are_made_by_name(name: str) -> None:
    made = make_regulariser(GuidanceConfig(regulariser=name, regulariser_weight=0.7), make_prior())
    assert type(made) is REGULARISERS[name]
    assert made.weight == 0.7


def test_no_regulariser_does_nothing() -> None:
    prior, z = make_prior(), randn(1, 12, 4, 4)
    made = make_regulariser(GuidanceConfig(), prior)
    data = LatentINN(
        prior,
        LearnedForward(make_inn(12), torch.zeros(1, GAMMA_DIM), 1),
        randn(1, 12, 2, 2),
        64,
        GuidanceConfig(),
        torch.zeros(1),
    )
    assert type(made) is Regulariser
    # The very same objects, so that the loop can see that nothing was changed.
    assert made.limit(z, 0.5) is z
    assert made.pull(z, data) is z
    assert made.renoise(z, z, 0.8, 0.6, [torch.Generator()]) is z
    assert prior.calls == Calls()


def test_noise_is_drawn_image_by_image() -> None:
    def draw(*seeds: int, dtype: torch.dtype = torch.float32) -> Tensor:
        like = torch.zeros(len(seeds), 4, 8, 8, dtype=dtype)
        return draw_noise(like, [torch.Generator().manual_seed(s) for s in seeds])

    assert torch.equal(draw(1, 2)[1:], draw(2))
    assert not torch.equal(draw(1), draw(2))
    assert draw(0).dtype == torch.float32
    # Float64 runs see the numbers of float32 runs.
    assert torch.equal(draw(5, dtype=torch.float64).float(), draw(5))


# --- known operators -------------------------------------------------------------------------------------------------


def motion(length: int = 5) -> Tensor:
    return torch.full((1, length), 1.0 / length)


def some_mask(size: int = 16) -> Tensor:
    return (torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(4)) > 0.3).float()


OPERATORS: dict[str, Any] = {"blur": Blur(motion()), "mask": Mask(some_mask()), "scale": Scale(2)}


@pytest.mark.parametrize("name", OPERATORS)
def test_known_operator_takes_the_place_of_the_inn(name: str) -> None:
    operator = OPERATORS[name]
    prior, clean = make_prior(), pixels()
    y = operator.forward(clean)
    model = LinearForward(operator)
    assert isinstance(model, ForwardModel)
    data = PixelINN(prior, model, y, 256, GuidanceConfig(beta=1.0, zeta=1.0), torch.zeros(1))
    z0 = prior.encode(0.8 * pixels() + 0.1 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)))
    one = torch.ones(1)
    before = data.loss(z0)
    assert data.loss(z0 + data.projection(z0, one)) < 0.2 * before
    assert data.loss(z0 + 1e-2 * data.descent(z0, one)) < before
    # An image that fits the measurement is not touched.
    fitting = prior.encode(clean)
    assert_close(fitting + data.projection(fitting, one), fitting)
    data.refine(z0)


def test_details_of_the_wrong_kind_are_refused() -> None:
    x = pixels()
    learned = LearnedForward(make_inn(), torch.zeros(1, GAMMA_DIM), 1)
    coarse, _ = learned.split(x)
    with pytest.raises(TypeError, match="what its split returned, got Tensor"):
        learned.merge(coarse, x)
    with pytest.raises(TypeError, match="the image itself, got tuple"):
        LinearForward(Scale(2)).merge(coarse, (x,))


def test_known_operator_has_nothing_to_refine() -> None:
    prior = make_prior()
    data = PixelINN(prior, LinearForward(Scale(2)), pixels(size=8), 256, GuidanceConfig(refine=True), torch.zeros(1))
    z0 = randn(1, 12, 8, 8)
    before = data.loss(z0)
    data.refine(z0)
    assert torch.equal(data.loss(z0), before)


# --- costs and refinement --------------------------------------------------------------------------------------------


def test_passes_of_the_network_are_counted() -> None:
    passes: list[int] = []
    model = LearnedForward(make_inn(), torch.zeros(2, GAMMA_DIM), 1, 1e-3, passes.append)
    x = pixels(2)
    coarse, details = model.split(x)
    model.merge(coarse, details)
    model.refine([(x, coarse, None)])
    # One per pass of the whole batch, however many private copies work on it.
    assert passes == [1, 1, 1]


def test_without_a_learning_rate_nothing_is_refined() -> None:
    passes: list[int] = []
    inn = make_inn()
    model = LearnedForward(inn, torch.zeros(1, GAMMA_DIM), 1, None, passes.append)
    x = pixels()
    before = model.split(x)[0]
    model.refine([(x, before + 1, None)])
    assert torch.equal(model.split(x)[0], before)
    assert passes == [1, 1]


def test_refinement_is_off_by_default() -> None:
    prior = make_prior()
    model = LearnedForward(make_inn(), torch.zeros(1, GAMMA_DIM), 1, 1e-2)
    data = PixelINN(prior, model, pixels(size=8), 256, GuidanceConfig(), torch.zeros(1))
    z0 = randn(1, 12, 8, 8)
    before = data.loss(z0).detach()
    data.refine(z0)
    assert torch.equal(data.loss(z0).detach(), before)
    assert prior.calls.decoder == 2


def test_refinement_decodes_for_pixels_only() -> None:
    prior = make_prior()
    z0, config = randn(1, 12, 8, 8), GuidanceConfig(refine=True)
    pixel = LearnedForward(make_inn(), torch.zeros(1, GAMMA_DIM), 1, 1e-3)
    PixelINN(prior, pixel, pixels(size=8), 256, config, torch.zeros(1)).refine(z0)
    assert prior.calls == Calls(decoder=1)
    latent = LearnedForward(make_inn(12), torch.zeros(1, GAMMA_DIM), 1, 1e-3)
    LatentINN(prior, latent, randn(1, 12, 4, 4), 256, config, torch.zeros(1)).refine(z0)
    assert prior.calls == Calls(decoder=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_refinement_of_half_precision_networks_takes_small_steps(dtype: torch.dtype) -> None:
    # In half precision a step of 5e-5 would be rounded away (bfloat16), or end as 0/0 in Adam (float16).
    x, inn = pixels(), in_dtype(make_inn(), dtype)
    gamma = randn(1, GAMMA_DIM, seed=6).to(dtype)
    model = LearnedForward(inn, gamma, 1, 5e-5)
    coarse, _ = model.split(x)
    target = coarse.detach() + 0.3 * randn(*coarse.shape, seed=7)
    errors: list[float] = []
    for _ in range(8):
        errors.append(float((model.split(x)[0].detach() - target).square().mean()))
        model.refine([(x, target, None)])
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)
    assert {parameter.dtype for parameter in inn.parameters()} == {dtype}


def test_the_norm_is_the_papers_at_512_pixels() -> None:
    prior = make_prior()
    model = LearnedForward(make_inn(12), torch.zeros(1, GAMMA_DIM), 1)
    z0, target = randn(1, 12, 8, 8), randn(1, 12, 4, 4, seed=1)
    data = LatentINN(prior, model, target, 512 * 512, GuidanceConfig(w_c=2.0, w_d=0.5), torch.zeros(1))
    coarse, details = model.split(z0)
    expected = 2.0 * (target - coarse).norm() + 0.5 * (model.merge(target, details) - z0).norm()
    assert_close(data.loss(z0), expected[None])
    # Another unit of the residuals is another factor on the loss, and so on every step.
    doubled = LatentINN(prior, model, target, 512 * 512, data.config, torch.zeros(1), unit=2.0)
    assert_close(doubled.loss(z0), 2 * expected[None])


def test_perfect_agreement_has_a_gradient_of_zero() -> None:
    # The norm has a corner there; its square root must not give NaN.
    prior = make_prior()
    model = LearnedForward(make_inn(12), torch.zeros(1, GAMMA_DIM), 1)
    z0 = randn(1, 12, 8, 8)
    data = LatentINN(prior, model, model.split(z0)[0], 256, GuidanceConfig(w_d=0.0), torch.zeros(1))
    assert torch.equal(data.descent(z0, torch.ones(1)), torch.zeros_like(z0))
