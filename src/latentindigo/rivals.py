"""Published rivals of LatentINDIGO, each on any `LatentPrior`, so that methods are compared and not their models.

Every class is one method: its fields are the paper's settings under the paper's names, `advance` is its update for one
noise level, in the canonical coordinates z_t = alpha z_0 + sigma eps, and `solver.LatentSolver` is the loop around it.
`nfe` is the exact number of denoiser evaluations. Symbols are those of `latentindigo.solver`.

Costs per level (U = denoiser forward, U' = its backward; decoder D, D' and encoder E, E' likewise):

| class | paper | per level |
| --- | --- | --- |
| `LatentDPS` | Chung et al. 2023 | U + U' + D + D' |
| `PSLD` | Rout et al. 2023 | U + U' + D + D' + E + E' |
| `ReSample` | Song et al. 2024 | U + U' + D + D'; at times many more D + D' |
| `LatentDiffPIR` | Zhu et al. 2023 | U + D + E |
| `LatentDDNM` | Wang et al. 2023 | U + D + E |
| `LatentDAPS` | Zhang et al. 2025 | a few U, many D + D' |
| `Latino` | Spagnoletti et al. 2025 | U + D + E |
| `DiffBIRGuidance` | Lin et al. 2024 | U + D + D' |
| `SDEdit` | Meng et al. 2022 | U |

Departures that hold for all of them, beside those named in each class:

- The noise levels are those of the prior's own scheduler. At strength 1 every method starts from pure noise, as the
  papers do; a small prior may serve a method better from the diffused encoding of a start image (`strength` < 1).
- There is no text prompt and no classifier-free guidance: the prior has no condition.
- Methods that go through pixels and back in every level pay for it with the autoencoder's losses, as in the papers.
  Encoding the change only, z_0 + E(x_hat) - E(x), was tried and moved the PSNR of two photographs by under 0.1 dB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentindigo.solver import (
    PAPER_RANGE,
    LatentSolver,
    OperatorSolver,
    Problem,
    flow_steps,
    gradient_of,
    gradient_through,
)

__all__ = [
    "PSLD",
    "DiffBIRGuidance",
    "LatentDAPS",
    "LatentDDNM",
    "LatentDPS",
    "LatentDiffPIR",
    "Latino",
    "ReSample",
    "SDEdit",
]

# Standard deviation of rounding to 8 bits. No measurement is better than that, whatever noise a method is told.
ROUNDING = 1 / 255 / 12**0.5


# ------------------------------------------------------------------------------------- gradients through the denoiser


@dataclass(frozen=True)
class LatentDPS(OperatorSolver):
    """Diffusion posterior sampling in a latent space.

    Chung, Kim, McCann, Klasky, Ye, *Diffusion Posterior Sampling for General Noisy Inverse Problems*, ICLR 2023
    (algorithm 1, Gaussian noise), with D inserted before A:

        z_{t-1} = z'_{t-1} - zeta grad_{z_t} ||y - A D(z_{0,t})||_2,   z'_{t-1} = ancestral (DDPM) step

    The paper's step zeta_i = zeta / ||y - A x_0|| on the squared norm is this unsquared norm, up to a factor of 2 that
    goes into zeta, as in its authors' code. Cost: U + U' + D + D'.

    Attributes:
        zeta: Step; the paper takes 0.3 to 1.
        eta: Share of fresh noise, 1 = ancestral (the paper's), 0 = DDIM.
    """

    _: KW_ONLY
    name: str = "latent-dps"
    steps: int = 1000
    zeta: float = 1.0
    eta: float = 1.0

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        """An ancestral step, then the gradient step."""
        z0, gradient = gradient_through(problem, z_t, i, lambda z0: problem.distance(problem.decode(z0)))
        return problem.ddim(z_t, z0, i, self.eta) - self.zeta * gradient


@dataclass(frozen=True)
class PSLD(OperatorSolver):
    """Posterior sampling with latent diffusion: DPS, glued to latents that the encoder would give.

    Rout, Raoof, Daras, Caramanis, Dimakis, Shakkottai, *Solving Linear Inverse Problems Provably via Posterior Sampling
    with Latent Diffusion Models*, NeurIPS 2023 (algorithm 2):

        z_{t-1} = z'_{t-1} - grad_{z_t} ( omega ||A D(z_0) - y||_2 + gamma ||E(A^T y + (I - A^T A) D(z_0)) - z_0||_2 )

    with norms unsquared, as its authors' code has them. Its theory wants A A^T = I (a mask); for other operators, blur
    or downsampling, the formula is taken as it stands, where A^T y + (I - A^T A) x = x + A^T (y - A x) is one gradient
    step towards the measurement and no projection. Cost: U + U' + D + D' + E + E'.

    Attributes:
        omega: Weight of the measurement.
        gamma: Weight of the gluing.
        eta: Share of fresh noise; 0 = DDIM, its authors' setting.
    """

    _: KW_ONLY
    name: str = "psld"
    steps: int = 1000
    omega: float = 1.0
    gamma: float = 0.1
    eta: float = 0.0

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        """A DDIM step, then the gradient step on both terms."""

        def loss(z0: Tensor) -> Tensor:
            x = problem.decode(z0)
            glued = problem.encode(x + problem.back(problem.residual(x)))
            gluing = torch.linalg.vector_norm((glued - z0).flatten(1), dim=1)
            return self.omega * problem.distance(x) + self.gamma * gluing

        z0, gradient = gradient_through(problem, z_t, i, loss)
        return problem.ddim(z_t, z0, i, self.eta) - gradient


@dataclass(frozen=True)
class ReSample(OperatorSolver):
    """Hard data consistency at some levels, and a return to the noise level by stochastic resampling.

    Song, Kwon, Zhang, Hu, Qu, Shen, *Solving Inverse Problems with Latent Diffusion Models via Hard Data Consistency*,
    ICLR 2024. Every level: a DDIM step and the gradient step of DPS with zeta = nudge * alpha². In the last two thirds,
    every `every`-th level: look ahead by a few DDIM steps, then

        z_0(y) = argmin ||y - A D(z)||² from z_0   (last third), or E(argmin ||y - A x||² from D(z_0)) before it,
        z_{t-1} ~ N( (s² alpha z_0(y) + sigma² z'_{t-1}) / (s² + sigma²),  s² sigma² / (s² + sigma²) ),
        s² = gamma (1 - abar_{t-1}) / (1 - abar_t) (1 - abar_t / abar_{t-1})

    with alpha, sigma of level t-1: the product of N(alpha z_0(y), sigma²) and N(z'_{t-1}, s²). Minimisation is AdamW
    until the root mean square of the residual is below `tolerance`, or below the noise that the method is told. After
    the last level, once more in the latent, as its authors' code does.

    Departures: the look-ahead and the data steps start from the usual z_{0,t} (the authors' code from a variant of it);
    each image stops by itself. Cost: U + U' + D + D', and for each hard step up to look_ahead U and D + E, or up to
    latent_iterations (D + D').

    Attributes:
        nudge: Step of the gradient, relative to alpha².
        gamma: Trust in z_0(y) when resampling.
        every: Levels from one hard step to the next, 0 = none.
        look_ahead: DDIM steps before a hard step.
        pixel_iterations: Most iterations in pixels.
        latent_iterations: Most iterations in the latent space.
        pixel_lr: Learning rate in pixels, of [-1, 1].
        latent_lr: Learning rate in the latent space.
        tolerance: Root mean square residual at which to stop, pixels in [-1, 1].
        eta: Share of fresh noise in the DDIM step.
    """

    _: KW_ONLY
    name: str = "resample"
    steps: int = 500
    nudge: float = 0.5
    gamma: float = 40.0
    every: int = 10
    look_ahead: int = 5
    pixel_iterations: int = 2000
    latent_iterations: int = 500
    pixel_lr: float = 1e-2
    latent_lr: float = 5e-3
    tolerance: float = 1e-3
    eta: float = 0.0

    @property
    def nfe(self) -> int:
        """One per level and those of the look-ahead."""
        hard = (i for i in range(self.steps) if self._is_hard(i))
        return self.steps + sum(min(self.look_ahead, self.steps - 1 - i) for i in hard)

    def _is_hard(self, i: int) -> bool:
        left = self.steps - 1 - i
        return self.every > 0 and 0 < left <= self.steps - self.steps // 3 and left % self.every == 0

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        """A DDIM step with a nudge; where it is due, hard consistency and resampling."""
        z0, gradient = gradient_through(problem, z_t, i, lambda z0: problem.distance(problem.decode(z0)))
        alpha, _ = problem.trajectory.alpha_sigma(i)
        moved = problem.ddim(z_t, z0, i, self.eta) - self.nudge * alpha**2 * gradient
        if not self._is_hard(i):
            return moved
        ahead = moved
        for k in range(i + 1, min(i + 1 + self.look_ahead, self.steps)):
            z0 = problem.predict(ahead, k)
            ahead = problem.ddim(ahead, z0, k)
        in_pixels = self.steps - 1 - i >= self.steps // 3
        consistent = self._fit_pixels(problem, z0) if in_pixels else self._fit_latent(problem, z0)
        return self.resample(problem, consistent, moved, i)

    def finish(self, problem: Problem, z0: Tensor) -> Tensor:
        """Hard consistency in the latent space, decoded."""
        return problem.decode(self._fit_latent(problem, z0))

    def resample(self, problem: Problem, consistent: Tensor, moved: Tensor, i: int) -> Tensor:
        """Draw z_{t-1} from the product of what z_0(y) and z'_{t-1} say about it."""
        alpha, sigma = problem.trajectory.alpha_sigma(i + 1)
        s2, sigma2 = self.gamma * sigma**2 * problem.ancestral(i, 1.0), sigma**2
        mean = (s2 * alpha * consistent + sigma2 * moved) / (s2 + sigma2)
        return mean + (s2 * sigma2 / (s2 + sigma2)) ** 0.5 * problem.draw(mean)

    def _fit_pixels(self, problem: Problem, z0: Tensor) -> Tensor:
        # In the papers' range: AdamW's steps do not scale with its argument, and its decay pulls towards grey.
        start = PAPER_RANGE * problem.decode(z0) - 1
        fitted = self._fit(problem, lambda u: (u + 1) / PAPER_RANGE, start, self.pixel_lr, self.pixel_iterations)
        return problem.encode((fitted + 1) / PAPER_RANGE)

    def _fit_latent(self, problem: Problem, z0: Tensor) -> Tensor:
        return self._fit(problem, problem.decode, z0, self.latent_lr, self.latent_iterations)

    def _fit(
        self, problem: Problem, to_pixels: Callable[[Tensor], Tensor], start: Tensor, lr: float, iterations: int
    ) -> Tensor:
        """AdamW on the mean square residual, for each image until it is small enough."""
        goal = max(self.tolerance, PAPER_RANGE * self.noise) ** 2
        values = problem.y[0].numel()
        point = start.detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([point], lr=lr)
        for _ in range(iterations):
            with torch.enable_grad():
                losses = problem.distance(to_pixels(point)).square() / values
                total = losses.sum()
            active = (losses.detach() > goal)[:, None, None, None]
            if not bool(active.any()):
                break
            (point.grad,) = torch.autograd.grad(total, point)
            before = point.detach().clone()
            optimizer.step()
            point.copy_(torch.where(active, point, before))
        return point.detach()


# ----------------------------------------------------------------------------------- data steps in pixels, no gradients


@dataclass(frozen=True)
class _PixelStep(OperatorSolver):
    """Decode z_0, correct it in pixels, encode it, and go on: what DiffPIR, DDNM and LATINO have in common.

    The last level's correction is the output, in pixels, as in the papers: nothing is gained by encoding it once more.
    """

    def data_step(self, problem: Problem, x: Tensor, i: int) -> Tensor:
        """The estimate x of level i, corrected by the measurement."""
        raise NotImplementedError

    def onward(self, problem: Problem, z_t: Tensor, z0: Tensor, corrected: Tensor, i: int) -> Tensor:
        """z_{t-1} from the denoiser's estimate and the corrected one."""
        raise NotImplementedError

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        """Predict, correct in pixels, encode, go on."""
        z0 = problem.predict(z_t, i)
        if i == self.steps - 1:
            return z0
        corrected = problem.encode(self.data_step(problem, problem.decode(z0), i))
        return self.onward(problem, z_t, z0, corrected, i)

    def finish(self, problem: Problem, z0: Tensor) -> Tensor:
        """The last level's correction."""
        return self.data_step(problem, problem.decode(z0), self.steps - 1)


@dataclass(frozen=True)
class LatentDiffPIR(_PixelStep):
    """Half-quadratic splitting: a proximal step on the measurement between two denoising steps.

    Zhu, Zhang, Liang, Cao, Wen, Timofte, Van Gool, *Denoising Diffusion Models for Plug-and-Play Image Restoration*,
    CVPR Workshops 2023 (algorithm 1), with D and E around the data step:

        x_hat = argmin ||y - A x||² + rho_t ||x - D(z_{0,t})||²,   rho_t = lam sigma_n² / (sigma_t / alpha_t)²
        z_{t-1} = alpha z_0 + sigma (sqrt(1 - zeta) eps_hat + sqrt(zeta) eps),   z_0 = E(x_hat), eps_hat from z_0

    Departures: the proximal step is solved by conjugate gradients for any operator, not by a closed form in frequency;
    sigma_t / alpha_t is the noise of latents in the place of the noise of pixels, a factor that goes into lam. sigma_n
    is at least that of rounding (theirs: 0.001). Cost: U + D + E.

    Attributes:
        lam: The paper's lambda, trust in the prior.
        zeta: Share of fresh noise.
    """

    _: KW_ONLY
    name: str = "latent-diffpir"
    lam: float = 1.0
    zeta: float = 0.25

    def data_step(self, problem: Problem, x: Tensor, i: int) -> Tensor:
        """The proximal step with rho_t."""
        alpha, sigma = problem.trajectory.alpha_sigma(i)
        return problem.prox(x, self.lam * max(self.noise, ROUNDING) ** 2 * (alpha / sigma) ** 2)

    def onward(self, problem: Problem, z_t: Tensor, z0: Tensor, corrected: Tensor, i: int) -> Tensor:
        """eps_hat from the corrected estimate, a share zeta of it renewed."""
        return problem.move(corrected, problem.direction(z_t, corrected, i), i + 1, self.zeta)


@dataclass(frozen=True)
class LatentDDNM(_PixelStep):
    """Range-null-space decomposition: what A sees comes from y, the rest from the prior.

    Wang, Yu, Zhang, *Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model*, ICLR 2023 (algorithm 1),
    with D and E around the data step:

        x_hat = A^+ y + (I - A^+ A) x = x + A^+ (y - A x),   x = D(z_{0,t})
        z_{t-1} = alpha E(x_hat) + sigma (sqrt(1 - eta²) eps_hat + eta eps),   eps_hat from the denoiser's z_{0,t}

    Departures: for a noisy y, A^+ is the operator's pseudo-inverse damped by the noise, in the place of DDNM+'s
    eigenvalue-wise factors. Without noise A x = y holds exactly in the output, before it is clamped. Cost: U + D + E.

    Attributes:
        eta: Share of fresh noise, its square in variance.
    """

    _: KW_ONLY
    name: str = "latent-ddnm"
    eta: float = 0.85

    def data_step(self, problem: Problem, x: Tensor, i: int) -> Tensor:
        """The range-null-space step."""
        return problem.project(x, self.noise)

    def onward(self, problem: Problem, z_t: Tensor, z0: Tensor, corrected: Tensor, i: int) -> Tensor:
        """eps_hat as the denoiser said it, a share of it renewed."""
        return problem.move(corrected, problem.direction(z_t, z0, i), i + 1, self.eta**2)


@dataclass(frozen=True)
class Latino(_PixelStep):
    """Stochastic autoencoding by a few-step denoiser, and proximal steps.

    Spagnoletti, Prost, Almansa, Papadakis, Pereyra, *LATINO-PRO: LAtent consisTency INverse sOlver with PRompt
    Optimization*, ICCV 2025 (LATINO), here in the order z_t -> z_0 -> x -> x_hat -> z_{t-1}:

        x_hat = prox of delta sigma_t² ||y - A x||² / (2 sigma_n²) at D(z_{0,t}),   z_{t-1} = alpha E(x_hat) + sigma eps

    Departures: the paper's denoiser is a distilled one-step model and its prompt may be optimised; ours is the prior as
    it is. delta, which the paper sets by hand for each task, is a number. At strength 1 the start is pure noise and not
    the encoding of A^+ y, of which the paper's first level keeps 7 %. Cost: U + D + E, no backward pass.

    Attributes:
        delta: Trust in the measurement.
    """

    _: KW_ONLY
    name: str = "latino"
    steps: int = 8
    delta: float = 1.0

    def data_step(self, problem: Problem, x: Tensor, i: int) -> Tensor:
        """The proximal step; delta = 0 leaves x as it is."""
        _, sigma = problem.trajectory.alpha_sigma(i)
        step = self.delta * sigma**2
        return problem.prox(x, max(self.noise, ROUNDING) ** 2 / step) if step else x

    def onward(self, problem: Problem, z_t: Tensor, z0: Tensor, corrected: Tensor, i: int) -> Tensor:
        """Fresh noise only."""
        return problem.renoise(corrected, i + 1)


# ------------------------------------------------------------------------------------------ Markov chain at each level


@dataclass(frozen=True)
class LatentDAPS(OperatorSolver):
    """Decoupled annealing: estimate, sample the posterior around the estimate, and noise it again.

    Zhang, Chu, Berner, Meng, Anandkumar, Song, *Improving Diffusion Inverse Problem Solving with Decoupled Noise
    Annealing*, CVPR 2025 (algorithm 1, latent form), at each level, with r = sigma_t / alpha_t:

        z_hat = end of the probability flow from z_t, in a few steps
        z <- z - h (grad_z ||y - A D(z)||² / (2 tau²) + (z - z_hat) / r²) + sqrt(2 h) eps,   mcmc_steps times from z_hat
        z_{t-1} = alpha z + sigma eps,   h = lr (1 + (i / steps) (lr_min_ratio - 1))

    Departures: the flow is followed over the levels of the trajectory, of which fewer than `ode_steps` are left near
    the end; Langevin dynamics as in the paper (the authors' later code has a Hamiltonian variant, which needs about
    half the steps); tau is at least the noise that the method is told. Cost: up to ode_steps U and mcmc_steps (D + D').

    Attributes:
        ode_steps: Denoiser evaluations per level.
        mcmc_steps: Langevin steps per level.
        lr: Step h at the first level. Langevin dynamics diverges where h exceeds 2 / (1/r² + ||A D'||² / tau²).
        lr_min_ratio: What is left of it at the last level.
        tau: Standard deviation of the measurement's error, pixels in [-1, 1].
    """

    _: KW_ONLY
    name: str = "latent-daps"
    steps: int = 50
    ode_steps: int = 2
    mcmc_steps: int = 50
    lr: float = 1e-4
    lr_min_ratio: float = 0.01
    tau: float = 0.01

    @property
    def nfe(self) -> int:
        """Those of the flows."""
        return sum(flow_steps(left, self.ode_steps) for left in range(1, self.steps + 1))

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        """Estimate, sample, noise."""
        z0 = self.langevin(problem, problem.flow(z_t, i, self.ode_steps), i)
        return problem.renoise(z0, i + 1)

    def langevin(self, problem: Problem, z_hat: Tensor, i: int) -> Tensor:
        """Sample p(z | y, z_hat) around the estimate of level i by unadjusted Langevin dynamics."""
        alpha, sigma = problem.trajectory.alpha_sigma(i)
        step = self.lr * (1 + i / self.steps * (self.lr_min_ratio - 1))
        variance = max(self.tau, PAPER_RANGE * self.noise) ** 2
        z = z_hat
        for _ in range(self.mcmc_steps):
            data = gradient_of(lambda z: problem.distance(problem.decode(z)).square() / (2 * variance), z)
            drift = data + (alpha / sigma) ** 2 * (z - z_hat)
            z = z - step * drift + (2 * step) ** 0.5 * problem.draw(z)
        return z


# --------------------------------------------------------------------------------------------------------------- blind


@dataclass(frozen=True)
class DiffBIRGuidance(LatentSolver):
    """Restoration guidance: z_0 follows a regression's image where that is smooth.

    Lin, He, Chen, Lyu, Dai, Yu, Ouyang, Qiao, Dong, *DiffBIR: Toward Blind Image Restoration with Generative Diffusion
    Prior*, ECCV 2024 (region-adaptive restoration guidance), on the estimate alone, never through the denoiser:

        z_0 <- z_0 - s * 3000 * grad_{z_0} mean( w (D(z_0) - x_reg)² ),   w = 1 - tanh(sum over 2x2 of |Sobel x_reg|)

    or, in the latent space, mean((z_0 - E(x_reg))²) without weights. The factor 3000 and pixels in [-1, 1] are its
    authors'; as the mean is over all pixels, one s means less for a larger image, there as here. Blind: no operator.

    Departures: DiffBIR's denoiser is conditioned on x_reg by a ControlNet, and guidance is an extra. Here there is
    none, so that guidance alone ties the sample to the image, unless it starts near x_reg (`strength` < 1).
    Cost: U + D + D' (in pixels), U (in the latent space, after one E).

    Attributes:
        stage_one: (y, scale) -> x_reg, the regression's estimate in [0, 1].
        s: Scale of the gradient.
        space: Where the distance is measured.
        eta: Share of fresh noise, 1 = ancestral.
    """

    stage_one: Callable[[Tensor, int], Tensor]
    _: KW_ONLY
    name: str = "diffbir"
    steps: int = 50
    s: float = 0.5
    space: Literal["rgb", "latent"] = "rgb"
    eta: float = 1.0

    def start_image(self, y: Tensor, scale: int) -> Tensor:
        """The regression's estimate."""
        return self.stage_one(y, scale)

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        """An ancestral step from the guided estimate."""
        z0 = problem.predict(z_t, i)
        z0 = z0 - 3000 * self.s * gradient_of(self._loss(problem), z0)
        return problem.ddim(z_t, z0, i, self.eta)

    def _loss(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        if self.space == "latent":
            return lambda z0: (z0 - problem.start).square().flatten(1).mean(1)
        weights = smoothness(problem.begin)
        return lambda z0: (
            weights * (PAPER_RANGE * (problem.decode(z0) - problem.begin)).square()
        ).flatten(1).mean(1)  # fmt: skip


def smoothness(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """DiffBIR's weights w = 1 - tanh(sum over each 2x2 block of the Sobel magnitude of the luma of x).

    Args:
        x: Images in [0, 1] with even sides.

    Returns:
        1 where the image is flat, near 0 at edges and in texture.
    """
    luma = (x * x.new_tensor([0.2989, 0.5870, 0.1140])[:, None, None]).sum(1, keepdim=True)
    difference, smooth = x.new_tensor([1.0, 0.0, -1.0]), x.new_tensor([1.0, 2.0, 1.0])
    sobel = torch.stack([torch.outer(smooth, difference), torch.outer(difference, smooth)])[:, None]
    slopes = F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), sobel)
    blocks = 4 * F.avg_pool2d(slopes.square().sum(1, keepdim=True).sqrt(), 2)
    return 1 - blocks.tanh().repeat_interleave(2, -2).repeat_interleave(2, -1)


@dataclass(frozen=True)
class SDEdit(LatentSolver):
    """The prior alone: noise an enlarged y, and denoise it.

    Meng, He, Song, Song, Wu, Zhu, Ermon, *SDEdit: Guided Image Synthesis and Editing with Stochastic Differential
    Equations*, ICLR 2022: z at the level of `strength` from the encoding of the bicubic enlargement, then unguided
    sampling. Blind. Departure: the paper samples an SDE; eta = 0 is its probability flow. Cost: U, and one E.

    Attributes:
        eta: Share of fresh noise; 1 = ancestral.
    """

    _: KW_ONLY
    name: str = "sdedit"
    steps: int = 50
    strength: float = 0.65
    eta: float = 0.0

    def advance(self, problem: Problem, z_t: Tensor, i: int) -> Tensor:
        """An unguided step."""
        z0 = problem.predict(z_t, i)
        return problem.ddim(z_t, z0, i, self.eta)
