"""The examples of `docs/app.md` run, against a real page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from web_page import Page, photo

pytestmark = pytest.mark.web

PAGE = Path(__file__).parents[2] / "docs" / "app.md"
ADDRESS = "http://127.0.0.1:7860/"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the photo that the examples name, as the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(photo(24, "JPEG"))
    return tmp_path


@pytest.mark.usefixtures("workplace")
def test_the_python_example_runs(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    assert ADDRESS in code
    names: dict[str, object] = {}
    exec(compile(code.replace(ADDRESS, page.url), str(PAGE), "exec"), names)  # noqa: S102  (our own documentation)
    assert "photo-restored-2.jpg" in capsys.readouterr().out
    assert names["uncertainty"]


def test_the_curl_example_runs(page: Page, workplace: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (script,) = blocks("bash")
    script = script.replace(ADDRESS, page.url)
    done = subprocess.run(["/bin/sh", "-c", script], cwd=workplace, capture_output=True, text=True, timeout=60)
    assert "event: complete" in done.stdout, done.stdout + done.stderr
    assert "photo-restored.jpg" in done.stdout
