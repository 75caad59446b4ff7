"""Who takes part in a comparison: names, what each is told, and the settings that were chosen for a prior.

| name | what it is | told |
| --- | --- | --- |
| `bicubic`, `lanczos`, `estimator` | no sampling | nothing |
| `faithful`, `default`, `vivid` | this package's presets | nothing |
| `balanced` | between them: `fidelity` 0.6 | nothing |
| `pixel-inn`, `unguided` | the default preset with PixelINN, and without guidance | nothing |
| `sdedit`, `diffbir` | blind rivals | nothing |
| `ldps`, `psld`, `resample`, `diffpir`, `ddnm`, `daps`, `latino` | need an operator | the true one; bicubic |

A rival's settings are those of the model folder's `rivals.json` where it names it, else the paper's. An entry
"psld bicubic" is for the rival that is told bicubic only; without one, both are set alike. An entry that ends in
"realistic" ("sdedit realistic", "psld bicubic realistic") adds the rival once more, set to be as realistic as the
preset `default`: most are at their best PSNR when they are smooth, and would otherwise only meet `faithful`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentindigo.baselines import Bicubic, EstimatorAlone, Lanczos, Pipeline, Restorer, true_noise, true_operator
from latentindigo.comparison import Contender
from latentindigo.degradations import STANDARD
from latentindigo.operators import Operator, Scale
from latentindigo.pipeline import RestorationPipeline
from latentindigo.prior import Calls
from latentindigo.rivals import (
    PSLD,
    DiffBIRGuidance,
    LatentDAPS,
    LatentDDNM,
    LatentDiffPIR,
    LatentDPS,
    Latino,
    ReSample,
    SDEdit,
)
from latentindigo.solver import OperatorSolver

__all__ = ["BLIND", "NAMES", "TOLD", "load_method", "load_settings", "recruit", "told_truth"]

OURS = "latentindigo"
REALISTIC = "realistic"
_SIMPLE: dict[str, Callable[[RestorationPipeline], Restorer]] = {
    "bicubic": lambda pipe: Bicubic(),
    "lanczos": lambda pipe: Lanczos(),
    "estimator": EstimatorAlone,
}
# Name -> method, variant and the pipeline's settings.
_OURS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "faithful": (OURS, "faithful", {"preset": "faithful"}),
    "default": (OURS, "default", {"preset": "default"}),
    "vivid": (OURS, "vivid", {"preset": "vivid"}),
    "balanced": (OURS, "fidelity 0.6", {"fidelity": 0.6}),
    "pixel-inn": (OURS, "default, pixel-inn", {"preset": "default", "method": "pixel-inn"}),
    "unguided": ("unguided", "default", {"preset": "default", "method": "unguided"}),
}
_BLIND: dict[str, Callable[..., Restorer]] = {"sdedit": SDEdit, "diffbir": DiffBIRGuidance}
_TOLD: dict[str, type[OperatorSolver]] = {
    "ldps": LatentDPS,
    "psld": PSLD,
    "resample": ReSample,
    "diffpir": LatentDiffPIR,
    "ddnm": LatentDDNM,
    "daps": LatentDAPS,
    "latino": Latino,
}
BLIND = (*_SIMPLE, *_OURS, *_BLIND)
TOLD = tuple(_TOLD)
NAMES = (*BLIND, *TOLD)


def load_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of the rivals that were chosen for a model: name -> fields.

    Args:
        folder: Model folder.

    Returns:
        What its `rivals.json` says; nothing without that file.

    Raises:
        ValueError: If the file is broken or names a method that is not in the roster.
    """
    path = folder / "rivals.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        settings = {name: dict(fields) for name, fields in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} does not hold settings of rivals: {error}") from error
    blind = (*_BLIND, *(f"{name} bicubic" for name in _TOLD))
    known = (*blind, *_TOLD, *(f"{name} {REALISTIC}" for name in blind))
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{path.name} names {', '.join(unknown)}; known: {', '.join(known)}")
    return settings


def told_truth(degradation: str) -> tuple[Operator, float] | None:
    """The true operator and noise of a standard degradation, None where no one operator is the truth."""
    if degradation not in STANDARD or STANDARD[degradation].second_order:
        return None
    return true_operator(degradation), true_noise(degradation)


def recruit(
    names: Sequence[str],
    pipe: RestorationPipeline,
    degradation: str,
    scale: int,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Contender]:
    """Contenders by name; a method that needs an operator takes part twice.

    Args:
        names: From `NAMES`.
        pipe: Our pipeline; rivals sample with its prior.
        degradation: What happened to the images, for those that are told.
        scale: Output size over input size.
        settings: See `load_settings`.

    Returns:
        The contenders. "true" knows the blur, the size and the noise; "bicubic" believes in plain bicubic
        downsampling with the noise of its settings. Where there is no one true operator only the latter takes part.

    Raises:
        ValueError: For an unknown name, or settings that a method does not have.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ValueError(f"unknown method {', '.join(unknown)}; known: {', '.join(NAMES)}")
    contenders: list[Contender] = []
    settings = settings or {}
    for name in dict.fromkeys(names):
        if name in _SIMPLE:
            contenders.append(Contender(name, "", _SIMPLE[name](pipe)))
        elif name in _OURS:
            method, variant, call = _OURS[name]
            contenders.append(Contender(method, variant, Pipeline(pipe, name, **call)))
        elif name in _BLIND:
            contenders += _blind(name, pipe, settings)
        else:
            contenders += _told(name, pipe, degradation, scale, settings)
    return contenders


def _blind(name: str, pipe: RestorationPipeline, settings: Mapping[str, Mapping[str, Any]]) -> list[Contender]:
    sets = {"": settings.get(name, {})}
    if f"{name} {REALISTIC}" in settings:
        sets[REALISTIC] = settings[f"{name} {REALISTIC}"]
    start = [EstimatorAlone(pipe)] if name == "diffbir" else []
    return [
        Contender(name, variant, _made(_BLIND[name], _prior(pipe), *start, **fields))
        for variant, fields in sets.items()
    ]


def _told(
    name: str,
    pipe: RestorationPipeline,
    degradation: str,
    scale: int,
    settings: Mapping[str, Mapping[str, Any]],
) -> list[Contender]:
    made: list[Contender] = []
    truth = told_truth(degradation)
    if truth is not None:
        operator, noise = truth
        fields = {**settings.get(name, {}), "noise": noise}
        made.append(Contender(name, "true", _made(_TOLD[name], _prior(pipe), operator, **fields)))
    sets = {"bicubic": settings.get(f"{name} bicubic", settings.get(name, {}))}
    if f"{name} bicubic {REALISTIC}" in settings:
        sets[f"bicubic, {REALISTIC}"] = settings[f"{name} bicubic {REALISTIC}"]
    made += [Contender(name, v, _made(_TOLD[name], _prior(pipe), Scale(scale), **f)) for v, f in sets.items()]
    return made


def _prior(pipe: RestorationPipeline) -> Any:
    """The pipeline's prior with a counter of its own."""
    return pipe.prior.counting(Calls())


def _made(kind: Callable[..., Restorer], *args: Any, **fields: Any) -> Restorer:
    try:
        return kind(*args, **fields)
    except TypeError as error:
        raise ValueError(f"settings that {getattr(kind, '__name__', kind)} does not have: {error}") from error


def load_method(path: Path, pipe: RestorationPipeline) -> Contender:
    """A method of yours: a Python file that defines `make(pipe)` and returns a restorer.

    The file is run as code, with all that this means: give only files that you trust.

    Args:
        path: The file.
        pipe: Passed to its `make`; `pipe.prior` is the diffusion model that the others use.

    Returns:
        The contender, under its restorer's name.

    Raises:
        ValueError: If there is no such file, it does not run, it has no `make`, or what that returns is no `Restorer`.
    """
    specification = importlib.util.spec_from_file_location(f"method_{path.stem}", path)
    if not path.is_file() or specification is None or specification.loader is None:
        raise ValueError(f"a Python file that defines make(pipe) expected, got {path.name!r}")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
        restorer = module.make(pipe)
    except Exception as error:
        raise ValueError(f"{path.name} could not make its method: {type(error).__name__}: {error}") from error
    missing = [name for name in ("name", "nfe", "__call__") if not hasattr(restorer, name)]
    if missing:
        raise ValueError(f"{path.name}: make(pipe) must return a restorer; what it returned lacks {', '.join(missing)}")
    return Contender(restorer.name, "", restorer)
