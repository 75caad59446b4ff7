"""The command `latentindigo batch`: a folder of any size, on this machine or on a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from latentindigo.cli_options import (
    CheckpointingOption,
    CompileOption,
    CropOption,
    DetailMapOption,
    DtypeOption,
    FidelityOption,
    GuidanceScaleOption,
    GuidanceVaeOption,
    InitModelOption,
    InitOption,
    LatentInnOption,
    MethodOption,
    NegativePromptOption,
    OffloadOption,
    PresetOption,
    PriorConfigOption,
    PriorOption,
    PromptOption,
    SamplesOption,
    ScaleOption,
    SchedulerOption,
    SeedOption,
    SizeOption,
    StepsOption,
    StrengthOption,
    TileOption,
    UncertaintyMapOption,
    UpdateOption,
)
from latentindigo.command import (
    INPUT,
    OUTPUT,
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
from latentindigo.safe_files import printable

if TYPE_CHECKING:
    from rich.console import Console

    from latentindigo.batch import BatchJob
    from latentindigo.batch_records import Row

__all__ = ["batch"]

_INTERRUPTED = 130  # As shells count it.


def batch(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder of photos: a path, or a URL such as s3://a/b.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the results, a path or a URL.")],
    *,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Only photos that fit, such as '*.jpg' or 'trips/**/*.png'; upper and lower case alike. Repeatable.",
            show_default="all photos",
            rich_help_panel=INPUT,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Photos and folders to leave out, such as 'thumbs/**'. Repeatable.",
            show_default="none",
            rich_help_panel=INPUT,
        ),
    ] = None,
    model: ModelOption = "embedded",
    prior: PriorOption = None,
    prior_config: PriorConfigOption = None,
    guidance_vae: GuidanceVaeOption = None,
    init_model: InitModelOption = None,
    latent_inn: LatentInnOption = None,
    preset: PresetOption = "default",
    fidelity: FidelityOption = None,
    method: MethodOption = None,
    update: UpdateOption = None,
    init: InitOption = None,
    strength: StrengthOption = None,
    prompt: PromptOption = None,
    negative_prompt: NegativePromptOption = None,
    guidance_scale: GuidanceScaleOption = None,
    num_samples: SamplesOption = 1,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    scheduler: SchedulerOption = "model",
    tile: TileOption = "auto",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    compiled: CompileOption = False,
    checkpointing: CheckpointingOption = False,
    offload: OffloadOption = "none",
    threads: ThreadsOption = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="This process, or a Ray cluster: the same pixels.", rich_help_panel=SPEED),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=4096,
            help="With --engine ray: processes that hold the model.",
            show_default="one per accelerator, or 1",
            rich_help_panel=SPEED,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --engine ray: a cluster that is there, or 'auto'.",
            show_default="one on this machine, for this run",
            rich_help_panel=SPEED,
        ),
    ] = None,
    scale: ScaleOption = 4.0,
    size: SizeOption = None,
    crop: CropOption = False,
    detail_map: DetailMapOption = False,
    uncertainty_map: UncertaintyMapOption = False,
    manifest: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="List of all photos and what became of them, ending in .jsonl or .parquet.",
            show_default="OUT/manifest.jsonl",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    quality: Annotated[
        bool, typer.Option(help="Estimate the quality of each result for the manifest.", rich_help_panel=OUTPUT)
    ] = True,
    retries: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=100,
            help="Further tries, at the end, for photos that failed for a reason that may pass.",
            rich_help_panel=OUTPUT,
        ),
    ] = 1,
    verify: Annotated[
        bool,
        typer.Option(
            help="Read results of earlier runs again to see that they are whole, not only their sizes.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Also replace files that latentindigo did not write.", rich_help_panel=OUTPUT),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per photo on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Parse, run, report; see `latentindigo batch --help`."""
    console = stderr_console()
    with short_warnings(console), _stoppable(console), exit_codes(console, ValueError=ExitCode.USAGE):
        if engine == "local" and (workers or address):
            raise ValueError("workers, address: only a Ray cluster has them; add --engine ray")
        from latentindigo.batch import BatchJob
        from latentindigo.jobs import RestoreSettings

        job = BatchJob(
            source,
            out,
            RestoreSettings(
                scale=scale,
                size=size,
                crop=crop,
                preset=preset,
                method=method,
                update=update,
                init=init,
                steps=steps,
                strength=strength,
                fidelity=fidelity,
                num_samples=num_samples,
                seed=seed,
                tile=tile,
                prompt=prompt,
                negative_prompt=negative_prompt,
                guidance_scale=guidance_scale,
                scheduler=scheduler,
            ),
            {
                "model": model,
                "prior": prior,
                "prior_config": prior_config,
                "guidance_vae": guidance_vae,
                "latent_inn": latent_inn,
                "dtype": dtype,
                "device": device,
                "compiled": compiled,
                "checkpointing": checkpointing,
                "offload": offload,
                "init_model": init_model,
            },
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            detail_map=detail_map,
            uncertainty_map=uncertainty_map,
            quality=quality,
            verify=verify,
            overwrite=overwrite,
            retries=retries,
            threads=threads,
        )
        with ExitStack() as stack:
            results = sys.stdout
            # What libraries print (Ray does when a worker dies) must not stand among the results.
            stack.enter_context(redirect_stdout(sys.stderr))
            if engine == "ray":
                from latentindigo.batch_ray import RayEngine

                chosen: Any = stack.enter_context(RayEngine(job, workers=workers, address=address))
            else:
                from latentindigo.batch import Worker, local_engine
                from latentindigo.jobs import load_pipeline

                set_threads(threads)
                chosen = local_engine(Worker(job, lambda: load_pipeline(**job.model)))
            failed = _run(console, job, chosen, manifest, partial(_report, console, results, as_json))
    if any(kind in ("memory", "disk") for kind in failed.values()):
        raise typer.Exit(ExitCode.RESOURCES)
    if failed:
        raise typer.Exit(ExitCode.SOME_FAILED)


@contextmanager
def _stoppable(console: Console) -> Iterator[None]:
    """End in order when the user, or a machine that is to be shut down, asks for it."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # Not in the main thread.
        before = None
    try:
        yield
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here", markup=False)
        raise typer.Exit(_INTERRUPTED) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _run(
    console: Console, job: BatchJob, engine: Any, manifest: str | None, report: Callable[[Row, bool], None]
) -> dict[str, str]:
    """Restore with a count on stderr; report each row as soon as it is there; return what failed, and its kind."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from latentindigo.batch import run_batch

    failed: dict[str, str] = {}
    counts: Counter[str] = Counter()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as bar:
        shown = bar.add_task("loading")
        for row in run_batch(job, engine, manifest=manifest):
            again = failed.pop(row["input"], None)
            if row["status"] == "failed":
                failed[row["input"]] = row["kind"]
            else:
                counts[row["status"]] += 1
            bar.update(shown, description=f"{_sum(counts, failed)}: {printable(row['input'])}")
            bar.stop()  # Or the lines would be written into the bar where both are one terminal.
            report(row, again is not None)
            bar.start()
    console.print(_sum(counts, failed), markup=False)
    return failed


def _sum(counts: Counter[str], failed: dict[str, str]) -> str:
    return f"{counts['restored']} restored, {counts['kept']} kept, {len(failed)} failed"


def _report(console: Console, results: TextIO, as_json: bool, row: Row, again: bool) -> None:
    if row["status"] == "failed":
        console.print("failed again:" if again else "failed:", style="bold red", end=" ")
        console.print(printable(f"{row['input']}: {row['error']}"), markup=False)
    with suppress(BrokenPipeError):  # Whoever read the list has seen enough; the job goes on.
        if as_json:
            typer.echo(json.dumps(row), file=results)
        elif row["status"] == "restored":
            for name in row["outputs"]:
                typer.echo(printable(name) if results.isatty() else os.fsencode(name), file=results)
