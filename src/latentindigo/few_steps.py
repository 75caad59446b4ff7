"""Another scheduler for the same network, by name: the few-step samplers on the noise levels a prior was trained with.

| kind | scheduler of diffusers | steps |
| --- | --- | --- |
| model | the one that was saved | its own |
| ddim | DDIM | 10 and more; knows `eta` |
| dpm++ | DPM-Solver++, second order | 4 to 10 |
| unipc | UniPC, second order | 4 to 10 |
| euler | Euler, also of flow matching | 1 to 4 for Turbo networks, else 10 and more |
| lcm | LCM | 2 to 8, for networks distilled by LCM |
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import diffusers

from latentindigo.schedules import family_of

__all__ = ["SCHEDULERS", "SchedulerKind", "make_scheduler"]

SchedulerKind = Literal["model", "ddim", "dpm++", "unipc", "euler", "lcm"]
SCHEDULERS: tuple[SchedulerKind, ...] = ("model", "ddim", "dpm++", "unipc", "euler", "lcm")
"""Names of schedulers; "model" is the one that was saved."""

_SECOND_ORDER: dict[str, Any] = {"solver_order": 2, "final_sigmas_type": "zero"}
_DIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **_SECOND_ORDER}),
    "unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2", **_SECOND_ORDER}),
    "euler": ("EulerDiscreteScheduler", {"final_sigmas_type": "zero"}),
    "lcm": ("LCMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
}
_FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": _DIFFUSION["dpm++"],
    "unipc": _DIFFUSION["unipc"],
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
}


def make_scheduler(kind: SchedulerKind | str, scheduler: Any) -> Any:
    """Build a scheduler of a kind on the noise levels and the prediction type of another.

    Args:
        kind: One of `SCHEDULERS`.
        scheduler: The scheduler that was saved with the prior; it is not changed.

    Returns:
        A new scheduler; the given one for "model".

    Raises:
        ValueError: If the kind is unknown or has no form for flow matching.
    """
    if kind not in SCHEDULERS:
        raise ValueError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, got {kind!r}")
    if kind == "model":
        return scheduler
    is_flow = "Flow" in type(scheduler).__name__ or getattr(scheduler.config, "use_flow_sigmas", False)
    kinds = _FLOW if is_flow else _DIFFUSION
    if kind not in kinds:
        raise ValueError(
            f"scheduler: {kind!r} has no form for flow matching, which this prior was trained with "
            f"({type(scheduler).__name__}); use one of model, {', '.join(kinds)}"
        )
    name, settings = kinds[kind]
    kind_class: Any = getattr(diffusers, name)
    if type(scheduler) is kind_class and not settings:
        return scheduler
    # The last step ends in the clean image, and no evaluation is spent on almost no noise.
    settings = {"timestep_spacing": "trailing", **settings}
    if is_flow:
        shift = getattr(scheduler.config, "shift", None) or getattr(scheduler.config, "flow_shift", 1.0)
        names = {"shift": shift, "flow_shift": shift, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        settings |= names
    # Each class knows settings that the others do not, and says so at length.
    known = inspect.signature(kind_class.__init__).parameters
    made = kind_class(**{n: v for n, v in {**scheduler.config, **settings}.items() if n in known})
    family_of(made)  # Refuses what could not be driven, before anything runs.
    return made
