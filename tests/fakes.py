"""A pipeline that is no network: for tests of what lies around the pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentindigo.images import LoadedImage, save_image

__all__ = ["FakeOutput", "FakePipe", "ramp", "written"]


@dataclass
class FakeOutput:
    """The part of `RestorationOutput` that `jobs` reads."""

    images: list[Tensor]
    detail_maps: list[Tensor]
    uncertainty: list[Tensor] | None
    settings: dict[str, Any]


@dataclass
class FakePipe:
    """Stands in for a `RestorationPipeline` where a test needs it to fail on cue or to be exactly predictable.

    Same call contract: tensors (3, H, W) in, one image and one detail map per sample out, the callback after each of
    `steps` steps. The "restoration" is a bicubic enlargement, slightly coloured, so that grey pictures do not stay
    grey by accident.
    """

    failures: dict[int, Exception] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)
    seed_shift: bool = False

    def __call__(
        self,
        image: Tensor,
        *,
        scale: float,
        size: tuple[int, int] | None,
        num_samples: int,
        seed: int,
        steps: int | None,
        output_type: str,
        callback_on_step_end: Any,
        **rest: Any,
    ) -> FakeOutput:
        self.calls.append({"scale": scale, "size": size, "seed": seed, "output_type": output_type, **rest})
        if failure := self.failures.get(len(self.calls) - 1):
            raise failure
        for step in range(steps or 2):
            callback_on_step_end(self, step, 0, {})
        height, width = image.shape[-2:]
        target = (round(height * scale), round(width * scale)) if size is None else (size[1], size[0])
        x = F.interpolate(image[None], target, mode="bicubic")[0] + torch.tensor([0.02, 0.0, -0.02])[:, None, None]
        images = [x + 0.001 * k + (0.01 * seed if self.seed_shift else 0) for k in range(num_samples)]
        maps = [torch.full((1, *target), 0.1) for _ in images] if rest.get("detail_maps") else []
        uncertainty = [torch.full((1, *target), 0.05)] if num_samples > 1 else None
        return FakeOutput(images, maps, uncertainty, {"scale": scale, "steps": steps or 2})

    def weights_hash(self) -> str:
        return "c0ffee"


def ramp(height: int = 6, width: int = 8) -> Tensor:
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.stack([rows.expand(-1, width), columns.expand(height, -1), (rows + columns) / 2])


def written(path: Path, image: LoadedImage | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(image or LoadedImage(ramp()), path)
    return path
