"""Synthetic degradations: the named ones that benchmarks use and the recipes that training draws from.

Everything is a pure function of (x, params, generator). A recipe is drawn first, as data, and applied second: a
degradation drawn is a `Degradation` of `degradation_steps`, whose steps are operations of `filters` and `jpeg`. Their
public names are public here too, so that a user of degradations needs this module alone.

| symbol | here | meaning |
| --- | --- | --- |
| x | `x` | clean image, (B, C, H, W), [0, 1] |
| y | return value of `apply` and `degrade` | degraded image, (B, C, H/s, W/s), [0, 1] |
| s | `scale` | integer downsampling factor |
| k | `kernel` | blur kernel, (k, k) or (B, k, k), sums to 1 |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.degradation_steps import (
    BlurStep,
    Degradation,
    JpegFunction,
    JpegStep,
    NoiseStep,
    PoissonStep,
    ResizeStep,
    RoundStep,
    Step,
    Summary,
    apply,
)
from latentindigo.filters import (
    Number,
    ResizeMode,
    add_gaussian_noise,
    add_poisson_noise,
    blur,
    gaussian_kernel,
    generalised_gaussian_kernel,
    plateau_kernel,
    resize,
    round8,
    sinc_kernel,
)
from latentindigo.jpeg import jpeg

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

Generators = torch.Generator | Sequence[torch.Generator]

MAX_BLUR = 3.2
MAX_NOISE = 30 / 255
MAX_POISSON = 3.0
MIN_QUALITY = 10


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
"""The named degradations, which tests, benchmark and command line share."""


def _per_image(generators: Generators, count: int) -> Sequence[torch.Generator]:
    if isinstance(generators, torch.Generator):
        return [generators] * count
    if len(generators) != count:
        raise ValueError(f"expected one generator or one per image, got {len(generators)} for {count} images")
    return generators


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
