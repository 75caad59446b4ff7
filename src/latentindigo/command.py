"""What every command shares: exit codes, messages on stderr, and the options that look alike everywhere.

Nothing heavy is imported at the top, for `latentindigo --help` must answer at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentindigo.safe_files import printable

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

__all__ = [
    "EXIT_CODES",
    "INPUT",
    "OUTPUT",
    "QUALITY",
    "SPEED",
    "DeviceOption",
    "ExitCode",
    "ModelOption",
    "ThreadsOption",
    "echo_path",
    "examples",
    "exit_codes",
    "fail",
    "set_threads",
    "short_warnings",
    "stderr_console",
]


class ExitCode(IntEnum):
    """What the exit status of a command means."""

    DONE = 0
    SOME_FAILED = 1
    USAGE = 2
    MODEL = 3
    RESOURCES = 4


EXIT_CODES = (
    "[bold]Exit codes[/bold]  0 all done · 1 some inputs failed, the rest is done · 2 wrong usage · "
    "3 the model could not be loaded · 4 out of memory or disk"
)
INPUT, QUALITY, SPEED, OUTPUT = "Input", "Quality", "Speed", "Output"


def examples(*lines: str) -> str:
    """The epilog of a command: its examples and the exit codes."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  $ {line}" for line in lines), EXIT_CODES])


def stderr_console() -> Console:
    """Console for messages: stderr, made anew so that it follows whatever stderr is now."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False)


def fail(console: Console, error: BaseException | str, code: ExitCode) -> typer.Exit:
    """Print an error as one line and return what ends the command, to be raised."""
    console.print("error:", style="bold red", end=" ")
    console.print(printable(" ".join(str(error).split())) or type(error).__name__, markup=False)
    return typer.Exit(code)


def echo_path(path: Path) -> None:
    """Print a result's name: as it is for a program that reads it, without what a terminal would obey for a person."""
    if sys.stdout.isatty():
        typer.echo(printable(str(path)))
    else:
        typer.echo(os.fsencode(path))


@contextmanager
def exit_codes(console: Console, **codes: ExitCode) -> Iterator[None]:
    """Turn the failures that end a command into one line on stderr and the documented exit code.

    Args:
        console: Where the line goes.
        **codes: Exit codes of built-in exceptions, by name, where they differ from `SOME_FAILED`.
    """
    from latentindigo.failures import failure_kind

    by_kind = {"memory": ExitCode.RESOURCES, "disk": ExitCode.RESOURCES, "model": ExitCode.MODEL}
    try:
        yield
    except (OSError, ValueError, RuntimeError, MemoryError, ImportError) as error:
        named = next((codes[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in codes), None)
        code = by_kind.get(failure_kind(error)) or named or ExitCode.SOME_FAILED
        raise fail(console, error, code) from error


@contextmanager
def short_warnings(console: Console) -> Iterator[None]:
    """Show warnings as one line each, the same one only once.

    Those of Pillow are left out: they name no file, and what matters of them comes back as an error that does.
    """
    shown: set[str] = set()

    def show(message: Warning | str, _: Any, filename: str, *__: Any, **___: Any) -> None:
        if os.path.basename(os.path.dirname(filename)) == "PIL":
            return
        text = printable(" ".join(str(message).split()))
        if text not in shown:
            shown.add(text)
            console.print("warning:", style="yellow", end=" ")
            console.print(text, markup=False)

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def set_threads(threads: int | None) -> None:
    """Let PyTorch use this many CPU threads; None leaves its choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


ModelOption = Annotated[
    str,
    typer.Option(metavar="MODEL", help="'embedded', a model folder, or a hub id user/repo.", rich_help_panel=INPUT),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, cuda:1 or mps.",
        show_default="an accelerator if there is one",
        rich_help_panel=SPEED,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, max=1024, help="CPU threads.", show_default="PyTorch's choice", rich_help_panel=SPEED
    ),
]
