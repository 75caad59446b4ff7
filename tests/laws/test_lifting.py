"""Laws of the lifting equations. Each law runs on the real thing and on a planted defect that it must find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from latentindigo.lifting import (
    BandMix,
    LiftingStep,
    haar_lift,
    haar_unlift,
    lazy_merge,
    lazy_split,
    lift,
    undecimated_merge,
    undecimated_split,
    unlift,
)
from tolerances import assert_close, randomise_

CHANNELS, GAMMA_DIM = 2, 5
DTYPES = [torch.float64, torch.float32]
LEVELS = [0, 1, 2, 3]
HAAR = [True, False]

Parts = tuple[Tensor, Tensor]
Split = Callable[[Tensor], Parts]
Merge = Callable[[Tensor, Tensor], Tensor]


def haar_split(x: Tensor) -> Parts:
    return haar_lift(*lazy_split(x))


def haar_merge(c: Tensor, d: Tensor) -> Tensor:
    return lazy_merge(*haar_unlift(c, d))


SPLITS: dict[str, tuple[Split, Merge]] = {
    "lazy": (lazy_split, lazy_merge),
    "haar": (haar_split, haar_merge),
    "undecimated": (undecimated_split, undecimated_merge),
}
DECIMATED = ["lazy", "haar"]


def random_steps(kind: type[LiftingStep] = LiftingStep, count: int = 2, scale: float = 0.5) -> list[LiftingStep]:
    """Steps far from the identity (see test_the_random_steps_do_something) and still well conditioned."""
    steps = [kind(CHANNELS, hidden=6, blocks=1, gamma_dim=GAMMA_DIM) for _ in range(count)]
    for seed, step in enumerate(steps):
        randomise_(step, seed, scale)
    return steps


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass(frozen=True)
class Transform:
    """A whole transform with both directions, as the laws see it."""

    steps: Sequence[LiftingStep]
    levels: int
    haar: bool = True

    def forward(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return lift(x, self.steps, gamma, self.levels, self.haar)

    def inverse(self, x_c: Tensor, x_d: Sequence[Tensor], gamma: Tensor) -> Tensor:
        return unlift(x_c, x_d, self.steps, gamma, self.levels, self.haar)


# ------------------------------------------------------------------------------------------------- planted defects


class ForgetfulStep(LiftingStep):
    """Undoes predict before update: reads the coarse part that forward has already changed."""

    def inverse(self, c: Tensor, d: Tensor, gamma: Tensor, update: Tensor | None = None) -> Parts:
        d = d + self.predict(c, gamma)
        c = c - self.update(d, gamma)
        return c, d


class DetachedStep(LiftingStep):
    """Right values, wrong gradients."""

    def forward(self, c: Tensor, d: Tensor, gamma: Tensor, updates: list[Tensor] | None = None) -> Parts:
        d = d - self.predict(c, gamma).detach()
        return c + self.update(d, gamma), d

    def inverse(self, c: Tensor, d: Tensor, gamma: Tensor, update: Tensor | None = None) -> Parts:
        c = c - self.update(d, gamma).detach()
        return c, d + self.predict(c, gamma)


class InPlaceStep(LiftingStep):
    """Right values, but written over the caller's tensors."""

    def forward(self, c: Tensor, d: Tensor, gamma: Tensor, updates: list[Tensor] | None = None) -> Parts:
        d -= self.predict(c, gamma)
        c += self.update(d, gamma)
        return c, d

    def inverse(self, c: Tensor, d: Tensor, gamma: Tensor, update: Tensor | None = None) -> Parts:
        c -= self.update(d, gamma)
        d += self.predict(c, gamma)
        return c, d


class HalfPrecisionSumStep(LiftingStep):
    """Keeps the sums in the dtype that the networks happened to compute in."""

    def forward(self, c: Tensor, d: Tensor, gamma: Tensor, updates: list[Tensor] | None = None) -> Parts:
        prediction = self.predict(c, gamma)
        d = d.to(prediction.dtype) - prediction
        update = self.update(d, gamma)
        return c.to(update.dtype) + update, d


class DeafStep(LiftingStep):
    """Does not listen to gamma."""

    def forward(self, c: Tensor, d: Tensor, gamma: Tensor, updates: list[Tensor] | None = None) -> Parts:
        return super().forward(c, d, torch.zeros_like(gamma), updates)


def transposed_merge(c: Tensor, d: Tensor) -> Tensor:
    """Exchanges the horizontal and the vertical neighbour."""
    x01, x10, x11 = d.chunk(3, dim=1)
    return lazy_merge(c, torch.cat((x10, x01, x11), dim=1))


def cropping_split(x: Tensor) -> Parts:
    """Drops an odd row or column without a word."""
    return lazy_split(x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2])


def lopsided_haar_split(x: Tensor) -> Parts:
    """Gives one of the three details another scale."""
    c, d = haar_split(x)
    return c, torch.cat((d[:, :-CHANNELS], 2 * d[:, -CHANNELS:]), dim=1)


def orthonormal_haar_split(x: Tensor) -> Parts:
    """DC gain 2: the coarse part leaves the range of the image."""
    c, d = haar_split(x)
    return 2 * c, 2 * d


def two_tap_split(x: Tensor) -> Parts:
    """The plain undecimated Haar filter, whose coarse part is shifted by half a pixel."""
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    c = (padded[..., :-1, :-1] + padded[..., 1:, :-1] + padded[..., :-1, 1:] + padded[..., 1:, 1:]) / 4
    return c, torch.cat((x - c, torch.zeros_like(x), torch.zeros_like(x)), dim=1)


# ------------------------------------------------------------------------------------------------------ inversion


def check_left_inverse(split: Split, merge: Merge, x: Tensor) -> None:
    assert_close(merge(*split(x)), x)


def check_right_inverse(split: Split, merge: Merge, c: Tensor, d: Tensor) -> None:
    new_c, new_d = split(merge(c, d))
    assert_close(new_c, c)
    assert_close(new_d, d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPLITS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(height=st.integers(1, 9), width=st.integers(1, 9))
def test_merge_undoes_split(name: str, dtype: torch.dtype, height: int, width: int) -> None:
    factor = 2 if name in DECIMATED else 1
    split, merge = SPLITS[name]
    check_left_inverse(split, merge, draw(2, CHANNELS, factor * height, factor * width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECIMATED)
def test_split_undoes_merge(name: str, dtype: torch.dtype) -> None:
    split, merge = SPLITS[name]
    check_right_inverse(split, merge, draw(2, CHANNELS, 3, 5, dtype=dtype), draw(2, 3 * CHANNELS, 3, 5, dtype=dtype))


def test_a_transposed_merge_is_found() -> None:
    with pytest.raises(AssertionError):
        check_left_inverse(lazy_split, transposed_merge, draw(1, CHANNELS, 6, 4))


def test_the_redundant_split_is_no_bijection() -> None:
    with pytest.raises(AssertionError):
        check_right_inverse(
            undecimated_split, undecimated_merge, draw(1, CHANNELS, 4, 4), draw(1, 3 * CHANNELS, 4, 4, seed=1)
        )


def check_unlift_undoes_lift(transform: Transform, x: Tensor, gamma: Tensor) -> None:
    x_c, x_d = transform.forward(x, gamma)
    assert_close(transform.inverse(x_c, x_d, gamma), x)


def check_lift_undoes_unlift(transform: Transform, x_c: Tensor, x_d: Sequence[Tensor], gamma: Tensor) -> None:
    new_c, new_d = transform.forward(transform.inverse(x_c, x_d, gamma), gamma)
    assert_close(new_c, x_c)
    assert len(new_d) == len(x_d)
    for new, old in zip(new_d, x_d, strict=True):
        assert_close(new, old)


@pytest.mark.parametrize("haar", HAAR)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(height=st.integers(1, 4), width=st.integers(1, 4))
def test_unlift_undoes_lift(dtype: torch.dtype, levels: int, haar: bool, height: int, width: int) -> None:
    steps = [step.to(dtype) for step in random_steps()]
    x = draw(2, CHANNELS, height * 2**levels, width * 2**levels, dtype=dtype)
    check_unlift_undoes_lift(Transform(steps, levels, haar), x, draw(2, GAMMA_DIM, dtype=dtype, seed=1))


@pytest.mark.parametrize("haar", HAAR)
@pytest.mark.parametrize("levels", LEVELS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lift_undoes_unlift(dtype: torch.dtype, levels: int, haar: bool) -> None:
    steps = [step.to(dtype) for step in random_steps()]
    x_c = draw(2, CHANNELS, 2, 3, dtype=dtype)
    x_d = [
        draw(2, 3 * CHANNELS, 2 * 2**power, 3 * 2**power, dtype=dtype, seed=power) for power in reversed(range(levels))
    ]
    check_lift_undoes_unlift(Transform(steps, levels, haar), x_c, x_d, draw(2, GAMMA_DIM, dtype=dtype, seed=9))


@pytest.mark.parametrize("levels", LEVELS)
def test_a_forgetful_inverse_is_found(levels: int) -> None:
    transform = Transform(random_steps(ForgetfulStep), levels)
    with pytest.raises(AssertionError):
        check_unlift_undoes_lift(transform, draw(1, CHANNELS, 8, 8), draw(1, GAMMA_DIM))
    if levels:
        x_d = [draw(1, 3 * CHANNELS, 2**power, 2**power, seed=power) for power in reversed(range(levels))]
        with pytest.raises(AssertionError):
            check_lift_undoes_unlift(transform, draw(1, CHANNELS, 1, 1), x_d, draw(1, GAMMA_DIM))


def test_inversion_does_not_need_trained_dtype() -> None:
    """Networks in half precision still invert up to their rounding, because the sums stay in float32."""
    steps = [step.to(torch.bfloat16) for step in random_steps()]
    x, gamma = draw(1, CHANNELS, 8, 8), draw(1, GAMMA_DIM)
    x_c, x_d = lift(x, steps, gamma, 2)
    assert x_c.dtype == torch.float32
    # A rounding of the networks' input may tip the other way on the way back, hence the table's bfloat16 row.
    assert_close(unlift(x_c, x_d, steps, gamma, 2), x, torch.bfloat16)


# ------------------------------------------------------------------------------------- weights away from the identity


def check_differs_from_wavelet(steps: Sequence[LiftingStep]) -> None:
    """The learned steps change coarse part and details visibly, and by more than a constant."""
    x, gamma = draw(1, CHANNELS, 16, 16), draw(1, GAMMA_DIM, seed=1)
    x_c, x_d = lift(x, steps, gamma, 1)
    haar_c, haar_d = lift(x, [], gamma, 1)
    for change in (x_c - haar_c, x_d[0] - haar_d[0]):
        assert change.std(dim=(-2, -1)).min() > 0.05


def test_the_random_steps_do_something() -> None:
    check_differs_from_wavelet(random_steps())


def check_starts_as_wavelet(steps: Sequence[LiftingStep]) -> None:
    x, gamma = draw(1, CHANNELS, 8, 8), draw(1, GAMMA_DIM, seed=1)
    x_c, x_d = lift(x, steps, gamma, 2)
    haar_c, haar_d = lift(x, [], gamma, 2)
    assert torch.equal(x_c, haar_c)
    assert all(torch.equal(new, old) for new, old in zip(x_d, haar_d, strict=True))


def test_untrained_steps_are_a_wavelet() -> None:
    fresh = [LiftingStep(CHANNELS, hidden=6, blocks=1, gamma_dim=GAMMA_DIM)]
    check_starts_as_wavelet(fresh)
    with pytest.raises(AssertionError):
        check_differs_from_wavelet(fresh)


def test_a_step_that_starts_elsewhere_is_found() -> None:
    step = LiftingStep(CHANNELS, hidden=6, blocks=1, gamma_dim=GAMMA_DIM)
    nn.init.normal_(step.update.tail.weight)
    with pytest.raises(AssertionError):
        check_starts_as_wavelet([step])


# ------------------------------------------------------------------------------------------------------- odd sizes


def check_refuses_odd_sizes(split: Split) -> None:
    for height, width in ((5, 4), (4, 5), (1, 1)):
        try:
            split(draw(1, CHANNELS, height, width))
        except ValueError as error:
            message = str(error)
            assert f"{height}x{width}" in message, "the message names what was passed"
            assert "pad" in message, "the message names the way out"
        else:
            raise AssertionError(f"{height}x{width} was accepted")


def test_odd_sizes_are_refused() -> None:
    check_refuses_odd_sizes(lazy_split)
    check_refuses_odd_sizes(lambda x: (lift(x, [], draw(1, GAMMA_DIM), 1)[0], x))


def test_a_silent_crop_is_found() -> None:
    with pytest.raises(AssertionError, match="was accepted"):
        check_refuses_odd_sizes(cropping_split)


def test_several_levels_refuse_what_is_merely_even() -> None:
    with pytest.raises(ValueError, match=r"multiples of 4 expected for 2 levels, got 6x8"):
        lift(draw(1, CHANNELS, 6, 8), [], draw(1, GAMMA_DIM), 2)


# --------------------------------------------------------------------------------------------------- Haar's properties


def check_keeps_energy(split: Split, x: Tensor) -> None:
    """The bands of DC gain 1 are half the orthonormal ones, so 4 (|c|^2 + |d|^2) = |x|^2."""
    c, d = split(x)
    assert_close(4 * (c.square().sum() + d.square().sum()), x.square().sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescaled_haar_keeps_energy(dtype: torch.dtype) -> None:
    check_keeps_energy(haar_split, draw(2, CHANNELS, 8, 6, dtype=dtype))


def test_a_lopsided_haar_is_found() -> None:
    with pytest.raises(AssertionError):
        check_keeps_energy(lopsided_haar_split, draw(2, CHANNELS, 8, 6))


@pytest.mark.parametrize("levels", LEVELS[1:])
def test_energy_over_several_levels(levels: int) -> None:
    x = draw(1, CHANNELS, 16, 8, dtype=torch.float64)
    x_c, x_d = lift(x, [], draw(1, GAMMA_DIM), levels)
    total = 4**levels * x_c.square().sum()
    for level, details in enumerate(x_d, start=1):
        total = total + 4**level * details.square().sum()
    assert_close(total, x.square().sum())


def check_flat_stays_flat(split: Split) -> None:
    """DC gain 1: a flat image has the same flat coarse part and no details."""
    x = torch.full((1, CHANNELS, 6, 6), 0.7, dtype=torch.float64)
    c, d = split(x)
    assert_close(c, torch.full_like(c, 0.7))
    assert_close(d, torch.zeros_like(d))


@pytest.mark.parametrize("split", [haar_split, undecimated_split])
def test_flat_stays_flat(split: Split) -> None:
    check_flat_stays_flat(split)


def test_a_gain_of_two_is_found() -> None:
    with pytest.raises(AssertionError):
        check_flat_stays_flat(orthonormal_haar_split)


def pillow_downsample(x: Tensor, factor: int, method: Image.Resampling) -> Tensor:
    """Downsample one float channel with Pillow (mode F: no rounding, antialiased)."""
    image = Image.fromarray(np.asarray(x, dtype=np.float32))
    small = image.resize((x.shape[-1] // factor, x.shape[-2] // factor), method)
    return torch.from_numpy(np.array(small))


def check_ramp_lands_on_pillows_grid(coarse: Callable[[Tensor], Tensor], factor: int) -> None:
    """The coarse part of a ramp equals Pillow's downsampling away from borders: same grid, same gain."""
    rows, columns = torch.meshgrid(torch.arange(10.0 * factor), torch.arange(8.0 * factor), indexing="ij")
    ramp = 0.2 + 0.005 * columns + 0.003 * rows
    small = coarse(ramp[None, None])[0, 0]
    inside = slice(3, -3)  # Pillow's bicubic kernel reaches two pixels of the small image
    for method in (Image.Resampling.BICUBIC, Image.Resampling.BOX):
        expected = pillow_downsample(ramp, factor, method)
        assert small.shape == expected.shape
        assert_close(small[inside, inside], expected[inside, inside])


@pytest.mark.parametrize("levels", LEVELS)
def test_coarse_part_of_a_ramp_is_pillows(levels: int) -> None:
    check_ramp_lands_on_pillows_grid(lambda x: lift(x, [], draw(1, GAMMA_DIM), levels)[0], 2**levels)


@pytest.mark.parametrize("levels", LEVELS[1:])
def test_an_aliased_subsampling_is_found(levels: int) -> None:
    with pytest.raises(AssertionError):
        check_ramp_lands_on_pillows_grid(lambda x: lift(x, [], draw(1, GAMMA_DIM), levels, haar=False)[0], 2**levels)


def test_a_half_pixel_shift_is_found() -> None:
    with pytest.raises(AssertionError):
        check_ramp_lands_on_pillows_grid(lambda x: two_tap_split(x)[0], 1)


# ------------------------------------------------------------------------------------------------- inputs, gradients


def check_inputs_unchanged(function: Callable[..., object], *inputs: Tensor) -> None:
    copies = [tensor.clone() for tensor in inputs]
    versions = [tensor._version for tensor in inputs]
    function(*inputs)
    for tensor, copy, version in zip(inputs, copies, versions, strict=True):
        assert torch.equal(tensor, copy), "a value changed"
        assert tensor._version == version, "written to, even if with the same values"
        assert not tensor.requires_grad, "requires_grad_ was called on the caller's tensor"


@torch.no_grad()
def test_inputs_are_not_mutated() -> None:
    c, d = draw(1, CHANNELS, 4, 4), draw(1, 3 * CHANNELS, 4, 4)
    gamma, step = draw(1, GAMMA_DIM), random_steps()[0]
    for split, merge in SPLITS.values():
        check_inputs_unchanged(split, draw(1, CHANNELS, 4, 4))
        check_inputs_unchanged(merge, c, d)
    for function in (haar_lift, haar_unlift):
        check_inputs_unchanged(function, c, d)
    for function in (step.forward, step.inverse):
        check_inputs_unchanged(function, c, d, gamma)


@torch.no_grad()
def test_an_in_place_step_is_found() -> None:
    step = random_steps(InPlaceStep)[0]
    for function in (step.forward, step.inverse):
        with pytest.raises(AssertionError, match="a value changed"):
            check_inputs_unchanged(function, draw(1, CHANNELS, 4, 4), draw(1, 3 * CHANNELS, 4, 4), draw(1, GAMMA_DIM))


def check_gradients(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Compare the gradient with finite differences in float64; their own error sets gradcheck's tolerance."""
    leaves = [tensor.detach().clone().requires_grad_(True) for tensor in inputs]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, raise_exception=False)


def flat_forward(transform: Transform) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    def function(x: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        x_c, x_d = transform.forward(x, gamma)
        return x_c, *x_d

    return function


def flat_inverse(transform: Transform) -> Callable[..., tuple[Tensor, ...]]:
    def function(gamma: Tensor, x_c: Tensor, *x_d: Tensor) -> tuple[Tensor, ...]:
        return (transform.inverse(x_c, x_d, gamma),)

    return function


def gradient_problem(kind: type[LiftingStep], levels: int) -> tuple[Transform, Tensor, Tensor]:
    steps = [step.double() for step in random_steps(kind)]
    x = draw(1, CHANNELS, 2 ** max(levels, 1), 2 ** max(levels, 1), dtype=torch.float64)
    return Transform(steps, levels), x, draw(1, GAMMA_DIM, dtype=torch.float64, seed=1)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_gradients_of_both_directions(levels: int) -> None:
    transform, x, gamma = gradient_problem(LiftingStep, levels)
    check_gradients(flat_forward(transform), x, gamma)
    x_c, x_d = transform.forward(x, gamma)
    check_gradients(flat_inverse(transform), gamma, x_c, *x_d)


def test_a_detached_branch_is_found() -> None:
    transform, x, gamma = gradient_problem(DetachedStep, 1)
    with pytest.raises(AssertionError):
        check_gradients(flat_forward(transform), x, gamma)
    x_c, x_d = transform.forward(x, gamma)
    with pytest.raises(AssertionError):
        check_gradients(flat_inverse(transform), gamma, x_c, *x_d)


# ------------------------------------------------------------------------------------------------- gamma, precision


def check_listens_to_gamma(step: LiftingStep) -> None:
    c, d = draw(1, CHANNELS, 4, 4), draw(1, 3 * CHANNELS, 4, 4)
    one, other = (step(c, d, draw(1, GAMMA_DIM, seed=seed)) for seed in (1, 2))
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() > 1e-3


def test_steps_listen_to_gamma() -> None:
    check_listens_to_gamma(random_steps()[0])


def test_a_deaf_step_is_found() -> None:
    with pytest.raises(AssertionError):
        check_listens_to_gamma(random_steps(DeafStep)[0])


def check_sums_keep_their_dtype(step: LiftingStep) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        c, d = step(draw(1, CHANNELS, 4, 4), draw(1, 3 * CHANNELS, 4, 4), draw(1, GAMMA_DIM))
    assert c.dtype == torch.float32
    assert d.dtype == torch.float32


def test_sums_stay_in_float32_under_autocast() -> None:
    check_sums_keep_their_dtype(random_steps()[0])


def test_a_half_precision_sum_is_found() -> None:
    with pytest.raises(AssertionError):
        check_sums_keep_their_dtype(random_steps(HalfPrecisionSumStep)[0])


# ------------------------------------------------------------------------------------------------------- refusals


def test_parts_that_do_not_belong_together_are_refused() -> None:
    c, wrong = draw(1, CHANNELS, 4, 4), draw(1, CHANNELS, 4, 4)
    for function in (lazy_merge, undecimated_merge, haar_lift, haar_unlift):
        with pytest.raises(ValueError, match="two parts that one split returned"):
            function(c, wrong)


def test_wrong_levels_are_refused() -> None:
    x, gamma = draw(1, CHANNELS, 4, 4), draw(1, GAMMA_DIM)
    with pytest.raises(ValueError, match="levels >= 0"):
        lift(x, [], gamma, -1)
    x_c, x_d = lift(x, [], gamma, 2)
    with pytest.raises(ValueError, match="1 detail tensors expected for levels=1, got 2"):
        unlift(x_c, x_d, [], gamma, 1)
    with pytest.raises(ValueError, match="two parts that one split returned"):
        unlift(x_c, x_d[::-1], [], gamma, 2)


def test_empty_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LiftingStep(CHANNELS, hidden=0)


def test_a_band_mix_forgets_its_inverse_when_its_matrix_changes() -> None:
    mix = BandMix(CHANNELS)
    c, d = draw(1, CHANNELS, 4, 4), draw(1, 3 * CHANNELS, 4, 4)
    with torch.no_grad():
        mix.inverse(*mix(c, d))
        mix.matrix.data.mul_(2.0)  # A change that autograd's own counter does not see.
        back_c, back_d = mix.inverse(*mix(c, d))
    assert_close(back_c, c)
    assert_close(back_d, d)
