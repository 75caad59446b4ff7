"""The gate in front of the web page: what gets in, which files may be named, which are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from latentindigo.web_guard import QUEUE_FULL, Guard, Listeners, NotYoursError, Tickets

UPLOAD_BYTES = 1000
MINE, OTHER, SHARED = "/folder/mine.png", "/folder/other.png", "/folder/example.png"


def file_of(path: Any, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


@pytest.fixture
def tickets() -> Tickets:
    """Tickets after one visitor uploaded one file."""
    made = Tickets([SHARED])
    made.issue(MINE)
    return made


# ------------------------------------------------------------------------------------------------------------- tickets


def test_an_upload_can_be_used_again_and_again_by_its_session_only(tickets: Tickets) -> None:
    for _ in range(3):
        tickets.check(MINE, "a")
    with pytest.raises(NotYoursError, match="upload the photo again"):
        tickets.check(MINE, "b")


def test_two_sessions_that_upload_the_same_file_both_own_it(tickets: Tickets) -> None:
    tickets.issue(MINE)
    for session in ("a", "b", "a"):
        tickets.check(MINE, session)
    with pytest.raises(NotYoursError):
        tickets.check(MINE, "c")


def test_examples_are_everybody_s(tickets: Tickets) -> None:
    for session in ("a", "b"):
        tickets.check(SHARED, session)


@pytest.mark.parametrize(
    "value",
    [
        file_of("/etc/passwd"),
        file_of(OTHER),
        file_of("/folder/../etc/passwd"),
        file_of("http://169.254.169.254/latest"),
        file_of(None, url="http://127.0.0.1:1/"),
        {"url": "https://example.org/x.png"},
        {"meta": {"_type": "gradio.FileData"}},
        file_of(["/etc/passwd"]),
        [[{"deep": {"er": [file_of("/etc/passwd")]}}]],
        {"value": file_of("/etc/passwd")},
    ],
    ids=str,
)
def test_what_was_not_handed_out_cannot_be_named(tickets: Tickets, value: Any) -> None:
    with pytest.raises(NotYoursError):
        tickets.check_all([2, value, "x"], "a")


def test_of_a_file_only_path_and_name_are_left(tickets: Tickets) -> None:
    sent = file_of(MINE, url="http://169.254.169.254/", orig_name="cat.png", is_stream=True, size=3)
    assert tickets.check_all([sent, 4.0, "vivid", None], "a") == [
        file_of(MINE, orig_name="cat.png"),
        4.0,
        "vivid",
        None,
    ]


def test_tickets_do_not_grow_without_end() -> None:
    tickets = Tickets()
    for number in range(10_050):
        tickets.issue(f"/folder/{number}")
    with pytest.raises(NotYoursError):
        tickets.check("/folder/0", "a")
    tickets.check("/folder/10049", "a")


# --------------------------------------------------------------------------------------------------------------- guard


class Inner:
    """Stands in for Gradio's application: remembers what reached it and answers as it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self.status = 200
        self.answer = b"[]"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.seen.append((scope["path"], body))
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": self.answer})


class Door:
    """A guard in front of an `Inner`, and a client."""

    def __init__(self, folder: Path) -> None:
        self.inner = Inner()
        self.folder = folder
        self.tickets = Tickets([SHARED])
        self.guard = Guard(self.inner, folder=folder, upload_bytes=UPLOAD_BYTES, tickets=self.tickets)

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, parts: int = 1
    ) -> tuple[int, bytes, dict[str, str]]:
        size = max(1, -(-len(body) // parts))
        pieces = [body[k : k + size] for k in range(0, len(body), size)] or [b""]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            if not pieces:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        async def send(message: Any) -> None:
            sent.append(message)

        given = {"content-length": str(len(body)), **(headers or {})}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "client": ("10.0.0.1", 1),
            "headers": [(key.encode(), value.encode()) for key, value in given.items() if value],
        }
        asyncio.run(self.guard(scope, receive, send))
        if not sent:
            return 0, b"", {}
        answer = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
        return sent[0]["status"], b"".join(part["body"] for part in sent[1:]), answer

    def call(self, data: Any, session: str | None = "a", path: str = "/gradio_api/queue/join", **more: Any) -> int:
        body = json.dumps({"data": data, "fn_index": 0, **({"session_hash": session} if session else {}), **more})
        return self.ask("POST", path, body.encode())[0]


@pytest.fixture
def door(tmp_path: Path) -> Door:
    """A guard for a folder of its own."""
    (tmp_path / "served").mkdir()
    return Door(tmp_path / "served")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/config"),
        ("GET", "/assets/index-D1.js"),
        ("GET", "/static/js/x.min.js"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/heartbeat/abc"),
        ("GET", "/gradio_api/queue/data"),
        ("POST", "/gradio_api/cancel"),
        ("POST", "/login"),
    ],
)
def test_what_the_page_needs_gets_in(door: Door, method: str, path: str) -> None:
    status, _, headers = door.ask(method, path, b"{}" if method == "POST" else b"")
    assert status == 200
    assert [seen for seen, _ in door.inner.seen] == [path]
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/proxy=http://169.254.169.254/"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/assets/../../etc/passwd"),
        ("GET", "/gradio_api/custom_component/a/client/b/c"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/stream/a/b/c/playlist-file"),
        ("POST", "/gradio_api/run/restore"),
        ("POST", "/gradio_api/api/restore"),
        ("POST", "/gradio_api/call/v2/restore"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/vibe-edit"),
        ("PUT", "/gradio_api/queue/join"),
        ("DELETE", "/"),
    ],
)
def test_the_rest_of_gradio_s_server_is_not_there(door: Door, method: str, path: str) -> None:
    status, body, headers = door.ask(method, path, b'{"data": []}')
    assert (status, door.inner.seen) == (404, [])
    assert json.loads(body)["detail"]
    assert "content-security-policy" in headers


def test_only_files_of_the_folder_are_served(door: Door, tmp_path: Path) -> None:
    (tmp_path / "served" / "result.png").write_bytes(b"x")
    (tmp_path / "secret.txt").write_bytes(b"x")
    (tmp_path / "served" / "link").symlink_to(tmp_path / "secret.txt")
    served = tmp_path / "served"
    assert door.ask("GET", f"/gradio_api/file={served}/result.png")[0] == 200
    for named in (
        "/etc/passwd",
        "etc/passwd",
        "http://169.254.169.254/latest",
        f"{tmp_path}/secret.txt",
        f"{served}/../secret.txt",
        f"{served}/%2e%2e/secret.txt",
        f"{served}/link",
        f"{served}",
        f"{served}/gone.png",
        f"{served}/{'a' * 300}.png",
        f"{served}/result.png\0",
    ):
        assert door.ask("GET", f"/gradio_api/file={named}")[0] == 403, named
    assert len(door.inner.seen) == 1


def test_an_upload_gives_a_ticket_and_a_call_takes_it(door: Door) -> None:
    door.inner.answer = json.dumps([MINE]).encode()
    assert door.call([file_of(MINE)]) == 403
    assert door.ask("POST", "/gradio_api/upload", b"x" * 100)[1] == door.inner.answer
    assert door.call([file_of(MINE, url="http://169.254.169.254/")], event_data=file_of("/etc/passwd")) == 200
    reached = json.loads(door.inner.seen[-1][1])
    assert reached == {"data": [file_of(MINE)], "fn_index": 0, "session_hash": "a"}
    assert door.call([file_of(MINE)], session="b") == 403
    assert door.call([file_of(MINE)], session=None, path="/gradio_api/call/restore") == 403


def test_a_failed_upload_gives_no_ticket(door: Door) -> None:
    door.inner.answer, door.inner.status = json.dumps([MINE]).encode(), 400
    door.ask("POST", "/gradio_api/upload", b"x")
    assert door.call([file_of(MINE)]) == 403


@pytest.mark.parametrize("length", ["", "3000", "many"])
def test_an_upload_that_is_too_large_does_not_arrive(door: Door, length: str) -> None:
    """Whether its size is announced, hidden (sent in parts) or nonsense."""
    body = b"x" * (UPLOAD_BYTES + 20_000)
    status, answer, _ = door.ask("POST", "/gradio_api/upload", body, {"content-length": length}, parts=10)
    assert door.inner.seen == []
    if length != "":
        assert status in (0, 413)
    if length == "many":
        assert "MB that this page takes" in json.loads(answer)["detail"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"no json", 400), (b"[]", 400), (b'{"data": 3}', 400), (b"[" * 100_000, 400), (b" " * 300_000, 413)],
    ids=["text", "list", "number", "deep", "large"],
)
def test_a_call_that_is_none_is_refused(door: Door, body: bytes, status: int) -> None:
    got, answer, _ = door.ask("POST", "/gradio_api/queue/join", body)
    assert (got, door.inner.seen) == (status, [])
    assert json.loads(answer)["detail"].endswith(".")


@pytest.mark.parametrize(("header", "status"), [("", 503), ("cors", 429)])
def test_a_full_queue_is_said_politely(door: Door, header: str, status: int) -> None:
    door.inner.status, door.inner.answer = 503, b'{"detail": "Queue is full. Max size is 1 and size is 1."}'
    body = json.dumps({"data": [], "session_hash": "a"}).encode()
    got, answer, _ = door.ask("POST", "/gradio_api/queue/join", body, {"sec-fetch-mode": header})
    assert (got, json.loads(answer)["detail"]) == (status, QUEUE_FULL)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/heartbeat/abc"),
        ("POST", "/gradio_api/cancel"),
        ("POST", "/gradio_api/reset"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/call/restore"),
    ],
)
def test_where_gradio_asks_for_no_password_the_guard_does(door: Door, method: str, path: str) -> None:
    body = json.dumps({"data": [file_of(MINE)], "session_hash": "thief"}).encode()
    door.tickets.issue(MINE)
    door.inner.status = 401  # What `login_check` answers to strangers.
    guard = Guard(door.inner, folder=door.folder, upload_bytes=UPLOAD_BYTES, tickets=door.tickets, locked=True)
    door.guard = guard
    assert door.ask(method, path, body if method == "POST" else b"")[0] == 401
    assert [seen for seen, _ in door.inner.seen] == ["/gradio_api/login_check"]
    door.inner.status = 200
    assert door.ask(method, path, body.replace(b"thief", b"me") if method == "POST" else b"")[0] == 200, "a ticket went"
    assert door.inner.seen[-1][0] == path


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200),
        ("localhost", 200),
        ("[::1]:7860", 200),
        ("127.0.0.1.example.org", 403),
        ("example.org:7860", 403),
        ("", 403),
    ],
)
def test_a_foreign_name_that_leads_here_is_refused(door: Door, host: str, status: int) -> None:
    assert door.ask("GET", "/config", headers={"host": host})[0] == 200, "served to others too"
    door.guard = Guard(door.inner, folder=door.folder, upload_bytes=UPLOAD_BYTES, tickets=door.tickets, local=True)
    assert door.ask("GET", "/config", headers={"host": host})[0] == status


@pytest.mark.parametrize("fails", [False, True])
def test_who_listens_is_known_while_the_stream_is_open(door: Door, fails: bool) -> None:
    listeners = Listeners()
    heard: list[tuple[bool, bool]] = []

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        with listeners.listening("a b"):  # A second stream of the same session ends before the first.
            pass
        heard.append(("a b" in listeners, "other" in listeners))
        if fails:
            raise OSError("the connection broke")

    guard = Guard(stream, folder=door.folder, upload_bytes=1, tickets=door.tickets, listeners=listeners)
    scope = {"type": "http", "method": "GET", "path": "/gradio_api/queue/data", "query_string": b"session_hash=a+b"}

    async def nothing(*_: Any) -> Any:
        return None

    with contextlib.suppress(OSError):
        asyncio.run(guard({**scope, "headers": []}, nothing, nothing))
    assert heard == [(True, False)]
    assert "a b" not in listeners


def test_the_page_names_no_other_host(door: Door) -> None:
    door.inner.answer = (
        b'<meta charset="utf-8" /><meta\n\tproperty="og:image"\n\tcontent="https://raw.githubusercontent.com/a.jpg"\n/>'
        b'<meta name="twitter:creator" content="@x" /><title>t</title>'
    )
    _, body, headers = door.ask("GET", "/", headers={"accept-encoding": "gzip"})
    assert body == b'<meta charset="utf-8" /><title>t</title>'
    assert headers["content-length"] == str(len(body))
