"""Schedulers by name: class, noise levels and prediction type kept, and what does not fit refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler

from latentindigo.few_steps import SCHEDULERS, make_scheduler
from toys import gaussian_prior, randn

BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.02}
CLASSES = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("saved", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_another_kind_keeps_noise_levels_and_prediction(
    saved: Any, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = saved(**BETAS, prediction_type="v_prediction")
    before = dict(scheduler.config)
    made = make_scheduler(kind, scheduler)
    assert type(made).__name__ == CLASSES[kind]
    assert torch.equal(made.alphas_cumprod, scheduler.alphas_cumprod)
    assert made.config.prediction_type == "v_prediction"
    assert dict(scheduler.config) == before
    assert capsys.readouterr().err == ""


def spread_after(kind: str, steps: int) -> float:
    """Standard deviation of samples from the toy Gaussian, whose own is 0.6."""
    made = make_scheduler(kind, DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"))
    prior = gaussian_prior(made)
    trajectory = prior.trajectory(steps, 1.0)
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    z = randn(4, 12, 16, 16, seed=1)
    for i in range(steps):
        prediction = trajectory.predict(z, i)
        z = trajectory.step(prediction, prediction.z0, z, i, generators)
    assert float(z.mean()) == pytest.approx(0.3, abs=0.05)
    return float(z.std())


def test_second_order_is_what_few_steps_need() -> None:
    # Every kind shrinks the spread in few steps, LCM on a network that was not distilled most of all.
    spread = {kind: spread_after(kind, 8) for kind in SCHEDULERS}
    assert spread["model"] == pytest.approx(spread["ddim"], rel=0.02)
    assert 0.6 - spread["dpm++"] < 0.85 * (0.6 - spread["ddim"]), spread
    assert 0.6 - spread["unipc"] < 0.85 * (0.6 - spread["ddim"]), spread
    assert 0.2 < spread["lcm"] < spread["ddim"] < 0.6


def test_model_is_the_saved_one() -> None:
    scheduler = DDIMScheduler()
    assert make_scheduler("model", scheduler) is scheduler


@pytest.mark.parametrize("kind", ["dpm++", "unipc", "euler"])
def test_flow_matching_keeps_its_shift(kind: str) -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = make_scheduler(kind, own)
    levels, expected = (gaussian_prior(scheduler).trajectory(4, 0.7) for scheduler in (made, own))
    assert levels.alpha_sigma(2) == pytest.approx(expected.alpha_sigma(2), abs=1e-4)
    # The kinds lead from one to another.
    assert type(make_scheduler("euler", made)).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert make_scheduler("euler", made).config.shift == 3.0


@pytest.mark.parametrize("kind", ["ddim", "lcm"])
def test_kinds_without_a_flow_form_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"'{kind}' has no form for flow matching.*use one of model, dpm\+\+, unipc"):
        make_scheduler(kind, FlowMatchEulerDiscreteScheduler())


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scheduler: expected one of model, ddim, .*, got 'heun'"):
        make_scheduler("heun", DDIMScheduler())
