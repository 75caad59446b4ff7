"""Pictures on which a seam would show, and the figures that tell it from all else; `speed.py seams` runs them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from latentindigo.canvas import centre_crop
from latentindigo.degradations import blur, gaussian_kernel
from latentindigo.images import list_images, load_image


def line_steps(differences: Sequence[Tensor], spans: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Largest step and jump of a line in the stretches that tiles share, and elsewhere; see `seams`."""
    shared = torch.zeros(spans[-1][1] - 1, dtype=torch.bool)
    for (_, stop), (start, _) in pairwise(spans):
        shared[start - 1 : stop] = True
    lines: dict[str, list[Tensor]] = {"step": [], "jump": []}
    d = torch.stack(list(differences))
    for x in (d, d.transpose(-2, -1)):
        across = x.diff(dim=-1) * 255  # (seeds, colours, along the line, lines)
        lines["step"].append(across.abs().mean((0, 1, 2)))
        lines["jump"].append(torch.stack([across[:, :, a:b].mean((0, 2)).abs().amax(0) for a, b in spans]).amax(0))
    places = {"border": shared, "inside": ~shared}
    return {f"{p}_{k}": float(torch.stack(v)[:, at].max()) for p, at in places.items() for k, v in lines.items()}


def seam_pictures(real: Path, side: int) -> dict[str, Tensor]:
    """A gradient, stars on black, the middle of a real photo, and plain grey, each (3, side, side)."""
    ramp = torch.linspace(0.2, 0.8, side).expand(side, side)
    generator = torch.Generator().manual_seed(0)
    stars = (torch.rand(side, side, generator=generator) < 0.003) * torch.rand(side, side, generator=generator)
    stars = blur(stars.expand(1, 3, -1, -1), gaussian_kernel(7, 0.8))[0]
    photos = (load_image(path).rgb for path in list_images(real))
    return {
        "gradient": torch.stack([ramp, ramp.T, (ramp + ramp.T.flip(0)) / 2]),
        "stars": (stars / stars.max()).clamp(0, 1),
        "photo": centre_crop(next(x for x in photos if min(x.shape[-2:]) >= side), (side, side)),
        "flat grey": torch.full((3, side, side), 0.5),
    }
