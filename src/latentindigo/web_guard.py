"""The gate in front of the web page: which requests get in, and which files a client may name.

Gradio lets a client send a path, of anything in its temporary folder, or an address, which the server then fetches.
Here a client may name only what this server handed to it: a file of its own upload, or an example. Everything else is
refused before Gradio sees it. Nothing here knows Gradio; it is plain ASGI.

Which paths a visitor may name is kept as tickets. An upload gives one ticket for its path. The first session that uses
the path takes the ticket and owns it from then on, so a path that was overheard is of no use to another session.
"""

from __future__ import annotations

import json
import re
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

__all__ = ["QUEUE_FULL", "Guard", "Listeners", "NotYoursError", "Tickets"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

QUEUE_FULL = "The queue is full: too many photos are waiting already. Please try again in a minute."
_API = "/gradio_api/"
_MOST_TICKETS = 10_000
_BODY_BYTES = 256 * 1024  # Of a request that is no upload; settings are a few hundred bytes.
_FORM_BYTES = 16 * 1024  # What a multipart upload holds beside the file.

# The page, what it is made of, and the few calls it and `gradio_client` make. The rest of Gradio's server (proxies,
# streams, recordings, monitoring, components by path) is not used here, so it is not there.
_GET = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(?:static|assets|svelte)/[\w./-]+|/logout|"
    + _API
    + r"(?:info/?|heartbeat/\w+|queue/(?:data|status)|upload_progress|startup-events|app_id/?|login_check/?|"
    r"user/?|theme\.css|call/\w+/\w+)"
)
_POST = re.compile(r"/login/?|" + _API + r"(?:queue/join|call/\w+/?|cancel|reset/?|upload)")
_FILE = _API + "file="
_STREAM = _API + "queue/data"
# Gradio cancels, resets and hears of closed tabs without asking who it is; calls would take tickets before it asks.
_LOCKED = re.compile(_API + r"(?:heartbeat/\w+|cancel|reset/?|queue/join|call/\w+/?)")
_CALLS = re.compile(_API + r"(?:queue/join|call/\w+/?)")

_SOCIAL = re.compile(r"<meta\s+(?:property|name)=\"(?:og|twitter):[^>]*>", re.DOTALL)
_HEADERS = {
    # Gradio's page needs inline scripts and builds functions from text; nothing may come from or go to another host.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class NotYoursError(ValueError):
    """A client named a file that was not handed to it; the message is one sentence."""


class Tickets:
    """Which session may name which file.

    Args:
        shared: Files that everybody may name, such as examples.
    """

    def __init__(self, shared: Iterable[str] = ()) -> None:
        self._shared = frozenset(shared)
        # Path -> (tickets nobody has taken yet, owners). The oldest go first, so that it cannot grow without end.
        self._files: OrderedDict[str, tuple[int, frozenset[str]]] = OrderedDict()

    def issue(self, path: str) -> None:
        """Note that a file was uploaded; the same bytes under the same name give the same path to two visitors."""
        free, owners = self._files.pop(path, (0, frozenset()))
        self._files[path] = free + 1, owners
        while len(self._files) > _MOST_TICKETS:
            self._files.popitem(last=False)

    def check(self, path: str, session: str) -> None:
        """Let a session name a file.

        Args:
            path: The path it sent.
            session: Who sent it.

        Raises:
            NotYoursError: The path was never handed out, or belongs to others.
        """
        if path in self._shared:
            return
        free, owners = self._files.get(path, (0, frozenset()))
        if session in owners:
            return
        if not free:
            raise NotYoursError("That file was not uploaded by you to this page; upload the photo again.")
        self._files[path] = free - 1, owners | {session}

    def check_all(self, data: Any, session: str) -> Any:
        """Check every file that the decoded body of a request names, anywhere in it.

        Args:
            data: Plain values.
            session: Who sent them.

        Returns:
            The same values; of a file only what is harmless is left, no address above all.

        Raises:
            NotYoursError: See `check`.
        """
        if isinstance(data, list):
            return [self.check_all(value, session) for value in data]
        if not isinstance(data, dict):
            return data
        if not {"path", "url", "meta"} & data.keys():
            return {key: self.check_all(value, session) for key, value in data.items()}
        path = data.get("path")
        if not isinstance(path, str):
            raise NotYoursError("A photo is named by the path that its upload gave, and no such path was sent.")
        self.check(path, session)
        name = data.get("orig_name")
        kept = {"path": path, "meta": {"_type": "gradio.FileData"}}
        return {**kept, "orig_name": name[:200]} if isinstance(name, str) else kept


class Listeners:
    """Which sessions listen to what the page tells them. Gradio keeps what it tells the others, without an end."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def __contains__(self, session: str) -> bool:
        """Whether a session listens now."""
        return session in self._open

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """Note that a session listens while the block runs; it may do so more than once."""
        self._open[session] += 1
        try:
            yield
        finally:
            self._open[session] -= 1
            self._open += Counter()  # Only what is above zero stays.


class Guard:
    """ASGI middleware around Gradio's application.

    Args:
        app: The application.
        folder: The only folder whose files are served.
        upload_bytes: Largest upload.
        tickets: Which files may be named.
        listeners: Learns who listens.
        locked: Whether visitors have to log in. Gradio asks for that at most of its doors, the guard at the others.
        local: Whether only this computer is served. A name of elsewhere that leads here is then a trick of some page in
            the same browser (DNS rebinding), and is refused.
    """

    def __init__(
        self,
        app: App,
        *,
        folder: Path,
        upload_bytes: int,
        tickets: Tickets,
        listeners: Listeners | None = None,
        locked: bool = False,
        local: bool = False,
    ) -> None:
        self._app = app
        self._local = local
        self._locked = locked
        self._listeners = Listeners() if listeners is None else listeners
        self._folder = folder.resolve()
        self._upload_bytes = upload_bytes
        self._tickets = tickets

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        send = _with_headers(send)
        path, method = scope["path"], scope["method"]
        if self._local and not _is_loopback(dict(scope["headers"]).get(b"host", b"")):
            await _answer(send, 403, "This page is for this computer alone; open it at http://127.0.0.1 and its port.")
        elif self._locked and _LOCKED.fullmatch(path) and not await self._is_known(scope):
            await _answer(send, 401, "This page asks for a user and a password; log in first.")
        elif method in ("GET", "HEAD") and path.startswith(_FILE):
            await self._serve_file(scope, receive, send)
        elif method in ("GET", "HEAD") and _GET.fullmatch(path) and ".." not in path:
            if path == "/":
                # Unpacked, to be read and mended.
                scope["headers"] = [(key, value) for key, value in scope["headers"] if key != b"accept-encoding"]
                send = _mending(send)
            if path != _STREAM:
                await self._app(scope, receive, send)
                return
            (session,) = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [""])[:1]
            with self._listeners.listening(session):
                await self._app(scope, receive, send)
        elif method == "POST" and _POST.fullmatch(path):
            await self._take(scope, receive, send)
        else:
            await _answer(send, 404, "There is nothing here.")

    async def _serve_file(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """A file of the temporary folder, by a name that nobody can guess; nothing else on this machine."""
        named = scope["path"].removeprefix(_FILE)
        # The path arrives decoded once; a second layer would be somebody's attempt to slip past this check.
        inside = "\0" not in named and unquote(named) == named and ".." not in named
        try:
            real = Path(named).resolve() if inside else self._folder
            inside = named.startswith("/") and real.is_relative_to(self._folder) and real.is_file()
        except OSError:  # A name longer than the disk's.
            inside = False
        if not inside:
            await _answer(send, 403, "Only results of this page are served here, and this is none, or is gone by now.")
            return
        await self._app(scope, receive, send)

    async def _take(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """A POST: an upload, which gives tickets, or a call, whose files are checked."""
        upload = scope["path"] == _API + "upload"
        most = self._upload_bytes + _FORM_BYTES if upload else _BODY_BYTES
        too_large = (
            f"The file is larger than the {self._upload_bytes / 2**20:.3g} MB that this page takes."
            if upload
            else "The request is too large."
        )
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            await _answer(send, 413, too_large)
            return
        if upload:
            await self._app(scope, _limited(receive, most), self._noting(send))
            return
        body = await _read(receive, most)
        if body is None:
            await _answer(send, 413, too_large)
            return
        if _CALLS.fullmatch(scope["path"]):
            try:
                values = json.loads(body)
                if not isinstance(values, dict) or not isinstance(values.get("data"), list):
                    raise ValueError
                session = values.get("session_hash")
                if not isinstance(session, str):
                    session = f"address {(scope.get('client') or ('?',))[0]}"
                values["data"] = self._tickets.check_all(values["data"], session)
                values.pop("event_data", None)  # No event here has any, and a file could hide in it.
            except NotYoursError as refusal:
                await _answer(send, 403, str(refusal))
                return
            except (ValueError, RecursionError):
                await _answer(send, 400, 'The request is no call; send JSON such as {"data": [...]}.')
                return
            body = json.dumps(values).encode()
            # Gradio's page puts a sentence of its own in the place of one that comes with status 503.
            browser = any(key == b"sec-fetch-mode" for key, _ in scope["headers"])
            send = _queue_full(send, 429 if browser else 503)
        headers = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
        scope["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
        await self._app(scope, _replay(body, receive), send)

    async def _is_known(self, scope: MutableMapping[str, Any]) -> bool:
        """Whether the sender is logged in: Gradio's own answer, at a door where nothing else happens."""
        statuses: list[int] = []
        door = _API + "login_check"
        headers = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
        asked = {**scope, "method": "GET", "path": door, "raw_path": door.encode(), "headers": headers}

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await self._app(asked, receive, note)
        return statuses == [200]

    def _noting(self, send: Send) -> Send:
        """Give a ticket for every path that the answer to an upload names."""

        async def note(status: int, body: bytes) -> tuple[int, bytes]:
            if status == 200:
                for path in json.loads(body):
                    self._tickets.issue(path)
            return status, body

        return _rewriting(send, note)


def _is_loopback(host: bytes) -> bool:
    """Whether the Host header of a request names this computer."""
    name = re.sub(r":\d*$", "", host.decode("latin-1")).strip("[]").lower()
    return name in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", name) is not None


# ------------------------------------------------------------------------------------------------------ parts of ASGI


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence, "error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _read(receive: Receive, most: int) -> bytes | None:
    """The whole body, or None if it is larger."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read, then go on with the connection."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _limited(receive: Receive, most: int) -> Receive:
    """Hang up on a body that is longer than it said; Gradio has its own limit for the file inside."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > most else message

    return counted


def _with_headers(send: Send) -> Send:
    async def dressed(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(key, value) for key, value in message.get("headers", []) if key.decode().lower() not in _HEADERS]
            message["headers"] = [*kept, *((key.encode(), value.encode()) for key, value in _HEADERS.items())]
        await send(message)

    return dressed


def _rewriting(send: Send, change: Callable[[int, bytes], Awaitable[tuple[int, bytes]]]) -> Send:
    """Hold an answer back until it is complete, change it, and send it."""
    start: Message = {}
    body = bytearray()

    async def held(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        body.extend(message.get("body", b""))
        if message.get("more_body"):
            return
        start["status"], new = await change(start["status"], bytes(body))
        headers = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
        start["headers"] = [*headers, (b"content-length", str(len(new)).encode())]
        await send(start)
        await send({"type": "http.response.body", "body": new})

    return held


def _queue_full(send: Send, status_when_full: int) -> Send:
    """Say politely that the queue is full."""

    async def polite(status: int, body: bytes) -> tuple[int, bytes]:
        if status != 503:
            return status, body
        return status_when_full, json.dumps({"detail": QUEUE_FULL, "error": QUEUE_FULL}).encode()

    return _rewriting(send, polite)


def _mending(send: Send) -> Send:
    """Take out of the page what names other hosts: pictures and titles for social networks."""

    async def mended(status: int, body: bytes) -> tuple[int, bytes]:
        return status, _SOCIAL.sub("", body.decode()).encode() if status == 200 else body

    return _rewriting(send, mended)
