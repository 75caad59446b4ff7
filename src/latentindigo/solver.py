"""Restoring with a latent prior and a known operator: the one loop and the few moves that all rival methods share.

A rival of LatentINDIGO is a `LatentSolver`: a frozen dataclass whose `advance` goes down one noise level. What rivals
have in common lives here once, so that they differ in their formulas only: the padded canvas, the start, the noise
levels of the very same `LatentPrior`, one generator per image, and the operations of a `Problem`.

| code | symbol | meaning |
| --- | --- | --- |
| `y` | y | degraded image, y = A x + noise |
| `z_t`, `z0` | z_t, z_{0,t} | noisy latent at level i, z_t = alpha z_0 + sigma eps; the denoiser's estimate of z_0 |
| `eps` | eps_hat | noise that an estimate implies, (z_t - alpha z_0) / sigma |
| `residual` | y - A x | on the part of the canvas that is the image |
| `share` | | share of fresh noise in the variance of the noise at the next level |
| `noise` | sigma_n | standard deviation of the noise in y, [0, 1] units |

The papers' pixels lie in [-1, 1], ours in [0, 1]: `distance` measures residuals in the papers' units, so that their
step sizes mean here what they mean there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentindigo.canvas import make_plan, pad_to
from latentindigo.guidance import draw_noise
from latentindigo.operators import Operator, Scale, conjugate_gradients
from latentindigo.prior import LatentPrior, Trajectory
from latentindigo.schedules import state_dtype

__all__ = [
    "PAPER_RANGE",
    "LatentSolver",
    "OperatorSolver",
    "Problem",
    "damped_inverse",
    "flow_steps",
    "gradient_of",
    "gradient_through",
]

PAPER_RANGE = 2.0  # Width of [-1, 1], the pixels of the papers, in units of ours.


# ---------------------------------------------------------------------------------------------------------- operations


def damped_inverse(
    operator: Operator, y: Float[Tensor, "b c h w"], damping: float, iterations: int = 100
) -> Float[Tensor, "b c h2 w2"]:
    """Return A^T (A A^T + lambda I)^-1 y for any operator, by preconditioned conjugate gradients.

    Every operator here except a mask treats all places alike, away from the borders, so A A^T is nearly diagonal in
    frequency; its response to one pulse gives the diagonal, and the iteration has only the borders left to correct.

    Args:
        operator: A.
        y: Small images or residuals, (B, C, h, w).
        damping: lambda, at least 0.
        iterations: Most iterations.

    Returns:
        (B, C, H, W), dtype of y.
    """
    work = y.to(torch.promote_types(y.dtype, torch.float32))
    height, width = work.shape[-2:]
    pulse = torch.zeros_like(work)
    pulse[..., height // 2, width // 2] = 1
    response = operator.forward(operator.adjoint(pulse)).roll((-(height // 2), -(width // 2)), (-2, -1))
    spectrum = torch.fft.rfft2(response).real.clamp_min(0) + damping
    # A pulse on a masked pixel answers nothing; a positive floor keeps the preconditioner positive definite.
    spectrum = spectrum.clamp_min(1e-6 * spectrum.amax().clamp_min(1.0))

    def normal(u: Tensor) -> Tensor:
        return operator.forward(operator.adjoint(u)) + damping * u

    def precondition(r: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(r) / spectrum, s=(height, width))

    return operator.adjoint(conjugate_gradients(normal, work, precondition, iterations=iterations)).to(y.dtype)


def gradient_of(loss: Callable[[Tensor], Tensor], at: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return the gradient of a loss, one value per image, at a point; the caller's tensor is left alone.

    Args:
        loss: (B, C, h, w) -> (B,).
        at: The point.

    Returns:
        The gradient, shape of `at`.
    """
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        total = loss(leaf).sum()
    return torch.autograd.grad(total, leaf)[0]


def gradient_through(
    problem: Problem, z_t: Float[Tensor, "b c h w"], i: int, loss: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Return z_{0,t} and the gradient of loss(z_{0,t}) with respect to z_t, through the denoiser: 1U + 1U'.

    Args:
        problem: What is being restored.
        z_t: Noisy latents at level i.
        i: The level.
        loss: z_{0,t} -> one value per image.

    Returns:
        The estimate, without its graph, and the gradient.
    """
    with torch.enable_grad():
        leaf = z_t.detach().requires_grad_()
        z0 = problem.predict(leaf, i)
        total = loss(z0).sum()
    return z0.detach(), torch.autograd.grad(total, leaf)[0]


# ------------------------------------------------------------------------------------------------------------- problem


@dataclass(frozen=True)
class Problem:
    """One batch being restored: the measurement, the noise levels, and the moves between them.

    Attributes:
        trajectory: Noise levels; level i is the i-th evaluation, the last level is clean.
        operator: A.
        y: Degraded images (B, 3, h, w).
        begin: Start images on the canvas (B, 3, H, W): the output, padded to what the networks need.
        size: (height, width) of the output, the top left part of the canvas.
        generators: One per image.
    """

    trajectory: Trajectory
    operator: Operator
    y: Tensor
    begin: Tensor
    size: tuple[int, int]
    generators: Sequence[torch.Generator]

    @property
    def levels(self) -> int:
        """Number of denoising levels."""
        return len(self.trajectory)

    @cached_property
    def start(self) -> Tensor:
        """E of the start images: 1E, at the first use."""
        return self.encode(self.begin)

    # --- the prior

    def predict(self, z_t: Tensor, i: int) -> Tensor:
        """z_{0,t}, the denoiser's estimate at level i: 1U."""
        return self.trajectory.predict(z_t, i).z0

    def decode(self, z: Tensor) -> Tensor:
        """D: latents to pixels in [0, 1]."""
        return self.trajectory.prior.decode(z)

    def encode(self, x: Tensor) -> Tensor:
        """E: pixels in [0, 1] to latents."""
        return self.trajectory.prior.encode(x)

    # --- the measurement

    def crop(self, x: Tensor) -> Tensor:
        """The part of the canvas that is the image."""
        return x[..., : self.size[0], : self.size[1]]

    def _on_canvas(self, x: Tensor) -> Tensor:
        """Zero-pad an image to the canvas: the transpose of `crop`."""
        bottom, right = (side - part for side, part in zip(self.begin.shape[-2:], x.shape[-2:], strict=True))
        return F.pad(x, (0, right, 0, bottom))

    def residual(self, x: Tensor) -> Tensor:
        """Return y - A x of an image on the canvas."""
        return self.y - self.operator.forward(self.crop(x))

    def back(self, residual: Tensor) -> Tensor:
        """A^T of a residual, on the canvas."""
        return self._on_canvas(self.operator.adjoint(residual))

    def distance(self, x: Tensor) -> Float[Tensor, " b"]:
        """||y - A x||_2 per image, in the papers' pixel units (see the module's head)."""
        return PAPER_RANGE * torch.linalg.vector_norm(self.residual(x).flatten(1), dim=1)

    def prox(self, x: Tensor, rho: float) -> Tensor:
        """argmin_u ||y - A u||² + rho ||u - x||² = x + A^T (A A^T + rho I)^-1 (y - A x).

        The second form works for any operator and down to rho = 0, where it is the projection on A u = y.
        """
        return x + self._on_canvas(damped_inverse(self.operator, self.residual(x), rho))

    def project(self, x: Tensor, noise: float) -> Tensor:
        """Return x + A^+ (y - A x), with the operator's own pseudo-inverse, damped by the noise in y."""
        return x + self._on_canvas(self.operator.pinv(self.residual(x), noise))

    # --- moves between noise levels

    def draw(self, like: Tensor) -> Tensor:
        """Standard normal noise, each image's from its own generator."""
        return draw_noise(like, self.generators)

    def direction(self, z_t: Tensor, z0: Tensor, i: int) -> Tensor:
        """eps_hat = (z_t - alpha z_0) / sigma, the noise that an estimate at level i implies."""
        alpha, sigma = self.trajectory.alpha_sigma(i)
        return (z_t - alpha * z0) / sigma

    def ancestral(self, i: int, eta: float) -> float:
        """Share of fresh noise in a DDIM step from level i with this eta; 0 = deterministic, 1 = DDPM's posterior.

        eta² (1 - (alpha_t sigma_{t-1} / (alpha_{t-1} sigma_t))²): for a variance-preserving schedule DDIM's formula,
        written so that it holds for any.
        """
        (alpha, sigma), (next_alpha, next_sigma) = (self.trajectory.alpha_sigma(k) for k in (i, i + 1))
        return max(0.0, eta**2 * (1 - (alpha * next_sigma / (next_alpha * sigma)) ** 2))

    def move(self, z0: Tensor, eps: Tensor, level: int, share: float = 0.0) -> Tensor:
        """Return alpha z_0 + sigma (sqrt(1 - share) eps_hat + sqrt(share) eps) at a level, eps fresh noise."""
        if not 0 <= share <= 1:
            raise ValueError(f"expected a share of fresh noise in [0, 1], got {share}; lower eta or zeta to at most 1")
        alpha, sigma = self.trajectory.alpha_sigma(level)
        if sigma == 0.0:
            return alpha * z0
        fresh = math.sqrt(share) * self.draw(z0) if share > 0 else 0.0
        return alpha * z0 + sigma * (math.sqrt(1 - share) * eps + fresh)

    def ddim(self, z_t: Tensor, z0: Tensor, i: int, eta: float = 0.0) -> Tensor:
        """The step from level i to i + 1 that believes in z_0: DDIM with eta, ancestral (DDPM) at eta = 1."""
        return self.move(z0, self.direction(z_t, z0, i), i + 1, self.ancestral(i, eta))

    def renoise(self, z0: Tensor, level: int) -> Tensor:
        """Return alpha z_0 + sigma eps at a level, all of the noise fresh."""
        return self.move(z0, torch.zeros_like(z0), level, share=1.0)

    def flow(self, z_t: Tensor, i: int, count: int) -> Tensor:
        """Follow the probability flow from level i to the clean end in at most `count` Euler steps of 1U each.

        The steps go over the levels of the trajectory, evenly picked, so there are never more than levels left; see
        `flow_steps`.
        """
        left, steps = self.levels - i, flow_steps(self.levels - i, count)
        nodes = [i + round(k * left / steps) for k in range(steps + 1)]
        for here, there in zip(nodes, nodes[1:], strict=False):
            z0 = self.predict(z_t, here)
            z_t = self.move(z0, self.direction(z_t, z0, here), there)
        return z_t


def flow_steps(left: int, count: int) -> int:
    """Return the number of steps that `Problem.flow` takes with `left` levels left."""
    return max(1, min(count, left))


# -------------------------------------------------------------------------------------------------------------- solver


@dataclass(frozen=True)
class LatentSolver:
    """A restoration by a descent through the noise levels of a latent prior; meets `baselines.Restorer`.

    A new method is a frozen dataclass that MUST define `advance` and, where it evaluates the denoiser more than once
    per level, `nfe`. It MUST draw noise only by `Problem.draw` and `Problem.move`, keep no state and no gradients, and
    treat each image of a batch as if it were alone.

    Attributes:
        prior: The latent diffusion model.
        name: Name in tables.
        steps: Noise levels.
        strength: Noise level sigma/sqrt(alpha² + sigma²) at the start; 1 = pure noise, below it sampling starts from
            the diffused encoding of the start image.
    """

    prior: LatentPrior
    _: KW_ONLY
    name: str = "latent-solver"
    steps: int = 100
    strength: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} must be a finite number of at least 0, got {value!r}")
        if self.steps < 1 or not 0 < self.strength <= 1:
            raise ValueError(
                f"at least 1 step and a strength in (0, 1] expected, got steps={self.steps}, strength={self.strength}"
            )

    @property
    def nfe(self) -> int:
        """Denoiser evaluations per image."""
        return self.steps

    def operator_for(self, scale: int) -> Operator:
        """The operator A at this scale; of blind methods bicubic downsampling, which only fixes sizes and the start."""
        return Scale(scale)

    def start_image(self, y: Tensor, scale: int) -> Tensor:
        """The image that sampling starts from below strength 1."""
        return self.operator_for(scale).initial(y)

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        """Return z_{t-1}: from level i to level i + 1, the last of which is clean."""
        raise NotImplementedError

    def finish(self, problem: Problem, z0: Tensor) -> Tensor:
        """Return the image on the canvas that the last latent stands for."""
        return problem.decode(z0)

    @torch.no_grad()
    def __call__(self, y: Float[Tensor, "b 3 h w"], scale: int, seeds: Sequence[int]) -> Float[Tensor, "b 3 h2 w2"]:
        """Restore a batch.

        Args:
            y: Degraded images in [0, 1].
            scale: Output size over input size.
            seeds: One per image.

        Returns:
            Images in [0, 1], `scale` times as large, dtype and device of y.

        Raises:
            ValueError: If there is not one seed per image, or the scale is not the operator's.
        """
        if len(seeds) != len(y):
            raise ValueError(f"expected one seed per image, got {len(seeds)} seeds for {len(y)} images")
        prior, operator = self.prior, self.operator_for(scale)
        if operator.scale != scale:
            raise ValueError(f"expected the scale of the operator, {operator.scale}, got {scale}; tell it another one")
        work = y.to(prior.device, state_dtype(y))
        height, width = y.shape[-2] * scale, y.shape[-1] * scale
        plan = make_plan(y.shape[-1], y.shape[-2], (width, height), prior.downsampling, prior.size_multiple, operator)
        begin = pad_to(self.start_image(work, scale).to(work), plan.padded_width, plan.padded_height)
        latent_size = begin.shape[-2] // prior.downsampling, begin.shape[-1] // prior.downsampling
        trajectory = prior.trajectory(self.steps, self.strength, latent_size=latent_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        problem = Problem(trajectory, operator, work, begin, (height, width), generators)
        z_t = self._start(problem)
        for i in range(self.steps):
            z_t = self.advance(problem, z_t, i)
        return problem.crop(self.finish(problem, z_t)).clamp(0, 1).to(y)

    def _start(self, problem: Problem) -> Tensor:
        prior, begin = self.prior, problem.begin
        if problem.trajectory.pure_noise:
            sides = (side // prior.downsampling for side in begin.shape[-2:])
            start = begin.new_zeros(len(begin), prior.latent_channels, *sides)
        else:
            start = problem.start
        return problem.trajectory.noise(start, problem.draw(start))


@dataclass(frozen=True)
class OperatorSolver(LatentSolver):
    """A solver that is told the operator.

    Attributes:
        operator: A, what the method believes happened to the image.
        noise: sigma_n that it believes in.
    """

    operator: Operator
    _: KW_ONLY
    noise: float = 0.0

    def operator_for(self, scale: int) -> Operator:
        """The operator that was told."""
        return self.operator
