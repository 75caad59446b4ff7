"""RRDBNet, the network of ESRGAN and Real-ESRGAN (2018, 2021): a yardstick for speed, with random weights.

Written from the published architecture. Only the amount of work is of interest: nothing is trained or loaded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SHARE = 0.2  # Of every residual branch; also the slope of the rectifiers below zero.


class _DenseBlock(nn.Module):
    """Five convolutions, each of which sees the outputs of all before it."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        outputs = [growth] * 4 + [width]
        self.convs = nn.ModuleList(nn.Conv2d(width + k * growth, n, 3, padding=1) for k, n in enumerate(outputs))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in self.convs[:-1]:
            seen.append(F.leaky_relu(conv(torch.cat(seen, 1)), SHARE))
        return x + SHARE * self.convs[-1](torch.cat(seen, 1))


class _ResidualInResidual(nn.Module):
    """Three dense blocks, themselves a residual branch."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_DenseBlock(width, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + SHARE * self.blocks(x)


class RRDBNet(nn.Module):
    """Super-resolution x4 by residual-in-residual dense blocks; 16.7 million weights by default.

    Args:
        width: Channels between the blocks.
        growth: Channels that each convolution of a dense block adds.
        blocks: Number of residual-in-residual blocks.
    """

    def __init__(self, width: int = 64, growth: int = 32, blocks: int = 23) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(_ResidualInResidual(width, growth) for _ in range(blocks)))
        self.after_body = nn.Conv2d(width, width, 3, padding=1)
        self.enlarge = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.fine = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 4*h 4*w"]:
        """Enlarge an image four times.

        Args:
            y: Image (B, 3, h, w).

        Returns:
            Image (B, 3, 4h, 4w).
        """
        x = self.first(y)
        x = x + self.after_body(self.body(x))
        for conv in self.enlarge:
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), SHARE)
        return self.last(F.leaky_relu(self.fine(x), SHARE))
