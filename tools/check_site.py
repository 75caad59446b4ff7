"""The built site is whole: it asks nothing of another host, its links lead somewhere, and no public name is missing.

python tools/check_site.py site
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent

# Attributes by which a page makes the browser fetch something. A link that must be clicked is no request.
_FETCHED = {"src", "srcset", "poster", "data", "action", "formaction", "background"}
_RELATIONS = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "icon", "manifest"}
_STYLE_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")
_IDENTIFIER = re.compile(r"^::: (latentindigo[\w.]*)", re.MULTILINE)


class _Page(HTMLParser):
    """What a page fetches, where it links to, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        self.fetched += [part.split()[0] for name in _FETCHED & set(given) for part in given[name].split(",") if part]
        self.fetched += _urls(given.get("style", ""))
        self._in_style = tag == "style"
        if tag == "link" and _RELATIONS & set(given.get("rel", "").split()):
            self.fetched.append(given.get("href", ""))
        elif tag in ("a", "area") and given.get("href"):
            self.links.append(given["href"])

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.fetched += _urls(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"


def _urls(style: str) -> list[str]:
    return [first or second for first, second in _STYLE_URL.findall(style)]


def _is_foreign(address: str) -> bool:
    parts = urlsplit(address.strip())
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp", "ws", "wss")


def foreign_requests(site: Path) -> Iterator[str]:
    """What pages and style sheets would fetch from another host, without a click.

    Scripts can build an address at run time, which no reading of them finds: a browser in
    `tests/unit/test_site.py` opens pages and counts.

    Args:
        site: Folder of the built site.

    Yields:
        One line for each.
    """
    for path in sorted(site.rglob("*.html")):
        for address in _Page(path.read_text(encoding="utf-8")).fetched:
            if _is_foreign(address):
                yield f"{path.relative_to(site)} fetches {address}"
    for path in sorted(site.rglob("*.css")):
        for address in _urls(path.read_text(encoding="utf-8")):
            if _is_foreign(address):
                yield f"{path.relative_to(site)} fetches {address}"


def broken_links(site: Path) -> Iterator[str]:
    """Links and pictures inside the site that lead to no file, or to no place in a page.

    Args:
        site: Folder of the built site.

    Yields:
        One line for each.
    """
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        if path.name == "404.html":  # Its links start at the root of a host, since it is shown anywhere.
            continue
        for address in [*page.links, *page.fetched]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            place = unquote(parts.fragment)
            if not target.is_file():
                yield f"{path.relative_to(site)} leads to {address}, which does not exist"
            elif place and target in pages and place not in pages[target].places | {"__top", "top"}:
                yield f"{path.relative_to(site)} leads to {address}, a place that does not exist"


def documented_names(reference: Path) -> set[str]:
    """Names that the pages of the reference promise: what they name, and all public names of modules they name.

    Args:
        reference: Folder of the reference's Markdown.

    Returns:
        Full names. Of a module that is named with a choice of members, all public names all the same.
    """
    names = set()
    for page in sorted(reference.glob("*.md")):
        for found in _IDENTIFIER.findall(page.read_text(encoding="utf-8")):
            parent, _, last = found.rpartition(".")
            if parent == "latentindigo" and last != "latentindigo":
                module = importlib.import_module(found)
                # A name that a module only passes on is documented where it is defined.
                own = [n for n in module.__all__ if getattr(getattr(module, n), "__module__", found) == found]
                names |= {f"{found}.{name}" for name in own}
            else:
                names.add(found)
    return names


def missing_names(site: Path, names: Iterable[str]) -> Iterator[str]:
    """Names without a place in the built reference.

    Args:
        site: Folder of the built site; its `objects.inv` lists what the reference holds.
        names: Full names.

    Yields:
        One line for each.
    """
    data = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    held = {line.split(" ", 1)[0] for line in zlib.decompress(data).decode().splitlines()}
    for name in sorted(set(names) - held):
        yield f"the reference lacks {name}"


def main() -> None:
    """Check a site and say what is wrong with it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("site", type=Path, metavar="FOLDER")
    site = parser.parse_args().site.resolve()
    pages = len(list(site.rglob("*.html")))
    if not pages:
        sys.exit(f"expected a folder with a built site, got '{site}'; run `make docs`")
    names = documented_names(ROOT / "docs" / "reference")
    wrong = [*foreign_requests(site), *broken_links(site), *missing_names(site, names)]
    if wrong:
        sys.exit("\n".join(wrong))
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) / 1e6
    sys.stdout.write(f"{pages} pages, {size:.1f} MB, {len(names)} names; nothing from another host, no broken link\n")


if __name__ == "__main__":
    main()
