"""The documentation site: its pages and links, what its checks find, and what a browser asks for."""

from __future__ import annotations

import functools
import http.server
import importlib
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

import latentindigo

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
# A list item right under a line of text: a list to GitHub, a run of text to Python-Markdown, which builds the site.
GLUED = re.compile(r"^(?!(?:[-*+]|\d+\.) |\s|#|\||<!--).+\n(?:[-*+]|\d+\.) ", re.MULTILINE)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what mkdocs is told beyond its configuration."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("site_pages")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the checks of a built site."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("check_site")


def configuration() -> dict[str, Any]:
    """The configuration of mkdocs."""
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def named_in(nav: Any) -> Iterator[str]:
    """Pages of a navigation, in its order."""
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else named_in(value)


# ----------------------------------------------------------------------------------------------------------- its pages


def test_every_page_is_in_the_navigation_once(pages: Any) -> None:
    named = list(named_in(configuration()["nav"]))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | set(pages.pages().values())
    assert sorted(named) == sorted(there)


def test_the_theme_is_told_to_ask_nobody() -> None:
    config = configuration()
    assert config["theme"]["font"] is False
    assert config["strict"] is True
    assert not {"repo_url", "extra_javascript"} & set(config)
    assert set(config["extra"]) == {"generator"}, "analytics and the like have no place here"
    assert {next(iter(plugin)) if isinstance(plugin, dict) else plugin for plugin in config["plugins"]} == {
        "search",
        "mkdocstrings",
    }


def test_every_public_name_is_in_the_reference(checks: Any) -> None:
    names = checks.documented_names(REFERENCE)
    homes = {name: getattr(latentindigo, name) for name in latentindigo.__all__ if name != "__version__"}
    assert {f"{found.__module__}.{name}" for name, found in homes.items()} <= names
    assert "`__version__`" in (REFERENCE / "index.md").read_text(encoding="utf-8")
    assert len(names) > 150


def test_pages_lie_outside_docs_without_a_copy(pages: Any) -> None:
    assert all((ROOT / source).is_file() and not source.startswith("docs/") for source in pages.pages())
    for source, page in pages.pages().items():
        assert not (DOCS / page).exists(), f"{page} would hide {source}"
        assert pages.page_text(source).startswith("# "), f"{page} has no title"
    assert "license_name" not in pages.page_text("src/latentindigo/weights/embedded/README.md")


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.rglob("*.md")), *map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "benchmarks/README.md"))]
)
def test_lists_are_lists_on_the_site(page: Path) -> None:
    assert not GLUED.findall(re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")))
def test_code_in_lists_is_indented_by_four(page: Path) -> None:
    """With less, Python-Markdown ends the list there, and the next item is number 1 again."""
    assert not re.findall(r"^ {1,3}(?:```|~~~)", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_a_list_that_is_none_is_found() -> None:
    assert GLUED.findall("Three things:\n- one\n- two\n")
    assert not GLUED.findall("Three things:\n\n- one\n  goes on\n- two\n\n1. first\n2. second\n")


# ----------------------------------------------------------------------------------------------------------- its links


@pytest.mark.parametrize(
    ("source", "link", "there"),
    [
        ("docs/priors.md", "[memory](memory.md#more)", "[memory](memory.md#more)"),
        ("docs/priors.md", "[memory.md](memory.md)", "[Memory](memory.md)"),
        ("docs/reference/images.md", "[start](../../README.md#python)", "[start](../index.md#python)"),
        ("docs/training.md", "[card](../src/latentindigo/weights/embedded/README.md)", "[card](model-card.md)"),
        ("docs/credits.md", "[LICENSE](../LICENSE)", "[Licence](licence.md)"),
        ("docs/limits.md", "[recipe](../recipes/tune.txt)", "recipe (`recipes/tune.txt`)"),
        ("docs/limits.md", "[`recipes/tune.txt`](../recipes/tune.txt)", "`recipes/tune.txt`"),
        ("README.md", "![a map](docs/images/demo.png)", "![a map](images/demo.png)"),
        ("README.md", "[docs/paper_map.md](docs/paper_map.md)", "[From the paper to the code](paper_map.md)"),
        ("benchmarks/README.md", "[bars](#speed-and-memory)", "[bars](#speed-and-memory)"),
        ("README.md", "[paper](https://arxiv.org/abs/2505.12935)", "[paper](https://arxiv.org/abs/2505.12935)"),
        ("README.md", "```\n[a](b.md)\n```", "```\n[a](b.md)\n```"),
    ],
)
def test_links_lead_to_the_pages_of_the_site(source: str, link: str, there: str, pages: Any) -> None:
    known = pages.pages()
    page = known.get(source) or source.removeprefix("docs/")
    found = pages.rewrite_links(f"See {link}\n", source, page, known) if "```" not in link else link
    found = found if "```" in link else found.removeprefix("See ").rstrip("\n")
    title = (DOCS / "paper_map.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    assert found == there.replace("From the paper to the code", title)
    if "```" in link:
        assert pages.rewrite_links(f"{link}\n", source, page, known) == f"{link}\n"


def test_a_link_to_nothing_is_refused(pages: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"docs/no-such\.md"):
        pages.rewrite_links("[a](no-such.md)", "docs/limits.md", "limits.md", pages.pages())


# ---------------------------------------------------------------------------------------------------------- its checks


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A small site without a fault."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "a.css").write_text("body { background: url(b.png) }")
    (tmp_path / "assets" / "b.png").touch()
    (tmp_path / "index.html").write_text(
        '<head><link rel="stylesheet" href="assets/a.css"><link rel="canonical" href="https://example.org/"></head>'
        '<a href="https://example.org/">elsewhere</a> <a href="other.html#part">part</a> <img src="assets/b.png">'
    )
    (tmp_path / "other.html").write_text('<h2 id="part">Part</h2> <a href="#part">here</a> <a href=".">top</a>')
    inventory = zlib.compress(b"latentindigo.a.B py:class 1 a.html#$ -\n")
    (tmp_path / "objects.inv").write_bytes(b"# 1\n# 2\n# 3\n# 4\n" + inventory)
    return tmp_path


def test_a_good_site_passes(site: Path, checks: Any) -> None:
    assert [*checks.foreign_requests(site), *checks.broken_links(site)] == []
    assert list(checks.missing_names(site, {"latentindigo.a.B"})) == []


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example.org/mathjax.js"></script>',
        '<script src="//cdn.example.org/mathjax.js"></script>',
        '<link href="https://fonts.example.org/css?family=Roboto" rel="stylesheet">',
        '<link rel="preconnect" href="https://fonts.example.org">',
        '<img src="https://example.org/badge.svg">',
        '<img srcset="a.png 1x, https://example.org/a.png 2x">',
        '<p style="background: url(https://example.org/a.png)">',
        "<style>@import 'https://example.org/a.css';</style>",
        '<iframe src="http://example.org/"></iframe>',
    ],
)
def test_a_request_to_another_host_is_found(text: str, site: Path, checks: Any) -> None:
    (site / "assets" / "more.html").write_text(text)
    assert len(list(checks.foreign_requests(site))) == 1


def test_a_style_sheet_from_another_host_is_found(site: Path, checks: Any) -> None:
    (site / "assets" / "a.css").write_text('@font-face { src: url("https://example.org/a.woff2") }')
    assert list(checks.foreign_requests(site)) == ["assets/a.css fetches https://example.org/a.woff2"]


@pytest.mark.parametrize("link", ["gone.html", "other.html#gone", "#gone", "assets/gone.png"])
def test_a_broken_link_is_found(link: str, site: Path, checks: Any) -> None:
    (site / "third.html").write_text(f'<a href="{link}">a</a>')
    assert len(list(checks.broken_links(site))) == 1


def test_a_missing_name_is_found(site: Path, checks: Any) -> None:
    assert list(checks.missing_names(site, ["latentindigo.a.C"])) == ["the reference lacks latentindigo.a.C"]


# ----------------------------------------------------------------------------------------------------------- a browser


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.mark.slow
def test_a_browser_asks_no_other_host(tmp_path: Path) -> None:
    """Build the site, open every page, search for something, and count the requests; once with a planted one."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium, and none is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    built = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", str(built)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_address[1]}"
    foreign: list[str] = []
    errors: list[str] = []

    def note(request: Any) -> None:
        if urlsplit(request.url).netloc not in ("", host):
            foreign.append(request.url)

    try:
        with sync_api.sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page()
            page.on("request", note)
            page.on("pageerror", lambda error: errors.append(str(error)))
            for path in sorted(built.rglob("*.html")):
                page.goto(f"http://{host}/{path.relative_to(built).as_posix()}", wait_until="load")
            page.goto(f"http://{host}/index.html")
            page.locator(".md-search__input").first.fill("uncertainty")
            page.wait_for_selector(".md-search-result__item")
            assert (foreign, errors) == ([], [])
            page.set_content('<img src="http://example.invalid/a.png">')
            page.wait_for_timeout(200)
            assert foreign == ["http://example.invalid/a.png"]
            chromium.close()
    finally:
        server.shutdown()
        server.server_close()
