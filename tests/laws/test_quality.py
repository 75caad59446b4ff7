"""Laws of the benchmark's metrics: equal is perfect, worse ranks worse, numbers match definitions and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor

from latentindigo import quality
from latentindigo.filters import blur as convolve
from latentindigo.filters import gaussian_kernel
from latentindigo.images import pil_resize
from latentindigo.quality import Niqe, consistency, gmsd, ms_ssim
from tolerances import TOL, assert_close

Pairwise = Callable[[Tensor, Tensor], Tensor]
Fit = Callable[[Tensor], tuple[Tensor, ...]]
SIDES = (176, 180)  # The smallest that MS-SSIM takes.


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def consistency_of_halves(x: Tensor, ref: Tensor) -> Tensor:
    return consistency(x, halved(ref), halved)


@dataclass(frozen=True)
class Metric:
    """A metric of two batches, and its value for equal ones."""

    name: str
    fn: Pairwise
    perfect: float

    def badness(self, x: Tensor, ref: Tensor) -> Tensor:
        return (self.fn(x, ref) - self.perfect).abs()


METRICS = [
    Metric("ms_ssim", ms_ssim, 1.0),
    Metric("gmsd", gmsd, 0.0),
    Metric("consistency", consistency_of_halves, 0.0),
]
each_metric = pytest.mark.parametrize("metric", METRICS, ids=[m.name for m in METRICS])


def texture(seed: int, height: int = SIDES[0], width: int = SIDES[1], contrast: float = 0.1) -> Tensor:
    """A grey texture with the 1/f spectrum of photographs and a tint: (3, H, W), [0, 1]."""
    noise = torch.randn(height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    frequency = torch.fft.fftfreq(height, dtype=torch.float64)[:, None].hypot(torch.fft.fftfreq(width)[None].double())
    frequency[0, 0] = math.inf
    field = torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real
    tint = torch.tensor([0.9, 1.0, 0.8], dtype=torch.float64)[:, None, None]
    return (tint * (0.5 + contrast * field / field.std())).clamp(0, 1)


def textures() -> Tensor:
    return torch.stack([texture(0), texture(1)])


def with_noise(x: Tensor, amount: float) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return x + amount * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def with_blur(x: Tensor, sigma: float) -> Tensor:
    images = convolve(x if x.ndim == 4 else x[None], gaussian_kernel(2 * math.ceil(3 * sigma) + 1, sigma).to(x))
    return images.reshape(x.shape)


# ------------------------------------------------------------------------------------------------------------ laws


def check_perfect(metric: Metric) -> None:
    """metric(x, x) is the perfect value, up to rounding."""
    value = metric.fn(textures(), textures())
    assert value.dtype == torch.float64
    assert_close(value, torch.full((2,), metric.perfect, dtype=torch.float64))


def check_symmetric(metric: Metric) -> None:
    """Exchanging the two images changes nothing; only consistency tells them apart, for A acts on one of them."""
    x, ref = with_noise(textures(), 0.05), textures()
    assert_close(metric.fn(x, ref), metric.fn(ref, x))


def check_batch_is_alone(metric: Metric) -> None:
    """An image in a batch scores what it scores alone."""
    x, ref = with_noise(textures(), 0.05), textures()
    x[1] = 0.9 * x[1]
    alone = torch.cat([metric.fn(a[None], b[None]) for a, b in zip(x, ref, strict=True)])
    assert abs(float(alone[0] - alone[1])) > 1e-4
    assert_close(metric.fn(x, ref), alone)


def check_ranks(metric: Metric) -> None:
    """More noise is worse, more blur is worse."""
    ref = textures()[:1]
    for series in ([with_noise(ref, s) for s in (0.01, 0.03, 0.1)], [with_blur(ref, s) for s in (0.7, 1.2, 2.5)]):
        badness = [float(metric.badness(x, ref)) for x in series]
        assert 0 < badness[0] < badness[1] < badness[2]


def check_inputs_unchanged(metric: Metric) -> None:
    x, ref = with_noise(textures()[:1], 0.6), textures()[:1]
    before = x.clone(), ref.clone()
    metric.fn(x, ref)
    assert torch.equal(x, before[0]) and torch.equal(ref, before[1])


def check_ms_ssim_by_definition(fn: Pairwise) -> None:
    """Scale by scale with SciPy's filters; 1e-5 because torchmetrics is given float32."""
    ref = texture(2)
    x = with_noise(with_blur(ref, 1.0), 0.03).clamp(0, 1)
    a, b = x.numpy(), ref.numpy()
    window = np.exp(-np.square(np.arange(-5, 6)) / 4.5)
    window /= window.sum()

    def local(u: np.ndarray) -> np.ndarray:
        down = scipy.ndimage.correlate1d(u, window, axis=1, mode="mirror")
        return scipy.ndimage.correlate1d(down, window, axis=2, mode="mirror")

    score = 1.0
    betas = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for scale, beta in enumerate(betas):
        mean_a, mean_b = local(a), local(b)
        structure = (2 * (local(a * b) - mean_a * mean_b) + 9e-4) / (
            local(a * a) - mean_a**2 + local(b * b) - mean_b**2 + 9e-4
        )
        if scale < 4:
            score *= structure[:, 5:-5, 5:-5].mean() ** beta
            even = (slice(None), slice(a.shape[1] // 2 * 2), slice(a.shape[2] // 2 * 2))
            a, b = (u[even].reshape(3, u.shape[1] // 2, 2, u.shape[2] // 2, 2).mean(axis=(2, 4)) for u in (a, b))
        else:
            score *= ((2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4) * structure).mean() ** beta
    assert float(fn(x[None], ref[None])) == pytest.approx(score, abs=1e-5)


def check_gmsd_by_hand(fn: Pairwise) -> None:
    """Position by position, as the definition reads."""
    ref = texture(3, 12, 15)
    x = with_noise(ref, 0.05)
    maps: list[np.ndarray] = []
    for image in (x, ref):
        grey = 255 * (0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2])
        small = np.array(
            [[float(grey[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()) for j in range(7)] for i in range(6)]
        )
        magnitude = np.zeros((4, 5))
        for i in range(4):
            for j in range(5):
                part = small[i : i + 3, j : j + 3]
                across = (part[:, 2] - part[:, 0]).sum() / 3
                down = (part[2] - part[0]).sum() / 3
                magnitude[i, j] = math.hypot(across, down)
        maps.append(magnitude)
    similarity = (2 * maps[0] * maps[1] + 170) / (maps[0] ** 2 + maps[1] ** 2 + 170)
    expected = math.sqrt(((similarity - similarity.mean()) ** 2).mean())
    assert_close(fn(x[None], ref[None]), torch.tensor([expected], dtype=torch.float64))


def check_gmsd_ignores_brightness(fn: Pairwise) -> None:
    """It compares gradients: a constant on either image changes nothing, at the borders neither."""
    x, ref = with_noise(textures(), 0.02), textures()
    assert_close(fn(x + 0.1, ref - 0.05), fn(x, ref))


def check_consistency_of_an_offset(fn: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]) -> None:
    """y = A(x) + c scores |c|; what A does not see costs nothing; white noise scores its standard deviation."""
    x = textures()
    offset = torch.tensor([0.1, -0.02], dtype=torch.float64)
    y = halved(x) + offset[:, None, None, None]
    assert_close(fn(x, y, halved), offset.abs())
    unseen = torch.tensor([[0.1, -0.1], [-0.1, 0.1]], dtype=x.dtype).repeat(x.shape[-2] // 2, x.shape[-1] // 2)
    assert_close(fn(x + unseen, y, halved), offset.abs())
    noisy = with_noise(halved(x), 0.05)
    torch.testing.assert_close(fn(x, noisy, halved), torch.full((2,), 0.05).double(), rtol=2e-2, atol=0.0)  # sampling


def generalised_gaussian(alpha: float, scale: float, count: int, seed: int) -> np.ndarray:
    """|x| of density proportional to exp(−(|x|/scale)^α): scale·g^(1/α) for a Gamma(1/α) variable g."""
    return scale * np.random.default_rng(seed).standard_gamma(1 / alpha, count) ** (1 / alpha)


def check_ggd_recovers(fit: Fit) -> None:
    """Shape and variance of samples; α = 2 is the normal distribution, 1 Laplace's."""
    for alpha, scale in ((0.7, 1.0), (1.0, 0.3), (2.0, 2.0), (3.5, 1.0)):
        size = generalised_gaussian(alpha, scale, 200_000, 1)
        sign = np.random.default_rng(2).choice([-1.0, 1.0], len(size))
        variance = scale**2 * math.gamma(3 / alpha) / math.gamma(1 / alpha)
        found = [float(value) for value in fit(torch.from_numpy(size * sign)[None])]
        assert found == pytest.approx([alpha, variance], rel=3e-2)


def check_aggd_recovers(fit: Fit) -> None:
    """Shape, mean and both variances of samples whose two halves have unlike scales β.

    The left half has the share β_l / (β_l + β_r), as in the asymmetric density. η = (β_r − β_l)·Γ(2/α)/Γ(1/α) then is
    the mean of the distribution.
    """
    for alpha, left, right in ((0.6, 1.0, 1.0), (0.9, 0.4, 0.8), (1.5, 2.0, 1.0), (2.0, 0.1, 0.5)):
        count = 400_000
        size = generalised_gaussian(alpha, 1.0, count, 3)
        negative = np.random.default_rng(4).random(count) < left / (left + right)
        x = np.where(negative, -left * size, right * size)
        spread = math.gamma(3 / alpha) / math.gamma(1 / alpha)
        eta = (right - left) * math.gamma(2 / alpha) / math.gamma(1 / alpha)
        found = [float(value) for value in fit(torch.from_numpy(x)[None])]
        assert found[0] == pytest.approx(alpha, rel=3e-2)
        # The mean in units of the deviation: it may be 0.
        deviation = float(x.std())
        assert found[1] / deviation == pytest.approx(eta / deviation, abs=1e-2)
        assert found[1] / deviation == pytest.approx(float(x.mean()) / deviation, abs=1e-2)
        assert found[2:] == pytest.approx([left**2 * spread, right**2 * spread], rel=3e-2)


def check_features_by_hand(fn: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """All 36 features of the last of four patches, pixel by pixel, with SciPy's root finder for the shapes."""
    side, patch = 48, 24
    image = texture(5, side + 3, side, contrast=0.15)  # Three rows more than two patches: they must not count.
    used = image[:, :side]
    fine = 255 * (0.299 * used[0] + 0.587 * used[1] + 0.114 * used[2]).numpy()
    coarse = pil_resize(torch.from_numpy(fine)[None], (side // 2, side // 2))[0].double().numpy()
    expected: list[float] = []
    for plane, size in ((fine, patch), (coarse, patch // 2)):
        coefficients, _ = normalised_by_hand(plane)
        expected += statistics_by_hand(coefficients[-size:, -size:])
    sharpness = normalised_by_hand(fine)[1][patch:, patch:].mean()
    features, found_sharpness = fn(image, patch)
    assert features.shape == (4, 36)
    # Pillow's resizing is in float32; the table of shapes is linear between its entries.
    torch.testing.assert_close(features[3], torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert float(found_sharpness[3]) == pytest.approx(sharpness, rel=TOL[torch.float64].rtol)


def normalised_by_hand(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    window = np.exp(-np.square(np.arange(-3, 4)) / (2 * (7 / 6) ** 2))
    window = np.outer(window, window) / window.sum() ** 2
    padded = np.pad(plane, 3, mode="edge")
    coefficients, deviation = np.zeros_like(plane), np.zeros_like(plane)
    for i, j in np.ndindex(*plane.shape):
        part = padded[i : i + 7, j : j + 7]
        mean = (window * part).sum()
        deviation[i, j] = math.sqrt((window * (part - mean) ** 2).sum())
        coefficients[i, j] = (plane[i, j] - mean) / (deviation[i, j] + 1)
    return coefficients, deviation


def statistics_by_hand(block: np.ndarray) -> list[float]:
    def shape(ratio: float) -> float:
        def surplus(a: float) -> float:
            return math.gamma(2 / a) ** 2 / (math.gamma(1 / a) * math.gamma(3 / a)) - ratio

        root = scipy.optimize.brentq(surplus, 0.2, 10.0)
        assert isinstance(root, float)
        return root

    found = [shape(np.abs(block).mean() ** 2 / (block**2).mean()), float((block**2).mean())]
    last = block.shape[0] - 1
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        products = [
            block[i, j] * block[i + down, j + right]
            for i, j in np.ndindex(*block.shape)
            if i + down <= last and 0 <= j + right <= last
        ]
        x = np.array(products)
        left, up = math.sqrt((x[x < 0] ** 2).mean()), math.sqrt((x[x > 0] ** 2).mean())
        g = left / up
        alpha = shape(np.abs(x).mean() ** 2 / (x**2).mean() * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2)
        beta = math.sqrt(math.gamma(1 / alpha) / math.gamma(3 / alpha))
        found += [alpha, (up - left) * beta * math.gamma(2 / alpha) / math.gamma(1 / alpha), left**2, up**2]
    return found


def check_distance(fn: Callable[[Tensor, Tensor, Tensor, Tensor], float]) -> None:
    """0 from itself; for unit covariances Euclid's distance; a direction that never varies counts for nothing."""
    generator = torch.Generator().manual_seed(6)
    mean = torch.randn(36, generator=generator, dtype=torch.float64)
    root = torch.randn(36, 50, generator=generator, dtype=torch.float64)
    covariance, unit = root @ root.T, torch.eye(36, dtype=torch.float64)
    assert fn(mean, covariance, mean, covariance) == 0
    step = torch.randn(36, generator=generator, dtype=torch.float64)
    assert fn(mean, unit, mean + step, unit) == pytest.approx(float(step.norm()))
    assert fn(mean, covariance, mean + step, 3 * covariance) == pytest.approx(
        math.sqrt(float(step @ torch.linalg.solve(2 * covariance, step)))
    )
    flat = unit.clone()
    flat[0, 0] = 0
    assert fn(mean, flat, mean + 5 * unit[0], flat) == 0


def check_niqe_rises(score: Callable[[Tensor], float]) -> None:
    """Textures of the kind that was learned score lowest; more blur scores more, and so does more noise."""
    clean = [texture(seed, 160, 160) for seed in (100, 101, 102)]
    blurred = [[with_blur(x, sigma) for x in clean] for sigma in (0.7, 1.2, 2.0)]
    noisy = [[with_noise(x, amount) for x in clean] for amount in (0.02, 0.06, 0.15)]
    for series in ([clean, *blurred], [clean, *noisy]):
        means = [sum(score(x) for x in images) / len(images) for images in series]
        assert all(better < worse for better, worse in zip(means, means[1:], strict=False))


def check_sharp_patches_are_learned(fit: Callable[[list[Tensor]], Niqe]) -> None:
    """A photograph's blurred half teaches nothing: the mean is that of its sharp patches alone."""
    images = [texture(seed, 192, 192, contrast=0.15) for seed in (7, 8, 9, 10)]
    for image in images:
        image[:, :, 96:] = with_blur(image, 3.0)[:, :, 96:]
    expected: list[Tensor] = []
    for image in images:
        features, sharpness = quality._features(image, 32)
        assert len(features) == 36
        in_the_left_half = torch.arange(36) % 6 < 3
        sharp = sharpness > 0.75 * sharpness.max()
        assert not sharp[~in_the_left_half].any() and sharp[in_the_left_half].sum() > 9
        expected.append(features[sharp])
    learned = fit(images)
    assert_close(learned.mean, torch.cat(expected).mean(dim=0))
    assert_close(learned.covariance, torch.from_numpy(np.cov(torch.cat(expected).numpy().T)))


# ------------------------------------------------------------------------------------------- the laws on real things


@pytest.fixture(scope="module")
def niqe() -> Niqe:
    """Return an evaluator that learned textures."""
    return Niqe.fit((texture(seed, 160, 160) for seed in range(20, 32)), 32)


@each_metric
def test_perfect(metric: Metric) -> None:
    check_perfect(metric)


@pytest.mark.parametrize("metric", METRICS[:2], ids=[m.name for m in METRICS[:2]])
def test_symmetric(metric: Metric) -> None:
    check_symmetric(metric)


@each_metric
def test_batch_is_alone(metric: Metric) -> None:
    check_batch_is_alone(metric)


@each_metric
def test_ranks(metric: Metric) -> None:
    check_ranks(metric)


@each_metric
def test_inputs_unchanged(metric: Metric) -> None:
    check_inputs_unchanged(metric)


def test_ms_ssim_by_definition() -> None:
    check_ms_ssim_by_definition(ms_ssim)


def test_gmsd_by_hand() -> None:
    check_gmsd_by_hand(gmsd)


def test_gmsd_ignores_brightness() -> None:
    check_gmsd_ignores_brightness(gmsd)


def test_consistency_of_an_offset() -> None:
    check_consistency_of_an_offset(consistency)


def test_ggd_recovers() -> None:
    check_ggd_recovers(quality._ggd)


def test_aggd_recovers() -> None:
    check_aggd_recovers(quality._aggd)


def test_features_by_hand() -> None:
    check_features_by_hand(quality._features)


def test_distance() -> None:
    check_distance(quality._distance)


def test_niqe_rises(niqe: Niqe) -> None:
    check_niqe_rises(niqe.score)


def test_sharp_patches_are_learned() -> None:
    check_sharp_patches_are_learned(lambda images: Niqe.fit(images, 32))


# ---------------------------------------------------------------------------------------------------- planted defects


def gmsd_with(c: float = 170.0, correction: int = 0, padding: int = 0, over: tuple[int, ...] = (1, 2)) -> Pairwise:
    """GMSD written another way, with a choice of mistakes."""

    def magnitude(x: Tensor) -> Tensor:
        y = 255 * F.avg_pool2d(x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None], 2).sum(dim=1, keepdim=True)
        y = F.pad(y, (padding,) * 4)
        across = F.avg_pool2d(y[..., 2:] - y[..., :-2], (3, 1), stride=1)
        down = F.avg_pool2d(y[..., 2:, :] - y[..., :-2, :], (1, 3), stride=1)
        return across.hypot(down)[:, 0]

    def defect(x: Tensor, ref: Tensor) -> Tensor:
        a, b = magnitude(x), magnitude(ref)
        similarity = (2 * a * b + c) / (a**2 + b**2 + c)
        return similarity.std(dim=over, correction=correction).expand(x.shape[0])

    return defect


def brightness_only(x: Tensor, ref: Tensor) -> Tensor:
    """Compares mean brightness in hundredths: blind to noise and blur."""
    return (100 * (x - ref).mean(dim=(1, 2, 3))).round().abs()


def relative_error(x: Tensor, ref: Tensor) -> Tensor:
    return (x - ref).square().mean(dim=(1, 2, 3)) / ref.square().mean(dim=(1, 2, 3))


def clamps_in_place(x: Tensor, ref: Tensor) -> Tensor:
    return gmsd(x.clamp_(0, 1), ref)


def four_scales(x: Tensor, ref: Tensor) -> Tensor:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as reference

    betas = (0.0448, 0.2856, 0.3001, 0.3696)
    return reference(x, ref, data_range=1.0, betas=betas, reduction="none")


def mean_of_two_scales(x: Tensor, ref: Tensor) -> Tensor:
    from latentindigo.metrics import ssim

    return (ssim(x, ref) + ssim(halved(x), halved(ref))) / 2


def test_the_rewritten_gmsd_is_gmsd_without_its_mistakes() -> None:
    check_gmsd_by_hand(gmsd_with())


@pytest.mark.parametrize(
    "defect",
    [
        Metric("noise floor", lambda x, ref: gmsd(x, ref) + 1e-6, 0.0),
        Metric("unlike halves", lambda x, ref: consistency(x, halved(ref.roll(1, -1)), halved), 0.0),
        Metric("black", lambda x, ref: ms_ssim(0 * x, ref), 1.0),
    ],
    ids=lambda metric: metric.name,
)
def test_perfect_catches(defect: Metric) -> None:
    with pytest.raises(AssertionError):
        check_perfect(defect)


def test_symmetric_catches_a_relative_error() -> None:
    with pytest.raises(AssertionError):
        check_symmetric(Metric("relative", relative_error, 0.0))


def test_batch_is_alone_catches_a_deviation_over_the_batch() -> None:
    with pytest.raises(AssertionError):
        check_batch_is_alone(Metric("batch", gmsd_with(over=(0, 1, 2)), 0.0))


def test_ranks_catches_a_blind_metric() -> None:
    with pytest.raises(AssertionError):
        check_ranks(Metric("brightness", brightness_only, 0.0))


def test_inputs_unchanged_catches_a_clamp_in_place() -> None:
    with pytest.raises(AssertionError):
        check_inputs_unchanged(Metric("clamp", clamps_in_place, 0.0))


@pytest.mark.parametrize("defect", [four_scales, mean_of_two_scales])
def test_ms_ssim_by_definition_catches_other_scales(defect: Pairwise) -> None:
    with pytest.raises(AssertionError):
        check_ms_ssim_by_definition(defect)


@pytest.mark.parametrize("mistake", [{"c": 0.0026}, {"correction": 1}, {"padding": 1}], ids=str)
def test_gmsd_by_hand_catches(mistake: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_gmsd_by_hand(gmsd_with(**mistake))


def test_gmsd_ignores_brightness_catches_a_border_of_zeros() -> None:
    with pytest.raises(AssertionError):
        check_gmsd_ignores_brightness(gmsd_with(padding=1))


@pytest.mark.parametrize("defect", ["no root", "no operator"])
def test_consistency_catches(defect: str) -> None:
    def broken(x: Tensor, y: Tensor, degrade: Callable[[Tensor], Tensor]) -> Tensor:
        if defect == "no root":
            return consistency(x, y, degrade).square()
        return (x - F.interpolate(y, scale_factor=2)).square().mean(dim=(1, 2, 3)).sqrt()

    with pytest.raises(AssertionError):
        check_consistency_of_an_offset(broken)


def test_ggd_recovers_catches_a_normal_distribution_for_all() -> None:
    def always_normal(x: Tensor) -> tuple[Tensor, ...]:
        return torch.full((len(x),), 2.0), x.square().mean(dim=1)

    with pytest.raises(AssertionError):
        check_ggd_recovers(always_normal)


@pytest.mark.parametrize("defect", ["no skewness", "sides exchanged", "deviations for variances"])
def test_aggd_recovers_catches(defect: str) -> None:
    def broken(x: Tensor) -> tuple[Tensor, ...]:
        alpha, eta, left, right = quality._aggd(x)
        if defect == "no skewness":
            return quality._ggd(x)[0], eta, left, right
        if defect == "sides exchanged":
            return alpha, eta, right, left
        return alpha, eta, left.sqrt(), right.sqrt()

    with pytest.raises(AssertionError):
        check_aggd_recovers(broken)


@pytest.mark.parametrize(("constant", "value"), [("NIQE_SIGMA", 1.5), ("NIQE_WINDOW", 5)])
def test_features_by_hand_catches_another_window(monkeypatch: pytest.MonkeyPatch, constant: str, value: float) -> None:
    monkeypatch.setattr(quality, constant, value)
    with pytest.raises(AssertionError):
        check_features_by_hand(quality._features)


@pytest.mark.parametrize("defect", ["box downsampling", "wrapped neighbours", "mirrored patch"])
def test_features_by_hand_catches(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    right = quality._statistics
    if defect == "box downsampling":
        monkeypatch.setattr(quality, "resize", lambda x, size: halved(x))
    elif defect == "wrapped neighbours":
        monkeypatch.setattr(quality, "_statistics", lambda blocks: right(F.pad(blocks, (0, 1, 0, 1), mode="circular")))
    else:
        monkeypatch.setattr(quality, "_statistics", lambda blocks: right(blocks.flip(-1)))
    with pytest.raises(AssertionError):
        check_features_by_hand(quality._features)


@pytest.mark.parametrize("defect", ["sum of covariances", "variances only", "no root"])
def test_distance_catches(defect: str) -> None:
    def broken(mean: Tensor, covariance: Tensor, other: Tensor, other_covariance: Tensor) -> float:
        if defect == "sum of covariances":
            return quality._distance(mean, 2 * covariance, other, 2 * other_covariance)
        if defect == "variances only":
            return quality._distance(mean, covariance.diag().diag(), other, other_covariance.diag().diag())
        return quality._distance(mean, covariance, other, other_covariance) ** 2

    with pytest.raises(AssertionError):
        check_distance(broken)


def test_niqe_rises_catches_sharpness_for_quality() -> None:
    def smoothness(x: Tensor) -> float:
        return -float(x.diff(dim=-1).square().mean())

    with pytest.raises(AssertionError):
        check_niqe_rises(smoothness)


def test_sharp_patches_are_learned_catches_learning_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_all(images: list[Tensor]) -> Niqe:
        monkeypatch.setattr(quality, "NIQE_SHARPNESS", 0.0)
        return Niqe.fit(images, 32)

    with pytest.raises(AssertionError):
        check_sharp_patches_are_learned(from_all)
