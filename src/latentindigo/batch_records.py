"""What a folder job writes down: one record for each photo, a journal while it runs, a manifest at its end. Plain data.

A record is written after the pictures it speaks of and holds their hashes, so whoever finds it can tell whether they
are whole. It also holds the hashes of the photo and of the settings, so whoever finds it can tell whether they are
still what would be made. That is all a killed job needs to go on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from latentindigo.storage import KEPT, Folder

__all__ = [
    "COLUMNS",
    "PIXELS",
    "Column",
    "Journal",
    "Row",
    "canonical_hash",
    "is_current",
    "new_row",
    "read_record",
    "record_bytes",
    "record_name",
    "require_manifest",
    "scheduler_facts",
    "sha256",
    "write_manifest",
]

# Raised whenever the same weights and settings would give other pixels than before; results of an older number are made
# anew. It is not the package's version, for most versions change no pixel.
PIXELS = 1

Row = dict[str, Any]


class Column(NamedTuple):
    """One column of the manifest: its name, its type (Arrow's name for it) and what it holds."""

    name: str
    type: str
    meaning: str


COLUMNS = (
    Column("input", "string", "The photo, relative to the input folder."),
    Column("status", "string", "`restored` in this run, `kept` from an earlier one, or `failed`."),
    Column("error", "string", "Why it failed, one sentence."),
    Column("kind", "string", "What the failure was about: `input`, `exists`, `io`, `memory`, `disk` or `unexpected`."),
    Column("attempts", "int64", "How often this run tried."),
    Column("input_sha256", "string", "SHA-256 of the photo's bytes."),
    Column("input_bytes", "int64", "Their number."),
    Column("input_width", "int64", "Width of the upright photo in pixels."),
    Column("input_height", "int64", "Its height."),
    Column("outputs", "list<string>", "Files written, relative to the output folder: samples, then maps."),
    Column("output_sha256", "list<string>", "SHA-256 of each."),
    Column("output_bytes", "list<int64>", "Bytes of each."),
    Column("output_width", "int64", "Width of the result in pixels."),
    Column("output_height", "int64", "Its height."),
    Column("seed", "int64", "Seed of the first sample."),
    Column("settings", "json", "The settings that made it, with the preset's values filled in."),
    Column("settings_sha256", "string", "Hash of all that decides the pixels beside the photo."),
    Column("model_hash", "string", "Hash of all weights."),
    Column("version", "string", "Version of the package that made it."),
    Column("seconds", "double", "Work on this photo: the three that follow."),
    Column("seconds_read", "double", "Reading, hashing and decoding."),
    Column("seconds_model", "double", "The pipeline."),
    Column("seconds_write", "double", "Estimating quality, encoding and writing."),
    Column("finished", "string", "When the result was complete (UTC)."),
    Column("consistency", "double", "Result brought back to the photo's size, against it: root mean square, [0, 1]."),
    Column("invented", "double", "Mean of the map of invented detail, [0, 1]."),
    Column("uncertainty", "double", "Mean standard deviation of the samples, [0, 1]; needs two or more."),
    Column("niqe", "double", "NIQE of the result; lower is closer to photographs; needs 128 pixels or more."),
)


def new_row(source: str, **values: Any) -> Row:
    """A row with every column; what is not given is None.

    Args:
        source: The photo's relative name.
        **values: Columns.

    Returns:
        The row.
    """
    return {**dict.fromkeys(column.name for column in COLUMNS), "input": source, **values}


# ------------------------------------------------------------------------------------------------------------- hashes


def sha256(data: bytes) -> str:
    """SHA-256 of bytes as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


def canonical_hash(values: Mapping[str, Any]) -> str:
    """Hash of plain values that depends neither on the order of their names nor on whether 2 is written as 2.0.

    Args:
        values: JSON-serialisable values.

    Returns:
        SHA-256 as hexadecimal text.
    """
    return sha256(json.dumps(_even(values), sort_keys=True, separators=(",", ":")).encode())


def scheduler_facts(pipe: Any) -> dict[str, Any] | None:
    """What a pipeline's scheduler was saved with; it decides pixels and is no weight.

    Args:
        pipe: The pipeline.

    Returns:
        Its class and configuration as plain values, or None if it has none.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return None
    facts = json.loads(scheduler.to_json_string())
    return {name: value for name, value in facts.items() if name == "_class_name" or not name.startswith("_")}


def _even(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _even(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_even(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ------------------------------------------------------------------------------------------------------------ records


def record_name(source: str) -> str:
    """Where the record of a photo lies, relative to the output folder.

    Args:
        source: The photo's relative name.

    Returns:
        `.latentindigo/records/` and the photo's name with `.json`; a name too long for that ends in a hash instead.
    """
    folder, _, name = source.rpartition("/")
    if len(os.fsencode(name)) > 240:
        name = f"{name[:40]}.{sha256(os.fsencode(name))[:24]}"
    return "/".join(part for part in (f"{KEPT}/records", folder, f"{name}.json") if part)


def record_bytes(row: Row) -> bytes:
    """A record's file: the columns that hold whatever the run, as JSON."""
    kept = {name: value for name, value in row.items() if name not in ("status", "attempts", "error", "kind")}
    return (json.dumps({"schema": 1, **kept}, indent=1) + "\n").encode()


def read_record(out: Folder, source: str) -> Row | None:
    """The record of a photo.

    Args:
        out: Output folder.
        source: The photo's relative name.

    Returns:
        A row without status, or None if there is no record or none that can be read.
    """
    try:
        content = json.loads(out.read(record_name(source)))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.pop("schema", None) != 1:
        return None
    row = new_row(source)
    if content.keys() - row.keys() or not isinstance(content.get("outputs"), list):
        return None
    return row | content


def is_current(
    record: Row, input_sha256: str, settings_sha256: str, outputs: Sequence[str], out: Folder, *, verify: bool = True
) -> bool:
    """Whether a record speaks of this photo and these settings, and its pictures are whole.

    Args:
        record: The record.
        input_sha256: Hash of the photo.
        settings_sha256: Hash of what decides the pixels.
        outputs: Files that would be written.
        out: Output folder.
        verify: Compare the pictures' hashes, which reads them; otherwise only their sizes.

    Returns:
        True if nothing is left to do.
    """
    if (record["input_sha256"], record["settings_sha256"]) != (input_sha256, settings_sha256):
        return False
    if record["outputs"] != list(outputs):
        return False
    expected = list(zip(outputs, record["output_bytes"] or (), record["output_sha256"] or (), strict=False))
    try:
        return len(expected) == len(outputs) and all(
            out.size(name) == size and (not verify or sha256(out.read(name)) == digest)
            for name, size, digest in expected
        )
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------- journal and manifest


class Journal:
    """The rows of a run as they come, one JSON object a line, so that memory does not grow with them.

    Rows that the disk refuses are held in memory: a full disk must not end the run that reports it.

    Args:
        path: File to write; a former run's is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._later: dict[str, Row] = {}
        self._held: list[Row] = []
        self._stream: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(path, "wb", buffering=0)
        except OSError:
            pass  # No room even for a name: every row is held.

    def add(self, row: Row) -> None:
        """Append a row; when this returns it has left the process, and a kill cannot take it back."""
        line = json.dumps(row).encode() + b"\n"
        if self._stream is not None:
            start = self._stream.tell()
            try:
                if self._stream.write(line) == len(line):
                    return
            except OSError:
                pass
            with suppress(OSError):
                self._stream.truncate(start)  # Whole lines only; the disk takes no more.
            self.close()
        self._held.append(row)

    def replace(self, row: Row) -> None:
        """Set another row in the place of an earlier one of the same photo, as after a second try."""
        self._later[row["input"]] = row

    def rows(self) -> Iterator[Row]:
        """All rows, in the order they were added, later ones in their places."""
        for row in chain(_lines(self.path), self._held):
            yield self._later.get(row["input"], row)

    def close(self) -> None:
        """Close the file; rows that follow are held."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def remove(self) -> None:
        """Close and delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[Row]:
    if not path.exists():
        return
    with open(path, "rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):  # A kill may have cut the last one short.
                yield json.loads(line)


def write_manifest(rows: Iterable[Row], path: Path) -> None:
    """Write rows as JSON lines, or as a Parquet file if the name ends so; the rows are never all in memory.

    In Parquet `settings` is JSON text, and the bytes of a file name that are no Unicode are written as escapes.

    Args:
        rows: Rows with every column.
        path: File to write; it is complete when this returns, and not atomic.

    Raises:
        ValueError: The ending is neither .jsonl nor .parquet, or Parquet's package is not installed.
        OSError: It cannot be written.
    """
    if path.suffix == ".jsonl":
        with open(path, "wb") as stream:
            for row in rows:
                stream.write(json.dumps(row).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        return
    require_manifest(path.name)
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"json": pa.string(), "list<string>": pa.list_(pa.string()), "list<int64>": pa.list_(pa.int64())}
    schema = pa.schema([(c.name, kinds.get(c.type) or pa.type_for_alias(c.type)) for c in COLUMNS])
    with pq.ParquetWriter(path, schema) as writer:
        group: list[Row] = []
        for row in rows:
            group.append({name: _arrow(name, value) for name, value in row.items()})
            if len(group) == 1000:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        writer.write_table(pa.Table.from_pylist(group, schema))
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())


def require_manifest(name: str) -> None:
    """Refuse, before anything is computed, a manifest that could not be written.

    Args:
        name: Its file name.

    Raises:
        ValueError: The ending is neither .jsonl nor .parquet, or Parquet's package is not installed.
    """
    suffix = Path(name).suffix
    if suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"manifest: expected a name ending in .jsonl or .parquet, got '{name}'")
    if suffix == ".parquet":
        try:
            importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise ValueError(
                "manifest: Parquet needs pyarrow, which is not installed; pip install 'latentindigo[parquet]', or name "
                "a file ending in .jsonl"
            ) from error


def _arrow(name: str, value: Any) -> Any:
    if name == "settings":
        return None if value is None else json.dumps(value, sort_keys=True)
    if isinstance(value, list):
        return [_arrow("", item) for item in value]
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):x}", value) if isinstance(value, str) else value


_SURROGATE = re.compile("[\ud800-\udfff]")
