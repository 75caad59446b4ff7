"""The one table of tolerances, and random weights that make a check meaningful."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["TOL", "Tol", "assert_close", "in_dtype", "randomise_"]

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Tol:
    """How far two results in one dtype may lie apart: |a - b| <= atol + rtol * |b|."""

    atol: float
    rtol: float


TOL: dict[torch.dtype, Tol] = {
    torch.float64: Tol(atol=1e-10, rtol=1e-10),
    torch.float32: Tol(atol=1e-5, rtol=1e-5),
    torch.float16: Tol(atol=1e-2, rtol=1e-2),
    torch.bfloat16: Tol(atol=4e-2, rtol=4e-2),
}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare two tensors within the tolerance of a dtype (by default their own); raise AssertionError otherwise."""
    tol = TOL[dtype or expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tol.atol, rtol=tol.rtol)


@torch.no_grad()
def randomise_(module: Net, generator_seed: int = 0, scale: float = 1.0) -> Net:
    """Refill every parameter with N(0, scale / sqrt(fan_in)), in place, and return the module.

    Networks here start with a zero last layer, so a fresh one is the identity and would satisfy almost any law. The
    fan-in of a vector (bias or gain) is its length.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    for parameter in module.parameters():
        fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else parameter.numel()
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(noise * (scale / math.sqrt(fan_in)))
    return module


def in_dtype(module: Net, dtype: torch.dtype) -> Net:
    """Convert a module's weights in place and return it, with its type (diffusers' own `to` hides it from checkers)."""
    module.to(dtype)
    return module
