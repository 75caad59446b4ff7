"""Public names may be added on purpose and never vanish by accident.

After a change on purpose: `python tests/unit/test_api_surface.py` records the names of today.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

import pytest

import latentindigo

RECORD = Path(__file__).parent.parent / "api_surface.json"


def surface() -> dict[str, list[str]]:
    """Return the public names of every module as they are now."""
    modules = ["latentindigo", *(f"latentindigo.{info.name}" for info in pkgutil.iter_modules(latentindigo.__path__))]
    names = {}
    for name in modules:
        if name != "latentindigo.__main__":
            module = importlib.import_module(name)
            names[name] = sorted(module.__all__)
    return names


def check_surface(now: dict[str, list[str]], recorded: dict[str, list[str]]) -> None:
    """Compare the names of now with those recorded."""
    gone = {f"{m}.{n}" for m in recorded for n in recorded[m]} - {f"{m}.{n}" for m in now for n in now[m]}
    new = {f"{m}.{n}" for m in now for n in now[m]} - {f"{m}.{n}" for m in recorded for n in recorded[m]}
    assert not gone, f"public names vanished: {sorted(gone)}"
    assert not new, f"public names not recorded yet (run {Path(__file__).name}): {sorted(new)}"


def test_public_names_are_the_recorded_ones() -> None:
    check_surface(surface(), json.loads(RECORD.read_text()))


@pytest.mark.parametrize(
    "change", [{"m": ["a"]}, {"m": ["a", "b", "c"]}, {}], ids=["name gone", "new name", "module gone"]
)
def test_the_check_finds_changes(change: dict[str, list[str]]) -> None:
    with pytest.raises(AssertionError):
        check_surface(change, {"m": ["a", "b"]})


def test_public_names_exist() -> None:
    for module, names in surface().items():
        for name in names:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name} is in __all__ and does not exist"


def test_saved_classes_keep_their_module_paths() -> None:
    """A saved model names its classes by module path, so moving one would break every saved model."""
    from latentindigo import autoencoder, inn, pipeline

    for module, names in (
        (inn, ["InvertibleNet", "DegradationEncoder", "Estimator"]),
        (autoencoder, ["PatchAutoencoder"]),
        (pipeline, ["RestorationPipeline"]),
    ):
        for name in names:
            assert getattr(module, name).__module__ == module.__name__


def test_lazy_names_are_listed_and_unknown_ones_refused() -> None:
    assert set(latentindigo.__all__) <= set(dir(latentindigo))
    with pytest.raises(AttributeError, match="RestorationPipeline"):
        latentindigo.Restore  # noqa: B018 (the look-up is the test)


if __name__ == "__main__":
    RECORD.write_text(json.dumps(surface(), indent=1) + "\n")
