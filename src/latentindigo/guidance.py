"""Guidance: PixelINN and LatentINN, the three update rules, refinement of the INN, and the regularisers.

Notation (names of `docs/paper_map.md`; all latents in canonical coordinates z_t = alpha z_0 + sigma eps):

    z0          z_{0,t}, the denoiser's estimate                 target   y (pixels) or E(y) (latents)
    [c, d]      g(., gamma): coarse part and details             u_inv    x_inv or z_inv = g⁻¹(target, d, gamma)
    zeta, beta  step of the gradient rules / of the projection   gain     data trust in [0, 1], see `DataTerm.gain`

The data term *(paper)*, with u = D(z0) (PixelINN) or u = z0 (LatentINN):

    loss = w_c ‖target - c‖₂ + w_d ‖u_inv - u‖₂

Norms are taken per image and multiplied by sqrt(output pixels / 512²) *(ours)*: an unsquared norm's gradient is the
residual divided by its norm, which grows with the root of the number of pixels, so that this factor makes one zeta
give the same update per pixel at any size, alone or in a batch; at 512² it is the paper's norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.graphs import Replay
from latentindigo.inn import InvertibleNet
from latentindigo.offloading import private_copy
from latentindigo.prior import LatentPrior

__all__ = [
    "REGULARISERS",
    "DataTerm",
    "ForwardModel",
    "GuidanceConfig",
    "LatentINN",
    "LearnedForward",
    "LinearForward",
    "PixelINN",
    "Regulariser",
    "draw_noise",
    "make_regulariser",
    "per_image",
    "trusted_target",
]

Update = Literal["projection", "stopped", "through"]
# What refinement learns from: u, its target, and the weights of the target's places (None = 1).
Part = tuple[Tensor, Tensor, Tensor | None]
UPDATES: tuple[Update, ...] = ("projection", "stopped", "through")
REFERENCE_PIXELS = 512 * 512


@dataclass(frozen=True)
class GuidanceConfig:
    """Settings of the guidance; every default is the embedded model's.

    Attributes:
        w_c: Weight of the coarse term ‖target - c‖₂.
        w_d: Weight of the distance ‖u_inv - u‖₂ (the paper's w_p in pixels).
        zeta: Step of the gradient rules "stopped" and "through", for an image of 512² pixels.
        beta: Step of the rule "projection", 0..1.
        noise_weight: How strongly the noise that gamma reports weakens the data term (see `DataTerm.gain`), 0 = never.
        shrink: How much of the noise that gamma reports is taken out of the target (see `trusted_target`), 0 = the
            paper's target, y or E(y) as it is.
        every_k: Guide the last of every k steps only, as strongly as k steps would, see `zeta_at_once` and
            `beta_at_once`; a k-th of the cost *(ours)*.
        regulariser: None or a name of `REGULARISERS`.
        regulariser_weight: Its strength (lambda, rho or the trust radius).
        refine: Whether the INN's forward model is refined on the image while sampling.
        refine_lr: Learning rate of the refinement's Adam *(INDIGO+: 5e-5)*.
    """

    w_c: float = 1.0
    w_d: float = 0.5
    zeta: float = 20.0
    beta: float = 0.8
    noise_weight: float = 0.0
    shrink: float = 6.0
    every_k: int = 1
    regulariser: str | None = None
    regulariser_weight: float = 0.1
    refine: bool = False
    refine_lr: float = 5e-5

    def __post_init__(self) -> None:
        for name in ("w_c", "w_d", "zeta", "noise_weight", "shrink", "regulariser_weight", "refine_lr"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1] (0 = no guidance, 1 = full projection), got {self.beta}")
        if self.every_k < 1:
            raise ValueError(f"every_k must be at least 1, got {self.every_k}")
        if self.regulariser is not None and self.regulariser not in REGULARISERS:
            raise ValueError(f"regulariser must be None or one of {', '.join(REGULARISERS)}, got {self.regulariser!r}")

    @property
    def zeta_at_once(self) -> float:
        """Step of the gradient rules in a guided step, k^1.5 zeta: for the k - 1 steps without, and for what they undo.

        Measured on `tune` for k = 3 in 20 steps: 0.30 dB lost with zeta, 0.09 with 3 zeta, 0.03 with 5, 0.04 with 7.
        """
        return self.every_k**1.5 * self.zeta

    @property
    def beta_at_once(self) -> float:
        """Step of the projection in a guided step: 1 - (1 - beta)^k, what k projections in turn would reach."""
        return self.beta if self.every_k == 1 else 1 - (1 - self.beta) ** self.every_k


@runtime_checkable
class ForwardModel(Protocol):
    """What plays the part of g: something that splits an image into what was measured and what was not."""

    def split(self, u: Tensor) -> tuple[Tensor, object]:
        """[c, d] = g(u): the simulated measurement (B, C, h, w), and whatever `merge` needs."""
        ...

    def merge(self, target: Tensor, details: object) -> Tensor:
        """g⁻¹(target, d): u with its coarse part replaced."""
        ...

    def refine(self, parts: Iterable[Part]) -> None:
        """One step of learning the forward model on the image at hand, which may come in parts."""
        ...


class Details(NamedTuple):
    """Details of an image as the INN splits it, and what its inverse need not compute again.

    Attributes:
        bands: Details (B, 3C, h, w) of each level, finest first.
        updates: U_K(d; gamma) of each level.
    """

    bands: Sequence[Tensor]
    updates: Sequence[Tensor]


class LearnedForward:
    """g = the trained INN, with a private copy for each image when it is refined *(paper: refinement)*.

    A private copy is kept in float32 at least: steps of 5e-5 would be lost in bfloat16's or float16's rounding.

    Args:
        inn: Trained network; never changed.
        gamma: Degradation embeddings (B, d).
        levels: Number of levels J.
        refine_lr: Learning rate of the refinement, None to leave the network as trained.
        count: Called with the number of network passes, for the record of costs.
    """

    def __init__(
        self,
        inn: InvertibleNet,
        gamma: Float[Tensor, "b d"],
        levels: int,
        refine_lr: float | None = None,
        count: Callable[[int], None] = lambda passes: None,
    ) -> None:
        self.gamma, self.levels, self._count = gamma, levels, count
        self._shared = inn if refine_lr is not None else inn.settled()
        self._private: list[InvertibleNet] = []
        self._optimizers: list[torch.optim.Adam] = []
        if refine_lr is not None:
            # A private Theta for each image: the result must not depend on what else is in the batch.
            self._private = [_trainable_copy(inn) for _ in range(len(gamma))]
            self._optimizers = [torch.optim.Adam(net.parameters(), lr=refine_lr) for net in self._private]

    def split(self, u: Tensor) -> tuple[Tensor, Details]:
        """[c, d] = g(u, gamma)."""
        self._count(1)
        parts = [net.split(part, gamma, self.levels) for net, gamma, part in self._with_networks(u)]
        if len(parts) == 1:
            coarse, bands, updates = parts[0]
            return coarse, Details(bands, updates)
        bands, updates = ([torch.cat(same) for same in zip(*[p[k] for p in parts], strict=True)] for k in (1, 2))
        return torch.cat([p[0] for p in parts]), Details(bands, updates)

    def merge(self, target: Tensor, details: object) -> Tensor:
        """g⁻¹(target, d, gamma)."""
        self._count(1)
        if not isinstance(details, Details):
            raise TypeError(f"details of this network are what its split returned, got {type(details).__name__}")
        images: list[Tensor] = []
        for i, (net, gamma, part) in enumerate(self._with_networks(target)):
            own = Details(*([d[i : i + len(part)] for d in parts] for parts in details))
            images.append(net.inverse(part, own.bands, gamma, self.levels, own.updates))
        return images[0] if len(images) == 1 else torch.cat(images)

    def _with_networks(self, x: Tensor) -> list[tuple[InvertibleNet, Tensor, Tensor]]:
        """(network, gamma, part of the batch): all with the shared network, or each image with its private copy."""
        if not self._private:
            return [(self._shared, self.gamma, x)]
        return [(net, self.gamma[i : i + 1], x[i : i + 1]) for i, net in enumerate(self._private)]

    @property
    def stays(self) -> bool:
        """Whether the weights stay as and where they are: neither refined nor offloaded."""
        hooks = ("_hf_hook", "_diffusers_hook")
        return not self._private and not any(hasattr(part, hook) for part in self._shared.modules() for hook in hooks)

    def refine(self, parts: Iterable[Part]) -> None:
        """One Adam step on ‖coarse(u) - target‖² for each image's private copy *(paper)*.

        Args:
            parts: (u, target, weight) of each tile, the weights (h, w) those of the target's places in a partition of
                unity; gradients of all tiles are summed before the step. A whole image is one tile of weight None.
        """
        if not self._private:
            return
        total = 0.0
        sums: list[list[Tensor | None]] = [[None] * len(list(net.parameters())) for net in self._private]
        for u, target, weight in parts:
            self._count(1)
            u = u.detach()
            total += target[0].numel() if weight is None else float(weight.sum()) * target.shape[1]
            for i, net in enumerate(self._private):
                with torch.enable_grad():
                    coarse, _ = net(u[i : i + 1], self.gamma[i : i + 1], self.levels)
                    error = (coarse - target[i : i + 1]).square()
                    loss = error.sum() if weight is None else (error * weight.to(error)).sum()
                found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
                sums[i] = [_plus(old, new) for old, new in zip(sums[i], found, strict=True)]
        for net, optimizer, gradients in zip(self._private, self._optimizers, sums, strict=True):
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter.grad = None if gradient is None else gradient / total
            optimizer.step()


def _plus(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if old is None else old if new is None else old + new


def _trainable_copy(inn: InvertibleNet) -> InvertibleNet:
    private = private_copy(inn)
    if inn.dtype in (torch.float16, torch.bfloat16):
        private.float()
    return private.requires_grad_(True)


@runtime_checkable
class LinearOperator(Protocol):
    """A known degradation (see `latentindigo.operators`)."""

    def forward(self, x: Tensor) -> Tensor:
        """Y = A x."""
        ...

    def project(self, x: Tensor, y: Tensor, noise: float = 0.0) -> Tensor:
        """X + A⁺(y - A x)."""
        ...


class LinearForward:
    """g = a known operator A *(ours, non-blind mode)*: c = A x, and merging is the range-null-space step.

    Args:
        operator: The operator.
        noise: Standard deviation of the noise in y, [0, 1] units; regularises the pseudo-inverse.
    """

    def __init__(self, operator: LinearOperator, noise: float = 0.0) -> None:
        self.operator, self.noise = operator, noise

    def split(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(A x, x)."""
        return self.operator.forward(u), u

    def merge(self, target: Tensor, details: object) -> Tensor:
        """X + A⁺(y - A x)."""
        if not isinstance(details, Tensor):
            raise TypeError(f"details of a known operator are the image itself, got {type(details).__name__}")
        return self.operator.project(details, target, self.noise)

    def refine(self, parts: Iterable[Part]) -> None:
        """Nothing to learn: the operator is known."""


class DataTerm:
    """Agreement of the estimate with the measurement; the two subclasses differ in the space they measure in.

    Args:
        prior: The latent diffusion model (D and E are called by `PixelINN` only).
        forward_model: g.
        target: y (B, 3, h, w) in [0, 1] for pixels, E(y) (B, c, h/f, w/f) for latents.
        pixels: Output pixels H * W, for the size-independent norm.
        config: Settings.
        noise: Noise in y that gamma reports, (B,), [0, 1] units.
        unit: Factor on the norms. PixelINN gets the latent size of one pixel unit, so that one zeta serves both.

    Attributes:
        keeps_graph: Whether "through" needs the graph from z_t to z0 that the sampler's own evaluation leaves.
    """

    keeps_graph = True

    def __init__(
        self,
        prior: LatentPrior,
        forward_model: ForwardModel,
        target: Float[Tensor, "b c h w"],
        pixels: int,
        config: GuidanceConfig,
        noise: Float[Tensor, " b"],
        unit: float = 1.0,
    ) -> None:
        self.prior, self.forward_model, self.target, self.config = prior, forward_model, target, config
        self.size_factor = unit * math.sqrt(pixels / REFERENCE_PIXELS)
        self.noise = noise

    def open(self, z0: Tensor) -> Tensor:
        """The representation u in which the data term is measured."""
        raise NotImplementedError

    def close(self, u_inv: Tensor, u: Tensor, z0: Tensor) -> Tensor:
        """The latent that u_inv stands for."""
        raise NotImplementedError

    def _norm(self, residual: Tensor) -> Float[Tensor, " b"]:
        """Size-independent norm, per image: sqrt(HW / 512²) ‖residual‖₂; its gradient at 0 is 0, not NaN."""
        return (residual.flatten(1).square().sum(1) + 1e-12).sqrt() * self.size_factor

    def residuals(self, z0: Float[Tensor, "b c h w"]) -> list[tuple[float, Tensor]]:
        """What the loss takes the norms of, with their weights: target - c, and u_inv - u where w_d is not 0."""
        u = self.open(z0)
        coarse, details = self.forward_model.split(u)
        found = [(self.config.w_c, self.target - coarse)]
        if self.config.w_d:
            found.append((self.config.w_d, self.forward_model.merge(self.target, details) - u))
        return found

    def loss(self, z0: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """w_c ‖target - c‖₂ + w_d ‖u_inv - u‖₂, one value per image *(paper: loss of PixelINN / LatentINN)*.

        Args:
            z0: Estimate of the clean latent.

        Returns:
            (B,) losses; differentiable in z0.
        """
        (weight, residual), *more = self.residuals(z0)
        total = weight * self._norm(residual)
        for weight, residual in more:
            total = total + weight * self._norm(residual)
        return total

    def consistent(self, z0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """z_inv: the latent with its coarse part replaced by the target."""
        u = self.open(z0)
        _, details = self.forward_model.split(u)
        return self.close(self.forward_model.merge(self.target, details), u, z0)

    def gain(self, alpha: float, sigma: float) -> Float[Tensor, " b"]:
        """Trust in the data at one noise level: r² / (r² + (noise_weight * noise)²), r = sigma/sqrt(alpha² + sigma²).

        While the estimate is uncertain (large r) a noisy y still helps; at the end it would only lend its noise. It is
        the weight that a Kalman step gives to a measurement of that noise *(ours)*.

        Args:
            alpha: Signal factor of the level.
            sigma: Noise factor of the level.

        Returns:
            (B,) numbers in [0, 1]; 1 without noise in y.
        """
        uncertainty = (sigma * sigma) / (alpha * alpha + sigma * sigma)
        measured = (self.config.noise_weight * self.noise).square()
        return uncertainty / (uncertainty + measured).clamp_min(1e-12)

    def projection(self, z0: Float[Tensor, "b c h w"], gain: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Correction beta_t (z_inv - z_0) of the rule "projection", beta_t = beta * gain; no gradient *(ours)*.

        Args:
            z0: Estimate of the clean latent.
            gain: See `gain`.

        Returns:
            The correction to add to z0.
        """
        return self.config.beta_at_once * per_image(gain) * self._distance_of(z0)

    def _distance_of(self, z0: Tensor) -> Tensor:
        """z_inv - z_0."""
        with torch.no_grad():
            return self.consistent(z0) - z0

    def descent(self, z0: Float[Tensor, "b c h w"], gain: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Correction -zeta_t grad_{z0} loss of the rule "stopped", zeta_t = zeta * gain.

        Args:
            z0: Estimate of the clean latent.
            gain: See `gain`.

        Returns:
            The correction to add to z0.
        """
        return -self.config.zeta_at_once * per_image(gain) * self._gradient_of(z0)

    def _gradient_of(self, z0: Tensor) -> Tensor:
        """grad_{z0} of the loss."""
        with torch.enable_grad():
            z0 = z0.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(z0).sum(), z0)
        return gradient

    def descent_through(
        self,
        z0: Float[Tensor, "b c h w"],
        z_t: Float[Tensor, "b c h w"],
        gain: Float[Tensor, " b"],
        predict: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Correction -zeta_t grad_{z_t} loss of the rule "through", differentiated through the denoiser *(paper)*.

        Args:
            z0: Estimate of the clean latent, with its graph back to `z_t`.
            z_t: Noisy latent, the leaf of that graph.
            gain: See `gain`.
            predict: z_t -> z0; for subclasses that build their own graph, part by part (`keeps_graph` = False).

        Returns:
            The correction to add to z_{t-1}.
        """
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.loss(z0).sum(), z_t)
        return -self.config.zeta_at_once * per_image(gain) * gradient

    def refine(self, z0: Float[Tensor, "b c h w"]) -> None:
        """One step of refining the forward model against ‖coarse(z_0 detached) - target‖² *(paper)*."""
        if self.config.refine:
            with torch.no_grad():
                u = self.open(z0.detach())
            self.forward_model.refine([(u, self.target, None)])


def trusted_target(
    measured: Float[Tensor, "b c h w"],
    simulated: Float[Tensor, "b c h w"],
    noise_variance: Float[Tensor, "b c1 1 1"],
    shrink: float,
) -> Float[Tensor, "b c h w"]:
    """A measurement whose noise is shrunk towards what the start image predicts, channel by channel *(ours)*.

    target = s + K (m - s), K = max(0, v - shrink n) / v: the empirical Wiener gain of the residual m - s.

    | code | symbol | meaning |
    | --- | --- | --- |
    | `measured` | m | y, or E(y) |
    | `simulated` | s | coarse part of the start image |
    | (computed) | v | mean square of m - s, per image and channel |
    | `noise_variance` | n | variance of the noise in m that gamma reports |

    Exact agreement with a noisy y imports its noise, most in channels where y holds little else.

    Args:
        measured: Measurement (B, C, h, w).
        simulated: Simulated measurement of the start image, same shape.
        noise_variance: Noise variance per image, and per channel where they differ.
        shrink: Factor on the noise variance; 0 returns the measurement.

    Returns:
        The target (B, C, h, w).
    """
    residual = measured - simulated
    power = residual.square().mean((-2, -1), keepdim=True)
    kept = ((power - shrink * noise_variance) / power.clamp_min(1e-12)).clamp(0, 1)
    return simulated + kept * residual


class PixelINN(DataTerm):
    """Data term in pixels: u = D(z0). Works with any latent diffusion model; decodes in every guided step *(paper)*."""

    def open(self, z0: Tensor) -> Tensor:
        """x̂ = D(z0)."""
        return self.prior.decode(z0)

    def close(self, u_inv: Tensor, u: Tensor, z0: Tensor) -> Tensor:
        """z0 + E(x_inv) - E(x̂): the change, encoded, so that the autoencoder's own error cancels."""
        return z0 + self.prior.encode(u_inv) - self.prior.encode(u)


class LatentINN(DataTerm):
    """Data term in the latent space: u = z0, target E(y). Never calls D or E *(paper)*.

    On an NVIDIA GPU its corrections are recorded in the second guided step and played back in later ones, unless the
    INN is refined or offloaded, whose weights would not be where they were.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._distance, self._gradient, self._passes = Replay(), Replay(), 0

    def __copy__(self) -> LatentINN:
        """A term of its own: what was recorded with one target must not be played for another."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), _distance=Replay(), _gradient=Replay())
        return twin

    def _distance_of(self, z0: Tensor) -> Tensor:
        return self._replayed(self._distance, super()._distance_of, z0)

    def _gradient_of(self, z0: Tensor) -> Tensor:
        return self._replayed(self._gradient, super()._gradient_of, z0)

    def _replayed(self, replay: Replay, function: Callable[[Tensor], Tensor], z0: Tensor) -> Tensor:
        model, calls = self.forward_model, self.prior.calls
        if not (isinstance(model, LearnedForward) and model.stays):
            return function(z0)
        before = calls.inn
        found = replay(function, z0)
        # A record that is played counts nothing by itself.
        self._passes = calls.inn - before or self._passes
        calls.inn = before + self._passes
        return found

    def open(self, z0: Tensor) -> Tensor:
        """z0 itself."""
        return z0

    def close(self, u_inv: Tensor, u: Tensor, z0: Tensor) -> Tensor:
        """z_inv itself."""
        return u_inv


def per_image(value: Tensor) -> Tensor:
    """One factor per image, shaped to multiply (B, C, H, W)."""
    return value[:, None, None, None]


class Regulariser:
    """Keeps the sample near natural images; each method is one place where a regulariser may act, all optional.

    Args:
        weight: Strength, its meaning is the subclass's.
        prior: The latent diffusion model.

    Attributes:
        decodes: Whether it calls the autoencoder in the loop.
    """

    decodes = False

    def __init__(self, weight: float, prior: LatentPrior) -> None:
        self.weight, self.prior = weight, prior

    def limit(self, correction: Tensor, sigma: float) -> Tensor:
        """Called with the guidance's correction before it is added."""
        return correction

    def pull(self, z0: Tensor, data: DataTerm) -> Tensor:
        """Called with the guided z0 before the scheduler's step."""
        return z0

    def renoise(
        self, z_t: Tensor, z0: Tensor, alpha: float, sigma: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Called with z_{t-1}, the z0 it was made from, and its level."""
        return z_t


class TrustRegion(Regulariser):
    """Guidance may move an image by at most weight * sigma_t (root mean square): no further than the noise hides."""

    def limit(self, correction: Tensor, sigma: float) -> Tensor:
        """Scale the correction down to the trust radius, per image."""
        size = correction.flatten(1).square().mean(1).sqrt()
        radius = self.weight * sigma
        return correction * per_image((radius / size.clamp_min(1e-12)).clamp(max=1.0))


class AutoencoderConsistency(Regulariser):
    """z_0 <- z_0 - lambda (z_0 - E(D(z_0))): latents that the autoencoder itself would produce."""

    decodes = True

    def pull(self, z0: Tensor, data: DataTerm) -> Tensor:
        """Move towards the autoencoder's round trip."""
        with torch.no_grad():
            return z0 + self.weight * (self.prior.encode(self.prior.decode(z0)) - z0)


class Gluing(Regulariser):
    """z_0 <- z_0 - lambda (z_0 - E(x_inv)): the latent is glued to the encoding of the data-consistent image *(PSLD)*.

    PSLD writes A^T y + (I - A^T A) D(z_0) for the data-consistent image; with an INN it is g⁻¹(y, x_d, gamma).
    """

    decodes = True

    def pull(self, z0: Tensor, data: DataTerm) -> Tensor:
        """Move towards the encoding of the data-consistent image."""
        with torch.no_grad():
            glued = data.consistent(z0)
            return z0 + self.weight * (self.prior.encode(self.prior.decode(glued)) - z0)


class Renoise(Regulariser):
    """Replace a share rho of the noise in z_{t-1} by fresh noise, so that the denoiser can undo what guidance bent.

    z_{t-1} = alpha z_0 + sigma (sqrt(1-rho) eps_hat + sqrt(rho) eps): the level stays, one step of time travel.
    """

    def renoise(
        self, z_t: Tensor, z0: Tensor, alpha: float, sigma: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Mix fresh noise into the predicted one."""
        if sigma == 0.0:
            return z_t
        share = min(1.0, self.weight)
        kept = (z_t - alpha * z0) / sigma
        return alpha * z0 + sigma * (math.sqrt(1 - share) * kept + math.sqrt(share) * draw_noise(z_t, generators))


def draw_noise(like: Float[Tensor, "b c h w"], generators: Sequence[torch.Generator]) -> Float[Tensor, "b c h w"]:
    """Standard normal noise, image by image from its own generator, drawn on the CPU so that devices agree."""
    noise = [torch.randn(like.shape[1:], generator=g, dtype=torch.float32, device=g.device) for g in generators]
    return torch.stack([n.to(like.device) for n in noise]).to(like.dtype)


REGULARISERS: dict[str, type[Regulariser]] = {
    "consistency": AutoencoderConsistency,
    "gluing": Gluing,
    "renoise": Renoise,
    "trust": TrustRegion,
}
"""Regularisers by name."""


def make_regulariser(config: GuidanceConfig, prior: LatentPrior) -> Regulariser:
    """The regulariser that the settings name; one that does nothing for None."""
    kind = REGULARISERS[config.regulariser] if config.regulariser else Regulariser
    return kind(config.regulariser_weight, prior)
