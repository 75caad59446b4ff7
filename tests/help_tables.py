"""The command line's options as tables: the snapshot of the help that `docs/cli.md` shows.

`python tests/help_tables.py` writes the tables of today into the page.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

__all__ = ["END", "START", "tables"]

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
START = "<!-- options: made by tests/help_tables.py -->"
END = "<!-- end of options -->"
PANELS = (None, "Input", "Quality", "Speed", "Output", "Server", "Limits")


def tables(app: typer.Typer) -> str:
    """Return one table per command, with every option's group, values, default and meaning."""
    parts = []
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        rows = [f"### `latentindigo {name}`", ""]
        rows += ["| Group | Option | Values | Default | Meaning |", "| --- | --- | --- | --- | --- |"]
        hints = get_type_hints(command.callback, include_extras=True)
        entries = []
        for parameter in inspect.signature(command.callback).parameters.values():
            kind, info = get_args(hints[parameter.name])
            row = _row(parameter.name, kind, info, parameter.default)
            entries.append((PANELS.index(info.rich_help_panel), row))
        rows += [row for _, row in sorted(entries, key=lambda entry: entry[0])]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _row(name: str, kind: Any, info: Any, default: Any) -> str:
    is_option = isinstance(info, OptionInfo)
    # Typer keeps the first spelling where a default would stand.
    given = [word for word in (info.default, *(info.param_decls or ())) if str(word).startswith("-")]
    spelled = ", ".join(given or [f"--{name.replace('_', '-')}"]) if is_option else info.metavar
    missing = default is inspect.Parameter.empty
    shown = "required" if missing else info.show_default if isinstance(info.show_default, str) else ""
    if not (shown or default is None or default is False):
        shown = f"`{default}`"
    return f"| {info.rich_help_panel or ''} | `{spelled}` | {_values(kind, info)} | {shown} | {info.help} |"


def _values(kind: Any, info: Any) -> str:
    choices = [kind, *get_args(kind)]
    literal = next((choice for choice in choices if get_origin(choice) is Literal), None)
    if literal is not None:
        return ", ".join(f"`{choice}`" for choice in get_args(literal))
    if info.min is None:
        return info.metavar or ""
    span = f"at least {info.min}" if info.max is None else f"{info.min} to {info.max}"
    return f"{info.metavar}, {span}"


def main() -> None:
    """Write the tables into the page."""
    from latentindigo.cli import app

    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(START)[0], page.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{tables(app)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
