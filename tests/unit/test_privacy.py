"""What docs/privacy.md promises: nothing leaves the machine, and what results say of their source and their maker."""

from __future__ import annotations

import getpass
import json
import os
import re
import runpy
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

from latentindigo import cli
from latentindigo.images import read_metadata
from latentindigo.jobs import RestoreSettings, load_pipeline, restore_files
from latentindigo.planning import plan_tasks

ROOT = Path(__file__).parents[2]
STORED = {"software", "version", "model_hash", "settings", "sample", "seed"}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Refuse every connection and every look-up of a name; return the list of what was tried."""
    tried: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        tried.append(args[-1:])
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    # Offline, the hub's client would not even try; here it may, and is seen.
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tried


def photo(path: Path) -> Path:
    """A photo with a camera, a position, a thumbnail and XMP."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (48.0, 51.0, 29.0)}
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">Somebody</x:xmpmeta>'
    Image.effect_noise((20, 16), 60).convert("RGB").save(path, exif=exif, xmp=xmp)
    return path


def restore(model: Path, source: Path, out: Path, **settings: Any) -> None:
    tasks = plan_tasks([source], out, recursive=False, num_samples=1, detail_map=True, uncertainty_map=False)
    outcomes = list(restore_files(lambda: load_pipeline(str(model)), tasks, RestoreSettings(scale=2, **settings)))
    assert [outcome.error for outcome in outcomes] == [None]


def check_nothing_private(metadata: dict[str, Any], words: set[str]) -> None:
    """Raise AssertionError if stored settings hold other keys than the documented ones, a path, or one of the words."""
    assert set(metadata) == STORED, f"other keys than documented: {sorted(set(metadata) ^ STORED)}"
    text = json.dumps(metadata)
    assert not re.search(r'"(/|~|[A-Za-z]:\\\\)', text), f"a path is stored: {text}"
    found = sorted(word for word in words if re.search(rf"\b{re.escape(word)}\b", text))
    assert not found, f"stored: {found}"


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_a_restoration_connects_to_nothing_and_tells_nothing(
    ending: str, tiny_model: Path, tmp_path: Path, no_network: list[Any]
) -> None:
    target = tmp_path / f"result.{ending}"
    restore(tiny_model, photo(tmp_path / "holiday.jpg"), target)
    assert no_network == []
    metadata = read_metadata(target)
    assert metadata is not None
    check_nothing_private(metadata, {socket.gethostname(), getpass.getuser(), "holiday", tmp_path.name})
    # Promised as well: the position stays, and what is not EXIF does not.
    with Image.open(target) as result:
        assert result.getexif().get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"
    assert b"Somebody" not in target.read_bytes()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"holiday.jpg", target.name, "result.detail.png"}, "temporary files stay behind"


@pytest.mark.parametrize(
    "change",
    [{"source": "photo.jpg"}, {"software": "/opt/restore"}, {"software": "made by anna"}],
    ids=["key", "path", "user"],
)
def test_a_stored_secret_is_found(change: dict[str, str]) -> None:
    metadata = {**dict.fromkeys(STORED, 0), "settings": {"scale": 2.0}}
    check_nothing_private(metadata, {"anna"})
    with pytest.raises(AssertionError):
        check_nothing_private({**metadata, **change}, {"anna"})


def test_a_connection_is_seen(no_network: list[Any]) -> None:
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("huggingface.co", 443))
    assert no_network


def test_the_recipe_of_the_page_leaves_only_pixels(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    restore(tiny_model, photo(tmp_path / "holiday.jpg"), tmp_path / "restored.png")
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    Path("clean.py").write_text(program, encoding="utf-8")
    runpy.run_path("clean.py")
    with Image.open("restored.png") as before, Image.open("clean.png") as after:
        assert before.info
        assert after.tobytes() == before.tobytes()
        assert dict(after.getexif()) == {}
        assert set(after.info) == set()


def test_the_command_line_turns_telemetry_off_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "app", lambda: seen.append(os.environ.get("HF_HUB_DISABLE_TELEMETRY")))
    for given in (None, "0"):
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", given or "")
        if given is None:
            monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
        cli.main()
    assert seen == ["1", "0"]


def test_a_mapped_canvas_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from latentindigo import tiling

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tiling, "MAPPED_BYTES", 0)
    canvas = tiling._empty((1, 3, 8, 8), torch.float32, torch.device("cpu"))
    canvas.fill_(1)
    assert list(tmp_path.iterdir()) == []
