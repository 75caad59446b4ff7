"""What mkdocs is told beyond its configuration: pages that lie elsewhere in the repository, and links between them.

README, changelog, model card and the like are pages of the site without a copy under docs/. Links are written for the
repository, where `../recipes/tune.txt` leads to a file; on the site they lead to the page of that file, or become plain
code where it has none. A link to a file that does not exist is a warning, and thus an error of a strict build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
BARS = "-embedded-bars.md"

# File of the repository -> page of the site.
_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "LICENSE": "licence.md",
    "benchmarks/README.md": "benchmark.md",
    "src/latentindigo/weights/embedded/README.md": "model-card.md",
}
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]`]|`[^`]*`)*)\]\(([^()\s]+)\)")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n+", re.DOTALL)
_log = logging.getLogger("mkdocs.hooks.site_pages")


def pages() -> dict[str, str]:
    """Files of the repository outside docs/ that are pages of the site, by path, with the page's path.

    Returns:
        The fixed ones, and the newest list of bars.
    """
    bars = sorted(path for path in (ROOT / "benchmarks" / "results").glob(f"*{BARS}"))
    return {**_PAGES, bars[-1].relative_to(ROOT).as_posix(): "bars.md"}


def page_text(source: str) -> str:
    """The Markdown of a file as a page.

    Args:
        source: Path in the repository.

    Returns:
        Its text without front matter; a title where the file has none.
    """
    text = (ROOT / source).read_text(encoding="utf-8")
    if source == "LICENSE":
        return (
            f"# Licence\n\nOf the code. The embedded weights have [terms of their own]"
            f"(src/latentindigo/weights/embedded/README.md#terms).\n\n```text\n{text.strip()}\n```\n"
        )
    if source.endswith(BARS):
        return (
            "# Bars met and missed\n\nWhat was wanted of the embedded model, and what was measured on the 50 "
            f"evaluation photographs. [Results and methods](benchmarks/README.md) says how.\n\n{text}"
        )
    return _FRONT_MATTER.sub("", text)


def site_link(source: str, target: str, known: dict[str, str]) -> str | None:
    """Where a link leads on the site.

    Args:
        source: Path in the repository of the file with the link.
        target: The link as it is written there, relative, perhaps with an anchor.
        known: Pages outside docs/, as `pages` gives them.

    Returns:
        The path of the page or picture from the top of the site, with the anchor, or None if it is not on the site.

    Raises:
        FileNotFoundError: There is no such file in the repository.
    """
    path, mark, anchor = target.partition("#")
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
    if not (ROOT / found).exists():
        raise FileNotFoundError(found)
    if found in known:
        return known[found] + mark + anchor
    if found.startswith("docs/") and (ROOT / found).is_file():
        return found.removeprefix("docs/") + mark + anchor
    return None


def _title(source: str, target: str) -> str:
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    found = re.search(r"^# (.+)$", page_text(file), re.MULTILINE) if (ROOT / file).is_file() else None
    return found[1] if found else target


def rewrite_links(markdown: str, source: str, page: str, known: dict[str, str]) -> str:
    """Links for the site in place of links for the repository; code blocks stay as they are.

    Args:
        markdown: Text of the page.
        source: Path in the repository of the file it was read from.
        page: Path of the page on the site.
        known: Pages outside docs/, as `pages` gives them.

    Returns:
        The new text.

    Raises:
        FileNotFoundError: A link leads to no file.
    """

    def change(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|[/#]", target):
            return match[0]
        link = site_link(source, target, known)
        if link is not None:
            relative = posixpath.relpath(link, posixpath.dirname(page) or ".")
            # A path says where to look in the repository; on the site the page's title does.
            shown = _title(source, target) if text.strip("`") in (target, posixpath.basename(target)) else text
            return f"{image}[{shown}]({relative})"
        plain = text.strip("`")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        # A path is itself; other words keep their sense, and the path follows them.
        return f"`{path}`" if plain in (target, path) or "/" in plain else f"{text} (`{path}`)"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(change, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(change, markdown[end:])])


# ------------------------------------------------------------------------------------------------- called by mkdocs


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    for source, page in pages().items():
        files.append(File.generated(config, page, content=page_text(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page."""
    del config, files
    known = pages()
    sources = {target: source for source, target in known.items()}
    uri = page.file.src_uri
    source = sources.get(uri, f"docs/{uri}")
    # What `page_text` adds to these two is written from the top of the repository.
    if uri in ("licence.md", "bars.md"):
        source = posixpath.basename(source)
        known = {**known, source: uri}
    try:
        return rewrite_links(markdown, source, uri, known)
    except FileNotFoundError as error:
        _log.warning("%s links to %s, which does not exist", source, error)
        return markdown
