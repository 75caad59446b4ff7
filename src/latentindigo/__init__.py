"""Blind image restoration with a latent diffusion model guided by an invertible neural network.

Names are resolved on first use (PEP 562), so that ``import latentindigo`` and ``latentindigo --help`` do not load
PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentindigo.guidance import GuidanceConfig
    from latentindigo.pipeline import RestorationOutput, RestorationPipeline

__version__ = "0.1.0"

__all__ = ["GuidanceConfig", "RestorationOutput", "RestorationPipeline", "__version__"]

_HOME = {
    "GuidanceConfig": "latentindigo.guidance",
    "RestorationOutput": "latentindigo.pipeline",
    "RestorationPipeline": "latentindigo.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
