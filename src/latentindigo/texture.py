"""How far sampling may move an image: a draw around the stage-one estimate, and what is kept of the sample *(ours)*.

A regression gives the mean of all images that y may have come from: right on average, and too smooth. Sampling goes
from there to one of them. Three shares say how far, each 0..1 and each a setting of `Preset`: `spread` is drawn before
sampling, `texture` is kept after it, and `chroma` is kept of the colours' part of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.filters import luma
from latentindigo.guidance import draw_noise

__all__ = ["draw_around", "keep_chroma", "keep_texture"]

MAX_DEPARTURE = 1.5  # Of a sample from the estimate, in standard deviations of the estimate's error.


def draw_around(
    start: Float[Tensor, "b c h w"],
    spread: Float[Tensor, "b c h w"] | None,
    share: float,
    generators: Sequence[torch.Generator],
) -> Float[Tensor, "b c h w"]:
    """A draw around the latent of the stage-one estimate, as far from it as the truth is likely to be *(ours)*.

    The estimate is a mean: it lacks what it could not know, and noise of one level for all coefficients leaves most of
    that lacking. The prior takes a smooth start for a smooth picture.

    Args:
        start: Latent of the estimate.
        spread: Its standard deviations (see `InvertibleNet.spread`); None draws nothing.
        share: Factor on them, 0..1.
        generators: One per image.

    Returns:
        The latent to start from.
    """
    if spread is None or not share:
        return start
    return start + share * spread * draw_noise(start, generators)


def keep_texture(
    z: Float[Tensor, "b c h w"], start: Float[Tensor, "b c h w"], spread: Float[Tensor, "b c h w"] | None, share: float
) -> Float[Tensor, "b c h w"]:
    """The share of a sample's departure from the start that is kept *(ours)*.

    The whole departure is a sample's realism at a sample's error, twice that of the mean; a share a of it costs a² of
    that and gives a² of the energy. No coefficient departs by more than MAX_DEPARTURE times the spread: what lies
    further off is a mistake of the prior's, and where little was lost, little may change.

    Args:
        z: Sampled latent.
        start: Latent of the estimate, before anything was drawn.
        spread: Its standard deviations; None sets no limit.
        share: Share a, 0..1.

    Returns:
        start + a · clamp(z - start, ±MAX_DEPARTURE · spread).
    """
    departure = z - start
    if spread is not None:
        departure = torch.clamp(departure, -MAX_DEPARTURE * spread, MAX_DEPARTURE * spread)
    return start + share * departure


def keep_chroma(x: Float[Tensor, "b 3 h w"], begin: Float[Tensor, "b 3 h w"], share: float) -> Float[Tensor, "b 3 h w"]:
    """The share of what sampling changed about the colours that is kept; changes of brightness stay whole *(ours)*.

    A photograph's fine detail is brightness: of what an estimate lacks about a tenth is colour. A sample's share is
    larger, and the eye reads it as coloured grain.

    Args:
        x: Image after sampling.
        begin: Image before it.
        share: 0..1.

    Returns:
        The image; its luma (BT.601) is that of `x` whatever the share.
    """
    change = x - begin
    brightness = luma(change)
    return begin + brightness + share * (change - brightness)
