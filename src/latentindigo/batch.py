"""Folders at scale: every photo of a folder and its folders, once, whatever happens in between.

The job is the same whoever runs it. `list_items` streams the photos in order; `Worker` takes one from its bytes to a
written result; an engine decides which worker takes which photo: `local_engine` is this process, `batch_ray` a cluster.
`run_batch` keeps what lies around: the lock, the journal, second tries, the manifest.

A photo is left alone if its record (`batch_records`) says that what would be made is there. So a run that was killed
goes on by being started again, and nothing else needs to be remembered.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import os
import tempfile
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentindigo import __version__
from latentindigo.batch_records import (
    PIXELS,
    Journal,
    Row,
    canonical_hash,
    is_current,
    new_row,
    read_record,
    record_bytes,
    record_name,
    require_manifest,
    scheduler_facts,
    sha256,
    write_manifest,
)
from latentindigo.failures import failure_kind
from latentindigo.filters import resize
from latentindigo.images import (
    READ_SUFFIXES,
    ImageReadError,
    LoadedImage,
    encode_image,
    load_image,
    read_metadata,
)
from latentindigo.jobs import (
    Restoration,
    Restorer,
    RestoreSettings,
    pictures_to_write,
    resolve_settings,
    restore_picture,
    size_of_result,
)
from latentindigo.metrics import round8
from latentindigo.planning import Task, plan_folder
from latentindigo.quality import Niqe, consistency
from latentindigo.safe_files import explain
from latentindigo.storage import KEPT, Entry, Folder, LocalFolder, open_folder, require_short_name
from latentindigo.targets import check_sides

__all__ = ["BatchJob", "Engine", "Item", "Worker", "list_items", "local_engine", "run_batch"]

# Photos read ahead of the one that is being restored, and results that may wait to be written.
_AHEAD = 2
# Failures that another try may not meet: everything but a photo that cannot be restored.
_PASSING = ("io", "memory", "disk", "unexpected")

Engine = Callable[[Iterable["Item"]], Iterator[tuple["Item", Row]]]


@dataclasses.dataclass(frozen=True)
class BatchJob:
    """Everything that decides a folder job; plain values, so that it travels to other processes.

    Attributes:
        source: Folder to read, a path or a URL.
        out: Folder to write, likewise; another one, and not one around `source`.
        settings: How to restore.
        model: Arguments of `jobs.load_pipeline`.
        include: Patterns of photos to take; none takes all.
        exclude: Patterns of photos and folders to leave out.
        detail_map: Also write maps of invented detail.
        uncertainty_map: Also write maps of the samples' standard deviation.
        quality: Estimate each result's quality.
        verify: Read results of earlier runs again and compare their hashes; otherwise only their sizes.
        overwrite: Replace files that this package did not write.
        retries: Further tries for photos that failed for a reason that may pass.
        threads: CPU threads of each worker, None for PyTorch's choice.
    """

    source: str
    out: str
    settings: RestoreSettings = RestoreSettings()
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    detail_map: bool = False
    uncertainty_map: bool = False
    quality: bool = True
    verify: bool = True
    overwrite: bool = False
    retries: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        source, out = open_folder(self.source), open_folder(self.out)
        if _real(source).startswith(_real(out)):
            raise ValueError(
                f"expected an output folder apart from the input folder '{self.source}', got '{self.out}'; "
                "results must not lie among the photos"
            )
        if not source.exists():
            raise ValueError(f"'{self.source}' is no folder; give a folder of photos, `restore` takes single ones")
        if self.uncertainty_map and self.settings.num_samples < 2:
            raise ValueError(
                f"a map of uncertainty needs at least 2 samples, got {self.settings.num_samples}; give --num-samples 4"
            )
        # A worker elsewhere has another current folder.
        object.__setattr__(self, "source", source.location)
        object.__setattr__(self, "out", out.location)


def _real(folder: Folder) -> str:
    """A folder's place with links followed, ending in "/"."""
    local = isinstance(folder, LocalFolder)
    place = os.path.realpath(folder.location).replace(os.sep, "/") if local else folder.location
    return f"{place.rstrip('/')}/"


# ------------------------------------------------------------------------------------------------------------ listing


@dataclasses.dataclass(frozen=True)
class Item:
    """One photo of a job.

    Attributes:
        source: Its name relative to the input folder.
        task: What to write, relative to the output folder, or None if nothing can be.
        error: Why nothing can be, one sentence.
        kind: What that is about.
    """

    source: str
    task: Task | None = None
    error: str = ""
    kind: str = "input"


def list_items(job: BatchJob) -> Iterator[Item]:
    """Photos of a job, in an order that is the same on every machine: by the parts of their names.

    Hidden names and links to folders are left out. Only one folder's names (and those of the folders around it) are
    held at a time.

    Args:
        job: The job.

    Yields:
        Items; a folder that cannot be listed is one with an error.
    """
    source = open_folder(job.source)
    # The output folder may lie inside the input folder.
    inside = _real(open_folder(job.out)).removeprefix(_real(source)).rstrip("/")
    yield from _walk(job, source, "", inside)


def _walk(job: BatchJob, source: Folder, place: str, leave_out: str) -> Iterator[Item]:
    try:
        entries = source.entries(place)
    except Exception as error:  # a store's own errors too; one folder must not end the job
        yield Item(f"{place}/", error=f"the folder '{place}' cannot be listed: {_reason(error)}", kind="io")
        return
    prefix = f"{place}/" if place else ""
    entries = [entry for entry in entries if not entry.name.startswith(".") and prefix + entry.name != leave_out]
    # Names of results do not depend on the patterns, or one run would write over what another one has made.
    photos = (Path(prefix + entry.name) for entry in entries if _is_photo(entry))
    maps = {"detail_map": job.detail_map, "uncertainty_map": job.uncertainty_map}
    planned = plan_folder(photos, num_samples=job.settings.num_samples, **maps)
    for entry in entries:
        name = prefix + entry.name
        if entry.is_folder:
            if not any(_matches(name, pattern.removesuffix("/**")) for pattern in job.exclude):
                yield from _walk(job, source, name, leave_out)
        elif _is_photo(entry):
            _, task = next(planned)
            if _is_wanted(name, job):
                yield _item(name, task)


def _item(name: str, task: Task) -> Item:
    try:
        for path in task.files:
            require_short_name(path.as_posix())
        return Item(name, task)
    except OSError as error:
        return Item(name, error=f"'{name}': {error.strerror}")


def _is_photo(entry: Entry) -> bool:
    return not entry.is_folder and os.path.splitext(entry.name)[1].lower() in READ_SUFFIXES


def _is_wanted(name: str, job: BatchJob) -> bool:
    included = not job.include or any(_matches(name, pattern) for pattern in job.include)
    return included and not any(_matches(name, pattern) for pattern in job.exclude)


def _matches(name: str, pattern: str) -> bool:
    """Whether a relative name fits a pattern, upper and lower case and the two spellings of an accent alike.

    A pattern without "/" is compared with the last part, any other with the whole name; "**" stands for any number of
    folders.
    """
    parts, wanted = (unicodedata.normalize("NFC", text).casefold().split("/") for text in (name, pattern.strip("/")))
    return _fits(parts[-1:] if len(wanted) == 1 else parts, wanted)


def _fits(parts: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        # At the end it stands for what is in a folder, not for the folder.
        least = 1 if len(wanted) == 1 else 0
        return any(_fits(parts[skip:], wanted[1:]) for skip in range(least, len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


# ---------------------------------------------------------------------------------------------------------- one photo


class _Read(NamedTuple):
    """A photo that has to be restored."""

    task: Task
    row: Row
    picture: LoadedImage


class _Restored(NamedTuple):
    """A photo that has to be written."""

    task: Task
    row: Row
    picture: LoadedImage
    result: Restoration


class _Loaded(NamedTuple):
    pipe: Restorer
    model_hash: str
    settings_sha256: str


class Worker:
    """Takes photos to results. Three steps, so that reading and writing can go on while another photo is restored.

    Args:
        job: The job.
        get_pipe: Gives the pipeline; called once, when the first readable photo is at hand.
    """

    def __init__(self, job: BatchJob, get_pipe: Callable[[], Restorer]) -> None:
        self.job = job
        self.source = open_folder(job.source)
        self.out = open_folder(job.out)
        self._get_pipe = get_pipe
        self._pipe: _Loaded | None = None
        self._niqe: Niqe | None = None
        self._loading = threading.Lock()
        # Bytes for each pixel of the photo that the disk had no room for.
        self._too_many: float | None = None

    def __call__(self, item: Item) -> Row:
        """Do everything for one photo; see `prepare` for what it raises."""
        step = self.prepare(item)
        step = self.restore(step) if isinstance(step, _Read) else step
        return self.write(step) if isinstance(step, _Restored) else step

    def prepare(self, item: Item) -> _Read | Row:
        """Read a photo, and find out whether there is anything to do.

        Args:
            item: The photo.

        Returns:
            What has to be restored, or the row of a photo that is done or has failed.

        Raises:
            ModelLoadError: The model cannot be loaded.
            ValueError: The model's arguments do not fit this machine.
        """
        started = time.perf_counter()
        row = new_row(item.source)
        if item.task is None:
            return row | {"status": "failed", "error": item.error, "kind": item.kind}
        try:
            data = self.source.read(item.source)
        except Exception as error:  # see _failed
            return _failed(row, error)
        before = time.perf_counter()
        model = self._load()
        started += time.perf_counter() - before  # The first photo does not pay for the model.
        try:
            files = [path.as_posix() for path in item.task.files]
            row |= {"input_sha256": sha256(data), "input_bytes": len(data), "settings_sha256": model.settings_sha256}
            record = read_record(self.out, item.source)
            told = (row["input_sha256"], row["settings_sha256"], files, self.out)
            if record is not None and is_current(record, *told, verify=self.job.verify):
                return record | {"status": "kept"}
            self._refuse_foreign(files, record)
            picture = load_image(data, item.source.rpartition("/")[2])
            check_sides(item.task, size_of_result(picture, self.job.settings))
            row |= {"input_width": picture.size[0], "input_height": picture.size[1], "outputs": files}
            return _Read(item.task, row | {"seconds_read": time.perf_counter() - started}, picture)
        except Exception as error:
            return _failed(row, error)

    def _load(self) -> _Loaded:
        with self._loading:
            if self._pipe is None:
                if self.job.threads is not None:
                    torch.set_num_threads(self.job.threads)
                pipe = self._get_pipe()
                model_hash = pipe.weights_hash()
                given = self.job.model
                foreign = given.get("prior") is not None and given.get("latent_inn") is None
                settings = resolve_settings(self.job.settings, given.get("model", "embedded"), foreign=foreign)
                decides = {
                    "pixels": PIXELS,
                    "model": model_hash,
                    "scheduler": scheduler_facts(pipe),
                    "init_model": getattr(getattr(pipe, "init_model", None), "sha256", None),
                    "settings": settings,
                }
                self._pipe = _Loaded(pipe, model_hash, canonical_hash(decides))
            return self._pipe

    def _refuse_foreign(self, files: list[str], record: Row | None) -> None:
        """What an earlier run made is replaced; what somebody else put there is not, unless asked."""
        if self.job.overwrite:
            return
        ours = set(record["outputs"] or ()) if record is not None else set()
        for name in files:
            if name in ours or self.out.size(name) is None:
                continue
            try:
                metadata = read_metadata(self.out.read(name))
            except ImageReadError:
                metadata = None
            if metadata is None or metadata.get("software") != "latentindigo":
                raise FileExistsError(
                    errno.EEXIST, "exists already and was not written by this package; --overwrite replaces it", name
                )

    def restore(self, read: _Read) -> _Restored | Row:
        """Call the pipeline.

        Args:
            read: From `prepare`.

        Returns:
            What has to be written, or the row of a photo that has failed.
        """
        started = time.perf_counter()
        try:
            self._require_room(read.picture)
            maps = self.job.quality or bool(read.task.detail_maps)
            result = restore_picture(self._load().pipe, read.picture, self.job.settings, detail_maps=maps)
        except Exception as error:
            return _failed(read.row, error)
        return _Restored(read.task, read.row | {"seconds_model": time.perf_counter() - started}, read.picture, result)

    def _require_room(self, picture: LoadedImage) -> None:
        """Once the disk was full, compute nothing that has no chance to fit: half of what it would need."""
        if self._too_many is not None and (room := self.out.room()) is not None:
            needed = self._too_many * picture.rgb[0].numel()
            if room < needed / 2:
                raise OSError(errno.ENOSPC, f"not tried: about {needed:.0f} bytes are needed and {room} are free")

    def write(self, restored: _Restored) -> Row:
        """Estimate the quality, write the pictures, and then the record that says so.

        Args:
            restored: From `restore`.

        Returns:
            The row.
        """
        started = time.perf_counter()
        task, picture, result = restored.task, restored.picture, restored.result
        model = self._load()
        height, width = result.images[0].shape[-2:]
        row = restored.row | {
            "output_width": width,
            "output_height": height,
            "seed": self.job.settings.seed,
            "settings": result.settings,
            "model_hash": model.model_hash,
            "version": __version__,
            "output_sha256": [],
            "output_bytes": [],
        }

        def files() -> Iterator[tuple[str, bytes]]:
            pictures = pictures_to_write(model.pipe, model.model_hash, task, picture, result, self.job.settings)
            for path, image, metadata in pictures:
                data = encode_image(image, path.name, metadata=metadata)
                row["output_sha256"].append(sha256(data))
                row["output_bytes"].append(len(data))
                yield path.as_posix(), data
            row["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            row["seconds_write"] = time.perf_counter() - started
            row["seconds"] = sum(row[f"seconds_{part}"] for part in ("read", "model", "write"))
            # Last, so that whoever finds it finds the pictures.
            yield record_name(row["input"]), record_bytes(row)

        try:
            if self.job.quality:
                row |= self._quality(picture, result)
            self.out.write(files())
        except Exception as error:
            if failure_kind(error) == "disk":
                self._too_many = sum(row["output_bytes"]) / picture.rgb[0].numel()
            return _failed(row, error)
        return row | {"status": "restored"}

    def _quality(self, picture: LoadedImage, result: Restoration) -> dict[str, float | None]:
        """What can be said about a result without knowing the truth; of the first sample, in 8 bits."""
        x = round8(result.images[0].detach().cpu().float())
        size = (picture.size[1], picture.size[0])
        self._niqe = self._niqe or Niqe.shipped()
        try:
            niqe = self._niqe.score(x)
        except ValueError:  # Too small, or flat.
            niqe = None
        uncertainty = result.uncertainty
        return {
            # A cut picture shows another part than the photo does.
            "consistency": None if self.job.settings.crop else _consistency(x, picture.rgb, size),
            "invented": float(result.detail_maps[0].mean()),
            "uncertainty": None if uncertainty is None else float(uncertainty[0].mean()),
            "niqe": niqe,
        }


def _consistency(x: Tensor, y: Tensor, size: tuple[int, int]) -> float:
    return float(consistency(x[None], y[None], lambda image: resize(image, size)))


def _failed(row: Row, error: Exception) -> Row:
    """The row of a photo that has failed. So are mistakes of this package told: no job of days ends over one photo."""
    kind = failure_kind(error)
    if isinstance(error, FileExistsError):
        kind = "exists"
    elif isinstance(error, OSError) and kind == "input":
        kind = "io"
    elif kind in ("input", "model") and not isinstance(error, ValueError):
        kind = "unexpected"
    if kind == "memory" and torch.cuda.is_available():
        torch.cuda.empty_cache()
    message = _reason(error)
    if kind == "memory":
        message = f"out of memory; a smaller --tile, --scale or --num-samples needs less ({message})"
    elif kind == "unexpected":
        message = f"{type(error).__name__}: {message}"
    made = ("outputs", "output_sha256", "output_bytes", "output_width", "output_height", "finished", "seconds")
    return row | dict.fromkeys(made) | {"status": "failed", "error": message, "kind": kind}


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"'{error.filename}' {explain(error)}" if error.filename else explain(error)
    return " ".join(str(error).split()) or type(error).__name__


# -------------------------------------------------------------------------------------------------------- all of them


def local_engine(worker: Worker) -> Engine:
    """Run a job in this process: one photo is restored while the next are read and the last are written.

    Args:
        worker: Does the work.

    Returns:
        An engine: from items to their rows, in order. At most five photos are in memory.
    """

    def run(items: Iterable[Item]) -> Iterator[tuple[Item, Row]]:
        coming = iter(items)
        reader, writer = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(1, "writer")
        try:
            ahead = deque((item, reader.submit(worker.prepare, item)) for item in islice(coming, _AHEAD))
            behind: deque[tuple[Item, Future[Row]]] = deque()
            while ahead:
                item, reading = ahead.popleft()
                step = reading.result()
                ahead.extend((item, reader.submit(worker.prepare, item)) for item in islice(coming, 1))
                if isinstance(step, _Read):
                    step = worker.restore(step)
                written = writer.submit(worker.write, step) if isinstance(step, _Restored) else _settled(step)
                behind.append((item, written))
                while behind and (behind[0][1].done() or len(behind) > _AHEAD):
                    item, written = behind.popleft()
                    yield item, written.result()
            for item, written in behind:
                yield item, written.result()
        finally:
            # Whatever stopped the run, what has been restored is still written.
            reader.shutdown(cancel_futures=True)
            writer.shutdown()

    return run


def _settled(row: Row) -> Future[Row]:
    future: Future[Row] = Future()
    future.set_result(row)
    return future


def run_batch(job: BatchJob, engine: Engine, *, manifest: str | None = None) -> Iterator[Row]:
    """Restore a folder.

    Memory does not grow with the number of photos, except by the rows of those that fail (about a kilobyte each, for
    the second try and the manifest).

    Args:
        job: What to do.
        engine: Who does it.
        manifest: Path or URL of the manifest, ending in .jsonl or .parquet; None for `manifest.jsonl` in the output
            folder.

    Yields:
        A row for each photo, in order, then again for each one that was tried again.

    Raises:
        BusyError: Another job is at work on the output folder.
        ValueError: There is no photo, the output folder cannot be written to, or the manifest's name is of no use.
        ModelLoadError: The model cannot be loaded.
        OSError: The disk is full, or the manifest cannot be written.
    """
    out = open_folder(job.out)
    target = manifest or f"{job.out}/manifest.jsonl"
    place, _, name = (target if "://" in target else os.path.abspath(target).replace(os.sep, "/")).rpartition("/")
    require_manifest(name)
    destination = open_folder(place or "/")
    with ExitStack() as stack:
        stack.enter_context(out.lock())
        out.clean()
        local = isinstance(out, LocalFolder)
        elsewhere = "" if local else stack.enter_context(tempfile.TemporaryDirectory(prefix="latentindigo-"))
        kept = Path(out.location, KEPT) if local else Path(elsewhere)
        journal = stack.enter_context(closing(Journal(kept / "journal.jsonl")))
        again: list[Item] = []
        count = 0
        for item, row in engine(list_items(job)):
            count += 1
            row["attempts"] = 1
            journal.add(row)
            if _may_pass(row, item):
                again.append(item)
            yield row
        if not count:
            raise ValueError(f"no photos in '{job.source}' that the patterns let through")
        for attempt in range(2, job.retries + 2):
            items, again = again, []
            for item, row in engine(items) if items else ():
                row["attempts"] = attempt
                journal.replace(row)
                if _may_pass(row, item):
                    again.append(item)
                yield row
        out.clean()  # A worker that died in the middle of writing has left something, and all others are done.
        made = kept / "partial" / name
        try:
            made.parent.mkdir(parents=True, exist_ok=True)
            write_manifest(journal.rows(), made)
            destination.put(str(made), name)
        except Exception as error:  # a store's own errors too
            number = getattr(error, "errno", None)
            raise OSError(number, f"the manifest cannot be written: {_reason(error)}", target) from error
        finally:
            made.unlink(missing_ok=True)
        journal.remove()


def _may_pass(row: Row, item: Item) -> bool:
    return row["status"] == "failed" and row["kind"] in _PASSING and item.task is not None
