"""Laws of the known operators. Each law runs on the real thing and on a planted defect that it must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentindigo.operators import Blur, Mask, Operator, Scale, conjugate_gradients
from tolerances import TOL, assert_close

SIZE = (12, 18)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def smooth(height: int, width: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Images with a little structure at every scale, inside [0, 1]."""
    layers = [
        F.interpolate(
            random(batch, 3, max(2, height // k), max(2, width // k), seed=seed + k), (height, width), mode="bicubic"
        )
        for k in (1, 2, 4, 8)
    ]
    image = sum(k * layer for k, layer in zip((1, 3, 9, 20), layers, strict=True))
    assert isinstance(image, Tensor)
    return (image - image.min()) / (image.max() - image.min())


def motion(length: int = 5) -> Tensor:
    """A slanted line, not symmetric in any axis."""
    kernel = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        kernel[i, i // 2] = 1 + i
    return kernel / kernel.sum()


def lopsided(rows: int, columns: int) -> Tensor:
    kernel = random(rows, columns, seed=7) ** 4
    return kernel / kernel.sum()


def mask(*size: int, share: float = 0.6) -> Tensor:
    return (random(*size, seed=5) < share).double()


OPERATORS: dict[str, Operator] = {
    "blur": Blur(lopsided(5, 7)),
    "motion blur": Blur(motion()),
    "mask": Mask(mask(*SIZE)),
    "mask per channel": Mask(mask(3, *SIZE)),
    "scale 1": Scale(1),
    "scale 2": Scale(2),
    "scale 3": Scale(3),
    "scale 1.5": Scale(1.5),
}


class Defect:
    """A real operator with some methods replaced by wrong ones."""

    def __init__(self, operator: Operator, **wrong: Callable[..., Tensor]) -> None:
        self._operator, self._wrong = operator, wrong

    def __getattr__(self, name: str) -> Any:
        return self._wrong[name] if name in self._wrong else getattr(self._operator, name)


# <A x, y> = <x, A^T y>.


def check_adjoint(operator: Any, size: tuple[int, int] = SIZE) -> None:
    x = random(2, 3, *size) - 0.5
    image = operator.forward(x)
    y = image + random(*image.shape, seed=1) - 0.5  # Not nearly orthogonal to the image, at any size.
    transposed = operator.adjoint(y)
    assert transposed.shape == x.shape
    assert_close((image * y).sum(), (x * transposed).sum())
    assert float((image * y).sum().abs()) > 1e-3, "the product is too small to tell"


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_transpose(name: str) -> None:
    check_adjoint(OPERATORS[name])


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 20), st.integers(4, 20), st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 7]))
def test_the_adjoint_of_a_blur_is_the_transpose_at_any_size(h: int, w: int, rows: int, columns: int) -> None:
    check_adjoint(Blur(lopsided(rows, columns)), (h, w))


BLUR = Blur(lopsided(5, 7))


@pytest.mark.parametrize(
    "defect",
    [
        Defect(BLUR, adjoint=lambda y: Blur(BLUR.kernel.flip(0, 1)).forward(y)),
        Defect(Blur(motion()), adjoint=Blur(motion()).forward),
        Defect(Scale(2), adjoint=lambda y: F.interpolate(y, scale_factor=2.0, mode="bicubic") / 4),
        Defect(OPERATORS["mask"], adjoint=lambda y: y),
    ],
    ids=["mirrored instead of folded", "kernel not turned", "enlarging", "mask forgotten"],
)
def test_the_adjoint_law_finds_wrong_transposes(defect: Defect) -> None:
    with pytest.raises(AssertionError):
        check_adjoint(defect)


# A^+ = A^T (A A^T + lambda I)^-1.


def dense(operator: Any, size: tuple[int, int]) -> Tensor:
    """The operator as a matrix: its columns are the images of single pixels."""
    pixels = size[0] * size[1]
    return operator.forward(torch.eye(pixels, dtype=torch.float64).reshape(pixels, 1, *size)).flatten(1).T


def check_pinv(operator: Any, noise: float, damping: float, size: tuple[int, int] = (6, 12)) -> None:
    a = dense(operator, size)
    y = operator.forward(random(2, 1, *size))
    y = y + 0.05 * (random(*y.shape, seed=3) - 0.5)
    normal = a @ a.T + damping * torch.eye(len(a), dtype=torch.float64)
    expected = (torch.linalg.pinv(normal) @ y.flatten(1).T).T @ a
    # Ten digits of the residual; a damping of 3e-4 costs up to four of them in the solution.
    torch.testing.assert_close(operator.pinv(y, noise).flatten(1), expected, atol=1e-6, rtol=1e-6)


SMALL = {
    "blur": (Blur(lopsided(5, 7), iterations=1000), 1.0, 3e-4),
    "mask": (Mask(mask(6, 12)), 1.0, 0.0),
    "scale 2": (Scale(2), 1 / 4, 0.0),
    "scale 3": (Scale(3), 1 / 9, 0.0),
}


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("name", SMALL)
def test_pinv_is_the_regularised_pseudo_inverse(name: str, noise: float) -> None:
    operator, gain, floor = SMALL[name]
    check_pinv(operator, noise, gain * max(floor, (noise / 0.1) ** 2))


@pytest.mark.parametrize("name", SMALL)
def test_the_pinv_law_finds_an_adjoint_in_its_place(name: str) -> None:
    operator, gain, _ = SMALL[name]
    with pytest.raises(AssertionError):
        check_pinv(Defect(operator, pinv=lambda y, noise: operator.adjoint(y)), 0.05, gain * 0.25)


def check_solver(solve: Callable[..., Tensor]) -> None:
    factor = random(24, 24, seed=2)
    matrix = factor @ factor.T + 0.5 * torch.eye(24, dtype=torch.float64)
    rhs = random(3, 2, 3, 4)
    found = solve(lambda u: (u.flatten(1) @ matrix).reshape(u.shape), rhs)
    torch.testing.assert_close(found.flatten(1), torch.linalg.solve(matrix, rhs.flatten(1).T).T, atol=1e-7, rtol=1e-7)


def test_conjugate_gradients_solve() -> None:
    check_solver(conjugate_gradients)


def test_the_solver_law_finds_an_early_stop() -> None:
    with pytest.raises(AssertionError):
        check_solver(lambda normal, rhs: conjugate_gradients(normal, rhs, iterations=5))


def test_conjugate_gradients_stand_zero_and_done_images() -> None:
    rhs = torch.cat([torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)])
    assert_close(conjugate_gradients(lambda u: 2 * u, rhs), rhs / 2)


# The projection agrees with y and keeps what y does not see.


def check_projection(operator: Any, exact: bool, dtype: torch.dtype = torch.float64) -> None:
    truth, x = smooth(*SIZE, batch=2).to(dtype), smooth(*SIZE, batch=2, seed=50).to(dtype)
    y = operator.forward(truth)
    projected = operator.project(x, y)
    assert projected.shape == x.shape
    assert projected.dtype == dtype
    before, after = ((operator.forward(z) - y).square().mean().sqrt() for z in (x, projected))
    assert float(before) > 0.01, "the estimate agrees already"
    assert float(after) < 0.05 * float(before)
    if exact:
        tol = TOL[dtype].atol * 100
        assert float(after) < tol
    # What is added lies in the range of A^T: two estimates that differ by a null vector of A still do afterwards.
    null = operator.pinv(operator.forward(x)) - x
    if exact:
        moved = operator.project(x + null, y) - projected
        torch.testing.assert_close(moved, null, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_projection_agrees_with_the_measurement(name: str, dtype: torch.dtype) -> None:
    check_projection(OPERATORS[name], "blur" not in name, dtype)


@pytest.mark.parametrize(
    ("defect", "exact"),
    [
        (Defect(BLUR, project=lambda x, y: x + BLUR.adjoint(y - BLUR.forward(x))), False),
        (Defect(Scale(2), project=lambda x, y: x - Scale(2).pinv(y - Scale(2).forward(x))), True),
        (Defect(OPERATORS["mask"], project=lambda x, y: 0.5 * (x + y)), True),
        (Defect(Scale(2), project=lambda x, y: Scale(2).pinv(y)), True),
    ],
    ids=["adjoint for pinv", "sign", "average", "estimate dropped"],
)
def test_the_projection_law_finds_wrong_steps(defect: Defect, exact: bool) -> None:
    with pytest.raises(AssertionError):
        check_projection(defect, exact)


def check_mask_is_exact(operator: Any) -> None:
    x, y = random(2, 3, *SIZE, dtype=torch.float32), random(2, 3, *SIZE, seed=1, dtype=torch.float32)
    known = mask(*SIZE).bool().expand_as(x)
    projected = operator.project(x, y)
    assert torch.equal(projected[known], y[known])
    assert torch.equal(projected[~known], x[~known])


def test_a_mask_takes_known_pixels_bit_for_bit() -> None:
    check_mask_is_exact(OPERATORS["mask"])


def test_the_exactness_law_finds_rounding() -> None:
    real = OPERATORS["mask"]
    with pytest.raises(AssertionError):
        check_mask_is_exact(Defect(real, project=lambda x, y: x + real.pinv(0.3 * y - 0.3 * real.forward(x)) / 0.3))


def check_noise_is_respected(operator: Any) -> None:
    """The noisier y is said to be, the less the projection moves the estimate."""
    x, truth = smooth(*SIZE), smooth(*SIZE, seed=50)
    y = operator.forward(truth)
    moves = [float((operator.project(x, y, noise) - x).norm()) for noise in (0.0, 0.03, 0.1, 0.5)]
    assert all(a > 1.02 * b for a, b in zip(moves, moves[1:], strict=False)), moves
    assert moves[-1] < 0.3 * moves[0]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_noisier_measurement_moves_the_estimate_less(name: str) -> None:
    check_noise_is_respected(OPERATORS[name])


def test_the_noise_law_finds_blind_trust() -> None:
    real = Scale(2)
    with pytest.raises(AssertionError):
        check_noise_is_respected(Defect(real, project=lambda x, y, noise: real.project(x, y)))


# What holds for any operator.


def check_alone_is_together(operator: Any) -> None:
    x, truth = smooth(*SIZE, batch=3).float(), smooth(*SIZE, batch=3, seed=50).float()
    # Very different images, so that each is done after another number of iterations.
    y = operator.forward(truth) * torch.tensor([1.0, 1e-3, 0.3]).reshape(3, 1, 1, 1)
    together = operator.project(x, y)
    for i in range(3):
        assert_close(operator.project(x[i : i + 1], y[i : i + 1])[0], together[i])


@pytest.mark.parametrize("name", OPERATORS)
def test_an_image_alone_equals_the_image_in_a_batch(name: str) -> None:
    check_alone_is_together(OPERATORS[name])


def test_the_batch_law_finds_a_shared_step() -> None:
    real = Scale(2)
    with pytest.raises(AssertionError):
        check_alone_is_together(Defect(real, project=lambda x, y: x + real.pinv(y - real.forward(x)) / (1 + y.std())))


def check_inputs_unchanged(operator: Any) -> None:
    x = smooth(*SIZE)
    y = operator.forward(x)
    before = x.clone(), y.clone()
    for run in (operator.adjoint, operator.pinv, operator.initial, lambda y: operator.project(x, y)):
        run(y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("name", OPERATORS)
def test_inputs_are_unchanged(name: str) -> None:
    check_inputs_unchanged(OPERATORS[name])


def test_the_unchanged_law_finds_writing_in_place() -> None:
    with pytest.raises(AssertionError):
        check_inputs_unchanged(Defect(Scale(2), initial=lambda y: y.clamp_(0.4, 0.5)))


def check_gradient(operator: Any) -> None:
    """Autograd's gradient of ||y - A x||^2 / 2 is A^T (A x - y): guidance may differentiate the forward operator."""
    x = smooth(*SIZE).requires_grad_()
    y = operator.forward(smooth(*SIZE, seed=50))
    loss = (operator.forward(x) - y).square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, x)
    assert_close(gradient, operator.adjoint(operator.forward(x.detach()) - y))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_pass(name: str) -> None:
    check_gradient(OPERATORS[name])


def test_the_gradient_law_finds_a_detached_part() -> None:
    real = Scale(2)
    with pytest.raises(AssertionError):
        check_gradient(Defect(real, forward=lambda x: real.forward(0.5 * x + 0.5 * x.detach())))


def test_gradients_pass_after_a_first_call_in_inference_mode() -> None:
    operator = Scale(1.25)
    with torch.inference_mode():
        operator.forward(torch.rand(1, 3, 10, 15))
    x = torch.rand(1, 3, 10, 15, requires_grad=True)
    operator.forward(x).sum().backward()
    assert x.grad is not None


# The start image is better than the measurement itself.


def check_initial(operator: Any, least_gain: float) -> None:
    truth = smooth(24, 36)
    y = operator.forward(truth)
    start = operator.initial(y)
    assert start.shape == truth.shape
    assert float(start.min()) >= 0
    assert float(start.max()) <= 1
    plain = F.interpolate(y, size=truth.shape[-2:], mode="nearest")
    before, after = ((z - truth).square().mean() for z in (plain, start))
    assert float(after) < float(before) * least_gain


STARTS = {
    "blur": (BLUR, 0.3),
    "motion blur": (Blur(motion()), 0.3),
    "mask": (Mask(mask(24, 36)), 0.2),
    "scale 2": (Scale(2), 1.0),
    "scale 1.5": (Scale(1.5), 1.0),
}


@pytest.mark.parametrize("name", STARTS)
def test_the_start_is_better_than_the_measurement(name: str) -> None:
    check_initial(*STARTS[name])


@pytest.mark.parametrize("name", ["blur", "mask"])
def test_the_start_law_finds_the_measurement_itself(name: str) -> None:
    operator, gain = STARTS[name]
    with pytest.raises(AssertionError):
        check_initial(Defect(operator, initial=lambda y: y), gain)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (13, 24)])
def test_holes_are_filled_smoothly_and_known_pixels_kept(size: tuple[int, int]) -> None:
    y = torch.full((1, 3, *size), 0.7)
    known = torch.ones(size)
    known[: size[0] // 2, 2:9] = 0
    operator = Mask(known)
    assert_close(operator.initial(operator.forward(y)), y)
    nothing = Mask(torch.zeros(size)).initial(y)
    assert_close(nothing, torch.full_like(y, 0.5))


# Construction and refusals.


def test_operators_keep_their_own_copies_and_meet_the_protocol() -> None:
    kernel, known = motion(), mask(*SIZE)
    blur, holes = Blur(kernel), Mask(known)
    kernel.zero_()
    known.zero_()
    assert float(blur.kernel.sum()) == pytest.approx(1)
    assert float(holes.mask.sum()) > 0
    for operator in OPERATORS.values():
        assert isinstance(operator, Operator)
    with pytest.raises(AttributeError):
        blur.kernel = motion()  # pyright: ignore[reportAttributeAccessIssue]  # the refusal is what is tested


def test_scale_is_pillows_bicubic() -> None:
    x = smooth(24, 36)
    expected = F.interpolate(x, (6, 9), mode="bicubic", antialias=True)
    assert_close(Scale(4).forward(x), expected)
    assert [operator.scale for operator in (Scale(4), Scale(1.5), BLUR, OPERATORS["mask"])] == [4, 1.5, 1, 1]


def test_half_precision_is_projected_in_single() -> None:
    x, y = smooth(*SIZE).bfloat16(), Scale(2).forward(smooth(*SIZE, seed=50)).bfloat16()
    projected = Scale(2).project(x, y)
    assert projected.dtype == torch.bfloat16
    assert_close(Scale(2).forward(projected.double()), y.double(), torch.bfloat16)


X = torch.rand(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Blur(torch.ones(4, 4) / 16), "odd sides"),
        (lambda: Blur(torch.ones(3, 3)), r"kernel / kernel\.sum"),
        (lambda: Blur(torch.ones(3, 19) / 57).forward(X), "too small"),
        (lambda: Mask(torch.full((8, 8), 0.5)), "mask > 0.5"),
        (lambda: Mask(torch.ones(8)), r"\(H, W\)"),
        (lambda: Mask(torch.ones(4, 8)).forward(X), "nearest-neighbour"),
        (lambda: Scale(0.5), "at least 1"),
        (lambda: Scale(3).forward(X), "resize or crop it to 9"),
        (lambda: Scale(2).project(X, X), "sizes that the operator connects"),
        (lambda: Mask(torch.ones(8, 8)).project(X, X[..., :4]), "one size"),
        (lambda: Scale(2).pinv(X, noise=-1), ">= 0"),
    ],
)
def test_refusals_say_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
