"""Nothing may be asked of another machine: what Python tries is refused and written down, what others do is seen.

`environment` makes every Python process that inherits it refuse connections and names beyond the loopback interface.
Programs in other languages do not notice; `watch` looks at the kernel's table of their sockets.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["environment", "refused", "watch"]

_GUARD = """
import os, socket, sys

def _local(host):
    host = host.decode() if isinstance(host, bytes) else host
    return host in (None, "", "localhost", "::1", "::", "0.0.0.0") or str(host).startswith(("127.", "::ffff:127."))

def _refuse(what, host):
    with open({log!r}, "a") as log:
        log.write(f"{{what}} {{host}} by {{' '.join(sys.orig_argv[:4])}}\\n")
    raise OSError(101, "no network in this test")

def _guard(name):
    real = getattr(socket.socket, name)
    def call(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _local(address[0]):
            _refuse(name, address[0])
        return real(self, address, *rest)
    setattr(socket.socket, name, call)

_guard("connect"), _guard("connect_ex")
_real = socket.getaddrinfo
def _resolve(host, *rest, **named):
    if not _local(host) and host != socket.gethostname():
        _refuse("getaddrinfo", host)
    return _real(host, *rest, **named)
socket.getaddrinfo = _resolve
"""


def environment(folder: Path) -> dict[str, str]:
    """Put the guard into a folder, and return the environment whose Python processes carry it.

    Args:
        folder: Empty folder.

    Returns:
        This process's environment with that folder in front of PYTHONPATH.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_GUARD.format(log=str(folder / "log")))
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def refused(folder: Path) -> list[str]:
    """What was refused so far, one line for each attempt."""
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


@contextmanager
def watch(process: int, seconds: float = 0.1) -> Iterator[set[str]]:
    """Collect connections beyond the loopback interface of a process and its descendants, in any language.

    Args:
        process: Its number.
        seconds: Between two looks.

    Yields:
        A set that grows: "address:port (program)".
    """
    found: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(seconds):
            found.update(_foreign(process))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _foreign(process: int) -> Iterator[str]:
    peers = {inode: peer for name in ("tcp", "tcp6") for inode, peer in _peers(Path("/proc/net", name))}
    for number in _family(process) if peers else ():
        try:
            links = [os.readlink(f"/proc/{number}/fd/{entry}") for entry in os.listdir(f"/proc/{number}/fd")]
            program = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:60]
        except OSError:
            continue
        yield from (f"{peers[link]} ({program})" for link in links if link in peers)


def _peers(table: Path) -> Iterator[tuple[str, str]]:
    """Sockets with a peer elsewhere (established, or asking to be), as the kernel lists them."""
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return
    for line in lines:
        fields = line.split()
        address, port = fields[2].split(":")
        host = _host(address)
        if fields[3] in ("01", "02") and not host.startswith("127."):
            yield f"socket:[{fields[9]}]", f"{host}:{int(port, 16)}"


def _host(address: str) -> str:
    words = struct.unpack(f"<{len(address) // 8}I", bytes.fromhex(address)[::1]) if address else ()
    data = b"".join(struct.pack(">I", word) for word in words)
    if len(data) == 4:
        return socket.inet_ntoa(data)
    if data[:12] == b"\0" * 10 + b"\xff\xff":
        return socket.inet_ntoa(data[12:])
    text = socket.inet_ntop(socket.AF_INET6, data)
    return "127.0.0.1" if text == "::1" else text


def _family(process: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    family = {process}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family
