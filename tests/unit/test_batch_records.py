"""Records, journal and manifest: plain data that says what has been done."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from latentindigo.batch_records import (
    COLUMNS,
    Journal,
    Row,
    canonical_hash,
    is_current,
    new_row,
    read_record,
    record_bytes,
    record_name,
    require_manifest,
    sha256,
    write_manifest,
)
from latentindigo.storage import LocalFolder


def row_of(name: str = "a.png", **values: Any) -> Row:
    made = {"outputs": [name], "output_sha256": [sha256(b"pixels")], "output_bytes": [6]}
    return new_row(name, input_sha256="i", settings_sha256="s", settings={"size": [1, 2]}, **made) | values


@pytest.fixture
def out(tmp_path: Path) -> LocalFolder:
    """Return a folder with one result and its record."""
    folder = LocalFolder(str(tmp_path / "out"))
    folder.write([("a.png", b"pixels"), (record_name("a.png"), record_bytes(row_of()))])
    return folder


def test_a_record_comes_back(out: LocalFolder) -> None:
    record = read_record(out, "a.png")
    assert record is not None
    assert record == row_of()
    assert is_current(record, "i", "s", ["a.png"], out)
    assert is_current(record, "i", "s", ["a.png"], out, verify=False)
    assert read_record(out, "b.png") is None


@pytest.mark.parametrize(
    "told",
    [("other", "s", ["a.png"]), ("i", "other", ["a.png"]), ("i", "s", ["a.jpg"]), ("i", "s", ["a.png", "b.png"])],
    ids=["photo", "settings", "name", "more to write"],
)
def test_a_record_of_something_else_is_not_current(out: LocalFolder, told: tuple[str, str, list[str]]) -> None:
    assert not is_current(row_of(), *told, out)


def test_a_damaged_result_is_not_current(out: LocalFolder) -> None:
    out.write([("a.png", b"pixelz")])
    assert not is_current(row_of(), "i", "s", ["a.png"], out)
    assert is_current(row_of(), "i", "s", ["a.png"], out, verify=False), "sizes alone do not tell"
    out.write([("a.png", b"pix")])
    assert not is_current(row_of(), "i", "s", ["a.png"], out, verify=False)
    os.unlink(Path(out.location, "a.png"))
    assert not is_current(row_of(), "i", "s", ["a.png"], out)
    assert not is_current(row_of(output_sha256=None, output_bytes=None), "i", "s", ["a.png"], out)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"schema": 2}', b'{"schema": 1}', b"\xff", b'{"schema": 1, "outputs": [], "x": 1}'],
)
def test_a_record_that_cannot_be_read_is_none(out: LocalFolder, content: bytes) -> None:
    out.write([(record_name("a.png"), content)])
    assert read_record(out, "a.png") is None


def test_names_of_records_fit_and_differ() -> None:
    assert record_name("trip/a.png") == ".latentindigo/records/trip/a.png.json"
    long = [record_name(f"trip/{'é' * 120}{end}.png") for end in "ab"]
    assert len(set(long)) == 2
    assert all(len(os.fsencode(name.rpartition("/")[2])) <= 255 for name in long)


def test_the_hash_of_settings_does_not_depend_on_how_they_are_written() -> None:
    assert canonical_hash({"scale": 2, "guidance": {"zeta": (1, 2.0)}}) == canonical_hash(
        {"guidance": {"zeta": [1.0, 2]}, "scale": 2.0}
    )
    assert canonical_hash({"scale": 2.5}) != canonical_hash({"scale": 2})
    assert canonical_hash({"a": 1, "b": [1, None]}) == canonical_hash({"b": [1, None], "a": 1})
    assert canonical_hash({"a": 1}) != canonical_hash({"a": 2})


# --------------------------------------------------------------------------------------------------------- the journal


def test_rows_come_back_in_order_with_later_ones_in_their_places(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "journal.jsonl")
    for name in "abc":
        journal.add(new_row(name, status="failed"))
    journal.replace(new_row("b", status="restored"))
    assert [(row["input"], row["status"]) for row in journal.rows()] == [
        ("a", "failed"),
        ("b", "restored"),
        ("c", "failed"),
    ]
    journal.remove()
    assert not list((tmp_path / "new").iterdir())


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add(new_row("a"))
    journal.close()
    whole = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole + whole[: len(whole) // 2])
    assert [row["input"] for row in journal.rows()] == ["a"]


class Full:
    """A stream on a disk that is full after some bytes."""

    def __init__(self, stream: Any, room: int) -> None:
        self._stream, self._room = stream, room

    def write(self, data: bytes) -> int:
        taken = self._stream.write(data[: self._room])
        self._room -= taken
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@pytest.mark.parametrize("room", [0, 700, 1500])
def test_a_full_disk_loses_no_row(tmp_path: Path, room: int) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal._stream = Full(journal._stream, room)  # type: ignore[assignment]
    for name in "abcd":
        journal.add(new_row(name))
    assert [row["input"] for row in journal.rows()] == list("abcd")
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines()
    assert len(lines) == room // (len(json.dumps(new_row("a"))) + 1), "only whole lines stay"


def test_a_journal_without_a_place_holds_its_rows(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    journal = Journal(tmp_path / "file" / "journal.jsonl")
    journal.add(new_row("a"))
    assert [row["input"] for row in journal.rows()] == ["a"]


# -------------------------------------------------------------------------------------------------------- the manifest


def test_both_kinds_of_manifest_say_the_same(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = [row_of(f"{k:04}.png", status="restored", seconds=k / 7) for k in range(1500)]
    rows[3] = new_row("odd\udcff.png", status="failed", error="'odd\udcff.png' is damaged", kind="input")
    for name in ("m.jsonl", "m.parquet"):
        write_manifest(iter(rows), tmp_path / name)
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == rows
    table = pq.read_table(tmp_path / "m.parquet")
    assert table.column_names == [column.name for column in COLUMNS]
    read = table.to_pylist()
    assert read[3]["input"] == "odd\\udcff.png"
    for written, expected in zip(read, rows, strict=True):
        if expected["status"] == "restored":
            settings = json.loads(written.pop("settings"))
            assert {**written, "settings": settings} == expected


def test_an_empty_manifest_has_its_columns(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_manifest([], tmp_path / "m.parquet")
    assert pq.read_table(tmp_path / "m.parquet").num_columns == len(COLUMNS)


def test_other_endings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ending in \.jsonl or \.parquet, got 'm\.csv'"):
        require_manifest("m.csv")
    require_manifest("m.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install 'latentindigo\[parquet\]'"):
        require_manifest("m.parquet")


def columns_of(page: str) -> list[tuple[str, str, str]]:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", page.partition("## The manifest")[2], re.MULTILINE)
    return [(name, kind.strip(), meaning.strip()) for name, kind, meaning in rows]


def test_the_page_lists_the_columns(root: Path) -> None:
    page = (root / "docs" / "batch.md").read_text(encoding="utf-8")
    assert columns_of(page) == [tuple(column) for column in COLUMNS]
    assert columns_of(page.replace("SHA-256", "Hash")) != [tuple(column) for column in COLUMNS]
