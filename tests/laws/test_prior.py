"""Laws of the latent prior: what holds for every scheduler and prediction type, each with a defect it must catch."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from latentindigo import prior as prior_module
from latentindigo import schedules
from latentindigo.prior import LatentPrior, Prediction, Trajectory
from tolerances import TOL
from toys import MEAN, STD, ConvDenoiser, LinearVAE, gaussian_prior, randn

# Stable Diffusion's schedule: the one most priors come with.
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

Make = Callable[..., Any]


def ddim(**more: Any) -> Any:
    return DDIMScheduler(**{**SD, "clip_sample": False, **more})


def dpm(**more: Any) -> Any:
    return DPMSolverMultistepScheduler(**{**SD, **more})


def unipc(**more: Any) -> Any:
    return UniPCMultistepScheduler(**{**SD, **more})


def euler(**more: Any) -> Any:
    return EulerDiscreteScheduler(**{**SD, **more})


def flow(**more: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **more})


def dpm_flow(**more: Any) -> Any:
    return DPMSolverMultistepScheduler(**{**FLOW, **more})


def unipc_flow(**more: Any) -> Any:
    return UniPCMultistepScheduler(**{**FLOW, **more})


def lms(**more: Any) -> Any:
    return LMSDiscreteScheduler(**{**SD, **more})


def deis(**more: Any) -> Any:
    return DEISMultistepScheduler(**{**SD, **more})


def ddpm(**more: Any) -> Any:
    return DDPMScheduler(**{**SD, "clip_sample": False, **more})


def ancestral(**more: Any) -> Any:
    return EulerAncestralDiscreteScheduler(**{**SD, **more})


def lcm(**more: Any) -> Any:
    return LCMScheduler(**{**SD, **more})


# A new scheduler family joins these lists and inherits the laws.
DETERMINISTIC: list[Make] = [ddim, dpm, unipc, euler, flow, dpm_flow, unipc_flow, lms, deis]
STOCHASTIC: list[Make] = [ddpm, ancestral, lcm]
VARIANCE_PRESERVING = ["epsilon", "v_prediction", "sample"]
SCALED = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LMSDiscreteScheduler)


def kinds_of(make: Make) -> list[str]:
    return ["flow_prediction"] if make in (flow, dpm_flow, unipc_flow) else VARIANCE_PRESERVING


CASES = [(make, kind) for make in DETERMINISTIC for kind in kinds_of(make)]


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def descend(
    trajectory: Trajectory,
    z_t: Tensor,
    change: Callable[[Tensor, int], Tensor] | None = None,
    draw: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Run a trajectory to its end; `change` may replace z_0 at each step."""
    for i in range(len(trajectory)):
        prediction = trajectory.predict(z_t, i)
        z0 = prediction.z0 if change is None else change(prediction.z0, i)
        z_t = trajectory.step(prediction, z0, z_t, i, draw)
    return z_t


def conv_prior(scheduler: Any, kind: str | None = None) -> LatentPrior:
    return LatentPrior(LinearVAE(), ConvDenoiser(12), scheduler, prediction_type=kind)


# --- the sampler's distribution matches the closed form --------------------------------------------------------------


def white(shape: tuple[int, int, int, int]) -> Tensor:
    """Draw noise whose sample mean is 0 and whose sample covariance between channels is 1, so that it adds no error."""
    batch, channels, height, width = shape
    rows = randn(channels, batch * height * width, seed=3, dtype=torch.float64)
    rows = rows - rows.mean(dim=1, keepdim=True)
    rows = torch.linalg.solve_triangular(torch.linalg.cholesky(rows @ rows.T / rows.shape[1]), rows, upper=False)
    return rows.view(channels, batch, height, width).transpose(0, 1).float().contiguous()


def check_moments(
    prior: LatentPrior, eta: float = 0.0, steps: int = 100, shape: tuple[int, int, int, int] = (4, 12, 8, 8)
) -> None:
    """Samples from the noisiest level, decoded, have the closed-form mean and deviation of each pixel in a block.

    With latents z ~ N(m, diag(s²)) and the linear decoder x = (1 + Wᵀ(z/k + b))/2 the pixels have the mean
    (1 + Wᵀ(m/k + b))/2 and the variance diag(Wᵀ diag(s²) W)/(4k²).
    """
    vae, denoiser = prior.vae, prior.denoiser
    trajectory = prior.trajectory(steps, 1.0, eta=eta)
    # α is not quite 0 at the noisiest level: a start without the mean's share would end beside the mean.
    z_t = descend(trajectory, trajectory.noise(denoiser.mean.expand(shape), white(shape)), draw=generators(shape[0]))
    pixels = torch.nn.functional.pixel_unshuffle(prior.decode(z_t), vae.factor)

    factor, shift = vae.config.scaling_factor, vae.config.shift_factor
    mean, std = denoiser.mean.flatten(), denoiser.std.flatten()
    want_mean = (1.0 + vae.matrix.T @ (mean / factor + shift)) / 2.0
    want_std = ((vae.matrix.T**2) @ std**2).sqrt() / (2.0 * factor)
    mean_error = (pixels.mean(dim=(0, 2, 3)) - want_mean).abs().max().item()
    std_error = (pixels.std(dim=(0, 2, 3)) / want_std - 1.0).abs().max().item()
    # 100 steps of a first-order method are biased by 3 % (as are 250 of a stochastic one). Where noise is drawn on the
    # way, 4 096 samples per position leave 1.1 % of uncertainty in the deviation and 0.01 in the mean.
    assert mean_error < 0.03, f"mean off by {mean_error:.4f}"
    assert std_error < 0.05, f"standard deviation off by {100 * std_error:.1f} %"


def moments_prior(make: Make, kind: str) -> LatentPrior:
    # Every latent channel has a mean and a deviation of its own, so that no mixing of channels goes unseen.
    mean = torch.linspace(-0.6, 0.6, 12).view(1, -1, 1, 1)
    std = torch.linspace(0.4, 0.8, 12).view(1, -1, 1, 1)
    return gaussian_prior(make(), kind, mean=mean, std=std)


@pytest.mark.parametrize("make", [ddim, dpm, unipc, euler, flow, unipc_flow])
def test_samples_have_the_closed_form_mean_and_variance(make: Make) -> None:
    check_moments(moments_prior(make, kinds_of(make)[0]))


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_samples_have_the_closed_form_mean_and_variance_for_each_kind(kind: str) -> None:
    check_moments(moments_prior(dpm, kind))


def test_stochastic_samples_have_the_closed_form_mean_and_variance() -> None:
    check_moments(moments_prior(ddim, "epsilon"), eta=1.0, steps=250, shape=(16, 12, 16, 16))


@pytest.mark.parametrize("defect", ["scaling", "level", "clip"])
def test_moments_law_catches(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = moments_prior(ddim, "epsilon")
    if defect == "scaling":  # A decoder that forgets the latents' scaling factor.
        monkeypatch.setattr(prior_module, "latent_affine", lambda vae, like: (like.new_tensor(1.0), like.new_zeros(())))
    if defect == "level":  # A denoiser told a time step that is not the one of its input.
        denoise = prior._denoise
        monkeypatch.setattr(prior, "_denoise", lambda z, t: denoise(z, (t + 60).clamp(max=999)))
    if defect == "clip":  # Latents clipped as if they were pixels.
        prior.scheduler.register_to_config(clip_sample=True, clip_sample_range=0.5)
    with pytest.raises(AssertionError):
        check_moments(prior)


# --- unguided = the stock scheduler loop -------------------------------------------------------------------------


def check_stock_loop(prior: LatentPrior, stock: Any, change: Callable[[Tensor, int], Tensor] | None = None) -> None:
    """Without guidance the trajectory is diffusers' own loop: bit for bit, ≤ 1e-4 where coordinates are converted."""
    scaled = isinstance(stock, SCALED)
    noise = randn(2, 12, 8, 8, seed=1)
    trajectory = prior.trajectory(7, 1.0)
    alpha, sigma = trajectory.alpha_sigma(0)

    stock = copy.deepcopy(stock)
    stock.set_timesteps(7)
    sample = noise * sigma / alpha if scaled else noise
    draw = {"generator": generators(2)} if "generator" in inspect.signature(stock.step).parameters else {}
    for t in stock.timesteps:
        model_input = stock.scale_model_input(sample, t) if hasattr(stock, "scale_model_input") else sample
        output = prior.denoiser(model_input, t.expand(2)).sample
        sample = stock.step(output, t, sample, return_dict=False, **draw)[0]

    start = noise * sigma if scaled else noise
    ours = descend(trajectory, start, change, generators(2))
    if scaled:
        error = (ours - sample).abs().max().item() / sample.abs().max().item()
        assert error <= 1e-4, f"relative error {error:.2e}"
    else:
        assert torch.equal(ours, sample), f"differs by {(ours - sample).abs().max().item():.2e}"


@pytest.mark.parametrize(("make", "kind"), CASES + [(make, "epsilon") for make in STOCHASTIC])
def test_unguided_run_is_the_stock_loop(make: Make, kind: str) -> None:
    scheduler = make() if make is flow else make(prediction_type=kind)
    with torch.no_grad():
        check_stock_loop(conv_prior(scheduler), scheduler)


@pytest.mark.parametrize("make", [ddim, dpm, unipc, flow])
def test_stock_loop_law_catches_an_output_that_was_touched(make: Make) -> None:
    scheduler = make()
    # The round trip through z_0 is harmless to the eye and not the same bits.
    with torch.no_grad(), pytest.raises(AssertionError):
        check_stock_loop(conv_prior(scheduler), scheduler, change=lambda z0, i: z0.clone())


@pytest.mark.parametrize("make", [euler, lms, ancestral])
def test_stock_loop_law_catches_unconverted_coordinates(make: Make) -> None:
    scheduler = make()
    prior = conv_prior(scheduler)
    prior._family = schedules.Family("sigmas", draws=prior._family.draws)
    with warnings.catch_warnings(), torch.no_grad(), pytest.raises(AssertionError):
        warnings.simplefilter("ignore")  # diffusers notices that its inputs were not scaled.
        check_stock_loop(prior, scheduler)


# --- write-back ------------------------------------------------------------------------------------------------------


def z0_meant_by(output: Tensor, z_t: Tensor, alpha: float, sigma: float, kind: str) -> Tensor:
    """Read z_0 from an output by solving z_t = α z_0 + σ ε for each kind, in float64, by algebra of the test's own."""
    a, s, out, z = alpha, sigma, output.double(), z_t.double()
    # Each kind is one linear equation p z_0 + q ε = output beside a z_0 + s ε = z_t; Cramer's rule solves the pair.
    p, q = {"epsilon": (0.0, 1.0), "v_prediction": (-s, a), "sample": (1.0, 0.0), "flow_prediction": (-1.0, 1.0)}[kind]
    return (s * out - q * z) / (s * p - q * a)


def check_write_back(prior: LatentPrior) -> None:
    """The output written for a changed z_0 means that z_0 to the scheduler, and the last step arrives at it."""
    trajectory = prior.trajectory(4, 0.9)
    z_t = trajectory.noise(torch.full((2, 12, 4, 4), MEAN), randn(2, 12, 4, 4, seed=2))
    wish = z_t
    written: list[Tensor] = []
    scheduler = trajectory._scheduler
    original = scheduler.step

    def spy(output: Tensor, *rest: Any, **more: Any) -> Any:
        written.append(output)
        return original(output, *rest, **more)

    scheduler.step = spy
    tolerance = TOL[torch.float32]
    for i in range(4):
        prediction = trajectory.predict(z_t, i)
        wish = 0.7 * prediction.z0 + 0.1 * randn(2, 12, 4, 4, seed=10 + i)
        following = trajectory.step(prediction, wish, z_t, i, generators(2))
        meant = z0_meant_by(written[-1], z_t, *trajectory.alpha_sigma(i), trajectory._accepted)
        # ε near α=0 and v, flow near σ=0 amplify rounding by 1/α and 1/σ: ten times the usual tolerance.
        error = (meant - wish.double()).abs().max().item()
        assert error <= 10 * tolerance.atol, f"step {i}: z_0 read back differs by {error:.2e}"
        z_t = following
    # LMS mixes in older steps to the very end, and DEIS stops at the smallest trained noise level.
    if trajectory.alpha_sigma(4) == (1.0, 0.0) and not isinstance(scheduler, LMSDiscreteScheduler):
        error = (z_t - wish).abs().max().item()
        assert error <= 10 * tolerance.atol, f"the last step misses z_0 by {error:.2e}"


@pytest.mark.parametrize(("make", "kind"), CASES + [(ddpm, kind) for kind in VARIANCE_PRESERVING])
def test_a_changed_z0_is_what_the_scheduler_believes(make: Make, kind: str) -> None:
    check_write_back(gaussian_prior(make(), kind))


@pytest.mark.parametrize("make", [ancestral, lcm])
def test_a_changed_z0_is_what_other_stochastic_schedulers_believe(make: Make) -> None:
    check_write_back(gaussian_prior(make(), "v_prediction"))


def test_a_network_may_predict_what_the_scheduler_does_not_understand() -> None:
    check_write_back(gaussian_prior(ancestral(), "sample"))
    check_write_back(gaussian_prior(flow(), "epsilon"))


@pytest.mark.parametrize("kind", [*VARIANCE_PRESERVING, "flow_prediction"])
def test_write_back_law_catches_swapped_factors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = prior_module.output_from_z0

    def swapped(z0: Tensor, z_t: Tensor, alpha: float, sigma: float, what: Any) -> Tensor:
        return write(z0, z_t, sigma, alpha, what) if what != "sample" else 0.99 * z0

    monkeypatch.setattr(prior_module, "output_from_z0", swapped)
    with pytest.raises(AssertionError):
        check_write_back(gaussian_prior(flow() if kind == "flow_prediction" else ddim(), kind))


# --- schedulers agree on the same time steps ----------------------------------------------------------------------


def check_same_path(one: LatentPrior, other: LatentPrior) -> None:
    """DDIM (η = 0) and Euler visit the same time steps and go the same way, guided or not."""
    for strength in (0.64, 0.9):
        first, second = one.trajectory(9, strength), other.trajectory(9, strength)
        assert first.timesteps.tolist() == second.timesteps.tolist()
        z_a = z_b = first.noise(0.5 * randn(2, 12, 4, 4), randn(2, 12, 4, 4, seed=5))
        for i in range(9):
            p_a, p_b = first.predict(z_a, i), second.predict(z_b, i)
            z_a = first.step(p_a, p_a.z0 * 0.8 + 0.1, z_a, i)
            z_b = second.step(p_b, p_b.z0 * 0.8 + 0.1, z_b, i)
            error = (z_a - z_b).abs().max().item()
            assert error <= 10 * TOL[torch.float32].atol, f"strength {strength}, step {i}: {error:.2e} apart"


@pytest.mark.parametrize("kind", VARIANCE_PRESERVING)
def test_ddim_and_euler_agree(kind: str) -> None:
    with torch.no_grad():
        check_same_path(conv_prior(ddim(), kind), conv_prior(euler(), kind))


def test_agreement_law_catches_an_unconverted_euler() -> None:
    broken = conv_prior(euler())
    broken._family = schedules.Family("sigmas")
    with torch.no_grad(), pytest.raises(AssertionError):
        check_same_path(conv_prior(ddim()), broken)


def test_agreement_law_catches_a_ddim_that_keeps_its_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior_module, "set_stride", lambda scheduler, timesteps, i: None)
    with torch.no_grad(), pytest.raises(AssertionError):
        check_same_path(conv_prior(ddim()), conv_prior(euler()))


def check_same_noisy_path(one: LatentPrior, other: LatentPrior, eta: float) -> None:
    """DDIM with η = 1 draws the noise that ancestral sampling draws: same generators, same path."""
    first, second = one.trajectory(8, 0.9, eta=eta), other.trajectory(8, 0.9)
    start = randn(2, 12, 4, 4)
    z_a, z_b = descend(first, start, draw=generators(2)), descend(second, start, draw=generators(2))
    error = (z_a - z_b).abs().max().item()
    assert error <= 10 * TOL[torch.float32].atol, f"{error:.2e} apart"


@pytest.mark.parametrize("make", [ddpm, ancestral])
def test_ddim_with_full_noise_is_ancestral_sampling(make: Make) -> None:
    # With the distribution of DDIM (η = 1) checked above, this carries it over to the other two.
    with torch.no_grad():
        check_same_noisy_path(conv_prior(ddim()), conv_prior(make()), eta=1.0)


def test_noisy_path_law_catches_a_lost_eta() -> None:
    with torch.no_grad(), pytest.raises(AssertionError):
        check_same_noisy_path(conv_prior(ddim()), conv_prior(ddpm()), eta=0.9)


# --- order -----------------------------------------------------------------------------------------------------------


def check_order(prior: LatentPrior, order: float) -> None:
    """The error against the exact probability flow falls as steps^-order (slope of a log-log line).

    Measured at half time: close to the clean image every solver takes a step over an infinite range of log α/σ, and
    near-zero noise would hide the order.
    """
    counts = (16, 32, 64)
    errors = []
    for steps in counts:
        # 1024 trained steps and the noisiest start: all grids share their middle level exactly.
        trajectory = prior.trajectory(steps, 0.999999)
        z_t = start = randn(1, 12, 4, 4)
        for i in range(steps // 2):
            prediction = trajectory.predict(z_t, i)
            z_t = trajectory.step(prediction, prediction.z0, z_t, i)
        exact = prior.denoiser.path_end(start, *trajectory.alpha_sigma(0), to=trajectory.alpha_sigma(steps // 2))
        errors.append((z_t - exact).abs().max().item())
    slope = (math.log(errors[0]) - math.log(errors[-1])) / (math.log(counts[-1]) - math.log(counts[0]))
    assert abs(slope - order) < 0.15, f"order {slope:.2f}, expected {order}; errors {errors}"


ORDERS = [(DDIMScheduler, 1.0), (EulerDiscreteScheduler, 1.0), (DPMSolverMultistepScheduler, 2.0)]


def order_prior(scheduler_class: Any) -> LatentPrior:
    more: dict[str, Any] = {"clip_sample": False} if scheduler_class is DDIMScheduler else {}
    return gaussian_prior(scheduler_class(num_train_timesteps=1024, **more))


@pytest.mark.parametrize(("scheduler_class", "order"), ORDERS)
def test_error_falls_at_the_methods_order(scheduler_class: Any, order: float) -> None:
    check_order(order_prior(scheduler_class), order)


@pytest.mark.parametrize(("scheduler_class", "order"), ORDERS)
def test_order_law_catches_a_wrong_time_step(
    scheduler_class: Any, order: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = order_prior(scheduler_class)
    denoise = prior._denoise
    monkeypatch.setattr(prior, "_denoise", lambda z, t: denoise(z, (t - 4).clamp(min=0)))
    with pytest.raises(AssertionError):
        check_order(prior, order)


def test_order_law_catches_a_solver_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trajectory.step

    def forgetful(self: Trajectory, *arguments: Any) -> Tensor:
        self._scheduler.lower_order_nums = 0
        return step(self, *arguments)

    monkeypatch.setattr(Trajectory, "step", forgetful)
    with pytest.raises(AssertionError):
        check_order(order_prior(DPMSolverMultistepScheduler), 2.0)


# --- what is done to z_{t-1} survives --------------------------------------------------------------------------------


def check_edit_survives(prior: LatentPrior) -> None:
    """An edit of z_t between two steps arrives at the end as the probability flow carries it there.

    For the Gaussian prior the flow is affine: an edit δ at level (α, σ) becomes s/√(α² s² + σ²) · δ. UniPC's corrector
    recomputes z_t from the step before and would drop the edit.
    """
    steps, middle = 40, 20
    ends = []
    delta = randn(1, 12, 4, 4, seed=8)
    trajectory = prior.trajectory(steps, 0.95)
    for edit in (0.0, 1.0):
        trajectory = prior.trajectory(steps, 0.95)
        z_t = trajectory.noise(torch.full_like(delta, MEAN), randn(1, 12, 4, 4, seed=9))
        for i in range(steps):
            if i == middle:
                z_t = z_t + edit * delta
            prediction = trajectory.predict(z_t, i)
            z_t = trajectory.step(prediction, prediction.z0, z_t, i)
        ends.append(z_t)
    alpha, sigma = trajectory.alpha_sigma(middle)
    want = STD / math.hypot(alpha * STD, sigma)
    share = ((ends[1] - ends[0]) * delta).sum().item() / (want * delta.square().sum().item())
    assert abs(share - 1.0) < 0.1, f"{100 * share:.0f} % of the edit arrive"  # 40 steps are exact to some percent.


@pytest.mark.parametrize("make", [ddim, dpm, unipc, euler, flow, unipc_flow])
def test_an_edit_of_z_survives(make: Make) -> None:
    check_edit_survives(gaussian_prior(make()))


def test_edit_law_catches_a_corrector_that_undoes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior_module, "_same_values", lambda a, b: True)
    with pytest.raises(AssertionError):
        check_edit_survives(gaussian_prior(unipc()))


# --- a repeated step -------------------------------------------------------------------------------------------------


def check_repeat(prior: LatentPrior) -> None:
    """A step taken twice leaves the same memory as a step taken once: what follows is equal to the bit."""
    ends = []
    for repeats in (1, 3):
        trajectory = prior.trajectory(6, 0.9)
        z_t = randn(2, 12, 4, 4, seed=4)
        for i in range(6):
            prediction = trajectory.predict(z_t, i)
            following = z_t
            for _ in range(repeats):
                following = trajectory.step(prediction, prediction.z0, z_t, i)
            z_t = following
        ends.append(z_t)
    assert torch.equal(ends[0], ends[1]), f"differs by {(ends[0] - ends[1]).abs().max().item():.2e}"


@pytest.mark.parametrize("make", DETERMINISTIC)
def test_a_step_may_be_repeated(make: Make) -> None:
    with torch.no_grad():
        check_repeat(conv_prior(make()))


@pytest.mark.parametrize("make", [dpm, unipc])
def test_repeat_law_catches_a_memory_that_is_not_wound_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_index(self: Trajectory, i: int) -> None:
        self._scheduler._step_index = i

    monkeypatch.setattr(Trajectory, "_wind_to", only_the_index)
    with torch.no_grad(), pytest.raises(AssertionError):
        check_repeat(conv_prior(make()))


# --- independence ----------------------------------------------------------------------------------------------------


def check_own_scheduler(prior: LatentPrior) -> None:
    """Two trajectories taken step by step in turn give what they give one after the other, even with other steps."""
    starts = [randn(1, 12, 4, 4, seed=1), randn(1, 12, 4, 4, seed=2)]
    plans = [(5, 0.9), (5, 0.7)]
    alone = [descend(prior.trajectory(*plan), z_t) for plan, z_t in zip(plans, starts, strict=True)]
    pair = [prior.trajectory(*plan) for plan in plans]
    state = list(starts)
    for i in range(5):
        for k, trajectory in enumerate(pair):
            prediction = trajectory.predict(state[k], i)
            state[k] = trajectory.step(prediction, prediction.z0, state[k], i)
    for k in range(2):
        assert torch.equal(alone[k], state[k]), f"trajectory {k} felt the other"


@pytest.mark.parametrize("make", DETERMINISTIC)
def test_trajectories_do_not_feel_each_other(make: Make) -> None:
    with torch.no_grad():
        check_own_scheduler(conv_prior(make()))


@pytest.mark.parametrize("make", [ddim, unipc])
def test_independence_law_catches_a_shared_scheduler(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = conv_prior(make())
    monkeypatch.setattr(prior_module, "copy", SimpleNamespace(deepcopy=lambda scheduler: scheduler, copy=copy.copy))
    with torch.no_grad(), pytest.raises(AssertionError):
        check_own_scheduler(prior)


def check_batch_independence(prior: LatentPrior, eta: float, draw: Callable[[int, int], list[torch.Generator]]) -> None:
    """An image gets the same result alone and as the last of a batch, noise drawn on the way included."""
    z_t = randn(3, 12, 4, 4)
    together = descend(prior.trajectory(5, 0.9, eta=eta), z_t, draw=draw(3, 0))
    alone = descend(prior.trajectory(5, 0.9, eta=eta), z_t[2:], draw=draw(1, 2))
    error = (together[2:] - alone).abs().max().item()
    assert error <= TOL[torch.float32].atol, f"differs by {error:.2e}"


@pytest.mark.parametrize("make", [ddim, ddpm, ancestral, lcm])
def test_an_image_does_not_feel_its_batch(make: Make) -> None:
    with torch.no_grad():
        check_batch_independence(
            conv_prior(make()), 1.0 if make is ddim else 0.0, lambda n, first: generators(n, first)
        )


def test_batch_law_catches_one_generator_for_all() -> None:
    def one(count: int, first: int) -> list[torch.Generator]:
        return generators(1, first) * count

    with torch.no_grad(), pytest.raises(AssertionError):
        check_batch_independence(conv_prior(ddim()), 1.0, one)


# --- gradients -------------------------------------------------------------------------------------------------------


def check_gradient_through_predict(trajectory: Trajectory) -> None:
    """∂z_{0,t}/∂z_t of the exact Gaussian denoiser is α s²/(α² s² + σ²), through every prediction type."""
    z_t = randn(1, 12, 2, 2, dtype=torch.float64).requires_grad_()
    for i in (0, len(trajectory) - 1):
        alpha, sigma = trajectory.alpha_sigma(i)
        z0 = trajectory.predict(z_t, i).z0
        assert z0.requires_grad, "z_0 has lost its graph"
        (gradient,) = torch.autograd.grad(z0.sum(), z_t)
        want = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        error = (gradient / want - 1.0).abs().max().item()
        # The toy computes its levels in float64 and the scheduler in float32.
        assert error <= 10 * TOL[torch.float32].rtol, f"evaluation {i}: off by {error:.2e}"


@pytest.mark.parametrize(
    ("make", "kind"), [(ddim, k) for k in VARIANCE_PRESERVING] + [(euler, "epsilon"), (flow, None)]
)
def test_the_gradient_passes_through_predict(make: Make, kind: str | None) -> None:
    check_gradient_through_predict(gaussian_prior(make(), kind).trajectory(5, 0.9))


def test_gradient_law_catches_a_cut_graph() -> None:
    trajectory = gaussian_prior(ddim()).trajectory(5, 0.9)
    predict = trajectory.predict

    def cut(z_t: Tensor, i: int) -> Prediction:
        return predict(z_t, i).detach()

    trajectory.predict = cut
    with pytest.raises(AssertionError):
        check_gradient_through_predict(trajectory)


def check_linear_autoencoder(prior: LatentPrior) -> None:
    """Encode and decode are inverse, carry gradients, respect scale and shift, and leave their input alone."""
    vae = prior.vae
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    x.requires_grad_()
    z = prior.encode(x)
    raw = vae.encode(2.0 * before - 1.0).latents
    tolerance = TOL[torch.float32].atol
    assert (z - (raw - vae.config.shift_factor) * vae.config.scaling_factor).abs().max() <= tolerance
    back = prior.decode(z)
    assert (back - x).abs().max() <= tolerance, "decode does not undo encode"
    (gradient,) = torch.autograd.grad(back.square().sum() / 2.0, x)
    assert (gradient - x).abs().max() <= 2 * tolerance, "the gradient of a round trip is not the identity"
    assert torch.equal(x, before), "the input was changed"


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_autoencoder_round_trip(factor: int) -> None:
    check_linear_autoencoder(gaussian_prior(ddim(), vae=LinearVAE(factor, scaling_factor=0.18, shift_factor=0.3)))


@pytest.mark.parametrize("defect", ["range", "shift", "graph"])
def test_autoencoder_law_catches(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = gaussian_prior(ddim())
    decode = prior.decode
    if defect == "range":
        monkeypatch.setattr(prior, "decode", lambda z: 2.0 * decode(z) - 1.0)
    if defect == "shift":
        monkeypatch.setattr(prior_module, "latent_affine", lambda vae, like: (like.new_tensor(0.5), like.new_zeros(())))
    if defect == "graph":
        monkeypatch.setattr(prior, "decode", lambda z: 0.5 * decode(z) + 0.5 * decode(z).detach())
    with pytest.raises(AssertionError):
        check_linear_autoencoder(prior)


# --- strength --------------------------------------------------------------------------------------------------------


def check_start(prior: LatentPrior, steps: int, strength: float) -> None:
    """A trajectory has exactly the asked number of evaluations, falling, and starts where it was told to."""
    trajectory = prior.trajectory(steps, strength)
    assert len(trajectory) == len(trajectory.timesteps) == steps
    levels = [s / math.hypot(a, s) for a, s in (trajectory.alpha_sigma(i) for i in range(steps + 1))]
    assert all(high > low for high, low in zip(levels, levels[1:], strict=False)), f"levels do not fall: {levels}"
    assert abs(trajectory.start_strength - levels[0]) < 1e-9
    # Neighbouring trained levels are up to 0.002 apart; special spacings are searched and may miss by more.
    allowed = 0.05 if schedules._has_special_spacing(prior.scheduler.config) else 0.002
    missed = abs(trajectory.start_strength - strength)
    assert missed <= allowed, f"asked for {strength}, starts at {trajectory.start_strength:.4f}"


SPECIAL = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]


@pytest.mark.parametrize("steps", [1, 4, 11])
@pytest.mark.parametrize("strength", [0.35, 0.64, 0.97])
def test_trajectories_start_at_the_asked_strength(steps: int, strength: float) -> None:
    for make in DETERMINISTIC + [ddpm, ancestral]:
        check_start(gaussian_prior(make()), steps, strength)
    for more in SPECIAL if steps > 4 else []:
        check_start(gaussian_prior(dpm(**more)), steps, strength)
        check_start(gaussian_prior(euler(**more)), steps, strength)


def test_start_law_catches_strength_taken_as_a_share_of_the_time_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_index(scheduler: Any, family: Any, steps: int, strength: float) -> None:
        scheduler.set_timesteps(steps)
        start = int(strength * 999)
        picks = [math.floor((start + 1) * (steps - k) / steps + 0.5) - 1 for k in range(steps)]
        scheduler.timesteps = torch.tensor(picks)

    monkeypatch.setattr(schedules, "_set_even_grid", by_index)
    with pytest.raises(AssertionError):
        check_start(gaussian_prior(ddim()), 10, 0.64)
