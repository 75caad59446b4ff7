"""What every restoration has to be compared with: the contract of a restorer, the simple ones, and the true operators.

`Restorer` is the one contract of a comparison: a degraded batch in, a restored one out. The simple restorers here, the
published rivals of `latentindigo.rivals` and the pipeline itself (`Pipeline`) meet it, and so does any class of yours
that defines what it says.

A rival that is not blind has to be told what happened to the image. `true_operator` and `true_noise` tell the truth
about a standard degradation, `operators.Scale` tells it no more than the size:

    LatentDPS(pipe.prior, true_operator("medium"), noise=true_noise("medium"))     # knows the blur
    LatentDPS(pipe.prior, Scale(4))                                                # believes in plain bicubic
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.canvas import pad_to
from latentindigo.degradations import STANDARD, BlurStep, StandardDegradation
from latentindigo.images import pil_resize
from latentindigo.operators import Blur, Operator, Scale
from latentindigo.pipeline import RestorationOutput, RestorationPipeline
from latentindigo.presets import blend_presets
from latentindigo.prior import LatentPrior
from latentindigo.solver import damped_inverse

__all__ = [
    "Bicubic",
    "Downsampled",
    "EstimatorAlone",
    "Lanczos",
    "Pipeline",
    "Restorer",
    "RoundTrip",
    "true_noise",
    "true_operator",
]


@runtime_checkable
class Restorer(Protocol):
    """What a method MUST offer to be compared; one class in one file is enough.

    - A call MUST NOT change its arguments, the networks it uses, or the restorer.
    - The same y, scale and seeds MUST give the same output; an image MUST come out alone as it does in a batch, up to
      rounding. So all randomness MUST come from generators made of the seeds, one per image.
    - It MUST use nothing of the clean image. What it is told of the degradation, and every setting, is fixed when it is
      made, so that the call's arguments are all that differs between two images.
    - `nfe` MUST be the exact number of denoiser evaluations per image, 0 without a denoiser.
    """

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    @property
    def nfe(self) -> int:
        """Denoiser evaluations per image."""
        ...

    def __call__(self, y: Float[Tensor, "b 3 h w"], scale: int, seeds: Sequence[int]) -> Float[Tensor, "b 3 h2 w2"]:
        """Restore a batch.

        Args:
            y: Degraded images, RGB, float in [0, 1].
            scale: Output size over input size.
            seeds: One per image.

        Returns:
            Restored images in [0, 1], exactly `scale` times as large.
        """
        ...


# ----------------------------------------------------------------------------------------------------- simple restorers


class _WithoutDenoiser:
    @property
    def nfe(self) -> int:
        """Denoiser evaluations per image: none."""
        return 0


@dataclass(frozen=True)
class Bicubic(_WithoutDenoiser):
    """Pillow's bicubic enlargement; at scale 1 the image as it is."""

    name: str = "bicubic"
    _method: ClassVar[str] = "bicubic"

    def __call__(
        self, y: Float[Tensor, "b 3 h w"], scale: int, seeds: Sequence[int] = ()
    ) -> Float[Tensor, "b 3 h2 w2"]:
        """Enlarge a batch, see `Restorer`; seeds are not used."""
        return pil_resize(y, (y.shape[-1] * scale, y.shape[-2] * scale), self._method).clamp(0, 1)


@dataclass(frozen=True)
class Lanczos(Bicubic):
    """Pillow's Lanczos enlargement."""

    name: str = "lanczos"
    _method: ClassVar[str] = "lanczos"


@dataclass(frozen=True)
class RoundTrip(_WithoutDenoiser):
    """D(E(x)) of the bicubic enlargement; of clean images at scale 1, the ceiling of every method on this autoencoder.

    Attributes:
        prior: The latent diffusion model.
        name: Name in tables.
    """

    prior: LatentPrior
    name: str = "round-trip"

    @torch.no_grad()
    def __call__(
        self, y: Float[Tensor, "b 3 h w"], scale: int, seeds: Sequence[int] = ()
    ) -> Float[Tensor, "b 3 h2 w2"]:
        """Encode and decode a batch, see `Restorer`; seeds are not used."""
        x = Bicubic()(y, scale).to(self.prior.device)
        (height, width), multiple = x.shape[-2:], self.prior.downsampling
        padded = pad_to(x, -(-width // multiple) * multiple, -(-height // multiple) * multiple)
        return self.prior.decode(self.prior.encode(padded))[..., :height, :width].clamp(0, 1).to(y)


@dataclass(frozen=True)
class EstimatorAlone(_WithoutDenoiser):
    """The pipeline's stage-one estimate without any sampling; scale 1, 2 or 4.

    Attributes:
        pipe: A pipeline with an estimator.
        name: Name in tables.
    """

    pipe: RestorationPipeline
    name: str = "estimator"

    def __post_init__(self) -> None:
        if self.pipe.estimator is None:
            raise ValueError("a pipeline with a stage-one estimator expected, this one has none; use Bicubic")

    @torch.no_grad()
    def __call__(
        self, y: Float[Tensor, "b 3 h w"], scale: int, seeds: Sequence[int] = ()
    ) -> Float[Tensor, "b 3 h2 w2"]:
        """Estimate a batch, see `Restorer`; seeds are not used."""
        if scale not in (1, 2, 4):
            raise ValueError(f"the estimator restores at scale 1, 2 or 4, got {scale}; use Pipeline for others")
        estimator, encoder = self.pipe.estimator, self.pipe.degradation_encoder
        gamma = encoder(y.to(encoder.device, encoder.dtype)).to(estimator.dtype)
        x = estimator(y.to(estimator.device), gamma, round(math.log2(scale)))
        return x.to(y).clamp(0, 1)


class Pipeline:
    """The pipeline with fixed settings, of one sample per image.

    Args:
        pipe: The pipeline.
        name: Name in tables.
        **settings: Arguments of its call other than image, scale, size, seed, number of samples and output type.
    """

    def __init__(self, pipe: RestorationPipeline, name: str = "latentindigo", **settings: Any) -> None:
        taken = sorted({"image", "scale", "size", "crop", "seed", "num_samples", "output_type"} & set(settings))
        if taken:
            raise ValueError(f"settings of the pipeline expected, got {', '.join(taken)}, which a comparison sets")
        self.pipe, self.name, self.settings = pipe, name, settings

    @property
    def nfe(self) -> int:
        """The steps of one pass; scales above 8 take several passes."""
        if self.settings.get("steps") is not None:
            return self.settings["steps"]
        presets, fidelity = self.pipe.presets, self.settings.get("fidelity")
        if fidelity is not None:
            return blend_presets(presets["vivid"], presets["faithful"], fidelity).steps
        return presets[self.settings.get("preset", "default")].steps

    def output(self, y: Float[Tensor, "b 3 h w"], scale: int, seeds: Sequence[int]) -> RestorationOutput:
        """Restore a batch and return everything that the pipeline tells, network calls among it."""
        return self.pipe(y, float(scale), seed=list(seeds), output_type="pt", **self.settings)

    def __call__(self, y: Float[Tensor, "b 3 h w"], scale: int, seeds: Sequence[int]) -> Float[Tensor, "b 3 h2 w2"]:
        """Restore a batch, see `Restorer`."""
        return torch.stack(list(self.output(y, scale, seeds).images)).to(y)


# ------------------------------------------------------------------------------------------------------- true operators


class Downsampled:
    """Blur with a known kernel, then bicubic downsampling (Pillow's, antialiased); meets `operators.Operator`.

    Args:
        kernel: (k, l), both odd, summing to 1; None = no blur.
        scale: Size of x divided by size of y.
    """

    # The same meaning of noise as in `operators`: trust is half where noise is as large as an estimate's usual error;
    # a blur removes frequencies that an 8-bit y no longer holds, so that some damping stays.
    _ESTIMATE_ERROR = 0.1
    _BLUR_FLOOR = 3e-4

    def __init__(self, kernel: Tensor | None, scale: int) -> None:
        self._blur = None if kernel is None else Blur(kernel)
        self._resize = None if scale == 1 else Scale(scale)
        self._scale = scale

    @property
    def scale(self) -> int:
        """Size of x divided by size of y."""
        return self._scale

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return A x: blurred, then downsampled."""
        blurred = x if self._blur is None else self._blur.forward(x)
        return blurred if self._resize is None else self._resize.forward(blurred)

    def adjoint(self, y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return A^T y: the transposes in reverse order."""
        spread = y if self._resize is None else self._resize.adjoint(y)
        return spread if self._blur is None else self._blur.adjoint(spread)

    def pinv(self, y: Float[Tensor, "b c h w"], noise: float | int = 0.0) -> Float[Tensor, "b c h2 w2"]:
        """Return A^T (A A^T + lambda I)^-1 y.

        Args:
            y: Small image or residual, (B, C, h, w).
            noise: Standard deviation of the noise in y, in [0, 1] units; with a blur lambda stays above 0 even at 0.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: If the noise is negative.
        """
        if noise < 0:
            raise ValueError(f"noise must be a standard deviation >= 0 in [0, 1] units, got {noise}")
        floor = 0.0 if self._blur is None else self._BLUR_FLOOR
        # The mean of s² pixels has 1/s² of their energy, so that is the size of A A^T.
        return damped_inverse(self, y, max(floor, (noise / self._ESTIMATE_ERROR) ** 2) / self._scale**2)

    def project(
        self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h2 w2"], noise: float | int = 0.0
    ) -> Float[Tensor, "b c h w"]:
        """Return x + A^+ (y - A x)."""
        return x + self.pinv(y - self.forward(x), noise)

    def initial(self, y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return y enlarged by bicubic interpolation; at scale 1, deblurred as `operators.Blur` does."""
        if self._resize is not None:
            return self._resize.initial(y)
        return y if self._blur is None else self._blur.initial(y)


def _standard(name: str) -> StandardDegradation:
    if name not in STANDARD:
        raise ValueError(f"unknown degradation {name!r}; known: {', '.join(STANDARD)}")
    if STANDARD[name].second_order:
        raise ValueError(
            f"degradation {name!r} draws a chain of operations anew for each image, so no one operator is the truth; "
            "tell a rival operators.Scale, or compare blind methods only"
        )
    return STANDARD[name]


def true_operator(name: str) -> Operator:
    """What a standard degradation does before noise, rounding and JPEG, as an operator.

    Args:
        name: A name of `degradations.STANDARD` with one blur.

    Returns:
        Its blur and its downsampling; the identity where it has neither.

    Raises:
        ValueError: If the name is unknown, or the degradation is drawn anew for each image.
    """
    degradation = _standard(name)
    # Asked of the recipe, which alone knows the size of its kernel; only the second-order recipe draws anything.
    steps = degradation.params(torch.Generator()).steps
    kernel = next((step.kernel for step in steps if isinstance(step, BlurStep)), None)
    return Downsampled(kernel, degradation.scale)


def true_noise(name: str) -> float:
    """Standard deviation of the noise that a standard degradation adds, [0, 1] units; JPEG's error is not in it.

    Args:
        name: A name of `degradations.STANDARD` with one noise level.

    Returns:
        sigma_n.

    Raises:
        ValueError: As `true_operator`.
    """
    return _standard(name).noise / 255
