"""Fixtures and rules that every test shares."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from latentindigo.pipeline import RestorationPipeline

# Nothing may be fetched behind a test's back: a test that needs the internet says so with the marker `network`.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Progress bars of libraries would only clutter the log.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Tiny networks: a second thread costs more than it brings, and the second core has tests of its own (pytest-xdist).
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, visibly and with the reason, what this machine cannot run."""
    if item.get_closest_marker("network") and os.environ.get("LATENTINDIGO_NETWORK") != "1":
        pytest.skip("needs the internet; set LATENTINDIGO_NETWORK=1 to run it")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and none is available")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start every test from the same global random state, whatever order the tests run in.

    The package itself takes explicit generators only; this covers the random weights that PyTorch draws when a test
    builds a network.
    """
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of evaluation photos, with `train`, `val` and `real` inside, or skip.

    The folder is named by LATENTINDIGO_DATA; without it, `../shared/data` beside the repository is tried.
    """
    named = os.environ.get("LATENTINDIGO_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not (folder / "val").is_dir():
        pytest.skip(f"no photos at {folder}; set LATENTINDIGO_DATA to a folder with train/, val/ and real/")
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline() -> RestorationPipeline:
    """Return a complete pipeline of tiny random networks; calling it never changes it, so all tests share it."""
    import tiny

    return tiny.tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_model(tiny_pipeline: RestorationPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder with the weights of `tiny_pipeline`."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_pipeline.save_pretrained(folder)
    return folder
