"""Laws of the metrics: equal images are perfect, worse images rank worse, and numbers match closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor

from latentindigo import metrics
from latentindigo.metrics import gradient_energy, gradient_energy_sums, psnr, round8, ssim, swd
from tolerances import TOL, assert_close

Images = Sequence[Tensor]
MetricFn = Callable[[Images, Images], float]
Pairwise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Metric:
    """A metric of two lists of images, its value for equal lists, and how far a value is from perfect."""

    name: str
    fn: MetricFn
    perfect: float

    def badness(self, x: Images, ref: Images) -> float:
        value = self.fn(x, ref)
        return -value if math.isinf(self.perfect) else abs(value - self.perfect)


def mean_of(fn: Pairwise) -> MetricFn:
    return lambda x, ref: float(torch.stack([fn(a[None], b[None])[0] for a, b in zip(x, ref, strict=True)]).mean())


small_swd = partial(swd, patches=1500, projections=16)
METRICS = [
    Metric("psnr", mean_of(psnr), math.inf),
    Metric("ssim", mean_of(ssim), 1.0),
    Metric("gradient_energy", gradient_energy, 1.0),
    Metric("swd", small_swd, 0.0),
]
each_metric = pytest.mark.parametrize("metric", METRICS, ids=[m.name for m in METRICS])


def texture(seed: int, height: int = 40, width: int = 49, contrast: float = 0.12) -> Tensor:
    """Band-limited noise around mid grey: (3, H, W)."""
    noise = torch.randn(3, height + 4, width + 4, generator=torch.Generator().manual_seed(seed))
    return (0.5 + contrast * 3 * F.avg_pool2d(noise[None], 5, stride=1)[0]).clamp(0, 1)


def photos() -> list[Tensor]:
    return [texture(0), texture(1, 33, 60)]


def with_noise(images: Images, amount: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [image + amount * torch.randn(image.shape, generator=generator) for image in images]


def with_blur(images: Images, times: int) -> list[Tensor]:
    for _ in range(times):
        images = [F.avg_pool2d(F.pad(u[None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0] for u in images]
    return list(images)


# ------------------------------------------------------------------------------------------------------------ laws


def check_perfect(metric: Metric) -> None:
    """metric(x, x) is the perfect value, exactly or up to rounding."""
    value = metric.fn(photos(), photos())
    assert value == metric.perfect or abs(value - metric.perfect) <= TOL[torch.float64].atol


def check_ranks(metric: Metric) -> None:
    """More noise is worse, more blur is worse."""
    clean = photos()
    noisy = [with_noise(clean, amount) for amount in (0.02, 0.05, 0.1)]
    blurred = [with_blur(clean, times) for times in (1, 2, 4)]
    for series in (noisy, blurred):
        badness = [metric.badness(images, clean) for images in series]
        assert badness == sorted(badness) and len(set(badness)) == len(badness)


def check_inputs_unchanged(metric: Metric) -> None:
    x, ref = with_noise(photos(), 0.3), photos()
    before = [u.clone() for u in (*x, *ref)]
    metric.fn(x, ref)
    assert all(torch.equal(a, b) for a, b in zip((*x, *ref), before, strict=True))


def check_deterministic(metric: Metric) -> None:
    """Two calls give one number whatever the global random state, and leave that state alone."""
    x, ref = with_noise(photos(), 0.05), photos()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = metric.fn(x, ref)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert metric.fn(x, ref) == first


def check_psnr_of_an_offset(fn: Pairwise) -> None:
    """An offset of 0.1 is an MSE of 0.01, so 20 dB, each image on its own."""
    ref = torch.full((2, 3, 5, 7), 0.25, dtype=torch.float64)
    x = ref + torch.tensor([0.1, 0.01], dtype=torch.float64)[:, None, None, None]
    assert_close(fn(x, ref), torch.tensor([20.0, 40.0], dtype=torch.float64))


def check_ssim_by_hand(fn: Pairwise, height: int, width: int) -> None:
    """Window by window, as the definition reads."""
    ref = texture(4, height, width).double()
    x = with_noise([ref], 0.1)[0]
    sides = [min(11, side if side % 2 else side - 1) for side in (height, width)]
    axes = [torch.exp(-((torch.arange(n, dtype=torch.float64) - n // 2) ** 2) / 4.5) for n in sides]
    weight = torch.outer(*axes) / torch.outer(*axes).sum()
    scores: list[Tensor] = []
    for a, b in zip(x, ref, strict=True):
        for top in range(height - sides[0] + 1):
            for left in range(width - sides[1] + 1):
                p, q = (u[top : top + sides[0], left : left + sides[1]] for u in (a, b))
                mp, mq = (weight * p).sum(), (weight * q).sum()
                vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
                cov = (weight * (p - mp) * (q - mq)).sum()
                c1, c2 = 1e-4, 9e-4
                scores.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert_close(fn(x[None], ref[None]), torch.stack(scores).mean()[None])


def check_energy_of_a_set(fn: MetricFn) -> None:
    """Halving the contrast of one of two images: the ratio of sums, not the mean of ratios."""
    strong, weak = texture(5, contrast=0.2), texture(6, contrast=0.05)
    e_strong, e_weak = (float(u.double().diff(dim=i).square().sum()) for u in (strong, weak) for i in (1,))
    e_strong += float(strong.double().diff(dim=2).square().sum())
    e_weak += float(weak.double().diff(dim=2).square().sum())
    expected = (e_strong / 4 + e_weak) / (e_strong + e_weak)
    assert fn([0.5 * strong, weak], [strong, weak]) == pytest.approx(expected, rel=TOL[torch.float32].rtol)


def check_swd_of_an_offset(fn: Callable[..., float]) -> None:
    """An offset c moves the low-pass level only, and each projection of it by c·|Σ θ|: a closed form.

    This also pins the 128 unit directions of seed 0 and the mean over three levels.
    """
    theta = torch.randn(147, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = theta / theta.norm(dim=0)
    offset = 0.07
    expected = offset * float(theta.sum(dim=0).abs().mean()) / 3
    value = fn([u + offset for u in photos()], photos(), patches=400)
    assert value == pytest.approx(expected, rel=1e-4)  # float32 patches, differences of values near 1


def check_swd_compares_sets_of_patches(fn: MetricFn) -> None:
    """Moving a texture changes its patches' places, not their distribution."""
    ref = [texture(7, 64, 64)]
    moved = [torch.roll(ref[0], (9, 14), dims=(1, 2))]
    assert fn(moved, ref) < 0.5 * fn([0.5 + 0.5 * (ref[0] - 0.5)], ref)


def check_pyramid_is_complete(fn: Callable[[Tensor], list[Tensor]]) -> None:
    """Expanding and adding the levels gives the image back, and a constant has no band-pass part."""
    image = texture(8, 37, 50)
    levels = fn(image)
    rebuilt = levels[-1]
    for band in reversed(levels[:-1]):
        rebuilt = band + metrics._expand(rebuilt[None], band.shape[-2:])[0]
    assert_close(rebuilt, image)
    flat = fn(torch.full_like(image, 0.3))
    for band in flat[:-1]:
        assert_close(band, torch.zeros_like(band))


def check_round8(fn: Callable[[Tensor], Tensor]) -> None:
    """Values of an 8-bit file stay, others go to the nearest, and rounding twice changes nothing."""
    levels = torch.arange(256) / 255
    assert torch.equal(fn(levels), levels)
    x = torch.linspace(-0.2, 1.2, 1001)
    assert_close(fn(x) * 255, (x.clamp(0, 1) * 255).round())
    assert torch.equal(fn(fn(x)), fn(x))


def pyramid(image: Tensor) -> list[Tensor]:
    return [level[0] for level in metrics._pyramids([image], "x")]


# ------------------------------------------------------------------------------------------- the laws on real things


@each_metric
def test_perfect(metric: Metric) -> None:
    check_perfect(metric)


@each_metric
def test_ranks(metric: Metric) -> None:
    check_ranks(metric)


@each_metric
def test_inputs_unchanged(metric: Metric) -> None:
    check_inputs_unchanged(metric)


@each_metric
def test_deterministic(metric: Metric) -> None:
    check_deterministic(metric)


def test_psnr_of_an_offset() -> None:
    check_psnr_of_an_offset(psnr)


@pytest.mark.parametrize(("height", "width"), [(14, 13), (6, 15), (1, 12)])
def test_ssim_by_hand(height: int, width: int) -> None:
    check_ssim_by_hand(ssim, height, width)


def test_energy_of_a_set() -> None:
    check_energy_of_a_set(gradient_energy)


def test_swd_of_an_offset() -> None:
    check_swd_of_an_offset(swd)


def test_swd_compares_sets_of_patches() -> None:
    check_swd_compares_sets_of_patches(small_swd)


def test_pyramid_is_complete() -> None:
    check_pyramid_is_complete(pyramid)


def test_round8() -> None:
    check_round8(round8)


def test_batch_and_list_agree() -> None:
    x, ref = torch.stack([texture(0), texture(1)]), torch.stack([texture(2), texture(3)])
    assert small_swd([x], [ref]) == small_swd(list(x), list(ref))
    assert gradient_energy([x], [ref]) == pytest.approx(gradient_energy(list(x), list(ref)))
    assert_close(psnr(x, ref), torch.cat([psnr(a[None], b[None]) for a, b in zip(x, ref, strict=True)]))
    assert_close(ssim(x, ref), torch.cat([ssim(a[None], b[None]) for a, b in zip(x, ref, strict=True)]))


# ---------------------------------------------------------------------------------------------------- planted defects


def psnr_with_floor(x: Tensor, ref: Tensor) -> Tensor:
    """A small constant against log(0): equal images are no longer perfect."""
    return -10 * torch.log10((x - ref).square().mean(dim=(1, 2, 3)) + 1e-8)


def brightness_only(x: Images, ref: Images) -> float:
    """Compares mean brightness: blind to noise and blur."""
    return max(abs(float(a.mean() - b.mean())) for a, b in zip(x, ref, strict=True))


def swd_of_other_places(x: Images, ref: Images) -> float:
    """Patches of the two sets drawn at different places, so even equal sets differ."""
    return small_swd(x, ref) + small_swd(x, [torch.roll(u, 3, dims=1) for u in ref])


def swd_with_global_draw(x: Images, ref: Images) -> float:
    """Directions from the global generator."""
    theta = torch.randn(3)
    return float(sum(abs((theta @ (a - b).mean(dim=(1, 2))).item()) for a, b in zip(x, ref, strict=True)))


def clamps_in_place(x: Images, ref: Images) -> float:
    return gradient_energy([u.clamp_(0, 1) for u in x], ref)


def psnr_over_the_batch(x: Tensor, ref: Tensor) -> Tensor:
    """One mean for the whole batch."""
    return (-10 * torch.log10((x - ref).square().mean())).expand(x.shape[0])


def mean_of_ratios(x: Images, ref: Images) -> float:
    return sum(gradient_energy([a], [b]) for a, b in zip(x, ref, strict=True)) / len(x)


def box_ssim(x: Tensor, ref: Tensor) -> Tensor:
    """A flat window instead of the Gaussian."""
    sides = [min(11, side if side % 2 else side - 1) for side in x.shape[-2:]]
    mean = partial(F.avg_pool2d, kernel_size=sides, stride=1)
    mx, mr = mean(x), mean(ref)
    vx, vr, cov = mean(x * x) - mx**2, mean(ref * ref) - mr**2, mean(x * ref) - mx * mr
    score = (2 * mx * mr + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + mr**2 + 1e-4) * (vx + vr + 9e-4))
    return score.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    "defect",
    [
        Metric("floor", mean_of(psnr_with_floor), math.inf),
        Metric("places", swd_of_other_places, 0.0),
        Metric("ratio", lambda x, ref: gradient_energy(with_blur(x, 1), ref), 1.0),
    ],
    ids=lambda metric: metric.name,
)
def test_perfect_catches(defect: Metric) -> None:
    with pytest.raises(AssertionError):
        check_perfect(defect)


def test_ranks_catches_a_blind_metric() -> None:
    with pytest.raises(AssertionError):
        check_ranks(Metric("brightness", brightness_only, 0.0))


def test_deterministic_catches_the_global_generator() -> None:
    with pytest.raises(AssertionError):
        check_deterministic(Metric("global", swd_with_global_draw, 0.0))


def test_inputs_unchanged_catches_a_clamp_in_place() -> None:
    with pytest.raises(AssertionError):
        check_inputs_unchanged(Metric("clamp", clamps_in_place, 1.0))


def test_psnr_of_an_offset_catches_a_mean_over_the_batch() -> None:
    with pytest.raises(AssertionError):
        check_psnr_of_an_offset(psnr_over_the_batch)


def test_ssim_by_hand_catches_a_flat_window() -> None:
    with pytest.raises(AssertionError):
        check_ssim_by_hand(box_ssim, 14, 13)


def test_energy_of_a_set_catches_a_mean_of_ratios() -> None:
    with pytest.raises(AssertionError):
        check_energy_of_a_set(mean_of_ratios)


@pytest.mark.parametrize(("constant", "value"), [("SWD_LEVELS", 2), ("SWD_SEED", 1), ("SWD_PATCH", 5)])
def test_swd_of_an_offset_catches_another_protocol(monkeypatch: pytest.MonkeyPatch, constant: str, value: int) -> None:
    monkeypatch.setattr(metrics, constant, value)
    with pytest.raises(AssertionError):
        check_swd_of_an_offset(swd)


def test_swd_catches_unsorted_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsorted(images: Images, directions: Tensor, patches: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        view = images[0].unfold(1, 7, 1).unfold(2, 7, 1).flatten(1, 2).transpose(0, 1).flatten(1)
        return (view[torch.randint(len(view), (patches,), generator=generator)] @ directions).T

    monkeypatch.setattr(metrics, "_sorted_projections", unsorted)
    with pytest.raises(AssertionError):
        check_swd_compares_sets_of_patches(small_swd)


def test_pyramid_catches_a_lost_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gain(coarse: Tensor, size: Sequence[int]) -> Tensor:
        fine = coarse.new_zeros(*coarse.shape[:-2], *size)
        fine[..., ::2, ::2] = coarse
        return metrics._smooth(fine)

    monkeypatch.setattr(metrics, "_expand", without_gain)
    with pytest.raises(AssertionError):
        check_pyramid_is_complete(pyramid)


def test_round8_catches_truncation() -> None:
    with pytest.raises(AssertionError):
        check_round8(lambda x: (x.clamp(0, 1) * 255).floor() / 255)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("fn", [psnr, ssim, gradient_energy_sums])
def test_different_shapes_are_refused(fn: Pairwise) -> None:
    with pytest.raises((ValueError, TypeCheckError)):
        fn(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))


def test_bad_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="two non-empty lists"):
        gradient_energy([], [])
    with pytest.raises(ValueError, match="is empty"):
        swd([], photos())
    with pytest.raises(ValueError, match="grey"):
        swd([torch.zeros(1, 40, 40)], photos())
    with pytest.raises(ValueError, match="at least 25 pixels"):
        swd([torch.zeros(3, 24, 40)], photos())
    with pytest.raises(ValueError, match="at least 1"):
        swd(photos(), photos(), patches=0)


def test_smallest_image_for_swd_and_flat_sets() -> None:
    assert swd([torch.full((3, 25, 25), 0.4)], [torch.full((3, 30, 26), 0.4)], patches=50) <= TOL[torch.float32].atol
    flat = [torch.zeros(3, 4, 4)]
    assert math.isnan(gradient_energy(flat, flat))
    assert math.isinf(gradient_energy([texture(0)], [torch.zeros(3, 40, 49)]))
