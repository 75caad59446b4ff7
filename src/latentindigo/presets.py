"""Presets: how much to trust the measurement and how much to let the prior invent. Data, not code.

A model folder brings its own values in `presets.json`, tuned on photographs kept for choices; the values here serve
models without that file.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from latentindigo.guidance import UPDATES, GuidanceConfig, Update
from latentindigo.inn import VIEWS

__all__ = ["INITS", "METHODS", "PRESETS", "Preset", "blend_presets", "load_presets", "save_presets"]

Method = Literal["latent-inn", "pixel-inn", "unguided"]
Init = Literal["estimator", "encode", "inverse", "noise"]
METHODS: tuple[Method, ...] = ("latent-inn", "pixel-inn", "unguided")
"""Ways to compare with the measurement: in latents, in pixels, not at all."""
INITS: tuple[Init, ...] = ("estimator", "encode", "inverse", "noise")
"""What sampling can start from."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """All settings of a restoration that are a matter of taste.

    Attributes:
        method: "latent-inn", "pixel-inn" or "unguided".
        update: "projection", "stopped" or "through".
        init: Where sampling starts: "estimator" (stage-one estimate), "encode" (bicubic enlargement), "inverse"
            (g⁻¹(y, 0, gamma)) or "noise".
        steps: Denoiser evaluations.
        strength: Noise level sigma/sqrt(alpha² + sigma²) at the start, 1 = pure noise.
        eta: Share of fresh noise in each step, for schedulers that know it (0 = deterministic).
        residual: Share of what the autoencoder lost of the start image that is added back at the end, 0..1.
        spread: Share of the estimate's own uncertainty that is drawn before sampling, 0..1 (see
            `InvertibleNet.spread`).
        texture: Share of what sampling changed about the start image that is kept, 0..2 (see `texture.keep_texture`).
        chroma: Share of what it changed about the colours that is kept, 0..1 (see `texture.keep_chroma`).
        coarse: Share of what it changed where y itself shows the image that is kept, 0..1 (see `texture.keep_coarse`).
        same_size: Factor on `texture` where the output is about as large as y: no detail was lost to size, and more can
            be spoilt.
        ensemble: Views of y over which the stage-one estimate is averaged, 1..8 (see `Estimator.self_ensemble`).
        guidance: Settings of the guidance.
    """

    method: Method | str = "latent-inn"
    update: Update | str = "projection"
    init: Init | str = "estimator"
    steps: int = 8
    strength: float = 0.4
    eta: float = 0.0
    residual: float = 1.0
    spread: float = 0.0
    texture: float = 1.0
    chroma: float = 1.0
    coarse: float = 1.0
    same_size: float = 1.0
    ensemble: int = 1
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("update", UPDATES), ("init", INITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 1 <= self.ensemble <= VIEWS:
            raise ValueError(f"ensemble must lie in 1..{VIEWS}, the views of an image, got {self.ensemble}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], 1 = pure noise, got {self.strength}")
        if not 0 <= self.texture <= 2:
            raise ValueError(f"texture must lie in [0, 2], got {self.texture}")
        for name in ("eta", "residual", "spread", "chroma", "coarse", "same_size"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


PRESETS: dict[str, Preset] = {
    "faithful": Preset(steps=4, strength=0.6, spread=1.0, texture=0.04, chroma=0.25, coarse=0.0, ensemble=8),
    "default": Preset(
        steps=8, strength=0.65, spread=1.0, texture=1.0, chroma=0.25, coarse=0.25, same_size=0.5, ensemble=4
    ),
    "vivid": Preset(
        steps=8, strength=0.65, spread=1.0, texture=1.45, chroma=0.25, coarse=0.25, same_size=0.6, ensemble=4
    ),
}
"""Presets of models that bring none of their own."""


def load_presets(folder: Path) -> dict[str, Preset]:
    """Presets of a model folder, those of this module without a `presets.json`.

    Args:
        folder: Model folder.

    Returns:
        Name -> preset; "faithful", "default" and "vivid" are always there.

    Raises:
        ValueError: If the file names unknown settings or lacks a preset.
    """
    path = folder / "presets.json"
    if not path.is_file():
        return dict(PRESETS)
    try:
        entries: dict[str, dict[str, Any]] = json.loads(path.read_text())
        presets = {n: Preset(**{**e, "guidance": GuidanceConfig(**e.get("guidance", {}))}) for n, e in entries.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold presets: {error}") from error
    missing = sorted(set(PRESETS) - set(presets))
    if missing:
        raise ValueError(f"{path} lacks the preset {', '.join(missing)}")
    return presets


def save_presets(presets: dict[str, Preset], folder: Path) -> None:
    """Write `presets.json` into a model folder."""
    entries = {name: dataclasses.asdict(preset) for name, preset in presets.items()}
    (folder / "presets.json").write_text(json.dumps(entries, indent=2) + "\n")


def blend_presets(vivid: Preset, faithful: Preset, fidelity: float) -> Preset:
    """A preset between two others: numbers are interpolated, everything else comes from the nearer one.

    Args:
        vivid: Preset at fidelity 0.
        faithful: Preset at fidelity 1.
        fidelity: 0..1.

    Returns:
        The blended preset.

    Raises:
        ValueError: If fidelity is outside [0, 1].
    """
    if not 0 <= fidelity <= 1:
        raise ValueError(f"fidelity must lie in [0, 1] (0 = vivid, 1 = faithful), got {fidelity}")

    def blend(a: Any, b: Any, kind: Any) -> Any:
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            fields = dataclasses.fields(a)
            return type(a)(**{f.name: blend(getattr(a, f.name), getattr(b, f.name), f.type) for f in fields})
        if isinstance(a, bool) or not isinstance(a, (int, float)):
            return b if fidelity >= 0.5 else a
        value = (1 - fidelity) * a + fidelity * b
        # By the field's declared type: a file may write a real number as 3, and 3 and 4 still blend to 3.5.
        return round(value) if kind in (int, "int") else value

    return blend(vivid, faithful, Preset)
