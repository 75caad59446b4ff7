"""How far a function looks, measured against functions whose reach is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentindigo.reach import reach_of


def blurred(radius: int, x: Tensor) -> Tensor:
    size = 2 * radius + 1
    return F.avg_pool2d(x, size, stride=1, padding=radius)


@pytest.mark.parametrize("radius", [0, 1, 5])
def test_a_box_is_seen_to_its_edge(radius: int) -> None:
    assert reach_of(lambda x: blurred(radius, x), torch.rand(1, 3, 32, 24)) == radius


def test_a_function_that_enlarges_or_shrinks_is_measured_on_its_inputs_grid() -> None:
    enlarging = reach_of(lambda x: F.interpolate(blurred(3, x), scale_factor=4), torch.rand(1, 3, 32, 32))
    shrinking = reach_of(lambda x: F.avg_pool2d(blurred(8, x), 4), torch.rand(1, 3, 64, 64))
    assert enlarging == 3 + 3 / 8  # Up to the middle of the last quarter of the third pixel.
    assert 8 <= shrinking < 8 + 4  # The last output that answers lies within one of its own pixels.


def test_what_is_faint_everywhere_does_not_count() -> None:
    """A mean over the image, as attention or group normalisation take it, moves all places a little."""
    x = torch.rand(1, 3, 64, 64)
    assert reach_of(lambda x: blurred(2, x) + 0.05 * x.mean(), x) == 2
    assert reach_of(lambda x: blurred(2, x) + 500 * x.mean(), x) >= 31


def test_a_deaf_function_has_no_reach() -> None:
    assert reach_of(torch.zeros_like, torch.rand(1, 3, 8, 8)) == 0
