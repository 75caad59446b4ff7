"""Wavelet colour correction: drift goes, detail stays, at any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from latentindigo.color import low_pass, wavelet_color_fix
from tolerances import TOL, assert_close

Fix = Callable[[Tensor, Tensor], Tensor]


def picture(height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check_removes_drift(fix: Fix, height: int, width: int) -> None:
    """A colour cast over the whole image disappears exactly, with no trace at the borders."""
    clean = picture(height, width)
    cast = torch.tensor([0.2, -0.1, 0.05])[:, None, None]
    assert_close(fix(clean + cast, clean), clean)


def check_keeps_detail(fix: Fix) -> None:
    """Of a checkerboard on the restored image nothing is lost, of one on the reference nothing is taken."""
    side, reach = 80, 31  # five levels look 1 + 2 + 4 + 8 + 16 pixels far
    board = 0.1 * ((torch.arange(side)[:, None] + torch.arange(side)) % 2 * 2.0 - 1).expand(1, 3, side, side)
    smooth = torch.linspace(0.3, 0.6, side).expand(1, 3, side, side)
    inner = (..., slice(reach, -reach), slice(reach, -reach))
    assert_close(fix(smooth + board, smooth)[inner], (smooth + board)[inner])
    assert_close(fix(smooth, smooth + board)[inner], smooth[inner])


def check_inputs_unchanged(fix: Fix) -> None:
    x, reference = picture(9, 8, 1), picture(9, 8, 2)
    before = x.clone(), reference.clone()
    fix(x, reference)
    assert torch.equal(x, before[0]) and torch.equal(reference, before[1])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_removes_drift_at_any_size(height: int, width: int) -> None:
    check_removes_drift(wavelet_color_fix, height, width)


def test_keeps_detail() -> None:
    check_keeps_detail(wavelet_color_fix)


def test_inputs_unchanged() -> None:
    check_inputs_unchanged(wavelet_color_fix)


def test_zero_padding_would_be_caught() -> None:
    def dark_borders(x: Tensor, reference: Tensor) -> Tensor:
        return x + torch.nn.functional.avg_pool2d(reference - x, 5, stride=1, padding=2)

    with pytest.raises(AssertionError):
        check_removes_drift(dark_borders, 12, 12)


def test_taking_the_reference_whole_would_be_caught() -> None:
    with pytest.raises(AssertionError):
        check_keeps_detail(lambda x, reference: reference)


def test_writing_into_the_input_would_be_caught() -> None:
    with pytest.raises(AssertionError):
        check_inputs_unchanged(lambda x, reference: x.add_(low_pass(reference - x)))


def test_equals_the_textbook_form() -> None:
    x, reference = picture(21, 34, 1, torch.float64), picture(21, 34, 2, torch.float64)
    assert_close(wavelet_color_fix(x, reference), x - low_pass(x) + low_pass(reference))


def test_low_pass_has_the_width_it_states() -> None:
    # An impulse far from the border comes out with variance sum 4^j / 2 along each axis.
    levels, side = 4, 65
    impulse = torch.zeros(1, 1, side, side, dtype=torch.float64)
    impulse[..., side // 2, side // 2] = 1
    profile = low_pass(impulse, levels).sum(dim=-1).flatten()
    offset = torch.arange(side, dtype=torch.float64) - side // 2
    assert float(profile.sum()) == pytest.approx(1)
    assert float((profile * offset**2).sum()) == pytest.approx(sum(4**j / 2 for j in range(levels)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    x, reference = picture(16, 16, 1), picture(16, 16, 2)
    result = wavelet_color_fix(x.to(dtype), reference.to(dtype))
    assert result.dtype == dtype
    tol = TOL[dtype if dtype.itemsize < 4 else torch.float32]
    torch.testing.assert_close(result.float(), wavelet_color_fix(x, reference), atol=tol.atol, rtol=tol.rtol)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 1 level"):
        low_pass(picture(4, 4), 0)
    with pytest.raises((ValueError, TypeCheckError)):
        wavelet_color_fix(picture(4, 4), picture(4, 5))
