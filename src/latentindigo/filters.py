"""The elementary operations that degradations are made of: blur kernels, blur, resizing, rounding and noise.

Everything is a pure function of tensors and numbers; noise takes an explicit generator.

| symbol | here | meaning |
| --- | --- | --- |
| x | `x` | images, (B, C, H, W), [0, 1] |
| k | `kernel` | blur kernel, (k, k) or (B, k, k), sums to 1 |
| S | `sigma_x`, `sigma_y`, `angle` | covariance of a kernel: standard deviations in pixels, direction in radians |
| q | return value of `_mahalanobis` | squared distance u^T S^-1 u of a pixel offset u from the kernel's centre |
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "Number",
    "ResizeMode",
    "add_gaussian_noise",
    "add_poisson_noise",
    "blur",
    "dct_matrix",
    "gaussian_kernel",
    "generalised_gaussian_kernel",
    "luma",
    "plateau_kernel",
    "resize",
    "round8",
    "sinc_kernel",
    "straight_through",
]

ResizeMode = Literal["bicubic", "bilinear", "area"]
# Spelled out because run-time type checkers, unlike static ones, do not take an int for a float.
Number = float | int


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
    return straight_through(x, torch.round(x.clamp(0, 1) * 255) / 255)


def straight_through(x: Float[Tensor, "*shape"], value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
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
    signal = luma(base) if grey else base
    photons = (signal.detach() * 256).float().to(generator.device)
    noise = torch.poisson(photons, generator=generator).to(x) / 256 - signal.detach()
    return (base + strength * noise).clamp(0, 1)


def luma(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Brightness of an image (Rec. 601), or the mean of its channels where they are not three.

    Args:
        x: (B, C, H, W).

    Returns:
        (B, 1, H, W) in the range of `x`; linear in it.
    """
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device).reshape(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True)


def dct_matrix(size: int) -> Float[Tensor, "n n"]:
    """Orthonormal DCT-II D of a length, float64: D v are the coefficients of v, D b D^T those of a square block b."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * place[None] + 1) * place[:, None] / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
