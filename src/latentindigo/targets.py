"""May the files of a task be written? Asked before the work, for an hour of computing must not end at a full disk.

What can be known beforehand is refused beforehand: names that are taken or too long, folders that cannot be written
to, sides that a format cannot hold, disks without the room. Writing itself may still fail; then `FullDisks` remembers
it, so that nothing as large is computed for a disk that is as full.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from latentindigo.planning import Task
from latentindigo.safe_files import explain, nearest_folder

__all__ = ["FullDisks", "check_names", "check_room", "check_sides"]

# Longest side in pixels; the other formats hold more than fits into a computer's memory.
_LONGEST_SIDE = {".jpg": ("JPEG", 65500), ".jpeg": ("JPEG", 65500), ".webp": ("WebP", 16383)}
# Bytes that a pixel of a photograph takes at the very least, at 8 bits; a disk without them is not worth trying.
_LEAST_BYTES = {".png": 0.4, ".tif": 0.4, ".tiff": 0.4, ".jpg": 0.05, ".jpeg": 0.05, ".webp": 0.02}
_BLOCK = 4096
_LONGEST_NAME = 255  # Bytes, on the disks of all common systems, where the system does not tell.


def check_names(task: Task, overwrite: bool) -> None:
    """Refuse names that cannot be written, before anything is read.

    Args:
        task: The task.
        overwrite: Whether existing files may be replaced.

    Raises:
        FileExistsError: A name is taken and `overwrite` is False.
        OSError: A name is too long, or the folder, or the nearest one above it that exists, cannot be written to.
    """
    for path in task.files:
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "exists already; --overwrite replaces it", str(path))
    for folder in {path.parent for path in task.files}:
        place = nearest_folder(folder / "x")
        _check_folder(place, folder)
        longest = _longest_name(place)
        for path in task.files:
            if path.parent == folder and len(os.fsencode(path.name)) > longest:
                raise _refusal(errno.ENAMETOOLONG, path)


def _check_folder(place: Path, folder: Path) -> None:
    try:
        if not place.is_dir():
            raise _refusal(errno.ENOTDIR, folder)
        if os.access(place, os.W_OK | os.X_OK):
            return
        # Root may write anywhere but to what is mounted for reading only.
        read_only = hasattr(os, "statvfs") and bool(os.statvfs(place).f_flag & os.ST_RDONLY)
    except OSError as error:
        raise _refusal(error.errno or errno.EIO, folder) from error
    raise _refusal(errno.EROFS if read_only else errno.EACCES, folder)


def _longest_name(place: Path) -> int:
    try:
        return os.pathconf(place, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return _LONGEST_NAME


def _refusal(number: int, path: Path) -> OSError:
    return OSError(number, f"cannot be written: {explain(OSError(number, os.strerror(number)))}", str(path))


def check_sides(task: Task, size: tuple[int, int]) -> None:
    """Refuse what the format cannot hold, before anything is computed.

    Args:
        task: The task; where it is written does not matter.
        size: (width, height) of the results in pixels.

    Raises:
        ValueError: The format cannot hold a side as long.
    """
    for path in task.targets:
        name, longest = _LONGEST_SIDE.get(path.suffix.lower(), ("", 0))
        if longest and max(size) > longest:
            raise ValueError(
                f"'{path.name}' would have {size[0]}x{size[1]} pixels, and {name} holds at most {longest} a side; "
                "name the result .png or .tif, or enlarge less"
            )


def check_room(task: Task, size: tuple[int, int], bits: int, full: FullDisks | None = None) -> None:
    """Refuse what the format or the disk cannot hold, before anything is computed.

    Args:
        task: The task.
        size: (width, height) of the results in pixels.
        bits: Bits per sample of the picture, 8 or 16.
        full: What was learnt from earlier failures, or None.

    Raises:
        ValueError: The format cannot hold a side as long.
        OSError: The disk has too little room; its number is that of a full disk.
    """
    check_sides(task, size)
    pixels = size[0] * size[1]
    wanted = _least_bytes(task, pixels, bits)
    free = _free_bytes(task)
    if free is not None and free < wanted:
        raise OSError(
            errno.ENOSPC,
            f"is not computed: it needs {_amount(wanted)} or more and {_amount(free)} are free; free some room "
            "or write to another disk",
            str(task.targets[0]),
        )
    if full is not None:
        full.refuse(task, pixels)


def _least_bytes(task: Task, pixels: int, bits: int) -> int:
    # Maps are 16-bit grey, and mostly smooth: as much as a colour picture's 8 bits at the least.
    each = [_LEAST_BYTES.get(path.suffix.lower(), 0.0) * (2 if bits == 16 else 1) for path in task.targets]
    each += [_LEAST_BYTES[".png"] for _ in task.files[len(task.targets) :]]
    return sum(_BLOCK + round(pixels * bytes_each) for bytes_each in each)


def _free_bytes(task: Task) -> int | None:
    try:
        return shutil.disk_usage(nearest_folder(task.targets[0])).free
    except OSError:
        return None


def _amount(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


class FullDisks:
    """What did not fit: a picture as large is not computed again for a disk that is as full."""

    def __init__(self) -> None:
        self._failed: dict[int, tuple[int, int]] = {}

    def note(self, task: Task, pixels: int) -> None:
        """Remember a failure.

        Args:
            task: The task whose results found no room, after what was left of them is gone.
            pixels: Pixels of one result.
        """
        device, free = _device(task), _free_bytes(task)
        if device is not None and free is not None:
            self._failed[device] = pixels, free

    def refuse(self, task: Task, pixels: int) -> None:
        """Refuse a task that would fail as an earlier one did; a smaller one is tried.

        Args:
            task: The task.
            pixels: Pixels of one result.

        Raises:
            OSError: Its number is that of a full disk.
        """
        known, free = self._failed.get(_device(task) or 0), _free_bytes(task)
        if known is not None and free is not None and pixels >= known[0] and free <= known[1]:
            raise OSError(
                errno.ENOSPC,
                f"is not computed: an earlier result, no larger, found no room in the {_amount(free)} that are "
                "free; free some room or write to another disk",
                str(task.targets[0]),
            )


def _device(task: Task) -> int | None:
    try:
        return os.stat(nearest_folder(task.targets[0])).st_dev
    except OSError:
        return None
