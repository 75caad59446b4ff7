"""The table of what fits: recorded sizes are those of the networks, the page is made of them, and it makes sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from latentindigo.cli import app
from latentindigo.memory import CARDS, METHODS, OFFLOADS, PriorSizes, memory_table, memory_tables, what_fits

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "benchmarks" / "prior_configs"
# Numbers of weights as the models' authors and libraries report them.
PUBLISHED = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684, "flux1-dev": 11_901_408_320}


@pytest.fixture(scope="module")
def found() -> dict[str, PriorSizes]:
    """Return the recorded sizes."""
    return PriorSizes.load()


def count(config: dict[str, Any]) -> int:
    """Numbers in a network of diffusers, built without memory."""
    settings = dict(config)
    kind = getattr(diffusers, settings.pop("_class_name"))
    with torch.device("meta"):
        network = kind(**settings)
    return sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))


def check_counts(sizes: PriorSizes, model: dict[str, Any], parts: tuple[str, ...]) -> None:
    """Raise AssertionError unless recorded numbers of weights are those of the networks."""
    for part in parts:
        assert count(model[part]) == sizes.weights[part], part


@pytest.mark.parametrize("name", ["sd15", "sd35-medium"])
def test_recorded_weights_are_those_of_the_networks(found: dict[str, PriorSizes], name: str) -> None:
    model = json.loads((CONFIGS / f"{name}.json").read_text())
    parts = ("vae", "guidance_vae") if name == "sd35-medium" else ("denoiser", "vae", "guidance_vae")
    check_counts(found[name], model, parts)
    model["vae"]["layers_per_block"] = 1
    with pytest.raises(AssertionError, match="vae"):
        check_counts(found[name], model, parts)


def test_recorded_weights_are_the_published_ones(found: dict[str, PriorSizes]) -> None:
    assert {name: found[name].weights["denoiser"] for name in PUBLISHED} == PUBLISHED
    assert set(found) == {path.stem for path in CONFIGS.glob("*.json")}


def test_the_page_is_made_of_the_recorded_sizes(found: dict[str, PriorSizes]) -> None:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert f"-->\n\n{memory_tables(found)}\n<!--" in page, "run python benchmarks/memory_table.py --write"


def test_more_needs_more(found: dict[str, PriorSizes]) -> None:
    for sizes in found.values():
        for method in METHODS:
            needed = [[sizes.needed(method, side, offload) for side in (512, 1024)] for offload in OFFLOADS]
            assert all(small < large for small, large in needed)
            assert all(a >= b >= c for a, b, c in zip(*needed, strict=True))
            assert needed[0][1] >= sizes.needed("unguided", 1024, "none")
        for guide in ("latent-inn", "pixel-inn"):
            assert sizes.needed(f"{guide} through", 512, "none") > sizes.needed(f"{guide} stopped", 512, "none")
        stopped = (sizes.needed(f"pixel-inn stopped{end}", 512, "none") for end in (", tiny decoder", ""))
        assert next(stopped) < next(stopped)
        assert len(memory_table(sizes)) == len(METHODS) * len(OFFLOADS)


def test_a_card_that_fits_more_is_no_worse(found: dict[str, PriorSizes]) -> None:
    order = ["–", *(f"{o}{t}" for o in ("sequential", "model", "none") for t in (", tiles", ""))]
    for row in what_fits(found, (4, 8, 12, 24, 100)):
        cells = [row[f"{card} GB"] for card in (4, 8, 12, 24, 100)]
        assert cells[-1] == "none", row
        assert ("–" in cells) == (cells[0] == "–")
        assert all(cell in order for cell in cells)


def test_by_hand(found: dict[str, PriorSizes]) -> None:
    """SD 1.5, LatentINN, whole on the accelerator: weights twice, the larger of the peaks, and the runtime."""
    sizes = found["sd15"]
    weights = 2 * (sizes.weights["denoiser"] + sizes.weights["vae"])
    inns = 4 * (sizes.weights["pixel_inn"] + sizes.weights["latent_inn"])
    expected = 0.6e9 + weights + inns + 8e6 + 1.1 * sizes.peaks[512]["decode"]
    assert sizes.needed("latent-inn stopped", 512, "none") == pytest.approx(expected)


def test_questions_without_an_answer(found: dict[str, PriorSizes]) -> None:
    for method, side, offload in (("psld", 512, "none"), ("unguided", 513, "none"), ("unguided", 512, "disk")):
        with pytest.raises(ValueError, match="expected a method among"):
            found["sd15"].needed(method, side, offload)


def test_the_command_prints_it(found: dict[str, PriorSizes]) -> None:
    told = CliRunner().invoke(app, ["info", "--memory"])
    assert told.exit_code == 0
    assert len(told.stdout.splitlines()) == 1 + len(found) * len(METHODS)
    as_json = CliRunner().invoke(app, ["info", "--memory", "--json"])
    assert json.loads(as_json.stdout)["memory"] == what_fits(found, CARDS)
