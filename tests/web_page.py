"""For the tests of the web page: a running page, a browser, and photos to give it."""

from __future__ import annotations

import io
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from network_guard import NetworkGuard

SOURCE = Path(__file__).parents[1] / "src"
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
# Without them Chromium itself would look for updates, try QUIC, or need a display.
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@dataclass
class Page:
    """A running `latentindigo app`.

    Attributes:
        url: Its address.
        process: The process.
        guard: What it tried to reach.
        temporary: Folder that holds its temporary folder.
        said: What it printed, up to its address while it runs.
    """

    url: str
    process: subprocess.Popen[str]
    guard: NetworkGuard
    temporary: Path
    said: str

    def stop(self) -> int:
        """End it as a service manager does; return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.said += self.process.stdout.read()
            self.process.stdout.close()
        return self.process.wait(timeout=30)


Starter = Callable[..., Page]


def launch(folder: Path, *options: str, environment: dict[str, str] | None = None) -> Page:
    """Start the page, guarded, and wait until it can be opened.

    Args:
        folder: An empty folder: the page's current one, and where its temporary files go.
        *options: Of `latentindigo app`.
        environment: Variables for it.

    Returns:
        The page.
    """
    (folder / "tmp").mkdir()
    guard = NetworkGuard(folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "latentindigo", "app", "--port", "0", "--threads", "1", *options],
        env={**guard.environment(SOURCE), "TMPDIR": str(folder / "tmp"), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"http://\S+/", line):
            return Page(found.group(0), process, guard, folder / "tmp", said)
    raise AssertionError(f"the page did not start: {said}")


@pytest.fixture(scope="session")
def start_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Return a function that starts the page with options and waits for it; all are stopped at the end."""
    pages: list[Page] = []

    def start(*options: str, **named: Any) -> Page:
        pages.append(launch(tmp_path_factory.mktemp("page"), *options, **named))
        return pages[-1]

    yield start
    for page in pages:
        page.stop()


@pytest.fixture(scope="session")
def page(start_page: Starter) -> Page:
    """The page with the embedded model that most tests share."""
    return start_page()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium; without one the test is skipped, and `make browser` says how to get it."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; `make browser` installs it, or says what to do")
    with chromium() as opened:
        yield opened


@contextmanager
def chromium() -> Iterator[Any]:
    """The Chromium of this machine, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield opened
        opened.close()


@contextmanager
def running() -> Iterator[tuple[Any, str]]:
    """A browser and the address of a page, for what is no test."""
    with tempfile.TemporaryDirectory() as folder:
        page = launch(Path(folder))
        try:
            with chromium() as opened:
                yield opened, page.url
        finally:
            page.stop()


def photo(side: int = 48, form: str = "PNG", **options: Any) -> bytes:
    """A small picture with structure."""
    ramp = Image.linear_gradient("L").resize((side, side))
    rings = Image.radial_gradient("L").resize((side, side))
    buffer = io.BytesIO()
    Image.merge("RGB", (ramp, rings, ramp.rotate(90))).save(buffer, form, **options)
    return buffer.getvalue()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something to become true.

    Raises:
        AssertionError: It did not.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.05)
