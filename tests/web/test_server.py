"""The server behind the page: its API, a client that means harm, a full queue, passwords, disconnects, and the end."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from latentindigo.images import read_metadata
from latentindigo.web_guard import QUEUE_FULL
from web_page import SOURCE, Page, Starter, photo, until

pytestmark = pytest.mark.web

# As the API lists them, after the photo: scale, width, height, crop, preset, fidelity, seed, samples, format.
SETTINGS = [1, 0, 0, False, "default", 0.5, 0, 1, "as the photo"]


@pytest.fixture
def client(page: Page, tmp_path: Path) -> Client:
    """A fresh session."""
    return connect(page, tmp_path)


def connect(page: Page, folder: Path, **options: Any) -> Client:
    return Client(page.url, verbose=False, analytics_enabled=False, download_files=str(folder / "downloads"), **options)


def upload(page: Page, data: bytes, name: str = "photo.png") -> str:
    answer = httpx.post(f"{page.url}gradio_api/upload", files={"files": (name, data)})
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def file_of(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def function_of(page: Page, name: str = "restore") -> int:
    """The number under which Gradio knows a function, the API's or the button's."""
    config = httpx.get(f"{page.url}config").json()
    return next(entry["id"] for entry in config["dependencies"] if entry["api_name"] == name)


def join(page: Page, data: list[Any], session: str) -> httpx.Response:
    body = {"data": data, "fn_index": function_of(page), "session_hash": session}
    return httpx.post(f"{page.url}gradio_api/queue/join", json=body)


def outcome(page: Page, session: str) -> dict[str, Any]:
    """Wait for the answer to what a session asked."""
    with httpx.stream("GET", f"{page.url}gradio_api/queue/data", params={"session_hash": session}, timeout=60) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: ") and (found := json.loads(line[6:])).get("msg") == "process_completed":
                return found
    raise AssertionError("no answer came")


# ----------------------------------------------------------------------------------------------------------------- API


def test_the_client_gets_pictures_maps_and_settings(page: Page, client: Client, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(photo(24))
    pictures, details, spread, settings = client.predict(
        photo=handle_file(tmp_path / "cat.png"), scale=2, num_samples=2, seed=5, preset="faithful", api_name="/restore"
    )
    assert [Path(path).name for path in pictures] == ["cat-restored-1.png", "cat-restored-2.png"]
    assert [Path(path).name for path in (*details, spread)] == [
        *("cat-invented-1.png", "cat-invented-2.png"),
        "cat-uncertainty.png",
    ]
    with Image.open(pictures[0]) as image:
        assert image.size == (48, 48)
    stored = read_metadata(pictures[1])
    assert stored is not None
    assert stored["seed"] == 6
    assert stored["settings"] == settings
    assert page.guard.attempts() == []


@pytest.mark.parametrize(
    ("data", "settings", "sentence"),
    [
        (b"text", {}, "is no picture: it holds text"),
        (photo(24), {"scale": 17}, "17"),
        (photo(24), {"preset": "bold"}, "bold"),
        (photo(24), {"width": 40}, "width and a height"),
        (photo(24), {"num_samples": 9}, "9"),
        (photo(600), {"scale": 16}, "megapixels"),
    ],
    ids=["text", "scale", "preset", "width", "samples", "pixels"],
)
def test_the_client_is_told_what_is_wrong(
    client: Client, tmp_path: Path, data: bytes, settings: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "cat.png").write_bytes(data)
    with pytest.raises((AppError, ValueError), match=sentence):
        client.predict(photo=handle_file(tmp_path / "cat.png"), **settings, api_name="/restore")


def test_a_format_that_is_left_open_is_the_photo_s(page: Page) -> None:
    assert join(page, [file_of(upload(page, photo(16))), *SETTINGS[:-1], None], "open").status_code == 200
    found = outcome(page, "open")
    assert found["success"], found["output"]


# ----------------------------------------------------------------------------------------------- clients that mean harm


def test_no_path_of_a_client_is_opened(page: Page) -> None:
    """Neither a path on this machine, nor an address, nor the file of another session."""
    theirs = upload(page, photo(24))
    assert join(page, [file_of(theirs), *SETTINGS], "them").status_code == 200
    assert outcome(page, "them")["success"]
    result = next(page.temporary.rglob("photo-restored.png"))
    for path in ("/etc/passwd", str(result), theirs, "http://127.0.0.1:9/x.png", "https://example.org/x.png"):
        refused = join(page, [file_of(path), *SETTINGS], "me")
        assert refused.status_code == 403, path
        assert "not uploaded by you" in refused.json()["detail"]
    mine = upload(page, photo(25))
    assert join(page, [file_of(mine, url="https://example.org/x.png"), *SETTINGS], "me").status_code == 200
    assert outcome(page, "me")["success"]
    assert page.guard.attempts() == []


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=https://example.org/",
        "gradio_api/proxy=https://example.org/",
        "gradio_api/file=../../etc/passwd",
        "gradio_api/file=%2Fetc%2Fpasswd",
        "gradio_api/file=%252Fetc%252Fpasswd",
        "monitoring",
        "static/../../../../etc/passwd",
    ],
)
def test_no_other_file_is_served(page: Page, path: str) -> None:
    answer = httpx.get(page.url + path)
    assert answer.status_code in (403, 404)
    assert b"root:" not in answer.content


def test_an_upload_has_a_limit(start_page: Starter) -> None:
    page = start_page("--max-upload", "0.1")
    refused = httpx.post(f"{page.url}gradio_api/upload", files={"files": ("a.png", bytes(200_000))})
    assert refused.status_code == 413
    assert "0.1 MB" in refused.json()["detail"]
    assert [path for path in page.temporary.rglob("*") if path.is_file() and path.parent.name != "kept"] == []
    page.stop()


# -------------------------------------------------------------------------------------------------- many, gone, the end


def slow(page: Page, session: str, samples: int = 8) -> None:
    """Ask for something that takes about a minute."""
    path = upload(page, photo(160))
    assert join(page, [file_of(path), 4, *SETTINGS[1:-2], samples, SETTINGS[-1]], session).status_code == 200


def test_a_full_queue_is_refused_politely_and_a_visitor_who_left_makes_room(
    start_page: Starter, tmp_path: Path
) -> None:
    page = start_page("--queue", "1")
    gone = threading.Event()

    def stay() -> None:
        """Say "still here" as a browser does, until the tab is closed."""
        with httpx.stream("GET", f"{page.url}gradio_api/heartbeat/first", timeout=60):
            gone.wait(60)

    slow(page, "first")
    listener = threading.Thread(target=stay)
    listener.start()
    until(lambda: httpx.get(f"{page.url}gradio_api/queue/status").json()["queue_size"] == 0)
    waiting = upload(page, photo(16))
    assert join(page, [file_of(waiting), *SETTINGS], "second").status_code == 200
    third = upload(page, photo(17))
    refused = join(page, [file_of(third), *SETTINGS], "third")
    assert (refused.status_code, refused.json()["detail"]) == (503, QUEUE_FULL)
    (tmp_path / "cat.png").write_bytes(photo(18))
    with pytest.raises(Exception, match="[Qq]ueue is full"):
        connect(page, tmp_path).predict(photo=handle_file(tmp_path / "cat.png"), api_name="/restore")
    # Whoever is gone does not keep the others waiting: the minute of work is given up.
    started = time.monotonic()
    gone.set()
    assert outcome(page, "second")["success"]
    assert time.monotonic() - started < 30
    listener.join()
    page.stop()


def test_who_does_not_listen_is_not_told_and_holds_no_place(page: Page, tmp_path: Path) -> None:
    """Gradio keeps every message until it is fetched, and pictures of steps would soon fill the memory."""
    (tmp_path / "cat.png").write_bytes(photo(16))
    texts = {}
    for session, mute in (("mute", True), ("heard", False)):
        data = [file_of(upload(page, photo(64))), 4, *SETTINGS[1:]]
        body = {"data": data, "fn_index": function_of(page, "page"), "session_hash": session}
        assert httpx.post(f"{page.url}gradio_api/queue/join", json=body).status_code == 200
        if mute:  # The next in the queue gets its turn all the same.
            connect(page, tmp_path).predict(photo=handle_file(tmp_path / "cat.png"), scale=1, api_name="/restore")
        with httpx.stream("GET", f"{page.url}gradio_api/queue/data?session_hash={session}", timeout=60) as lines:
            texts[session] = "".join(itertools.takewhile(lambda line: "close_stream" not in line, lines.iter_lines()))
    assert "Restored photo" in texts["mute"]
    assert "data:image" not in texts["mute"]
    assert texts["heard"].count("data:image") > 2


def test_a_password_is_asked_for(start_page: Starter, tmp_path: Path) -> None:
    page = start_page("--host", "127.0.0.1", environment={"LATENTINDIGO_AUTH": "anna:secret"})
    assert httpx.post(f"{page.url}gradio_api/upload", files={"files": ("a.png", photo(16))}).status_code == 401
    assert httpx.get(page.url).status_code == 200, "the page that asks for it"
    example = next(page.temporary.rglob("kept/*.*"))
    for path in (
        "config",
        "gradio_api/info",
        "gradio_api/queue/status",
        "gradio_api/heartbeat/a",
        "gradio_api/call/a/b",
    ):
        assert httpx.get(page.url + path).status_code == 401, path
    for path in (f"gradio_api/file={example}", "gradio_api/queue/data?session_hash=a", "gradio_api/upload_progress"):
        assert httpx.get(page.url + path).status_code == 401, path
    for path in ("queue/join", "call/restore", "cancel", "reset"):
        call = {"data": [file_of(str(example)), *SETTINGS], "fn_index": 0, "session_hash": "a", "event_id": "b"}
        assert httpx.post(f"{page.url}gradio_api/{path}", json=call).status_code == 401, path
    (tmp_path / "cat.png").write_bytes(photo(16))
    with pytest.raises(Exception, match="[Ll]ogin|[Cc]redentials|auth"):
        connect(page, tmp_path, auth=("anna", "wrong"))
    client = connect(page, tmp_path, auth=("anna", "secret"))
    assert client.predict(photo=handle_file(tmp_path / "cat.png"), scale=1, api_name="/restore")[0]
    page.stop()


def test_an_open_door_is_warned_of(start_page: Starter) -> None:
    page = start_page("--host", "0.0.0.0")  # noqa: S104
    assert page.said.count("warning:") == 1
    assert "--auth asks for a password" in page.said
    page.stop()


def test_an_end_while_the_model_is_loaded_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\n"
        "from latentindigo.web import PageSettings, serve\n"
        "serve(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(9)), PageSettings(port=0))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_end_stops_the_work_and_leaves_nothing_behind(start_page: Starter) -> None:
    page = start_page()
    assert len(list(page.temporary.iterdir())) == 1
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(slow, page, "one").result()
        until(lambda: httpx.get(f"{page.url}gradio_api/queue/status").json()["queue_size"] == 0)
        started = time.monotonic()
        assert page.stop() == 0
    assert time.monotonic() - started < 15
    assert list(page.temporary.iterdir()) == []
