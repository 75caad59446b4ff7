"""Which files a run reads and writes."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from latentindigo.planning import find_pictures, plan_tasks


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Return a folder with pictures (empty files: planning reads none), one of them in a folder inside it."""
    folder = tmp_path / "album"
    (folder / "trip").mkdir(parents=True)
    for name in ("a.jpg", "b.gif", "b.png", "notes.txt", "trip/c.png"):
        (folder / name).touch()
    return folder


def names(tasks: list, out: Path) -> list[str]:
    return [path.relative_to(out).as_posix() for task in tasks for path in task.files]


def test_one_photo_to_a_file(album: Path, tmp_path: Path) -> None:
    (task,) = plan_tasks([album / "a.jpg"], tmp_path / "x.png")
    assert task.source == album / "a.jpg"
    assert task.files == (tmp_path / "x.png",)


def test_one_photo_to_a_folder_keeps_its_name(album: Path, tmp_path: Path) -> None:
    assert names(plan_tasks([album / "a.jpg"], tmp_path / "out"), tmp_path / "out") == ["a.jpg"]


def test_a_folder_with_a_dot_is_a_folder(album: Path, tmp_path: Path) -> None:
    (tmp_path / "v1.0").mkdir()
    assert names(plan_tasks([album / "a.jpg"], tmp_path / "v1.0"), tmp_path / "v1.0") == ["a.jpg"]


def test_a_folder_keeps_its_structure_and_no_two_results_share_a_name(album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert names(plan_tasks([album], out), out) == ["a.jpg", "b.png", "b-png.png"]
    assert names(plan_tasks([album], out, recursive=True), out) == ["a.jpg", "b.png", "b-png.png", "trip/c.png"]


def test_names_that_differ_in_case_alone_do_not_collide(tmp_path: Path) -> None:
    for folder, name in (("one", "A.png"), ("two", "a.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    out = tmp_path / "out"
    assert names(plan_tasks([tmp_path / "one", tmp_path / "two"], out), out) == ["A.png", "a-png.png"]


@pytest.mark.parametrize("names_", [("caf\u00e9.gif", "cafe\u0301.gif"), ("A.png", "a.png"), ("A.gif", "a.gif")])
def test_names_that_some_disks_take_for_one_do_not_collide(tmp_path: Path, names_: tuple[str, str]) -> None:
    """Composed and decomposed letters, capitals: however many there are, each result has a name of its own."""
    for k in range(4):
        (tmp_path / f"{k}").mkdir()
        (tmp_path / f"{k}" / names_[k % 2]).touch()
    out = tmp_path / "out"
    tasks = plan_tasks([tmp_path / f"{k}" for k in range(4)], out)
    found = {unicodedata.normalize("NFC", name).casefold() for name in names(tasks, out)}
    assert len(found) == 4


def test_links_count_once_and_lead_nowhere_alone(album: Path, tmp_path: Path) -> None:
    (album / "again.jpg").symlink_to("a.jpg")
    (album / "loop.png").symlink_to("loop.png")
    (album / "gone.png").symlink_to("nowhere.png")
    (album / "trip" / "up").symlink_to(album)
    found = [path.relative_to(album).as_posix() for path in find_pictures([album], recursive=True)]
    # They are listed and fail when they are read; that the others are done says test_cli.
    assert found == ["a.jpg", "b.gif", "b.png", "gone.png", "loop.png", "trip/c.png"]
    assert find_pictures([album / "loop.png", album / "gone.png"]) == [album / "loop.png", album / "gone.png"]
    with pytest.raises(ValueError, match=r"'.*a\\x1b\[2J.png' does not exist"):
        find_pictures([album / "a\x1b[2J.png"])


def test_samples_and_maps(album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (task,) = plan_tasks([album / "a.jpg"], out, num_samples=2, detail_map=True, uncertainty_map=True)
    assert task.targets == (out / "a.jpg", out / "a.sample1.jpg")
    assert task.detail_maps == (out / "a.detail.png", out / "a.sample1.detail.png")
    assert task.uncertainty_map == out / "a.uncertainty.png"


def test_a_photo_named_twice_is_done_once(album: Path, tmp_path: Path) -> None:
    assert len(plan_tasks([album / "a.jpg", album], tmp_path / "out")) == 3


def test_earlier_results_inside_the_input_folder_are_no_inputs(album: Path) -> None:
    out = album / "out"
    out.mkdir()
    (out / "a.jpg").touch()
    assert out / "a.jpg" not in find_pictures([album], recursive=True, leave_out=out)
    assert out / "a.jpg" in find_pictures([album], recursive=True)


def test_results_never_replace_inputs(album: Path) -> None:
    with pytest.raises(ValueError, match="would replace an input"):
        plan_tasks([album], album)
    with pytest.raises(ValueError, match="would replace an input"):
        plan_tasks([album / "a.jpg"], album / "a.jpg")


@pytest.mark.parametrize(
    ("inputs", "out", "message"),
    [
        (["gone.jpg"], "out", "does not exist"),
        (["empty"], "out", "no pictures in .*--recursive"),
        (["album"], "x.png", "expected a folder"),
        (["album/a.jpg"], "x.bmp", "expected a name ending in"),
    ],
)
def test_wrong_usage_is_refused_with_the_way_out(
    album: Path, tmp_path: Path, inputs: list[str], out: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        plan_tasks([tmp_path / name for name in inputs], tmp_path / out)


def test_an_uncertainty_map_needs_samples(album: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        plan_tasks([album], tmp_path / "out", uncertainty_map=True)
