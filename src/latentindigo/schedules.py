"""What a scheduler is, seen from outside: its family, its noise levels and grids, and what its network predicts.

diffusers' schedulers disagree on what they store (z or z/α), how they find the next level (a table, a list or a stride
in time) and what a network output means (ε, v, z_0 or a flow velocity). This module knows the differences and puts
schedulers on a grid of our choice. It needs no diffusers: schedulers are recognised by the names of their classes, and
`latentindigo.prior` is the module that drives them.

| code | symbol | meaning |
| --- | --- | --- |
| `z0` | z_0, z_{0,t} | clean latent, or the denoiser's estimate of it |
| `z_t` | z_t | noisy latent in canonical coordinates, z_t = α z_0 + σ ε |
| `alpha`, `sigma` | α_t, σ_t | variance preserving: √ᾱ, √(1−ᾱ); rectified flow: 1−t, t |
| `strength` | σ/√(α²+σ²) | noise level at the start of a trajectory, 1 = pure noise |

Every function that changes a scheduler changes the one it is given: pass a copy.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "Family",
    "PredictionType",
    "checked_eta",
    "family_of",
    "network_type",
    "noise_levels",
    "output_from_z0",
    "place_grid",
    "prepare_scheduler",
    "scheduler_type",
    "set_stride",
    "shift_exponent",
    "state_dtype",
    "strength_of",
    "z0_from_output",
]

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]

_PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "flow_prediction")
_STRENGTH_MISS = 0.05  # A grid that starts further than this from the wish is an error, not an approximation.


@dataclass(frozen=True)
class Family:
    """What has to be known about a class of schedulers before it can be driven from outside.

    Attributes:
        levels: Where the noise levels are: "alphas" = a table ᾱ[t] looked up by time step; "sigmas" = a list σ/α
            walked by index; "flow" = a list σ = t with α = 1−t.
        scaled: Whether the scheduler stores z/α instead of z.
        strides: Whether `step` finds the next level by a fixed stride in time instead of a list of time steps.
        accepts: Kinds of network output that its `step` understands.
        draws: Whether `step` draws noise, as a function of (config, eta).
        shifts: Whether its time shift may depend on the size of the picture (`use_dynamic_shifting`).
    """

    levels: Literal["alphas", "sigmas", "flow"]
    scaled: bool = False
    strides: bool = False
    accepts: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
    draws: Callable[[Any, float], bool] = lambda config, eta: False
    shifts: bool = False


# By name, so that this module needs no diffusers import; subclasses are found through their bases.
_FAMILIES: dict[str, Family] = {
    "DDIMScheduler": Family("alphas", strides=True, draws=lambda config, eta: eta > 0),
    "DDIMParallelScheduler": Family("alphas", strides=True, draws=lambda config, eta: eta > 0),
    "DDPMScheduler": Family("alphas", draws=lambda config, eta: True),
    "LCMScheduler": Family("alphas", draws=lambda config, eta: True),
    "DPMSolverMultistepScheduler": Family(
        "sigmas", accepts=_PREDICTION_TYPES, draws=lambda config, eta: config.algorithm_type.startswith("sde")
    ),
    "DEISMultistepScheduler": Family("sigmas", accepts=_PREDICTION_TYPES),
    "UniPCMultistepScheduler": Family("sigmas", accepts=_PREDICTION_TYPES),
    "EulerDiscreteScheduler": Family("sigmas", scaled=True),
    "EulerAncestralDiscreteScheduler": Family(
        "sigmas", scaled=True, accepts=("epsilon", "v_prediction"), draws=lambda config, eta: True
    ),
    "LMSDiscreteScheduler": Family("sigmas", scaled=True),
    "FlowMatchEulerDiscreteScheduler": Family(
        "flow",
        accepts=("flow_prediction",),
        draws=lambda config, eta: bool(config.stochastic_sampling),
        shifts=True,
    ),
}


# --- what a scheduler is --------------------------------------------------------------------------------------------


def family_of(scheduler: Any) -> Family:
    """Look the scheduler up; refuse what would need two evaluations per step or is not understood.

    Args:
        scheduler: A scheduler of diffusers, or of a class derived from one.

    Returns:
        Its family, with the levels of a flow schedule where its configuration asks for one.

    Raises:
        ValueError: If the scheduler cannot be driven step by step.
    """
    name = type(scheduler).__name__
    way_out = f"use one of {', '.join(_FAMILIES)}"
    if getattr(scheduler, "order", 1) != 1:
        raise ValueError(
            f"expected a scheduler with one denoiser evaluation per step, got {name} with {scheduler.order}: guidance "
            f"would act on half a step; {way_out}"
        )
    if name == "LMSDiscreteScheduler" and importlib.util.find_spec("scipy") is None:
        raise ValueError(f"{name} integrates with scipy, which is not installed; pip install scipy, or {way_out}")
    family = next((_FAMILIES[base.__name__] for base in type(scheduler).__mro__ if base.__name__ in _FAMILIES), None)
    if family is None:
        raise ValueError(f"expected a scheduler whose coordinates are known, got {name}; {way_out}")
    config = scheduler.config
    if getattr(config, "use_flow_sigmas", False):
        family = replace(family, levels="flow")
    if getattr(config, "use_dynamic_shifting", False) and not family.shifts:
        raise ValueError(
            f"expected a fixed time shift, got {name} with use_dynamic_shifting=True, which depends on the image size; "
            "set use_dynamic_shifting=False and the shift of your size, or use FlowMatchEulerDiscreteScheduler"
        )
    if getattr(config, "invert_sigmas", False):
        raise ValueError(f"expected time to run from noise to image, got {name} with invert_sigmas=True; set it False")
    return family


def scheduler_type(scheduler: Any) -> PredictionType:
    """Return the kind of network output that the scheduler's step expects.

    Args:
        scheduler: A scheduler of diffusers.

    Returns:
        The kind named in its configuration; flow schedulers name none.

    Raises:
        ValueError: If the configuration names an unknown kind.
    """
    named = getattr(scheduler.config, "prediction_type", "flow_prediction")
    return _checked_kind("sample" if named == "original_sample" else named)


def _checked_kind(named: str) -> PredictionType:
    for kind in _PREDICTION_TYPES:
        if named == kind:
            return kind
    raise ValueError(f"expected a prediction_type among {', '.join(_PREDICTION_TYPES)}, got {named!r}")


def network_type(scheduler: Any, family: Family, asked: str | None) -> PredictionType:
    """Settle what the network predicts.

    Args:
        scheduler: The scheduler the network was trained with.
        family: Its family.
        asked: The kind the user named, or None to take the scheduler's.

    Returns:
        The kind of network output.

    Raises:
        ValueError: If the kind is unknown or not defined for the schedule.
    """
    kind = scheduler_type(scheduler) if asked is None else _checked_kind(asked)
    if kind == "v_prediction" and family.levels == "flow":
        raise ValueError(
            "expected ε, sample or flow prediction with a flow schedule, got v_prediction, which is defined for "
            "α²+σ²=1 only; use a variance-preserving scheduler"
        )
    return kind


def prepare_scheduler(scheduler: Any, family: Family, kind: PredictionType) -> None:
    """Configure our own copy: the network's kind of output where understood, and no clipping of latents.

    Args:
        scheduler: The scheduler; changed in place.
        family: Its family.
        kind: What the network predicts.
    """
    expected = kind if kind in family.accepts else family.accepts[0]
    if expected != scheduler_type(scheduler):
        scheduler.register_to_config(prediction_type=expected)
    clipping = [name for name in ("clip_sample", "thresholding") if getattr(scheduler.config, name, False)]
    if clipping:
        warnings.warn(
            f"{type(scheduler).__name__} has {' and '.join(clipping)} on, which is meant for pixels and would clip "
            "latents; it is switched off in this prior's own copy",
            stacklevel=3,
        )
        scheduler.register_to_config(**dict.fromkeys(clipping, False))


def checked_eta(scheduler: Any, arguments: Any, eta: float) -> dict[str, float]:
    """Return eta as a keyword argument for schedulers that know it, refuse it for the others.

    Args:
        scheduler: The scheduler, named in messages.
        arguments: The names of the arguments of its `step`.
        eta: Share of fresh noise in each step, [0, 1].

    Returns:
        Keyword arguments for `step`.

    Raises:
        ValueError: If eta is out of range, or not 0 for a scheduler that does not know it.
    """
    if "eta" in arguments:
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"expected eta in [0, 1], 0 = deterministic, got {eta}")
        return {"eta": eta}
    if eta != 0.0:
        raise ValueError(f"expected eta=0, got {eta}: {type(scheduler).__name__} does not know eta; use DDIMScheduler")
    return {}


# --- noise levels and grids -----------------------------------------------------------------------------------------


def strength_of(alpha: float, sigma: float) -> float:
    """Return the strength σ/√(α²+σ²) of a noise level.

    Args:
        alpha: α_t.
        sigma: σ_t; not both are 0.

    Returns:
        The strength, [0, 1].
    """
    return sigma / math.hypot(alpha, sigma)


def _level_from_sigma(family: Family, sigma: float) -> tuple[float, float]:
    """Return the canonical (α, σ) for an entry of a scheduler's `sigmas`."""
    if family.levels == "flow":
        return 1.0 - sigma, sigma
    alpha = 1.0 / math.sqrt(1.0 + sigma * sigma)
    return alpha, sigma * alpha


def noise_levels(scheduler: Any, family: Family, begin: int, steps: int) -> list[tuple[float, float]]:
    """Return the canonical (α, σ) of all steps + 1 levels of the grid in use.

    Args:
        scheduler: A scheduler on the grid that `place_grid` gave it.
        family: Its family.
        begin: Where the trajectory begins in the grid.
        steps: Number of denoiser evaluations.

    Returns:
        One pair per level, from noisy to clean.
    """
    if family.levels != "alphas":
        return [_level_from_sigma(family, float(s)) for s in scheduler.sigmas[begin : begin + steps + 1]]
    alpha_bars = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps[begin : begin + steps]]
    # LCM and DDPM end in z_0 itself; only DDIM may be told to end at the smallest trained level.
    alpha_bars.append(float(scheduler.final_alpha_cumprod) if family.strides else 1.0)
    return [(math.sqrt(a), math.sqrt(1.0 - a)) for a in alpha_bars]


def shift_exponent(scheduler: Any, cells: int | None) -> float | None:
    """Return mu, the time shift's exponent, of a schedule that is shifted further the larger the picture is.

    Linear between (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), as SD3 and FLUX were trained.

    Args:
        scheduler: A scheduler of diffusers.
        cells: Number of image tokens that the network sees at once, None = unknown.

    Returns:
        mu, or None for a schedule with a fixed shift.

    Raises:
        ValueError: If the shift depends on the size and the size is unknown.
    """
    config = scheduler.config
    if not getattr(config, "use_dynamic_shifting", False):
        return None
    if cells is None:
        raise ValueError(
            f"expected the size of the latent, on which the time shift of {type(scheduler).__name__} with "
            "use_dynamic_shifting=True depends, got none; give trajectory(..., latent_size=(height, width))"
        )
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return cells * slope + (config.base_shift - slope * config.base_image_seq_len)


def _set_own_grid(scheduler: Any, family: Family, steps: int, mu: float | None, even: bool) -> None:
    """Give the scheduler its own grid, or the even one from 1 to 1/steps before its time shift."""
    keywords: dict[str, Any] = {} if mu is None else {"mu": mu}
    if even and family.shifts:
        keywords["sigmas"] = [1.0 - k / steps for k in range(steps)]
    scheduler.set_timesteps(steps, **keywords)


def place_grid(
    scheduler: Any, family: Family, steps: int, strength: float, *, mu: float | None = None, even: bool = False
) -> tuple[int, bool]:
    """Give the scheduler a grid of time steps on which `steps` evaluations start nearest to a strength.

    Args:
        scheduler: The scheduler; changed in place.
        family: Its family.
        steps: Number of denoiser evaluations, at least 1.
        strength: σ/√(α²+σ²) at the start, (0, 1]; 1 = the scheduler's own full grid.
        mu: See `shift_exponent`.
        even: Whether the full grid of a flow schedule is even from 1 to 1/steps, as FLUX's pipelines set it.

    Returns:
        Where the trajectory begins in the grid, and whether the grid is one of the scheduler's own (stock).

    Raises:
        ValueError: If that many steps cannot start at the strength.
    """
    if strength == 1.0:
        _set_own_grid(scheduler, family, steps, mu, even)
        return 0, True
    if _has_special_spacing(scheduler.config):
        return _search_grid(scheduler, family, steps, strength, mu, even), True
    if family.levels == "flow":
        _set_flow_grid(scheduler, family, steps, strength, mu)
    else:
        _set_even_grid(scheduler, family, steps, strength)
    return 0, False


def _has_special_spacing(config: Any) -> bool:
    """Return whether the user asked for a spacing of levels that an even grid of time steps would throw away."""
    flags = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "shift_terminal")
    return (
        any(getattr(config, flag, False) for flag in flags)
        or getattr(config, "interpolation_type", "linear") != "linear"
        or getattr(config, "timestep_type", "discrete") != "discrete"
        or getattr(config, "lambda_min_clipped", -math.inf) != -math.inf
    )


def _search_grid(scheduler: Any, family: Family, steps: int, strength: float, mu: float | None, even: bool) -> int:
    """Refine the scheduler's own grid until its last `steps` levels start nearest to the strength.

    The level at which the last `steps` entries start falls as the grid gets finer, so bisection finds it.
    """

    def start(size: int) -> float:
        _set_own_grid(scheduler, family, size, mu, even)
        return strength_of(*_level_from_sigma(family, float(scheduler.sigmas[size - steps])))

    coarse, fine = steps, max(steps, int(scheduler.config.num_train_timesteps))
    while fine - coarse > 1:
        middle = (coarse + fine) // 2
        coarse, fine = (middle, fine) if start(middle) > strength else (coarse, middle)
    best = min((coarse, fine), key=lambda size: abs(start(size) - strength))
    reached = start(best)
    if abs(reached - strength) > _STRENGTH_MISS:
        raise ValueError(
            f"expected a strength that {steps} steps of {type(scheduler).__name__} can start from, got {strength}; "
            f"the nearest is {reached:.3f}: change strength or steps"
        )
    return best - steps


def _set_even_grid(scheduler: Any, family: Family, steps: int, strength: float) -> None:
    """Replace the grid by `steps` evenly spaced trained time steps, the first one nearest to the strength."""
    scheduler.set_timesteps(steps)
    trained = _trained_timesteps(scheduler)
    strengths = (1.0 - scheduler.alphas_cumprod[trained]).double().sqrt()
    start = int((strengths - strength).abs().argmin())
    lowest = float(strengths[min(steps, len(trained)) - 1])
    if steps > len(trained) or start < steps - 1 or strength < 0.9 * float(strengths[0]):
        raise ValueError(
            f"expected a strength of at least {lowest:.3f} for {steps} steps of {type(scheduler).__name__} with "
            f"{len(trained)} trained levels, got {strength}; take fewer steps or a larger strength"
        )
    # The "trailing" rule: the last step ends at the clean image, no evaluation is spent at almost no noise.
    picks = [math.floor((start + 1) * (steps - k) / steps + 0.5) - 1 for k in range(steps)]
    timesteps = trained[picks]
    scheduler.timesteps = timesteps.to(scheduler.timesteps.dtype)
    if family.levels == "sigmas":
        alpha_bar = scheduler.alphas_cumprod[timesteps]
        scheduler.sigmas = torch.cat([((1.0 - alpha_bar) / alpha_bar).sqrt(), scheduler.sigmas[-1:]])


def _trained_timesteps(scheduler: Any) -> Tensor:
    """Return, ascending, the time steps a trajectory may visit: all of them, or those LCM was distilled on."""
    total = int(scheduler.config.num_train_timesteps)
    distilled = getattr(scheduler.config, "original_inference_steps", None)
    if distilled is None:
        return torch.arange(total)
    return torch.arange(1, distilled + 1) * (total // distilled) - 1


def _set_flow_grid(scheduler: Any, family: Family, steps: int, strength: float, mu: float | None) -> None:
    """Replace the grid of a flow schedule by an even one in unshifted time that starts at the strength.

    With σ = t and α = 1−t, strength σ/√(α²+σ²) is reached at t = r/(1+r), r = strength/√(1−strength²); the time shift
    s maps even time u to t = s u/(1+(s−1) u). A shift that grows with the size is s = e^mu, or mu where it is linear.
    """
    _set_own_grid(scheduler, family, steps, mu, even=True)
    total = int(scheduler.config.num_train_timesteps)
    ratio = strength / math.sqrt(1.0 - strength * strength)
    start = min(ratio / (1.0 + ratio), float(scheduler.sigmas[0]))
    if start < 1.0 / total:
        raise ValueError(
            f"expected a strength of at least {strength_of(1.0 - 1.0 / total, 1.0 / total):.4f}, the smallest trained "
            f"noise level of {type(scheduler).__name__}, got {strength}"
        )
    shift = float(getattr(scheduler, "shift", None) or getattr(scheduler.config, "flow_shift", 1.0))
    if mu is not None:
        shift = math.exp(mu) if scheduler.config.time_shift_type == "exponential" else mu
    even = start / (shift - (shift - 1.0) * start) * (1.0 - torch.arange(steps, dtype=torch.float64) / steps)
    sigmas = shift * even / (1.0 + (shift - 1.0) * even)
    scheduler.timesteps = (sigmas * total).to(scheduler.timesteps.dtype)
    scheduler.sigmas = torch.cat([sigmas.float(), scheduler.sigmas[-1:]])


def set_stride(scheduler: Any, timesteps: Int[Tensor, " steps"], i: int) -> None:
    """Make step i of DDIM, on our own copy, arrive at the next entry of `timesteps`.

    DDIM goes down by num_train_timesteps // num_inference_steps, its only use of both numbers once its tables are
    built. Setting them is what lets it follow any grid. The last step goes to −1, which DDIM reads as the clean image.

    Args:
        scheduler: A scheduler that finds the next level by a stride; changed in place.
        timesteps: The time steps of the trajectory, (steps,).
        i: Index of the step about to be taken, 0 … steps−1.
    """
    following = int(timesteps[i + 1]) if i + 1 < len(timesteps) else -1
    scheduler.num_inference_steps = 1
    scheduler.register_to_config(num_train_timesteps=int(timesteps[i]) - following)


# --- network output <-> z_0 -----------------------------------------------------------------------------------------


def state_dtype(z: Float[Tensor, "*shape"]) -> torch.dtype:
    """Return the dtype of the sampler's state: float32 whatever the networks use; float64 stays, for tests.

    Args:
        z: Any tensor of the state.

    Returns:
        float32 or float64.
    """
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def z0_from_output(
    output: Float[Tensor, "b c h w"], z_t: Float[Tensor, "b c h w"], alpha: float, sigma: float, kind: PredictionType
) -> Float[Tensor, "b c h w"]:
    """Read z_{0,t} off the network output (denoised estimate z_{0,t}; all kinds follow from z_t = α z_0 + σ ε).

    | kind | output | z_0 |
    | --- | --- | --- |
    | epsilon | ε | (z_t − σ ε)/α |
    | v_prediction | v = α ε − σ z_0, α²+σ²=1 | α z_t − σ v |
    | sample | z_0 | z_0 |
    | flow_prediction | u = ε − z_0 | (z_t − σ u)/(α+σ) |

    Args:
        output: What the network predicted, (B, C, h, w).
        z_t: The noisy latent it saw, canonical, same shape.
        alpha: α_t, above 0 for ε.
        sigma: σ_t.
        kind: What the network predicts.

    Returns:
        The estimate of z_0, same shape; differentiable.
    """
    if kind == "epsilon":
        return (z_t - sigma * output) / alpha
    if kind == "v_prediction":
        return alpha * z_t - sigma * output
    if kind == "flow_prediction":
        return (z_t - sigma * output) / (alpha + sigma)
    return output


def output_from_z0(
    z0: Float[Tensor, "b c h w"], z_t: Float[Tensor, "b c h w"], alpha: float, sigma: float, kind: PredictionType
) -> Float[Tensor, "b c h w"]:
    """Write a changed z_{0,t} back as the network output that would have meant it (write-back of z_0).

    The inverse of `z0_from_output`, in float32 at least: bfloat16 has too few digits for (z_t − α z_0)/σ.

    Args:
        z0: The clean latent to steer to, (B, C, h, w).
        z_t: The noisy latent, canonical, same shape.
        alpha: α_t.
        sigma: σ_t, above 0.
        kind: What the scheduler expects.

    Returns:
        The output, same shape, in the dtype of the state.
    """
    dtype = state_dtype(z_t)
    z0, z_t = z0.to(dtype), z_t.to(dtype)
    if kind == "epsilon":
        return (z_t - alpha * z0) / sigma
    if kind == "v_prediction":
        return (alpha * z_t - z0) / sigma
    if kind == "flow_prediction":
        return (z_t - (alpha + sigma) * z0) / sigma
    return z0
