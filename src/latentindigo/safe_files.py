"""Names and files as they really are: printing what a terminal would obey, writing all of a file or nothing.

Standard library only, for the command line uses it too.
"""

from __future__ import annotations

import errno
import os
import secrets
import unicodedata
from pathlib import Path

__all__ = ["explain", "make_folder", "nearest_folder", "printable", "refuse_overwrite", "write_whole"]

_TEMPORARY_BYTES = 80  # Of the target's name; with dots, number and ending it stays far below every disk's limit.
# Marks that reorder the text around them can make one name look like another.
_REORDERING = frozenset(map(chr, [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
_WAYS_OUT = {
    errno.ENOSPC: "free some room or write to another disk",
    errno.EDQUOT: "free some of your quota or write to another disk",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EROFS: "write to another folder",
    errno.ENAMETOOLONG: "give the photo a shorter name",
    errno.ENOENT: "check that it is still there",
    errno.ELOOP: "replace the link, which leads back to itself, by the file",
    errno.EIO: "the disk or its connection fails; copy what is left of it to another disk",
    errno.ENOTDIR: "one of the folders in its path is a file",
}


def printable(text: str) -> str:
    """Spell out what a terminal would obey instead of showing: control characters, reordering marks, stray bytes.

    Args:
        text: A file name or a message that holds one. Given twice, nothing more changes.

    Returns:
        One line of text with such characters as backslash escapes.
    """
    return "".join(_escaped(char) if _is_unsafe(char) else char for char in text)


def _is_unsafe(char: str) -> bool:
    return char in _REORDERING or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte of a name that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def explain(error: OSError) -> str:
    """Say what the operating system said, with the way out where there is one.

    Args:
        error: The error.

    Returns:
        The end of a sentence, without a full stop.
    """
    said = error.strerror or str(error) or type(error).__name__
    advice = _WAYS_OUT.get(error.errno or 0)
    # A sentence of this package's own has said its way out already.
    return said if advice is None or "; " in said else f"{said}; {advice}"


def nearest_folder(path: Path) -> Path:
    """Return the folder of a file, or the nearest one above it that exists.

    Args:
        path: A file that need not exist.
    """
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Args:
        folder: The folder; it may exist.

    Raises:
        OSError: It cannot be made; the message names it and the way out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot be made: {explain(error)}", str(folder)) from error


def refuse_overwrite(target: Path, overwrite: bool) -> None:
    """Refuse a name that is taken.

    Args:
        target: File to write.
        overwrite: Allow replacing it.

    Raises:
        FileExistsError: The name is taken, be it by a link that leads nowhere, and `overwrite` is False.
    """
    if not overwrite and os.path.lexists(target):
        raise FileExistsError(f"'{target}' exists; choose another name or allow overwriting")


def write_whole(target: Path, data: bytes, overwrite: bool) -> None:
    """Write a file so that it is complete or not there at all.

    The bytes go to a hidden file in the same folder, reach the disk, and only then take the name.

    Args:
        target: File to write; its folder must exist.
        data: Its content.
        overwrite: Replace an existing file.

    Raises:
        FileExistsError: The file exists and `overwrite` is False.
        OSError: The disk is full or the folder cannot be written to; the message names the target and the way out.
    """
    refuse_overwrite(target, overwrite)
    stem = target.name.encode(errors="ignore")[:_TEMPORARY_BYTES].decode(errors="ignore")
    temporary = target.with_name(f".{stem}.{secrets.token_hex(6)}.part")
    try:
        # "x" refuses to follow a planted link, and unlike mkstemp leaves the user's umask in charge of permissions.
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        refuse_overwrite(target, overwrite)
        os.replace(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {explain(error)}", str(target)) from error
    finally:
        _forget(temporary)


def _forget(temporary: Path) -> None:
    """Remove what is left of a temporary file; where that fails too, the first failure is the one to report."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError:
        return
