"""Wavelets in lifting form: the equations of the invertible network, without anything that is saved or loaded.

One level of the transform is a *split* of the image into one coarse part and three details per channel, followed by
K learned *lifting steps*. A step is invertible whatever its two networks compute, because each of them only reads the
part that the step leaves alone.

Scaling. The Haar split in use has DC gain 1: its coarse part is the mean of each 2x2 block, so it stays in the range of
the image and can be compared with a degraded image. All four bands carry the same factor, 1/2 of the orthonormal ones:
multiplying `c` and `d` of one level by 2 gives the orthonormal Haar transform, which keeps energy.

Two kinds of split share the same lifting steps:

* decimated (levels >= 1): J levels halve the size J times; the transform is a bijection.
* undecimated (levels = 0): the four bands keep the size of the image. Redundant, so `unlift(lift(x)) = x` holds and
  `lift(unlift(c, d)) = (c, d)` does not.

Two optional parts complete the scheme where the channels are the coefficients of a latent and not colours: a *band mix*
before the lifting steps of each decimated level, and a *coarse gain* after all levels (the scaling step that closes a
classical lifting scheme, here a function of gamma).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "BandMix",
    "CoarseGain",
    "ConditionedBlocks",
    "ConditionedConvNet",
    "LiftingStep",
    "conv3x3",
    "haar_lift",
    "haar_unlift",
    "lazy_merge",
    "lazy_split",
    "lift",
    "undecimated_merge",
    "undecimated_split",
    "unlift",
]


_INVERTING = threading.Lock()
Padding = Literal["replicate", "zeros"]
Method = TypeVar("Method", bound=Callable[..., Any])


# --------------------------------------------------------------------------------------------------------- splits


def lazy_split(x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h2 w2"], Float[Tensor, "b c3 h2 w2"]]:
    """Split an image into its four polyphase parts (*lazy wavelet*).

        x     image, x[2i+p, 2j+q]
        c     part (p, q) = (0, 0)
        d     parts (0, 1), (1, 0), (1, 1), one after another along the channels

    Args:
        x: Image or latent (B, C, H, W) with even H and W, any range.

    Returns:
        `c` (B, C, H/2, W/2) and `d` (B, 3C, H/2, W/2).

    Raises:
        ValueError: If H or W is odd.
    """
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(
            f"lazy_split expects an even height and width, got {height}x{width}; "
            "pad the image to a multiple of 2 (of 2**levels for several levels) first"
        )
    c = x[..., 0::2, 0::2]
    d = torch.cat((x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]), dim=1)
    return c, d


def lazy_merge(c: Float[Tensor, "b c h w"], d: Float[Tensor, "b c3 h w"]) -> Float[Tensor, "b c h2 w2"]:
    """Interleave the four polyphase parts again: the inverse of `lazy_split`.

    Args:
        c: Part (0, 0), (B, C, h, w).
        d: Parts (0, 1), (1, 0), (1, 1), (B, 3C, h, w).

    Returns:
        Image (B, C, 2h, 2w).

    Raises:
        ValueError: If the shapes of the two parts do not belong together.
    """
    _check_bands(c, d)
    x01, x10, x11 = d.chunk(3, dim=1)
    even_rows = torch.stack((c, x01), dim=-1).flatten(-2)
    odd_rows = torch.stack((x10, x11), dim=-1).flatten(-2)
    return torch.stack((even_rows, odd_rows), dim=-2).flatten(-3, -2)


def haar_lift(
    c: Float[Tensor, "b c h w"], d: Float[Tensor, "b c3 h w"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c3 h w"]]:
    """Turn polyphase parts into Haar bands with DC gain 1 (*fixed Haar lifting step*).

        c           x00 on entry; the block mean (x00 + x01 + x10 + x11) / 4 on return
        d           x01, x10, x11 on entry; on return
        d[0:C]      horizontal difference (x00 - x01 + x10 - x11) / 4
        d[C:2C]     vertical difference (x00 + x01 - x10 - x11) / 4
        d[2C:3C]    diagonal difference (x00 - x01 - x10 + x11) / 4

    Twice these bands are the orthonormal Haar transform: 4 (|c|^2 + |d|^2) = |x|^2.

    Args:
        c: First polyphase part (B, C, h, w).
        d: The other three (B, 3C, h, w).

    Returns:
        Coarse band (B, C, h, w), in the range of the image, and three detail bands (B, 3C, h, w).

    Raises:
        ValueError: If the shapes of the two parts do not belong together.
    """
    _check_bands(c, d)
    x01, x10, x11 = d.chunk(3, dim=1)
    sum_top, difference_top = c + x01, c - x01
    sum_bottom, difference_bottom = x10 + x11, x10 - x11
    coarse = (sum_top + sum_bottom) * 0.25
    details = torch.cat(
        (difference_top + difference_bottom, sum_top - sum_bottom, difference_top - difference_bottom), dim=1
    )
    return coarse, details * 0.25


def haar_unlift(
    c: Float[Tensor, "b c h w"], d: Float[Tensor, "b c3 h w"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c3 h w"]]:
    """Turn Haar bands back into polyphase parts: the inverse of `haar_lift`.

    Args:
        c: Coarse band (B, C, h, w).
        d: Horizontal, vertical and diagonal details (B, 3C, h, w).

    Returns:
        The polyphase parts x00 (B, C, h, w) and x01, x10, x11 (B, 3C, h, w).

    Raises:
        ValueError: If the shapes of the two parts do not belong together.
    """
    _check_bands(c, d)
    horizontal, vertical, diagonal = d.chunk(3, dim=1)
    top, bottom = c + vertical, c - vertical
    slope_top, slope_bottom = horizontal + diagonal, horizontal - diagonal
    return top + slope_top, torch.cat((top - slope_top, bottom + slope_bottom, bottom - slope_bottom), dim=1)


def undecimated_split(x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c3 h w"]]:
    """Split an image into four bands of its own size (*undecimated Haar*, zero phase).

        L       [1, 2, 1] / 4, the Haar low-pass correlated with itself, along x or along y
        H       I - L = [-1, 2, -1] / 4
        c       L_x L_y x
        d       H_x L_y x, L_x H_y x, H_x H_y x: the order and the scale of haar_lift's bands

    A plain two-tap Haar filter would shift the coarse part by half a pixel against the degraded image; its
    autocorrelation is symmetric and does not. Borders are replicated.

    Args:
        x: Image or latent (B, C, H, W) of any size and range.

    Returns:
        `c` (B, C, H, W) and `d` (B, 3C, H, W); the four bands add up to `x`.
    """
    low_x = _smooth(x, dim=-1)
    high_x = x - low_x
    c = _smooth(low_x, dim=-2)
    high_low = _smooth(high_x, dim=-2)
    return c, torch.cat((high_low, low_x - c, high_x - high_low), dim=1)


def undecimated_merge(c: Float[Tensor, "b c h w"], d: Float[Tensor, "b c3 h w"]) -> Float[Tensor, "b c h w"]:
    """Add the four undecimated bands up: a left inverse of `undecimated_split`.

    Args:
        c: Coarse band (B, C, H, W).
        d: Three detail bands (B, 3C, H, W).

    Returns:
        Image (B, C, H, W).

    Raises:
        ValueError: If the shapes of the two parts do not belong together.
    """
    _check_bands(c, d)
    high_low, low_high, high_high = d.chunk(3, dim=1)
    return c + low_high + (high_low + high_high)


def _smooth(x: Tensor, dim: int) -> Tensor:
    """Apply [1, 2, 1] / 4 along one of the two spatial dimensions, replicating the border."""
    pad = (1, 1, 0, 0) if dim == -1 else (0, 0, 1, 1)
    size = x.shape[dim]
    padded = F.pad(x, pad, mode="replicate")
    neighbours = padded.narrow(dim, 0, size) + padded.narrow(dim, 2, size)
    return x * 0.5 + neighbours * 0.25


def _check_bands(c: Tensor, d: Tensor) -> None:
    expected = (c.shape[0], 3 * c.shape[1], *c.shape[2:])
    if tuple(d.shape) != expected:
        raise ValueError(
            f"details of shape {expected} expected for a coarse part of shape {tuple(c.shape)}, got {tuple(d.shape)}; "
            "pass the two parts that one split returned"
        )


# ------------------------------------------------------------------------------------------- predict and update nets


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, padding_mode: Padding = "replicate") -> nn.Conv2d:
    """Build the 3x3 convolution used everywhere here: replicated borders, so a flat image stays flat.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Step between output pixels.
        padding_mode: "replicate", or "zeros", which costs a third less time and lets a network see where borders are.

    Returns:
        A convolution that keeps the size (divided by `stride`, rounded up).
    """
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, padding_mode=padding_mode)
    # He's initialisation keeps the size of features from layer to layer. PyTorch's default shrinks them by 2.4 per
    # convolution and ReLU, and these nets, which have no normalisation, then learn several times more slowly.
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ConditionedBlocks(nn.Module):
    """Residual blocks (conv, ReLU, conv) whose residuals are scaled per channel by an MLP of gamma.

    Args:
        width: Channels.
        blocks: Number of residual blocks, at least 1.
        gamma_dim: Length d of the degradation embedding.
        padding_mode: See `conv3x3`.
    """

    def __init__(self, width: int, blocks: int, gamma_dim: int, padding_mode: Padding = "replicate") -> None:
        super().__init__()
        if min(width, blocks, gamma_dim) < 1:
            raise ValueError(f"width, blocks and gamma_dim must be at least 1, got {width}, {blocks} and {gamma_dim}")
        self.first = nn.ModuleList(conv3x3(width, width, padding_mode=padding_mode) for _ in range(blocks))
        self.second = nn.ModuleList(conv3x3(width, width, padding_mode=padding_mode) for _ in range(blocks))
        with torch.no_grad():
            for conv in self.second:
                # Residuals start small, or a stack of blocks would double the features' variance in each.
                cast("nn.Conv2d", conv).weight.mul_(0.3)
        hidden = max(width, gamma_dim)
        last = nn.Linear(hidden, blocks * width)
        # The scales start near 1 for every gamma, so an untrained embedding does not switch blocks off.
        nn.init.ones_(last.bias)
        self.scale = nn.Sequential(nn.Linear(gamma_dim, hidden), nn.ReLU(), last)

    def forward(self, h: Float[Tensor, "b k h w"], gamma: Float[Tensor, "#b d"]) -> Float[Tensor, "b k h w"]:
        """Refine features.

        Args:
            h: Features (B, width, H, W).
            gamma: Degradation embedding (B, d), or (1, d) for the whole batch.

        Returns:
            Features of the same shape.
        """
        scales = self.scale(gamma)[:, :, None, None].chunk(len(self.first), dim=1)
        for first, second, scale in zip(self.first, self.second, scales, strict=True):
            residual = second(F.relu(first(h), inplace=True))
            h = torch.addcmul(h, residual, scale)
        return h


class ConditionedConvNet(nn.Module):
    """The network behind *predict* (P) and *update* (U): small, residual, conditioned on gamma.

    The last convolution starts at zero, so that an untrained lifting step is the identity and training starts at a
    true wavelet.

    Args:
        in_channels: Channels of the part that is read.
        out_channels: Channels of the part that is changed.
        hidden: Channels inside.
        blocks: Number of residual blocks.
        gamma_dim: Length d of the degradation embedding.
    """

    gradient_checkpointing = False  # diffusers' switch finds it by this name.

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int = 32, blocks: int = 2, gamma_dim: int = 64
    ) -> None:
        super().__init__()
        self.compute_dtype: torch.dtype | None = None
        self.blocks = ConditionedBlocks(hidden, blocks, gamma_dim)  # first, because it checks the sizes
        self.head = conv3x3(in_channels, hidden)
        self.tail = conv3x3(hidden, out_channels)
        nn.init.zeros_(self.tail.weight)
        if self.tail.bias is not None:
            nn.init.zeros_(self.tail.bias)

    def forward(self, h: Float[Tensor, "b i h w"], gamma: Float[Tensor, "#b d"]) -> Float[Tensor, "b o h w"]:
        """Compute what is subtracted from, or added to, the other part.

        The network computes in `compute_dtype`, by default the dtype of its weights (or of autocast); the caller casts
        the result back.

        Args:
            h: The part that is read (B, in_channels, H, W), any range.
            gamma: Degradation embedding (B, d), or (1, d) for the whole batch.

        Returns:
            Tensor (B, out_channels, H, W).
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._compute, h, gamma, use_reentrant=False, preserve_rng_state=False)
        return self._compute(h, gamma)

    def _compute(self, h: Tensor, gamma: Tensor) -> Tensor:
        weights, chosen = self.head.weight.dtype, self.compute_dtype
        # Channels-last on entry carries through every layer and halves the time of the convolutions on a CPU.
        h = h.to(dtype=chosen or weights, memory_format=torch.channels_last)
        if chosen is None or chosen == weights:
            return self.tail(self.blocks(self.head(h), gamma.to(weights)))
        with torch.autocast(h.device.type, dtype=chosen):
            return self.tail(self.blocks(self.head(h), gamma.to(weights)))


class LiftingStep(nn.Module):
    """One learned lifting step (*predict* and *update*), invertible for any P and U.

        predict         P(c; gamma): details from the coarse part
        update          U(d; gamma): coarse part from the details

    Args:
        channels: Channels C of the image; the details have 3C.
        hidden: Channels inside P and U.
        blocks: Residual blocks in each of P and U.
        gamma_dim: Length d of the degradation embedding.
    """

    def __init__(self, channels: int, hidden: int = 32, blocks: int = 2, gamma_dim: int = 64) -> None:
        super().__init__()
        self.predict = ConditionedConvNet(channels, 3 * channels, hidden, blocks, gamma_dim)
        self.update = ConditionedConvNet(3 * channels, channels, hidden, blocks, gamma_dim)

    def forward(
        self,
        c: Float[Tensor, "b c h w"],
        d: Float[Tensor, "b c3 h w"],
        gamma: Float[Tensor, "#b g"],
        updates: list[Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c3 h w"]]:
        """Apply d <- d - P(c; gamma), then c <- c + U(d; gamma).

        The sums keep the dtype of `c` and `d` even under autocast: in bfloat16 they could not be undone.

        Args:
            c: Coarse part (B, C, h, w).
            d: Details (B, 3C, h, w).
            gamma: Degradation embedding (B, d).
            updates: Takes in U(d; gamma), if given.

        Returns:
            The new `c` and `d`.
        """
        d = d - self.predict(c, gamma).to(d.dtype)
        update = self.update(d, gamma).to(c.dtype)
        if updates is not None:
            updates.append(update)
        return c + update, d

    def inverse(
        self,
        c: Float[Tensor, "b c h w"],
        d: Float[Tensor, "b c3 h w"],
        gamma: Float[Tensor, "#b g"],
        update: Float[Tensor, "b c h w"] | None = None,
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c3 h w"]]:
        """Undo `forward`: c <- c - U(d; gamma), then d <- d + P(c; gamma).

        Args:
            c: Coarse part (B, C, h, w).
            d: Details (B, 3C, h, w).
            gamma: The same degradation embedding (B, d) as on the way forward.
            update: U(d; gamma), if it is known already.

        Returns:
            The `c` and `d` before the step.
        """
        c = c - (self.update(d, gamma).to(c.dtype) if update is None else update)
        d = d + self.predict(c, gamma).to(d.dtype)
        return c, d


def _with_weights(method: Method) -> Method:
    """Let a method of a module that holds weights itself bring them and put them away, as offloading does for forward.

    Offloading by layers wraps `forward` alone; the weights have no values outside of it.
    """

    @functools.wraps(method)
    def call(self: nn.Module, *inputs: Any) -> Any:
        hook: Any = getattr(self, "_hf_hook", None)
        if hook is None:
            return method(self, *inputs)
        inputs, _ = hook.pre_forward(self, *inputs)
        return hook.post_forward(self, method(self, *inputs))

    return cast("Method", call)


class BandMix(nn.Module):
    """A learned invertible linear map of the 4C bands at each position, `[c, d] <- M [c, d]` *(ours)*.

    Channel k of a coarse latent is not the mean of channel k of the fine one: a patch of the small image holds four
    patches of the large one, so that its coefficients mix all channels of all bands. One matrix says that nearly
    exactly, and lifting steps alone would need many to say it. It starts as the identity.

        matrix          M (4C, 4C), of full rank

    Args:
        channels: Channels C of the latent; the details have 3C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(4 * channels))
        self._known: tuple[Tensor, Tensor] | None = None  # A matrix and its inverse.

    def forward(
        self, c: Float[Tensor, "b c h w"], d: Float[Tensor, "b c3 h w"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c3 h w"]]:
        """Apply M.

        Args:
            c: Coarse part (B, C, h, w).
            d: Details (B, 3C, h, w).

        Returns:
            The new `c` and `d`.
        """
        return self._multiply(self.matrix, c, d)

    @_with_weights
    def inverse(
        self, c: Float[Tensor, "b c h w"], d: Float[Tensor, "b c3 h w"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c3 h w"]]:
        """Apply M^-1, computed in double precision.

        Args:
            c: Coarse part (B, C, h, w).
            d: Details (B, 3C, h, w).

        Returns:
            The `c` and `d` before `forward`.
        """
        if torch.is_grad_enabled() and self.matrix.requires_grad:
            return self._multiply(_inverted(self.matrix, c), c, d)
        # The same matrix is asked for again and again while sampling; it is compared by value, so that no change hides.
        matrix, known = self.matrix.detach(), self._known
        fits = known is not None and (known[0].device, known[1].dtype) == (matrix.device, c.dtype)
        recording = matrix.is_cuda and torch.cuda.is_current_stream_capturing()  # No waiting for values then.
        if known is None or not fits or not (recording or torch.equal(known[0], matrix)):
            made = matrix.clone(), _inverted(matrix, c)
            with _INVERTING:
                # What another thread put there meanwhile stays: a recorded graph may read it.
                if self._known is known:
                    self._known = made
                known = self._known or made
        return self._multiply(known[1], c, d)

    @staticmethod
    def _multiply(matrix: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        # In the dtype of the image even under autocast: what is rounded to bfloat16 could not be undone.
        with torch.autocast(c.device.type, enabled=False):
            bands = F.conv2d(torch.cat((c, d), dim=1), matrix.to(c.dtype)[:, :, None, None])
        return bands[:, : c.shape[1]], bands[:, c.shape[1] :]


def _inverted(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse in double precision, taken on the CPU: some accelerators have no such numbers."""
    return torch.linalg.inv(matrix.cpu().double()).to(like)


class CoarseGain(nn.Module):
    """A gain on each channel of the coarse part, `c <- c exp(a(gamma))` *(ours; scaling step of a lifting scheme)*.

    Blur weakens the fine coefficients of y's latent and leaves the others: a gain for each channel that depends on the
    damage. |a| stays below `limit`, so that the inverse amplifies noise at most by exp(limit). It starts at 1.

    Args:
        channels: Channels C of the latent.
        gamma_dim: Length d of the degradation embedding.
        limit: Largest logarithm of the gain.
    """

    def __init__(self, channels: int, gamma_dim: int = 64, limit: float = 2.0) -> None:
        super().__init__()
        last = nn.Linear(gamma_dim, channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.logarithm = nn.Sequential(nn.Linear(gamma_dim, gamma_dim), nn.ReLU(), last)
        self.limit = limit

    def forward(self, c: Float[Tensor, "b c h w"], gamma: Float[Tensor, "#b g"]) -> Float[Tensor, "b c h w"]:
        """Apply the gain.

        Args:
            c: Coarse part (B, C, h, w).
            gamma: Degradation embedding (B, d), or (1, d) for the whole batch.

        Returns:
            The new `c`.
        """
        return c * self._log_gain(c, gamma).exp()

    def inverse(self, c: Float[Tensor, "b c h w"], gamma: Float[Tensor, "#b g"]) -> Float[Tensor, "b c h w"]:
        """Take the gain off again.

        Args:
            c: Coarse part (B, C, h, w).
            gamma: The same degradation embedding.

        Returns:
            The `c` before `forward`.
        """
        return c * (-self._log_gain(c, gamma)).exp()

    def _log_gain(self, c: Tensor, gamma: Tensor) -> Tensor:
        dtype = next(self.logarithm.parameters()).dtype
        raw = self.logarithm(gamma.to(dtype)).to(c.dtype)
        return (self.limit * torch.tanh(raw))[:, :, None, None]


# ---------------------------------------------------------------------------------------------------- the transform


def lift(
    x: Float[Tensor, "b c h w"],
    steps: Sequence[LiftingStep],
    gamma: Float[Tensor, "#b g"],
    levels: int,
    haar: bool = True,
    mix: BandMix | None = None,
    gain: CoarseGain | None = None,
    updates: list[Tensor] | None = None,
) -> tuple[Float[Tensor, "b c hc wc"], tuple[Tensor, ...]]:
    """Transform an image into coarse part and details (*the invertible network*, g).

        x        image x (or latent z_0)
        x_c      coarse part, simulates the degraded image
        x_d      details, what the degradation lost
        gamma    degradation embedding
        levels   J; the coarse part is 2^J times smaller than x
        steps    the K lifting steps, shared by all levels

    Args:
        x: Image or latent (B, C, H, W); H and W multiples of 2**levels.
        steps: Lifting steps, applied in this order on every level.
        gamma: Degradation embedding (B, d), or (1, d) for the whole batch.
        levels: Number of levels J >= 0; 0 is the undecimated split.
        haar: Put the fixed Haar step before the learned ones. Without it a decimated coarse part starts as an aliased
            subsampling; the undecimated split is always Haar.
        mix: Band mix of every decimated level; the undecimated split, whose bands overlap, has none.
        gain: Gain on the final coarse part.
        updates: Takes in U_K(d; gamma) of each level, finest first, if given. It depends on details alone, so that
            `unlift` with the same details and whatever coarse part need not compute it again.

    Returns:
        `x_c` (B, C, H/2^J, W/2^J) and `x_d`, a tuple from the finest level to the coarsest with J tensors
        (B, 3C, H/2^j, W/2^j), j = 1..J. For `levels=0` it holds one tensor (B, 3C, H, W).

    Raises:
        ValueError: If `levels` is negative or H or W is not a multiple of 2**levels.
    """
    _check_levels(levels)
    height, width = x.shape[-2:]
    multiple = 2**levels
    if height % multiple or width % multiple:
        raise ValueError(
            f"a height and width that are multiples of {multiple} expected for {levels} levels, got {height}x{width}; "
            "pad the image (and crop the result) or use fewer levels"
        )
    if levels == 0:
        c, d = _step_through(steps, *undecimated_split(x), gamma, updates)
        return (c if gain is None else gain(c, gamma)), (d,)
    c = x
    details: list[Tensor] = []
    for _ in range(levels):
        c, d = lazy_split(c)
        if haar:
            c, d = haar_lift(c, d)
        if mix is not None:
            c, d = mix(c, d)
        c, d = _step_through(steps, c, d, gamma, updates)
        details.append(d)
    return (c if gain is None else gain(c, gamma)), tuple(details)


def _step_through(
    steps: Sequence[LiftingStep], c: Tensor, d: Tensor, gamma: Tensor, updates: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """All lifting steps of one level; only the last one's update outlives them."""
    for k, step in enumerate(steps, 1):
        c, d = step(c, d, gamma, updates if k == len(steps) else None)
    return c, d


def unlift(
    x_c: Float[Tensor, "b c hc wc"],
    x_d: Sequence[Tensor],
    steps: Sequence[LiftingStep],
    gamma: Float[Tensor, "#b g"],
    levels: int,
    haar: bool = True,
    mix: BandMix | None = None,
    gain: CoarseGain | None = None,
    updates: Sequence[Tensor] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Put coarse part and details together again (*the inverse network*, g^-1).

    Args:
        x_c: Coarse part (B, C, h, w).
        x_d: Details as `lift` returns them, finest level first.
        steps: The same lifting steps, in the same order, as given to `lift`.
        gamma: The same degradation embedding.
        levels: Number of levels J >= 0; 0 is the undecimated split.
        haar: As given to `lift`.
        mix: As given to `lift`.
        gain: As given to `lift`.
        updates: As `lift` filled it, if it did.

    Returns:
        Image (B, C, h * 2^J, w * 2^J).

    Raises:
        ValueError: If `levels` is negative, or number or shape of the details do not fit.
    """
    _check_levels(levels)
    if len(x_d) != max(levels, 1):
        raise ValueError(
            f"{max(levels, 1)} detail tensors expected for levels={levels}, got {len(x_d)}; "
            "use the number of levels of the forward transform"
        )
    backwards = list(steps)[::-1]
    c = x_c if gain is None else gain.inverse(x_c, gamma)
    known = list(updates) if updates else [None] * len(x_d)
    for d, update in zip(reversed(x_d), reversed(known), strict=True):
        _check_bands(c, d)
        for k, step in enumerate(backwards):
            c, d = step.inverse(c, d, gamma, update if k == 0 else None)
        if levels == 0:
            return undecimated_merge(c, d)
        if mix is not None:
            c, d = mix.inverse(c, d)
        if haar:
            c, d = haar_unlift(c, d)
        c = lazy_merge(c, d)
    return c


def _check_levels(levels: int) -> None:
    if levels < 0:
        raise ValueError(f"levels >= 0 expected (0 is the undecimated split), got {levels}")
