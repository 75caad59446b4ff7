"""The saved networks around the lifting equations: INN, degradation encoder, stage-one estimate.

All three are ordinary diffusers models (``save_pretrained``, ``from_pretrained``, safetensors) and small. They compute
in the dtype of their weights, or of autocast, while the sums that carry the image stay in the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from latentindigo.lifting import ConditionedBlocks, LiftingStep, conv3x3, lift, unlift

__all__ = ["DegradationEncoder", "DegradationEstimate", "Estimator", "InvertibleNet"]

# The strongest degradations seen in training; they bring the three outputs of the degradation head to one scale.
_BLUR_UNIT = 3.2
_NOISE_UNIT = 30.0 / 255.0
_JPEG_UNIT = 1.0

_ESTIMATOR_LEVELS = (0, 1, 2)
_SMALLEST_ENCODER_INPUT = 8


class InvertibleNet(ModelMixin, ConfigMixin):
    """The invertible network g_Theta: image or latent <-> (coarse part, details), conditioned on gamma.

    One set of lifting steps serves every number of levels, hence x1 (levels 0), x2 (1) and x4 (2).

    Args:
        channels: Channels of the image (3) or of the latent.
        gamma_dim: Length d of the degradation embedding.
        hidden: Channels inside the predict and update networks.
        blocks: Residual blocks in each of them.
        num_steps: Number K of lifting steps.
        haar: Put a fixed Haar step before the learned ones.
        offset: Centre of the input range, taken off before the split and given back to the coarse part: 0.5 for
            pixels in [0, 1], 0 for latents. It keeps the networks' inputs centred; it changes no band of a wavelet.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        gamma_dim: int = 64,
        hidden: int = 32,
        blocks: int = 2,
        num_steps: int = 3,
        haar: bool = True,
        offset: float = 0.5,
    ) -> None:
        super().__init__()
        if min(channels, num_steps) < 1:
            raise ValueError(f"channels and num_steps must be at least 1, got {channels} and {num_steps}")
        self.steps = nn.ModuleList(LiftingStep(channels, hidden, blocks, gamma_dim) for _ in range(num_steps))

    def forward(
        self, x: Float[Tensor, "b c h w"], gamma: Float[Tensor, "#b d"], levels: int = 2
    ) -> tuple[Float[Tensor, "b c hc wc"], tuple[Tensor, ...]]:
        """Split an image into coarse part and details, [x_c, x_d] = g(x, gamma).

        Args:
            x: Image (B, C, H, W) in [0, 1], or latent; H and W multiples of 2**levels.
            gamma: Degradation embedding (B, d), or (1, d) for the whole batch.
            levels: Number of levels J; the coarse part is 2^J times smaller, 0 keeps the size.

        Returns:
            ``x_c`` (B, C, H/2^J, W/2^J) in the range of ``x``, and ``x_d``, a tuple of details, finest first.

        Raises:
            ValueError: If the channels, the size or gamma do not fit.
        """
        self._check(x, gamma)
        offset: float = self.config["offset"]
        x_c, x_d = lift(x - offset if offset else x, self._steps(), gamma, levels, self.config["haar"])
        return (x_c + offset if offset else x_c), x_d

    def inverse(
        self,
        x_c: Float[Tensor, "b c hc wc"],
        x_d: Sequence[Tensor],
        gamma: Float[Tensor, "#b d"],
        levels: int = 2,
    ) -> Float[Tensor, "b c h w"]:
        """Put an image together again, g^-1(x_c, x_d, gamma).

        Args:
            x_c: Coarse part (B, C, h, w), for instance the degraded image itself.
            x_d: Details as :meth:`forward` returns them.
            gamma: The same degradation embedding.
            levels: The same number of levels.

        Returns:
            Image (B, C, h * 2^J, w * 2^J).

        Raises:
            ValueError: If the channels, the details or gamma do not fit.
        """
        self._check(x_c, gamma)
        offset: float = self.config["offset"]
        x = unlift(x_c - offset if offset else x_c, x_d, self._steps(), gamma, levels, self.config["haar"])
        return x + offset if offset else x

    def _steps(self) -> list[LiftingStep]:
        return cast("list[LiftingStep]", list(self.steps))

    def _check(self, x: Tensor, gamma: Tensor) -> None:
        channels: int = self.config["channels"]
        if x.shape[1] != channels:
            raise ValueError(
                f"{channels} channels expected, got {x.shape[1]}; use the network trained for this kind of input"
            )
        _check_gamma(gamma, x.shape[0], self.config["gamma_dim"])


@dataclass(frozen=True)
class DegradationEstimate:
    """What the degradation encoder reports about a degraded image; tensors of shape (B,), all >= 0.

    Attributes:
        blur: Sigma of the Gaussian that blurs about as much, 0 to 3.2 in training.
        noise: Standard deviation of the noise, in units of the [0, 1] range.
        jpeg: (100 - quality) / 100, 0 for an uncompressed image.
    """

    blur: Tensor
    noise: Tensor
    jpeg: Tensor


class DegradationEncoder(ModelMixin, ConfigMixin):
    """The degradation encoder F: a degraded image of any size -> gamma.

    Means and standard deviations of the features of all three scales are pooled over the whole image: noise and
    compression show in the fine ones, blur in how the three compare.

    Args:
        gamma_dim: Length d of the degradation embedding.
        width: Channels at full resolution; doubled at each of the two halvings.
    """

    @register_to_config
    def __init__(self, gamma_dim: int = 64, width: int = 32) -> None:
        super().__init__()
        if min(gamma_dim, width) < 1:
            raise ValueError(f"gamma_dim and width must be at least 1, got {gamma_dim} and {width}")
        widths = (width, 2 * width, 4 * width)
        self.stages = nn.ModuleList()
        previous = 3
        for index, current in enumerate(widths):
            self.stages.append(
                nn.Sequential(
                    conv3x3(previous, current, stride=1 if index == 0 else 2),
                    nn.ReLU(),
                    conv3x3(current, current),
                    nn.ReLU(),
                )
            )
            previous = current
        hidden = 2 * gamma_dim
        self.mlp = nn.Sequential(
            nn.Linear(2 * sum(widths), hidden),
            nn.ReLU(),
            nn.Linear(hidden, gamma_dim),
            # A bounded embedding: an unusually damaged image cannot drive the networks it conditions out of range.
            nn.LayerNorm(gamma_dim),
        )
        self.head = nn.Linear(gamma_dim, 3)
        units = torch.tensor([_BLUR_UNIT, _NOISE_UNIT, _JPEG_UNIT])
        self.register_buffer("units", units, persistent=False)

    def forward(self, y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Describe the degradation of an image, gamma = F(y).

        Args:
            y: Degraded image (B, 3, h, w) in [0, 1], any h, w >= 1.

        Returns:
            Degradation embedding (B, gamma_dim).

        Raises:
            ValueError: If the image does not have 3 channels.
        """
        _check_rgb(y)
        height, width = y.shape[-2:]
        dtype = self.head.weight.dtype
        h = _pad_to(y, max(height, _SMALLEST_ENCODER_INPUT), max(width, _SMALLEST_ENCODER_INPUT)) - 0.5
        h = h.to(dtype=dtype, memory_format=torch.channels_last)
        statistics: list[Tensor] = []
        for stage in self.stages:
            h = stage(h)
            # Pooled in float32: bfloat16 would lose the small variances that tell noise levels apart.
            features = h if h.dtype == torch.float64 else h.float()
            variance, mean = torch.var_mean(features, dim=(-2, -1), correction=0)
            statistics += [mean, (variance + 1e-6).sqrt()]
        return self.mlp(torch.cat(statistics, dim=1).to(dtype))

    def estimate(self, gamma: Float[Tensor, "b d"]) -> DegradationEstimate:
        """Read the strength of blur, noise and compression off an embedding.

        Args:
            gamma: Degradation embedding (B, d) from :meth:`forward`.

        Returns:
            Blur, noise and JPEG strength, each (B,) and never negative.

        Raises:
            ValueError: If gamma has another length.
        """
        _check_gamma(gamma, gamma.shape[0], self.config["gamma_dim"])
        raw = self.head(gamma.to(self.head.weight.dtype))
        blur, noise, jpeg = (F.softplus(raw) * self.units.to(raw.dtype)).unbind(dim=1)
        return DegradationEstimate(blur=blur, noise=noise, jpeg=jpeg)


class Estimator(ModelMixin, ConfigMixin):
    """The stage-one estimate: a small regression network that sampling can start from.

    Its body always runs at a quarter of the output size, whatever the scale, so that one body serves x1, x2 and x4 at
    the same cost per output pixel. Its last convolution starts at zero: untrained, it is a bicubic enlargement.

    Args:
        width: Channels of the body.
        blocks: Residual blocks, each conditioned on gamma.
        gamma_dim: Length d of the degradation embedding.
    """

    @register_to_config
    def __init__(self, width: int = 64, blocks: int = 8, gamma_dim: int = 64) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"a width that is a multiple of 4 expected, got {width}")
        # One input convolution per number of levels, for the 48, 12 or 3 channels that pixel-unshuffling leaves.
        self.inputs = nn.ModuleList(conv3x3(3 * 4 ** (2 - levels), width) for levels in _ESTIMATOR_LEVELS)
        self.body = ConditionedBlocks(width, blocks, gamma_dim)
        self.up = nn.Sequential(
            conv3x3(width, 2 * width),
            nn.PixelShuffle(2),
            nn.ReLU(),
            conv3x3(width // 2, width),
            nn.PixelShuffle(2),
            nn.ReLU(),
        )
        self.tail = conv3x3(width // 4, 3)
        nn.init.zeros_(self.tail.weight)
        if self.tail.bias is not None:
            nn.init.zeros_(self.tail.bias)

    def forward(
        self, y: Float[Tensor, "b c h w"], gamma: Float[Tensor, "#b d"], levels: int = 2
    ) -> Float[Tensor, "b 3 hx wx"]:
        """Estimate the clean image.

        Args:
            y: Degraded image (B, 3, h, w) in [0, 1], any size.
            gamma: Degradation embedding (B, d), or (1, d) for the whole batch.
            levels: Scale as a power of two: 0, 1 or 2.

        Returns:
            Estimate (B, 3, h * 2^levels, w * 2^levels), not clamped.

        Raises:
            ValueError: If ``levels`` is not 0, 1 or 2, or the channels or gamma do not fit.
        """
        _check_rgb(y)
        if levels not in _ESTIMATOR_LEVELS:
            raise ValueError(f"levels 0, 1 or 2 expected, got {levels}; enlarge further in several passes")
        _check_gamma(gamma, y.shape[0], self.config["gamma_dim"])
        height, width = y.shape[-2:]
        dtype = self.tail.weight.dtype
        size = (height * 2**levels, width * 2**levels)
        base = F.interpolate(y, size=size, mode="bicubic", antialias=True) if levels else y

        block = 2 ** (2 - levels)
        h = _pad_to(y, -(-height // block) * block, -(-width // block) * block)
        h = F.pixel_unshuffle(h - 0.5, block) if block > 1 else h - 0.5
        h = self.inputs[levels](h.to(dtype=dtype, memory_format=torch.channels_last))
        h = self.body(h, gamma.to(dtype))
        residual = self.tail(self.up(h))
        return base + residual[..., : size[0], : size[1]].to(base.dtype)


def _pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Replicate the last rows and columns until an image has the given size."""
    bottom, right = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def _check_rgb(y: Tensor) -> None:
    if y.shape[1] != 3:
        raise ValueError(f"3 channels (RGB) expected, got {y.shape[1]}; repeat a grey image's channel three times")


def _check_gamma(gamma: Tensor, batch: int, gamma_dim: int) -> None:
    if gamma.ndim != 2 or gamma.shape[0] not in (1, batch) or gamma.shape[1] != gamma_dim:
        raise ValueError(
            f"gamma of shape ({batch}, {gamma_dim}) or (1, {gamma_dim}) expected, got {tuple(gamma.shape)}; "
            "take it from the degradation encoder that was trained with this network"
        )
