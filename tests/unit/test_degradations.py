"""Plain behaviour of the synthetic degradations: names, ranges, sizes, messages."""

from __future__ import annotations

import io
import math
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentindigo import degradations as d
from tolerances import assert_close


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps_of(params: d.Degradation, kind: type) -> list:
    return [step for step in params.steps if isinstance(step, kind)]


KERNELS = {
    "gaussian": d.gaussian_kernel(25, 1.5, 2.5, 0.5),
    "generalised": d.generalised_gaussian_kernel(21, 1.5, 2.5, 0.5, 2.0),
    "plateau": d.plateau_kernel(21, 1.5, 2.5, 0.5, 1.5),
    "sinc": d.sinc_kernel(21, 1.2),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_sum_to_one_and_do_not_shift(name: str) -> None:
    kernel = KERNELS[name]
    assert kernel.dtype == torch.float32
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-6)
    assert_close(kernel, kernel.flip(0, 1))
    assert (float(kernel.min()) < 0) == (name == "sinc")


def test_gaussian_kernel_has_its_standard_deviations_and_direction() -> None:
    axis = torch.arange(25.0) - 12
    kernel = d.gaussian_kernel(25, 2.5, 1.0, math.pi / 2)
    assert float((kernel * axis[:, None] ** 2).sum()) == pytest.approx(2.5**2, rel=1e-3), "angle 90 degrees is down"
    assert float((kernel * axis[None, :] ** 2).sum()) == pytest.approx(1.0, rel=1e-3)
    assert_close(d.gaussian_kernel(9, 1.3), d.generalised_gaussian_kernel(9, 1.3, beta=1))


def test_sinc_kernel_is_a_low_pass_at_its_cutoff() -> None:
    response = torch.fft.fft2(d.sinc_kernel(41, 1.5), s=(256, 256)).abs()
    frequency = 2 * math.pi * torch.arange(256) / 256
    assert float(response[0, frequency < 1.2].min()) > 0.8
    assert float(response[0, (frequency > 1.9) & (frequency < math.pi)].max()) < 0.2


def test_the_sinc_without_cutoff_hardly_changes_an_image() -> None:
    x = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    assert float((d.blur(x, d.sinc_kernel(21, math.pi)) - x)[..., 11:-11, 11:-11].abs().max()) < 2e-2


def test_gaussian_noise_has_its_strength_and_colour() -> None:
    x = torch.full((1, 3, 128, 128), 0.5)
    colour = d.add_gaussian_noise(x, 0.05, generator()) - x
    assert float(colour.std()) == pytest.approx(0.05, rel=0.02)
    assert abs(float(torch.corrcoef(colour[0].flatten(1))[0, 1])) < 0.05
    grey = d.add_gaussian_noise(x, 0.05, generator(), grey=True) - x
    assert torch.equal(grey[:, 0], grey[:, 2])
    mixed = d.add_gaussian_noise(x, 0.05, generator(), mix=torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 2]])) - x
    assert_close(mixed[:, 0], mixed[:, 1])
    assert float(mixed[:, 2].std()) == pytest.approx(0.1, rel=0.05)


def test_poisson_noise_grows_with_brightness() -> None:
    for level in (0.1, 0.5):
        x = torch.full((1, 3, 128, 128), level)
        noise = d.add_poisson_noise(x, 1.0, generator()) - x
        assert float(noise.std()) == pytest.approx(math.sqrt(level / 256), rel=0.03)
        assert abs(float(noise.mean())) < 2e-3
        grey = d.add_poisson_noise(x, 1.0, generator(), grey=True)
        assert torch.equal(grey[:, 0], grey[:, 1])


def test_jpeg_handles_grey_doubles_and_batches() -> None:
    x = torch.rand(2, 1, 13, 21, generator=generator())
    buffer = io.BytesIO()
    Image.fromarray((x[0, 0] * 255).round().byte().numpy()).save(buffer, "JPEG", quality=80)
    expected = torch.from_numpy(np.array(Image.open(buffer))) / 255
    assert float((d.jpeg(x, 80)[0, 0] - expected).abs().mean()) < 2 / 255
    assert d.jpeg(x.double(), 80).dtype == torch.float64
    assert d.jpeg(x.bfloat16(), 80).dtype == torch.bfloat16
    assert_close(d.jpeg(x.double(), 80).float(), d.jpeg(x, 80))


def test_a_standard_degradation_is_blur_bicubic_noise_rounding_jpeg() -> None:
    x = torch.rand(1, 3, 32, 24, generator=generator(1))
    seen: list[Tensor] = []

    def codec(y: Tensor, quality: int) -> Tensor:
        seen.append(y)
        assert quality == 70
        return y

    y = d.degrade(x, "medium", generator(5), jpeg=codec)
    blurred = d.blur(x, d.gaussian_kernel(11, 1.5))
    small = d.resize(blurred, (8, 6)).clamp(0, 1)
    noise = torch.randn(1, 3, 8, 6, generator=generator(5))
    expected = ((small + 10 / 255 * noise).clamp(0, 1) * 255).round() / 255
    assert_close(y, expected)
    assert len(seen) == 1
    assert torch.equal(seen[0], y)


@pytest.mark.parametrize(
    ("name", "scale", "summary"),
    [
        ("mild", 4, (0.8, 3, 90)),
        ("medium", 4, (1.5, 10, 70)),
        ("severe", 4, (2.5, 20, 40)),
        ("noise15", 1, (0, 15, 100)),
        ("jpeg15", 1, (0, 0, 15)),
        ("blur1.5-noise5", 1, (6.0, 5, 100)),
        ("beyond-jpeg5", 4, (1.5, 10, 5)),
        ("beyond-blur4", 4, (4.0, 10, 70)),
        ("beyond-noise40", 4, (1.5, 40, 70)),
    ],
)
def test_standard_degradations_have_their_numbers(name: str, scale: int, summary: tuple[float, float, float]) -> None:
    standard = d.STANDARD[name]
    found = standard.params(generator()).summary()
    assert standard.name == name
    assert standard.scale == scale
    assert found.blur == pytest.approx(summary[0])
    assert found.noise == pytest.approx(summary[1] / 255)
    assert found.jpeg == pytest.approx((100 - summary[2]) / 100)
    x = torch.rand(1, 3, 16, 24, generator=generator())
    assert d.degrade(x, name, generator()).shape == (1, 3, 16 // scale, 24 // scale)


def test_the_named_set_is_complete_and_cannot_be_changed() -> None:
    assert set(d.STANDARD) == {
        *("mild", "medium", "severe", "random", "noise15", "jpeg15", "blur1.5-noise5"),
        *("beyond-jpeg5", "beyond-blur4", "beyond-noise40"),
    }
    with pytest.raises(TypeError):
        d.STANDARD["mild"] = d.STANDARD["severe"]  # pyright: ignore[reportIndexIssue]  # the refusal is what is tested


def test_random_is_the_second_order_recipe_at_scale_four() -> None:
    x = torch.rand(1, 3, 32, 32, generator=generator())
    source = generator(3)
    params = d.draw_second_order(source, 4)
    assert_close(d.degrade(x, "random", generator(3)), d.apply(x, params, source))


def test_the_second_order_ranges_are_the_published_ones() -> None:
    ranges = d.SecondOrder()
    assert ranges == d.SecondOrder.for_scale(4)
    first, second = ranges.first, ranges.second
    assert ranges.kernel_size == (7, 21)
    assert ranges.final_sinc_probability == 0.8
    assert first.kernel_probabilities == second.kernel_probabilities == (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    assert (first.blur_probability, second.blur_probability) == (1.0, 0.8)
    assert first.sinc_probability == second.sinc_probability == 0.1
    assert (first.sigma, second.sigma) == ((0.2, 3.0), (0.2, 1.5))
    assert first.beta_generalised == second.beta_generalised == (0.5, 4.0)
    assert first.beta_plateau == second.beta_plateau == (1.0, 2.0)
    assert (first.resize_probabilities, second.resize_probabilities) == ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))
    assert (first.resize, second.resize) == ((0.15, 1.5), (0.3, 1.2))
    assert (first.noise, second.noise) == ((1.0, 30.0), (1.0, 25.0))
    assert (first.poisson, second.poisson) == ((0.05, 3.0), (0.05, 2.5))
    assert first.grey_probability == second.grey_probability == 0.4
    assert first.quality == second.quality == (30, 95)


def test_second_order_draws_fill_their_ranges() -> None:
    source, draws = generator(), 700
    drawn = [d.draw_second_order(source, 4) for _ in range(draws)]
    noises = [s.sigma * 255 for p in drawn for s in steps_of(p, d.NoiseStep)]
    qualities = [s.quality for p in drawn for s in steps_of(p, d.JpegStep)]
    sides = Counter(s.kernel.shape[-1] for p in drawn for s in steps_of(p, d.BlurStep))
    factors = [steps_of(p, d.ResizeStep)[0].factor / 4 for p in drawn]
    assert len(qualities) == 2 * draws
    assert len(noises) / (2 * draws) == pytest.approx(0.5, abs=0.05)
    assert sum(sides.values()) / draws == pytest.approx(1 + 0.8 + 0.8, abs=0.05)
    assert set(sides) == set(range(7, 22, 2))
    assert 1 <= min(noises) < 3
    assert 27 < max(noises) <= 30
    assert 30 <= min(qualities) < 35
    assert 90 < max(qualities) <= 95
    assert 0.15 <= min(factors) < 0.2
    assert 1.4 < max(factors) <= 1.5
    assert sum(f < 1 for f in factors) / draws == pytest.approx(0.7, abs=0.05)
    assert sum(isinstance(p.steps[-2], d.JpegStep) for p in drawn) / draws == pytest.approx(0.5, abs=0.05)


def test_simple_draws_fill_their_ranges_and_are_sometimes_none() -> None:
    source, draws = generator(), 900
    drawn = [d.draw_simple(source, 1) for _ in range(draws)]
    blurs = [s.sigma for p in drawn for s in steps_of(p, d.BlurStep)]
    noises = [s.sigma * 255 for p in drawn for s in steps_of(p, d.NoiseStep)]
    qualities = [s.quality for p in drawn for s in steps_of(p, d.JpegStep)]
    for values in (blurs, noises, qualities):
        assert len(values) / draws == pytest.approx(0.6, abs=0.05)
    assert 1.9 < max(blurs) <= d.blur_limit(1)
    assert 28 < max(noises) <= 30
    assert 10 <= min(qualities) < 14
    assert 90 < max(qualities) <= 95
    assert 0 < sum(not p.steps for p in drawn) < draws / 5


def test_the_training_mixture_has_its_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[str] = Counter()
    for name in ("draw_second_order", "draw_bsrgan", "draw_simple"):

        def record(source: torch.Generator, scale: int, name: str = name) -> d.Degradation:
            drawn[name] += 1
            return d.Degradation(scale, ())

        monkeypatch.setattr(d, name, record)
    source, draws = generator(), 1000
    for _ in range(draws):
        d.draw_training(source, 4)
    assert drawn["draw_second_order"] / draws == pytest.approx(0.4, abs=0.05)
    assert drawn["draw_bsrgan"] / draws == pytest.approx(0.15, abs=0.04)
    assert drawn["draw_simple"] / draws == pytest.approx(0.45, abs=0.05)


def test_blur_shrinks_with_the_scale() -> None:
    assert [d.blur_limit(scale) for scale in (1, 2, 3, 4, 8)] == pytest.approx([2.0, 2.4, 2.8, 3.2, 3.2])
    assert d.SecondOrder.for_scale(1).first.sigma[1] < d.SecondOrder.for_scale(2).first.sigma[1] < 3
    assert d.SecondOrder.for_scale(8) == d.SecondOrder()


def test_the_summary_adds_up_and_saturates() -> None:
    kernel = d.gaussian_kernel(9, 1.0)
    two = d.Degradation(2, (d.BlurStep(kernel, 1.0, 1.0), d.ResizeStep(1.0), d.BlurStep(kernel, 1.0, 1.0)))
    assert two.summary().blur == pytest.approx(4 * math.sqrt(0.25 + 1))
    assert d.Degradation(1, (d.BlurStep(kernel, 1.0, 50.0),)).summary() == (8.0, 0.0, 0.0)
    detour = d.Degradation(1, (d.ResizeStep(0.5), d.ResizeStep(1.0)))
    assert 1 < detour.summary().blur < 4, "a detour over a coarser grid blurs"
    assert d.Degradation(1, ()).summary() == (0.0, 0.0, 0.0)


def test_a_drawn_degradation_survives_copying() -> None:
    params = d.draw_bsrgan(generator(), 4)
    x = torch.rand(1, 3, 32, 32, generator=generator())
    copy = deepcopy(params)
    assert torch.equal(d.apply(x, copy, generator()), d.apply(x, params, generator()))


X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: d.gaussian_kernel(4, 1.0), "must be odd"),
        (lambda: d.gaussian_kernel(5, 0.0), "sigma must be positive"),
        (lambda: d.sinc_kernel(5, 4.0), "cutoff"),
        (lambda: d.blur(X, torch.ones(4, 4)), "odd size"),
        (lambda: d.blur(X, torch.ones(3, 5, 5)), "one per image"),
        (lambda: d.resize(X, (0, 4)), "at least 1"),
        (lambda: d.jpeg(X, 0), "1..100"),
        (lambda: d.jpeg(X, torch.ones(3)), "one per image"),
        (lambda: d.jpeg(torch.zeros(1, 4, 8, 8), 50), "alpha"),
        (lambda: d.degrade(X, "awful", generator()), "known: mild"),
        (lambda: d.degrade(X, "mild", [generator()]), "one per image"),
        (lambda: d.degrade(torch.zeros(1, 3, 9, 8), "mild", generator()), "multiple of scale 4"),
    ],
)
def test_refusals_say_what_to_do(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
