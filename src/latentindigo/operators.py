"""Known degradation operators for non-blind restoration: blur with a known kernel, missing pixels, downsampling.

An operator takes the place of the network's coarse branch: `forward` gives the coarse part of an estimate, `project`
its range-null-space step.

| symbol | here | meaning |
| --- | --- | --- |
| A | `forward` | linear operator, x -> y |
| A^T | `adjoint` | its exact transpose, <A x, y> = <x, A^T y> |
| A^+ | `pinv` | A^T (A A^T + lambda I)^-1, the regularised pseudo-inverse |
| lambda | `_damping` | grows with the noise in y, so that a noisy y is followed only as far as it can be trusted |
| x_inv | `project` | x + A^+ (y - A x): the estimate, with what y measured put in |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["Blur", "Mask", "Operator", "Scale", "conjugate_gradients"]

Images = Float[Tensor, "b c h w"]
OtherImages = Float[Tensor, "b c h2 w2"]

# How far an estimate's coarse part is typically off, in [0, 1] units: y is trusted fully while its noise is well below
# this, and half at the same size.
_ESTIMATE_ERROR = 0.1


@runtime_checkable
class Operator(Protocol):
    """What a known operator MUST offer; `Blur`, `Mask` and `Scale` do.

    `forward` MUST be linear and differentiable, `adjoint` its exact transpose, and neither may change its argument.
    """

    @property
    def scale(self) -> float | int:
        """Size of x divided by size of y."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """Return A x."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y."""
        ...

    def pinv(self, y: Tensor, noise: float | int = 0.0) -> Tensor:
        """Return A^+ y."""
        ...

    def project(self, x: Tensor, y: Tensor, noise: float | int = 0.0) -> Tensor:
        """Return x + A^+ (y - A x)."""
        ...

    def initial(self, y: Tensor) -> Tensor:
        """Return an image in [0, 1] to start from."""
        ...


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor],
    rhs: Images,
    precondition: Callable[[Tensor], Tensor] | None = None,
    *,
    iterations: int = 100,
    tolerance: float | None = None,
) -> Images:
    """Solve M u = rhs for symmetric positive definite M by (preconditioned) conjugate gradients, image by image.

    Args:
        normal: u -> M u, acting on each image of the batch alone.
        rhs: Right-hand sides, (B, C, H, W).
        precondition: An approximation of M^-1, symmetric positive definite.
        iterations: Most iterations.
        tolerance: Relative residual at which an image is done; None means 1e-5 in float32 and 1e-10 in float64.

    Returns:
        Solutions of the shape of `rhs`.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(1, 2, 3), keepdim=True)

    if tolerance is None:
        tolerance = max(1e-10, 100 * torch.finfo(rhs.dtype).eps)
    solve = precondition or (lambda r: r)
    goal = tolerance**2 * dot(rhs, rhs)
    solution, residual = torch.zeros_like(rhs), rhs
    direction = solve(residual)
    energy = dot(residual, direction)
    for _ in range(iterations):
        # An image that is done stands still, so its result does not depend on the company it has in the batch.
        active = dot(residual, residual) > goal
        if not bool(active.any()):
            break
        image = normal(direction)
        curvature = dot(direction, image)
        step = torch.where(active & (curvature > 0), energy / curvature.clamp_min(torch.finfo(rhs.dtype).tiny), 0.0)
        solution = solution + step * direction
        residual = residual - step * image
        preconditioned = solve(residual)
        new_energy = dot(residual, preconditioned)
        ratio = torch.where(active, new_energy / energy.clamp_min(torch.finfo(rhs.dtype).tiny), 0.0)
        direction = preconditioned + ratio * direction
        energy = new_energy
    return solution


def _damping(noise: float | int, floor: float, gain: float) -> float:
    """Return lambda = gain * max(floor, (noise / estimate error)^2); `gain` is the largest eigenvalue of A A^T."""
    if noise < 0:
        raise ValueError(f"noise must be a standard deviation >= 0 in [0, 1] units, got {noise}")
    return gain * max(floor, (noise / _ESTIMATE_ERROR) ** 2)


def _regularised_inverse(
    operator: Operator,
    y: Tensor,
    damping: float,
    precondition: Callable[[Tensor], Tensor] | None = None,
    iterations: int = 100,
) -> Tensor:
    """Return A^T (A A^T + lambda I)^-1 y."""

    def normal(u: Tensor) -> Tensor:
        return operator.forward(operator.adjoint(u)) + damping * u

    return operator.adjoint(conjugate_gradients(normal, y, precondition, iterations=iterations))


def _project(operator: Operator, x: Tensor, y: Tensor, noise: float | int) -> Tensor:
    predicted = operator.forward(x)
    if predicted.shape[-2:] != y.shape[-2:]:
        raise ValueError(
            f"the operator maps {tuple(x.shape[-2:])} to {tuple(predicted.shape[-2:])}, but y is "
            f"{tuple(y.shape[-2:])}; give both images the sizes that the operator connects"
        )
    return x + operator.pinv(y - predicted, noise)


def _working(x: Tensor) -> Tensor:
    """Return x in at least float32: half precision is too coarse to iterate in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Blur
# ---------------------------------------------------------------------------------------------------------------------


def _mirror(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x, (columns, columns, rows, rows), mode="reflect")


def _fold(x: Tensor, margin: int, dim: int) -> Tensor:
    """Add the mirrored margins of one dimension back to where they came from: the transpose of mirroring."""
    if margin == 0:
        return x
    size = x.shape[dim] - 2 * margin
    inner = x.narrow(dim, margin, size)
    before = x.narrow(dim, 0, margin).flip(dim)
    after = x.narrow(dim, margin + size, margin).flip(dim)
    pad = [0, 0, 0, 0]
    low, high = (2, 3) if dim == -2 else (0, 1)
    first, last = list(pad), list(pad)
    first[low], first[high] = 1, size - 1 - margin
    last[low], last[high] = size - 1 - margin, 1
    return inner + F.pad(before, first) + F.pad(after, last)


@dataclass(frozen=True, eq=False)
class Blur:
    """Convolution with a known kernel, mirrored at the borders; x and y have one size.

    Attributes:
        kernel: (k, l), both odd, summing to 1.
        iterations: Most iterations of `pinv`. After 40 the image is within 1 dB of the limit, for most kernels far
            closer; what converges later are frequencies that the blur has all but removed.
    """

    kernel: Tensor
    iterations: int = 40

    def __post_init__(self) -> None:
        kernel = self.kernel
        if self.iterations < 1:
            raise ValueError(f"Blur needs at least one iteration, got {self.iterations}")
        if kernel.ndim != 2 or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
            raise ValueError(f"Blur needs a kernel (k, l) of odd sides, got {tuple(kernel.shape)}; pad it with zeros")
        total = float(kernel.sum())
        if not abs(total - 1) < 1e-3:
            raise ValueError(f"Blur needs a kernel that sums to 1, got {total:.4g}; pass kernel / kernel.sum()")
        # A private copy: the caller may go on using the tensor.
        object.__setattr__(self, "kernel", kernel.detach().clone())

    @property
    def scale(self) -> int:
        """Size of x divided by size of y: 1."""
        return 1

    def _correlate(self, x: Tensor, kernel: Tensor) -> Tensor:
        channels = x.shape[1]
        weight = kernel.to(x).expand(channels, 1, *kernel.shape)
        return F.conv2d(x, weight, groups=channels)

    def _check(self, x: Tensor) -> None:
        rows, columns = self.kernel.shape
        if x.shape[-2] <= rows // 2 or x.shape[-1] <= columns // 2:
            raise ValueError(
                f"an image of {tuple(x.shape[-2:])} pixels is too small for a blur of {rows}x{columns}; "
                f"it needs more than {rows // 2}x{columns // 2}"
            )

    def forward(self, x: Images) -> Images:
        """Return the convolution of x with the kernel."""
        self._check(x)
        rows, columns = self.kernel.shape
        return self._correlate(_mirror(x, rows // 2, columns // 2), self.kernel.flip(0, 1))

    def adjoint(self, y: Images) -> Images:
        """Return A^T y: spread every pixel over the kernel, then fold the margins back."""
        self._check(y)
        rows, columns = self.kernel.shape
        spread = self._correlate(F.pad(y, (columns - 1, columns - 1, rows - 1, rows - 1)), self.kernel)
        return _fold(_fold(spread, rows // 2, -2), columns // 2, -1)

    def pinv(self, y: Images, noise: float | int = 0.0) -> Images:
        """Return A^T (A A^T + lambda I)^-1 y by conjugate gradients, preconditioned by the Wiener filter.

        Args:
            y: Blurred image or residual, (B, C, H, W).
            noise: Standard deviation of the noise in y, in [0, 1] units. Even at 0 lambda stays at 3e-4, a little
                more than the rounding of an 8-bit y asks for: a blur removes frequencies that y no longer holds.

        Returns:
            (B, C, H, W).
        """
        work = _working(y)
        damping = _damping(noise, 3e-4, 1.0)
        size = tuple(work.shape[-2:])
        # On a torus A A^T is diagonal in frequency; with mirrored borders it nearly is.
        spectrum = torch.fft.rfft2(self.kernel.to(work), s=size).abs() ** 2 + damping

        def wiener(r: Tensor) -> Tensor:
            return torch.fft.irfft2(torch.fft.rfft2(r) / spectrum, s=size)

        return _regularised_inverse(self, work, damping, wiener, self.iterations).to(y.dtype)

    def project(self, x: Images, y: OtherImages, noise: float | int = 0.0) -> Images:
        """Return x + A^+ (y - A x)."""
        return _project(self, x, y, noise)

    def initial(self, y: Images) -> Images:
        """Return the Wiener-filtered image: y plus the regularised inverse of what blurring y once more removes."""
        return self.project(y, y, noise=0.01).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Mask
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mask:
    """Missing pixels: y = m * x.

    Attributes:
        mask: 1 where the pixel is known, 0 where it is missing; (H, W), (C, H, W) or (B, C, H, W) with sizes 1 for what
            is shared.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        mask = self.mask.detach()
        if not 2 <= mask.ndim <= 4:
            raise ValueError(f"Mask needs a mask (H, W), (C, H, W) or (B, C, H, W), got {tuple(mask.shape)}")
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)).to(torch.float32, copy=True)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("Mask needs a mask of zeros (missing) and ones (known); pass mask > 0.5")
        object.__setattr__(self, "mask", mask)

    @property
    def scale(self) -> int:
        """Size of x divided by size of y: 1."""
        return 1

    def forward(self, x: Images) -> Images:
        """Return x with the missing pixels set to 0."""
        if x.shape[-2:] != self.mask.shape[-2:]:
            raise ValueError(
                f"the mask is {tuple(self.mask.shape[-2:])} pixels, the image {tuple(x.shape[-2:])}; "
                "bring the mask to the image's size with nearest-neighbour resizing"
            )
        return x * self.mask.to(x)

    def adjoint(self, y: Images) -> Images:
        """Return A^T y, which is A y."""
        return self.forward(y)

    def pinv(self, y: Images, noise: float | int = 0.0) -> Images:
        """Return A^T (A A^T + lambda I)^-1 y = m y / (1 + lambda); exact, and lambda is 0 without noise.

        Args:
            y: Masked image or residual, (B, C, H, W); what it holds under the mask does not matter.
            noise: Standard deviation of the noise in y, in [0, 1] units.

        Returns:
            (B, C, H, W).
        """
        return self.forward(y) / (1 + _damping(noise, 0.0, 1.0))

    def project(self, x: Images, y: OtherImages, noise: float | int = 0.0) -> Images:
        """Return x + A^+ (y - A x): the known pixels of y, the others of x."""
        known = self.mask.to(x)
        trust = 1 / (1 + _damping(noise, 0.0, 1.0))
        if x.shape[-2:] != y.shape[-2:]:
            raise ValueError(f"x and y need one size, got {tuple(x.shape[-2:])} and {tuple(y.shape[-2:])}")
        # Written as a selection, so that trusted pixels come out bit for bit.
        mixed = y if trust == 1 else x + trust * (y - x)
        return torch.where((known > 0).expand_as(x), mixed, x)

    def initial(self, y: Images) -> Images:
        """Return y with its holes filled smoothly from the nearest scale that has known pixels."""
        work = _working(y)
        known = self.mask.to(work).expand_as(work)
        filled = _push_pull(work * known, known)
        # The pyramid leaves block edges inside the holes; a few averaging steps there remove them.
        for _ in range(16):
            smooth = F.avg_pool2d(F.pad(filled, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
            filled = torch.where(known > 0, work, smooth)
        return filled.clamp(0, 1).to(y.dtype)


def _push_pull(values: Tensor, weights: Tensor) -> Tensor:
    """Fill pixels of weight 0 from the average of the known ones, by way of half-size copies; grey if none is known."""
    height, width = values.shape[-2:]
    if max(height, width) == 1:
        return torch.where(weights > 0, values / weights.clamp_min(1e-6), 0.5)
    pad = (0, width % 2, 0, height % 2)
    # Padding brings no weight, so odd sizes do not drag the border towards black.
    small_values, small_weights = (F.avg_pool2d(F.pad(t, pad), 2) for t in (values, weights))
    norm = small_weights.clamp_min(1e-6)
    coarse_known = (small_weights > 0).to(values)
    coarse = _push_pull(small_values / norm * coarse_known, coarse_known)
    up = F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)[..., :height, :width]
    return torch.where(weights > 0, values, up)


# ---------------------------------------------------------------------------------------------------------------------
# Scale
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _bicubic_matrix(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return Pillow's bicubic resampling (antialiased, a = -0.5) of one dimension as a (size_out, size_in) matrix."""
    # Kept for later calls, so it must be an ordinary tensor even if the first call comes in inference mode: autograd
    # refuses inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(size_in, dtype=dtype, device=device)[None, None]
        size = (size_out, size_in)
        return F.interpolate(identity, size=size, mode="bicubic", align_corners=False, antialias=True)[0, 0]


@dataclass(frozen=True)
class Scale:
    """Downsampling by bicubic interpolation with antialiasing (Pillow's), separable: A x = R_h x R_w^T.

    Attributes:
        scale: Size of x divided by size of y, at least 1; need not be an integer.
    """

    scale: float | int

    def __post_init__(self) -> None:
        if not self.scale >= 1:
            raise ValueError(f"Scale needs a factor of at least 1, got {self.scale}")

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        sizes = []
        for size in x.shape[-2:]:
            small = max(1, round(size / self.scale))
            if round(small * self.scale) != size:
                raise ValueError(
                    f"an image side of {size} pixels does not match scale {self.scale}; "
                    f"resize or crop it to {round(small * self.scale)}"
                )
            sizes.append(small)
        return sizes[0], sizes[1]

    def _matrices(self, large: tuple[int, int], small: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        rows, columns = (_bicubic_matrix(a, b, dtype, like.device) for a, b in zip(large, small, strict=True))
        return rows.to(like), columns.to(like)

    def forward(self, x: Images) -> OtherImages:
        """Return x downsampled."""
        small = self._sizes(x)
        rows, columns = self._matrices((x.shape[-2], x.shape[-1]), small, x)
        return rows @ x @ columns.T

    def adjoint(self, y: OtherImages) -> Images:
        """Return A^T y, of size round(scale * size of y)."""
        small = (y.shape[-2], y.shape[-1])
        rows, columns = self._matrices((round(small[0] * self.scale), round(small[1] * self.scale)), small, y)
        return rows.T @ y @ columns

    def pinv(self, y: OtherImages, noise: float | int = 0.0) -> Images:
        """Return A^T (A A^T + lambda I)^-1 y by conjugate gradients.

        Args:
            y: Small image or residual, (B, C, h, w).
            noise: Standard deviation of the noise in y, in [0, 1] units; at 0 lambda is 0, since A A^T is well
                conditioned.

        Returns:
            (B, C, H, W).
        """
        work = _working(y)
        # The mean of s^2 pixels has 1/s^2 of their energy, so that is the size of A A^T.
        return _regularised_inverse(self, work, _damping(noise, 0.0, 1 / self.scale**2)).to(y.dtype)

    def project(self, x: Images, y: OtherImages, noise: float | int = 0.0) -> Images:
        """Return x + A^+ (y - A x)."""
        return _project(self, x, y, noise)

    def initial(self, y: OtherImages) -> Images:
        """Return y enlarged by bicubic interpolation."""
        size = [round(side * self.scale) for side in y.shape[-2:]]
        work = _working(y)
        return (
            F.interpolate(work, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1).to(y.dtype)
        )
