"""Folders at scale: which photos, what is done to them, and what is left alone."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batches import NAMES, job_of, make_album, manifest, results, run, stray, told
from fakes import FakePipe, ramp, written
from latentindigo import batch
from latentindigo.batch import BatchJob, Worker, list_items, local_engine, run_batch
from latentindigo.batch_records import Row
from latentindigo.images import LoadedImage
from latentindigo.pipeline import RestorationPipeline
from latentindigo.storage import Entry, LocalFolder, open_folder


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Return a folder with five photos."""
    return make_album(tmp_path / "in")


# ------------------------------------------------------------------------------------------------------------ the rule


def test_every_photo_is_restored_once(album: Path) -> None:
    job, pipe = job_of(album), FakePipe()
    rows = run(job, pipe)
    assert told(rows) == [(name, "restored") for name in NAMES]
    assert list(results(job.out)) == ["a.png", "b-png.png", "b.png", "trip/c.jpg", "trip/day/d.png"]
    assert manifest(job) == rows
    assert not stray(job.out)
    for row in rows:
        assert (row["input_width"], row["output_width"], row["seed"], row["attempts"]) == (8, 16, 0, 1)
        assert row["seconds"] == pytest.approx(row["seconds_read"] + row["seconds_model"] + row["seconds_write"])
        assert row["invented"] == pytest.approx(0.1)
        assert 0 < row["consistency"] < 0.2
        assert row["niqe"] is None, "too small for it"
    again = run(job, pipe)
    assert told(again) == [(name, "kept") for name in NAMES]
    assert len(pipe.calls) == len(NAMES)
    strip = [{k: v for k, v in row.items() if k != "status"} for row in rows]
    assert [{k: v for k, v in row.items() if k != "status"} for row in again] == strip
    assert manifest(job) == again


def change_photo(album: Path, _: BatchJob) -> None:
    written_again = LoadedImage(ramp().flip(2))
    os.unlink(album / "a.png")
    written(album / "a.png", written_again)


def delete_result(_: Path, job: BatchJob) -> None:
    os.unlink(Path(job.out, "a.png"))


def damage_result(_: Path, job: BatchJob) -> None:
    data = bytearray(Path(job.out, "a.png").read_bytes())
    data[len(data) // 2] ^= 1
    Path(job.out, "a.png").write_bytes(data)


def damage_record(_: Path, job: BatchJob) -> None:
    Path(job.out, ".latentindigo/records/a.png.json").write_text('{"schema": 1')


@pytest.mark.parametrize("change", [change_photo, delete_result, damage_result, damage_record])
def test_what_is_no_longer_true_is_done_again(album: Path, change: Callable[[Path, BatchJob], None]) -> None:
    job = job_of(album)
    run(job)
    change(album, job)
    assert told(run(job)) == [(name, "restored" if name == "a.png" else "kept") for name in NAMES]
    assert {status for _, status in told(run(job))} == {"kept"}


def test_what_decides_no_pixel_does_not_matter(album: Path) -> None:
    job = job_of(album)
    run(job)
    os.utime(album / "a.png", (1, 1))
    moved = album.parent / "elsewhere"
    shutil.move(album, moved)
    assert {status for _, status in told(run(job_of(moved, out=job.out, threads=1, retries=0)))} == {"kept"}


@pytest.mark.parametrize(
    "settings",
    [{"seed": 1}, {"steps": 2}, {"scale": 3}, {"fidelity": 0.5}, {"preset": "vivid"}, {"tile": "off"}],
    ids=str,
)
def test_other_settings_make_everything_anew(album: Path, settings: dict[str, Any]) -> None:
    run(job_of(album))
    changed = job_of(album, settings=settings)
    assert {status for _, status in told(run(changed))} == {"restored"}
    assert {status for _, status in told(run(changed))} == {"kept"}


def test_another_model_and_other_pixels_make_everything_anew(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(FakePipe):
        def weights_hash(self) -> str:
            return "other"

    job = job_of(album)
    run(job)
    assert {status for _, status in told(run(job, Other()))} == {"restored"}
    monkeypatch.setattr(batch, "PIXELS", batch.PIXELS + 1)
    assert {status for _, status in told(run(job, Other()))} == {"restored"}


def test_another_scheduler_of_the_model_makes_everything_anew(
    album: Path, tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--scheduler model` is the same setting whatever the model was saved with."""
    from diffusers import DDIMScheduler

    job = job_of(album, quality=False, include=("a.png",))
    run(job, tiny_pipeline)
    assert told(run(job, tiny_pipeline)) == [("a.png", "kept")]
    other = DDIMScheduler.from_config(tiny_pipeline.scheduler.config, set_alpha_to_one=False, steps_offset=1)
    monkeypatch.setattr(tiny_pipeline, "scheduler", other)
    assert told(run(job, tiny_pipeline)) == [("a.png", "restored")]


def test_maps_that_are_asked_for_later_are_made(album: Path) -> None:
    run(job_of(album, settings={"num_samples": 2}))
    job = job_of(album, settings={"num_samples": 2}, detail_map=True, uncertainty_map=True)
    rows = run(job)
    assert rows[0]["outputs"] == [
        "a.png", "a.sample1.png", "a.detail.png", "a.sample1.detail.png", "a.uncertainty.png",
    ]  # fmt: skip
    assert rows[0]["uncertainty"] == pytest.approx(0.05)
    assert len(results(job.out)) == 25
    assert {status for _, status in told(run(job))} == {"kept"}


def test_without_verifying_only_sizes_count(album: Path) -> None:
    job = job_of(album)
    run(job)
    damage_result(album, job)
    assert {status for _, status in told(run(job_of(album, verify=False)))} == {"kept"}


def test_results_are_those_of_the_pipeline(album: Path, tiny_pipeline: RestorationPipeline) -> None:
    from latentindigo.jobs import restore_files
    from latentindigo.planning import plan_tasks

    job = job_of(album, settings={"seed": 5}, quality=False)
    run(job, tiny_pipeline)
    tasks = plan_tasks([album], album.parent / "one-by-one", recursive=True)
    list(restore_files(lambda: tiny_pipeline, tasks, job.settings))
    assert results(job.out) == results(album.parent / "one-by-one")
    with_quality = job_of(album, settings={"seed": 5}, out=album.parent / "measured")
    run(with_quality, tiny_pipeline)
    assert results(with_quality.out) == results(job.out), "measuring changes no pixel"


def test_the_same_job_in_an_object_store(album: Path) -> None:
    import fsspec

    local = job_of(album)
    run(local)
    files = fsspec.filesystem("memory")
    store = f"memory://{album.parent.name}"
    files.put(f"{album}/", f"{store}/in", recursive=True)
    job = BatchJob(f"{store}/in", f"{store}/out", local.settings)
    try:
        assert told(run(job)) == [(name, "restored") for name in NAMES]
        out = open_folder(job.out)
        assert {name: out.read(name) for name in results(local.out)} == results(local.out)
        assert len(out.read("manifest.jsonl").splitlines()) == len(NAMES)
        assert {status for _, status in told(run(job))} == {"kept"}
        assert not [name for name in files.find(store) if "partial" in name or "journal" in name]
    finally:
        files.rm(f"/{album.parent.name}", recursive=True)


# ------------------------------------------------------------------------------------------------------- which photos


def listed(album: Path, **values: Any) -> list[str]:
    return [item.source for item in list_items(job_of(album, **values))]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], NAMES),
        (["*.PNG"], [], ["a.png", "b.png", "trip/day/d.png"]),
        (["trip/*"], [], ["trip/c.jpg"]),
        (["trip/**"], [], ["trip/c.jpg", "trip/day/d.png"]),
        (["**/d.png", "a.*"], [], ["a.png", "trip/day/d.png"]),
        (["trip/**/*.jpg"], [], ["trip/c.jpg"]),
        ([], ["Trip/**"], ["a.png", "b.gif", "b.png"]),
        ([], ["day"], ["a.png", "b.gif", "b.png", "trip/c.jpg"]),
        ([], ["trip/day/"], ["a.png", "b.gif", "b.png", "trip/c.jpg"]),
        ([], ["[ab].*", "*.jpg"], ["trip/day/d.png"]),
    ],
)
def test_patterns(album: Path, include: list[str], exclude: list[str], expected: list[str]) -> None:
    assert listed(album, include=tuple(include), exclude=tuple(exclude)) == expected


def test_hidden_files_links_to_folders_and_the_output_are_left_out(album: Path) -> None:
    (album / ".hidden").mkdir()
    for name in (".a.png", ".hidden/a.png", "out/a.png"):
        (album / name).parent.mkdir(exist_ok=True)
        shutil.copy(album / "a.png", album / name)
    (album / "loop").symlink_to(".")
    (album.parent / "alias").symlink_to(album / "out")
    assert listed(album, out=album / "out") == NAMES
    assert listed(album, out=album.parent / "alias") == NAMES, "whatever the output folder is called"


def test_names_that_begin_like_the_output_are_photos(album: Path) -> None:
    shutil.copytree(album / "trip", album / "out-of-town")
    found = [name for name in listed(album, out=album / "out") if "town" in name]
    assert found == ["out-of-town/c.jpg", "out-of-town/day/d.png"]


def test_the_listing_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second folder is not looked at before the photos of the first have been given out."""
    for folder in "abc":
        written(tmp_path / "in" / folder / "x.png")
    looked: list[str] = []
    real = LocalFolder.entries
    monkeypatch.setattr(LocalFolder, "entries", lambda self, name: (looked.append(name), real(self, name))[1])
    items = list_items(job_of(tmp_path / "in"))
    assert next(items).source == "a/x.png"
    assert looked == ["", "a"]


def test_at_most_five_photos_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        written(tmp_path / "in" / f"{number:02}.png")
    job = job_of(tmp_path / "in", quality=False)
    worker = Worker(job, FakePipe)
    held, most, guard = 0, 0, threading.Lock()
    prepare, write = worker.prepare, worker.write

    def count(change: int) -> None:
        nonlocal held, most
        with guard:
            held += change
            most = max(most, held)

    def slow_write(restored: Any) -> Row:
        time.sleep(0.01)  # Writing is what everybody waits for.
        row = write(restored)
        count(-1)
        return row

    monkeypatch.setattr(worker, "prepare", lambda item: (count(1), prepare(item))[1])
    monkeypatch.setattr(worker, "write", slow_write)
    assert len(list(run_batch(job, local_engine(worker)))) == 20
    assert 4 <= most <= 5, "two read, one restored, one waiting to be written, one being written"


def test_names_of_results_do_not_depend_on_patterns(album: Path) -> None:
    """Or a run over some photos would replace what a run over others has made."""
    run(job_of(album, include=("*.gif",)))
    before = results(album.parent / "out")
    run(job_of(album, include=("b.png",)))
    after = results(album.parent / "out")
    assert list(after) == ["b-png.png", "b.png"]
    assert after["b.png"] == before["b.png"]
    assert told(run(job_of(album)))[1:3] == [("b.gif", "kept"), ("b.png", "kept")]


def test_patterns_do_not_tell_two_spellings_of_a_letter_apart(album: Path) -> None:
    written(album / "Caf\u0065\u0301.png")
    assert listed(album, include=("caf\u00e9.png",)) == ["Cafe\u0301.png"]
    assert "Cafe\u0301.png" not in listed(album, exclude=("caf\u00e9*",))


def test_a_long_folder_takes_little_memory(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    count = 20_000
    monkeypatch.setattr(LocalFolder, "entries", lambda *_: [Entry(f"IMG_{k:08}.jpg", False) for k in range(count)])
    job = job_of(album)
    tracemalloc.start()
    try:
        assert sum(1 for _ in list_items(job)) == count
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 400 * count


# -------------------------------------------------------------------------------------------------------- object stores


def test_a_folder_may_hold_one_of_its_own_name_and_a_file_beside_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores list the empty object that marks a folder, and may hold `x.png` and `x.png/y.png`."""
    store = {
        "/top/trip": [("/top/trip/", "file"), ("/top/trip/trip", "directory"), ("/top/trip/x.png", "file")]
        + [("/top/trip/x.png", "directory")],
        "/top/trip/trip": [("/top/trip/trip/a.png", "file")],
        "/top/trip/x.png": [("/top/trip/x.png/y.png", "file")],
    }
    make_store("top/trip")
    job = BatchJob("memory://top/trip", "memory://out")

    def ls(_: Any, path: str, **__: Any) -> list[dict[str, str]]:
        return [{"name": name, "type": kind} for name, kind in store[path]]

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.ls", ls)
    assert [item.source for item in list_items(job)] == ["trip/a.png", "x.png", "x.png/y.png"]


def make_store(folder: str) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file(f"/{folder}/x.png", b"")


def test_a_store_does_not_keep_what_it_has_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    kept: dict[str, Any] = {}
    ls = MemoryFileSystem.ls

    def remember(self: MemoryFileSystem, path: str, **options: Any) -> Any:
        return kept.setdefault(path, ls(self, path, **options))

    monkeypatch.setattr(MemoryFileSystem, "ls", remember)
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda *_: kept.clear())
    make_store("kept")
    assert [entry.name for entry in open_folder("memory://kept").entries("")] == ["x.png"]
    assert not kept


def test_a_store_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores have errors of their own, such as missing credentials."""

    def ls(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Unable to locate credentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.ls", ls)
    with pytest.raises(ValueError, match=r"'memory://a' cannot be listed \(RuntimeError: Unable to locate"):
        BatchJob("memory://a", "memory://b")
