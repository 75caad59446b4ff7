"""Presets: their file, their messages, and the way between two of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from latentindigo.guidance import GuidanceConfig
from latentindigo.presets import PRESETS, Preset, blend_presets, load_presets, save_presets


def test_the_three_presets_are_there() -> None:
    assert set(PRESETS) == {"faithful", "default", "vivid"}
    # More trust in the measurement means less of what sampling invents.
    assert PRESETS["faithful"].texture < PRESETS["default"].texture < PRESETS["vivid"].texture
    assert PRESETS["faithful"].steps >= 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "inn"}, "method must be one of latent-inn, pixel-inn, unguided, got 'inn'"),
        ({"update": "gradient"}, "update must be one of projection, stopped, through"),
        ({"init": "bicubic"}, "init must be one of estimator, encode, inverse, noise"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"strength": 0.0}, r"strength must lie in \(0, 1\], 1 = pure noise, got 0.0"),
        ({"strength": 1.1}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"residual": -0.1}, r"residual must lie in \[0, 1\]"),
        ({"spread": 1.2}, r"spread must lie in \[0, 1\], got 1.2"),
        ({"texture": -0.1}, r"texture must lie in \[0, 2\]"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preset(**wrong)


def test_a_preset_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["default"].steps = 3  # pyright: ignore[reportAttributeAccessIssue] (that is the point)


def test_saved_presets_come_back(tmp_path: Path) -> None:
    mine = {**PRESETS, "vivid": Preset(steps=20, eta=0.5, guidance=GuidanceConfig(regulariser="trust", refine=True))}
    save_presets(mine, tmp_path)
    assert load_presets(tmp_path) == mine


def test_a_folder_without_presets_has_the_packages(tmp_path: Path) -> None:
    loaded = load_presets(tmp_path)
    assert loaded == PRESETS
    # A copy: what a pipeline adds to its presets is not added to all others'.
    assert loaded is not PRESETS


def test_settings_left_out_of_the_file_have_their_defaults(tmp_path: Path) -> None:
    entries = {"faithful": {}, "default": {"guidance": {"beta": 0.2}}, "vivid": {"steps": 3}}
    (tmp_path / "presets.json").write_text(json.dumps(entries))
    loaded = load_presets(tmp_path)
    assert loaded["faithful"] == Preset()
    assert loaded["default"] == Preset(guidance=GuidanceConfig(beta=0.2))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "3",
        '{"faithful": 3, "default": {}, "vivid": {}}',
        '{"faithful": [1], "default": {}, "vivid": {}}',
        '{"faithful": {"guidance": 3}, "default": {}, "vivid": {}}',
        '{"faithful": {"sharpness": 1}, "default": {}, "vivid": {}}',
        '{"faithful": {"guidance": {"xi": 1}}, "default": {}, "vivid": {}}',
        '{"faithful": {"steps": 0}, "default": {}, "vivid": {}}',
        '{"faithful": {"steps": "many"}, "default": {}, "vivid": {}}',
    ],
)
def test_a_broken_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "presets.json").write_text(text)
    with pytest.raises(ValueError, match=r"presets\.json does not hold presets: "):
        load_presets(tmp_path)


def test_a_missing_preset_is_named(tmp_path: Path) -> None:
    (tmp_path / "presets.json").write_text('{"default": {}}')
    with pytest.raises(ValueError, match="lacks the preset faithful, vivid"):
        load_presets(tmp_path)


VIVID = Preset(
    method="pixel-inn", steps=13, strength=0.8, guidance=GuidanceConfig(beta=0.1, zeta=4, regulariser="trust")
)
FAITHFUL = Preset(steps=6, strength=0.2, guidance=GuidanceConfig(beta=0.5, zeta=7, refine=True))


def test_the_ends_of_a_blend_are_the_presets() -> None:
    assert blend_presets(VIVID, FAITHFUL, 0.0) == VIVID
    assert blend_presets(VIVID, FAITHFUL, 1.0) == FAITHFUL


def test_numbers_are_interpolated_and_names_come_from_the_nearer() -> None:
    blended = blend_presets(VIVID, FAITHFUL, 0.25)
    assert blended.steps == round(0.75 * 13 + 0.25 * 6)
    assert isinstance(blended.steps, int)
    assert blended.strength == pytest.approx(0.65, abs=1e-12)
    assert blended.guidance.beta == pytest.approx(0.2, abs=1e-12)
    assert (blended.method, blended.guidance.regulariser, blended.guidance.refine) == ("pixel-inn", "trust", False)
    assert blend_presets(VIVID, FAITHFUL, 0.75).method == "latent-inn"


def test_real_settings_written_as_whole_numbers_are_interpolated() -> None:
    assert blend_presets(VIVID, FAITHFUL, 0.5).guidance.zeta == pytest.approx(5.5, abs=1e-12)


@pytest.mark.parametrize("fidelity", [-0.1, 1.1, float("nan")])
def test_fidelity_out_of_range_is_refused(fidelity: float) -> None:
    with pytest.raises(ValueError, match=r"fidelity must lie in \[0, 1\] \(0 = vivid, 1 = faithful\)"):
        blend_presets(VIVID, FAITHFUL, fidelity)
