"""Which pictures to restore and which files to write, decided before anything is computed."""

from __future__ import annotations

import dataclasses
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from latentindigo.images import WRITE_SUFFIXES, list_images
from latentindigo.safe_files import printable

__all__ = ["Task", "find_pictures", "plan_folder", "plan_tasks"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One picture to restore and every file that comes of it.

    Attributes:
        source: Picture to read.
        targets: Pictures to write, one per sample.
        detail_maps: Maps of invented detail to write, one per sample, or none.
        uncertainty_map: Map of the samples' standard deviation to write, or None.
    """

    source: Path
    targets: tuple[Path, ...]
    detail_maps: tuple[Path, ...] = ()
    uncertainty_map: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file this task writes."""
        extra = () if self.uncertainty_map is None else (self.uncertainty_map,)
        return (*self.targets, *self.detail_maps, *extra)


def find_pictures(inputs: Sequence[Path], *, recursive: bool = False, leave_out: Path | None = None) -> list[Path]:
    """List the pictures that files and folders stand for, each once, in a fixed order.

    A picture that several names or links lead to is one picture. A link that leads nowhere is listed as it stands: it
    fails when it is read, and the others are done.

    Args:
        inputs: Picture files and folders.
        recursive: Also search the folders inside folders.
        leave_out: A folder whose pictures are not inputs (the output folder, when it lies inside an input).

    Returns:
        Paths, each beginning with the input it was found by.

    Raises:
        ValueError: An input does not exist, or there is no picture at all.
    """
    found: dict[Path, Path] = {}
    left_out = None if leave_out is None else _real(leave_out)
    for entry in inputs:
        if entry.is_dir():
            for path in list_images(entry, recursive=recursive):
                inside = left_out is not None and _real(path).is_relative_to(left_out) and left_out != _real(entry)
                if not inside:
                    found.setdefault(_real(path), path)
        elif os.path.lexists(entry):
            found.setdefault(_real(entry), entry)
        else:
            raise ValueError(f"'{printable(str(entry))}' does not exist; give pictures or folders of pictures")
    if not found:
        hint = "" if recursive else "; folders inside them are searched with --recursive"
        raise ValueError(f"no pictures in {', '.join(repr(str(entry)) for entry in inputs)}{hint}")
    return list(found.values())


def _real(path: Path) -> Path:
    """Where a path leads; unlike Path.resolve, a link that leads back to itself is no error."""
    return Path(os.path.realpath(path))


def _key(path: Path) -> str:
    """On many disks A.png and a.png are one file, and so are the two ways to write an accented letter."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def plan_tasks(
    inputs: Sequence[Path],
    out: Path,
    *,
    recursive: bool = False,
    num_samples: int = 1,
    detail_map: bool = False,
    uncertainty_map: bool = False,
) -> list[Task]:
    """Decide every file name before anything is computed.

    One picture and an `out` that ends like a picture: `out` is the file. Otherwise `out` is a folder; a picture found
    in a folder keeps its place inside that folder. The format stays the source's where it can be written, else it is
    PNG. Sample k > 0 is `name.sample<k>.png`; maps are `name.detail.png` and `name.uncertainty.png`.

    Args:
        inputs: Picture files and folders.
        out: File or folder to write.
        recursive: Also search the folders inside folders.
        num_samples: Results for each picture.
        detail_map: Also write maps of invented detail.
        uncertainty_map: Also write the map of the samples' standard deviation.

    Returns:
        One task per picture; no two write the same file.

    Raises:
        ValueError: An input does not exist, a name has no picture's ending, or a result would replace an input.
    """
    if uncertainty_map and num_samples < 2:
        raise ValueError(f"a map of uncertainty needs at least 2 samples, got {num_samples}; give --num-samples 4")
    sources = find_pictures(inputs, recursive=recursive, leave_out=out)
    single_file = bool(out.suffix) and not out.is_dir()
    if single_file and (len(inputs) != 1 or inputs[0].is_dir()):
        raise ValueError(f"expected a folder to write several pictures to, got the file name '{out}'")
    if single_file and out.suffix.lower() not in WRITE_SUFFIXES:
        raise ValueError(f"expected a name ending in {', '.join(WRITE_SUFFIXES)}, or a folder, got '{out}'")
    originals = {_real(source) for source in sources}
    claimed: set[str] = set()
    tasks = []
    for source in sources:
        candidates = [out] if single_file else _candidates(source, _place(source, inputs, out))
        planned = (_task(source, target, num_samples, detail_map, uncertainty_map) for target in candidates)
        task = _claim(planned, claimed)
        if not originals.isdisjoint(map(_real, task.files)):
            raise ValueError(
                f"the result of '{printable(str(source))}' would replace an input; write to another folder"
            )
        tasks.append(task)
    return tasks


def plan_folder(
    sources: Iterable[Path], *, num_samples: int = 1, detail_map: bool = False, uncertainty_map: bool = False
) -> Iterator[tuple[Path, Task]]:
    """Decide the file names of the pictures of one folder as `plan_tasks` does, from their names alone.

    Args:
        sources: Pictures of one folder, in order, relative to whatever the results are to be relative to.
        num_samples: Results for each picture.
        detail_map: Also write maps of invented detail.
        uncertainty_map: Also write the map of the samples' standard deviation.

    Yields:
        Each picture with its task.
    """
    claimed: set[str] = set()
    for source in sources:
        targets = _candidates(source, source.parent)
        planned = (_task(source, target, num_samples, detail_map, uncertainty_map) for target in targets)
        yield source, _claim(planned, claimed)


def _claim(planned: Iterable[Task], claimed: set[str]) -> Task:
    """The first task whose names are free, which it takes."""
    task = next(task for task in planned if claimed.isdisjoint(map(_key, task.files)))
    claimed.update(map(_key, task.files))
    return task


def _place(source: Path, inputs: Sequence[Path], out: Path) -> Path:
    folder = next((entry for entry in inputs if entry.is_dir() and source.is_relative_to(entry)), None)
    return out if folder is None else out / source.parent.relative_to(folder)


def _candidates(source: Path, place: Path) -> Iterator[Path]:
    """Names for a result, the plainest first; the second tells apart a.gif and a.png, both written as PNG."""
    suffix = source.suffix if source.suffix.lower() in WRITE_SUFFIXES else ".png"
    stem = f"{source.stem}-{source.suffix.lstrip('.')}" if source.suffix else f"{source.stem}-2"
    yield place / f"{source.stem}{suffix}"
    yield place / f"{stem}{suffix}"
    yield from (place / f"{stem}-{number}{suffix}" for number in itertools.count(2))


def _task(source: Path, target: Path, num_samples: int, detail_map: bool, uncertainty_map: bool) -> Task:
    stems = [target.stem, *(f"{target.stem}.sample{k}" for k in range(1, num_samples))]
    return Task(
        source=source,
        targets=tuple(target.with_name(stem + target.suffix) for stem in stems),
        detail_maps=tuple(target.with_name(f"{stem}.detail.png") for stem in stems) if detail_map else (),
        uncertainty_map=target.with_name(f"{target.stem}.uncertainty.png") if uncertainty_map else None,
    )
