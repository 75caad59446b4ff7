"""A guard against phoning home: in a process and in all Python processes it starts, only loopback can be reached.

    guard = NetworkGuard(tmp_path)
    subprocess.run([...], env=guard.environment())
    assert guard.attempts() == []

Python runs a `sitecustomize` module at its start. The one that is written here replaces the calls that connect, send
and look names up. Whatever would leave this machine is refused, as without a network, and noted in a file. Libraries
that open sockets in C, past Python, are not seen by it; `watch` looks at the kernel's table of their sockets.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["NetworkGuard", "watch"]

_SITE = r"""
import ipaddress, os, socket

_NOTES = {notes!r}
_LOCAL = {{"", "localhost", "ip6-localhost", socket.gethostname()}}


def _is_local(host):
    if host is None:
        return True
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if str(host).lower() in _LOCAL:
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(what, target):
    with open(_NOTES, "a") as notes:
        notes.write(f"{{what}} {{target}}\n")
    raise OSError(101, "Network is unreachable")


def _guarded_method(name):
    original = getattr(socket.socket, name)

    def call(self, *arguments):
        address = arguments[-1] if name == "sendto" else arguments[0]
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            _refuse(name, address)
        return original(self, *arguments)

    setattr(socket.socket, name, call)


def _guarded_lookup(name):
    original = getattr(socket, name)

    def call(host=None, *arguments, **named):
        if not _is_local(host):
            _refuse(name, host)
        return original(host, *arguments, **named)

    setattr(socket, name, call)


for _name in ("connect", "connect_ex", "sendto"):
    _guarded_method(_name)
for _name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    _guarded_lookup(_name)
"""


class NetworkGuard:
    """Blocks and notes what would leave this machine.

    Args:
        folder: A folder for the guard's own two files.
    """

    def __init__(self, folder: Path) -> None:
        self._site = folder / "network-guard"
        self._site.mkdir(parents=True)
        self._notes = self._site / "attempts.txt"
        (self._site / "sitecustomize.py").write_text(_SITE.format(notes=str(self._notes)), encoding="utf-8")

    def environment(self, *paths: Path) -> dict[str, str]:
        """The environment for a guarded process.

        Args:
            *paths: Folders of packages, before those of PYTHONPATH.

        Returns:
            A copy of this process's environment; nothing in it asks libraries to stay offline.
        """
        found = [str(self._site), *map(str, paths), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))}
        # They would hide what a library does when nobody has told it to be quiet.
        for quiet in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED", "DO_NOT_TRACK"):
            environment.pop(quiet, None)
        return environment

    def attempts(self) -> list[str]:
        """What was tried, in order: the call and where it wanted to go."""
        return self._notes.read_text(encoding="utf-8").splitlines() if self._notes.exists() else []


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
