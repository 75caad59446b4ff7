"""The door to pyiqa: its contract, tried on a stand-in with pyiqa's documented interface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from latentindigo import learned_metrics
from latentindigo.learned_metrics import (
    LEARNED_METRICS,
    LearnedMetricMissingError,
    available,
    learned_metric,
)

INSTALL = r"pip install 'latentindigo\[metrics\]'"
MODES = {"lpips": "FR", "dists": "FR", "fid": "NR", "musiq": "NR", "maniqa": "NR", "clipiqa": "NR"}
HIGHER = {"musiq", "maniqa", "clipiqa"}


class StandIn:
    """What `pyiqa.create_metric` gives: callable, with `lower_better` and `metric_mode`; it records its calls."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.lower_better = name not in HIGHER
        self.metric_mode = MODES[name]
        self.calls: list[tuple[Any, Any]] = []

    def __call__(self, x: Tensor | str, ref: Tensor | str | None = None) -> Tensor | float:
        self.calls.append((x, ref))
        if isinstance(x, str):
            assert isinstance(ref, str)
            return float(len(list(Path(x).iterdir())) - len(list(Path(ref).iterdir())))
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
        return ((x - ref).abs() if isinstance(ref, Tensor) else x).mean(dim=(1, 2, 3))[:, None]


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a stand-in for pyiqa, found by `import` and by `find_spec`, beside one for torchvision."""
    for name in ("pyiqa", "torchvision"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module = sys.modules["pyiqa"]
    monkeypatch.setattr(module, "create_metric", lambda name, device: StandIn(name, device), raising=False)
    return module


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make `find_spec` say that packages are not installed, whatever this machine has."""
    monkeypatch.setattr(learned_metrics, "find_spec", lambda name: None if name in names else ModuleSpec(name, None))


def images(seed: int = 0) -> Tensor:
    return torch.rand(3, 3, 8, 9, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("pyiqa")
@pytest.mark.parametrize("name", ["lpips", "dists"])
def test_pairs_give_one_number_per_image(name: str) -> None:
    assert available()
    metric, x, ref = learned_metric(name, "cpu"), images(0), images(1)
    score = metric(x, ref)
    assert metric.facts.lower_is_better and score.dtype == torch.float64
    torch.testing.assert_close(score, (x - ref).abs().mean(dim=(1, 2, 3)).double())
    assert torch.equal(metric(x, x), torch.zeros(3).double())
    torch.testing.assert_close(metric(x[1:2], ref[1:2]), score[1:2], rtol=0.0, atol=0.0)


@pytest.mark.usefixtures("pyiqa")
@pytest.mark.parametrize("name", sorted(HIGHER))
def test_single_images_need_no_reference(name: str) -> None:
    metric, x = learned_metric(name), images()
    assert not metric.facts.lower_is_better
    torch.testing.assert_close(metric(x), x.mean(dim=(1, 2, 3)).double())
    with pytest.raises(ValueError, match="pass no reference"):
        metric(x, x)


@pytest.mark.usefixtures("pyiqa")
def test_fid_compares_two_folders(tmp_path: Path) -> None:
    restored, clean = tmp_path / "restored", tmp_path / "clean"
    for folder, count in ((restored, 3), (clean, 1)):
        folder.mkdir()
        for index in range(count):
            (folder / f"{index}.png").touch()
    metric = learned_metric("fid")
    assert metric.facts.compares == "folders"
    assert metric(restored, clean).tolist() == [2.0]
    for wrong in ((restored, None), (restored, tmp_path / "none"), (images(), images())):
        with pytest.raises(ValueError, match="two existing folders"):
            metric(*wrong)


@pytest.mark.usefixtures("pyiqa")
def test_arguments_that_do_not_fit_are_refused() -> None:
    metric, x = learned_metric("lpips"), images()
    with pytest.raises(ValueError, match="as reference, got NoneType"):
        metric(x)
    with pytest.raises(ValueError, match=r"got \(3, 3, 8, 8\)"):
        metric(x, x[..., :8])
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\)"):
        metric(x[0], x[0])
    with pytest.raises(ValueError, match="PosixPath|WindowsPath"):
        metric(Path("a"), Path("b"))


@pytest.mark.usefixtures("pyiqa")
def test_images_are_clamped_copied_and_go_to_the_device() -> None:
    x = (2 * images() - 0.5).double().requires_grad_()
    metric = learned_metric("musiq", "cpu")
    score = metric(x)
    assert not score.requires_grad and float(x.detach().min()) < 0
    standin = metric._score
    assert isinstance(standin, StandIn) and standin.device == torch.device("cpu") == metric.device
    assert [tuple(call[0].shape) for call in standin.calls] == [(1, 3, 8, 9)] * 3


def test_the_facts_are_those_of_pyiqa() -> None:
    for name, facts in LEARNED_METRICS.items():
        assert facts.lower_is_better == (name not in HIGHER)
        assert (facts.compares == "pairs") == (MODES[name] == "FR")


@pytest.mark.parametrize("missing", [("pyiqa",), ("torchvision",), ("pyiqa", "torchvision")], ids=" ".join)
def test_missing_packages_are_named_in_one_sentence(monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]) -> None:
    absent(monkeypatch, *missing)
    assert not available()
    with pytest.raises(LearnedMetricMissingError, match=f"'lpips' needs {' and '.join(missing)}.*{INSTALL}") as caught:
        learned_metric("lpips")
    assert isinstance(caught.value, ImportError) and "\n" not in str(caught.value)


def raising(error: Exception) -> Callable[..., Any]:
    def create_metric(name: str, device: torch.device) -> Any:
        raise error

    return create_metric


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "weights of 'musiq'.*ConnectionError: no route"),
        (RuntimeError("invalid hash value"), "weights of 'musiq'.*invalid hash"),
        (ImportError("No module named 'clip'"), "cannot be imported.*No module named 'clip'"),
    ],
    ids=["no network", "broken weights", "broken install"],
)
def test_what_fails_to_load_says_so(
    pyiqa: ModuleType, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(pyiqa, "create_metric", raising(error))
    with pytest.raises(LearnedMetricMissingError, match=f"{message}.*{INSTALL}"):
        learned_metric("musiq")


def test_other_names_and_another_direction_are_refused(pyiqa: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected one of lpips, dists, fid, musiq, maniqa, clipiqa, got 'niqe'"):
        learned_metric("niqe")
    reversed_one = StandIn("musiq", torch.device("cpu"))
    reversed_one.lower_better = True
    monkeypatch.setattr(pyiqa, "create_metric", lambda name, device: reversed_one)
    with pytest.raises(ValueError, match="lower is better True"):
        learned_metric("musiq")


def test_a_score_that_is_no_number_is_refused(pyiqa: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoNumbers(StandIn):
        def __call__(self, x: Tensor | str, ref: Tensor | str | None = None) -> Tensor:
            return torch.zeros(2)

    monkeypatch.setattr(pyiqa, "create_metric", lambda name, device: TwoNumbers(name, device))
    with pytest.raises(ValueError, match="expected one number from pyiqa, got 2"):
        learned_metric("clipiqa")(images())
