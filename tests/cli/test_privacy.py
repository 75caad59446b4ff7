"""Nothing phones home: no process of this package reaches for anything but this machine, unless it is asked to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from network_guard import NetworkGuard
from web_page import SOURCE, launch, photo

REACH_OUT = """
import socket, urllib.request
for reach in (
    lambda: urllib.request.urlopen("http://example.org/", timeout=5),
    lambda: socket.socket().connect(("192.0.2.1", 80)),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
):
    try:
        reach()
    except OSError:
        pass
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
"""


def check_private(guard: NetworkGuard) -> None:
    """Raise AssertionError if a guarded process tried to reach another machine."""
    assert not guard.attempts(), f"it phones home: {guard.attempts()}"


def test_the_guard_sees_processes_and_their_children(tmp_path: Path) -> None:
    guard = NetworkGuard(tmp_path)
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {REACH_OUT!r}], check=True)"
    subprocess.run([sys.executable, "-c", nested], env=guard.environment(), check=True, timeout=60)
    assert [line.split()[0] for line in guard.attempts()] == ["getaddrinfo", "connect", "sendto"]
    with pytest.raises(AssertionError, match="example.org"):
        check_private(guard)


def test_a_restoration_reaches_for_nothing(tmp_path: Path) -> None:
    guard = NetworkGuard(tmp_path)
    (tmp_path / "photo.png").write_bytes(photo(24))
    command = [sys.executable, "-m", "latentindigo", "restore", "photo.png", "-o", "out.png", "--scale", "2"]
    subprocess.run(command, env=guard.environment(SOURCE), cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "out.png").is_file()
    check_private(guard)


def test_the_page_reaches_for_nothing(tmp_path: Path, tiny_model: Path) -> None:
    client = pytest.importorskip("gradio_client")
    folder = tmp_path / "page"
    folder.mkdir()
    page = launch(folder, "--model", str(tiny_model))
    try:
        (tmp_path / "cat.png").write_bytes(photo(24))
        session = client.Client(
            page.url, verbose=False, analytics_enabled=False, download_files=str(tmp_path / "downloads")
        )
        cat = client.handle_file(tmp_path / "cat.png")
        pictures, *_ = session.predict(photo=cat, scale=2, api_name="/restore")
        assert Path(pictures[0]).name == "cat-restored.png"
    finally:
        status = page.stop()
    check_private(page.guard)
    # As a service manager ends it: an orderly end that leaves nothing behind.
    assert status == 0
    assert list(page.temporary.iterdir()) == []
