"""A folder of photos, a job over it with a pipeline that is no network, and what is there afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fakes import FakePipe, ramp, written
from latentindigo import storage
from latentindigo.batch import BatchJob, Worker, local_engine, run_batch
from latentindigo.batch_records import Row
from latentindigo.images import LoadedImage, to_pil
from latentindigo.jobs import RestoreSettings

__all__ = ["NAMES", "job_of", "make_album", "manifest", "results", "run", "stray", "told"]

NAMES = ["a.png", "b.gif", "b.png", "trip/c.jpg", "trip/day/d.png"]


def make_album(folder: Path) -> Path:
    """Fill a folder with five photos, each of another content, two of which ask for one name, and return it."""
    for number, name in enumerate(NAMES):
        picture = LoadedImage(ramp().roll(number, 2))
        if name.endswith(".gif"):
            to_pil(picture).save(folder / name)
        else:
            written(folder / name, picture)
    (folder / "notes.txt").touch()
    return folder


def job_of(album: Path, **values: Any) -> BatchJob:
    settings = RestoreSettings(**{"scale": 2, "steps": 1, **values.pop("settings", {})})
    return BatchJob(str(album), str(values.pop("out", album.parent / "out")), settings, **values)


def run(job: BatchJob, pipe: Any = None, **options: Any) -> list[Row]:
    return list(run_batch(job, local_engine(Worker(job, lambda: pipe or FakePipe())), **options))


def told(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row["input"], row["status"]) for row in rows]


def manifest(job: BatchJob) -> list[Row]:
    return [json.loads(line) for line in Path(job.out, "manifest.jsonl").read_text().splitlines()]


def results(out: Path | str) -> dict[str, bytes]:
    """Every file that is no record, and its content."""
    files = sorted(path for path in Path(out).rglob("*") if path.is_file())
    names = {path.relative_to(out).as_posix(): path for path in files}
    return {n: path.read_bytes() for n, path in names.items() if not n.startswith(".latent") and n != "manifest.jsonl"}


def stray(out: Path | str) -> list[str]:
    """Files that nobody expects to find after a run."""
    kept = Path(out, storage.KEPT)
    names = [path.relative_to(out).as_posix() for path in kept.rglob("*") if path.is_file()]
    known = (f"{storage.KEPT}/records/", f"{storage.KEPT}/lock")
    return [name for name in names if not name.startswith(known)] + [n for n in results(out) if n.endswith(".part")]
