"""Where a folder job reads and writes: a folder of this machine, or one in an object store, by the same few calls.

Names are relative to the folder, with "/" between their parts. A file is complete or not there: on a disk it is
written under another name, reaches the disk, and is then renamed; an object store shows an object when it is whole.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol, runtime_checkable

from latentindigo.opening import MAX_FILE_BYTES
from latentindigo.safe_files import explain

__all__ = [
    "KEPT",
    "BusyError",
    "Entry",
    "Folder",
    "LocalFolder",
    "ObjectFolder",
    "open_folder",
    "require_short_name",
]

# What a job keeps about itself; hidden, so that no later job takes it for pictures.
KEPT = ".latentindigo"
_PARTIAL = f"{KEPT}/partial"
_LOCK = f"{KEPT}/lock"
_LONGEST_NAME = 255  # Bytes, on every common file system.


class BusyError(ValueError):
    """Another job is at work on the folder."""


class Entry(NamedTuple):
    """One name in a folder."""

    name: str
    is_folder: bool


@runtime_checkable
class Folder(Protocol):
    """A folder and everything in it; can be pickled, and made anew from its `location`."""

    location: str

    def exists(self) -> bool:
        """Whether the folder is there."""
        ...

    def entries(self, name: str) -> list[Entry]:
        """What lies in the folder `name` ("" is the whole), sorted by name; links to folders are left out.

        Raises:
            OSError: It cannot be listed.
        """
        ...

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            OSError: There is no such file, it is no regular file, cannot be read, or is larger than 2 GiB.
        """
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""
        ...

    def write(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Write files in the order given, each complete or not at all; folders are made.

        On a disk no file appears before all of them have been written, so a full disk changes nothing.

        Raises:
            OSError: The disk is full, a name is too long, or the folder cannot be written to.
        """
        ...

    def put(self, path: str, name: str) -> None:
        """Let a finished file of this machine take a name here; it is gone from where it was, or may be.

        Raises:
            OSError: The disk is full or the folder cannot be written to.
        """
        ...

    def room(self) -> int | None:
        """Free bytes, or None where there is no telling."""
        ...

    def clean(self) -> None:
        """Remove what runs that were killed left half written; only while no other job is at work here."""
        ...

    def lock(self) -> Any:
        """A context in which no other job may work here.

        Raises:
            BusyError: Another one does.
            ValueError: The folder cannot be written to.
        """
        ...


def open_folder(location: str) -> Folder:
    """Open a folder by path or URL.

    Args:
        location: A path, a `file://` URL, or the URL of a store that fsspec knows: `s3://bucket/photos`.

    Returns:
        The folder; it need not exist yet.

    Raises:
        ValueError: It is empty, the URL's kind is unknown, or the package for it is not installed.
    """
    if not location:  # As of a shell's variable that is not set; it would mean the current folder.
        raise ValueError("expected a folder, got an empty name; '.' is the current one")
    scheme, found, rest = location.partition("://")
    if not found:
        return LocalFolder(location)
    return LocalFolder(rest) if scheme in ("file", "local") else ObjectFolder(location)


# ------------------------------------------------------------------------------------------------------------- a disk


class LocalFolder:
    """A folder of this machine.

    Args:
        location: Its path.
    """

    def __init__(self, location: str) -> None:
        self.location = os.path.abspath(location)

    def _path(self, name: str) -> str:
        return os.path.join(self.location, *name.split("/")) if name else self.location

    def exists(self) -> bool:
        """See `Folder.exists`."""
        return os.path.isdir(self.location)

    def entries(self, name: str) -> list[Entry]:
        """See `Folder.entries`."""
        with os.scandir(self._path(name)) as listed:
            # Links to folders are not followed: they may lead back to where they lie.
            found = [Entry(e.name, e.is_dir(follow_symlinks=False)) for e in listed if not _is_linked_folder(e)]
        return sorted(found)

    def read(self, name: str) -> bytes:
        """See `Folder.read`."""
        path = self._path(name)
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # A pipe would keep the job waiting for ever.
            raise OSError(errno.EINVAL, "is no regular file", path)
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, f"is larger than {MAX_FILE_BYTES // 2**30} GiB, the most that is read", path)
        with open(path, "rb") as stream:
            return stream.read()

    def size(self, name: str) -> int | None:
        """See `Folder.size`."""
        try:
            return os.stat(self._path(name)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, files: Iterable[tuple[str, bytes]]) -> None:
        """See `Folder.write`."""
        # All in one folder and under names of their own, so that what a killed run leaves behind is found at once.
        os.makedirs(self._path(_PARTIAL), exist_ok=True)
        staged: list[tuple[str, str]] = []
        try:
            for name, data in files:
                target = self._path(name)
                require_short_name(name)
                temporary = os.path.join(self._path(_PARTIAL), secrets.token_hex(12))
                staged.append((temporary, target))
                os.makedirs(os.path.dirname(target), exist_ok=True)
                _write_through(temporary, data)
            for temporary, target in staged:
                os.replace(temporary, target)
        except OSError as error:
            # Named is the file that was to be, not the one it was written under.
            names = dict(staged)
            if staged:  # Otherwise nothing could be encoded.
                error.filename = names.get(str(error.filename), error.filename or staged[-1][1])
            raise
        finally:
            for temporary, _ in staged:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)

    def put(self, path: str, name: str) -> None:
        """See `Folder.put`."""
        target = self._path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            os.replace(path, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            beside = os.path.join(os.path.dirname(target), f".{secrets.token_hex(12)}.part")
            try:
                shutil.copyfile(path, beside)
                os.replace(beside, target)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(beside)

    def room(self) -> int | None:
        """See `Folder.room`."""
        try:
            return shutil.disk_usage(self.location).free
        except OSError:
            return None

    def clean(self) -> None:
        """See `Folder.clean`."""
        with suppress(FileNotFoundError), os.scandir(self._path(_PARTIAL)) as left:
            for entry in left:
                with suppress(FileNotFoundError):
                    os.unlink(entry.path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Folder.lock`; the lock is the kernel's, so that of a process that was killed is gone with it."""
        try:
            os.makedirs(self._path(KEPT), exist_ok=True)
            opened = open(self._path(_LOCK), "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(f"'{self.location}' cannot be written to: {explain(error)}") from error
        with opened as holder:
            if not _take(holder):
                holder.seek(0)
                raise BusyError(
                    f"another run is at work in '{self.location}' ({holder.read().strip() or 'it does not say who'}); "
                    "wait for it, or write to another folder"
                )
            holder.truncate(0)
            with suppress(OSError):  # A full disk; who holds it is only told.
                holder.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                holder.flush()
            try:
                yield
            finally:
                with suppress(OSError):
                    holder.truncate(0)  # The folder may be given away, and nobody needs to know where it was made.


def require_short_name(name: str) -> None:
    """Refuse a name that no file system takes, before anything is computed.

    Args:
        name: Relative name.

    Raises:
        OSError: A part of it is longer than 255 bytes.
    """
    longest = max(len(os.fsencode(part)) for part in name.split("/"))
    if longest > _LONGEST_NAME:
        raise OSError(
            errno.ENAMETOOLONG,
            f"the result's name would have {longest} bytes, and file systems take {_LONGEST_NAME}; shorten the photo's",
            name,
        )


def _is_linked_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # A link to itself; reading it will say so.
        return False


def _write_through(path: str, data: bytes) -> None:
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _take(holder: Any) -> bool:
    """Lock an open file for this process; True where the file system knows no locks."""
    try:
        import fcntl
    except ImportError:
        return _take_on_windows(holder)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def _take_on_windows(holder: Any) -> bool:
    import importlib

    msvcrt: Any = importlib.import_module("msvcrt")
    # Far behind the text, which others are to read while the lock is held.
    holder.seek(2**30)
    try:
        msvcrt.locking(holder.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- an object store


class ObjectFolder:
    """A folder in an object store, through fsspec.

    There is no lock: two jobs that write to one place do work twice, and the later result stands.

    Args:
        location: Its URL.
    """

    def __init__(self, location: str) -> None:
        import fsspec

        self.location = location.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.location)
        except ImportError as error:
            scheme = location.partition("://")[0]
            extra = "pip install 'latentindigo[s3]'" if scheme in ("s3", "s3a") else "install the package it names"
            raise ValueError(f"'{location}' needs a package that is not installed ({error}); {extra}") from error
        except ValueError as error:
            raise ValueError(f"'{location}': expected a folder, or its URL in a store that fsspec knows") from error
        self._files.invalidate_cache()

    def __reduce__(self) -> tuple[type[ObjectFolder], tuple[str]]:
        return type(self), (self.location,)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def exists(self) -> bool:
        """See `Folder.exists`."""
        try:
            self.entries("")
        except FileNotFoundError:
            return False
        except Exception as error:  # each store has its own
            raise ValueError(f"'{self.location}' cannot be listed ({type(error).__name__}: {error})") from error
        return True

    def entries(self, name: str) -> list[Entry]:
        """See `Folder.entries`."""
        path = self._path(name).rstrip("/")
        listed = self._files.ls(path, detail=True)
        self._files.invalidate_cache()  # Or it would hold all names of all folders.
        found = [
            Entry(str(info["name"]).rstrip("/").rpartition("/")[2], info["type"] == "directory")
            for info in listed
            if not _same(info["name"], path)  # Some stores list the empty object that marks a folder.
        ]
        return sorted(entry for entry in found if entry.name)

    def read(self, name: str) -> bytes:
        """See `Folder.read`."""
        return bytes(self._files.cat_file(self._path(name)))

    def size(self, name: str) -> int | None:
        """See `Folder.size`."""
        try:
            return int(self._files.size(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, files: Iterable[tuple[str, bytes]]) -> None:
        """See `Folder.write`; one put each, and the next one only after the last has succeeded."""
        for name, data in files:
            self._files.pipe_file(self._path(name), data)

    def put(self, path: str, name: str) -> None:
        """See `Folder.put`."""
        self._files.put_file(path, self._path(name))

    def room(self) -> int | None:
        """See `Folder.room`."""
        return None

    def clean(self) -> None:
        """See `Folder.clean`; nothing is ever half written."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Folder.lock`."""
        yield


def _same(name: str, path: str) -> bool:
    return str(name).rstrip("/").lstrip("/") == path.lstrip("/")
