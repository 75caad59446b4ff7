"""Folders at scale when something goes wrong: bad files, full disks, and kills at every step."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import latentindigo
from batches import NAMES, job_of, make_album, manifest, results, run, stray, told
from fakes import FakePipe, ramp, written
from latentindigo import batch, storage
from latentindigo.batch import Worker, list_items, local_engine, run_batch
from latentindigo.batch_records import is_current, read_record
from latentindigo.images import LoadedImage, load_image
from latentindigo.pipeline import ModelLoadError
from latentindigo.storage import BusyError, LocalFolder, open_folder


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Return a folder with five photos."""
    return make_album(tmp_path / "in")


# ---------------------------------------------------------------------------------------------------- what may go wrong


def check_refused(message: str, album: Path, **values: Any) -> None:
    with pytest.raises(ValueError, match=message):
        run(job_of(album, **values))


def test_wrong_use_is_refused(album: Path, tmp_path: Path) -> None:
    check_refused("apart from the input folder", album, out=album)
    check_refused("apart from the input folder", album, out=album.parent)
    check_refused("is no folder; give a folder of photos", album / "a.png")
    check_refused("is no folder", tmp_path / "nowhere")
    check_refused("expected a folder, got an empty name", album, out="")
    (tmp_path / "file").touch()
    check_refused("file' cannot be written to: ", album, out=tmp_path / "file")
    check_refused("out' cannot be written to: ", album, out=tmp_path / "file" / "out")
    check_refused("no photos in .* that the patterns let through", album, include=("*.webp",))
    check_refused("at least 2 samples", album, uncertainty_map=True)
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet"):
        run(job_of(album), manifest="list.csv")


def test_only_one_run_at_a_time(album: Path) -> None:
    job = job_of(album)
    with open_folder(job.out).lock(), pytest.raises(BusyError, match="another run is at work"):
        run(job)
    assert told(run(job)) == [(name, "restored") for name in NAMES]


def test_the_lock_names_its_holder_only_while_it_is_held(album: Path) -> None:
    out = open_folder(job_of(album).out)
    lock = Path(out.location, storage.KEPT, "lock")
    with out.lock():
        assert f"process {os.getpid()}" in lock.read_text()
    assert not lock.read_text(), "the folder may be published, and the machine's name is in it"


def test_files_that_cannot_be_read_are_named_and_the_rest_is_done(album: Path) -> None:
    (album / "a2.png").write_bytes(b"no picture")
    (album / "a3.png").mkdir()
    os.mkfifo(album / "a4.png")
    (album / "a5.png").symlink_to("nowhere")
    (album / "a6.png").touch()
    job = job_of(album)
    rows = {row["input"]: row for row in run(job)}
    failed = {name: (row["kind"], row["attempts"]) for name, row in rows.items() if row["status"] == "failed"}
    assert failed == {"a2.png": ("input", 1), "a4.png": ("io", 2), "a5.png": ("io", 2), "a6.png": ("input", 1)}
    assert all(name in rows[name]["error"] for name in failed)
    assert [row["input"] for row in manifest(job)] == sorted([*NAMES, *failed])
    assert len(results(job.out)) == len(NAMES)


def test_a_folder_that_cannot_be_listed_is_named(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalFolder.entries

    def entries(folder: LocalFolder, name: str) -> list[storage.Entry]:
        if name == "trip":
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return real(folder, name)

    monkeypatch.setattr(LocalFolder, "entries", entries)
    rows = run(job_of(album))
    assert told(rows) == [*((name, "restored") for name in NAMES[:3]), ("trip/", "failed")]
    assert "cannot be listed: 'trip' Permission denied; change its permissions" in rows[-1]["error"]


def test_a_file_without_permission(album: Path) -> None:
    """As another user where the test runs as root, who may read everything."""
    with tempfile.TemporaryDirectory() as place:  # Within another user's reach, which pytest's folders are not.
        os.chmod(place, 0o777)  # noqa: S103
        shutil.copytree(album, Path(place, "in"))
        job = job_of(Path(place, "in"), quality=False)
        run(job)  # Imports everything.
        for path in Path(place).rglob("*"):
            path.chmod(0o777)
        os.chmod(Path(job.source, "b.png"), 0)
        user = os.geteuid()
        try:
            os.seteuid(65534 if user == 0 else user)
            rows = run(job_of(Path(place, "in"), quality=False, settings={"seed": 1}))
        finally:
            os.seteuid(user)
    assert told(rows)[:5] == [(name, "failed" if name == "b.png" else "restored") for name in NAMES]
    assert rows[2]["kind"] == "io"
    assert rows[2]["error"] == f"'{job.source}/b.png' Permission denied; change its permissions"


def test_nobody_elses_file_is_replaced(album: Path) -> None:
    out = album.parent / "out"
    out.mkdir()
    (out / "a.png").write_bytes(b"mine")
    written(out / "trip" / "c.jpg")
    pipe = FakePipe()
    rows = run(job_of(album), pipe)
    assert [row["kind"] for row in rows] == ["exists", None, None, "exists", None]
    assert "--overwrite" in rows[0]["error"]
    assert (out / "a.png").read_bytes() == b"mine"
    assert len(pipe.calls) == 3, "what cannot be written is not computed"
    assert {status for _, status in told(run(job_of(album, overwrite=True)))} == {"restored", "kept"}
    assert (out / "a.png").read_bytes() != b"mine"


def test_our_own_file_without_a_record_is_replaced(album: Path) -> None:
    job = job_of(album)
    run(job)
    shutil.rmtree(Path(job.out, storage.KEPT, "records"))
    assert {status for _, status in told(run(job))} == {"restored"}


@pytest.mark.parametrize(
    ("error", "kind", "tries"),
    [
        (RuntimeError("CUDA out of memory"), "memory", 2),
        (OSError(errno.EIO, "Input/output error"), "io", 2),
        (ZeroDivisionError("division by zero"), "unexpected", 2),
        (RuntimeError("shapes differ"), "unexpected", 2),
        (ValueError("the picture is too small"), "input", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_failures_that_may_pass_are_tried_again(album: Path, error: Exception, kind: str, tries: int) -> None:
    job = job_of(album)
    rows = run(job, FakePipe(failures={1: error}))
    assert told(rows)[:5] == [(name, "failed" if name == "b.gif" else "restored") for name in NAMES]
    assert (rows[1]["kind"], len(rows)) == (kind, 4 + tries)
    assert [row["status"] for row in manifest(job)] == [
        "restored",
        "restored" if tries > 1 else "failed",
        *["restored"] * 3,
    ]
    assert [row["attempts"] for row in manifest(job)] == [1, tries, 1, 1, 1]
    if tries == 1:
        assert told(run(job))[1] == ("b.gif", "restored"), "the next run tries again"


def test_retries_come_to_an_end(album: Path) -> None:
    class Broken(FakePipe):
        def __call__(self, *args: Any, **options: Any) -> Any:
            self.calls.append({})
            raise RuntimeError("broken for good")

    pipe = Broken()
    rows = run(job_of(album, retries=3), pipe)
    assert len(pipe.calls) == len(rows) == 20
    assert manifest(job_of(album))[0] | {"attempts": 4} == manifest(job_of(album))[0]
    assert rows[0]["error"] == "RuntimeError: broken for good"


def test_a_model_that_cannot_be_loaded_ends_the_run(album: Path) -> None:
    def load() -> FakePipe:
        raise ModelLoadError("gone")

    job = job_of(album)
    with pytest.raises(ModelLoadError, match="gone"):
        list(run_batch(job, local_engine(Worker(job, load))))
    assert told(run(job)) == [(name, "restored") for name in NAMES], "and leaves nothing locked"


def test_the_model_is_loaded_once_and_not_for_a_bad_file(tmp_path: Path) -> None:
    loads: list[int] = []

    def load() -> FakePipe:
        loads.append(1)
        return FakePipe()

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "gone.png").symlink_to("nowhere")
    job = job_of(tmp_path / "in")
    list(run_batch(job, local_engine(Worker(job, load))))
    assert not loads
    for name in "abc":
        written(tmp_path / "in" / f"{name}.png")
    list(run_batch(job, local_engine(Worker(job, load))))
    assert len(loads) == 1


def test_a_stopped_run_has_written_what_it_restored(album: Path) -> None:
    job, pipe = job_of(album), FakePipe(failures={3: KeyboardInterrupt()})  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt):
        run(job, pipe)
    assert list(results(job.out)) == ["a.png", "b-png.png", "b.png"]
    assert told(run(job)) == [(name, "kept" if name in NAMES[:3] else "restored") for name in NAMES]
    assert not stray(job.out)


def test_odd_names(tmp_path: Path) -> None:
    names = [
        "Zoë & Ünal 雪.png",
        "line\nbreak.png",
        "x" * 251 + ".png",
        "x" * 251 + ".gif",
        os.fsdecode(b"odd\xff.png"),
    ]
    for name in names:
        written(tmp_path / "in" / name) if not name.endswith("gif") else (tmp_path / "in" / name).write_bytes(b"")
    job = job_of(tmp_path / "in", settings={"num_samples": 2})
    rows = {row["input"]: row for row in run(job)}
    assert set(rows) == set(names)
    for name in names[2:4]:
        assert "bytes, and file systems take 255; shorten the photo's" in rows[name]["error"]
    assert all(rows[name]["status"] == "restored" for name in (*names[:2], names[4]))
    assert {row["input"] for row in manifest(job)} == set(names)
    os.unlink(tmp_path / "in" / names[3])
    single = job_of(tmp_path / "in", out=tmp_path / "single")
    assert {row["status"] for row in run(single)} == {"restored"}, "its record's name is shortened"
    assert {row["status"] for row in run(single)} == {"kept"}


# ---------------------------------------------------------------------------------------------------------- a full disk


def test_a_full_disk_is_that_photos_failure(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = storage._write_through, [2]

    def full(path: str, data: bytes) -> None:
        real(path, data[: len(data) // 2])
        if len(data) > 100 and left and left.pop() == 2:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        os.unlink(path)
        real(path, data)

    monkeypatch.setattr(storage, "_write_through", full)
    job = job_of(album, retries=0)
    rows = run(job)
    assert [(row["status"], row["kind"]) for row in rows] == [("failed", "disk"), *[("restored", None)] * 4]
    assert "a.png" in rows[0]["error"]
    assert list(results(job.out)) == ["b-png.png", "b.png", "trip/c.jpg", "trip/day/d.png"]
    assert not stray(job.out)


def test_a_full_disk_is_not_computed_for(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small photos are tried as long as they may fit."""
    room = 10**9

    def full(path: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(storage, "_write_through", full)
    monkeypatch.setattr(LocalFolder, "room", lambda self: room)
    written(album / "trip" / "large.png", LoadedImage(ramp(60, 80)))
    pipe = FakePipe()
    job = job_of(album, retries=0)
    engine = local_engine(Worker(job, lambda: pipe))
    rows = []
    for _, row in engine(list_items(job)):
        rows.append(row)
        room = 700  # enough for half of a small picture, not for the large one
    assert {row["kind"] for row in rows} == {"disk"}
    skipped = [row["input"] for row in rows if "not tried" in row["error"]]
    assert skipped == ["trip/large.png"]
    assert len(pipe.calls) == len(NAMES)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with a file system of its own that takes 200 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None or subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True
    ).returncode:  # fmt: skip
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)  # noqa: S607


def test_a_disk_that_is_really_full(tmp_path: Path, small_disk: Path) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    for number, side in enumerate([40, 40, 150, 40, 40, 20]):  # Noise at twice the side: 19, 19, 270, 19, 19, 5 KB.
        written(tmp_path / "in" / f"{number}.png", LoadedImage(torch.rand(3, side, side, generator=generator)))
    (tmp_path / "in" / "1b.png").symlink_to("nowhere")
    job = job_of(tmp_path / "in", out=small_disk / "out")
    rows = run(job)
    failed = {row["input"]: row["kind"] for row in manifest(job) if row["status"] == "failed"}
    assert failed == {"1b.png": "io", "2.png": "disk"}
    assert any("2.png" in row["error"] for row in rows if row["kind"] == "disk")
    assert sorted(results(job.out)) == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    assert not stray(job.out)
    for name in results(job.out):
        load_image(Path(job.out, name))


def test_what_the_format_cannot_hold_is_not_computed(album: Path) -> None:
    written(album / "wide.webp", LoadedImage(ramp(2, 9000)))
    pipe = FakePipe()
    row = next(row for row in run(job_of(album), pipe) if row["input"] == "wide.webp")
    assert (row["kind"], row["attempts"]) == ("input", 1)
    assert "WebP holds at most 16383 a side" in row["error"]
    assert len(pipe.calls) == len(NAMES), "an hour of work would have been thrown away"


def test_a_file_that_is_too_large_is_not_read(album: Path) -> None:
    with open(album / "huge.png", "wb") as stream:
        stream.truncate(2**31 + 1)
    rows = run(job_of(album, retries=0, include=("huge.png",)))
    assert [(row["status"], row["kind"]) for row in rows] == [("failed", "io")]
    assert "huge.png' is larger than 2 GiB, the most that is read" in rows[0]["error"]


def test_a_picture_that_the_encoder_refuses_is_told_as_it_is(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> bytes:
        raise OSError("encoder error -2")

    monkeypatch.setattr(batch, "encode_image", refuse)
    assert {row["error"] for row in run(job_of(album, retries=0))} == {"encoder error -2"}


def test_a_manifest_in_no_store_is_refused_before_anything_is_computed(album: Path) -> None:
    pipe = FakePipe()
    with pytest.raises(ValueError, match="in a store that fsspec knows"):
        run(job_of(album), pipe, manifest="gopher://lists/m.jsonl")
    assert not pipe.calls


def test_a_store_that_does_not_take_the_manifest_is_named(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("Access Denied")

    monkeypatch.setattr(storage.ObjectFolder, "put", refuse)
    with pytest.raises(OSError, match="the manifest cannot be written: Access Denied"):
        run(job_of(album), manifest="memory://lists/m.jsonl")


def test_a_local_job_leaves_nothing_elsewhere_when_it_is_killed(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    job = job_of(album)
    rows = run_batch(job, local_engine(Worker(job, FakePipe)))
    next(rows)
    assert not list(elsewhere.iterdir()), "a kill at this moment would leave it for ever"
    rows.close()  # type: ignore[attr-defined]


def test_a_manifest_that_does_not_fit_is_said(album: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="the manifest cannot be written"):
        run(job_of(album), manifest=str(tmp_path / "file" / "m.jsonl"))


# --------------------------------------------------------------------------------------------------------- every moment

KILLS = """
import os, shutil, sys
from pathlib import Path
import torch
from fakes import FakePipe
from latentindigo import batch, storage
from latentindigo.batch import BatchJob, Worker, local_engine, run_batch
from latentindigo.jobs import RestoreSettings

torch.set_num_threads(1)
source, out, first, last = *sys.argv[1:3], *map(int, sys.argv[3:])

def job(seed):
    settings = RestoreSettings(scale=2, steps=1, num_samples=2, seed=seed)
    return BatchJob(source, out, settings, quality=False)

def run(seed):
    pipe = FakePipe(seed_shift=True)
    rows = list(run_batch(job(seed), local_engine(Worker(job(seed), lambda: pipe))))
    return len(pipe.calls), rows

def armed(moment):
    # Die before and after every step that reaches the disk, and in the middle of writing bytes.
    steps = 0
    def step():
        nonlocal steps
        steps += 1
        if steps == moment:
            os._exit(9)
    for name in ("fsync", "replace"):
        def call(*given, _real=getattr(os, name)):
            step()
            _real(*given)
            step()
        setattr(os, name, call)
    real = storage._write_through
    def write(path, data):
        with open(path, "xb") as stream:
            stream.write(data[: len(data) // 2])
            stream.flush()
            step()
        os.unlink(path)
        real(path, data)
    storage._write_through = write
"""
JUDGE = """
from latentindigo.batch_records import is_current, read_record
from latentindigo.storage import open_folder

run(0)
before = {p.name: p.read_bytes() for p in Path(out).glob("*.png")}
shutil.copytree(out, out + "-old")
run(7)
after = {p.name: p.read_bytes() for p in Path(out).glob("*.png")}
assert before.keys() == after.keys() and all(before[n] != after[n] for n in before), "the seed must show"
moment, died = first, True
while died and moment < last:
    shutil.rmtree(out)
    shutil.copytree(out + "-old", out)
    child = os.fork()
    if not child:
        armed(moment)
        run(7)
        os._exit(0)
    died = os.waitpid(child, 0)[1] != 0
    # Every picture is an old one or a new one, and a new record stands for new pictures.
    complete = 0
    for name in ("a.png", "b.png"):
        record = read_record(open_folder(out), name)
        for file in record["outputs"]:
            content = Path(out, file).read_bytes()
            assert content in (before[file], after[file]), f"moment {moment}: {file} is neither"
            if record["seed"] == 7:
                assert content == after[file], f"moment {moment}: {file} is older than its record"
        complete += record["seed"] == 7
    calls, rows = run(7)
    assert calls == 2 - complete, f"moment {moment}: {calls} restored, {complete} were complete"
    assert {p.name: p.read_bytes() for p in Path(out).glob("*.png")} == after, f"moment {moment}"
    left = [p.name for p in Path(out, storage.KEPT).rglob("*") if p.is_file() and p.suffix != ".json"]
    assert left == ["lock"], f"moment {moment}: {left} stays"
    moment += 1
print("moments", moment)
"""


def test_a_kill_at_every_step_of_writing_loses_nothing(tmp_path: Path) -> None:
    """Photos that were restored before with other settings: the case with the most that may be mixed up."""
    for number, name in enumerate("ab"):
        written(tmp_path / "in" / f"{name}.png", LoadedImage(ramp().roll(number, 2)))
    paths = [str(Path(latentindigo.__path__[0]).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", KILLS + JUDGE, str(tmp_path / "in"), str(tmp_path / "out"), "1", "200"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    # Two photos with three files each, five steps a file, and the manifest.
    assert int(done.stdout.split()[-1]) >= 2 * 3 * 5


def test_a_record_is_never_ahead_of_its_pictures(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(album)
    seen: list[bool] = []
    real = os.replace

    def replace(old: str, new: str) -> None:
        real(old, new)
        if new.endswith(".json"):
            out = open_folder(job.out)
            name = Path(new).relative_to(Path(job.out, ".latentindigo/records")).as_posix().removesuffix(".json")
            record = read_record(out, name)
            assert record is not None
            seen.append(is_current(record, record["input_sha256"], record["settings_sha256"], record["outputs"], out))

    monkeypatch.setattr(os, "replace", replace)
    run(job)
    assert seen == [True] * len(NAMES)
