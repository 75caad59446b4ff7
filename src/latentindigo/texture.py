"""How far sampling may move an image: a draw around the stage-one estimate, and what is kept of the sample *(ours)*.

A regression gives the mean of all images that y may have come from: right on average, and too smooth. Sampling goes
from there to one of them. Four shares say how far, each a setting of `Preset`: `spread` is drawn before sampling,
`texture` is kept after it, and of that `chroma` is kept in the colours and `coarse` in what y itself shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentindigo.filters import luma
from latentindigo.guidance import draw_noise

__all__ = ["draw_around", "keep_chroma", "keep_coarse", "keep_texture", "uneven"]

MAX_DEPARTURE = 1.5  # Of a sample from the estimate, in standard deviations of the estimate's error.
UNEVENNESS = 0.5  # Exponent: by eye on the tune photos, 0 left grain in skies and 1 took the texture of walls.


def uneven(spread: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Standard deviations whose differences from place to place are larger, at the same mean square *(ours)*.

    Where an estimate is smooth the truth is either smooth too or a texture that was lost, and the spread, a mean over
    both, is right for neither: a draw shows as grain in skies. Taking more where it is large and less where it is small
    costs and gives as much in all, in fewer places.

    Args:
        spread: Standard deviations (see `InvertibleNet.spread`).

    Returns:
        spread · (S / mean S)^UNEVENNESS, where S is the root mean square over the channels at each place, scaled to
        the mean square that the spread has over the whole image.
    """
    power = spread.float().square().mean(1, keepdim=True).clamp_min(1e-12)
    weight = power**UNEVENNESS  # On squares.
    weight = weight * power.mean((-2, -1), keepdim=True) / (power * weight).mean((-2, -1), keepdim=True)
    return spread * weight.sqrt().to(spread.dtype)


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
    that and gives a² of the energy. A sample of few steps departs too little, and a share above 1 makes up for it. No
    coefficient departs by more than MAX_DEPARTURE times the spread, before the share: what lies further off is a
    mistake of the prior's, and where little was lost, little may change.

    Args:
        z: Sampled latent.
        start: Latent of the estimate, before anything was drawn.
        spread: Its standard deviations; None sets no limit.
        share: Share a, 0..2.

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


def keep_coarse(
    x: Float[Tensor, "b c h w"], begin: Float[Tensor, "b c h w"], factor: int, share: float
) -> Float[Tensor, "b c h w"]:
    """The share of what sampling changed that is kept in the band which y's own grid holds *(ours)*.

    There y was seen and the estimate is at its best. What a sample changes there is an error at full price, and adds
    next to nothing to sharpness, which lies in the band above.

    Args:
        x: Image after sampling.
        begin: Image before it.
        factor: Pixels of the image to one of y's grid; at scale 1 the caller's choice of what counts as coarse.
        share: 0..1.

    Returns:
        The image; its details above the band are those of `x` whatever the share.
    """
    change = x - begin
    small = [max(1, side // factor) for side in change.shape[-2:]]
    low = F.interpolate(change, size=small, mode="bicubic", antialias=True)
    low = F.interpolate(low, size=change.shape[-2:], mode="bicubic", antialias=True)
    return x - (1 - share) * low
