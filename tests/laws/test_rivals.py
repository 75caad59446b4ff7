"""Laws of the rivals: each one does what its paper's formula says, costs what it states, and keeps to the contract.

The prior is Gaussian and the autoencoder an isometry, x = Q^T z + b, so that every formula can be worked out a second
time with matrices: `dense` writes A, D and E down as such. Each law also runs on a planted defect that it must find.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from latentindigo.baselines import Downsampled, Restorer
from latentindigo.degradations import gaussian_kernel
from latentindigo.guidance import GuidanceConfig, draw_noise, make_regulariser
from latentindigo.operators import Blur, Mask, Operator, Scale
from latentindigo.prior import Calls, LatentPrior
from latentindigo.rivals import (
    PSLD,
    DiffBIRGuidance,
    LatentDAPS,
    LatentDDNM,
    LatentDiffPIR,
    LatentDPS,
    Latino,
    ReSample,
    SDEdit,
)
from latentindigo.sampler import restore_latent
from latentindigo.solver import LatentSolver, Problem, damped_inverse, gradient_of, gradient_through
from tolerances import assert_close, in_dtype
from toys import ConvDenoiser, GaussianDenoiser, LinearVAE, gaussian_prior, randn

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Standard deviation of the latents, another one in each channel, so that what a method does to one part of an image
# shows in the others; small, so that pixels stay inside [0, 1], where clamping does nothing.
SPREAD = torch.linspace(0.05, 0.11, 12, dtype=torch.float64).view(1, 12, 1, 1)
SIZE = (8, 12)
SEEDS = [3, 4]


def ddim(**settings: Any) -> DDIMScheduler:
    return DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing", **settings)


def toy_prior(mean: float = 0.0, std: float | Tensor = SPREAD) -> LatentPrior:
    prior = gaussian_prior(ddim(), "v_prediction", vae=in_dtype(LinearVAE(), torch.float64), mean=mean, std=std)
    # A prior hands latents over in the dtype of the denoiser's weights, of which this one has none.
    prior.denoiser.dtype_of_weights = torch.nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)
    return prior


def nonlinear_prior(dtype: torch.dtype = torch.float64) -> LatentPrior:
    vae = in_dtype(LinearVAE(4), dtype)
    denoiser = in_dtype(ConvDenoiser(vae.config.latent_channels), dtype)
    return LatentPrior(vae, denoiser, ddim(), prediction_type="v_prediction")


def blurred(scale: int = 2) -> Downsampled:
    return Downsampled(gaussian_kernel(5, 0.8), scale)


def photos(height: int, width: int, count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images around mid-grey, well inside [0, 1]."""
    coarse = randn(count, 3, height // 2 + 1, width // 2 + 1, seed=seed, dtype=torch.float64)
    return (0.5 + 0.08 * F.interpolate(coarse, (height, width), mode="bicubic")).clamp(0.2, 0.8).to(dtype)


def measured(operator: Operator, noise: float = 0.02) -> Tensor:
    y = operator.forward(photos(*SIZE))
    return y + noise * randn(*y.shape, seed=9, dtype=torch.float64)


def dense(linear: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
    """The matrix of an affine map of one image (C, H, W), without its constant."""
    size = math.prod(shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return (linear(basis) - linear(torch.zeros(1, *shape, dtype=torch.float64))).flatten(1).T


def apply(matrix: Tensor, x: Tensor, like: Tensor) -> Tensor:
    return (x.flatten(1) @ matrix.T).reshape(like.shape)


def inside(x: Tensor) -> Tensor:
    """The same images, known to lie inside [0, 1], so that a comparison sees more than the clamp."""
    assert float(x.min()) > 0
    assert float(x.max()) < 1
    return x


def make_problem(solver: LatentSolver, y: Tensor, seeds: Sequence[int] = SEEDS, scale: int = 2) -> Problem:
    """What a solver is given in its first step, canvas and output being of one size."""
    operator = solver.operator_for(scale)
    trajectory = solver.prior.trajectory(solver.steps, solver.strength)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    begin = operator.initial(y)
    return Problem(trajectory, operator, y, begin, (begin.shape[-2], begin.shape[-1]), generators)


@dataclass
class Reference:
    """The same prior and operator as plain algebra: the start of a run, the denoiser, and matrices."""

    prior: LatentPrior
    operator: Operator
    y: Tensor
    steps: int
    strength: float

    def __post_init__(self) -> None:
        self.trajectory = self.prior.trajectory(self.steps, self.strength)
        self.generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        self.z_shape = self.prior.encode(self.operator.initial(self.y)).shape[1:]
        self.decoder = dense(self.prior.decode, self.z_shape)
        self.encoder = dense(self.prior.encode, (3, *SIZE))
        self.matrix = dense(self.operator.forward, (3, *SIZE))

    def fresh(self) -> Tensor:
        noise = [torch.randn(self.z_shape, generator=g) for g in self.generators]
        return torch.stack(noise).double()

    def start(self) -> Tensor:
        """Diffused encoding of the operator's start image."""
        alpha, sigma = self.trajectory.alpha_sigma(0)
        return alpha * self.prior.encode(self.operator.initial(self.y)) + sigma * self.fresh()

    def gain(self, i: int) -> Tensor:
        """z_{0,t} = gain z_t for z_0 ~ N(0, SPREAD²)."""
        alpha, sigma = self.trajectory.alpha_sigma(i)
        return alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)


# --- gradients through the denoiser ----------------------------------------------------------------------------------

ONE_STEP: dict[str, Any] = {"steps": 1, "strength": 0.6}


def check_gradient(make: Callable[..., LatentSolver], omega: float, gamma: float) -> None:
    """One level of DPS or PSLD is z_0 minus the gradient, worked out by hand."""
    operator = blurred()
    y = measured(operator)
    reference = Reference(toy_prior(), operator, y, **ONE_STEP)
    z_t, gain = reference.start(), reference.gain(0)
    z0 = gain * z_t
    x = reference.prior.decode(z0)
    residual = y - operator.forward(x)
    through = reference.matrix @ reference.decoder
    norm = residual.flatten(1).norm(dim=1)[:, None, None, None]
    # The papers' pixels lie in [-1, 1], hence the 2.
    gradient = -2 * omega * apply(through.T, residual / norm, z0)
    if gamma:
        gram = reference.matrix.T @ reference.matrix
        glued = reference.prior.encode(x + apply(reference.matrix.T, residual, x))
        gap = glued - z0
        inner = reference.encoder @ (torch.eye(len(gram), dtype=torch.float64) - gram) @ reference.decoder
        slope = inner - torch.eye(len(inner), dtype=torch.float64)
        gradient = gradient + gamma * apply(slope.T, gap / gap.flatten(1).norm(dim=1)[:, None, None, None], z0)
    expected = reference.prior.decode(z0 - gain * gradient)
    assert float((expected - x).abs().max()) > 1e-3, "the step is too small to tell"
    assert_close(make(toy_prior(), operator, **ONE_STEP)(y, 2, SEEDS), inside(expected))


class SquaredNorm(LatentDPS):
    """Defect: the gradient of the squared norm."""

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        z0, gradient = gradient_through(problem, z_t, i, lambda z0: problem.distance(problem.decode(z0)).square())
        return problem.ddim(z_t, z0, i, self.eta) - self.zeta * gradient


class Stopped(LatentDPS):
    """Defect: the gradient stops at z_0."""

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        z0 = problem.predict(z_t, i)
        gradient = gradient_of(lambda z0: problem.distance(problem.decode(z0)), z0)
        return problem.ddim(z_t, z0, i, self.eta) - self.zeta * gradient


class GluedToItself(PSLD):
    """Defect: the gluing leaves the measurement out."""

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        return super().advance(replace(problem, y=problem.operator.forward(problem.begin)), z_t, i)


def test_dps_descends_the_gradient() -> None:
    check_gradient(lambda *parts, **settings: LatentDPS(*parts, zeta=0.7, **settings), 0.7, 0.0)


def test_psld_descends_both_gradients() -> None:
    check_gradient(lambda *parts, **settings: PSLD(*parts, omega=0.7, gamma=0.4, **settings), 0.7, 0.4)


@pytest.mark.parametrize(
    ("defect", "gamma"),
    [
        (SquaredNorm, 0.0),
        (Stopped, 0.0),
        (GluedToItself, 0.1),
        (lambda *parts, **settings: PSLD(*parts, gamma=0.0, **settings), 0.1),
        (lambda *parts, **settings: LatentDPS(*parts, zeta=1.1, **settings), 0.0),
    ],
    ids=["squared", "stopped", "wrong measurement", "no gluing", "wrong step"],
)
def test_the_gradient_law_finds_other_gradients(defect: Callable[..., LatentSolver], gamma: float) -> None:
    with pytest.raises(AssertionError):
        check_gradient(defect, 1.0, gamma)


# --- data steps in pixels --------------------------------------------------------------------------------------------

THREE_STEPS: dict[str, Any] = {"steps": 3, "strength": 0.8}
TOLD = 0.03


@dataclass(frozen=True)
class Formula:
    """What tells the three methods apart: rho of the data step (None: the exact pseudo-inverse), and the noise."""

    make: Callable[..., LatentSolver]
    rho: Callable[[float, float], float] | None
    from_corrected: bool
    share: float
    noise: float = TOLD


FORMULAS = {
    "diffpir": Formula(
        lambda *parts, **settings: LatentDiffPIR(*parts, lam=2.0, zeta=0.3, **settings),
        lambda alpha, sigma: 2.0 * TOLD**2 / (sigma / alpha) ** 2,
        from_corrected=True,
        share=0.3,
    ),
    "ddnm": Formula(
        lambda *parts, **settings: LatentDDNM(*parts, eta=0.6, **settings),
        None,
        from_corrected=False,
        share=0.36,
        noise=0.0,
    ),
    "latino": Formula(
        lambda *parts, **settings: Latino(*parts, delta=0.5, **settings),
        lambda alpha, sigma: TOLD**2 / (0.5 * sigma**2),
        from_corrected=True,
        share=1.0,
    ),
}


def check_data_steps(formula: Formula) -> None:
    """Three levels are what the normal equations and the paper's noise give."""
    operator = Scale(2)
    y = measured(operator)
    reference = Reference(toy_prior(), operator, y, **THREE_STEPS)
    a = reference.matrix
    identity = torch.eye(a.shape[1], dtype=torch.float64)
    z_t, x_hat = reference.start(), torch.empty(0)
    for i in range(3):
        (alpha, sigma), (next_alpha, next_sigma) = (reference.trajectory.alpha_sigma(k) for k in (i, i + 1))
        z0 = reference.gain(i) * z_t
        x = reference.prior.decode(z0)
        if formula.rho is None:
            x_hat = x + apply(torch.linalg.pinv(a), y - operator.forward(x), x)
        else:
            rho = formula.rho(alpha, sigma)
            right = apply(a.T, y, x) + rho * x
            x_hat = torch.linalg.solve(a.T @ a + rho * identity, right.flatten(1).T).T.reshape(x.shape)
        if next_sigma:
            corrected = reference.prior.encode(x_hat)
            eps = (z_t - alpha * (corrected if formula.from_corrected else z0)) / sigma
            mixed = math.sqrt(1 - formula.share) * eps + math.sqrt(formula.share) * reference.fresh()
            z_t = next_alpha * corrected + next_sigma * mixed
    restored = formula.make(toy_prior(), operator, noise=formula.noise, **THREE_STEPS)(y, 2, SEEDS)
    # Conjugate gradients stop at a residual of 1e-10 of the right-hand side; a small rho enlarges the rest.
    torch.testing.assert_close(restored, inside(x_hat), atol=1e-6, rtol=0)


class FixedRho(LatentDiffPIR):
    """Defect: the trust in the prior does not follow the noise level."""

    def data_step(self, problem: Problem, x: Tensor, i: int) -> Tensor:
        return problem.prox(x, self.lam * self.noise**2)


class GradientStep(LatentDDNM):
    """Defect: the adjoint in the place of the pseudo-inverse."""

    def data_step(self, problem: Problem, x: Tensor, i: int) -> Tensor:
        return x + problem.back(problem.residual(x))


class OldNoise(Latino):
    """Defect: keeps the predicted noise instead of drawing."""

    def onward(self, problem: Problem, z_t: Tensor, z0: Tensor, corrected: Tensor, i: int) -> Tensor:
        return problem.ddim(z_t, corrected, i)


class EncodedOnceMore(LatentDDNM):
    """Defect: the output is the estimate before its data step."""

    def finish(self, problem: Problem, z0: Tensor) -> Tensor:
        return problem.decode(z0)


class NoiseOfTheCorrected(LatentDDNM):
    """Defect: DiffPIR's noise."""

    def onward(self, problem: Problem, z_t: Tensor, z0: Tensor, corrected: Tensor, i: int) -> Tensor:
        return super().onward(problem, z_t, corrected, corrected, i)


@pytest.mark.parametrize("name", FORMULAS)
def test_data_steps_follow_the_paper(name: str) -> None:
    check_data_steps(FORMULAS[name])


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("diffpir", lambda *parts, **settings: FixedRho(*parts, lam=2.0, zeta=0.3, **settings)),
        ("diffpir", lambda *parts, **settings: LatentDiffPIR(*parts, lam=2.0, zeta=0.2, **settings)),
        ("ddnm", lambda *parts, **settings: GradientStep(*parts, eta=0.6, **settings)),
        ("ddnm", lambda *parts, **settings: EncodedOnceMore(*parts, eta=0.6, **settings)),
        ("ddnm", lambda *parts, **settings: NoiseOfTheCorrected(*parts, eta=0.6, **settings)),
        ("latino", lambda *parts, **settings: OldNoise(*parts, delta=0.5, **settings)),
    ],
)
def test_the_data_step_law_finds_other_formulas(name: str, defect: Callable[..., LatentSolver]) -> None:
    with pytest.raises(AssertionError):
        check_data_steps(replace(FORMULAS[name], make=defect))


def check_agreement(make: Callable[..., LatentSolver], **settings: Any) -> None:
    """Without noise the output agrees with the measurement: A x = y."""
    y = measured(Scale(2), noise=0.0)
    restored = make(toy_prior(), Scale(2), steps=4, **settings)(y, 2, SEEDS)
    torch.testing.assert_close(Scale(2).forward(inside(restored)), y, atol=1e-8, rtol=0)


def test_ddnm_agrees_with_the_measurement_exactly() -> None:
    check_agreement(LatentDDNM)


def test_latino_and_diffpir_agree_in_the_limit_of_trust() -> None:
    check_agreement(Latino, delta=1e9)
    check_agreement(LatentDiffPIR, lam=1e-9)


@pytest.mark.parametrize("defect", [EncodedOnceMore, GradientStep, SDEdit])
def test_the_agreement_law_finds_solvers_that_do_not_agree(defect: Callable[..., LatentSolver]) -> None:
    make = (lambda prior, operator, **settings: SDEdit(prior, **settings)) if defect is SDEdit else defect
    with pytest.raises(AssertionError):
        check_agreement(make)


# --- ReSample --------------------------------------------------------------------------------------------------------


def check_resampling(make: Callable[..., ReSample]) -> None:
    """The draw is from the product of N(alpha z_0(y), sigma²) and N(z', s²), with the paper's s²."""
    solver = make(toy_prior(), Scale(2), steps=5, gamma=7.0)
    problem = make_problem(solver, measured(Scale(2)))
    consistent, moved = (0.3 * randn(2, 12, 4, 6, seed=k, dtype=torch.float64) for k in (1, 2))
    bars = [problem.trajectory.alpha_sigma(i)[0] ** 2 for i in (2, 3)]
    s2 = 7.0 * (1 - bars[1]) / (1 - bars[0]) * (1 - bars[0] / bars[1])
    precision = 1 / (1 - bars[1]) + 1 / s2
    mean = (math.sqrt(bars[1]) * consistent / (1 - bars[1]) + moved / s2) / precision
    noise = draw_noise(mean, [torch.Generator().manual_seed(seed) for seed in SEEDS])
    assert_close(solver.resample(problem, consistent, moved, 2), mean + noise / math.sqrt(precision))


class TooNoisy(ReSample):
    """Defect: the variance of one of the two Gaussians instead of their product's."""

    def resample(self, problem: Problem, consistent: Tensor, moved: Tensor, i: int) -> Tensor:
        alpha, sigma = problem.trajectory.alpha_sigma(i + 1)
        s2 = self.gamma * sigma**2 * problem.ancestral(i, 1.0)
        mean = (s2 * alpha * consistent + sigma**2 * moved) / (s2 + sigma**2)
        return mean + s2**0.5 * problem.draw(mean)


class Unscaled(ReSample):
    """Defect: z_0(y) without alpha."""

    def resample(self, problem: Problem, consistent: Tensor, moved: Tensor, i: int) -> Tensor:
        alpha, _ = problem.trajectory.alpha_sigma(i + 1)
        return super().resample(problem, consistent / alpha, moved, i)


def test_resampling_is_the_product_of_two_gaussians() -> None:
    check_resampling(ReSample)


def test_the_resampling_law_finds_other_draws() -> None:
    for defect in (TooNoisy, Unscaled):
        with pytest.raises(AssertionError):
            check_resampling(defect)
    with pytest.raises(AssertionError):
        check_resampling(lambda *parts, **settings: ReSample(*parts, **{**settings, "gamma": 40.0}))


def check_hard_consistency(make: Callable[..., ReSample], told: float) -> None:
    """The output fits y to the tolerance, or to the noise it was told, and no closer than one step beyond."""
    y = measured(Scale(2), noise=max(told, 1e-6))
    solver = make(toy_prior(), Scale(2), steps=6, every=1, look_ahead=1, tolerance=0.002, noise=told)
    restored = solver(y, 2, SEEDS)
    error = 2 * (y - Scale(2).forward(inside(restored))).square().flatten(1).mean(1).sqrt()
    assert bool((error <= max(0.002, 2 * told)).all())
    if told:
        assert bool((error > 1.2 * told).all())


@pytest.mark.parametrize("told", [0.0, 0.03])
def test_resample_is_consistent_to_its_tolerance(told: float) -> None:
    check_hard_consistency(ReSample, told)


def test_the_consistency_law_finds_an_early_stop_and_a_fit_of_noise() -> None:
    with pytest.raises(AssertionError):
        check_hard_consistency(
            lambda *parts, **settings: ReSample(*parts, latent_iterations=3, pixel_iterations=3, **settings), 0.0
        )
    with pytest.raises(AssertionError):
        check_hard_consistency(lambda *parts, **settings: ReSample(*parts, **{**settings, "noise": 0.0}), 0.03)


# --- DAPS ------------------------------------------------------------------------------------------------------------


def check_langevin(make: Callable[..., LatentDAPS], i: int) -> None:
    """The chain ends in the Gaussian posterior around the estimate, widened by the finite step as Langevin's is.

    With A = I and an isometric decoder the precision is P = 4/tau² + 1/r² in every direction; a step h then leaves the
    mean right and the variance 1 / (P (1 - h P / 2)).
    """
    steps, tau = 4, 0.2
    y = photos(32, 32)
    solver = make(toy_prior(), Scale(1), steps=steps, strength=0.8, tau=tau, mcmc_steps=60)
    problem = make_problem(solver, y, scale=1)
    alpha, sigma = problem.trajectory.alpha_sigma(i)
    precision = 4 / tau**2 + (alpha / sigma) ** 2
    h = 0.6 / precision
    solver = replace(solver, lr=h / (1 + i / steps * (0.25 - 1)), lr_min_ratio=0.25)
    z_y = solver.prior.encode(y)
    z_hat = z_y + 0.3
    mean = (4 / tau**2 * z_y + (alpha / sigma) ** 2 * z_hat) / precision
    error = (solver.langevin(problem, z_hat, i) - mean) * math.sqrt(precision)
    # 6144 values: the mean is known to 0.015, the variance to 2 %.
    assert abs(float(error.mean())) < 0.05
    assert float(error.var()) == pytest.approx(1 / (1 - 0.3), rel=0.05)


class OtherChain(LatentDAPS):
    """A chain whose noise and whose pull towards the estimate may be wrong."""

    heat, pull = 1.0, 1.0

    def langevin(self, problem: Problem, z_hat: Tensor, i: int) -> Tensor:
        alpha, sigma = problem.trajectory.alpha_sigma(i)
        z, step = z_hat, self.lr * (1 + i / self.steps * (self.lr_min_ratio - 1))
        for _ in range(self.mcmc_steps):
            data = gradient_of(lambda z: problem.distance(problem.decode(z)).square() / (2 * self.tau**2), z)
            drift = data + self.pull * (alpha / sigma) ** 2 * (z - z_hat)
            z = z - step * drift + self.heat * (2 * step) ** 0.5 * problem.draw(z)
        return z


class ColdChain(OtherChain):
    """Defect: sqrt(h) in the place of sqrt(2 h)."""

    heat = 0.5**0.5


class NoPrior(OtherChain):
    """Defect: the estimate is only where the chain starts."""

    pull = 0.0


@pytest.mark.parametrize("i", [0, 3])
def test_langevin_samples_the_posterior(i: int) -> None:
    check_langevin(LatentDAPS, i)
    check_langevin(OtherChain, i)  # So that what follows fails for its defect alone.


@pytest.mark.parametrize("defect", [ColdChain, NoPrior])
def test_the_langevin_law_finds_wrong_chains(defect: Callable[..., LatentDAPS]) -> None:
    with pytest.raises(AssertionError):
        check_langevin(defect, 3)


def check_flow(follow: Callable[[Problem, Tensor, int, int], Tensor], i: int) -> None:
    """The probability flow of a Gaussian, known in closed form, is followed to its end."""
    mean, std = 0.3, 0.6
    solver = SDEdit(toy_prior(mean, std), steps=80, strength=0.8)
    problem = make_problem(solver, measured(Scale(2)))
    alpha, sigma = problem.trajectory.alpha_sigma(i)
    z_t = alpha * mean + math.hypot(alpha * std, sigma) * randn(2, 12, 4, 6, dtype=torch.float64)
    denoiser = solver.prior.denoiser
    assert isinstance(denoiser, GaussianDenoiser)
    # Euler's error on these levels; one step alone ends at the mean of all ends, a standard deviation away.
    torch.testing.assert_close(follow(problem, z_t, i, 80), denoiser.path_end(z_t, alpha, sigma), atol=5e-2, rtol=0)


@pytest.mark.parametrize("i", [0, 40])
def test_the_flow_ends_where_the_closed_form_does(i: int) -> None:
    check_flow(Problem.flow, i)


def test_the_flow_law_finds_a_single_step() -> None:
    with pytest.raises(AssertionError):
        check_flow(lambda problem, z_t, i, count: problem.flow(z_t, i, 1), 0)


# --- DiffBIR ---------------------------------------------------------------------------------------------------------


def regression(y: Tensor, scale: int) -> Tensor:
    """A stage-one image with flat parts, an edge and some texture."""
    x = photos(SIZE[0], SIZE[1], len(y), seed=40)
    x[..., :, SIZE[1] // 2 :] += 0.15
    return x


def slow_weights(x: Tensor) -> Tensor:
    """DiffBIR's weights by loops over the pixels of one image."""
    luma = 0.2989 * x[0] + 0.5870 * x[1] + 0.1140 * x[2]
    height, width = luma.shape

    def at(i: int, j: int) -> float:
        return float(luma[min(max(i, 0), height - 1), min(max(j, 0), width - 1)])

    def magnitude(i: int, j: int) -> float:
        kernel = {(-1, -1): 1, (0, -1): 2, (1, -1): 1, (-1, 1): -1, (0, 1): -2, (1, 1): -1}
        across = sum(weight * at(i + a, j + b) for (a, b), weight in kernel.items())
        down = sum(weight * at(i + b, j + a) for (a, b), weight in kernel.items())
        return math.hypot(across, down)

    weights = torch.empty(1, height, width, dtype=x.dtype)
    for i, j in itertools.product(range(0, height, 2), range(0, width, 2)):
        block = sum(magnitude(i + a, j + b) for a, b in itertools.product((0, 1), (0, 1)))
        weights[:, i : i + 2, j : j + 2] = 1 - math.tanh(block)
    return weights


def check_restoration_guidance(make: Callable[..., LatentSolver], space: str) -> None:
    """One level moves z_0 down the gradient of the weighted distance to the regression's image."""
    settings: dict[str, Any] = {"steps": 1, "strength": 0.6, "s": 0.004}
    y = measured(Scale(2))
    reference = Reference(toy_prior(), Scale(2), y, 1, 0.6)
    target = regression(y, 2)
    alpha, sigma = reference.trajectory.alpha_sigma(0)
    z0 = reference.gain(0) * (alpha * reference.prior.encode(target) + sigma * reference.fresh())
    if space == "latent":
        gradient = 2 / z0[0].numel() * (z0 - reference.prior.encode(target))
    else:
        weights = torch.stack([slow_weights(x) for x in target])
        assert float(weights.max() - weights.min()) > 0.3, "the weights are all alike"
        difference = reference.prior.decode(z0) - target
        gradient = 8 / target[0].numel() * apply(reference.decoder.T, weights * difference, z0)
    expected = reference.prior.decode(z0 - 3000 * 0.004 * gradient)
    assert float((expected - reference.prior.decode(z0)).abs().max()) > 1e-3, "the step is too small to tell"
    assert_close(make(toy_prior(), regression, space=space, **settings)(y, 2, SEEDS), inside(expected))


class GuidedThrough(DiffBIRGuidance):
    """Defect: the gradient goes through the denoiser."""

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        z0, gradient = gradient_through(problem, z_t, i, self._loss(problem))
        return problem.ddim(z_t, z0 - 3000 * self.s * gradient, i, self.eta)


class Unweighted(DiffBIRGuidance):
    """Defect: edges are guided like everything else."""

    def _loss(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        return lambda z0: (2 * (problem.decode(z0) - problem.begin)).square().flatten(1).mean(1)


@pytest.mark.parametrize("space", ["rgb", "latent"])
def test_diffbir_follows_the_regression_where_it_is_smooth(space: str) -> None:
    check_restoration_guidance(DiffBIRGuidance, space)


@pytest.mark.parametrize("defect", [GuidedThrough, Unweighted])
def test_the_guidance_law_finds_other_gradients(defect: Callable[..., LatentSolver]) -> None:
    with pytest.raises(AssertionError):
        check_restoration_guidance(defect, "rgb")


# --- the loop and its steps ------------------------------------------------------------------------------------------


def check_unguided_is_the_stock_sampler(make: Callable[..., LatentSolver], eta: float, strength: float) -> None:
    """A solver without data is the product's own unguided loop with diffusers' DDIM, noise for noise."""
    prior, y = nonlinear_prior(torch.float32), photos(6, 8, dtype=torch.float32)
    restored = make(prior, steps=5, strength=strength, eta=eta)(y, 2, SEEDS)
    padded = F.pad(Scale(2).initial(y), (0, 0, 0, 0))
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    trajectory = prior.trajectory(5, strength, eta=eta)
    regulariser = make_regulariser(GuidanceConfig(), prior)
    with torch.no_grad():
        z = restore_latent(trajectory, prior.encode(padded), None, "projection", regulariser, generators)
        expected = prior.decode(z).clamp(0, 1)
    assert float(((expected > 0) & (expected < 1)).float().mean()) > 0.2, "nearly everything is clamped"
    # Two ways to write one formula, five steps of float32, and a random network that enlarges differences.
    torch.testing.assert_close(restored, expected, atol=1e-3, rtol=0)


class Kept(SDEdit):
    """Defect: no fresh noise, whatever eta says."""

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        return problem.ddim(z_t, problem.predict(z_t, i), i, 0.0)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sdedit_is_the_unguided_sampler(eta: float, strength: float) -> None:
    check_unguided_is_the_stock_sampler(SDEdit, eta, strength)


def test_the_stock_law_finds_missing_noise() -> None:
    with pytest.raises(AssertionError):
        check_unguided_is_the_stock_sampler(Kept, 1.0, 0.6)


# --- costs -----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"steps": 6, "strength": 0.8}
RIVALS: dict[str, Callable[[LatentPrior], LatentSolver]] = {
    "dps": lambda prior: LatentDPS(prior, blurred(), **SMALL),
    "psld": lambda prior: PSLD(prior, blurred(), **SMALL),
    "resample": lambda prior: ReSample(
        prior, blurred(), every=2, look_ahead=2, pixel_iterations=3, latent_iterations=2, **SMALL
    ),
    "diffpir": lambda prior: LatentDiffPIR(prior, blurred(), noise=0.02, **SMALL),
    "ddnm": lambda prior: LatentDDNM(prior, blurred(), noise=0.02, **SMALL),
    "latino": lambda prior: Latino(prior, blurred(), noise=0.02, **SMALL),
    "daps": lambda prior: LatentDAPS(prior, blurred(), ode_steps=3, mcmc_steps=4, tau=0.1, **SMALL),
    "diffbir": lambda prior: DiffBIRGuidance(prior, lambda y, scale: Scale(scale).initial(y), **SMALL),
    "diffbir latent": lambda prior: DiffBIRGuidance(
        prior, lambda y, scale: Scale(scale).initial(y), space="latent", **SMALL
    ),
    "sdedit": lambda prior: SDEdit(prior, **SMALL),
}
# Denoiser and its backward, decoder and its backward, encoder; the output's decoding and the start's encoding included.
COSTS = {
    "dps": (6, 6, 7, 6, 1),
    "psld": (6, 6, 7, 6, 7),
    # Hard steps with 4 and 2 levels left, both still in pixels (a third is the last 2 levels): two of look-ahead each.
    "resample": (6 + 4, 6, 6 + 2 + 2 + 1, 6 + 2, 1 + 2),
    "diffpir": (6, 0, 6, 0, 6),
    "ddnm": (6, 0, 6, 0, 6),
    "latino": (6, 0, 6, 0, 6),
    "daps": (3 + 3 + 3 + 3 + 2 + 1, 0, 6 * 4 + 1, 6 * 4, 1),
    "diffbir": (6, 0, 7, 6, 1),
    "diffbir latent": (6, 0, 1, 0, 1),
    "sdedit": (6, 0, 1, 0, 1),
}


def check_costs(make: Callable[[LatentPrior], LatentSolver], costs: tuple[int, ...]) -> None:
    """What a solver states is what it spends, and what its docstring says of the other networks."""
    calls = Calls()
    solver = make(nonlinear_prior().counting(calls))
    solver(photos(5, 7), 2, SEEDS)
    assert solver.nfe == calls.denoiser
    assert asdict(calls) == dict(zip(asdict(Calls()), (*costs, 0), strict=True))


class Twice(SDEdit):
    """Defect: an evaluation that is not stated."""

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        problem.predict(z_t, i)
        return super().advance(problem, z_t, i)


@pytest.mark.parametrize("name", RIVALS)
def test_costs_are_those_stated(name: str) -> None:
    check_costs(RIVALS[name], COSTS[name])


def test_the_cost_law_finds_a_hidden_evaluation() -> None:
    with pytest.raises(AssertionError):
        check_costs(lambda prior: Twice(prior, **SMALL), COSTS["sdedit"])


def test_resample_ends_in_the_latent_space() -> None:
    """With hard steps at every level, the last third fits latents and pays with decodings, not with encodings."""
    calls = Calls()
    prior = nonlinear_prior().counting(calls)
    ReSample(prior, blurred(), steps=6, every=1, look_ahead=0, pixel_iterations=2, latent_iterations=3)(
        photos(5, 7), 2, SEEDS
    )
    # 4 levels may be hard: those with 4, 3 and 2 left in pixels, the one with 1 left and the end in the latent space.
    assert calls.encoder == 3
    assert calls.decoder == 6 + 3 + 2 * 3 + 1


# --- the contract ----------------------------------------------------------------------------------------------------


def check_same_seeds_same_bytes(solver: LatentSolver) -> None:
    y = photos(5, 7, dtype=torch.float32)
    first = solver(y, 2, [3, 4])
    torch.manual_seed(99)
    assert torch.equal(solver(y, 2, [3, 4]), first)
    assert not torch.equal(solver(y, 2, [5, 4])[0], first[0])


def check_alone_is_together(solver: LatentSolver) -> None:
    """An image in a batch is the image alone; 10 x 14 pixels do not fit the networks, so the canvas is padded."""
    y = photos(5, 7)
    y[1] = 0.5 + 0.3 * (y[1] - 0.5)
    together = solver(y, 2, SEEDS)
    assert together.shape == (2, 3, 10, 14)
    assert float(together.min()) >= 0
    assert float(together.max()) <= 1
    for k in range(2):
        # Solvers by iteration stop at a residual; the rest is the order of sums.
        torch.testing.assert_close(solver(y[k : k + 1], 2, SEEDS[k : k + 1])[0], together[k], atol=1e-6, rtol=0)


def check_leaves_no_trace(solver: LatentSolver) -> None:
    """Arguments and weights stay as they are, no gradient or graph is left, and the caller's mode does not matter."""
    y = photos(5, 7)
    kept, weights = y.clone(), [p.detach().clone() for p in parameters(solver)]
    restored = solver(y.requires_grad_(), 2, SEEDS)
    assert not restored.requires_grad
    assert y.grad is None
    assert torch.equal(y.detach(), kept)
    for parameter, weight in zip(parameters(solver), weights, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, weight)
    with torch.no_grad():
        assert torch.equal(solver(y, 2, SEEDS), restored)


def parameters(solver: LatentSolver) -> list[torch.nn.Parameter]:
    return [*solver.prior.denoiser.parameters(), *solver.prior.vae.parameters()]


class GlobalNoise(SDEdit):
    """Defect: noise that no seed decides."""

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        return super().advance(problem, z_t, i) + 0.01 * torch.randn_like(z_t)


class SharedNorm(LatentDPS):
    """Defect: one norm for the whole batch."""

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        z0, gradient = gradient_through(
            problem, z_t, i, lambda z0: problem.distance(problem.decode(z0)).square().sum().sqrt()
        )
        return problem.ddim(z_t, z0, i, self.eta) - self.zeta * gradient


class Spoils(SDEdit):
    """Defect: writes into the measurement."""

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        problem.y.mul_(0.99)
        return super().advance(problem, z_t, i)


class Learns(LatentDPS):
    """Defect: gradients that stay in the weights."""

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        with torch.enable_grad():
            problem.distance(problem.decode(problem.predict(z_t, i))).sum().backward()
        return super().advance(problem, z_t, i)


@pytest.mark.parametrize("name", RIVALS)
def test_same_seeds_same_bytes(name: str) -> None:
    check_same_seeds_same_bytes(RIVALS[name](nonlinear_prior(torch.float32)))


@pytest.mark.parametrize("name", RIVALS)
def test_an_image_alone_is_the_image_in_a_batch(name: str) -> None:
    check_alone_is_together(RIVALS[name](nonlinear_prior()))


@pytest.mark.parametrize("name", RIVALS)
def test_nothing_is_left_behind(name: str) -> None:
    check_leaves_no_trace(RIVALS[name](nonlinear_prior()))


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_are_restorers(name: str) -> None:
    solver = RIVALS[name](nonlinear_prior())
    assert isinstance(solver, Restorer)
    assert solver.name


def test_the_contract_laws_find_breaches() -> None:
    prior = nonlinear_prior()
    with pytest.raises(AssertionError):
        check_same_seeds_same_bytes(GlobalNoise(nonlinear_prior(torch.float32), **SMALL))
    with pytest.raises(AssertionError):
        check_alone_is_together(SharedNorm(prior, blurred(), **SMALL))
    with pytest.raises(AssertionError):
        check_leaves_no_trace(Spoils(prior, **SMALL))
    with pytest.raises(AssertionError):
        check_leaves_no_trace(Learns(prior, blurred(), **SMALL))


# --- operators -------------------------------------------------------------------------------------------------------

OPERATORS: dict[str, Operator] = {
    "blur and x2": blurred(),
    "blur and x4": Downsampled(gaussian_kernel(9, 1.5), 4),
    "x2 alone": Downsampled(None, 2),
    "blur alone": Downsampled(gaussian_kernel(5, 1.1), 1),
    "nothing": Downsampled(None, 1),
}


def check_adjoint(operator: Any) -> None:
    """<A x, y> = <x, A^T y>."""
    x = randn(2, 3, 8, 12, seed=1, dtype=torch.float64)
    image = operator.forward(x)
    y = randn(*image.shape, seed=2, dtype=torch.float64)
    assert_close((image * y).sum(), (x * operator.adjoint(y)).sum())


class SwappedOrder(Downsampled):
    """Defect: the transpose of the downsampling alone, blurred as if a blur were its own transpose at the borders."""

    def adjoint(self, y: Tensor) -> Tensor:
        spread = Scale(self.scale).adjoint(y)
        return Blur(gaussian_kernel(5, 0.8)).forward(spread)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_transpose(name: str) -> None:
    check_adjoint(OPERATORS[name])


def test_the_adjoint_law_finds_a_blur_at_the_borders() -> None:
    with pytest.raises(AssertionError):
        check_adjoint(SwappedOrder(gaussian_kernel(5, 0.8), 2))


def holes() -> Tensor:
    return (randn(8, 12, seed=5) > -0.5).double()


def check_damped_inverse(invert: Callable[..., Tensor], operator: Operator, damping: float) -> None:
    """A^T (A A^T + lambda I)^-1 y, by matrices."""
    a = dense(operator.forward, (1, 8, 12))
    y = operator.forward(photos(8, 12)[:, :1]) - 0.5
    normal = a @ a.T + damping * torch.eye(len(a), dtype=torch.float64)
    expected = apply(a.T, (torch.linalg.pinv(normal) @ y.flatten(1).T).T, torch.empty(2, 1, 8, 12))
    # Ten digits of the residual; what the damping leaves of them in the solution.
    torch.testing.assert_close(invert(operator, y, damping), expected, atol=1e-6, rtol=0)


SOLVED: dict[str, Operator] = {**OPERATORS, "mask": Mask(holes())}


@pytest.mark.parametrize("damping", [1e-3, 1e-1])
@pytest.mark.parametrize("name", SOLVED)
def test_the_damped_inverse_is_exact_for_any_operator(name: str, damping: float) -> None:
    check_damped_inverse(damped_inverse, SOLVED[name], damping)


def test_the_damped_inverse_needs_no_damping_where_the_operator_is_regular() -> None:
    check_damped_inverse(damped_inverse, OPERATORS["x2 alone"], 0.0)


def test_the_inverse_law_finds_an_early_stop() -> None:
    with pytest.raises(AssertionError):
        check_damped_inverse(lambda *parts: damped_inverse(*parts, iterations=1), blurred(), 1e-3)


def check_projection(operator: Any) -> None:
    """The projection agrees with y, as far as a blur lets it, and the start image lies in [0, 1]."""
    x, y = photos(8, 12, seed=3), operator.forward(photos(8, 12))
    before, after = ((operator.forward(z) - y).norm() for z in (x, operator.project(x, y)))
    assert float(after) < 0.02 * float(before)
    assert float((operator.project(x, y, 0.3) - x).norm()) < 0.5 * float((operator.project(x, y) - x).norm())
    start = operator.initial(y)
    assert start.shape == x.shape
    assert float(start.min()) >= 0
    assert float(start.max()) <= 1


class Deaf(Downsampled):
    """Defect: trusts a noisy measurement like any other."""

    def pinv(self, y: Tensor, noise: float | int = 0.0) -> Tensor:
        return super().pinv(y)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_projection_agrees_and_respects_noise(name: str) -> None:
    check_projection(OPERATORS[name])


def test_the_projection_law_finds_blind_trust() -> None:
    with pytest.raises(AssertionError):
        check_projection(Deaf(None, 2))
