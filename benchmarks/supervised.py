"""A plain regression network of LatentINN's size, seen as many samples: what supervision alone gives.

    latentindigo train estimator photos/ --recipe recipes/supervised.toml --out runs/supervised
    latentindigo benchmark photos/ -o results/ --add benchmarks/supervised.py --method faithful --method default

Its weights lie in `benchmarks/weights/supervised`: 5550 steps of 16 pairs of 128², the INN's 88 800, of the same
mixture of damage. It has the estimator's layers and is told nothing of the damage (gamma = 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from latentindigo import RestorationPipeline
from latentindigo.inn import Estimator

WEIGHTS = Path(__file__).parent / "weights" / "supervised"


class Supervised:
    """The network as a restorer, at scale 1, 2 or 4."""

    name: ClassVar[str] = "supervised"
    nfe: ClassVar[int] = 0

    def __init__(self, network: Estimator) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, y: Tensor, scale: int, seeds: Sequence[int]) -> Tensor:
        """Restore a batch, see `latentindigo.baselines.Restorer`."""
        network = self.network
        gamma = torch.zeros(1, network.config["gamma_dim"], device=network.device, dtype=network.dtype)
        return network(y.to(network.device), gamma, round(math.log2(scale))).to(y).clamp(0, 1)


def make(pipe: RestorationPipeline) -> Supervised:
    """What the benchmark calls."""
    return Supervised(Estimator.from_pretrained(WEIGHTS).to(pipe.device))
