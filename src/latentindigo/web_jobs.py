"""The work behind the web page, without the page: bytes of a photo in, files to look at and to download out.

    bytes --check--> LoadedImage --restore_picture--> Restoration --write--> Finished (paths in one private folder)

Nothing here knows Gradio, so that it can be tested, and used, without a browser. No path that a client names is ever
opened: a photo arrives as bytes, and every path below is made here from random names.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from latentindigo.failures import failure_kind, say_failure
from latentindigo.images import ImageReadError, LoadedImage, load_image, save_image, to_pil
from latentindigo.jobs import (
    Restoration,
    Restorer,
    RestoreSettings,
    pictures_to_write,
    restore_picture,
)
from latentindigo.opening import DECODE_ERRORS, open_picture
from latentindigo.planning import Task
from latentindigo.targets import check_room

__all__ = ["FORMATS", "Finished", "Limits", "RefusedError", "Step", "StoppedError", "Studio", "TemporaryFolder"]

FORMATS = {"as the photo": "", "PNG": ".png", "JPEG": ".jpg", "WebP": ".webp", "TIFF": ".tif"}
_SUFFIX_OF = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "TIFF": ".tif"}
_SHOWN_SIDE = 2560  # Of the copies that the page shows, in pixels; downloads have every pixel.
_SHOWN_QUALITY = 92
_SWEEP_SECONDS = 20.0
_MAX_SCALE_OF_A_PASS = 8 * 2**0.5  # As in pipeline.py: beyond it, passes of 4 come first.
_MOST_ENLARGED = 64  # As in canvas.py.
_LEAST_SIDE = 64  # Thinner pictures are filled up to about this side while they are worked on.


class StoppedError(Exception):
    """Somebody asked to stop; the restoration ended at its next step."""


class RefusedError(ValueError):
    """A photo or a wish that this server does not take; the message is one sentence fit to show to a user."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one visitor may ask for.

    Attributes:
        upload_bytes: Size of an uploaded file.
        pixels: Pixels of a photo, and of all results of one restoration together; memory grows with them.
        keep_seconds: Age at which uploads and results are deleted.
        folder_bytes: Size of all temporary files; beyond it the oldest are deleted whatever their age.
    """

    upload_bytes: int = 50 * 2**20
    pixels: int = 24_000_000
    keep_seconds: float = 30 * 60
    folder_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name}: expected more than 0, got {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One denoiser step is done.

    Attributes:
        done: Steps done, from 1.
        total: Steps in all.
        picture: The estimate as it is now, at most 512 pixels on its longer side.
    """

    done: int
    total: int
    picture: Image.Image


@dataclasses.dataclass(frozen=True)
class Finished:
    """A restoration, written.

    Attributes:
        pictures: Results to download, one per sample, with the photo's metadata and the settings inside.
        detail_maps: Maps of invented detail to download, 16-bit PNG, one per sample.
        uncertainty: Map of the samples' standard deviation to download, or None for one sample.
        shown_before: The photo as the page shows it.
        shown_after: The results as the page shows them.
        shown_details: The maps of invented detail as the page shows them.
        shown_uncertainty: The map of uncertainty as the page shows it, or None.
        input_size: (width, height) of the photo.
        output_size: (width, height) of the results.
        seconds: Time the restoration took.
        settings: The resolved settings; given back, they make the same pixels again.
        notes: Sentences the visitor should read.
    """

    pictures: tuple[Path, ...]
    detail_maps: tuple[Path, ...]
    uncertainty: Path | None
    shown_before: Path
    shown_after: tuple[Path, ...]
    shown_details: tuple[Path, ...]
    shown_uncertainty: Path | None
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    seconds: float
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def downloads(self) -> tuple[Path, ...]:
        """Every file to download: results, then maps."""
        return (*self.pictures, *self.detail_maps, *(() if self.uncertainty is None else (self.uncertainty,)))


# ----------------------------------------------------------------------------------------------------- temporary files


class TemporaryFolder:
    """A private folder whose files are deleted when they are old, when there are too many, and all at the end.

    Args:
        limits: Age and total size.

    Attributes:
        path: The folder, readable by this user only.
        kept: Folder inside it that is swept at the end only.
    """

    def __init__(self, limits: Limits) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="latentindigo-app-")).resolve()
        self.kept = self.path / "kept"
        self.kept.mkdir()
        self._limits = limits
        self._ended = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_again, name="sweeper", daemon=True)

    def __enter__(self) -> TemporaryFolder:
        self._sweeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._sweeper.join(timeout=5)
        # A restoration that is just ending may still write a file while the folder goes.
        for _attempt in range(5):
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                break
            time.sleep(0.1)

    def make(self) -> Path:
        """Make a folder with a name that nobody can guess."""
        folder = self.path / f"r{secrets.token_urlsafe(24)}"
        folder.mkdir(mode=0o700)
        return folder

    def sweep(self, now: float | None = None) -> None:
        """Delete files that are too old or too much, and the folders that they leave empty.

        Args:
            now: Seconds since the epoch; None = now.
        """
        now = time.time() if now is None else now
        files = []
        # Unlike `rglob`, this goes on where a folder vanishes while it is listed.
        for folder, _, names in os.walk(self.path):
            for path in (Path(folder, name) for name in names if not Path(folder).is_relative_to(self.kept)):
                with _vanishing():
                    facts = path.stat()
                    files.append((facts.st_mtime, facts.st_size, path))
        total = sum(size for _, size, _ in files)
        for modified, size, path in sorted(files, key=lambda entry: entry[0]):
            if now - modified > self._limits.keep_seconds or total > self._limits.folder_bytes:
                with _vanishing():
                    path.unlink()
                    total -= size
        for path in self.path.iterdir():
            with _vanishing():
                # Younger ones may be about to be written to.
                if path.is_dir() and path != self.kept and now - path.stat().st_mtime > self._limits.keep_seconds:
                    path.rmdir()  # Refuses where something is left.

    def _sweep_again(self) -> None:
        while not self._ended.wait(_SWEEP_SECONDS):
            with _vanishing():
                self.sweep()


@contextmanager
def _vanishing() -> Iterator[None]:
    """What another thread deleted meanwhile is gone, and that is all that was wanted."""
    try:
        yield
    except OSError:
        pass


# -------------------------------------------------------------------------------------------------------- restorations


class Studio:
    """Restores photos for visitors, a few at a time.

    Args:
        pipe: The pipeline; threads share it, for a call leaves it as it was.
        folder: Where results are written.
        limits: How much may be asked for.
        concurrency: Restorations at the same time; each needs memory of its own.
        steps_of: Tells how many denoiser steps settings stand for.
        preview: Makes a small picture of (z0, output size), (3, H, W) in [0, 1].
    """

    def __init__(
        self,
        pipe: Restorer,
        folder: TemporaryFolder,
        limits: Limits,
        *,
        concurrency: int = 1,
        steps_of: Callable[[RestoreSettings], int],
        preview: Callable[[Any, tuple[int, int]], Any],
    ) -> None:
        self.pipe = pipe
        self.folder = folder
        self.limits = limits
        self._steps_of = steps_of
        self._preview = preview
        self._model_hash = pipe.weights_hash()
        self._workers = ThreadPoolExecutor(concurrency, thread_name_prefix="restoration")
        self._running: dict[threading.Event, str] = {}

    def close(self) -> None:
        """Stop everything that runs, at its next step, and wait for it."""
        for stop in list(self._running):
            stop.set()
        self._workers.shutdown(wait=True, cancel_futures=True)

    def leave(self, session: str) -> None:
        """Stop what a visitor has running, at its next step: nobody waits for it any more.

        Args:
            session: The visitor, as given to `follow`.
        """
        for stop, owner in list(self._running.items()):
            if owner == session:
                stop.set()

    async def follow(
        self, data: bytes | None, name: str, settings: RestoreSettings, form: str = "", session: str = ""
    ) -> AsyncGenerator[Step | Finished, None]:
        """Restore in a thread and tell of every step; leaving the loop, or being cancelled, stops the computation.

        Args:
            data: The bytes of the photo's file, None where none was given.
            name: The file's name, for messages and for the names of results.
            settings: How to restore.
            form: A value of `FORMATS`: the ending of the results' names, "" for the photo's own.
            session: Who asks, for `leave`.

        Yields:
            A `Step` after each denoiser step, and at the end one `Finished`.

        Raises:
            RefusedError: The photo cannot be read or is too large, or the settings do not fit it.
            StoppedError: The visitor left.
        """
        if data is None:
            raise RefusedError("There is no photo yet; choose one, drop it on the page, or paste it.")
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[Step | None] = asyncio.Queue()
        stop = threading.Event()
        self._running[stop] = session

        def tell(step: Step | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(told.put_nowait, step)

        def ended(future: Future[Finished]) -> None:
            self._running.pop(stop, None)
            if not future.cancelled():
                future.exception()  # Looked at, so that nobody complains that it was not.
            tell(None)

        work = self._workers.submit(self.restore, data, name, settings, form, stop, tell)
        work.add_done_callback(ended)
        try:
            while (step := await told.get()) is not None:
                yield step
            yield work.result()
        finally:
            stop.set()
            work.cancel()

    def restore(
        self,
        data: bytes,
        name: str,
        settings: RestoreSettings,
        form: str = "",
        stop: threading.Event | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Finished:
        """Read, restore and write one photo.

        Args:
            data: The bytes of the photo's file.
            name: The file's name.
            settings: How to restore.
            form: A value of `FORMATS`.
            stop: Once set, the restoration ends at its next step.
            on_step: Called after every denoiser step.

        Returns:
            The files; they are the folder's, and go when it sweeps.

        Raises:
            RefusedError: The photo cannot be read or is too large, or the settings do not fit it.
            StoppedError: `stop` was set.
        """
        started = time.perf_counter()
        try:
            picture, suffix = self._read(data, name)
            target = self._check_output(picture, settings)
            final = settings.size if settings.crop and settings.size is not None else target
            wanted = _task(picture, self.folder.path, _stem(name), form or suffix, settings.num_samples)
            check_room(wanted, final, picture.bits)
            passes = _passes(picture.size, target)
            total, seen = passes * self._steps_of(settings), 0

            def after_step(_step: int, tensors: dict[str, Any]) -> None:
                nonlocal seen
                seen += 1
                _check(stop)
                if on_step is not None:
                    on_step(Step(seen, max(total, seen), to_pil(self._preview(tensors["z0"], target))))

            _check(stop)
            result = restore_picture(self.pipe, picture, settings, detail_maps=True, on_step=after_step)
            _check(stop)
        except (RefusedError, StoppedError):
            raise
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            raise RefusedError(_sentence(error)) from error
        folder = self.folder.make()
        try:
            return self._write(folder, picture, settings, result, _stem(name), form or suffix, started)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, (ValueError, OSError, RuntimeError, MemoryError)):
                raise RefusedError(_sentence(error)) from error
            raise

    def _read(self, data: bytes, name: str) -> tuple[LoadedImage, str]:
        """The photo, and the ending that its format is written with."""
        shown = Path(name.replace("\\", "/")).name[:100] or "photo"
        if len(data) > self.limits.upload_bytes:
            raise RefusedError(
                f"'{shown}' has {_megabytes(len(data))} MB, and this page takes at most "
                f"{_megabytes(self.limits.upload_bytes)} MB; save it smaller first."
            )
        suffix = ".png"
        try:
            with open_picture(data, shown, sys.maxsize) as header:
                suffix = _SUFFIX_OF.get(header.format or "", ".png")
                pixels = header.width * header.height
        except (*DECODE_ERRORS, Warning):
            pixels = 0  # `load_image` says what is wrong with it.
        # Before decoding: a few kilobytes can stand for gigabytes of pixels.
        if pixels > self.limits.pixels:
            raise RefusedError(
                f"'{shown}' has {pixels / 1e6:.3g} megapixels, and this page takes at most "
                f"{self.limits.pixels / 1e6:g}; make it smaller first."
            )
        try:
            return load_image(data, shown, max_pixels=self.limits.pixels), suffix
        except ImageReadError as error:
            raise RefusedError(str(error)) from error

    def _check_output(self, picture: LoadedImage, settings: RestoreSettings) -> tuple[int, int]:
        """(width, height) of the results, refused where they are too many pixels."""
        width, height = picture.size
        scale = settings.scale
        if settings.size is not None:
            shares = settings.size[0] / width, settings.size[1] / height
            if max(shares) > _MOST_ENLARGED:
                raise RefusedError(
                    f"The size is {max(shares):.3g} times that of the photo, and {_MOST_ENLARGED} times is the most; "
                    "choose a smaller size."
                )
            scale = max(shares) if settings.crop else min(shares)
        target = max(1, round(width * scale)), max(1, round(height * scale))
        count = settings.num_samples
        least = min(_LEAST_SIDE, math.isqrt(self.limits.pixels // count))
        filled = max(target[0], least), max(target[1], least)
        if filled[0] * filled[1] * count > self.limits.pixels:
            how = " before it is cut" if settings.crop else ""
            how += f", filled up to {filled[0]} x {filled[1]}" if min(target) < least else ""
            how += "" if count == 1 else f" in {count} samples"
            way_out = "give a smaller photo"
            if scale > 1 or count > 1:
                way_out = "choose a smaller scale or size, or fewer samples"
            raise RefusedError(
                f"The result would have {target[0]} x {target[1]} pixels{how}, and this page makes at most "
                f"{self.limits.pixels / 1e6:g} megapixels at once; {way_out}."
            )
        return target

    def _write(
        self,
        folder: Path,
        picture: LoadedImage,
        settings: RestoreSettings,
        result: Restoration,
        stem: str,
        suffix: str,
        started: float,
    ) -> Finished:
        notes = []
        if suffix == ".jpg" and picture.alpha is not None:
            notes.append("JPEG has no transparency, so the picture was laid over white.")
        count = len(result.images)
        task = _task(picture, folder, stem, suffix, count)
        shown: list[Path] = []
        output_size = picture.size
        for path, image, record in pictures_to_write(self.pipe, self._model_hash, task, picture, result, settings):
            output_size = image.size
            opaque = _over_white(image) if suffix == ".jpg" else image
            save_image(opaque, path, metadata=record)
            shown.append(_show(opaque, folder / f"shown-{len(shown)}.webp"))
        return Finished(
            pictures=task.targets,
            detail_maps=task.detail_maps,
            uncertainty=task.uncertainty_map,
            shown_before=_show(picture, folder / "shown-before.webp", output_size),
            shown_after=tuple(shown[:count]),
            shown_details=tuple(shown[count : 2 * count]),
            shown_uncertainty=None if task.uncertainty_map is None else shown[-1],
            input_size=picture.size,
            output_size=output_size,
            seconds=time.perf_counter() - started,
            settings=result.settings,
            notes=tuple(notes),
        )


def _task(picture: LoadedImage, folder: Path, stem: str, suffix: str, count: int) -> Task:
    """The files of `count` samples."""
    numbers = [""] if count == 1 else [f"-{index + 1}" for index in range(count)]
    return Task(
        source=Path(picture.name),
        targets=tuple(folder / f"{stem}-restored{number}{suffix}" for number in numbers),
        detail_maps=tuple(folder / f"{stem}-invented{number}.png" for number in numbers),
        uncertainty_map=None if count == 1 else folder / f"{stem}-uncertainty.png",
    )


def _check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise StoppedError


def _passes(size: tuple[int, int], target: tuple[int, int]) -> int:
    """Passes that the pipeline takes for one output."""
    share, passes = max(target[0] / size[0], target[1] / size[1]), 1
    while share > _MAX_SCALE_OF_A_PASS:
        share, passes = share / 4, passes + 1
    return passes


def _stem(name: str) -> str:
    """A file name without its ending, of harmless characters only."""
    stem = Path(name.replace("\\", "/")).stem
    return re.sub(r"[^\w-]+", "-", stem, flags=re.ASCII).strip("-")[:60] or "photo"


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.3g}"


def _sentence(error: BaseException) -> str:
    """A failure in one sentence; where files lie on this machine is nobody's business."""
    if isinstance(error, OSError):
        return "The result could not be written; the disk of the server may be full."
    if failure_kind(error) == "memory":
        return "There is not enough memory for this result; choose a smaller scale or fewer samples."
    return say_failure(error)


def _over_white(picture: LoadedImage) -> LoadedImage:
    if picture.alpha is None:
        return picture
    alpha = picture.alpha.to(picture.rgb)
    return picture.replace_pixels(picture.rgb * alpha + (1 - alpha), None)


def _show(picture: LoadedImage, path: Path, size: tuple[int, int] | None = None) -> Path:
    """Write a copy for the page: 8 bits, not too large; with a `size`, cut to its aspect as the result was."""
    image = to_pil(picture)
    if size is not None:
        share = min(image.width / size[0], image.height / size[1])
        kept = max(1, round(size[0] * share)), max(1, round(size[1] * share))
        left, top = (image.width - kept[0]) // 2, (image.height - kept[1]) // 2
        image = image.crop((left, top, left + kept[0], top + kept[1]))
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.LANCZOS)
    options: dict[str, Any] = {"icc_profile": picture.icc} if picture.icc else {}
    image.convert("RGBA" if "A" in image.mode else "RGB").save(
        path, "WEBP", quality=_SHOWN_QUALITY, method=2, **options
    )
    return path
