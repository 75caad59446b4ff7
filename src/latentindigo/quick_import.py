"""Import diffusers without what a pipeline of the embedded model never uses: half of the time to start.

diffusers marks some blocks and hooks for `torch.compile` (`allow_in_graph`, `disable`). Marking them imports
`torch._dynamo` and with it sympy and the rest of the compiler, although nothing is compiled. While diffusers is
imported here, a stand-in leaves what it is given as it is. Later diffusers asks of every network whether it is
compiled; without the compiler none is, and the question need not load it. The compiler itself is untouched: it loads
when it is used.

diffusers also imports transformers and SciPy wherever they are installed. Text encoders and the beta spacing of noise
levels need them, the embedded model has neither.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

__all__ = ["import_diffusers"]

_COMPILER = "torch._dynamo"
_NEEDED = ("DiffusionPipeline", "ModelMixin", "SchedulerMixin", "UNet2DModel")
_OPTIONAL = ("transformers", "scipy")


def import_diffusers(*, optional: bool = True) -> None:
    """Import the parts of diffusers that a pipeline needs; does nothing once diffusers or the compiler is imported.

    Args:
        optional: Whether diffusers may find transformers and SciPy; what it does not find now it will not look for
            later in this process.
    """
    if _COMPILER in sys.modules or "diffusers" in sys.modules:
        return
    stand_in = types.ModuleType(_COMPILER)
    vars(stand_in).update(allow_in_graph=_as_it_is, disable=_as_it_is)
    sys.modules[_COMPILER] = stand_in
    setattr(torch, "_dynamo", stand_in)  # noqa: B010  (an attribute that the type stubs do not know)
    # None in this table means "not there" to every import.
    hidden: dict[str, Any] = {name: None for name in _OPTIONAL if not optional and name not in sys.modules}
    sys.modules.update(hidden)
    try:
        from diffusers.utils import torch_utils

        torch_utils.is_compiled_module = partial(_is_compiled, torch_utils.is_compiled_module)
        diffusers = importlib.import_module("diffusers")
        for name in _NEEDED:  # It imports its parts when they are asked for.
            getattr(diffusers, name)
    except (ImportError, AttributeError, RuntimeError):
        # Another version asks for more of the compiler: the slow way then, from the start.
        for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
            del sys.modules[name]
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
        if sys.modules.get(_COMPILER) is stand_in:
            del sys.modules[_COMPILER]
        if vars(torch).get("_dynamo") is stand_in:
            delattr(torch, "_dynamo")


def _is_compiled(ask: Callable[[Any], bool], module: Any) -> bool:
    return _COMPILER in sys.modules and ask(module)


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that changes nothing."""
    return function if callable(function) else _as_it_is
