"""The saved networks around the lifting equations: INN, degradation encoder, stage-one estimate.

All three are ordinary diffusers models (`save_pretrained`, `from_pretrained`, safetensors) and small. They compute
in the dtype of their weights, or of autocast, while the sums that carry the image stay in the dtype of the input.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from latentindigo.filters import dct_matrix
from latentindigo.lifting import (
    BandMix,
    CoarseGain,
    ConditionedBlocks,
    ConditionedConvNet,
    LiftingStep,
    conv3x3,
    lift,
    unlift,
)
from latentindigo.offloading import entry, execution_device
from latentindigo.traces import TRACES, traces

__all__ = ["VIEWS", "DegradationEncoder", "DegradationEstimate", "Estimator", "InvertibleNet"]

VIEWS = 8
"""Views of an image: transposed or not, flipped along either axis or not."""

# The strongest degradations seen in training; they bring the three outputs of the degradation head to one scale.
_BLUR_UNIT = 3.2
_NOISE_UNIT = 30.0 / 255.0
_JPEG_UNIT = 1.0

_ESTIMATOR_LEVELS = (0, 1, 2)
_SMALLEST_ENCODER_INPUT = 8
_STATISTICS = 5  # What `_Pool` gives for each channel.
_STRIP_PIXELS = 512 * 1024  # Of y that F looks at in one go; a larger image comes in strips.
_STRIP_GRID = 16  # Rows of y to a cell of the coarsest scale.
_STRIP_HALO = 16  # Rows beyond a strip, a multiple of 4; the three scales look 11 rows far.


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
        mix: Give every decimated level a learned linear map of its bands, for latents.
        gain: Give the coarse part a gain per channel that depends on gamma, for latents.
        spread: Also learn how far the latent of an estimate lies from the true one, see `spread`.
    """

    _supports_gradient_checkpointing = True

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
        mix: bool = False,
        gain: bool = False,
        spread: bool = False,
    ) -> None:
        super().__init__()
        if min(channels, num_steps) < 1:
            raise ValueError(f"channels and num_steps must be at least 1, got {channels} and {num_steps}")
        self.steps = nn.ModuleList(LiftingStep(channels, hidden, blocks, gamma_dim) for _ in range(num_steps))
        self.band_mix = BandMix(channels) if mix else None
        self.coarse_gain = CoarseGain(channels, gamma_dim) if gain else None
        self.detail_spread = ConditionedConvNet(channels, channels, hidden, blocks, gamma_dim) if spread else None

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        gamma: Float[Tensor, "#b d"],
        levels: int = 2,
    ) -> tuple[Float[Tensor, "b c hc wc"], tuple[Tensor, ...]]:
        """Split an image into coarse part and details, [x_c, x_d] = g(x, gamma).

        Args:
            x: Image (B, C, H, W) in [0, 1], or latent; H and W multiples of 2**levels.
            gamma: Degradation embedding (B, d), or (1, d) for the whole batch.
            levels: Number of levels J; the coarse part is 2^J times smaller, 0 keeps the size.

        Returns:
            `x_c` (B, C, H/2^J, W/2^J) in the range of `x`, and `x_d`, a tuple of details, finest first.

        Raises:
            ValueError: If the channels, the size or gamma do not fit.
        """
        return self._lifted(x, gamma, levels, None)

    @entry
    def split(
        self, x: Float[Tensor, "b c h w"], gamma: Float[Tensor, "#b d"], levels: int = 2
    ) -> tuple[Float[Tensor, "b c hc wc"], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Split an image that is soon put together again with another coarse part.

        Args:
            x: As for `forward`.
            gamma: Degradation embedding.
            levels: Number of levels J.

        Returns:
            `x_c` and `x_d` as from `forward`, and the last lifting step's U(d; gamma) of each level, finest
            first: `inverse` with the same details need not compute them once more.

        Raises:
            ValueError: As `forward`.
        """
        updates: list[Tensor] = []
        x_c, x_d = self._lifted(x, gamma, levels, updates)
        return x_c, x_d, tuple(updates)

    def _lifted(
        self, x: Tensor, gamma: Tensor, levels: int, updates: list[Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        self._check(x, gamma)
        offset: float = self.config["offset"]
        centred = x - offset if offset else x
        haar: bool = self.config["haar"]
        x_c, x_d = lift(centred, self._steps(), gamma, levels, haar, self.band_mix, self.coarse_gain, updates)
        return (x_c + offset if offset else x_c), x_d

    @entry
    def inverse(
        self,
        x_c: Float[Tensor, "b c hc wc"],
        x_d: Sequence[Tensor],
        gamma: Float[Tensor, "#b d"],
        levels: int = 2,
        updates: Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Put an image together again, g^-1(x_c, x_d, gamma).

        Args:
            x_c: Coarse part (B, C, h, w), for instance the degraded image itself.
            x_d: Details as `forward` returns them.
            gamma: The same degradation embedding.
            levels: The same number of levels.
            updates: From `split`, if it was called: an eighth of the work of both directions is spared (K = 2).

        Returns:
            Image (B, C, h * 2^J, w * 2^J).

        Raises:
            ValueError: If the channels, the details or gamma do not fit.
        """
        self._check(x_c, gamma)
        offset: float = self.config["offset"]
        centred = x_c - offset if offset else x_c
        haar: bool = self.config["haar"]
        x = unlift(centred, x_d, self._steps(), gamma, levels, haar, self.band_mix, self.coarse_gain, updates)
        return x + offset if offset else x

    def compute_in(self, dtype: torch.dtype) -> InvertibleNet:
        """Let the predict and update networks compute in another dtype than their weights', for speed.

        The sums of the lifting steps, the band mix and the gain keep theirs. The networks' coarser rounding still shows
        where their inputs differ by a hair between both directions: g⁻¹(g(x)) is then x to about 1e-3, not 1e-6, far
        below what guidance moves.

        Args:
            dtype: float32, or bfloat16, which takes two thirds of the time on a CPU that has instructions for it.

        Returns:
            Itself.
        """
        for module in self.modules():
            if isinstance(module, ConditionedConvNet):
                module.compute_dtype = None if dtype == torch.float32 else dtype
        return self

    def settled(self) -> InvertibleNet:
        """A twin for many passes with the same weights: its P and U hold them in the dtype that they compute in.

        Autocast turns frozen weights into that dtype anew in every pass: more work to start than the convolutions are.
        What it returns is the same, bit for bit; gradients agree to that dtype's rounding. All other parts are shared.

        Returns:
            The twin; or itself where weights are trained or offloaded, or have that dtype already.
        """
        nets = [module for module in self.steps.modules() if isinstance(module, ConditionedConvNet)]
        held = {parameter.dtype for parameter in self.steps.parameters()}
        wanted = {net.compute_dtype for net in nets}
        moves = any(hasattr(module, hook) for module in self.modules() for hook in ("_hf_hook", "_diffusers_hook"))
        trained = any(parameter.requires_grad for parameter in self.parameters())
        if moves or trained or len(wanted) != 1 or None in wanted or held == wanted:
            return self
        twin = copy.copy(self)
        # Its own table of parts; the copy has the original's.
        twin._modules = {**self._modules, "steps": copy.deepcopy(self.steps).to(dtype=wanted.pop())}
        return twin

    @property
    def has_spread(self) -> bool:
        """Whether `spread` can be called."""
        return self.detail_spread is not None

    @entry
    def spread(self, z: Float[Tensor, "b c h w"], gamma: Float[Tensor, "#b d"]) -> Float[Tensor, "b c h w"]:
        """Tell how far the latent of a stage-one estimate lies from that of the clean image *(ours)*.

        A second small network, apart from g: the standard deviation of z - z_true for each coefficient, given z and
        gamma. It is what the damage has taken away and a regression cannot give back.

        Args:
            z: Latent of the estimate (B, C, h, w).
            gamma: Degradation embedding (B, d), or (1, d) for the whole batch.

        Returns:
            Standard deviations (B, C, h, w), between exp(-5) and exp(1), in units of the latent.

        Raises:
            ValueError: If the network was made without it, or the channels or gamma do not fit.
        """
        self._check(z, gamma)
        if self.detail_spread is None:
            raise ValueError("this network was made without a spread; use one whose config says spread = true")
        return self.detail_spread(z, gamma).to(z.dtype).clamp(-5, 1).exp()

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

    Statistics of the features of three scales are pooled over the whole image (`_Pool`), strip by strip, so that memory
    does not grow with the image: noise and compression show in the fine ones, blur in how the three compare. Beside
    them stand what is known about damage and need not be learned: how well y fits the steps of each JPEG quality, how
    blocky it is, how its spectrum falls (`traces`).

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
            nn.Linear(TRACES + _STATISTICS * sum(widths), hidden),
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
        y = _pad_to(y, max(height, _SMALLEST_ENCODER_INPUT), max(width, _SMALLEST_ENCODER_INPUT))
        device = execution_device(self)
        statistics = [traces(y).to(device)]
        pools = [_Pool() for _ in self.stages]
        strips = _strips(*y.shape[-2:])
        for top, bottom in strips:
            above, below = min(top, _STRIP_HALO), min(y.shape[-2] - bottom, _STRIP_HALO)
            h = (
                (y[..., top - above : bottom + below, :].to(device) - 0.5)
                .to(dtype)
                .contiguous(memory_format=torch.channels_last)
            )
            for level, (stage, pool) in enumerate(zip(self.stages, pools, strict=True)):
                h = stage(h)
                stop = h.shape[-2] if bottom == y.shape[-2] else bottom - (top - above) >> level
                # Pooled in float32: bfloat16 would lose the small variances that tell noise levels apart.
                pool.add(h[..., above >> level : stop, :].to(torch.promote_types(h.dtype, torch.float32)))
        for pool in pools:
            statistics += pool.statistics()
        return self.mlp(torch.cat(statistics, dim=1).to(dtype))

    @entry
    def estimate(self, gamma: Float[Tensor, "b d"]) -> DegradationEstimate:
        """Read the strength of blur, noise and compression off an embedding.

        Args:
            gamma: Degradation embedding (B, d) from `forward`.

        Returns:
            Blur, noise and JPEG strength, each (B,) and never negative.

        Raises:
            ValueError: If gamma has another length.
        """
        _check_gamma(gamma, gamma.shape[0], self.config["gamma_dim"])
        raw = self.head(gamma.to(self.head.weight.dtype))
        blur, noise, jpeg = (F.softplus(raw) * self.units.to(raw.dtype)).unbind(dim=1)
        return DegradationEstimate(blur=blur, noise=noise, jpeg=jpeg)


def _strips(height: int, width: int) -> list[tuple[int, int]]:
    """(top, bottom) of strips of bounded area that cover an image; borders fit the grids of all three scales."""
    rows = max(1, _STRIP_PIXELS // (width * _STRIP_GRID)) * _STRIP_GRID
    count = max(1, height // rows)
    return [(k * rows, height if k == count - 1 else (k + 1) * rows) for k in range(count)]


class _Pool:
    """Mean, deviation and three logarithms of energies, each (B, C), of features that come strip by strip.

    Blur is a ratio between energies of different frequencies, and a network of rectifiers does not divide: logarithms
    turn ratios into differences. The energy of the whole image is that of its strongest edges; the mean logarithm over
    small cells lets every place count alike, and the harmonic mean over cells is that of the flattest places, where
    nothing but noise is left.
    """

    def __init__(self) -> None:
        self.count, self.cells = 0, 0
        self.mean = self.squares = self.logs = self.reciprocals = torch.zeros(())

    def add(self, features: Float[Tensor, "b c h w"]) -> None:
        """Take in a strip whose rows begin at a multiple of a cell."""
        height, width = features.shape[-2:]
        count = height * width
        variance, mean = torch.var_mean(features, dim=(-2, -1), correction=0)
        total = self.count + count
        # Sums of squares around the means, merged as in Chan, Golub and LeVeque (1979): nothing cancels.
        step = mean - self.mean
        self.squares = self.squares + count * variance + step.square() * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total
        energy = F.avg_pool2d(features.square(), [min(4, side) for side in (height, width)]) + 1e-5
        self.cells += energy.shape[-2] * energy.shape[-1]
        self.logs = self.logs + energy.log().sum((-2, -1))
        self.reciprocals = self.reciprocals + energy.reciprocal().sum((-2, -1))

    def statistics(self) -> list[Tensor]:
        """What `_STATISTICS` counts."""
        variance = self.squares / self.count + 1e-6
        logarithms = variance.log(), self.logs / self.cells, -(self.reciprocals / self.cells).log()
        # Logarithms of energies lie between about -11 and 1: brought to the size of the other statistics.
        return [self.mean, variance.sqrt(), *(0.25 * (value + 5) for value in logarithms)]


class Estimator(ModelMixin, ConfigMixin):
    """The stage-one estimate: a small regression network that sampling can start from.

    Its body always runs at a quarter of the output size, whatever the scale, so that one body serves x1, x2 and x4 at
    the same cost per output pixel. The 4x4 pixels of a cell are the last convolution's 48 channels, without a
    nonlinearity behind the body: with a width of at least 48 nothing of a same-size image has to be squeezed through
    rectifiers, which would keep the network from removing white noise. That convolution starts at zero: untrained, the
    network is a bicubic enlargement.

    Cells are read and written as DCT coefficients (`_cell_basis`), fine ones amplified. Raw pixels of a cell are nearly
    equal, and the faint differences between them, where noise and detail are, would be learned last.

    Args:
        width: Channels of the body.
        blocks: Residual blocks, each conditioned on gamma.
        gamma_dim: Length d of the degradation embedding.
    """

    @register_to_config
    def __init__(self, width: int = 96, blocks: int = 8, gamma_dim: int = 64) -> None:
        super().__init__()
        # One input convolution per number of levels, for the 48, 12 or 3 channels that pixel-unshuffling leaves.
        border: Literal["zeros"] = "zeros"
        self.inputs = nn.ModuleList(
            conv3x3(3 * 4 ** (2 - levels), width, padding_mode=border) for levels in _ESTIMATOR_LEVELS
        )
        self.body = ConditionedBlocks(width, blocks, gamma_dim, border)
        self.tail = conv3x3(width, 48, padding_mode=border)
        nn.init.zeros_(self.tail.weight)
        if self.tail.bias is not None:
            nn.init.zeros_(self.tail.bias)
        for block in (2, 4):
            self.register_buffer(f"cells_{block}", _cell_basis(block), persistent=False)

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
            ValueError: If `levels` is not 0, 1 or 2, or the channels or gamma do not fit.
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
        h = h - 0.5
        if block > 1:
            h = F.conv2d(F.pixel_unshuffle(h, block), _amplified(self.get_buffer(f"cells_{block}")).to(h.dtype))
        h = self.inputs[levels](h.to(dtype=dtype, memory_format=torch.channels_last))
        h = self.body(h, gamma.to(dtype))
        coefficients = self.tail(h)
        basis = self.get_buffer("cells_4").to(coefficients.dtype)
        residual = F.pixel_shuffle(F.conv_transpose2d(0.25 * coefficients, basis), 4)
        return base + residual[..., : size[0], : size[1]].to(base.dtype)

    @entry
    def self_ensemble(
        self, y: Float[Tensor, "b c h w"], gamma: Float[Tensor, "#b d"], levels: int = 2, views: int = VIEWS
    ) -> Float[Tensor, "b 3 hx wx"]:
        """Mean of the estimates of several views of y, each turned back (geometric self-ensemble, EDSR 2017).

        A flipped photograph is a photograph; what the network says about one view and not about another is an error
        of the network's. Costs `views` forward passes.

        Args:
            y: Degraded image (B, 3, h, w) in [0, 1], any size.
            gamma: Degradation embedding (B, d) of y as it is, or (1, d).
            levels: Scale as a power of two: 0, 1 or 2.
            views: 1 (y alone) to 8.

        Returns:
            Estimate (B, 3, h * 2^levels, w * 2^levels), not clamped.

        Raises:
            ValueError: As the network itself, or if `views` is not 1 to 8.
        """
        if not 1 <= views <= VIEWS:
            raise ValueError(f"1 to {VIEWS} views expected, got {views}")
        total = self(y, gamma, levels)
        for number in range(1, views):
            total = total + _view(self(_view(y, number).contiguous(), gamma, levels), number, back=True)
        return total / views


def _view(x: Tensor, number: int, *, back: bool = False) -> Tensor:
    """View 0..7 of an image: transposed, then flipped; or the way back from it."""
    flips = [dim for bit, dim in ((2, -1), (4, -2)) if number & bit]
    if back:
        x = x.flip(flips)
    if number & 1:
        x = x.transpose(-2, -1)
    return x if back else x.flip(flips)


def _cell_basis(block: int) -> Tensor:
    """Orthonormal DCT of the block x block pixels of a cell, colour by colour, as a 1x1 kernel (n, n, 1, 1).

    Channels in: colour, row, column, as pixel-unshuffling leaves them. Channels out: colour, vertical and horizontal
    frequency.
    """
    waves = dct_matrix(block)
    return torch.kron(torch.eye(3, dtype=torch.float64), torch.kron(waves, waves)).float()[:, :, None, None]


def _amplified(basis: Tensor) -> Tensor:
    """The basis with means as means and every other coefficient four times as strong: about one size for all."""
    cell = len(basis) // 3
    gain = basis.new_full((len(basis), 1, 1, 1), 4.0)
    gain[::cell] = cell**-0.5
    return basis * gain


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
