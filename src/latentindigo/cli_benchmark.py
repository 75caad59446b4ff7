"""The command `latentindigo benchmark`: methods side by side on a folder of photographs."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentindigo.command import (
    INPUT,
    OUTPUT,
    QUALITY,
    SPEED,
    DeviceOption,
    ExitCode,
    ModelOption,
    ThreadsOption,
    exit_codes,
    set_threads,
    short_warnings,
    stderr_console,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["benchmark"]

_Names = list[str] | None


def benchmark(
    photos: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of photographs: clean ones, or with --protocol real such as they are.",
            exists=True,
            file_okay=False,
        ),
    ],
    *,
    protocol: Annotated[
        _Names,
        typer.Option(
            metavar="NAME",
            help="Damage: mild, medium, severe, random (x4), noise15, jpeg15, blur1.5-noise5 (x1), ... or real. "
            "Repeatable.",
            show_default="medium",
            rich_help_panel=INPUT,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="The first N photographs.", show_default="all", rich_help_panel=INPUT),
    ] = None,
    crop: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=32,
            help="Centre crop of N x N pixels.",
            show_default="whole photographs",
            rich_help_panel=INPUT,
        ),
    ] = None,
    method: Annotated[
        _Names,
        typer.Option(
            metavar="NAME",
            help="Method, for instance bicubic, estimator, default, vivid, sdedit, psld, daps. Repeatable.",
            show_default="all",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.py",
            help="A method of yours: a Python file that defines make(pipe). It is run as code. Repeatable.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(help="Set grain and sharpening of equal roughness beside the presets.", rich_help_panel=QUALITY),
    ] = True,
    model: ModelOption = "embedded",
    device: DeviceOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="float32, bfloat16 or float16.", show_default="automatic", rich_help_panel=SPEED
        ),
    ] = None,
    threads: ThreadsOption = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            file_okay=False,
            help="Folder of the result file, tables and pictures.",
            rich_help_panel=OUTPUT,
        ),
    ],
    name: Annotated[
        str, typer.Option(metavar="TEXT", help="End of the files' names, after the date.", rich_help_panel=OUTPUT)
    ] = "benchmark",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Run a benchmark; see `latentindigo benchmark --help`."""
    console = stderr_console()
    with short_warnings(console), exit_codes(console, ValueError=ExitCode.USAGE):
        from latentindigo import jobs
        from latentindigo.contest import ContestSettings
        from latentindigo.model_folder import model_folder
        from latentindigo.roster import NAMES, load_settings

        set_threads(threads)
        pipe = jobs.load_pipeline(model, dtype=dtype, device=device)
        settings = ContestSettings(
            photos=photos,
            protocols=protocol or ("medium",),
            methods=method or NAMES,
            method_files=add or (),
            rivals=load_settings(model_folder(model)),
            controls=controls,
            limit=limit,
            crop=crop,
        )
        target = out / f"{datetime.date.today().isoformat()}-{name}.json"
        result = _run(console, pipe, settings, target)
    typer.echo(json.dumps(result["summary"]) if as_json else target.with_suffix(".md").read_text().rstrip())
    console.print(f"result file: {target}", markup=False)


def _run(console: Console, pipe: Any, settings: Any, target: Path) -> dict[str, Any]:
    """Run with a progress bar on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from latentindigo.contest import run_contest

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        photos = bar.add_task("photographs", status="")

        def on_image(protocol: Any, k: int, count: int, contender: Any, row: Any) -> None:
            status = f"{protocol.name}: {contender.method} {contender.variant}".rstrip()
            bar.update(photos, completed=k, total=count, status=status)

        return run_contest(pipe, settings, target, on_image)
