"""Laws of guidance: gradients, descent, sizes, refinement and regularisers, each with a defect it must catch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guidance_cases import GAMMA_DIM, KINDS, latents, make_data, make_inn, make_prior, ones
from latentindigo.autoencoder import PatchAutoencoder
from latentindigo.guidance import (
    AutoencoderConsistency,
    DataTerm,
    Gluing,
    GuidanceConfig,
    LatentINN,
    LearnedForward,
    PixelINN,
    Regulariser,
    Renoise,
    TrustRegion,
    trusted_target,
)
from latentindigo.inn import InvertibleNet
from latentindigo.prior import LatentPrior
from tolerances import TOL, assert_close, in_dtype, randomise_
from toys import ConvDenoiser, randn

# Only the coarse term, only the distance, and both: a mistake in one of them cannot hide behind the other.
WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (2.5, 1.0)]


# --- the gradient is the gradient ------------------------------------------------------------------------------------


def check_gradient(loss: Callable[[Tensor], Tensor], gradient: Tensor, x: Tensor) -> None:
    """A gradient agrees with central differences of the loss in random directions, in float64."""
    step = 1e-6
    for seed in range(4):
        direction = randn(*x.shape, seed=20 + seed, dtype=torch.float64)
        with torch.no_grad():
            slope = float(loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        # Central differences are good to step² and to rounding / step, both far below this.
        assert abs(float((gradient * direction).sum()) - slope) <= 1e-6 * (1e-3 + abs(slope)), f"direction {seed}"


class DetachedInverse(LatentINN):
    """Defect: the distance term forgets that u_inv depends on z0 as well."""

    def loss(self, z0: Tensor) -> Tensor:
        coarse, details = self.forward_model.split(self.open(z0))
        merged = self.forward_model.merge(self.target, details)
        if z0.requires_grad:
            merged = merged.detach()
        return self.config.w_c * self._norm(self.target - coarse) + self.config.w_d * self._norm(merged - z0)


class SquaredNorms(PixelINN):
    """Defect: descends on half the squared norm instead of the norm."""

    def descent(self, z0: Tensor, gain: Tensor) -> Tensor:
        with torch.no_grad():
            norm = self.loss(z0)[:, None, None, None]
        return super().descent(z0, gain) * norm


def stopped_case(data: DataTerm, z0: Tensor) -> None:
    check_gradient(lambda z: data.loss(z).sum(), -data.descent(z0, ones(z0)) / data.config.zeta, z0)


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize(("w_c", "w_d"), WEIGHTS)
@pytest.mark.parametrize("name", KINDS)
def test_stopped_gradient_is_the_finite_difference(name: str, w_c: float, w_d: float, levels: int) -> None:
    z0 = latents()
    stopped_case(make_data(name, z0, config=GuidanceConfig(w_c=w_c, w_d=w_d, zeta=3.0), levels=levels), z0)


@pytest.mark.parametrize(("name", "kind"), [("latent", DetachedInverse), ("pixel", SquaredNorms)])
def test_stopped_gradient_law_finds_a_wrong_gradient(name: str, kind: type[DataTerm]) -> None:
    z0 = latents()
    with pytest.raises(AssertionError):
        stopped_case(make_data(name, z0, config=GuidanceConfig(w_d=1.0), kind=kind), z0)


class StopsAtTheEstimate(LatentINN):
    """Defect: the gradient with respect to z0 passed off as the one with respect to z_t."""

    def descent_through(self, z0: Tensor, z_t: Tensor, gain: Tensor, predict: Any = None) -> Tensor:
        return super().descent(z0.detach(), gain)


def through_case(data: DataTerm, z0: Tensor) -> None:
    trajectory = data.prior.trajectory(4, 0.6)
    start = trajectory.noise(z0, randn(*z0.shape, seed=8, dtype=z0.dtype))
    z_t = start.clone().requires_grad_()
    correction = data.descent_through(trajectory.predict(z_t, 0).z0, z_t, ones(z0))

    def loss(z: Tensor) -> Tensor:
        return data.loss(trajectory.predict(z, 0).z0).sum()

    check_gradient(loss, -correction / data.config.zeta, start)


@pytest.mark.parametrize(("w_c", "w_d"), WEIGHTS)
@pytest.mark.parametrize("name", KINDS)
def test_through_gradient_is_the_finite_difference(name: str, w_c: float, w_d: float) -> None:
    z0 = latents()
    through_case(make_data(name, z0, config=GuidanceConfig(w_c=w_c, w_d=w_d, zeta=3.0)), z0)


def test_through_gradient_law_finds_a_gradient_that_stops_at_the_estimate() -> None:
    z0 = latents()
    with pytest.raises(AssertionError):
        through_case(make_data("latent", z0, kind=StopsAtTheEstimate), z0)


# --- a small enough step never raises the data term ------------------------------------------------------------------


def check_step_lowers_the_data_term(data: DataTerm, z0: Tensor, correction: Tensor) -> None:
    """Small steps along the correction lower the loss of every image."""
    with torch.no_grad():
        before = data.loss(z0)
        for size in (1e-2, 1e-3, 1e-4):
            after = data.loss(z0 + size * correction)
            assert (after < before).all(), f"step {size} raises the data term from {before} to {after}"


class Uphill(LatentINN):
    """Defect: both corrections with the wrong sign."""

    def projection(self, z0: Tensor, gain: Tensor) -> Tensor:
        return -super().projection(z0, gain)

    def descent(self, z0: Tensor, gain: Tensor) -> Tensor:
        return -super().descent(z0, gain)


RULES: dict[str, Callable[[DataTerm], Callable[[Tensor, Tensor], Tensor]]] = {
    "projection": lambda data: data.projection,
    "stopped": lambda data: data.descent,
}


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", KINDS)
def test_small_step_lowers_the_data_term(name: str, rule: str, levels: int) -> None:
    z0 = latents()
    data = make_data(name, z0, levels=levels, config=GuidanceConfig(zeta=1.0))
    check_step_lowers_the_data_term(data, z0, RULES[rule](data)(z0, ones(z0)))


@pytest.mark.parametrize("rule", RULES)
def test_data_term_law_finds_a_wrong_sign(rule: str) -> None:
    z0 = latents()
    data = make_data("latent", z0, kind=Uphill, config=GuidanceConfig(zeta=1.0))
    with pytest.raises(AssertionError):
        check_step_lowers_the_data_term(data, z0, RULES[rule](data)(z0, ones(z0)))


# --- a full projection reproduces the measurement --------------------------------------------------------------------


def check_full_projection_is_consistent(data: DataTerm, z0: Tensor) -> None:
    """With beta = 1 and no noise, a decimated projection gives a latent whose coarse part is the measurement."""
    with torch.no_grad():
        projected = z0 + data.projection(z0, data.gain(0.6, 0.8))
        coarse, _ = data.forward_model.split(data.open(projected))
    assert_close(coarse, data.target)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_full_projection_is_consistent(name: str, levels: int) -> None:
    z0 = latents()
    check_full_projection_is_consistent(make_data(name, z0, levels=levels, config=GuidanceConfig(beta=1.0)), z0)


def test_consistency_law_finds_a_projection_that_falls_short() -> None:
    z0 = latents()
    with pytest.raises(AssertionError):
        check_full_projection_is_consistent(make_data("pixel", z0, config=GuidanceConfig(beta=0.99)), z0)


def check_no_change_without_residual(data: DataTerm, z0: Tensor) -> None:
    """An estimate that agrees with the measurement is left alone, even by a lossy autoencoder."""
    assert_close(z0 + data.projection(z0, ones(z0)), z0)


def lossy_prior() -> LatentPrior:
    vae = in_dtype(
        randomise_(PatchAutoencoder(4, 8, (8, 8), (8, 8, 8), (1, 1, 1)), 3, 0.5).requires_grad_(False), torch.float64
    )
    denoiser = in_dtype(ConvDenoiser(4), torch.float64)
    return LatentPrior(vae, denoiser, DDIMScheduler(clip_sample=False), prediction_type="v_prediction")


class EncodesTheInverse(PixelINN):
    """Defect: E(x_inv) alone, so that every step pays the autoencoder's error."""

    def close(self, u_inv: Tensor, u: Tensor, z0: Tensor) -> Tensor:
        return self.prior.encode(u_inv)


def lossy_data(kind: type[DataTerm] = PixelINN) -> tuple[DataTerm, Tensor]:
    prior, z0 = lossy_prior(), latents(1, 2, channels=4)
    model = LearnedForward(make_inn(3), randn(1, GAMMA_DIM, dtype=torch.float64), 1)
    target, _ = model.split(prior.decode(z0))
    return kind(prior, model, target, 256, GuidanceConfig(beta=1.0), torch.zeros(1, dtype=torch.float64)), z0


def test_agreement_is_left_alone() -> None:
    check_no_change_without_residual(*lossy_data())


def test_agreement_law_finds_the_autoencoders_error() -> None:
    with pytest.raises(AssertionError):
        check_no_change_without_residual(*lossy_data(EncodesTheInverse))


# --- PixelINN = LatentINN over the identity --------------------------------------------------------------------------


IDENTITY: dict[str, Any] = {"factor": 1, "identity": True, "scaling_factor": 0.5, "shift_factor": -1.0}


class SignedPixels(PixelINN):
    """Defect: measures in [-1, 1] what is given in [0, 1]."""

    def open(self, z0: Tensor) -> Tensor:
        return 2 * super().open(z0) - 1


def check_pixel_and_latent_agree(pixel: DataTerm, latent: DataTerm, z0: Tensor) -> None:
    """Over an identity autoencoder and with one network both data terms are one."""
    assert_close(pixel.loss(z0), latent.loss(z0))
    for rule in RULES.values():
        assert_close(rule(pixel)(z0, ones(z0)), rule(latent)(z0, ones(z0)))


def identity_pair(kind: type[DataTerm] = PixelINN) -> tuple[DataTerm, DataTerm, Tensor]:
    z0 = latents(channels=3)
    latent = make_data("latent", z0, vae=IDENTITY)
    pixel = kind(
        latent.prior, latent.forward_model, latent.target, z0.shape[-1] ** 2, latent.config, torch.zeros(2).double()
    )
    return pixel, latent, z0


def test_pixel_and_latent_agree_over_the_identity() -> None:
    check_pixel_and_latent_agree(*identity_pair())


def test_agreement_over_the_identity_finds_a_range_error() -> None:
    with pytest.raises(AssertionError):
        check_pixel_and_latent_agree(*identity_pair(SignedPixels))


# --- one zeta for every size and batch -------------------------------------------------------------------------------


SIZE_TOLERANCE = 0.01  # The law's own figure: the same update per pixel to 1 %.
PERIOD = 8


def periodic(batch: int, channels: int, period: int, repeats: int, seed: int) -> Tensor:
    return randn(batch, channels, period, period, seed=seed, dtype=torch.float64).repeat(1, 1, repeats, repeats)


def update_on_texture(name: str, rule: str, repeats: int, kind: type[DataTerm] | None, batch: int = 1) -> Tensor:
    """Update of the middle period of the first image, whose measurement misses it by a periodic residual."""
    z0 = 0.5 * periodic(1, 12, PERIOD, repeats, seed=1)
    residual_channels, ratio = (3, 2) if name == "pixel" else (12, 1)
    residual = 0.2 * periodic(1, residual_channels, PERIOD * ratio // 2, repeats, seed=2)
    if batch > 1:
        # The companions are another picture with a residual ten times as strong.
        z0 = torch.cat([z0, *[0.3 * periodic(1, 12, PERIOD, repeats, seed=3 + k) for k in range(batch - 1)]])
        residual = torch.cat([residual, *[10 * residual] * (batch - 1)])
    data = make_data(name, z0, kind=kind, residual=residual, steps=1, config=GuidanceConfig(zeta=20.0, w_d=0.5))
    if rule == "through":
        trajectory = data.prior.trajectory(4, 0.5)
        noise = periodic(len(z0), 12, PERIOD, repeats, seed=9)
        z_t = trajectory.noise(z0, noise).requires_grad_()
        update = data.descent_through(trajectory.predict(z_t, 0).z0, z_t, ones(z0))
    else:
        update = RULES[rule](data)(z0, ones(z0))
    begin = PERIOD * (repeats // 2)
    return update.detach()[:1, :, begin : begin + PERIOD, begin : begin + PERIOD]


def check_update_is_size_independent(name: str, rule: str, kind: type[DataTerm] | None = None) -> None:
    """A texture tiled 1x and 4x, alone and in a batch, gets the same update per pixel, away from the borders."""
    alone = update_on_texture(name, rule, 9, kind)
    assert float(alone.square().mean().sqrt()) > 1e-3, "no update, nothing to compare"
    for update in (update_on_texture(name, rule, 18, kind), update_on_texture(name, rule, 9, kind, batch=2)):
        error = float((update - alone).square().mean().sqrt() / alone.square().mean().sqrt())
        assert error <= SIZE_TOLERANCE, f"{name}, {rule}: updates differ by {error:.1%}"


class PlainNorm(LatentINN):
    """Defect: the paper's norm as it is written, whose gradient depends on the size."""

    def _norm(self, residual: Tensor) -> Tensor:
        return (residual.flatten(1).square().sum(1) + 1e-12).sqrt()


class BatchNorm(PixelINN):
    """Defect: one norm for the whole batch."""

    def _norm(self, residual: Tensor) -> Tensor:
        norm = (residual.square().sum() + 1e-12).sqrt() * self.size_factor
        return norm.expand(len(residual)) / len(residual)


@pytest.mark.parametrize("rule", ["projection", "stopped", "through"])
@pytest.mark.parametrize("name", KINDS)
def test_update_is_size_independent(name: str, rule: str) -> None:
    check_update_is_size_independent(name, rule)


@pytest.mark.parametrize(("name", "kind"), [("latent", PlainNorm), ("pixel", BatchNorm)])
@pytest.mark.parametrize("rule", ["stopped", "through"])
def test_size_law_finds_norms_that_depend_on_size_or_batch(name: str, kind: type[DataTerm], rule: str) -> None:
    with pytest.raises(AssertionError):
        check_update_is_size_independent(name, rule, kind)


# --- trust in a noisy measurement ------------------------------------------------------------------------------------


class Trusting(LatentINN):
    """Defect: the gain of a measurement without noise, always."""

    def gain(self, alpha: float, sigma: float) -> Tensor:
        return torch.ones_like(self.noise)


class Backwards(LatentINN):
    """Defect: trusts the data most where the estimate is surest."""

    def gain(self, alpha: float, sigma: float) -> Tensor:
        return super().gain(sigma, alpha)


@functools.cache
def parts_for_gain() -> tuple[LatentPrior, LearnedForward]:
    return make_prior(), LearnedForward(make_inn(12), torch.zeros(1, GAMMA_DIM), 1)


def gains(kind: type[DataTerm], noise: list[float], alpha: float, sigma: float, weight: float = 4.0) -> Tensor:
    config, values = GuidanceConfig(noise_weight=weight), torch.tensor(noise, dtype=torch.float64)
    prior, model = parts_for_gain()
    return kind(prior, model, torch.zeros(len(noise), 12, 2, 2), 64, config, values).gain(alpha, sigma)


def check_gain(kind: type[DataTerm], noise: float, strength: float) -> None:
    """The gain lies in [0, 1], is 1 without noise, falls as the noise rises and falls along the trajectory."""
    alpha = (1 - strength**2) ** 0.5
    clean, little, much = gains(kind, [0.0, noise, 2 * noise], alpha, strength).tolist()
    assert abs(clean - 1.0) <= TOL[torch.float64].atol
    assert 0.0 <= much < little < 1.0
    later = strength / 2
    assert gains(kind, [noise], (1 - later**2) ** 0.5, later).item() < little
    assert abs(gains(kind, [noise], alpha, strength, weight=0.0).item() - 1.0) <= TOL[torch.float64].atol
    # A flow's alpha and sigma do not lie on the unit circle; only their ratio may count.
    flow = gains(kind, [noise], alpha / (alpha + strength), strength / (alpha + strength)).item()
    assert abs(flow - little) <= TOL[torch.float64].atol


@settings(max_examples=25, deadline=None)
@given(noise=st.floats(0.003, 0.2), strength=st.floats(0.05, 0.95))
def test_gain(noise: float, strength: float) -> None:
    check_gain(LatentINN, noise, strength)


@pytest.mark.parametrize("kind", [Trusting, Backwards])
def test_gain_law_finds_misplaced_trust(kind: type[DataTerm]) -> None:
    with pytest.raises(AssertionError):
        check_gain(kind, 0.05, 0.4)


def check_gain_scales_the_update(data: DataTerm, z0: Tensor) -> None:
    """Each image's correction is proportional to its own gain, in every rule."""
    gain = torch.tensor([0.25, 1.0], dtype=z0.dtype)
    for rule in RULES.values():
        assert_close(rule(data)(z0, gain), rule(data)(z0, ones(z0)) * gain[:, None, None, None])


class IgnoresGain(LatentINN):
    """Defect: projects with beta alone."""

    def projection(self, z0: Tensor, gain: Tensor) -> Tensor:
        return super().projection(z0, torch.ones_like(gain))


def test_gain_scales_the_update() -> None:
    z0 = latents()
    check_gain_scales_the_update(make_data("latent", z0), z0)
    check_gain_scales_the_update(make_data("pixel", z0), z0)


def test_gain_scaling_law_finds_an_ignored_gain() -> None:
    z0 = latents()
    with pytest.raises(AssertionError):
        check_gain_scales_the_update(make_data("latent", z0, kind=IgnoresGain), z0)


# --- a noisy target is shrunk towards what the start image predicts --------------------------------------------------


Target = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def keeps_the_noise(measured: Tensor, simulated: Tensor, noise_variance: Tensor, shrink: float) -> Tensor:
    """Defect: the measurement as it is."""
    return measured


def one_gain_for_all(measured: Tensor, simulated: Tensor, noise_variance: Tensor, shrink: float) -> Tensor:
    """Defect: one gain for all images and channels."""
    power = (measured - simulated).square().mean()
    return simulated + ((power - shrink * noise_variance.mean()) / power).clamp(0, 1) * (measured - simulated)


def check_target_is_nearer_to_the_truth(target_of: Target) -> None:
    """Where noise outweighs what the start image misses the target follows the start image, elsewhere the measurement.

    In the mean square no channel of any image ends further from the truth than the better of the two, to the accuracy
    of its own estimate of the power.
    """
    truth = randn(2, 3, 64, 64, seed=1, dtype=torch.float64)
    missed = torch.tensor([[0.0, 0.1, 1.0], [0.3, 0.0, 0.1]], dtype=torch.float64)[:, :, None, None]
    noise = torch.tensor([[0.3, 0.3, 0.1], [0.01, 0.2, 0.2]], dtype=torch.float64)[:, :, None, None]
    simulated = truth + missed * randn(*truth.shape, seed=2, dtype=torch.float64)
    measured = truth + noise * randn(*truth.shape, seed=3, dtype=torch.float64)
    target = target_of(measured, simulated, noise.square(), 1.0)

    def error(x: Tensor) -> Tensor:
        return (x - truth).square().mean((2, 3))

    assert (error(target) <= 1.05 * torch.minimum(error(measured), error(simulated)) + 1e-3).all()


def check_target_without_noise_is_the_measurement(target_of: Target) -> None:
    """Without noise, or with a shrink of 0, the target is the paper's; between, it lies on the way to the start."""
    measured, simulated = latents(), 0.5 * latents()
    noise = torch.full((2, 1, 1, 1), 0.01, dtype=torch.float64)
    assert_close(target_of(measured, simulated, 0 * noise, 1.0), measured)
    assert_close(target_of(measured, simulated, noise, 0.0), measured)
    share = (target_of(measured, simulated, noise, 1.0) - simulated) / (measured - simulated)
    assert 0 <= float(share.min()) <= float(share.max()) < 1
    assert_close(target_of(measured, simulated, 1e6 * noise, 1.0), simulated)
    assert_close(target_of(measured, measured, noise, 1.0), measured)


def test_target_is_nearer_to_the_truth() -> None:
    check_target_is_nearer_to_the_truth(trusted_target)
    check_target_without_noise_is_the_measurement(trusted_target)


@pytest.mark.parametrize("defect", [keeps_the_noise, one_gain_for_all])
def test_target_law_finds_kept_noise(defect: Target) -> None:
    with pytest.raises(AssertionError):
        check_target_is_nearer_to_the_truth(defect)


def test_target_law_finds_a_target_that_ignores_the_noise() -> None:
    with pytest.raises(AssertionError):
        check_target_without_noise_is_the_measurement(keeps_the_noise)


# --- refinement ------------------------------------------------------------------------------------------------------


LR = 1e-2  # Large steps, so that a touched weight shows.


class Careless(LearnedForward):
    """Defect: refines the trained network itself."""

    def __init__(self, inn: InvertibleNet, gamma: Tensor, levels: int, refine_lr: float | None = None) -> None:
        super().__init__(inn, gamma, levels, refine_lr)
        self._private = [inn.requires_grad_(True) for _ in gamma]
        self._optimizers = [torch.optim.Adam(net.parameters(), lr=LR) for net in self._private]


class OneForAll(LearnedForward):
    """Defect: all images of a batch refine one copy."""

    def __init__(self, inn: InvertibleNet, gamma: Tensor, levels: int, refine_lr: float | None = None) -> None:
        super().__init__(inn, gamma, levels, refine_lr)
        self._private = [self._private[0] for _ in gamma]
        self._optimizers = [self._optimizers[0] for _ in gamma]


class Climbs(LearnedForward):
    """Defect: Adam with the wrong sign."""

    def __init__(self, inn: InvertibleNet, gamma: Tensor, levels: int, refine_lr: float | None = None) -> None:
        super().__init__(inn, gamma, levels, refine_lr)
        self._optimizers = [torch.optim.Adam(net.parameters(), lr=LR, maximize=True) for net in self._private]


def refined(kind: type[LearnedForward], inn: InvertibleNet, u: Tensor, target: Tensor, gamma: Tensor) -> LearnedForward:
    model = kind(inn, gamma, 1, LR)
    for _ in range(5):
        model.refine([(u, target, None)])
    return model


def refinement_case(batch: int = 2) -> tuple[InvertibleNet, Tensor, Tensor, Tensor]:
    u, gamma = latents(batch, channels=3), randn(batch, GAMMA_DIM, seed=6, dtype=torch.float64)
    inn = make_inn(3)
    return inn, u, inn(u, gamma, 1)[0] + 0.2 * randn(batch, 3, 4, 4, seed=7, dtype=torch.float64), gamma


def check_trained_weights_stay(kind: type[LearnedForward]) -> None:
    """Refinement leaves the trained network as it was: its values, and its lack of gradients."""
    inn, u, target, gamma = refinement_case()
    before = copy.deepcopy(inn.state_dict())
    refined(kind, inn, u, target, gamma)
    for name, parameter in inn.named_parameters():
        assert torch.equal(parameter, before[name]), f"refinement changed {name}"
        assert parameter.grad is None
        assert not parameter.requires_grad


def check_refinement_is_private(kind: type[LearnedForward]) -> None:
    """Every image refines a copy of its own: alone or in a batch it ends with the same coarse part."""
    inn, u, target, gamma = refinement_case()
    together = refined(kind, inn, u, target, gamma).split(u)[0].detach()
    for i in range(2):
        one = slice(i, i + 1)
        alone = refined(kind, inn, u[one], target[one], gamma[one]).split(u[one])[0].detach()
        assert_close(together[one], alone)


def check_refinement_lowers_the_residual(kind: type[LearnedForward]) -> None:
    """Refinement brings the coarse part nearer to the measurement, and the network stays invertible."""
    inn, u, target, gamma = refinement_case()
    before = (inn(u, gamma, 1)[0] - target).square().mean((1, 2, 3))
    model = refined(kind, inn, u, target, gamma)
    coarse, details = model.split(u)
    assert ((coarse - target).square().mean((1, 2, 3)) < before).all()
    assert_close(model.merge(coarse, details).detach(), u)


def test_refinement_laws() -> None:
    check_trained_weights_stay(LearnedForward)
    check_refinement_is_private(LearnedForward)
    check_refinement_lowers_the_residual(LearnedForward)


@pytest.mark.parametrize(
    ("check", "kind"),
    [
        (check_trained_weights_stay, Careless),
        (check_refinement_is_private, OneForAll),
        (check_refinement_lowers_the_residual, Climbs),
    ],
)
def test_refinement_laws_find_their_defect(
    check: Callable[[type[LearnedForward]], None], kind: type[LearnedForward]
) -> None:
    with pytest.raises(AssertionError):
        check(kind)


# --- regularisers ----------------------------------------------------------------------------------------------------


class NoLimit(TrustRegion):
    """Defect: lets everything pass."""

    def limit(self, correction: Tensor, sigma: float) -> Tensor:
        return correction


class BatchLimit(TrustRegion):
    """Defect: one size for the whole batch."""

    def limit(self, correction: Tensor, sigma: float) -> Tensor:
        size = correction.square().mean().sqrt()
        return correction * (self.weight * sigma / size).clamp(max=1.0)


def check_trust(kind: type[Regulariser]) -> None:
    """A correction keeps its direction and, per image, at most weight * sigma; a small one passes untouched."""
    regulariser = kind(0.5, make_prior())
    large = randn(2, 4, 8, 8, dtype=torch.float64) * torch.tensor([5.0, 0.01], dtype=torch.float64)[:, None, None, None]
    limited = regulariser.limit(large, 0.4)
    size = limited.square().mean((1, 2, 3)).sqrt()
    assert abs(float(size[0]) - 0.2) <= TOL[torch.float64].atol
    cosine = torch.nn.functional.cosine_similarity(limited[0].flatten(), large[0].flatten(), dim=0)
    assert abs(float(cosine) - 1) <= TOL[torch.float64].atol
    assert torch.equal(limited[1], large[1])
    assert torch.equal(regulariser.limit(torch.zeros_like(large), 0.4), torch.zeros_like(large))


def test_trust_region_bounds_each_image() -> None:
    check_trust(TrustRegion)


@pytest.mark.parametrize("kind", [NoLimit, BatchLimit])
def test_trust_law_finds_a_missing_bound(kind: type[Regulariser]) -> None:
    with pytest.raises(AssertionError):
        check_trust(kind)


class AwayFromRoundTrip(AutoencoderConsistency):
    """Defect: wrong sign."""

    def pull(self, z0: Tensor, data: DataTerm) -> Tensor:
        return 2 * z0 - super().pull(z0, data)


def check_consistency(kind: type[Regulariser]) -> None:
    """The latent goes the share `weight` of the way to its round trip D then E."""
    data, z0 = lossy_data()
    round_trip = data.prior.encode(data.prior.decode(z0))
    assert float((round_trip - z0).abs().max()) > 0.1, "the autoencoder loses nothing, so nothing is shown"
    for weight in (0.0, 0.3, 1.0):
        assert_close(kind(weight, data.prior).pull(z0, data), torch.lerp(z0, round_trip, weight))


def test_consistency_moves_to_the_round_trip() -> None:
    check_consistency(AutoencoderConsistency)


def test_consistency_law_finds_a_wrong_sign() -> None:
    with pytest.raises(AssertionError):
        check_consistency(AwayFromRoundTrip)


class GluesNothing(Gluing):
    """Defect: forgets the measurement and pulls to the plain round trip."""

    def pull(self, z0: Tensor, data: DataTerm) -> Tensor:
        return torch.lerp(z0, self.prior.encode(self.prior.decode(z0)), self.weight)


def check_gluing(kind: type[Regulariser], name: str) -> None:
    """Over an exact autoencoder the latent goes the share `weight` of the way to the measurement-consistent one."""
    z0 = latents()
    data = make_data(name, z0, config=GuidanceConfig(beta=1.0))
    for weight in (0.0, 0.4, 1.0):
        expected = z0 + weight * data.projection(z0, ones(z0))
        assert_close(kind(weight, data.prior).pull(z0, data), expected)


@pytest.mark.parametrize("name", KINDS)
def test_gluing_moves_to_the_consistent_latent(name: str) -> None:
    check_gluing(Gluing, name)


def test_gluing_law_finds_a_forgotten_measurement() -> None:
    with pytest.raises(AssertionError):
        check_gluing(GluesNothing, "latent")


class AddsNoise(Renoise):
    """Defect: fresh noise on top of the old."""

    def renoise(self, z_t: Tensor, z0: Tensor, alpha: float, sigma: float, generators: Any) -> Tensor:
        mixed = super().renoise(z_t, z0, alpha, sigma, generators)
        return mixed + (1 - (1 - self.weight) ** 0.5) * (z_t - alpha * z0)


class KeepsTheOld(Renoise):
    """Defect: ignores the share."""

    def renoise(self, z_t: Tensor, z0: Tensor, alpha: float, sigma: float, generators: Any) -> Tensor:
        return z_t


def check_renoise(kind: type[Regulariser], share: float) -> None:
    """The noise level stays, the share `weight` of its variance is new, and no share or no level changes nothing."""
    alpha, sigma = 0.8, 0.6
    z0, noise = latents(2, 64), randn(2, 12, 64, 64, seed=11, dtype=torch.float64)
    z_t = alpha * z0 + sigma * noise

    def renoise(weight: float, level: tuple[float, float]) -> Tensor:
        draw = [torch.Generator().manual_seed(k) for k in range(2)]
        return kind(weight, make_prior()).renoise(z_t, z0, *level, draw)

    mixed = (renoise(share, (alpha, sigma)) - alpha * z0) / sigma
    # 49152 numbers per image: a standard deviation is known to 0.3 %, a correlation to 0.5 %.
    assert (mixed.std((1, 2, 3)) - 1).abs().max() < 0.02
    correlation = (mixed * noise).mean((1, 2, 3))
    assert (correlation - (1 - share) ** 0.5).abs().max() < 0.02
    assert (mixed[0] * mixed[1]).mean() < 0.02, "the images share their noise"
    assert_close(renoise(0.0, (alpha, sigma)), z_t)
    assert torch.equal(renoise(share, (1.0, 0.0)), z_t)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_renoise_keeps_the_level(share: float) -> None:
    check_renoise(Renoise, share)


@pytest.mark.parametrize("kind", [AddsNoise, KeepsTheOld])
def test_renoise_law_finds_a_wrong_mixture(kind: type[Regulariser]) -> None:
    with pytest.raises(AssertionError):
        check_renoise(kind, 0.5)


# --- inputs ----------------------------------------------------------------------------------------------------------


class InPlace(LatentINN):
    """Defect: writes into the estimate."""

    def projection(self, z0: Tensor, gain: Tensor) -> Tensor:
        correction = super().projection(z0, gain)
        z0 += correction
        return correction


def check_inputs_stay(data: DataTerm, z0: Tensor) -> None:
    """No method changes its tensors or asks for their gradients, with or without a surrounding no_grad."""
    kept, target = z0.clone(), data.target.clone()
    with torch.no_grad():
        corrections = [data.projection(z0, ones(z0)), data.descent(z0, ones(z0))]
    assert all(not c.requires_grad for c in corrections)
    assert torch.equal(z0, kept)
    assert torch.equal(data.target, target)
    assert not z0.requires_grad


@pytest.mark.parametrize("name", KINDS)
def test_inputs_stay(name: str) -> None:
    z0 = latents()
    check_inputs_stay(make_data(name, z0), z0)


def test_input_law_finds_writing_in_place() -> None:
    z0 = latents()
    with pytest.raises(AssertionError):
        check_inputs_stay(make_data("latent", z0, kind=InPlace), z0)
