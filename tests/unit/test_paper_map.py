"""The map from the paper to the code: every target exists where it says, and no equation is missing."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "latentindigo"
MAP = ROOT / "docs" / "paper_map.md"
TARGET = re.compile(r"`([a-z0-9_]+\.py):([A-Za-z0-9_.]+)`")

# Every equation and step of the method by its name. A new one is added here and in the map; none may vanish.
EQUATIONS = (
    "Invertible network g",
    "Inverse network g⁻¹",
    "Split (lazy wavelet)",
    "Predict",
    "Update",
    "Networks P and U",
    "Zero initialisation",
    "Fixed Haar lifting step",
    "Undecimated Haar split",
    "Degradation encoder F",
    "Damage read off γ",
    "Stage-one estimate",
    "x_inv",
    "Band mix",
    "Coarse gain",
    "Pooled statistics",
    "Traces of damage",
    "JPEG combs",
    "Self-ensemble",
    "PixelINN training loss",
    "LatentINN training loss",
    "Training of the estimate",
    "Training of F",
    "Band response",
    "Start of the band mix",
    "Denoiser training loss",
    "Autoencoder",
    "Autoencoder training loss",
    "Degradation order",
    "Second-order degradation",
    "Training range",
    "Sampling algorithm",
    "Start",
    "Denoised estimate z_{0,t}",
    "Scheduler step",
    "Data term loss",
    "PixelINN",
    "LatentINN",
    "Guidance through the denoiser",
    "Refinement",
    "Regularisation",
    "Autoencoder consistency",
    "Gluing",
    "Re-noising",
    "Trust region",
    "Decoding",
    "Wavelet colour correction",
    "Size-independent norm",
    "Where the update lands",
    "Strength",
    "Write-back of z_0",
    "Update stopped at z_{0,t}",
    "Projection",
    "Gain by noise",
    "Trusted target",
    "Map of invented detail",
    "Map of uncertainty",
    "Non-blind mode",
    "Range–null-space step",
    "Autoencoder residual",
    "Spread of the estimate",
    "Draw around the estimate",
    "Texture",
    "Uneven spread",
    "Chroma",
    "Coarse",
    "Guidance on tiles",
    "Partition of unity",
    "Counted calls",
    "Latent DPS",
    "PSLD",
    "ReSample",
    "DiffPIR in latents",
    "DDNM in latents",
    "Latent DAPS",
    "LATINO",
    "Restoration guidance",
    "SDEdit",
    "Proximal step",
)


def rows_of(text: str) -> list[list[str]]:
    """Cells of every table row of a page, headings and rules left out; `\\|` does not separate cells."""
    lines = [line.strip() for line in text.splitlines()]
    tables = [(line, lines[i + 1] if i + 1 < len(lines) else "") for i, line in enumerate(lines) if line[:1] == "|"]
    rule = re.compile(r"\|[\s:|-]+\|")
    kept = [line for line, following in tables if not rule.fullmatch(line) and not rule.fullmatch(following)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in kept]


def check_target(file: str, name: str) -> None:
    """Raise AssertionError unless `name` is defined in that very file of the package."""
    assert (SOURCE / file).is_file(), f"{file}:{name}: there is no such file"
    module = importlib.import_module(f"latentindigo.{Path(file).stem}")
    owner, found = None, module
    for part in name.split("."):
        assert hasattr(found, part), f"{file}:{name}: nothing of that name ({part!r} is missing)"
        owner, found = found, getattr(found, part)
    if isinstance(owner, type):
        # A method that a class only inherits is not computed where the map says.
        assert name.rsplit(".", 1)[-1] in vars(owner), f"{file}:{name}: inherited, not defined there"
    first = getattr(module, name.split(".")[0])
    home = getattr(first, "__module__", module.__name__)
    assert home == module.__name__, f"{file}:{name}: imported there, defined in {home}"


def check_map(text: str, equations: tuple[str, ...]) -> None:
    """Raise AssertionError unless a map names every equation once, and every row leads to something that exists."""
    rows = [row for row in rows_of(text) if len(row) == 4]
    names = [row[0] for row in rows]
    missing = [name for name in equations if name not in names]
    assert not missing, f"equations that the map lacks: {missing}"
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"equations named twice: {twice}"
    unlisted = [name for name in names if name not in equations]
    assert not unlisted, f"equations of the map that the fixed list lacks: {unlisted}"
    for name, where, what, origin in rows:
        assert TARGET.search(where), f"{name!r} leads nowhere: {where!r}"
        assert what and origin, f"{name!r} lacks an explanation or an origin"
    for file, target in TARGET.findall(text):
        check_target(file, target)


def test_every_equation_leads_to_its_function() -> None:
    check_map(MAP.read_text(encoding="utf-8"), EQUATIONS)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/notation.md", "docs/training.md"])
def test_other_pages_name_functions_that_exist(page: str) -> None:
    for file, target in TARGET.findall((ROOT / page).read_text(encoding="utf-8")):
        check_target(file, target)


SMALL_MAP = """
| Name | Where | What it does | From |
| --- | --- | --- | --- |
| Loss | `guidance.py:DataTerm.loss` | \\|a\\| | paper |
| Strength | `prior.py:Trajectory.start_strength` | a property | ours |
"""


def test_a_right_map_passes() -> None:
    check_map(SMALL_MAP, ("Loss", "Strength"))


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("DataTerm.loss", "DataTerm.lost", "nothing of that name"),
        ("DataTerm.loss", "DataTerms.loss", "nothing of that name"),
        ("guidance.py", "guide.py", "no such file"),
        ("guidance.py:DataTerm.loss", "sampler.py:DataTerm.loss", "imported there"),
        ("DataTerm.loss", "PixelINN.loss", "inherited"),
        ("`guidance.py:DataTerm.loss`", "somewhere", "leads nowhere"),
        ("| Loss |", "| Lost |", "map lacks"),
        ("| Strength |", "| Loss |", "map lacks"),
        ("\\|a\\|", "", "explanation"),
        ("| Strength |", "| Loss | `prior.py:Calls` | x | y |\n| Strength |", "twice"),
        ("| Strength |", "| More | `prior.py:Calls` | x | y |\n| Strength |", "fixed list"),
    ],
)
def test_a_planted_wrong_entry_is_found(right: str, wrong: str, message: str) -> None:
    assert right in SMALL_MAP
    with pytest.raises(AssertionError, match=message):
        check_map(SMALL_MAP.replace(right, wrong), ("Loss", "Strength"))
