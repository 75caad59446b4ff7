"""The sampling loop of LatentINDIGO, in the paper's order.

    1. z_{0,t} <- denoiser(z_t, t); z'_{t-1} <- scheduler step
    2. loss of PixelINN or LatentINN, or the projection, on z_{0,t}
    3. guidance: z_{t-1} <- z'_{t-1} - zeta grad_{z_t} loss       ("through", the paper's rule)
                 or a changed z_{0,t} that the step starts from   ("stopped", "projection", ours)
    4. refinement of the INN's forward model
    5. regularisation

Everything is in canonical coordinates, float32; `latentindigo.prior` converts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.guidance import DataTerm, Regulariser, Update, draw_noise
from latentindigo.prior import Trajectory

__all__ = ["restore_latent"]

StepCallback = Callable[[int, Tensor, Tensor], None]


def restore_latent(
    trajectory: Trajectory,
    start: Float[Tensor, "b c h w"],
    data: DataTerm | None,
    update: Update | str,
    regulariser: Regulariser,
    generators: Sequence[torch.Generator],
    on_step: StepCallback | None = None,
) -> Float[Tensor, "b c h w"]:
    """Sample a latent that agrees with the measurement *(paper: the sampling algorithm)*.

    Args:
        trajectory: Noise levels and scheduler, from `LatentPrior.trajectory`.
        start: Clean latent that is diffused to the first level; ignored (only its shape counts) at pure noise.
        data: PixelINN or LatentINN; None samples unguided.
        update: "projection", "stopped" or "through".
        regulariser: Regulariser, see `guidance.make_regulariser`.
        generators: One per image.
        on_step: Called after each step with (index, z_{t-1}, z_{0,t} as used).

    Returns:
        z_0, shape of `start`.
    """
    z_t = trajectory.noise(torch.zeros_like(start) if trajectory.pure_noise else start, draw_noise(start, generators))
    for i in range(len(trajectory)):
        guide = data if data is not None and (i + 1) % min(data.config.every_k, len(trajectory)) == 0 else None
        through = guide is not None and update == "through"
        alpha, sigma = trajectory.alpha_sigma(i)
        graph = through and guide is not None and guide.keeps_graph
        with torch.set_grad_enabled(graph):
            z_t = z_t.detach().requires_grad_(graph)
            prediction = trajectory.predict(z_t, i)
        estimate, z0 = prediction.z0.detach(), prediction.z0
        if guide is not None and update != "through":
            correct = guide.projection if update == "projection" else guide.descent
            z0 = estimate + regulariser.limit(correct(estimate, guide.gain(alpha, sigma)), sigma)
        if data is not None:
            z0 = regulariser.pull(z0, data)
        z_next = trajectory.step(prediction, z0, z_t, i, generators)
        if guide is not None and update == "through":
            gain, again = guide.gain(alpha, sigma), partial(_predicted, trajectory, i)
            correction = guide.descent_through(prediction.z0, z_t, gain, again)
            z_next = z_next + regulariser.limit(correction, sigma)
        if guide is not None:
            guide.refine(estimate)
        z_t = regulariser.renoise(z_next, z0.detach(), *trajectory.alpha_sigma(i + 1), generators).detach()
        if on_step is not None:
            on_step(i, z_t, z0.detach())
    return z_t


def _predicted(trajectory: Trajectory, i: int, z_t: Tensor) -> Tensor:
    return trajectory.predict(z_t, i).z0
