"""Image quality beyond `metrics.py`, for the benchmark: MS-SSIM, GMSD, consistency with what was measured, and NIQE.

Pixels lie in [0, 1], sums run in float64 (MS-SSIM's in float32), and every function gives one value per image.
Reported numbers are those of images that went through `metrics.round8`. The first three compare with a reference or a
measurement; NIQE asks how far the statistics of an image lie from those of photographs, and needs no reference.

| metric | better | of equal images | reference |
|---|---|---|---|
| `ms_ssim` | higher | 1 | Wang, Simoncelli and Bovik, Asilomar 2003 |
| `gmsd` | lower | 0 | Xue, Zhang, Mou and Bovik, IEEE Transactions on Image Processing 23, 2014 |
| `consistency` | lower | 0 | root mean squared error against the measurement |
| `Niqe` | lower | (no reference) | Mittal, Soundararajan and Bovik, IEEE Signal Processing Letters 20, 2013 |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentindigo.filters import luma, resize

__all__ = ["Niqe", "consistency", "gmsd", "ms_ssim"]

MS_SSIM_MIN_SIDE = 176  # What torchmetrics accepts: more than 10 pixels left after dividing by 16.
GMSD_C = 170.0  # For gradients of luma in 0..255.
GMSD_MIN_SIDE = 6
NIQE_WINDOW = 7
NIQE_SIGMA = 7 / 6
NIQE_SHARPNESS = 0.75  # Share of the sharpest patch's sharpness that a patch must exceed to be learned from.
NIQE_FEATURES = 36
NIQE_FLAT = 1e-8  # Mean square of the normalised coefficients under which a patch has no statistics.
NIQE_FILE = Path(__file__).parent / "weights" / "niqe.safetensors"


def _require_same_shape(x: Tensor, ref: Tensor, caller: str, min_side: int) -> None:
    if x.ndim != 4 or x.shape != ref.shape or x.shape[1] != 3:
        raise ValueError(
            f"{caller}: expected two (B, 3, H, W) tensors of one shape, got {tuple(x.shape)} and {tuple(ref.shape)}; "
            "crop or resize one of them first, repeat a grey image three times"
        )
    if min(x.shape[-2:]) < min_side:
        raise ValueError(
            f"{caller}: expected sides of at least {min_side} pixels, got {tuple(x.shape[-2:])}; "
            "leave such small images out, or use `ssim`"
        )


# ------------------------------------------------------------------------------------------------- with a reference


def ms_ssim(x: Float[Tensor, "b c h w"], ref: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity over five scales, MS-SSIM = l_5^β_5 · Π_k (c_k·s_k)^β_k, by torchmetrics.

    | here | formula |
    |---|---|
    | scale k | images averaged 2×2 and halved k − 1 times; window 11×11, σ = 1.5 |
    | c_k·s_k | (2·σ_xy + c2) / (σ_x² + σ_y² + c2), mean over windows, channels and positions |
    | l_5 | taken together with c_5·s_5, as SSIM of the last scale, borders mirrored |
    | β | 0.0448, 0.2856, 0.3001, 0.2363, 0.1333 |

    A scale whose mean structure is negative counts as 0: a fractional power of it would be NaN. There is no rule that
    takes fewer scales for small images, since that would be another metric under the same name.

    Args:
        x: Restored images, (B, 3, H, W), [0, 1], sides of at least 176 pixels.
        ref: Clean images, same shape.

    Returns:
        One float64 value per image, (B,), 0 to 1, 1 for equal images.

    Raises:
        ValueError: The shapes differ, an image is not RGB, or a side is under 176 pixels.
        ImportError: torchmetrics is not installed.
    """
    _require_same_shape(x, ref, "ms_ssim", MS_SSIM_MIN_SIDE)
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
    except ImportError as error:
        raise ImportError(
            f"ms_ssim needs torchmetrics, which cannot be imported ({error}); pip install 'latentindigo[benchmark]'"
        ) from error
    # float32, the one exception here: torchmetrics' full 121-pixel windows take 30 times as long in float64. The price
    # is in σ² = E[x²] − μ²: an error below 1e-5 in photographs, up to 5e-4 in flat, bright images.
    score = multiscale_structural_similarity_index_measure(
        x.float(), ref.float(), data_range=1.0, reduction="none", normalize="relu"
    )
    return score.reshape(x.shape[0]).double()


def gmsd(x: Float[Tensor, "b c h w"], ref: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Gradient magnitude similarity deviation; lower is better, 0 for equal images.

    | here | formula |
    |---|---|
    | `magnitude` | m_d, m_r: length of the Prewitt gradient (weights 1/3) of the luma in 0..255, halved by 2×2 means |
    | `similarity` | GMS = (2·m_r·m_d + c) / (m_r² + m_d² + c), c = 170 |

    GMSD = standard deviation of GMS over all positions. It is the unevenness of the damage that counts: an error that
    weakens all gradients alike costs less than one that spoils a part of the image. Only positions whose 3×3
    neighbourhood lies wholly inside count, so no border rule enters, and of an odd side the last pixel is left out.

    Args:
        x: Restored images, (B, 3, H, W), [0, 1], sides of at least 6 pixels.
        ref: Clean images, same shape.

    Returns:
        One float64 value per image, (B,).

    Raises:
        ValueError: The shapes differ, an image is not RGB, or a side is under 6 pixels.
    """
    _require_same_shape(x, ref, "gmsd", GMSD_MIN_SIDE)
    magnitude, magnitude_ref = _gradient_magnitude(x), _gradient_magnitude(ref)
    similarity = (2 * magnitude * magnitude_ref + GMSD_C) / (magnitude.square() + magnitude_ref.square() + GMSD_C)
    return similarity.flatten(1).std(dim=1, correction=0)


def _gradient_magnitude(x: Tensor) -> Tensor:
    y = F.avg_pool2d(255 * luma(x.double()), 2)
    kernel = y.new_tensor([[1.0, 0.0, -1.0]] * 3) / 3
    gradients = F.conv2d(y, torch.stack([kernel, kernel.T])[:, None])
    return gradients.square().sum(dim=1).sqrt()


def consistency(
    restored: Float[Tensor, "b c h w"],
    y: Float[Tensor, "b c2 h2 w2"],
    degrade: Callable[[Tensor], Tensor],
) -> Float[Tensor, " b"]:
    """How far a restored image is from explaining its measurement: √(mean (A(x̂) − y)²), in units of [0, 1].

    An image can look good and show another scene; degraded again, it then does not give y. With noise of standard
    deviation n in y, the clean image itself scores n: a value far below it means that the noise was copied.

    Args:
        restored: x̂, (B, C, H, W), [0, 1].
        y: Measurements of the same images, (B, C', H', W'), [0, 1].
        degrade: A, the operator that made y, without its noise: deterministic, from (B, C, H, W) to the shape of `y`.

    Returns:
        One float64 value per image, (B,).

    Raises:
        ValueError: A(x̂) and y differ in shape.
    """
    again = degrade(restored)
    if again.shape != y.shape:
        raise ValueError(
            f"consistency: expected degrade(restored) in the shape of y, {tuple(y.shape)}, got {tuple(again.shape)}; "
            "pass the operator that made y"
        )
    return (again.double() - y.double()).square().mean(dim=(1, 2, 3)).sqrt()


# ---------------------------------------------------------------------------------------------- without a reference


@dataclass(frozen=True, eq=False)
class Niqe:
    """Natural image quality evaluator: how far local statistics lie from those of photographs; lower is better.

    | here | paper |
    |---|---|
    | `mean`, `covariance` | ν_1, Σ_1: of the 36 features over the sharp patches of photographs |
    | `_features` | 18 features of each patch at two scales |
    | result of `score` | D = √((ν_1 − ν_2)ᵀ ((Σ_1 + Σ_2)/2)⁺ (ν_1 − ν_2)), ν_2, Σ_2 over all patches of the image |

    The features describe the distribution of locally normalised luma (I − μ)/(σ + 1) and of the products of
    neighbouring values. The paper's patches have 96 pixels; with `patch` = 64 a crop of 256 pixels has 16 of them.
    Values depend on the photographs and the patch, so they compare only between equal models: never with values from
    elsewhere.

    Attributes:
        mean: Mean of the features, float64.
        covariance: Their covariance, float64.
        patch: Side of a patch in pixels, even.
        images: Number of photographs that the statistics come from.
    """

    mean: Float[Tensor, " 36"]
    covariance: Float[Tensor, "36 36"]
    patch: int
    images: int

    def __post_init__(self) -> None:
        """Check the shapes, which a file from elsewhere may not have.

        Raises:
            ValueError: The sizes do not fit, or the patch is odd or under 16 pixels.
        """
        shapes = (tuple(self.mean.shape), tuple(self.covariance.shape))
        if shapes != ((NIQE_FEATURES,), (NIQE_FEATURES, NIQE_FEATURES)):
            raise ValueError(f"Niqe: expected a mean of 36 and a covariance of 36×36 values, got shapes {shapes}")
        _require_patch(self.patch)

    @classmethod
    def fit(cls, images: Iterable[Float[Tensor, "3 _ _"]], patch: int = 64) -> Niqe:
        """Learn the statistics of photographs from their sharp patches.

        A patch is sharp if its mean local deviation σ exceeds 0.75 of that of the image's sharpest patch: blurred
        backgrounds and skies are natural too, but a model of them would excuse blur.

        Args:
            images: Clean photographs, each (3, H, W), [0, 1], sides of at least one patch; one at a time in memory.
            patch: Side of a patch in pixels, even, at least 16.

        Returns:
            The fitted evaluator.

        Raises:
            ValueError: The patch or an image is too small, or fewer than 37 patches are sharp, which leaves the
                covariance of 36 features without full rank.
        """
        _require_patch(patch)
        kept: list[Tensor] = []
        count = 0
        for image in images:
            features, sharpness = _features(image, patch)
            kept.append(features[sharpness > NIQE_SHARPNESS * sharpness.amax()] if len(features) else features)
            count += 1
        features = torch.cat(kept) if kept else torch.empty(0, NIQE_FEATURES)
        if len(features) <= NIQE_FEATURES:
            raise ValueError(
                f"Niqe.fit: expected more than {NIQE_FEATURES} sharp patches of {patch} pixels, got {len(features)} "
                f"from {count} images; pass more or larger photographs"
            )
        return cls(features.mean(dim=0), torch.cov(features.T), patch, count)

    def score(self, x: Float[Tensor, "3 h w"]) -> float:
        """Distance of one image from the model.

        Patches start at the upper left corner; what is left at the right and below is not looked at. Patches without
        any variation (a clipped sky) have no statistics and are left out.

        Args:
            x: Image, (3, H, W), [0, 1].

        Returns:
            The distance, 0 or more.

        Raises:
            ValueError: The image is not RGB, or has fewer than two patches that are not flat.
        """
        features, _ = _features(x, self.patch)
        if len(features) < 2:
            raise ValueError(
                f"Niqe.score: expected at least two patches of {self.patch} pixels that are not flat, got "
                f"{len(features)} in an image of {tuple(x.shape[-2:])}; leave such images out"
            )
        return _distance(self.mean, self.covariance, features.mean(dim=0), torch.cov(features.T))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as safetensors: `mean` and `covariance`, and in the metadata `patch` and `images`.

        Args:
            path: File to write; its folder must exist.
        """
        tensors = {"mean": self.mean.contiguous(), "covariance": self.covariance.contiguous()}
        save_file(tensors, path, metadata={"patch": str(self.patch), "images": str(self.images)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Niqe:
        """Read a model written by `save`.

        Args:
            path: The file.

        Returns:
            The evaluator.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no NIQE model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
                return cls(mean.double(), covariance.double(), int(told["patch"]), int(told["images"]))
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"Niqe.load: expected a file written by Niqe.save, got {Path(path).name!r}, which is none ({error})"
            ) from error

    @classmethod
    def shipped(cls) -> Niqe:
        """Read the model that comes with the package, fitted by `benchmarks/fit_niqe.py` to training photographs."""
        return cls.load(NIQE_FILE)


def _require_patch(patch: int) -> None:
    if patch < 16 or patch % 2:
        raise ValueError(f"Niqe: expected an even patch of at least 16 pixels, got {patch}; 64 fits crops of 256")


def _distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """D = √(dᵀ ((Σ_1 + Σ_2)/2)⁺ d), d = ν_1 − ν_2."""
    difference = mean - other_mean
    inverse = torch.linalg.pinv((covariance + other_covariance) / 2, hermitian=True)
    return float((difference @ inverse @ difference).clamp_min(0).sqrt())


def _features(x: Float[Tensor, "3 h w"], patch: int) -> tuple[Tensor, Tensor]:
    """The 36 features of every patch that is not flat, (n, 36), and the patches' sharpness, (n,), both on the CPU."""
    if x.ndim != 3 or x.shape[0] != 3 or min(x.shape[-2:]) < patch:
        raise ValueError(
            f"Niqe: expected a (3, H, W) image with sides of at least {patch} pixels, got {tuple(x.shape)}; "
            "repeat a grey image three times, leave small images out"
        )
    height, width = (side // patch * patch for side in x.shape[-2:])
    fine = 255 * luma(x.detach()[None, :, :height, :width].double())
    coarse = resize(fine, (height // 2, width // 2))
    coefficients, deviation = _normalise(fine)
    sharpness = _patches(deviation, patch).mean(dim=(1, 2))
    levels = (_patches(coefficients, patch), _patches(_normalise(coarse)[0], patch // 2))
    natural = torch.stack([level.square().mean(dim=(1, 2)) > NIQE_FLAT for level in levels]).all(dim=0)
    features = torch.cat([_statistics(level[natural]) for level in levels], dim=1)
    return features.cpu(), sharpness[natural].cpu()


def _normalise(luminance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean-subtracted contrast-normalised coefficients (I − μ)/(σ + 1) and σ, for I in 0..255, each (1, 1, H, W).

    μ and σ are the local mean and deviation under a 7×7 Gaussian of σ = 7/6; borders repeat the last pixel.
    """
    offset = torch.arange(NIQE_WINDOW, dtype=torch.float64, device=luminance.device) - NIQE_WINDOW // 2
    weight = torch.exp(-offset.square() / (2 * NIQE_SIGMA**2))
    weight = weight / weight.sum()

    def local_mean(u: Tensor) -> Tensor:
        u = F.pad(u, (NIQE_WINDOW // 2,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(u, weight[None, None, :, None]), weight[None, None, None, :])

    mean = local_mean(luminance)
    deviation = (local_mean(luminance.square()) - mean.square()).clamp_min(0).sqrt()
    return (luminance - mean) / (deviation + 1), deviation


def _patches(u: Tensor, side: int) -> Tensor:
    """Cut (1, 1, H, W) into its patches, row by row: (n, side, side)."""
    return u[0, 0].unfold(0, side, side).unfold(1, side, side).reshape(-1, side, side)


def _statistics(blocks: Tensor) -> Tensor:
    """18 features of (n, p, p) coefficients: α and σ² of the values, and (α, η, σ_l², σ_r²) of four kinds of products.

    Products are taken with the right, lower, lower right and lower left neighbour, both inside the patch.
    """
    pairs = (
        (blocks[:, :, :-1], blocks[:, :, 1:]),
        (blocks[:, :-1], blocks[:, 1:]),
        (blocks[:, :-1, :-1], blocks[:, 1:, 1:]),
        (blocks[:, :-1, 1:], blocks[:, 1:, :-1]),
    )
    columns = [*_ggd(blocks.flatten(1))]
    for first, second in pairs:
        columns += _aggd((first * second).flatten(1))
    return torch.stack(columns, dim=1)


def _ggd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shape α and variance σ² of a generalised Gaussian of mean 0 with the same E|x| and E[x²], per row of (n, m)."""
    power = x.square().mean(dim=1)
    return _shape(x.abs().mean(dim=1).square() / _positive(power)), power


def _aggd(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parameters (α, η, σ_l², σ_r²) of an asymmetric generalised Gaussian, per row of (n, m).

    | here | paper |
    |---|---|
    | `left`, `right` | σ_l, σ_r: root mean square of the negative and of the positive values |
    | `skewed` | R̂ = (E|x|)²/E[x²] · (γ̂³ + 1)(γ̂ + 1)/(γ̂² + 1)², γ̂ = σ_l/σ_r, written without the division by σ_r |
    | `alpha` | α with Γ(2/α)²/(Γ(1/α)·Γ(3/α)) = R̂ |
    | `eta` | η = (β_r − β_l)·Γ(2/α)/Γ(1/α), the mean; β = σ·√(Γ(1/α)/Γ(3/α)) |
    """
    left, right = ((x.square() * side).sum(dim=1).div(side.sum(dim=1).clamp_min(1)).sqrt() for side in (x < 0, x > 0))
    ratio = x.abs().mean(dim=1).square() / _positive(x.square().mean(dim=1))
    spread = _positive((left.square() + right.square()).square())
    skewed = ratio * (left**3 + right**3) * (left + right) / spread
    alpha = _shape(skewed)
    log_1, log_2, log_3 = (torch.lgamma(k / alpha) for k in (1, 2, 3))
    eta = (right - left) * torch.exp(0.5 * (log_1 - log_3) + log_2 - log_1)
    return alpha, eta, left.square(), right.square()


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)


@cache
def _shape_table() -> tuple[Tensor, Tensor]:
    """α = 0.2, 0.201, ..., 10 and its ratio Γ(2/α)²/(Γ(1/α)·Γ(3/α)), which grows with α."""
    alpha = torch.arange(200, 10_001, dtype=torch.float64) / 1000
    return alpha, torch.exp(2 * torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha))


def _shape(ratio: Tensor) -> Tensor:
    """The α that has a ratio, linear between the entries of the table and limited to its ends."""
    alpha, entries = (column.to(ratio.device) for column in _shape_table())
    above = torch.searchsorted(entries, ratio).clamp(1, len(entries) - 1)
    share = ((ratio - entries[above - 1]) / (entries[above] - entries[above - 1])).clamp(0, 1)
    return torch.lerp(alpha[above - 1], alpha[above], share)
