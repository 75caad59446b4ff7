"""What wheel and sdist must hold; `make package` builds them, looks inside, and installs both."""

from __future__ import annotations

import importlib
import io
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the checks of what was built."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("check_package")


def test_what_must_travel_is_expected(package: Any) -> None:
    expected = package.expected_package()
    for name in (
        "__init__.py",
        "py.typed",
        "prior_sizes.json",
        "weights/niqe.safetensors",
        "weights/embedded/README.md",
        "weights/embedded/presets.json",
        "weights/embedded/rivals.json",
        "weights/embedded/denoiser/diffusion_pytorch_model-00002-of-00002.safetensors",
        "recipes/latent-inn-prior.toml",
        "recipes/tune.txt",
        "photos/coffee.png",
    ):
        assert f"latentindigo/{name}" in expected
    assert not [name for name in expected if "__pycache__" in name]


def wheel_of(expected: set[str]) -> set[str]:
    """Files of a wheel without a fault."""
    info = "latentindigo-0.1.0.dist-info"
    return expected | {f"{info}/{name}" for name in ("METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE")}


def sdist_of(expected: set[str]) -> set[str]:
    """Files of an sdist without a fault."""
    parts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    named = {name for name in parts["sdist"]["only-include"] if (ROOT / name).is_file()}
    moved = {"latentindigo/recipes": "recipes", "latentindigo/photos": "examples/photos"}
    inside = set()
    for name in expected:
        folder, _, file = name.rpartition("/")
        inside.add(f"{moved[folder]}/{file}" if folder in moved else f"src/{name}")
    return named | inside | {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}


def test_good_archives_pass(package: Any) -> None:
    expected = package.expected_package()
    assert list(package.wrong_with_wheel(wheel_of(expected), expected)) == []
    assert list(package.wrong_with_sdist(sdist_of(expected), expected)) == []


@pytest.mark.parametrize("name", ["latentindigo/py.typed", "latentindigo/recipes/denoiser.toml"])
def test_a_missing_file_is_found(name: str, package: Any) -> None:
    expected = package.expected_package()
    assert list(package.wrong_with_wheel(wheel_of(expected) - {name}, expected)) == [f"the wheel lacks {name}"]
    inside = name.removeprefix("latentindigo/") if "/recipes/" in name else f"src/{name}"
    assert list(package.wrong_with_sdist(sdist_of(expected) - {inside}, expected)) == [f"the sdist lacks {inside}"]


def test_a_wheel_without_the_licence_is_found(package: Any) -> None:
    expected = package.expected_package()
    files = {name for name in wheel_of(expected) if not name.endswith("LICENSE")}
    assert list(package.wrong_with_wheel(files, expected)) == ["the wheel lacks the licence"]


@pytest.mark.parametrize("name", ["tests/conftest.py", ".venv/bin/python", ".ci/run", "outputs/demo/cat.png", "a.log"])
def test_a_stray_file_is_found(name: str, package: Any) -> None:
    expected = package.expected_package()
    assert len(list(package.wrong_with_wheel(wheel_of(expected) | {name}, expected))) == 1
    assert len(list(package.wrong_with_sdist(sdist_of(expected) | {name}, expected))) == 1


def test_archives_are_read(package: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("latentindigo/__init__.py", "")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as sdist:
        sdist.addfile(tarfile.TarInfo("latentindigo-0.1.0/src/latentindigo/__init__.py"), io.BytesIO())
    assert package.wheel_files(package.only(tmp_path, "*.whl")) == {"latentindigo/__init__.py"}
    assert package.sdist_files(package.only(tmp_path, "*.tar.gz")) == {"src/latentindigo/__init__.py"}
    (tmp_path / "b.whl").touch()
    with pytest.raises(SystemExit, match="expected one"):
        package.only(tmp_path, "*.whl")


def test_constraints_fit_every_index() -> None:
    """A build such as +cpu is known to one index only."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    builds = [line for line in lines if "+" in line and not line.startswith("#")]
    assert not builds, f"expected plain versions, got {builds}"
