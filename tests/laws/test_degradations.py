"""Laws of the synthetic degradations. Each law runs on the real thing and on a planted defect that it must find."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from latentindigo.degradations import (
    STANDARD,
    BlurStep,
    Degradation,
    JpegStep,
    NoiseStep,
    PoissonStep,
    ResizeStep,
    RoundStep,
    SecondOrder,
    Summary,
    add_gaussian_noise,
    add_poisson_noise,
    apply,
    blur,
    check_training_range,
    degrade,
    draw_bsrgan,
    draw_second_order,
    draw_simple,
    draw_training,
    gaussian_kernel,
    jpeg,
    resize,
    sinc_kernel,
)
from tolerances import TOL, assert_close

Operation = Callable[[Tensor], Tensor]
Noisy = Callable[[Tensor, torch.Generator], Tensor]
Codec = Callable[[Tensor, int], Tensor]
Draw = Callable[[torch.Generator, int], Degradation]

DRAWS: dict[str, Draw] = {
    "second order": draw_second_order,
    "bsrgan": draw_bsrgan,
    "simple": draw_simple,
    "training": draw_training,
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def natural(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """An image with a photograph's 1/f spectrum, correlated colours and a sharp-edged disc, on the 8-bit grid."""
    noise = torch.randn(3, height, width, generator=generator(seed), dtype=torch.float64)
    fy, fx = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.rfftfreq(width, dtype=torch.float64)
    radius = (fy[:, None] ** 2 + fx[None, :] ** 2).sqrt().clamp_min(1 / max(height, width))
    field = torch.fft.irfft2(torch.fft.rfft2(noise) / radius, s=(height, width))
    field = field / field.std()
    image = 0.5 + 0.18 * (0.8 * field[:1] + 0.4 * field)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = (rows - height / 2) ** 2 + (columns - width / 3) ** 2 < (min(height, width) / 4) ** 2
    image = torch.where(disc, 0.5 * image + torch.tensor([0.4, 0.15, 0.05], dtype=torch.float64)[:, None, None], image)
    return (image.clamp(0, 1)[None].float() * 255).round() / 255


def checkerboard(size: int = 48) -> Tensor:
    """Black and white squares, of 8 pixels above and of one below: what overshoots most."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    side = torch.where(rows < size // 2, 8, 1)
    return ((rows // side + columns // side) % 2).float().expand(1, 3, size, size).clone()


def pillow_jpeg(x: Tensor, quality: float) -> Tensor:
    decoded = []
    for image in x:
        buffer = io.BytesIO()
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=int(quality))
        decoded.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255)
    return torch.stack(decoded)


def pillow_bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    channels = [np.array(Image.fromarray(c.numpy()).resize((size[1], size[0]), Image.Resampling.BICUBIC)) for c in x[0]]
    return torch.from_numpy(np.stack(channels))[None]


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean() + 1e-12))


# Neutral parameters change nothing.


def check_neutral(operation: Operation, x: Tensor) -> None:
    assert_close(operation(x), x)


NEUTRAL: dict[str, Operation] = {
    "delta kernel": lambda x: blur(x, F.pad(torch.ones(1, 1), (3, 3, 3, 3))),
    "narrow Gaussian": lambda x: blur(x, gaussian_kernel(9, 0.1)),
    "same size, bicubic": lambda x: resize(x, (x.shape[-2], x.shape[-1])),
    "same size, area": lambda x: resize(x, (x.shape[-2], x.shape[-1]), "area"),
    "no Gaussian noise": lambda x: add_gaussian_noise(x, 0.0, generator(0)),
    "no Poisson noise": lambda x: add_poisson_noise(x, 0.0, generator(0)),
    "no steps": lambda x: apply(x, Degradation(1, ()), generator(0)),
    "8-bit rounding of 8 bits": lambda x: apply(x, Degradation(1, (RoundStep(),)), generator(0)),
    "all left out": lambda x: apply(
        x,
        Degradation(1, (NoiseStep(0.1), PoissonStep(1.0), RoundStep(), JpegStep(20))),
        generator(0),
        noise=False,
        jpeg=False,
    ),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_parameters_are_the_identity(name: str) -> None:
    check_neutral(NEUTRAL[name], natural(33, 26))


def test_the_neutral_law_finds_a_shifted_kernel() -> None:
    off_centre = F.pad(torch.ones(1, 1), (2, 4, 3, 3))
    with pytest.raises(AssertionError):
        check_neutral(lambda x: blur(x, off_centre), natural(33, 26))


# One seed, one result.


def check_seeded(noisy: Noisy, x: Tensor) -> None:
    state = torch.get_rng_state()
    first = noisy(x, generator(0))
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"
    torch.manual_seed(99)
    assert torch.equal(noisy(x, generator(0)), first), "one seed gave two results"
    assert not torch.equal(noisy(x, generator(1)), first), "two seeds gave one result"


RANDOM: dict[str, Noisy] = {
    "gaussian": lambda x, g: add_gaussian_noise(x, 0.1, g),
    "gaussian, grey": lambda x, g: add_gaussian_noise(x, 0.1, g, grey=True),
    "poisson": lambda x, g: add_poisson_noise(x, 1.0, g),
    "poisson, grey": lambda x, g: add_poisson_noise(x, 1.0, g, grey=True),
    "medium": lambda x, g: degrade(x, "medium", g),
    "random": lambda x, g: degrade(x, "random", g),
    "bsrgan": lambda x, g: degrade(x, draw_bsrgan(g, 2), g),
}


@pytest.mark.parametrize("name", RANDOM)
def test_one_seed_gives_one_result(name: str) -> None:
    check_seeded(RANDOM[name], natural(32, 24))


@pytest.mark.parametrize(
    "defect",
    [
        lambda x, g: x + 0.1 * torch.randn(x.shape),
        lambda x, g: x + 0.1 * torch.randn(x.shape, generator=generator(3)),
    ],
    ids=["global generator", "own generator"],
)
def test_the_seed_law_finds_other_sources_of_noise(defect: Noisy) -> None:
    with pytest.raises(AssertionError):
        check_seeded(defect, natural(32, 24))


def flat(params: Degradation) -> list[float]:
    """All numbers of a drawn degradation."""
    numbers: list[float] = [params.scale]
    for step in params.steps:
        for value in (len(type(step).__name__), *vars(step).values()):
            if isinstance(value, Tensor):
                numbers.extend(value.flatten().tolist())
            elif isinstance(value, int | float):
                numbers.append(float(value))
    return numbers


def check_draws_seeded(draw: Draw, scale: int) -> None:
    state = torch.get_rng_state()
    first = [flat(draw(generator(seed), scale)) for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"
    torch.manual_seed(99)
    assert [flat(draw(generator(seed), scale)) for seed in range(8)] == first, "one seed gave two draws"
    assert any(numbers != first[0] for numbers in first), "all seeds gave one draw"


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("name", DRAWS)
def test_one_seed_gives_one_draw(name: str, scale: int) -> None:
    check_draws_seeded(DRAWS[name], scale)


def test_the_draw_law_finds_a_global_generator() -> None:
    def careless(g: torch.Generator, scale: int) -> Degradation:
        return Degradation(scale, (NoiseStep(float(torch.rand(()))),))

    with pytest.raises(AssertionError):
        check_draws_seeded(careless, 4)


def check_alone_is_together(run: Callable[[Tensor, list[torch.Generator]], Tensor]) -> None:
    """An image's result depends on its own generator only, not on its batch."""
    x = torch.cat([natural(32, 24, seed) for seed in range(3)])
    together = run(x, [generator(seed) for seed in range(3)])
    for i in range(3):
        assert torch.equal(run(x[i : i + 1], [generator(i)])[0], together[i])


@pytest.mark.parametrize("name", ["mild", "random", "noise15"])
def test_an_image_alone_equals_the_image_in_a_batch(name: str) -> None:
    check_alone_is_together(lambda x, g: degrade(x, name, g))


def test_the_batch_law_finds_a_shared_generator() -> None:
    with pytest.raises(AssertionError):
        check_alone_is_together(lambda x, g: degrade(x, "mild", g[0]))


def test_kernels_and_qualities_may_differ_within_a_batch() -> None:
    x = torch.cat([natural(32, 24, seed) for seed in range(2)])
    kernels = torch.stack([gaussian_kernel(9, 0.7, 2.0, 0.4), sinc_kernel(9, 1.5)])
    qualities = torch.tensor([20.0, 80.0])
    for i in range(2):
        assert_close(blur(x, kernels)[i], blur(x[i : i + 1], kernels[i])[0])
        assert_close(jpeg(x, qualities)[i], jpeg(x[i : i + 1], float(qualities[i]))[0])


# Linear operations are linear, and autograd's transpose is their adjoint.


def check_adjoint(operation: Operation, shape: tuple[int, ...]) -> None:
    """<A u, v> = <u, A^T v>, with A^T taken at another point, where only a linear operation has the same one."""
    u = torch.randn(shape, generator=generator(0), dtype=torch.float64)
    elsewhere = torch.randn(shape, generator=generator(1), dtype=torch.float64).requires_grad_()
    image = operation(u)
    v = torch.randn(image.shape, generator=generator(2), dtype=torch.float64)
    (transposed,) = torch.autograd.grad(operation(elsewhere), elsewhere, v)
    tol = TOL[torch.float64]
    left, right = float((image * v).sum()), float((u * transposed).sum())
    assert abs(left - right) <= tol.atol * image.numel() + tol.rtol * abs(left)


LINEAR: dict[str, Operation] = {
    "blur": lambda x: blur(x, gaussian_kernel(7, 1.0, 2.5, 0.3)),
    "blur per image": lambda x: blur(x, torch.stack([gaussian_kernel(7, 1.0), sinc_kernel(7, 1.2)])),
    "blur wider than the image": lambda x: blur(x, gaussian_kernel(25, 4.0)),
    "bicubic down": lambda x: resize(x, (5, 3)),
    "bicubic up": lambda x: resize(x, (20, 31)),
    "bicubic, aliased": lambda x: resize(x, (5, 3), antialias=False),
    "bilinear": lambda x: resize(x, (7, 5), "bilinear"),
    "area": lambda x: resize(x, (4, 5), "area"),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operations_pass_the_adjoint_test(name: str) -> None:
    check_adjoint(LINEAR[name], (2, 3, 12, 11))


@pytest.mark.parametrize(
    "defect",
    [lambda x: blur(x, gaussian_kernel(7, 1.0)).clamp(0, 1), lambda x: resize(x, (5, 3)) + 0.1],
    ids=["clamped", "offset"],
)
def test_the_adjoint_law_finds_non_linear_operations(defect: Operation) -> None:
    with pytest.raises(AssertionError):
        check_adjoint(defect, (2, 3, 12, 11))


def test_blur_is_a_convolution_with_mirrored_borders() -> None:
    x = natural(17, 12).double()
    kernel = torch.rand(5, 3, generator=generator(0), dtype=torch.float64)
    kernel = F.pad(kernel, (1, 1))
    padded = np.pad(x[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    expected = np.zeros((3, 17, 12))
    for i in range(5):
        for j in range(5):
            expected += kernel[i, j].item() * padded[:, 4 - i : 4 - i + 17, 4 - j : 4 - j + 12]
    assert_close(blur(x, kernel)[0], torch.from_numpy(expected))


# Results stay images.


def check_range(run: Callable[[Tensor], Tensor], x: Tensor, scale: int) -> None:
    y = run(x)
    assert tuple(y.shape) == (*x.shape[:2], x.shape[-2] // scale, x.shape[-1] // scale)
    assert bool(torch.isfinite(y).all())
    assert float(y.min()) >= 0
    assert float(y.max()) <= 1


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("name", DRAWS)
def test_results_stay_in_range_and_have_the_size_of_y(name: str, scale: int) -> None:
    for seed in range(6):
        params = DRAWS[name](generator(seed), scale)
        for noise, coded in ((True, True), (False, False)):
            run = partial(apply, params=params, generator=generator(0), noise=noise, jpeg=coded)
            check_range(run, checkerboard(), scale)


def test_the_range_law_finds_overshoot_and_wrong_sizes() -> None:
    with pytest.raises(AssertionError):
        check_range(lambda x: blur(x, sinc_kernel(13, 1.5)), checkerboard(), 1)
    with pytest.raises(AssertionError):
        check_range(lambda x: resize(x, (13, 12)), checkerboard(), 4)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["mild", "severe", "random", "jpeg15"]))
def test_any_size_that_the_scale_divides_is_accepted(rows: int, columns: int, name: str) -> None:
    scale = STANDARD[name].scale
    check_range(lambda x: degrade(x, name, generator(0)), torch.rand(1, 3, rows * scale, columns * scale), scale)


def check_input_unchanged(run: Callable[[Tensor], object]) -> None:
    x = natural(32, 24)
    before = x.clone()
    run(x)
    assert torch.equal(x, before)
    assert not x.requires_grad


@pytest.mark.parametrize("name", [*NEUTRAL, "random", "medium"])
def test_inputs_are_unchanged(name: str) -> None:
    check_input_unchanged(NEUTRAL.get(name, lambda x: degrade(x, name, generator(0))))


def test_the_unchanged_law_finds_writing_in_place() -> None:
    with pytest.raises(AssertionError):
        check_input_unchanged(lambda x: x.mul_(0.9))


# Leaving noise and JPEG out leaves exactly them out.


def check_clean_is_the_mean(run: Callable[[Tensor, bool], Tensor]) -> None:
    """The noise-free result is what noisy results average to."""
    draws, sigma = 200, 10 / 255
    x = (0.3 + 0.4 * natural(32, 32)).expand(draws, 3, 32, 32)
    clean = run(x, False)
    error = run(x, True).mean(dim=0) - clean[0]
    # An average of independent errors: at most five times its standard deviation.
    assert float(error.square().mean().sqrt()) < 2 * sigma / draws**0.5
    assert float(error.mean().abs()) < 5 * sigma / (draws * error.numel()) ** 0.5


def medium(x: Tensor, noise: bool) -> Tensor:
    return apply(x, STANDARD["medium"].params(generator(0)), generator(0), noise, False)


def test_the_noise_free_result_is_the_mean_of_noisy_ones() -> None:
    check_clean_is_the_mean(medium)


def test_the_mean_law_finds_a_clean_branch_without_blur() -> None:
    with pytest.raises(AssertionError):
        check_clean_is_the_mean(lambda x, noise: medium(x, True) if noise else resize(x, (8, 8)))


# Resizing is Pillow's.


def check_resize_is_pillows(run: Callable[[Tensor, tuple[int, int]], Tensor], size: tuple[int, int]) -> None:
    x = natural(37, 52)
    assert_close(run(x, size), pillow_bicubic(x, size))


@pytest.mark.parametrize("size", [(9, 13), (18, 26), (37, 13), (74, 104), (5, 60)])
def test_bicubic_is_pillows(size: tuple[int, int]) -> None:
    check_resize_is_pillows(resize, size)


def test_the_resize_law_finds_missing_antialiasing() -> None:
    with pytest.raises(AssertionError):
        check_resize_is_pillows(lambda x, size: resize(x, size, antialias=False), (9, 13))


# The tensor JPEG is libjpeg's.


def check_jpeg_is_pillows(codec: Codec, x: Tensor, quality: int) -> None:
    value = psnr(codec(x, quality), pillow_jpeg(x, quality))
    assert value >= 40, f"quality {quality}: {value:.1f} dB"


QUALITIES = [10, 20, 30, 40, 49, 50, 60, 70, 75, 80, 90, 95]


@pytest.mark.parametrize("size", [(96, 96), (61, 47), (40, 73)])
@pytest.mark.parametrize("quality", [5, *QUALITIES, 100])
def test_jpeg_agrees_with_pillow(quality: int, size: tuple[int, int]) -> None:
    check_jpeg_is_pillows(jpeg, natural(*size), quality)


def test_jpeg_agrees_with_pillow_on_photographs(data_dir: Path) -> None:
    photos = sorted(p for p in (data_dir / "val").rglob("*") if p.suffix.lower() in {".png", ".jpg"})[:3]
    for photo in photos:
        pixels = np.array(Image.open(photo).convert("RGB").crop((0, 0, 150, 131)))
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        for quality in (10, 30, 50, 75, 95):
            check_jpeg_is_pillows(jpeg, x, quality)


@pytest.mark.parametrize(
    "defect",
    [
        lambda x, q: jpeg(x, q + 3),
        lambda x, q: torch.cat([jpeg(x[:, i : i + 1], q) for i in range(3)], dim=1),
        lambda x, q: torch.roll(jpeg(torch.roll(x, 4, -1), q), -4, -1),
    ],
    ids=["other quality", "colours coded apart", "other block grid"],
)
def test_the_jpeg_law_finds_other_codecs(defect: Codec) -> None:
    with pytest.raises(AssertionError):
        for quality in QUALITIES:
            check_jpeg_is_pillows(defect, natural(96, 96), quality)


def check_gradient_passes(codec: Codec, quality: int) -> None:
    """The gradient of <w, jpeg(x)> at a smooth w is close to w: JPEG keeps what is smooth."""
    x = (0.2 + 0.6 * natural(48, 48)).requires_grad_()
    w = blur(natural(48, 48, seed=1) - 0.5, gaussian_kernel(13, 2.0))
    (gradient,) = torch.autograd.grad(codec(x, quality), x, w)
    assert bool(torch.isfinite(gradient).all())
    cosine = F.cosine_similarity(gradient.flatten(), w.flatten(), dim=0)
    assert float(cosine) > 0.9


@pytest.mark.parametrize("quality", [10, 50, 95])
def test_gradients_pass_through_jpeg(quality: int) -> None:
    check_gradient_passes(jpeg, quality)


@pytest.mark.parametrize(
    "defect", [lambda x, q: x * 0 + jpeg(x.detach(), q), lambda x, q: jpeg(1 - x, q)], ids=["rounded away", "sign"]
)
def test_the_gradient_law_finds_rounding_and_sign_errors(defect: Codec) -> None:
    with pytest.raises(AssertionError):
        check_gradient_passes(defect, 50)


# Training never sees what "beyond" promises it has not seen.


def check_stays_inside(draw: Draw, scale: int, draws: int = 60) -> None:
    source = generator(0)
    for _ in range(draws):
        params = draw(source, scale)
        try:
            check_training_range(params)
        except ValueError as error:
            raise AssertionError(str(error)) from error


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_stay_inside_the_training_range(name: str, scale: int) -> None:
    check_stays_inside(DRAWS[name], scale)


def test_the_range_law_finds_wider_draws() -> None:
    ranges = SecondOrder()
    for stage in (
        replace(ranges.first, quality=(5, 95)),
        replace(ranges.first, sigma=(0.2, 4.0)),
        replace(ranges.first, noise=(1.0, 40.0)),
        replace(ranges.first, poisson=(0.05, 6.0)),
    ):
        wide = replace(ranges, first=stage)
        with pytest.raises(AssertionError):
            check_stays_inside(partial(draw_second_order, ranges=wide), 4)


@pytest.mark.parametrize("name", [name for name in STANDARD if name.startswith("beyond")])
def test_the_beyond_degradations_are_outside(name: str) -> None:
    with pytest.raises(ValueError, match="training expects"):
        check_training_range(STANDARD[name].params(generator(0)))


# The summary says what arrives.


def check_summary(params: Degradation) -> None:
    """The summary's noise is the standard deviation that a flat image receives."""
    x = torch.full((1, 3, 64, 64), 0.5)
    measured = float((apply(x, params, generator(0), jpeg=False) - 0.5).std())
    assert abs(measured / params.summary().noise - 1) < 0.1


SUMMARISED = {
    "standard": Degradation(4, (ResizeStep(1.0), NoiseStep(20 / 255))),
    "poisson": Degradation(1, (PoissonStep(2.0),)),
    "blurred noise": Degradation(1, (NoiseStep(30 / 255), BlurStep(gaussian_kernel(9, 1.0), 1.0, 1.0))),
    "noise, then area": Degradation(2, (NoiseStep(30 / 255), ResizeStep(1.0, "area"), NoiseStep(5 / 255))),
}


@pytest.mark.parametrize("name", SUMMARISED)
def test_the_summary_gives_the_noise_that_arrives(name: str) -> None:
    check_summary(SUMMARISED[name])


def test_the_summary_law_finds_noise_that_is_only_added_up() -> None:
    class Naive(Degradation):
        def summary(self) -> Summary:
            total = sum(s.sigma**2 for s in self.steps if isinstance(s, NoiseStep))
            return super().summary()._replace(noise=total**0.5)

    with pytest.raises(AssertionError):
        check_summary(Naive(1, SUMMARISED["blurred noise"].steps))
