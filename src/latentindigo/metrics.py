"""Image quality as pure functions of tensors: PSNR, SSIM, gradient energy, sliced Wasserstein distance.

Training and evaluation call the same functions, so a number in a log and a number in a table mean the same thing.
Everything works on pixels in [0, 1]; a caller who reports numbers first passes its images through `round8`, because a
saved picture has 8 bits and the metrics of the file are the ones that others can reproduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["gradient_energy", "gradient_energy_sums", "psnr", "round8", "ssim", "swd"]

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SWD_PATCH = 7
SWD_LEVELS = 3
SWD_PROJECTIONS = 128
SWD_PATCHES = 30_000
SWD_SEED = 0


def _require_same_shape(x: Tensor, ref: Tensor, caller: str) -> None:
    if x.ndim != 4 or x.shape != ref.shape:
        raise ValueError(
            f"{caller}: expected two (B, C, H, W) tensors of one shape, got {tuple(x.shape)} and {tuple(ref.shape)}; "
            "crop or resize one of them first"
        )


def round8(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clamp to [0, 1] and round to the 256 values that an 8-bit file can hold.

    Args:
        x: Pixels, any shape; values outside [0, 1] are clamped.

    Returns:
        A new tensor of the same shape and dtype.
    """
    return (x.clamp(0, 1) * 255).round() / 255


def psnr(x: Float[Tensor, "b c h w"], ref: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio, PSNR = −10·log10(MSE), in dB for a peak of 1.

    The mean runs over all channels and the whole image, in float64.

    Args:
        x: Restored images, (B, C, H, W), [0, 1].
        ref: Clean images, same shape.

    Returns:
        One float64 value per image, (B,); infinite where the two are equal.

    Raises:
        ValueError: The shapes differ.
    """
    _require_same_shape(x, ref, "psnr")
    mse = (x.double() - ref.double()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse)


def ssim(x: Float[Tensor, "b c h w"], ref: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity with the usual 11×11 Gaussian window (σ = 1.5), averaged over channels and positions.

    | here | formula |
    |---|---|
    | `mean_x`, `mean_r` | μ_x, μ_y: Gaussian-weighted local means |
    | `var_x`, `var_r`, `cov` | σ_x², σ_y², σ_xy: local (population) variances and covariance |
    | `c1`, `c2` | (0.01·L)², (0.03·L)², L = 1 |

    SSIM = (2·μ_x·μ_y + c1)(2·σ_xy + c2) / ((μ_x² + μ_y² + c1)(σ_x² + σ_y² + c2)).
    Only windows that lie wholly inside the image count, so no border rule enters. Where a side is shorter than 11
    the window shrinks along that side to the largest odd length that fits.

    Args:
        x: Restored images, (B, C, H, W), [0, 1].
        ref: Clean images, same shape.

    Returns:
        One float64 value per image, (B,), 1 for equal images.

    Raises:
        ValueError: The shapes differ.
    """
    _require_same_shape(x, ref, "ssim")
    x, ref = x.double(), ref.double()
    batch, channels, height, width = x.shape
    column = _gaussian_window(height, x.device)[None, None, :, None]
    row = _gaussian_window(width, x.device)[None, None, None, :]

    def local_mean(u: Tensor) -> Tensor:
        u = u.reshape(batch * channels, 1, *u.shape[-2:])
        return F.conv2d(F.conv2d(u, column), row)

    mean_x, mean_r = local_mean(x), local_mean(ref)
    var_x = local_mean(x * x) - mean_x.square()
    var_r = local_mean(ref * ref) - mean_r.square()
    cov = local_mean(x * ref) - mean_x * mean_r
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_r + c1) * (2 * cov + c2)
    score = score / ((mean_x.square() + mean_r.square() + c1) * (var_x + var_r + c2))
    return score.reshape(batch, -1).mean(dim=1)


def _gaussian_window(side: int, device: torch.device) -> Tensor:
    size = min(SSIM_WINDOW, side if side % 2 else side - 1)
    offset = torch.arange(size, dtype=torch.float64, device=device) - size // 2
    weight = torch.exp(-offset.square() / (2 * SSIM_SIGMA**2))
    return weight / weight.sum()


def gradient_energy_sums(
    x: Float[Tensor, "b c h w"], ref: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum of squared forward differences, restored and clean: E(u) = Σ (∂x u)² + (∂y u)² over the whole batch.

    The two sums are returned apart because the ratio of a set is Σ E(x) / Σ E(ref), not a mean of ratios: add up both
    over the batches, then divide.

    Args:
        x: Restored images, (B, C, H, W), [0, 1].
        ref: Clean images, same shape.

    Returns:
        E(x) and E(ref), each a float64 scalar tensor.

    Raises:
        ValueError: The shapes differ.
    """
    _require_same_shape(x, ref, "gradient_energy_sums")
    return _gradient_energy(x), _gradient_energy(ref)


def _gradient_energy(u: Tensor) -> Tensor:
    u = u.double()
    return u.diff(dim=-1).square().sum() + u.diff(dim=-2).square().sum()


def gradient_energy(
    x_list: Sequence[Float[Tensor, "... _ _ _"]],
    ref_list: Sequence[Float[Tensor, "... _ _ _"]],
) -> float:
    """Gradient energy of a set of restored images as a share of that of the clean ones.

    Below 1 the restored images are too smooth, above 1 too rough; 1 says nothing about where the texture is.

    Args:
        x_list: Restored images, each (C, H, W) or (B, C, H, W), [0, 1]; sizes may differ from image to image.
        ref_list: Clean images in the same order, of the same sizes.

    Returns:
        Σ E(x) / Σ E(ref) over all images; NaN or infinite where every clean image is flat.

    Raises:
        ValueError: The lists differ in length, are empty, or a pair differs in shape.
    """
    if len(x_list) != len(ref_list) or not x_list:
        raise ValueError(
            f"gradient_energy: expected two non-empty lists of one length, got {len(x_list)} and {len(ref_list)} "
            "images; pass the restored and the clean images in the same order"
        )
    restored, clean = 0.0, 0.0
    for x, ref in zip(x_list, ref_list, strict=True):
        e_x, e_ref = gradient_energy_sums(_as_batch(x), _as_batch(ref))
        restored += float(e_x)
        clean += float(e_ref)
    if clean == 0:
        return math.nan if restored == 0 else math.inf
    return restored / clean


def _as_batch(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x[None]


def swd(
    x_list: Sequence[Float[Tensor, "... _ _ _"]],
    ref_list: Sequence[Float[Tensor, "... _ _ _"]],
    *,
    patches: int = SWD_PATCHES,
    projections: int = SWD_PROJECTIONS,
) -> float:
    """Sliced Wasserstein distance between the patches of two sets of images; lower is better, 0 for equal sets.

    | here | formula |
    |---|---|
    | `levels` | L_0, L_1, G_2: the Laplacian pyramid of each image (two band-pass levels and the low-pass rest) |
    | `p`, `q` | (n, 147): the same number n of 7×7×3 patches of either set at one level |
    | `directions` | θ_k: 128 unit vectors in R^147, Gaussian, seed 0 |

    SWD = mean over the 3 levels and over k of W1(θ_kᵀp, θ_kᵀq), and W1 of two equally long samples on a line is the
    mean absolute difference of the sorted values. Values keep pixel units: nothing is standardised.

    Patch positions are drawn evenly over all positions of all images of a set, with replacement. The draw depends only
    on the sizes, so paired sets are compared at the same places, and everything random is drawn on the CPU: the
    result does not depend on the device's generator.

    Args:
        x_list: Restored images, each (3, H, W) or (B, 3, H, W), [0, 1]; sizes may differ from image to image.
        ref_list: Clean images in the same form; their number and sizes may differ from those of `x_list`.
        patches: Patches of either set per level. Reported numbers use the default.
        projections: Directions. Reported numbers use the default.

    Returns:
        The distance in pixel units.

    Raises:
        ValueError: A list is empty, an image is not RGB, or a side is so short (under 25 pixels) that the coarsest
            level holds no 7×7 patch.
    """
    if patches < 1 or projections < 1:
        raise ValueError(f"swd: patches and projections must be at least 1, got {patches} and {projections}")
    generator = torch.Generator().manual_seed(SWD_SEED)
    directions = torch.randn(3 * SWD_PATCH**2, projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0, keepdim=True)).float()
    x_levels, ref_levels = _pyramids(x_list, "x_list"), _pyramids(ref_list, "ref_list")
    distances: list[float] = []
    for level in range(SWD_LEVELS):
        p = _sorted_projections(x_levels[level], directions, patches, SWD_SEED + 1 + level)
        q = _sorted_projections(ref_levels[level], directions, patches, SWD_SEED + 1 + level)
        distances.append(float((p - q).abs().mean(dtype=torch.float64)))
    return sum(distances) / SWD_LEVELS


def _pyramids(images: Sequence[Tensor], name: str) -> list[list[Tensor]]:
    """Laplacian pyramids of all images, as one list of (3, H, W) tensors per level."""
    if not images:
        raise ValueError(f"swd: {name} is empty; pass at least one image")
    levels: list[list[Tensor]] = [[] for _ in range(SWD_LEVELS)]
    for image in images:
        if image.ndim not in (3, 4) or image.shape[-3] != 3:
            raise ValueError(
                f"swd: expected (3, H, W) or (B, 3, H, W) tensors in {name}, got {tuple(image.shape)}; "
                "repeat a grey image three times"
            )
        if min(image.shape[-2:]) <= (SWD_PATCH - 1) * 2 ** (SWD_LEVELS - 1):
            raise ValueError(
                f"swd: expected sides of at least {(SWD_PATCH - 1) * 2 ** (SWD_LEVELS - 1) + 1} pixels in {name}, "
                f"got {tuple(image.shape[-2:])}; leave such small images out of the set"
            )
        current = _as_batch(image).float()
        for level in range(SWD_LEVELS - 1):
            coarse = _smooth(current)[..., ::2, ::2]
            levels[level].extend((current - _expand(coarse, current.shape[-2:])).unbind(0))
            current = coarse
        levels[-1].extend(current.unbind(0))
    return levels


def _smooth(x: Tensor) -> Tensor:
    """Binomial low-pass [1, 4, 6, 4, 1] / 16 along both axes, mirrored at the borders."""
    channels = x.shape[-3]
    kernel = x.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    x = F.conv2d(x, kernel.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


def _expand(coarse: Tensor, size: Sequence[int]) -> Tensor:
    """Back to `size` by zero insertion and the same low-pass.

    Mirroring about a border sample keeps the parity of positions, so a constant stays constant up to the edge.
    """
    fine = coarse.new_zeros(*coarse.shape[:-2], *size)
    fine[..., ::2, ::2] = coarse
    return 4 * _smooth(fine)


def _sorted_projections(images: Sequence[Tensor], directions: Tensor, patches: int, seed: int) -> Tensor:
    """Draw patches, project them, and sort every projection: (projections, patches)."""
    counts = torch.tensor([(u.shape[-2] - SWD_PATCH + 1) * (u.shape[-1] - SWD_PATCH + 1) for u in images])
    starts = counts.cumsum(0) - counts
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(int(counts.sum()), (patches,), generator=generator)
    owner = torch.searchsorted(starts, drawn, right=True) - 1
    projected: list[Tensor] = []
    for index, image in enumerate(images):
        place = (drawn[owner == index] - starts[index]).to(image.device)
        if place.numel() == 0:
            continue
        # A strided view: only the patches that were drawn are ever copied out of it.
        windows = image.unfold(1, SWD_PATCH, 1).unfold(2, SWD_PATCH, 1)
        columns = windows.shape[2]
        chosen = windows[:, place // columns, place % columns].transpose(0, 1).reshape(place.numel(), -1)
        projected.append(chosen @ directions.to(image.device))
    return torch.cat([block.cpu() for block in projected]).T.contiguous().sort(dim=1).values
