"""Result files: what is written fits the schema, what does not fit is refused, and every suite writes what fits."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from latentindigo import evaluation, metrics
from latentindigo.evaluation import (
    CALLS,
    Interval,
    Protocol,
    bootstrap_interval,
    check_result_schema,
    machine_info,
    make_row,
    markdown_table,
    paired_difference,
    versions,
    write_results,
)
from latentindigo.images import LoadedImage, read_metadata, save_image

Result = dict[str, Any]
Check = Callable[[Result], None]
PROTOCOL = Protocol("medium", "medium", 4, "val")


def entry(method: str, **values: Any) -> dict[str, Any]:
    return {"method": method, "variant": "", "protocol": "medium", **values}


def written(folder: Path) -> Result:
    """A small but complete result file, decoded."""
    rows = [
        make_row("bicubic", "", "medium", f"{k}.png", psnr=20.0 + k, seconds=0.1, calls={"denoiser": 3}) for k in (0, 1)
    ]
    summary = [entry("bicubic", psnr=bootstrap_interval([20.0, 21.0])._asdict())]
    path = folder / "2025-01-01-toy.json"
    write_results(path, "toy", [PROTOCOL], rows, summary, settings={"bicubic": {"size": (1, 2)}})
    return json.loads(path.read_text())


def test_written_file_fits(tmp_path: Path) -> None:
    result = written(tmp_path)
    check_result_schema(result)
    assert [path.name for path in tmp_path.iterdir()] == ["2025-01-01-toy.json"]
    assert result["rows"][0] == {
        "method": "bicubic", "variant": "", "protocol": "medium", "image": "0.png", "psnr": 20.0, "ssim": None,
        "gradient_energy": None, "swd": None, "seconds": 0.1, "peak_mb": None,
        "calls": {**dict.fromkeys(CALLS, 0), "denoiser": 3},
    }  # fmt: skip
    assert result["settings"] == {"bicubic": {"size": [1, 2]}}
    assert result["protocols"]["medium"]["degradation"] == "medium"


def test_refused_content_leaves_the_old_file(tmp_path: Path) -> None:
    before = written(tmp_path)
    with pytest.raises(ValueError, match="unknown protocol 'severe'"):
        write_results(tmp_path / "2025-01-01-toy.json", "toy", [PROTOCOL], [make_row("a", "", "severe", "0.png")], [])
    assert json.loads((tmp_path / "2025-01-01-toy.json").read_text()) == before


def test_infinite_numbers_become_null(tmp_path: Path) -> None:
    rows = [make_row("exact", "", "medium", "0.png", psnr=math.inf, swd=math.nan)]
    interval = Interval(math.inf, math.nan, math.nan)
    write_results(tmp_path / "r.json", "toy", [PROTOCOL], rows, [entry("exact", psnr=interval._asdict())])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["rows"][0]["psnr"] is None
    assert result["summary"][0]["psnr"] == {"mean": None, "low": None, "high": None}


def put(*path: str | int, value: Any) -> Callable[[Result], None]:
    """A change of one value."""

    def change(result: Any) -> None:
        for key in path[:-1]:
            result = result[key]
        result[path[-1]] = value

    return change


def drop(*path: str | int) -> Callable[[Result], None]:
    """A missing key."""

    def change(result: Any) -> None:
        for key in path[:-1]:
            result = result[key]
        del result[path[-1]]

    return change


BROKEN: dict[str, Callable[[Result], Any]] = {
    "another schema": put("schema", value=2),
    "no schema": drop("schema"),
    "no machine": drop("machine"),
    "suite is no text": put("suite", value=3),
    "rows are no list": put("rows", value={}),
    "row is no object": put("rows", 0, value="text"),
    "protocol without a seed": drop("protocols", "medium", "seed"),
    "row of an unknown protocol": put("rows", 0, "protocol", value="severe"),
    "row without a method": drop("rows", 0, "method"),
    "row without swd": drop("rows", 0, "swd"),
    "number as text": put("rows", 0, "psnr", value="20.1"),
    "truth value for a number": put("rows", 0, "ssim", value=True),
    "infinite number": put("rows", 0, "psnr", value=math.inf),
    "count missing": drop("rows", 0, "calls", "inn"),
    "count of something else": put("rows", 0, "calls", "vae", value=1),
    "count is no integer": put("rows", 0, "calls", "inn", value=1.5),
    "negative count": put("rows", 0, "calls", "inn", value=-1),
    "two rows of one image": put("rows", 1, "image", value="0.png"),
    "summary without rows": put("summary", 0, "method", value="vivid"),
    "summary of a bare number": put("summary", 0, "psnr", value=20.5),
    "interval without a bound": drop("summary", 0, "psnr", "low"),
    "interval that misses its mean": put("summary", 0, "psnr", "low", value=20.9),
    "path": put("settings", "bicubic", "model", value="/data/models/mine"),
    "home folder": put("rows", 0, "image", value="file:/home/me/cat.png"),
    "windows path": put("machine", "processor", value="C:\\models"),
    "host name": put("machine", "host", value="box"),
}


def check_refuses(check: Check, result: Result, change: Callable[[Result], None]) -> None:
    """A good file passes, and does not after the change."""
    check(result)
    broken = copy.deepcopy(result)
    change(broken)
    try:
        check(broken)
    except ValueError as error:
        assert str(error).startswith("result file, "), "the message must name the place"
    else:
        raise AssertionError("accepted")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name: str, tmp_path: Path) -> None:
    result = written(tmp_path)
    check_refuses(check_result_schema, result, BROKEN[name])
    with pytest.raises(AssertionError, match="accepted"):
        check_refuses(lambda content: None, result, BROKEN[name])


def test_committed_results_fit(root: Path) -> None:
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        check_result_schema(result)
        assert path.stem.endswith(f"-{result['suite']}"), f"{path.name} holds the suite {result['suite']!r}"


def test_machine_and_versions_name_nobody(tmp_path: Path, tiny_pipeline: Any) -> None:
    text = json.dumps([machine_info(), versions(tiny_pipeline)])
    assert len(platform.node()) < 4 or platform.node() not in text
    assert str(Path.home()) not in text
    found = versions(tiny_pipeline)
    assert found["dtype"] == "float32"
    assert found["weights"] == tiny_pipeline.weights_hash()[:16]
    assert {"latentindigo", "python", "torch", "diffusers", "source"} <= set(found)


def test_markdown_table() -> None:
    rows = [
        make_row("a", "x", "medium", "0.png", calls={"denoiser": 10, "inn": 20}),
        make_row("b", "", "medium", "0.png"),
    ]
    summary = [
        {"method": "a", "variant": "x", "protocol": "medium", "psnr": {"mean": 24.1234, "low": 23.0, "high": 25.0}},
        {"method": "b", "variant": "", "protocol": "medium", "psnr": {"mean": 24.0, "low": math.nan, "high": None}},
    ]
    assert markdown_table(summary, ("psnr", "swd"), rows).split("\n") == [
        "| protocol | method | variant | psnr | swd | calls |",
        "| --- | --- | --- | --- | --- | --- |",
        "| medium | a | x | 24.12 [23, 25] |  | denoiser 10, inn 20 |",
        "| medium | b |  | 24 |  |  |",
    ]


def test_edges_of_intervals() -> None:
    assert bootstrap_interval([3.0])[0] == 3.0
    assert math.isnan(bootstrap_interval([3.0]).low)
    assert math.isnan(bootstrap_interval([3.0, math.inf]).high)
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])
    rows = [make_row("a", "", "p", "0", psnr=1.0), make_row("b", "", "p", "1", psnr=1.0)]
    with pytest.raises(ValueError, match="share all images"):
        paired_difference(rows, ("a", ""), ("b", ""), "p")


# ---------------------------------------------------------------------------------------------------------- the suites


def picture(seed: int, height: int, width: int) -> LoadedImage:
    small = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return LoadedImage(F.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1)[0])


@pytest.fixture
def photos(tmp_path: Path, root: Path) -> Path:
    """A data folder in miniature, with the first two images of the tuning list."""
    names = (root / "recipes" / "tune.txt").read_text().split()[:2]
    sizes = {f"val/{k}.png": (32, 64) for k in range(2)} | {f"real/a/{k}.png": (9 + k, 12) for k in range(4)}
    for k, (name, size) in enumerate((sizes | {f"train/{name}": (256, 256) for name in names}).items()):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(picture(k, *size), path)
    (tmp_path / "data" / "real" / "a" / "broken.png").write_bytes(b"\x89PNG no more")
    return tmp_path / "data"


def run_suite(
    arguments: Sequence[str], tiny_model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> Result:
    """Run the script as its command line would and return its checked result file."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    foundation = importlib.import_module("foundation")
    monkeypatch.setattr(evaluation, "swd", lambda x, ref, **_: metrics.swd(x, ref, patches=100, projections=4))
    out = photos.parent / "out"
    folders = ["--model", str(tiny_model), "--data", str(photos), "--out", str(out), "--date", "2025-01-01"]
    foundation.main([*arguments, *folders])
    result = json.loads((out / f"2025-01-01-{arguments[0]}.json").read_text())
    check_result_schema(result)
    return result


def methods_of(result: Result) -> set[tuple[str, str]]:
    return {(e["method"], e["variant"]) for e in result["summary"]}


SETTINGS = '[{"preset": "faithful", "steps": 1, "guidance": {"beta": 0.5}, "scheduler": "DEISMultistepScheduler"}]'
SUITES: dict[str, tuple[list[str], set[tuple[str, str]]]] = {
    "guided": (
        ["--limit", "1", "--steps", "2", "--only", "unguided", "projection", "--beta", "0.2"],
        {("bicubic", ""), ("estimator", ""), ("unguided", ""), ("pixel-inn", "projection")},
    ),
    "presets": (["--limit", "1", "--only", "grain", "default"], {("preset", "default")}),
    "coarse": (
        ["--fit-images", "2"],
        {("pixel-inn", "pixels"), ("best linear map", "latents"), ("latent-inn", "round trip float64 J=2")},
    ),
    "nonblind": (["--limit", "1"], {("told", "start image alone"), ("told", "default"), ("blind", "faithful")}),
    "tune": (["--limit", "1", "--settings", SETTINGS, "--degradations", "mild"], {("bicubic", ""), ("estimator", "")}),
    "probe": (["--limit", "2"], {("linear probe", "joint"), ("estimate()", "training mixture")}),
    "autoencoder": (["--limit", "2"], {("autoencoder", "round trip")}),
    "refinement": (["--limit", "1"], {("default refinement", "on"), ("default refinement", "off")}),
    "calibration": (["--limit", "1"], {("calibration", "default")}),
    # Every suite in one file: rows of all kinds meet, among them those that have no PSNR.
    "embedded": (
        ["--limit", "2", "--steps", "1", "--fit-images", "2", "--only", "faithful", "stopped", "latent", "refinement"],
        {("preset", "faithful"), ("latent-inn", "stopped"), ("latent-inn", "latents"), ("calibration", "default")},
    ),
}
SLOW = ("presets", "embedded")


@pytest.mark.parametrize("suite", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in SUITES])
def test_suite_writes_a_result_file(
    suite: str, tiny_model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, root: Path, capsys: Any
) -> None:
    arguments, expected = SUITES[suite]
    result = run_suite([suite, *arguments], tiny_model, photos, monkeypatch, root)
    assert expected <= methods_of(result)
    table = capsys.readouterr().out.split("\n\n")[-1].strip().split("\n")
    assert len(table) == 2 + len(result["summary"])


def test_latent_guidance_stays_out_of_the_autoencoder(
    tiny_model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """The rows that the claim about counted calls is read from."""
    arguments = ["guided", "--limit", "1", "--steps", "2", "--only", "inn"]
    result = run_suite(arguments, tiny_model, photos, monkeypatch, root)
    loops = {(r["method"], r["variant"]): r["loop_calls"] for r in result["rows"]}
    for update in ("projection", "stopped", "through"):
        latent, pixel = loops["latent-inn", update], loops["pixel-inn", update]
        assert latent["decoder"] == latent["encoder"] == latent["decoder_backward"] == 0
        assert pixel["decoder"] > 0
        assert latent["denoiser"] == pixel["denoiser"] == 2
    guided = [entry for entry in result["summary"] if entry["method"] == "latent-inn"]
    assert all({"psnr_minus_bicubic", "psnr_minus_estimator"} <= set(entry) for entry in guided)


def test_real_goes_on_where_it_stopped(
    tiny_model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    keep = tmp_path / "keep"
    arguments = ["real", "--keep", str(keep), "--preset", "faithful"]
    result = run_suite(arguments, tiny_model, photos, monkeypatch, root)
    outputs = sorted(path.relative_to(keep).as_posix() for path in keep.rglob("*.jpg"))
    assert len(outputs) == 8
    assert (keep / "sheet.png").is_file()
    failed = [row["image"] for row in result["rows"] if row["failed"]]
    assert failed == ["a/broken.png"] * 2
    assert {row["error"] for row in result["rows"]} == {None, "ImageReadError"}
    first = outputs[0]
    assert read_metadata(keep / first) is None
    times = {path: os.stat(keep / path).st_mtime_ns for path in outputs[1:]}
    (keep / first).unlink()
    again = run_suite(arguments, tiny_model, photos, monkeypatch, root)
    assert (keep / first).is_file()
    assert times == {path: os.stat(keep / path).st_mtime_ns for path in outputs[1:]}
    seconds = [[r["seconds"] for r in x["rows"] if not r["failed"]] for x in (result, again)]
    assert sum(a != b for a, b in zip(*seconds, strict=True)) <= 1


def test_bars_are_read_off_the_summary(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    bar = importlib.import_module("embedded").Bar
    summary = [
        {"protocol": "p", "method": method, "variant": "", "swd": {"mean": value}}
        for method, value in (("ours", 0.3), ("theirs", 0.6))
    ]
    ours, theirs = ("p", "ours", ""), ("p", "theirs", "")
    assert bar("", ours, "swd", 1).measured(summary) == 0.3
    assert bar("", ours, "swd", 1, over=theirs).measured(summary) == pytest.approx(0.5)
    # What was not measured is neither met nor missed.
    assert bar("", ours, "psnr", 1).measured(summary) is None
    assert bar("", ("q", "ours", ""), "swd", 1).measured(summary) is None
    assert bar("", ours, "swd", 1, over=("q", "theirs", "")).measured(summary) is None


def test_a_table_of_bars_says_which_are_met(monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    embedded = importlib.import_module("embedded")
    key = ("p", "ours", "")
    chosen = [embedded.Bar(f"{limit} {most}", key, "psnr", limit, most) for limit in (1, 3) for most in (False, True)]
    monkeypatch.setattr(embedded, "_bars", lambda: [*chosen, embedded.Bar("none", key, "swd", 1)])
    summary = [{"protocol": "p", "method": "ours", "variant": "", "psnr": {"mean": 2.0}}]
    args = SimpleNamespace(out=tmp_path, date="2000-01-01", suite="embedded")
    table = embedded.show_bars(SimpleNamespace(summary=summary, args=args))
    met = [line.split(" | ")[-1].strip("| ") for line in table.splitlines()[2:]]
    assert met == ["yes", "**no**", "**no**", "yes", ""]
    assert (tmp_path / "2000-01-01-embedded-bars.md").read_text() == table


@pytest.mark.parametrize("place", ["results", "comparison", "ablations", "speed", "fuzz", "scale", "missed", "costs"])
def test_the_pages_show_the_newest_results(place: str, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    tables = importlib.import_module("tables")
    page, suites, make = tables.PLACES[place]
    results = [tables.newest(suite) for suite in suites]
    text = page.read_text()
    assert tables.insert(text, place, make(results)) == text, "run: python benchmarks/tables.py --write"
    # Another figure, and the page no longer agrees.
    if place == "speed":
        next(iter(results[0]["settings"]["bars"].values()))["measured"] += 1
    elif place == "fuzz":
        results[0]["rows"][0]["outcomes"]["crash"] += 1
    elif place == "scale":
        results[-1]["settings"]["app"]["found"]["wrong"] += 1
    elif place == "missed":
        next(bar for bar in results[-1]["settings"]["bars"].values() if bar["met"])["met"] = False
    elif place == "costs":
        results[0]["summary"][0]["seconds"]["mean"] += 1
    else:
        entry = next(e for e in results[0]["summary"] if e["protocol"] == "medium" and e["method"] != "bicubic")
        entry["psnr"]["mean"] += 1
    assert tables.insert(text, place, make(results)) != text
    end = tables.marks(place)[1]
    with pytest.raises(ValueError, match=f"end of {place}"):
        tables.insert(text.replace(end, ""), place, make(results))
