"""A folder job on a Ray cluster: the same files as without, on one machine and without a word to any other.

Ray takes ten seconds and more to start, so one run answers most questions.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import network_guard
from batches import NAMES, make_album, results, stray
from latentindigo import jobs
from latentindigo.batch import BatchJob, Item, Worker, list_items, local_engine, run_batch
from latentindigo.batch_ray import RayEngine, _fatal, _item, _plain, _tasks
from latentindigo.batch_records import Row
from latentindigo.jobs import RestoreSettings, load_pipeline
from latentindigo.pipeline import ModelLoadError

pytest.importorskip("ray")

SETTINGS = RestoreSettings(scale=2, steps=1, num_samples=2, seed=3)


def job_of(album: Path, out: Path, model: Path) -> BatchJob:
    loading = {"model": str(model), "device": "cpu", "dtype": "float32"}
    return BatchJob(str(album), str(out), SETTINGS, loading, detail_map=True, uncertainty_map=True, threads=1)


# An actor is killed after the first result, so one run also shows that its photos are done by another.
KILLING = """
import glob, os, signal, sys
from latentindigo import cli_batch
from latentindigo.cli import main

real, killed = cli_batch._report, []

def report(*given):
    real(*given)
    for entry in glob.glob("/proc/[0-9]*") if not killed else ():
        try:
            command, parents = open(f"{entry}/cmdline", "rb").read(), open(f"{entry}/environ", "rb").read()
        except OSError:
            continue
        if command.startswith(b"ray::MapWorker") and sys.argv[3].encode() in parents:
            killed.append(int(entry.rpartition("/")[2]))
            os.kill(killed[0], signal.SIGKILL)
            print("killed", killed[0], file=sys.stderr)
            break

cli_batch._report = report
os.environ["THE_RUN"] = sys.argv[3]
main()
"""


@dataclass
class Run:
    """What one run of the command on two workers left behind."""

    album: Path
    out: Path
    code: int
    rows: list[Row]
    errors: str
    refused: list[str]
    foreign: set[str]
    left: list[int]


def processes_of(run: str) -> list[int]:
    """Processes, whoever their parents are now, that were started by a run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"THE_RUN={run}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def ray_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Run]:
    """Run the command on two workers, one of which is killed, where no connection to elsewhere is possible."""
    place = tmp_path_factory.mktemp("ray")
    album, out = make_album(place / "in"), place / "out"
    (album / "bad.png").write_bytes(b"no picture")
    options = ["--model", str(tiny_model), "--device", "cpu", "--dtype", "float32", "--detail-map", "--uncertainty-map"]
    settings = ["--scale", "2", "--steps", "1", "--num-samples", "2", "--seed", "3", "--json"]
    command = ["batch", str(album), str(out), "--engine", "ray", "--workers", "2", *options, *settings]
    # The variable must not be older than the run: the kernel shows the environment that a process began with.
    guard = network_guard.NetworkGuard(place)
    environment = {**guard.environment(Path(jobs.__file__).parents[1]), "THE_RUN": str(out), "HOME": str(place)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLING, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with network_guard.watch(process.pid) as foreign:
            printed, errors = process.communicate(timeout=240)
    finally:
        process.kill()
        deadline = time.monotonic() + 20  # Ray's own processes notice the end one after the other.
        while (left := processes_of(str(out))) and time.monotonic() < deadline:
            time.sleep(0.2)
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    rows = [json.loads(line) for line in printed.splitlines()]
    yield Run(album, out, process.returncode, rows, errors, guard.attempts(), foreign, left)


@pytest.mark.ray
def test_the_same_files_as_without(ray_run: Run, tmp_path: Path, tiny_model: Path) -> None:
    assert ray_run.code == 1, ray_run.errors
    job = job_of(ray_run.album, tmp_path / "local", tiny_model)
    rows = list(run_batch(job, local_engine(Worker(job, lambda: load_pipeline(**job.model)))))
    assert results(ray_run.out) == results(tmp_path / "local")
    assert [row["input"] for row in ray_run.rows] == [row["input"] for row in rows], "in order"
    decided = ("input_sha256", "settings_sha256", "output_sha256", "settings", "model_hash", "consistency", "invented")
    for ours, theirs in zip(ray_run.rows, rows, strict=True):
        assert {name: ours[name] for name in decided} == {name: theirs[name] for name in decided}


@pytest.mark.ray
def test_a_bad_photo_and_a_dead_worker_end_nothing(ray_run: Run) -> None:
    assert "killed" in ray_run.errors, "there was a worker to kill"
    failed = {row["input"]: row["kind"] for row in ray_run.rows if row["status"] == "failed"}
    assert failed == {"bad.png": "input"}
    assert len(ray_run.rows) == len(NAMES) + 1
    assert not stray(ray_run.out)


@pytest.mark.ray
def test_the_other_engine_goes_on(ray_run: Run, tiny_model: Path) -> None:
    job = job_of(ray_run.album, ray_run.out, tiny_model)
    rows = list(run_batch(job, local_engine(Worker(job, lambda: load_pipeline(**job.model)))))
    assert {row["status"] for row in rows if row["input"] in NAMES} == {"kept"}


@pytest.mark.ray
def test_no_word_to_another_machine(ray_run: Run) -> None:
    assert not ray_run.refused
    assert not ray_run.foreign


@pytest.mark.ray
def test_nothing_stays_behind(ray_run: Run) -> None:
    assert not ray_run.left
    assert not (ray_run.out.parent / ".ray").exists()
    assert "Traceback" not in ray_run.errors


def test_the_watch_reads_the_kernels_tables() -> None:
    assert network_guard._host("0100007F") == "127.0.0.1"
    assert network_guard._host("FEA9FEA9") == "169.254.169.254"
    assert network_guard._host("0000000000000000FFFF00000100007F") == "127.0.0.1"
    assert network_guard._host("B80D01200000000000000000" + "01000000") == "2001:db8::1"


# ---------------------------------------------------------------------------------------------------- without a cluster


def test_items_travel_as_text(tmp_path: Path) -> None:
    album = make_album(tmp_path / "in")
    items = [*list_items(job_of(album, tmp_path / "out", tmp_path)), Item("odd\udcff/", error="no", kind="io")]
    assert [_item(json.loads(json.dumps(_plain(item)))) for item in items] == items


def test_tasks_are_small_at_first_and_grow() -> None:
    sizes = [len(lines) for lines in _tasks(Item(str(k)) for k in range(40_000))]
    assert sizes[:64] == [1] * 64
    assert sum(sizes) == 40_000
    assert max(sizes) == 32
    assert len(sizes) < 5_000


def test_what_ends_a_job_keeps_its_kind() -> None:
    assert isinstance(_fatal({"fatal": "model", "error": "gone"}), ModelLoadError)
    assert isinstance(_fatal({"fatal": "input", "error": "no such device"}), ValueError)


@pytest.mark.parametrize(
    ("workers", "accelerators", "share"), [(1, 1, 1), (2, 4, 1), (4, 1, 0.25), (3, 2, 0.5), (5, 2, 1 / 3), (2, 0, 0)]
)
def test_shares_of_accelerators_can_be_placed(tmp_path: Path, workers: int, accelerators: int, share: float) -> None:
    """A share of 2/3 for three workers on two accelerators would leave the third one without a place."""
    job = BatchJob(str(make_album(tmp_path / "in")), str(tmp_path / "out"))
    engine = RayEngine(job, workers=workers)
    assert engine._divide({"CPU": 8, "GPU": accelerators}) == {"num_cpus": 1, "num_gpus": pytest.approx(share)}


def test_only_places_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that happens to be called like a device is none."""
    for name in ("cpu", "none", "embedded", "my-prior"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    loading = {"model": "embedded", "device": "cpu", "offload": "none", "prior": "my-prior", "latent_inn": None}
    job = BatchJob(str(make_album(tmp_path / "in")), str(tmp_path / "out"), model=loading)
    assert RayEngine(job).job.model == loading | {"prior": str(tmp_path / "my-prior")}


def test_a_cluster_that_does_not_answer_is_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", refuse)
    engine = RayEngine(job_of(make_album(tmp_path / "in"), tmp_path / "out", tmp_path), address="auto")
    with pytest.raises(ValueError, match=r"address: no Ray cluster at 'auto' \(Could not find"), engine:
        pass


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    engine = RayEngine(job_of(make_album(tmp_path / "in"), tmp_path / "out", tmp_path))
    with pytest.raises(ValueError, match=r"pip install 'latentindigo\[ray\]'"), engine:
        pass
