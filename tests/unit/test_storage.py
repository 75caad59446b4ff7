"""Where a folder job reads and writes: whole files or none, on a disk and in an object store."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentindigo import storage
from latentindigo.storage import BusyError, Entry, Folder, LocalFolder, ObjectFolder, open_folder


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    """The same laws hold in every kind of place."""
    if request.param == "disk":
        yield open_folder(str(tmp_path / "place"))
    else:
        import fsspec

        files = fsspec.filesystem("memory")
        yield open_folder(f"memory://{tmp_path.name}/place")
        files.rm(f"/{tmp_path.name}", recursive=True) if files.exists(f"/{tmp_path.name}") else None


def names(folder: Folder, place: str = "") -> list[str]:
    return [entry.name for entry in folder.entries(place) if entry.name != storage.KEPT]


def test_what_is_written_is_read(folder: Folder) -> None:
    assert not folder.exists()
    folder.write([("b.png", b"12"), ("trip/a.png", b"345"), ("a.png", b"")])
    assert folder.exists()
    assert names(folder) == ["a.png", "b.png", "trip"]
    assert folder.entries("trip") == [Entry("a.png", is_folder=False)]
    assert (folder.read("trip/a.png"), folder.size("trip/a.png")) == (b"345", 3)
    assert folder.size("a.png") == 0
    assert folder.size("c.png") is None
    assert folder.size("a.png/b.png") is None
    with pytest.raises(OSError, match=r"c\.png|No such file"):
        folder.read("c.png")
    folder.write([("b.png", b"new")])
    assert folder.read("b.png") == b"new"
    again = pickle.loads(pickle.dumps(folder))  # noqa: S301  (our own)
    assert again.read("b.png") == b"new"


def test_a_finished_file_takes_its_name(folder: Folder, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.write_bytes(b"rows")
    folder.put(str(made), "deep/manifest.jsonl")
    assert folder.read("deep/manifest.jsonl") == b"rows"


def test_a_file_from_another_disk_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = tmp_path / "made", os.replace
    made.write_bytes(b"rows")

    def replace(old: str, new: str) -> None:
        if old == str(made):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    LocalFolder(str(tmp_path / "place")).put(str(made), "manifest.jsonl")
    assert [path.read_bytes() for path in (tmp_path / "place").iterdir()] == [b"rows"]


def test_no_file_appears_before_all_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LocalFolder(str(tmp_path))
    folder.write([("a.png", b"old")])
    real = storage._write_through

    def full(path: str, data: bytes) -> None:
        if data == b"too much":
            real(path, data[:3])
            raise OSError(errno.ENOSPC, "No space left on device", path)
        real(path, data)

    monkeypatch.setattr(storage, "_write_through", full)
    with pytest.raises(OSError, match="No space left") as refused:
        folder.write([("a.png", b"new"), ("b.png", b"too much")])
    assert refused.value.filename == str(tmp_path / "b.png"), "named is the file that was to be"
    assert folder.read("a.png") == b"old"
    assert names(folder) == ["a.png"]
    assert not list((tmp_path / storage.KEPT / "partial").iterdir())


def test_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _real=real, _name=name: (steps.append(_name), _real(*a))[1])
    LocalFolder(str(tmp_path)).write([("a.png", b"1"), ("b.png", b"2")])
    assert steps == ["fsync", "fsync", "replace", "replace"]


def test_what_killed_runs_leave_is_removed(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path))
    folder.clean()  # nothing is there yet
    folder.write([("a.png", b"1")])
    partial = tmp_path / storage.KEPT / "partial"
    (partial / "0123").write_bytes(b"half")
    (tmp_path / ".other.0123.part").write_bytes(b"another program's")
    folder.clean()
    assert not list(partial.iterdir())
    assert (tmp_path / ".other.0123.part").exists()
    assert folder.read("a.png") == b"1"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_keep_anybody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="no regular file"):
        LocalFolder(str(tmp_path)).read("pipe.png")


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "link.png").symlink_to("a.png")
    assert [e.name for e in LocalFolder(str(tmp_path)).entries("")] == ["a.png", "gone.png", "link.png", "self.png"]


def test_names_that_no_disk_takes_are_refused() -> None:
    storage.require_short_name("é" * 127 + "/" + "a" * 255)
    with pytest.raises(OSError, match="256 bytes, and file systems take 255; shorten"):
        storage.require_short_name("é" * 128)


HOLD = """
import sys
from latentindigo.storage import open_folder
with open_folder(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_job_at_a_time_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path))
    source = str(Path(storage.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BusyError, match=rf"process {holder.pid} on .*; wait for it, or write to another folder"):
        with folder.lock():
            pass
    holder.kill()
    holder.communicate()
    with folder.lock(), pytest.raises(BusyError, match=f"process {os.getpid()} "), LocalFolder(str(tmp_path)).lock():
        pass
    with folder.lock():
        pass


def test_a_store_is_opened_by_its_url() -> None:
    assert isinstance(open_folder("memory://a/b"), ObjectFolder)
    assert open_folder("file:///tmp/x").location == "/tmp/x"  # noqa: S108  (only a name)
    with pytest.raises(ValueError, match="'gopher://a': expected a folder, or its URL"):
        open_folder("gopher://a")


def test_a_store_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"pip install 'latentindigo\[s3\]'"):
        open_folder("s3://bucket/photos")
