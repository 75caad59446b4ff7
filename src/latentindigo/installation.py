"""What is installed here: versions, the model and its hashes, devices, dtypes, optional parts."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch

from latentindigo import __version__
from latentindigo.model_folder import model_folder

__all__ = ["WithWeights", "describe_installation"]


# Packages behind the extras of pyproject.toml that somebody who restores may want, by the names they are imported by.
_OPTIONAL = ("gradio", "pillow_heif", "pyarrow", "pyiqa", "ray", "s3fs", "spandrel", "transformers")


@runtime_checkable
class WithWeights(Protocol):
    """Anything that can hash its weights, such as a `RestorationPipeline`."""

    def weights_hash(self) -> str:
        """Hash of all weights."""
        ...


def describe_installation(model: str, load: Callable[[str], WithWeights]) -> dict[str, Any]:
    """Say what is installed here: versions, model and hashes, devices, dtypes, optional parts.

    The model is loaded for it, so a description without `model["error"]` is also a proof that it loads.

    Args:
        model: "embedded", a folder, or a hub id.
        load: Loads a model by that name.

    Returns:
        Plain values, ready for JSON. `model["hash"]` is the one that results carry; `model["files"]` are the SHA-256
        of its files; `model["error"]` is None, or says why it cannot be loaded.
    """
    packages = ("torch", "diffusers", "accelerate", "safetensors", "numpy", "pillow")
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version_of(name) for name in packages},
        "model": _describe_model(model, load),
        "devices": _devices(),
        "dtypes": _dtypes(),
        "threads": torch.get_num_threads(),
        "optional": {name: find_spec(name) is not None for name in _OPTIONAL},
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _describe_model(model: str, load: Callable[[str], WithWeights]) -> dict[str, Any]:
    description: dict[str, Any] = {"name": model, "folder": None, "hash": None, "files": {}, "error": None}
    try:
        folder = model_folder(model)
        description["folder"] = str(folder)
        description["files"] = {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.safetensors"))
        }
        description["hash"] = load(model).weights_hash()
    except (OSError, ValueError, RuntimeError) as error:
        description["error"] = str(error)
    return description


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": platform.processor() or platform.machine()}]
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": torch.cuda.get_device_name(index),
                "memory_gib": round(memory / 2**30, 1),
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU"})
    return devices


def _dtypes() -> list[str]:
    """List the dtypes worth using here: half precision without hardware for it only loses time."""
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    return ["float32", "bfloat16", *(["float16"] if accelerated else [])]
