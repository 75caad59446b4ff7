"""The optional door to quality metrics that are networks: LPIPS, DISTS, FID, MUSIQ, MANIQA and CLIP-IQA, through pyiqa.

Nothing else in the package imports this module, and pyiqa is imported when a metric is made, not before. pyiqa fetches
the networks' weights from the internet at the first use of each metric. It and some of the weights come under licences
that forbid commercial use; read them before publishing numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "LEARNED_METRICS",
    "LearnedMetric",
    "LearnedMetricMissingError",
    "MetricFacts",
    "available",
    "learned_metric",
]

NEEDED = ("pyiqa", "torchvision")


@dataclass(frozen=True)
class MetricFacts:
    """What is known of a metric before it is loaded.

    Attributes:
        lower_is_better: Which direction is good.
        compares: "pairs" of a restored and a clean image, "single" images, or "folders" of restored and clean images.
    """

    lower_is_better: bool
    compares: Literal["pairs", "single", "folders"]


LEARNED_METRICS = {
    "lpips": MetricFacts(lower_is_better=True, compares="pairs"),
    "dists": MetricFacts(lower_is_better=True, compares="pairs"),
    "fid": MetricFacts(lower_is_better=True, compares="folders"),
    "musiq": MetricFacts(lower_is_better=False, compares="single"),
    "maniqa": MetricFacts(lower_is_better=False, compares="single"),
    "clipiqa": MetricFacts(lower_is_better=False, compares="single"),
}
"""Metrics of pyiqa by name, with what each compares."""


class LearnedMetricMissingError(ImportError):
    """A learned metric cannot be had here; the message is one sentence that says what is missing and how to get it."""


@dataclass(frozen=True)
class LearnedMetric:
    """A loaded metric; call it. Made by `learned_metric`.

    Attributes:
        name: Its key in `LEARNED_METRICS`.
        facts: Which direction is good, and what it compares.
        device: Where its network lies.
    """

    name: str
    facts: MetricFacts
    device: torch.device
    _score: Callable[..., Any] = field(repr=False)

    def __call__(self, x: Tensor | Path, ref: Tensor | Path | None = None) -> Tensor:
        """Score images, each on its own, or two folders.

        Args:
            x: Restored images, (B, 3, H, W), [0, 1]; for "folders" the folder of restored pictures.
            ref: For "pairs" clean images of the same shape; for "folders" the folder of clean ones; otherwise None.

        Returns:
            float64 on the CPU, (B,); (1,) for folders.

        Raises:
            ValueError: The arguments are not those of this kind of metric.
        """
        if self.facts.compares == "folders":
            if not isinstance(x, Path) or not isinstance(ref, Path) or not (x.is_dir() and ref.is_dir()):
                raise ValueError(
                    f"{self.name}: expected two existing folders, of restored and of clean pictures, got {x!r:.80} "
                    f"and {ref!r:.80}; it compares sets of images, so save them first"
                )
            return _number(self._score(str(x), str(ref)), self.name)[None]
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{self.name}: expected images (B, 3, H, W) in [0, 1], got {got}")
        if self.facts.compares == "single":
            if ref is not None:
                raise ValueError(f"{self.name}: judges single images, so pass no reference")
            return torch.stack([_number(self._score(image), self.name) for image in self._prepared(x)])
        if not isinstance(ref, Tensor) or ref.shape != x.shape:
            got = tuple(ref.shape) if isinstance(ref, Tensor) else type(ref).__name__
            raise ValueError(f"{self.name}: expected clean images of shape {tuple(x.shape)} as reference, got {got}")
        pairs = zip(self._prepared(x), self._prepared(ref), strict=True)
        return torch.stack([_number(self._score(image, clean), self.name) for image, clean in pairs])

    def _prepared(self, x: Tensor) -> tuple[Tensor, ...]:
        """Batches of one, as pyiqa takes them: a score then does not depend on what else is in the batch."""
        return x.detach().float().clamp(0, 1).to(self.device).split(1)


def _number(score: object, name: str) -> Tensor:
    value = torch.as_tensor(score).detach().to("cpu", torch.float64).reshape(-1)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one number from pyiqa, got {value.numel()}; try another version of pyiqa")
    return value[0]


def available() -> bool:
    """Whether the packages that learned metrics need are installed; their weights may still be missing."""
    return not _missing()


def _missing() -> list[str]:
    return [package for package in NEEDED if find_spec(package) is None]


def learned_metric(name: str, device: str | torch.device = "cpu") -> LearnedMetric:
    """Load a learned metric.

    Args:
        name: A key of `LEARNED_METRICS`.
        device: Where its network runs.

    Returns:
        The metric: `metric(x, ref)` for pairs, `metric(x)` for single images, `metric(folder, folder)` for "fid".

    Raises:
        ValueError: There is no metric of this name, or pyiqa takes another direction for the good one.
        LearnedMetricMissingError: pyiqa or torchvision is not installed or broken, or weights cannot be fetched.
    """
    if name not in LEARNED_METRICS:
        raise ValueError(f"expected one of {', '.join(LEARNED_METRICS)}, got {name!r}")
    if missing := _missing():
        raise LearnedMetricMissingError(
            f"the metric {name!r} needs {' and '.join(missing)}, not installed here; "
            "pip install 'latentindigo[metrics]'"
        )
    facts, target = LEARNED_METRICS[name], torch.device(device)
    try:
        import pyiqa  # pyright: ignore[reportMissingImports]

        score = pyiqa.create_metric(name, device=target)
    except ImportError as error:
        raise LearnedMetricMissingError(
            f"the metric {name!r} cannot be imported ({error}); pip install 'latentindigo[metrics]'"
        ) from error
    except (OSError, RuntimeError) as error:
        # Downloads fail as OSError (no network, no such file) or as RuntimeError (a hash that does not match).
        raise LearnedMetricMissingError(
            f"pyiqa could not load the weights of {name!r} ({type(error).__name__}: {error}); pip install "
            "'latentindigo[metrics]' and load the metric once on a machine with internet, or copy its cache of weights"
        ) from error
    mode = "FR" if facts.compares == "pairs" else "NR"
    if (bool(score.lower_better), score.metric_mode) != (facts.lower_is_better, mode):
        raise ValueError(
            f"pyiqa says of {name!r}: lower is better {score.lower_better}, mode {score.metric_mode}; expected "
            f"{facts.lower_is_better} and {mode}, so use a pyiqa of the versions that pyproject.toml names"
        )
    return LearnedMetric(name, facts, target, score)
