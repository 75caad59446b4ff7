"""Comparisons: turning order, honest counting, controls of equal roughness, paired differences, the roster, reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentindigo import evaluation, metrics, report
from latentindigo.baselines import Bicubic, Lanczos, Pipeline, Restorer
from latentindigo.comparison import (
    Contender,
    Measured,
    compare,
    compared_to,
    controls_beside,
    summary_of,
    unreferenced_pairs,
)
from latentindigo.contest import ContestSettings, protocol_named, run_contest
from latentindigo.evaluation import Pair, Protocol, check_result_schema
from latentindigo.images import LoadedImage, pil_resize, save_image
from latentindigo.metrics import gradient_energy
from latentindigo.model_folder import EMBEDDED
from latentindigo.operators import Scale
from latentindigo.pipeline import RestorationPipeline
from latentindigo.roster import BLIND, NAMES, TOLD, load_method, load_settings, recruit

PROTOCOL = Protocol("mild", "mild", 4, "photos")
QUICK = {name: {"steps": 2} for name in ("sdedit", "diffbir", *TOLD)} | {
    "daps": {"steps": 2, "mcmc_steps": 1},
    "resample": {"steps": 2, "pixel_iterations": 1, "latent_iterations": 1},
}


def photo(seed: int, side: int = 64) -> Tensor:
    small = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, size=(side, side), mode="bicubic").clamp(0, 1)[0]


def pairs(count: int = 3, side: int = 64) -> list[Pair]:
    clean = [photo(k, side) for k in range(count)]
    return [Pair(f"{k}.png", x, pil_resize(x, (side // 4, side // 4)).clamp(0, 1), k) for k, x in enumerate(clean)]


@pytest.fixture(autouse=True)
def quick_swd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few patches: the distance itself is tested elsewhere."""
    monkeypatch.setattr(evaluation, "swd", lambda x, ref, **_: metrics.swd(x, ref, patches=100, projections=4))


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for k in range(2):
        save_image(LoadedImage(photo(k)), folder / f"{k}.png")
    return folder


class Recorder:
    """A restorer that says when it was called; what it returns can be spoilt."""

    def __init__(self, name: str, log: list[tuple[str, int]], spoil: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.name, self.nfe, self.log, self.spoil = name, 0, log, spoil

    def __call__(self, y: Tensor, scale: int, seeds: Sequence[int]) -> Tensor:
        self.log.append((self.name, seeds[0]))
        return self.spoil(Bicubic()(y, scale))


# --- order and contract ----------------------------------------------------------------------------------------------


def check_order(log: list[tuple[str, int]]) -> None:
    """After one warm-up each, every image is restored by all, beginning with another one each time."""
    assert log[:3] == [("a", 0), ("b", 0), ("c", 0)]
    rounds = [log[3 + 3 * k : 6 + 3 * k] for k in range(3)]
    assert [[seed for _, seed in one] for one in rounds] == [[k] * 3 for k in range(3)]
    assert {one[0][0] for one in rounds} == {"a", "b", "c"}


def test_the_order_turns() -> None:
    log: list[tuple[str, int]] = []
    compare([Contender(n, "", Recorder(n, log)) for n in "abc"], PROTOCOL, pairs())
    check_order(log)


@pytest.mark.parametrize("fixed", [True, False])
def test_another_order_is_seen(fixed: bool) -> None:
    warm = [(n, 0) for n in "abc"]
    by_image, by_method = [(n, k) for k in range(3) for n in "abc"], [(n, k) for n in "abc" for k in range(3)]
    with pytest.raises(AssertionError):
        check_order(warm + (by_image if fixed else by_method))


@pytest.mark.parametrize(
    "spoil", [lambda x: x[..., :-1], lambda x: x * float("nan"), lambda x: x[:, :1]], ids=["size", "nan", "grey"]
)
def test_a_restorer_that_breaks_its_contract_is_refused(spoil: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"broken: .* finite pixels expected for 0\.png"):
        compare([Contender("broken", "", Recorder("broken", [], spoil))], PROTOCOL, pairs())


def test_contenders_must_differ() -> None:
    with pytest.raises(ValueError, match="bicubic"):
        compare([Contender("bicubic", "", Bicubic())] * 2, PROTOCOL, pairs())
    with pytest.raises(ValueError, match="at least one image"):
        compare([Contender("bicubic", "", Bicubic())], PROTOCOL, [])


# --- counting and measuring ------------------------------------------------------------------------------------------


def test_stated_evaluations_are_those_counted(tiny_pipeline: RestorationPipeline) -> None:
    names = [n for n in NAMES if n not in ("pixel-inn", "vivid")]
    found = compare(recruit(names, tiny_pipeline, "mild", 4, QUICK), PROTOCOL, pairs(1))
    assert len(found) == len(names) + len(TOLD)
    for measured in found:
        (row,) = measured.rows
        assert row["calls"]["denoiser"] == row["nfe"] == measured.contender.restorer.nfe, measured.contender.key
        assert row["seconds"] > 0
        assert row["extra_mb"] >= 0 or row["extra_mb"] != row["extra_mb"]


def measured_two() -> tuple[list[Measured], list[Pair]]:
    chosen = pairs()
    two = [Contender("bicubic", "", Bicubic()), Contender("lanczos", "", Lanczos())]
    return compare(two, PROTOCOL, chosen, operator=Scale(4)), chosen


def test_summaries_and_differences() -> None:
    found, chosen = measured_two()
    entry = summary_of(found[0], chosen)
    assert {"psnr", "ssim", "gmsd", "consistency", "gradient_energy", "swd", "seconds", "extra_mb"} <= set(entry)
    assert "ms_ssim" not in entry, "too small for five scales"
    rows = [m.rows for m in found]
    difference = compared_to(found[0], found[1])
    expected = sum(a["psnr"] - b["psnr"] for a, b in zip(*rows, strict=True)) / 3
    assert difference["psnr"].mean == pytest.approx(expected)
    assert difference["psnr"].low <= expected <= difference["psnr"].high
    swds = [summary_of(m, chosen)["swd"]["mean"] for m in found]
    assert difference["swd"].mean == pytest.approx(swds[0] - swds[1])
    same = compared_to(found[0], found[0], metrics=("swd",))
    assert same["swd"] == (0.0, 0.0, 0.0)


def test_controls_are_as_rough_as_what_they_stand_beside() -> None:
    chosen = pairs()
    sharp = Contender("sharp", "x", Recorder("sharp", [], lambda x: (x + 3 * (x - x.roll(1, -1))).clamp(0, 1)))
    found = compare([Contender("bicubic", "", Bicubic()), sharp], PROTOCOL, chosen)
    beside = controls_beside(found, chosen, like=[("sharp", "x")])
    assert [m.contender.key for m in beside] == [
        (f"{c} on bicubic", "as rough as sharp x") for c in ("grain", "unsharp")
    ]
    clean = [pair.clean for pair in chosen]
    energies = [gradient_energy([x / 255 for x in m.images], clean) for m in (found[1], *beside)]
    assert energies[1:] == pytest.approx([energies[0]] * 2, rel=0.02)
    entry = summary_of(beside[0], chosen)
    assert "seconds" not in entry


def test_without_a_reference_only_what_needs_none_is_measured(album: Path) -> None:
    chosen = unreferenced_pairs(album, 1)
    protocol = protocol_named("real", "album")
    (found,) = compare([Contender("bicubic", "", Bicubic())], protocol, chosen)
    entry = summary_of(found, chosen)
    assert "seconds" in entry
    assert not {"psnr", "swd", "gradient_energy", "gmsd"} & set(entry)
    with pytest.raises(ValueError, match="no image"):
        unreferenced_pairs(album, 0)


# --- roster ----------------------------------------------------------------------------------------------------------


def test_a_method_that_needs_an_operator_takes_part_twice(tiny_pipeline: RestorationPipeline) -> None:
    settings = {"psld": {"steps": 3, "omega": 0.5}, "psld bicubic": {"steps": 4, "noise": 0.25}}
    true, bicubic = recruit(["psld"], tiny_pipeline, "medium", 4, settings)
    assert (true.variant, bicubic.variant) == ("true", "bicubic")
    told: Any = [c.restorer for c in (true, bicubic)]
    assert [(r.steps, r.omega) for r in told] == [(3, 0.5), (4, 1.0)]
    assert told[0].noise == pytest.approx(10 / 255), "the truth has its noise"
    assert told[1].noise == 0.25
    assert told[0].prior.calls is not told[1].prior.calls, "each counts for itself"
    # A second-order degradation has no one operator that would be the truth.
    assert [c.variant for c in recruit(["psld"], tiny_pipeline, "random", 4)] == ["bicubic"]


def test_a_rival_that_is_not_told_the_truth_may_be_set_twice(tiny_pipeline: RestorationPipeline) -> None:
    settings = {"psld": {"steps": 3}, "psld bicubic realistic": {"steps": 5}, "sdedit realistic": {"steps": 6}}
    found = recruit(["sdedit", "psld"], tiny_pipeline, "medium", 4, settings)
    restorers: Any = [c.restorer for c in found]
    assert [(*c.key, r.steps) for c, r in zip(found, restorers, strict=True)] == [
        ("sdedit", "", 50), ("sdedit", "realistic", 6),
        ("psld", "true", 3), ("psld", "bicubic", 3), ("psld", "bicubic, realistic", 5),
    ]  # fmt: skip


def test_the_settings_that_ship_make_every_rival(tiny_pipeline: RestorationPipeline) -> None:
    settings = load_settings(EMBEDDED)
    assert {*TOLD, "sdedit", "diffbir"} <= set(settings)
    told = {key for key in settings if key.endswith("bicubic")}
    assert told == {f"{name} bicubic" for name in TOLD}
    twice = sum(key.endswith("realistic") for key in settings)
    assert twice > 2
    assert len(recruit(NAMES, tiny_pipeline, "medium", 4, settings)) == len(BLIND) + 2 * len(TOLD) + twice


def test_unknown_names_and_settings_are_refused(tiny_pipeline: RestorationPipeline) -> None:
    with pytest.raises(ValueError, match="unknown method nonsense; known: bicubic"):
        recruit(["nonsense"], tiny_pipeline, "mild", 4)
    with pytest.raises(ValueError, match="nonsense"):
        recruit(["sdedit"], tiny_pipeline, "mild", 4, {"sdedit": {"nonsense": 1}})
    assert set(NAMES) == {*BLIND, *TOLD}


@pytest.mark.parametrize("text", ["[1]", "{", '{"nonsense": {}}', '{"psld": 3}'])
def test_broken_settings_are_refused(tmp_path: Path, text: str) -> None:
    assert load_settings(tmp_path) == {}
    (tmp_path / "rivals.json").write_text(text)
    with pytest.raises(ValueError, match=r"rivals\.json"):
        load_settings(tmp_path)


METHOD = """
class Mine:
    name, nfe = "mine", 0
    def __call__(self, y, scale, seeds):
        return y.repeat_interleave(scale, -1).repeat_interleave(scale, -2)

def make(pipe):
    return Mine()
"""


def test_a_method_of_ones_own(tmp_path: Path, tiny_pipeline: RestorationPipeline) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    contender = load_method(tmp_path / "mine.py", tiny_pipeline)
    assert contender.key == ("mine", "")
    assert isinstance(contender.restorer, Restorer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make(pipe): return 3", "lacks name, nfe, __call__"),
        ("raise OSError('no')", "OSError: no"),
        ("x = 1", "AttributeError"),
        (None, "a Python file that defines"),
    ],
)
def test_a_file_that_is_no_method(
    tmp_path: Path, tiny_pipeline: RestorationPipeline, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_method(tmp_path / "mine.py", tiny_pipeline)


# --- contest and report ----------------------------------------------------------------------------------------------


def test_a_contest_writes_its_files(album: Path, tmp_path: Path, tiny_pipeline: RestorationPipeline) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    settings = ContestSettings(
        album,
        protocols=("mild", "noise15", "real"),
        methods=("bicubic", "default", "sdedit", "ddnm"),
        method_files=(tmp_path / "mine.py",),
        rivals=QUICK,
        limit=1,
    )
    seen: list[tuple[str, str]] = []
    target = tmp_path / "out" / "2025-01-01-x.json"
    result = run_contest(tiny_pipeline, settings, target, lambda p, k, n, c, row: seen.append((p.name, c.method)))
    check_result_schema(result)
    assert result["suite"] == "x"
    assert len(seen) == 6 + 6 + 5
    keys = {(e["protocol"], e["method"], e["variant"]) for e in result["summary"]}
    assert ("mild", "ddnm", "true") in keys
    assert ("real", "ddnm", "bicubic") in keys
    assert ("mild", "grain on bicubic", "as rough as latentindigo default") in keys
    assert ("mild", "mine", "") in keys
    mine = next(e for e in result["summary"] if e["method"] == "mine")
    ours = next(e for e in result["summary"] if e["variant"] == "default")
    assert mine["psnr_minus_default"]["mean"] == pytest.approx(mine["psnr"]["mean"] - ours["psnr"]["mean"], abs=1e-3)
    assert result["settings"]["mild: ddnm true"]["steps"] == 2
    assert result["settings"]["mild: latentindigo default"]["preset"] == "default"
    text = target.with_suffix(".md").read_text()
    assert text.count("seed 0") == 3
    assert "whole images, RGB" in text
    for name in ("", "-mild", "-noise15", "-real"):
        assert (target.parent / f"{target.stem}{name}.png").stat().st_size > 1000
    assert json.loads(target.read_text()) == result


def test_unknown_protocols_are_refused(album: Path, tmp_path: Path, tiny_pipeline: RestorationPipeline) -> None:
    with pytest.raises(ValueError, match="unknown protocol 'nonsense'; known: mild"):
        run_contest(tiny_pipeline, ContestSettings(album, protocols=("nonsense",)), tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_quality_against_steps(tmp_path: Path, tiny_pipeline: RestorationPipeline) -> None:
    chosen = pairs(2)
    steps = [Contender("ours", f"{n} steps", Pipeline(tiny_pipeline, steps=n)) for n in (1, 2)]
    found = compare(steps, PROTOCOL, chosen)
    result: dict[str, Any] = {
        "rows": [row for m in found for row in m.rows],
        "summary": [summary_of(m, chosen) for m in found],
    }
    report.plot_steps(result, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="at least two numbers"):
        report.plot_steps({"rows": result["rows"][:2], "summary": result["summary"][:1]}, tmp_path / "steps.png")


def test_the_grid_shows_every_pixel_of_the_enlarged_part() -> None:
    x = torch.zeros(3, 64, 64)
    x[0, 28:36, 28:36] = 1
    sheet = report.image_grid({"a": [x], "b": [1 - x]}, crop=8, cell=64)
    red = [p for p in sheet.get_flattened_data() if p == (255, 0, 0)]
    assert len(red) == 64 + 64 * 64, "the small square once as it is, once as large as a cell"
    with pytest.raises(ValueError, match="one length"):
        report.image_grid({"a": [x], "b": []})
