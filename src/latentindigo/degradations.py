"""Synthetic degradations: blur kernels, resizing, noise, a tensor JPEG and the recipes made of them.

Everything is a pure function of (x, params, generator). A recipe is drawn first, as data (`Degradation`, a tuple of
steps), and applied second, so the same draw can be applied with and without its noise and its JPEG: the second form is
what the coarse part of the invertible network is meant to simulate.

| symbol | here | meaning |
| --- | --- | --- |
| x | `x` | clean image, (B, C, H, W), [0, 1] |
| y | return value of `apply` and `degrade` | degraded image, (B, C, H/s, W/s), [0, 1] |
| s | `Degradation.scale` | integer downsampling factor |
| k | `kernel` | blur kernel, (k, k) or (B, k, k), sums to 1 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "STANDARD",
    "BlurStep",
    "Degradation",
    "JpegStep",
    "NoiseStep",
    "PoissonStep",
    "ResizeStep",
    "RoundStep",
    "SecondOrder",
    "Stage",
    "StandardDegradation",
    "Summary",
    "add_gaussian_noise",
    "add_poisson_noise",
    "apply",
    "blur",
    "blur_limit",
    "check_training_range",
    "degrade",
    "draw_bsrgan",
    "draw_second_order",
    "draw_simple",
    "draw_training",
    "gaussian_kernel",
    "generalised_gaussian_kernel",
    "jpeg",
    "plateau_kernel",
    "resize",
    "round8",
    "sinc_kernel",
]

ResizeMode = Literal["bicubic", "bilinear", "area"]
JpegFunction = Callable[[Tensor, int], Tensor]
Generators = torch.Generator | Sequence[torch.Generator]
# Spelled out because run-time type checkers, unlike static ones, do not take an int for a float.
Number = float | int

MAX_BLUR = 3.2
MAX_NOISE = 30 / 255
MAX_POISSON = 3.0
MIN_QUALITY = 10


# ---------------------------------------------------------------------------------------------------------------------
# Blur kernels
# ---------------------------------------------------------------------------------------------------------------------


def _mahalanobis(size: int, sigma_x: Number, sigma_y: Number, angle: Number) -> Tensor:
    """Return u^T S^-1 u on a centred (size, size) grid, S the covariance turned by `angle`."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel size must be odd and positive, got {size}; use {size + 1}")
    if sigma_x <= 0 or sigma_y <= 0:
        raise ValueError(f"kernel sigma must be positive, got ({sigma_x}, {sigma_y}); leave the blur out for sigma 0")
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    along = math.cos(angle) * u + math.sin(angle) * v
    across = -math.sin(angle) * u + math.cos(angle) * v
    return (along / sigma_x) ** 2 + (across / sigma_y) ** 2


def _normalised(kernel: Tensor) -> Tensor:
    return (kernel / kernel.sum()).float()


def gaussian_kernel(
    size: int, sigma_x: Number, sigma_y: Number | None = None, angle: Number = 0.0
) -> Float[Tensor, "k k"]:
    """Return the Gaussian kernel exp(-q/2), q = u^T S^-1 u.

    Args:
        size: Odd side k of the kernel, in pixels.
        sigma_x: Standard deviation along `angle`, in pixels, positive.
        sigma_y: Standard deviation across it; None means isotropic.
        angle: Direction of `sigma_x`, in radians.

    Returns:
        (k, k) float32 kernel that sums to 1.

    Raises:
        ValueError: If the size is even or a sigma is not positive.
    """
    return _normalised(torch.exp(-0.5 * _mahalanobis(size, sigma_x, sigma_y or sigma_x, angle)))


def generalised_gaussian_kernel(
    size: int, sigma_x: Number, sigma_y: Number | None = None, angle: Number = 0.0, beta: Number = 1.0
) -> Float[Tensor, "k k"]:
    """Return the generalised Gaussian kernel exp(-q^beta/2); beta 1 is the Gaussian, smaller has heavier tails.

    Args:
        size: Odd side k of the kernel, in pixels.
        sigma_x: Scale along `angle`, in pixels, positive.
        sigma_y: Scale across it; None means isotropic.
        angle: Direction of `sigma_x`, in radians.
        beta: Shape, positive.

    Returns:
        (k, k) float32 kernel that sums to 1.

    Raises:
        ValueError: If the size is even or a sigma is not positive.
    """
    return _normalised(torch.exp(-0.5 * _mahalanobis(size, sigma_x, sigma_y or sigma_x, angle) ** beta))


def plateau_kernel(
    size: int, sigma_x: Number, sigma_y: Number | None = None, angle: Number = 0.0, beta: Number = 1.0
) -> Float[Tensor, "k k"]:
    """Return the plateau-shaped kernel 1/(1 + q^beta), flat in the middle like an out-of-focus disc.

    Args:
        size: Odd side k of the kernel, in pixels.
        sigma_x: Scale along `angle`, in pixels, positive.
        sigma_y: Scale across it; None means isotropic.
        angle: Direction of `sigma_x`, in radians.
        beta: Steepness of the plateau's edge, positive.

    Returns:
        (k, k) float32 kernel that sums to 1.

    Raises:
        ValueError: If the size is even or a sigma is not positive.
    """
    return _normalised(1 / (1 + _mahalanobis(size, sigma_x, sigma_y or sigma_x, angle) ** beta))


def sinc_kernel(size: int, cutoff: Number) -> Float[Tensor, "k k"]:
    """Return the circular low-pass kernel cutoff * J1(cutoff * r) / (2 pi r), which rings like over-sharpened images.

    Args:
        size: Odd side k of the kernel, in pixels.
        cutoff: Cut-off in radians per pixel, in (0, pi].

    Returns:
        (k, k) float32 kernel that sums to 1; it has negative lobes.

    Raises:
        ValueError: If the size is even or the cut-off is outside (0, pi].
    """
    if not 0 < cutoff <= math.pi + 1e-9:
        raise ValueError(f"sinc cutoff must be in (0, pi] radians per pixel, got {cutoff}")
    radius = _mahalanobis(size, 1.0, 1.0, 0.0).sqrt()
    centre = radius == 0
    safe = radius.masked_fill(centre, 1.0)
    kernel = cutoff * torch.special.bessel_j1(cutoff * safe) / (2 * math.pi * safe)
    return _normalised(kernel.masked_fill(centre, cutoff**2 / (4 * math.pi)))


# ---------------------------------------------------------------------------------------------------------------------
# Elementary operations
# ---------------------------------------------------------------------------------------------------------------------


def blur(x: Float[Tensor, "b c h w"], kernel: Float[Tensor, "*kb k k"]) -> Float[Tensor, "b c h w"]:
    """Convolve each image with its kernel; borders are mirrored.

    Args:
        x: Images, (B, C, H, W).
        kernel: One (k, k) kernel for all images or (B, k, k), k odd.

    Returns:
        Blurred images of the same shape. Not clamped: the operation is linear.

    Raises:
        ValueError: If the kernel is even-sized, not square, or there is not one per image.
    """
    batch, channels, height, width = x.shape
    size = kernel.shape[-1]
    if size % 2 == 0 or kernel.shape[-2] != size:
        raise ValueError(f"blur needs a square kernel of odd size, got {tuple(kernel.shape)}; pad it with zeros")
    if kernel.ndim == 3 and kernel.shape[0] not in (1, batch):
        raise ValueError(f"blur needs one kernel or one per image, got {kernel.shape[0]} for {batch} images")
    # Convolution, not correlation: a motion blur must point where its kernel points.
    weight = kernel.to(x).flip(-2, -1).reshape(-1, 1, size, size).expand(batch, 1, size, size)
    weight = weight.repeat_interleave(channels, dim=0)
    half = size // 2
    # Mirroring needs more pixels than it adds; tiny images fall back to repeating the border.
    padding = "reflect" if half < min(height, width) else "replicate"
    padded = F.pad(x, (half, half, half, half), mode=padding) if half else x
    # One depthwise convolution for the whole batch: several times faster on CPU than one call per image.
    out = F.conv2d(padded.reshape(1, batch * channels, *padded.shape[-2:]), weight, groups=batch * channels)
    return out.reshape(x.shape)


def resize(
    x: Float[Tensor, "b c h w"], size: tuple[int, int], mode: ResizeMode = "bicubic", *, antialias: bool = True
) -> Float[Tensor, "b c h2 w2"]:
    """Resample to `size`; "bicubic" is Pillow's antialiased filter with a = -0.5.

    Args:
        x: Images, (B, C, H, W).
        size: (height, width) of the result.
        mode: "bicubic", "bilinear" or "area".
        antialias: False samples without a low-pass, as the published degradation recipes do.

    Returns:
        (B, C, *size) images. Not clamped (bicubic overshoots): the operation is linear.

    Raises:
        ValueError: If a side is below 1 or the mode is unknown.
    """
    if min(size) < 1:
        raise ValueError(f"resize needs sides of at least 1 pixel, got {size}")
    if mode not in ("bicubic", "bilinear", "area"):
        raise ValueError(f"unknown resize mode {mode!r}; use bicubic, bilinear or area")
    if tuple(x.shape[-2:]) == tuple(size):
        return x.clone()
    if mode == "area":
        return F.interpolate(x, size=size, mode="area")
    return F.interpolate(x, size=size, mode=mode, align_corners=False, antialias=antialias)


def round8(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round to the 256 levels of an 8-bit image; the gradient passes as if nothing had happened (straight-through)."""
    return _straight_through(x, torch.round(x.clamp(0, 1) * 255) / 255)


def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the gradient of `x`."""
    return x + (value - x).detach() if x.requires_grad else value


def _noise_like(x: Tensor, generator: torch.Generator, channels: int | None = None) -> Tensor:
    # Drawn in float32 on the generator's device: one seed means one noise, whatever x's dtype and device are.
    shape = (x.shape[0], channels or x.shape[1], *x.shape[-2:])
    return torch.randn(shape, generator=generator, device=generator.device).to(x)


def add_gaussian_noise(
    x: Float[Tensor, "b c h w"],
    sigma: Number,
    generator: torch.Generator,
    *,
    grey: bool = False,
    mix: Float[Tensor, "c c"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Add white Gaussian noise and clamp to [0, 1].

    Args:
        x: Images, (B, C, H, W), [0, 1].
        sigma: Standard deviation in units of [0, 1]; 15/255 is "15".
        generator: Source of the noise.
        grey: The same noise in all channels.
        mix: Channel mixing matrix for correlated noise; multiplies the white noise.

    Returns:
        Noisy images in [0, 1].
    """
    if sigma == 0:
        return x.clamp(0, 1)
    noise = _noise_like(x, generator, 1 if grey else None)
    if mix is not None:
        noise = torch.einsum("ij,bjhw->bihw", mix.to(noise), noise)
    return (x + sigma * noise).clamp(0, 1)


def add_poisson_noise(
    x: Float[Tensor, "b c h w"], strength: Number, generator: torch.Generator, *, grey: bool = False
) -> Float[Tensor, "b c h w"]:
    """Add shot noise: strength * (Poisson(256 x)/256 - x), then clamp to [0, 1].

    The published recipe takes the number of distinct grey levels in place of 256, which is 256 on photographs; the
    constant keeps the noise of a crop independent of what else is in it.

    Args:
        x: Images, (B, C, H, W), [0, 1].
        strength: Multiplier of the noise; the standard deviation at mid-grey is 0.044 * strength.
        generator: Source of the noise.
        grey: Noise of the luma, the same in all channels.

    Returns:
        Noisy images in [0, 1].
    """
    if strength == 0:
        return x.clamp(0, 1)
    base = x.clamp(0, 1)
    signal = _luma(base) if grey else base
    photons = (signal.detach() * 256).float().to(generator.device)
    noise = torch.poisson(photons, generator=generator).to(x) / 256 - signal.detach()
    return (base + strength * noise).clamp(0, 1)


def _luma(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device).reshape(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# JPEG
# ---------------------------------------------------------------------------------------------------------------------

# Annex K of the JPEG standard, which libjpeg scales by quality.
_LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
) + ((99,) * 8,) * 4
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def _dct_matrix(like: Tensor) -> Tensor:
    n = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * n[None, :] + 1) * n[:, None] / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)


def _quantisation(table: tuple[tuple[int, ...], ...], quality: Tensor) -> Tensor:
    """Return libjpeg's table for each quality, (B, 1, 1, 1, 8, 8)."""
    scale = torch.where(quality < 50, torch.floor(5000 / quality), 200 - 2 * quality).reshape(-1, 1, 1, 1, 1, 1)
    base = torch.tensor(table, dtype=quality.dtype, device=quality.device)
    return torch.floor((base * scale + 50) / 100).clamp(1, 255)


def _code_plane(plane: Tensor, table: Tensor) -> Tensor:
    """Transform, quantise and transform back planes (B, C, h, 8n) in [0, 255]; h is padded to a multiple of 8."""
    plane = F.pad(plane, (0, 0, 0, -plane.shape[-2] % 8), mode="replicate")
    batch, channels, height, width = plane.shape
    dct = _dct_matrix(plane)
    blocks = (plane - 128).reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    coefficients = dct @ blocks @ dct.T
    # libjpeg's integer transform gives rows in units of 1/(4 sqrt 8) and coefficients in units of 1/8, and its
    # quantiser rounds halves away from zero. On that grid halves are frequent, so the result hangs on doing the same.
    with torch.no_grad():
        rows = torch.floor(4 * math.sqrt(8) * (blocks @ dct.T) + 0.5)
        eighths = torch.floor(math.sqrt(8) / 4 * (dct @ rows) + 0.5)
        levels = torch.floor((eighths.abs() + 4 * table) / (8 * table)) * eighths.sign()
    coefficients = _straight_through(coefficients, levels * table)
    blocks = (dct.T @ coefficients @ dct).transpose(3, 4)
    out = blocks.reshape(plane.shape) + 128
    return _straight_through(out, torch.round(out)).clamp(0, 255)


def _halve_chroma(chroma: Tensor) -> Tensor:
    """Average 2x2 pixels with libjpeg's rounding, whose bias alternates 1, 2 along a row to cancel on average."""
    total = F.avg_pool2d(chroma, 2) * 4
    bias = 1 + torch.arange(total.shape[-1], dtype=total.dtype, device=total.device) % 2
    mean = total / 4
    return _straight_through(mean, torch.floor((torch.round(total) + bias) / 4))


def _double_chroma(chroma: Tensor) -> Tensor:
    """Double the size with libjpeg's "fancy" triangle filter: 3/4 of the nearer and 1/4 of the farther sample."""
    batch, channels, height, width = chroma.shape
    padded = F.pad(chroma, (1, 1, 1, 1), mode="replicate")
    centre = padded[..., 1:-1, :] * 3
    rows = torch.stack((centre + padded[..., :-2, :], centre + padded[..., 2:, :]), dim=-2)
    rows = rows.reshape(batch, channels, 2 * height, width + 2)
    centre = rows[..., 1:-1] * 3
    total = torch.stack((centre + rows[..., :-2], centre + rows[..., 2:]), dim=-1)
    bias = torch.tensor([8.0, 7.0], dtype=chroma.dtype, device=chroma.device)
    value = torch.floor((torch.round(total) + bias) / 16)
    return _straight_through(total / 16, value).reshape(batch, channels, 2 * height, 2 * width)


def jpeg(x: Float[Tensor, "b c h w"], quality: Number | Float[Tensor, " n"]) -> Float[Tensor, "b c h w"]:
    """Pass images through JPEG 4:2:0 as libjpeg codes it, without the (lossless) entropy coding.

    Steps: 8-bit rounding, RGB to YCbCr, 2x2 mean of chroma, 8x8 DCT, quantisation by the standard tables at libjpeg's
    quality scaling, and back with the triangle upsampling of chroma. Each rounding passes its gradient straight
    through, so the result is differentiable in `x`. Agrees with Pillow's codec far above 40 dB.

    Args:
        x: Images, (B, 3, H, W) or one grey channel, [0, 1]; any size, padded to whole blocks by repeating borders.
        quality: 1..100, one for all images or one per image.

    Returns:
        Decoded images of the same shape, in [0, 1] on the 8-bit grid.

    Raises:
        ValueError: If a quality is outside 1..100, there is not one per image, or channels are neither 1 nor 3.
    """
    batch, channels, height, width = x.shape
    if channels not in (1, 3):
        raise ValueError(f"jpeg needs 1 or 3 channels, got {channels}; split off alpha first")
    work = x.to(torch.promote_types(x.dtype, torch.float32)) * 255
    factor = torch.as_tensor(quality, dtype=work.dtype, device=work.device).reshape(-1)
    if factor.numel() not in (1, batch):
        raise ValueError(f"jpeg needs one quality or one per image, got {factor.numel()} for {batch} images")
    if bool(((factor < 1) | (factor > 100)).any()):
        raise ValueError(f"jpeg quality must be in 1..100, got {factor.tolist()}")
    work = _straight_through(work, torch.round(work)).clamp(0, 255)
    # libjpeg extends the width before it halves the chroma, but the height, beyond an even number, only after it.
    unit = 8 if channels == 1 else 16
    work = F.pad(work, (0, -width % unit, 0, -height % (unit // 8)), mode="replicate")
    if channels == 1:
        decoded = _code_plane(work, _quantisation(_LUMA_TABLE, factor))
    else:
        offset = torch.tensor([0.0, 128.0, 128.0], dtype=work.dtype, device=work.device).reshape(1, 3, 1, 1)
        to_ycc, to_rgb = (torch.tensor(m, dtype=work.dtype, device=work.device) for m in (_TO_YCC, _TO_RGB))
        ycc = torch.einsum("ij,bjhw->bihw", to_ycc, work) + offset
        ycc = _straight_through(ycc, torch.round(ycc)).clamp(0, 255)
        luma = _code_plane(ycc[:, :1], _quantisation(_LUMA_TABLE, factor))[..., :height, :width]
        chroma = _code_plane(_halve_chroma(ycc[:, 1:]), _quantisation(_CHROMA_TABLE, factor))
        # The decoder knows the true size of the halved planes, so the padding must not leak into the upsampling.
        chroma = _double_chroma(chroma[..., : (height + 1) // 2, : (width + 1) // 2])[..., :height, :width]
        decoded = torch.einsum("ij,bjhw->bihw", to_rgb, torch.cat((luma, chroma), dim=1) - offset)
        decoded = _straight_through(decoded, torch.round(decoded))
    return (decoded[..., :height, :width].clamp(0, 255) / 255).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Degradations as data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlurStep:
    """Blur on the grid of the moment; `sigma` is the larger nominal axis, `spread` the sigma of a Gaussian like it."""

    kernel: Tensor
    sigma: Number
    spread: Number


@dataclass(frozen=True)
class ResizeStep:
    """Resize to `factor` times the size of y, so 1 ends on y's grid whatever came before."""

    factor: Number
    mode: ResizeMode = "bicubic"
    antialias: bool = True


@dataclass(frozen=True, eq=False)
class NoiseStep:
    """Gaussian noise of standard deviation `sigma` in [0, 1] units; `mix` makes it correlated across channels."""

    sigma: Number
    grey: bool = False
    mix: Tensor | None = None


@dataclass(frozen=True)
class PoissonStep:
    """Shot noise, see `add_poisson_noise`."""

    strength: Number
    grey: bool = False


@dataclass(frozen=True)
class RoundStep:
    """Rounding to 8 bit; counts as noise."""


@dataclass(frozen=True)
class JpegStep:
    """JPEG 4:2:0 of the given quality."""

    quality: int


Step = BlurStep | ResizeStep | NoiseStep | PoissonStep | RoundStep | JpegStep


class Summary(NamedTuple):
    """The three numbers a degradation is described by.

    Attributes:
        blur: Gaussian-equivalent sigma in quarter pixels of y: the sigma in output pixels at scale 4, 4 sigma/s at s.
            At most 8, two pixels of y: what is blurred more looks the same.
        noise: Standard deviation in [0, 1] units that reaches y.
        jpeg: (100 - quality)/100 of the last JPEG, 0 without one.
    """

    blur: float
    noise: float
    jpeg: float


@dataclass(frozen=True)
class Degradation:
    """A drawn degradation: plain numbers and kernels, nothing random left but the noise samples themselves."""

    scale: int
    steps: tuple[Step, ...]

    def summary(self) -> Summary:
        """Return blur, noise and JPEG strength as they arrive on y's grid.

        Exact for one blur, one downsampling, one noise and one JPEG. For recipes with several of each it is an
        estimate: variances are carried through the steps as if all noise were white.
        """
        pitch = 1 / self.scale
        blur_variance = noise_variance = jpeg_strength = 0.0
        for step in self.steps:
            match step:
                case BlurStep():
                    blur_variance += (step.spread * pitch) ** 2
                    noise_variance *= float((step.kernel**2).sum())
                case ResizeStep():
                    new_pitch = 1 / step.factor
                    # A grid coarser than y's cannot be undone by going back up: it blurs like 0.375 of its pixel,
                    # the Gaussian whose response halves at that grid's Nyquist frequency.
                    blur_variance += 0.375**2 * max(0.0, max(new_pitch, 1) ** 2 - max(pitch, 1) ** 2)
                    if new_pitch > pitch and (step.antialias or step.mode == "area"):
                        noise_variance *= (pitch / new_pitch) ** 2
                    pitch = new_pitch
                case NoiseStep():
                    noise_variance += step.sigma**2
                case PoissonStep():
                    noise_variance += step.strength**2 * 0.5 / 256
                case JpegStep():
                    jpeg_strength = (100 - step.quality) / 100
                case RoundStep():
                    pass
        return Summary(min(8.0, 4 * math.sqrt(blur_variance)), math.sqrt(noise_variance), jpeg_strength)


def apply(
    x: Float[Tensor, "b c h w"],
    params: Degradation,
    generator: torch.Generator,
    noise: bool = True,
    jpeg: bool | JpegFunction = True,
) -> Float[Tensor, "b c h2 w2"]:
    """Apply one drawn degradation to every image of a batch.

    Args:
        x: Clean images, (B, C, H, W), [0, 1]; H and W must be multiples of the scale.
        params: What to do, from one of the `draw_*` functions or `StandardDegradation.params`.
        generator: Source of the noise samples.
        noise: False leaves out noise and 8-bit rounding but keeps blurs and resizes.
        jpeg: False leaves JPEG out, True takes the tensor codec, a function (x, quality) -> x takes that one.

    Returns:
        (B, C, H/s, W/s) images in [0, 1].

    Raises:
        ValueError: If the size is not a multiple of the scale.
    """
    height, width = x.shape[-2:]
    if height % params.scale or width % params.scale:
        raise ValueError(f"image size must be a multiple of scale {params.scale}, got {height}x{width}; crop it first")
    target = (height // params.scale, width // params.scale)
    codec: JpegFunction | None = _tensor_jpeg if jpeg is True else (jpeg or None)
    y = x
    for step in params.steps:
        match step:
            case BlurStep():
                y = blur(y, step.kernel).clamp(0, 1)
            case ResizeStep():
                size = (max(1, round(step.factor * target[0])), max(1, round(step.factor * target[1])))
                y = resize(y, size, step.mode, antialias=step.antialias).clamp(0, 1)
            case NoiseStep() if noise:
                y = add_gaussian_noise(y, step.sigma, generator, grey=step.grey, mix=step.mix)
            case PoissonStep() if noise:
                y = add_poisson_noise(y, step.strength, generator, grey=step.grey)
            case RoundStep() if noise:
                y = round8(y)
            case JpegStep() if codec is not None:
                y = codec(y, step.quality)
            case _:
                pass  # noise or JPEG that the caller left out
    if tuple(y.shape[-2:]) != target:
        y = resize(y, target)
    return y.clamp(0, 1)


# `apply` has a switch named `jpeg`, which hides the function of that name inside it.
_tensor_jpeg = jpeg


def _per_image(generators: Generators, count: int) -> Sequence[torch.Generator]:
    if isinstance(generators, torch.Generator):
        return [generators] * count
    if len(generators) != count:
        raise ValueError(f"expected one generator or one per image, got {len(generators)} for {count} images")
    return generators


# ---------------------------------------------------------------------------------------------------------------------
# Standard degradations
# ---------------------------------------------------------------------------------------------------------------------


def _gaussian_step(sigma: Number) -> BlurStep:
    # 3 sigma on each side holds 99.7 % of a Gaussian; 25 is the largest kernel any recipe uses.
    size = min(25, 2 * math.ceil(3 * sigma) + 1)
    return BlurStep(gaussian_kernel(size, sigma), sigma, sigma)


@dataclass(frozen=True)
class StandardDegradation:
    """A named degradation: blur the clean image, downsample (bicubic), add noise, round to 8 bit, JPEG.

    Attributes:
        name: Name used by benchmarks and tests.
        scale: Downsampling factor.
        blur: Gaussian sigma in pixels of the clean image, 0 for none.
        noise: Noise standard deviation in 8-bit levels, 0 for none.
        quality: JPEG quality, None for no JPEG.
        second_order: Draw the second-order recipe; the other numbers are then unused.
    """

    name: str
    scale: int = 4
    blur: Number = 0.0
    noise: Number = 0.0
    quality: int | None = None
    second_order: bool = False

    def params(self, generator: torch.Generator) -> Degradation:
        """Return the steps to apply; only the second-order recipe takes numbers from the generator."""
        if self.second_order:
            return draw_second_order(generator, self.scale)
        return _classical(self.scale, self.blur, self.noise / 255, self.quality)


def _classical(scale: int, sigma: Number, noise: Number, quality: int | None) -> Degradation:
    steps: list[Step] = []
    if sigma > 0:
        steps.append(_gaussian_step(sigma))
    if scale > 1:
        steps.append(ResizeStep(1.0))
    if noise > 0:
        steps.append(NoiseStep(noise))
    if steps or quality is not None:
        steps.append(RoundStep())
    if quality is not None:
        steps.append(JpegStep(quality))
    return Degradation(scale, tuple(steps))


_MEDIUM = StandardDegradation("medium", blur=1.5, noise=10.0, quality=70)

STANDARD: Mapping[str, StandardDegradation] = MappingProxyType(
    {
        d.name: d
        for d in (
            StandardDegradation("mild", blur=0.8, noise=3.0, quality=90),
            _MEDIUM,
            StandardDegradation("severe", blur=2.5, noise=20.0, quality=40),
            StandardDegradation("random", second_order=True),
            StandardDegradation("noise15", scale=1, noise=15.0),
            StandardDegradation("jpeg15", scale=1, quality=15),
            StandardDegradation("blur1.5-noise5", scale=1, blur=1.5, noise=5.0),
            replace(_MEDIUM, name="beyond-jpeg5", quality=5),
            replace(_MEDIUM, name="beyond-blur4", blur=4.0),
            replace(_MEDIUM, name="beyond-noise40", noise=40.0),
        )
    }
)


def degrade(
    x: Float[Tensor, "b c h w"],
    name_or_params: str | StandardDegradation | Degradation,
    generator: Generators,
    jpeg: bool | JpegFunction = True,
    noise: bool = True,
) -> Float[Tensor, "b c h2 w2"]:
    """Degrade images by name or by parameters.

    Args:
        x: Clean images, (B, C, H, W), [0, 1]; H and W multiples of the scale.
        name_or_params: A key of `STANDARD`, one of its values, or drawn parameters.
        generator: One generator, used in image order, or one per image.
        jpeg: See `apply`; the benchmark passes Pillow's codec.
        noise: See `apply`.

    Returns:
        (B, C, H/s, W/s) images in [0, 1].

    Raises:
        ValueError: If the name is unknown or the size is not a multiple of the scale.
    """
    chosen = name_or_params
    if isinstance(chosen, str):
        if chosen not in STANDARD:
            raise ValueError(f"unknown degradation {chosen!r}; known: {', '.join(STANDARD)}")
        chosen = STANDARD[chosen]
    images = []
    for i, source in enumerate(_per_image(generator, x.shape[0])):
        params = chosen if isinstance(chosen, Degradation) else chosen.params(source)
        images.append(apply(x[i : i + 1], params, source, noise, jpeg))
    return torch.cat(images)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


def _uniform(generator: torch.Generator, low: Number, high: Number) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, device=generator.device))


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    """Draw an integer of low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))


def _chance(generator: torch.Generator, probability: Number) -> bool:
    return _uniform(generator, 0, 1) < probability


def _choice(generator: torch.Generator, probabilities: Sequence[float]) -> int:
    point, total = _uniform(generator, 0, sum(probabilities)), 0.0
    for index, probability in enumerate(probabilities):
        total += probability
        if point < total:
            return index
    return len(probabilities) - 1


def _mode(generator: torch.Generator) -> ResizeMode:
    modes: tuple[ResizeMode, ...] = ("area", "bilinear", "bicubic")
    return modes[_integer(generator, 0, 2)]


def blur_limit(scale: int) -> float:
    """Return the largest blur sigma drawn for a scale, in clean pixels: 2 at x1, 2.4 at x2, 3.2 from x4 on.

    The published ranges are for x4, where sigma 3 is less than one pixel of y. At x1 the same sigma would be three
    pixels of y and leave little to restore, so all blur ranges shrink with the scale.
    """
    return min(MAX_BLUR, 1.6 + 0.4 * scale)


@dataclass(frozen=True)
class Stage:
    """Ranges of one blur-resize-noise-JPEG stage of the second-order recipe.

    Attributes:
        blur_probability: Chance that the stage blurs at all.
        sinc_probability: Chance that the blur is a sinc kernel.
        kernel_probabilities: Gaussian, generalised Gaussian and plateau, each isotropic then anisotropic.
        sigma: Range of the kernel's standard deviations, in pixels of the current grid.
        beta_generalised: Shape range of the generalised Gaussian.
        beta_plateau: Shape range of the plateau kernel.
        resize_probabilities: Up, down, keep.
        resize: Smallest and largest factor; relative to x in the first stage, to y in the second.
        gaussian_probability: Chance of Gaussian rather than Poisson noise.
        noise: Gaussian range in 8-bit levels.
        poisson: Range of the Poisson strength.
        grey_probability: Chance of the same noise in all channels.
        quality: JPEG range.
    """

    blur_probability: Number = 1.0
    sinc_probability: Number = 0.1
    kernel_probabilities: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sigma: tuple[float, float] = (0.2, 3.0)
    beta_generalised: tuple[float, float] = (0.5, 4.0)
    beta_plateau: tuple[float, float] = (1.0, 2.0)
    resize_probabilities: tuple[float, float, float] = (0.2, 0.7, 0.1)
    resize: tuple[float, float] = (0.15, 1.5)
    gaussian_probability: Number = 0.5
    noise: tuple[float, float] = (1.0, 30.0)
    poisson: tuple[float, float] = (0.05, 3.0)
    grey_probability: Number = 0.4
    quality: tuple[int, int] = (30, 95)


@dataclass(frozen=True)
class SecondOrder:
    """Ranges of the second-order recipe, by default exactly those of Real-ESRGAN x4plus.

    Attributes:
        first: Stage on the clean image's grid.
        second: Stage that ends on y's grid.
        kernel_size: Smallest and largest odd kernel side.
        final_sinc_probability: Chance of the closing sinc filter.
    """

    first: Stage = Stage()
    second: Stage = Stage(
        blur_probability=0.8,
        sigma=(0.2, 1.5),
        resize_probabilities=(0.3, 0.4, 0.3),
        resize=(0.3, 1.2),
        noise=(1.0, 25.0),
        poisson=(0.05, 2.5),
    )
    kernel_size: tuple[int, int] = (7, 21)
    final_sinc_probability: Number = 0.8

    @classmethod
    def for_scale(cls, scale: int) -> SecondOrder:
        """Return the published ranges for scale 4 and above, gentler blur and downsizing below it.

        Below x4 blur shrinks as `blur_limit` says, and no intermediate grid is coarser than 0.6 of y's grid in the
        first stage (what 0.15 of x means at x4) or than 0.3 + 0.1 * (4 - s) of it in the second.
        """
        full = cls()
        if scale >= 4:
            return full
        shrink = blur_limit(scale) / MAX_BLUR
        first = replace(full.first, sigma=(0.2, 3.0 * shrink), resize=(0.6 / scale, 1.5))
        second = replace(full.second, sigma=(0.2, 1.5 * shrink), resize=(0.3 + 0.1 * (4 - scale), 1.2))
        return replace(full, first=first, second=second)


def _spread(kernel: Tensor) -> float:
    """Return the sigma of the Gaussian that passes as much white noise as this kernel.

    A Gaussian has sum k^2 = 1/(4 pi sigma^2), the identity has 1. Unlike the second moment this is meaningful for
    heavy tails and negative lobes.
    """
    return math.sqrt(max(0.0, 1 / float((kernel**2).sum()) - 1) / (4 * math.pi))


def _step(kernel: Tensor, *sigmas: Number) -> BlurStep:
    return BlurStep(kernel, max(sigmas), _spread(kernel))


def _sinc_step(size: int, cutoff: Number) -> BlurStep:
    kernel = sinc_kernel(size, cutoff)
    return _step(kernel, _spread(kernel))


def _beta(generator: torch.Generator, limits: tuple[float, float]) -> float:
    # Half of the draws below 1 and half above, so that broad and sharp shapes are equally frequent.
    low, high = limits
    return _uniform(generator, low, 1.0) if _chance(generator, 0.5) else _uniform(generator, 1.0, high)


def _draw_blur(generator: torch.Generator, stage: Stage, sizes: tuple[int, int]) -> BlurStep:
    size = 2 * _integer(generator, sizes[0] // 2, sizes[1] // 2) + 1
    if _chance(generator, stage.sinc_probability):
        return _sinc_step(size, _uniform(generator, math.pi / 3 if size < 13 else math.pi / 5, math.pi))
    kind = _choice(generator, stage.kernel_probabilities)
    sigma_x = sigma_y = _uniform(generator, *stage.sigma)
    angle = 0.0
    if kind % 2:
        sigma_y = _uniform(generator, *stage.sigma)
        angle = _uniform(generator, -math.pi, math.pi)
    if kind < 2:
        kernel = gaussian_kernel(size, sigma_x, sigma_y, angle)
    elif kind < 4:
        beta = _beta(generator, stage.beta_generalised)
        kernel = generalised_gaussian_kernel(size, sigma_x, sigma_y, angle, beta)
    else:
        kernel = plateau_kernel(size, sigma_x, sigma_y, angle, _beta(generator, stage.beta_plateau))
    return _step(kernel, sigma_x, sigma_y)


def _draw_stage(
    generator: torch.Generator, stage: Stage, sizes: tuple[int, int], base: Number
) -> tuple[list[Step], JpegStep]:
    """Draw one stage; `base` is the size, relative to y, that the stage's resize factors multiply."""
    steps: list[Step] = []
    if _chance(generator, stage.blur_probability):
        steps.append(_draw_blur(generator, stage, sizes))
    direction = _choice(generator, stage.resize_probabilities)
    low, high = ((1.0, stage.resize[1]), (stage.resize[0], 1.0), (1.0, 1.0))[direction]
    # The published recipe resizes without a low-pass; the aliasing is part of what it teaches.
    steps.append(ResizeStep(base * _uniform(generator, low, high), _mode(generator), antialias=False))
    grey = _chance(generator, stage.grey_probability)
    if _chance(generator, stage.gaussian_probability):
        steps.append(NoiseStep(_uniform(generator, *stage.noise) / 255, grey))
    else:
        steps.append(PoissonStep(_uniform(generator, *stage.poisson), grey))
    return steps, JpegStep(_integer(generator, *stage.quality))


def draw_second_order(generator: torch.Generator, scale: int = 4, ranges: SecondOrder | None = None) -> Degradation:
    """Draw the second-order degradation of Real-ESRGAN: two stages, then a sinc filter before or after the last JPEG.

    Args:
        generator: Source of every number.
        scale: Downsampling factor, at least 1.
        ranges: Ranges to draw from; None means `SecondOrder.for_scale(scale)`.

    Returns:
        The drawn degradation.
    """
    ranges = ranges or SecondOrder.for_scale(scale)
    steps, first_jpeg = _draw_stage(generator, ranges.first, ranges.kernel_size, float(scale))
    second, last_jpeg = _draw_stage(generator, ranges.second, ranges.kernel_size, 1.0)
    closing: list[Step] = [ResizeStep(1.0, _mode(generator), antialias=False)]
    size = 2 * _integer(generator, ranges.kernel_size[0] // 2, ranges.kernel_size[1] // 2) + 1
    cutoff = _uniform(generator, math.pi / 3, math.pi)
    if _chance(generator, ranges.final_sinc_probability):
        closing.append(_sinc_step(size, cutoff))
    tail = [*closing, last_jpeg] if _chance(generator, 0.5) else [last_jpeg, *closing]
    return Degradation(scale, (*steps, first_jpeg, *second, *tail, RoundStep()))


def _correlated_mix(generator: torch.Generator) -> Tensor:
    """Draw a channel mixing matrix M for noise M n of covariance Q^T D Q, D uniform in [0, 1], scaled to unit mean."""
    q = torch.linalg.qr(torch.randn(3, 3, generator=generator, device=generator.device, dtype=torch.float64)).Q
    d = torch.rand(3, generator=generator, device=generator.device, dtype=torch.float64) + 1e-3
    return (q.T * d.sqrt()).float()


def draw_bsrgan(generator: torch.Generator, scale: int = 4) -> Degradation:
    """Draw a degradation in the manner of BSRGAN: blurs, downsamplings, noise and JPEG in random order.

    Not taken over: the camera pipeline simulation. The shifted nearest-neighbour branch becomes an aligned bilinear
    decimation after its blur. Below x4 blur ranges shrink as `blur_limit` says.

    Args:
        generator: Source of every number.
        scale: Downsampling factor, at least 1.

    Returns:
        The drawn degradation.
    """
    shrink = min(1.0, blur_limit(scale) / MAX_BLUR)
    start = float(scale)
    steps: list[Step] = []
    if scale >= 4 and _chance(generator, 0.25):
        start = scale / 2
        steps.append(ResizeStep(start, _mode(generator), antialias=False))

    def draw_blur() -> Step:
        size = 2 * _integer(generator, 2, 11) + 3
        if _chance(generator, 0.5):
            # The published recipe draws the covariance's eigenvalues, up to 4 + s, not the standard deviations.
            top = shrink * math.sqrt(4 + min(start, 4))
            sigma_x, sigma_y = (max(0.1, top * math.sqrt(_uniform(generator, 0, 1))) for _ in range(2))
            kernel = gaussian_kernel(size, sigma_x, sigma_y, _uniform(generator, 0, math.pi))
        else:
            sigma_x = sigma_y = max(0.1, _uniform(generator, 0, shrink * (2 + 0.2 * min(start, 4))))
            kernel = gaussian_kernel(size, sigma_x)
        return _step(kernel, sigma_x, sigma_y)

    def draw_downsampling() -> list[Step]:
        if _chance(generator, 0.75):
            # Below x4 the free factor may not leave a grid much coarser than y's, see SecondOrder.for_scale.
            factor = max(start / _uniform(generator, 1, 2 * start), 0.5 if scale >= 4 else 0.6)
            return [ResizeStep(factor, _mode(generator), antialias=False)]
        sigma = _uniform(generator, 0.1, 0.6 * min(start, 4) * shrink)
        kernel = gaussian_kernel(25, sigma)
        return [_step(kernel, sigma), ResizeStep(1.0, "bilinear", antialias=False)]

    def draw_noise() -> Step:
        sigma = _uniform(generator, 2, 25) / 255
        kind = _choice(generator, (0.4, 0.4, 0.2))
        return NoiseStep(sigma, grey=kind == 1, mix=_correlated_mix(generator) if kind == 2 else None)

    order = torch.randperm(6, generator=generator, device=generator.device).tolist()
    # The last downsampling lands on y's grid, so the free one must not come after it.
    free, last = order.index(2), order.index(3)
    if free > last:
        order[free], order[last] = order[last], order[free]
    for kind in order:
        if kind < 2:
            steps.append(draw_blur())
        elif kind == 2:
            steps.extend(draw_downsampling())
        elif kind == 3:
            steps.append(ResizeStep(1.0, _mode(generator), antialias=False))
        elif kind == 4:
            steps.append(draw_noise())
        elif _chance(generator, 0.9):
            steps.append(JpegStep(_integer(generator, 30, 95)))
    steps.append(RoundStep())
    steps.append(JpegStep(_integer(generator, 30, 95)))
    return Degradation(scale, tuple(steps))


def draw_simple(generator: torch.Generator, scale: int = 4, probability: Number = 0.6) -> Degradation:
    """Draw a classical degradation: blur, bicubic downsampling, noise and JPEG, each but the second on or off.

    Ranges: Gaussian sigma U[0, `blur_limit`], every fifth blur anisotropic; noise U[0, 30]/255; JPEG U{10..95}.

    Args:
        generator: Source of every number.
        scale: Downsampling factor, at least 1.
        probability: Chance of each of the three; sometimes none is on.

    Returns:
        The drawn degradation.
    """
    sigma = _uniform(generator, 0, blur_limit(scale))
    noise = _uniform(generator, 0, MAX_NOISE)
    quality = _integer(generator, MIN_QUALITY, 95)
    use_blur, use_noise, use_jpeg = (_chance(generator, probability) for _ in range(3))
    plain = _classical(
        scale, sigma if use_blur and sigma > 0.05 else 0.0, noise if use_noise else 0.0, quality if use_jpeg else None
    )
    if not plain.steps or not isinstance(plain.steps[0], BlurStep) or not _chance(generator, 0.2):
        return plain
    across = max(0.1, sigma * _uniform(generator, 0.2, 1.0))
    size = plain.steps[0].kernel.shape[-1]
    kernel = gaussian_kernel(size, sigma, across, _uniform(generator, 0, math.pi))
    return replace(plain, steps=(_step(kernel, sigma, across), *plain.steps[1:]))


def draw_training(generator: torch.Generator, scale: int = 4) -> Degradation:
    """Draw from the training mixture: 40 % second order, 15 % BSRGAN-like, 45 % classical.

    Args:
        generator: Source of every number.
        scale: Downsampling factor, at least 1.

    Returns:
        The drawn degradation, inside the training range.
    """
    draw = (draw_second_order, draw_bsrgan, draw_simple)[_choice(generator, (0.4, 0.15, 0.45))]
    params = draw(generator, scale)
    check_training_range(params)
    return params


def check_training_range(params: Degradation) -> None:
    """Refuse parameters outside the training range, which the "beyond" degradations rely on never having been seen.

    Args:
        params: A drawn degradation. Each blur, each noise and each JPEG is checked by itself.

    Raises:
        ValueError: If a JPEG quality is below 10, a blur sigma above 3.2, a Gaussian noise above 30/255 or a Poisson
            strength above 3.
    """
    tolerance = 1e-6
    for step in params.steps:
        match step:
            case JpegStep() if step.quality < MIN_QUALITY:
                raise ValueError(f"training expects JPEG quality >= {MIN_QUALITY}, got {step.quality}; draw another")
            case BlurStep() if step.sigma > MAX_BLUR + tolerance:
                raise ValueError(f"training expects blur sigma <= {MAX_BLUR}, got {step.sigma:.3f}; draw another")
            case NoiseStep() if step.sigma > MAX_NOISE + tolerance:
                raise ValueError(f"training expects noise <= 30/255, got {step.sigma * 255:.2f}/255; draw another")
            case PoissonStep() if step.strength > MAX_POISSON + tolerance:
                raise ValueError(f"training expects Poisson strength <= {MAX_POISSON}, got {step.strength:.3f}")
            case _:
                pass
