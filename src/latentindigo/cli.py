"""The command line: parse, build the same settings everybody else builds, call, report.

Nothing heavy is imported at the top: `latentindigo --help` must answer at once and without PyTorch. Results go to
stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentindigo import __version__
from latentindigo.cli_app import web_app
from latentindigo.cli_batch import batch
from latentindigo.cli_benchmark import benchmark
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
    EXIT_CODES,
    INPUT,
    OUTPUT,
    SPEED,
    DeviceOption,
    ExitCode,
    ModelOption,
    ThreadsOption,
    echo_path,
    examples,
    exit_codes,
    fail,
    set_threads,
    short_warnings,
    stderr_console,
)
from latentindigo.safe_files import printable

if TYPE_CHECKING:
    from rich.console import Console

    from latentindigo.jobs import Outcome, RestoreSettings
    from latentindigo.planning import Task

__all__ = ["ExitCode", "app", "main"]


app = typer.Typer(
    name="latentindigo",
    help="Restore blurred, noisy, small or over-compressed photos; see which detail was measured and which invented.",
    epilog=EXIT_CODES,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; requests to the hub carry no counts of its users, unless the user says otherwise."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # The hub's client reads it when it is imported.
    app()


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"latentindigo {__version__}")
        raise typer.Exit()
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options that belong to no command."""


@app.command(
    help="Restore photos.\n\nPhotos keep their orientation, colour profile, transparency, greyness and 16 bits. "
    "A photo that fails is reported and the others are done; nothing is overwritten without --overwrite.",
    epilog=examples(
        "latentindigo restore holiday.jpg -o holiday-large.png",
        "latentindigo restore old-photos/ -o restored/ --recursive --scale 2 --preset faithful",
        "latentindigo restore cat.jpg -o out/ --num-samples 4 --detail-map --uncertainty-map --json",
    ),
)
def restore(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO_OR_FOLDER", help="Photos, or folders of photos.")],
    *,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Also restore folders inside folders.", rich_help_panel=INPUT)
    ] = False,
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
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE_OR_FOLDER",
            help="Where results go: a folder or, for one photo, a name ending in .png, .jpg, .webp or .tif.",
            rich_help_panel=OUTPUT,
        ),
    ],
    scale: ScaleOption = 4.0,
    size: SizeOption = None,
    crop: CropOption = False,
    detail_map: DetailMapOption = False,
    uncertainty_map: UncertaintyMapOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per photo on stdout.", rich_help_panel=OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the settings and the files that would be written.", rich_help_panel=OUTPUT
        ),
    ] = False,
) -> None:
    """Parse, plan, run; see `latentindigo restore --help`."""
    console = stderr_console()
    with short_warnings(console), exit_codes(console, ValueError=ExitCode.USAGE):
        from latentindigo import jobs
        from latentindigo.planning import plan_tasks

        settings = jobs.RestoreSettings(
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
        )
        tasks = plan_tasks(
            photos,
            out,
            recursive=recursive,
            num_samples=num_samples,
            detail_map=detail_map,
            uncertainty_map=uncertainty_map,
        )
        if dry_run:
            foreign = prior is not None and latent_inn is None
            _print_plan(jobs.resolve_settings(settings, model, foreign=foreign), tasks, as_json)
            return
        set_threads(threads)
        outcomes = _run(
            console,
            tasks,
            settings,
            lambda: jobs.load_pipeline(
                model,
                prior=prior,
                prior_config=prior_config,
                guidance_vae=guidance_vae,
                latent_inn=latent_inn,
                dtype=dtype,
                device=device,
                compiled=compiled,
                checkpointing=checkpointing,
                offload=offload,
                init_model=init_model,
            ),
            overwrite=overwrite,
            as_json=as_json,
        )
    failed = [outcome for outcome in outcomes if outcome.status != "done"]
    if any(outcome.kind in ("memory", "disk") for outcome in failed):
        raise typer.Exit(ExitCode.RESOURCES)
    if failed:
        raise typer.Exit(ExitCode.SOME_FAILED)


def _print_plan(settings: dict[str, Any], tasks: list[Task], as_json: bool) -> None:
    for task in tasks:
        files = [str(path) for path in task.files]
        if as_json:
            planned = {"input": str(task.source), "status": "planned", "files": files, "settings": settings}
            typer.echo(json.dumps(planned))
        else:
            typer.echo(printable(f"{task.source} -> {', '.join(files)}"))
    if not as_json:
        for name, value in settings.items():
            typer.echo(f"{name}: {json.dumps(value)}")


def _run(
    console: Console,
    tasks: list[Task],
    settings: RestoreSettings,
    get_pipe: Any,
    *,
    overwrite: bool,
    as_json: bool,
) -> list[Outcome]:
    """Restore with a progress bar on stderr; print each result as soon as it is there."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from latentindigo.jobs import restore_files

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    outcomes = []
    # Nothing is redirected: results belong on stdout even while the bar is on stderr.
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as bar:
        photos = bar.add_task("photos", total=len(tasks), status="")

        def on_step(task: Task, done: int) -> None:
            bar.update(photos, status=f"{printable(task.source.name)}: step {done}")

        for outcome in restore_files(get_pipe, tasks, settings, overwrite=overwrite, on_step=on_step):
            outcomes.append(outcome)
            bar.update(photos, advance=1, status="")
            bar.stop()  # Take the bar away, or the lines would be written into it where both are one terminal.
            _report(console, outcome, as_json)
            bar.start()
    done = sum(outcome.status == "done" for outcome in outcomes)
    if len(outcomes) > 1 or done < len(outcomes):
        console.print(f"{done} restored, {len(outcomes) - done} failed", markup=False)
    return outcomes


def _report(console: Console, outcome: Outcome, as_json: bool) -> None:
    if outcome.status != "done":
        console.print("failed:", style="bold red", end=" ")
        console.print(printable(f"{outcome.task.source}: {outcome.error}"), markup=False)
    if as_json:
        typer.echo(json.dumps(outcome.as_json()))
    elif outcome.status == "done":
        for path in outcome.task.files:
            echo_path(path)


app.command(
    help="Restore every photo of a folder and the folders inside it, once.\n\nA run that was stopped, or killed, goes "
    "on when it is started again: what is complete is left alone, and other settings make it anew. A photo that fails "
    "never ends the run, and is tried again at its end if that may help. A manifest lists every photo.",
    epilog=examples(
        "latentindigo batch old-photos/ restored/ --scale 2",
        "latentindigo batch photos/ restored/ --include '*.jpg' --exclude 'thumbs/**' --manifest restored/all.parquet",
        "latentindigo batch s3://album/photos s3://album/restored --engine ray --workers 4",
    ),
)(batch)


@app.command(
    help="Train one part of the model on a folder of photos.\n\nRuns on a CPU and on an accelerator; "
    "`accelerate launch -m latentindigo train ...` uses several.",
    epilog=examples(
        "latentindigo train estimator photos/ --out runs/estimator",
        "latentindigo train denoiser photos/ --recipe my-denoiser.toml --out runs/denoiser --resume",
        "latentindigo train latent-inn photos/ --out runs/latent-inn --init-from embedded --steps 2000",
        "latentindigo train latent-inn photos/ --out runs/sd --prior stable-diffusion/",
    ),
)
def train(
    part: Annotated[
        Literal["autoencoder", "denoiser", "estimator", "pixel-inn", "latent-inn"],
        typer.Argument(metavar="PART", help="Part of the model to train."),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of photos, searched with the folders inside it.",
            exists=True,
            file_okay=False,
        ),
    ],
    *,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Recipe (TOML).",
            show_default="the part's own",
            rich_help_panel=INPUT,
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Start from a model's weights: 'embedded', a folder, or a hub id.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="latent-inn only: train for the autoencoder of this latent diffusion model, a folder or a hub id.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the run folder's checkpoint, to the numbers of a run that was never stopped.",
            rich_help_panel=INPUT,
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Optimiser steps.", show_default="the recipe's", rich_help_panel=SPEED),
    ] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            file_okay=False,
            help="Run folder: checkpoint, log, curves, sample grids, final weights.",
            rich_help_panel=OUTPUT,
        ),
    ],
) -> None:
    """Train one part; see `latentindigo train --help`."""
    console = stderr_console()
    with exit_codes(console, ValueError=ExitCode.USAGE, FileNotFoundError=ExitCode.MODEL):
        from latentindigo import training

        set_threads(threads)
        final = training.train(
            part,
            data,
            recipe,
            out,
            init_from=init_from,
            resume=resume,
            overrides={} if steps is None else {"steps": steps},
            device=device,
            progress=True,
            prior=prior,
        )
    typer.echo(str(final))


app.command(
    help="Compare methods on photographs: quality, time, memory.\n\nPublished methods run on the same diffusion model. "
    "Those that must be told the damage run twice: told the truth, and told only that the photograph was made smaller. "
    "Their settings come from the model folder's rivals.json; a model without that file gets their papers' settings, "
    "some of them 1000 steps.",
    epilog=examples(
        "latentindigo benchmark photos/ -o results/ --protocol medium --protocol severe",
        "latentindigo benchmark photos/ -o results/ --method default --method latino --limit 4 --crop 128",
        "latentindigo benchmark old-photos/ -o results/ --protocol real --method default --method vivid",
        "latentindigo benchmark photos/ -o results/ --add my_method.py",
    ),
)(benchmark)


app.command(
    name="app",
    help="Serve a web page on this computer that restores photos.\n\nNothing is sent anywhere: no statistics, no "
    "fonts, no files. Photos are deleted after --keep minutes and when the page ends.",
    epilog=examples(
        "latentindigo app --open",
        "latentindigo app --port 8000 --max-pixels 8 --queue 5",
        "latentindigo app --host 0.0.0.0 --auth-file users.txt --concurrency 2 --device cuda",
    ),
)(web_app)


@app.command(
    epilog=examples("latentindigo info", "latentindigo info --memory", "latentindigo info --json --model my-model/")
)
def info(
    model: ModelOption = "embedded",
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Only print which priors fit into 4, 8, 12 and 24 GB, and how.", rich_help_panel=OUTPUT
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Print the version, the model and its hashes, devices, dtypes and optional parts."""
    if memory:
        _print_memory(as_json)
        return
    console = stderr_console()
    with short_warnings(console), exit_codes(console):
        from latentindigo import jobs
        from latentindigo.installation import describe_installation

        facts = describe_installation(model, jobs.load_pipeline)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        _print_facts(facts)
    if facts["model"]["error"] is not None:
        raise fail(console, facts["model"]["error"], ExitCode.MODEL)


def _print_memory(as_json: bool) -> None:
    from latentindigo.memory import PriorSizes, what_fits

    rows = what_fits(PriorSizes.load())
    if as_json:
        typer.echo(json.dumps({"memory": rows}, indent=1))
        return
    for line in (dict(zip(rows[0], rows[0], strict=True)), *rows):
        prior, method, *cells = line.values()
        typer.echo(f"{prior:24}{method:33}{''.join(f'{cell:19}' for cell in cells)}".rstrip())


def _print_facts(facts: dict[str, Any]) -> None:
    model = facts["model"]
    typer.echo(f"latentindigo {facts['version']}, Python {facts['python']}, {facts['platform']}")
    packages = (f"{name} {number or 'absent'}" for name, number in facts["packages"].items())
    typer.echo(f"packages: {', '.join(packages)}")
    typer.echo(f"model: {model['name']} ({model['folder'] or 'not found'})")
    typer.echo(f"hash: {model['hash'] or 'not loaded'}")
    for name, digest in model["files"].items():
        typer.echo(f"  {name}: sha256 {digest}")
    for device in facts["devices"]:
        memory = f", {device['memory_gib']} GiB" if "memory_gib" in device else ""
        typer.echo(f"device: {device['device']} ({device['name']}{memory})")
    typer.echo(f"threads: {facts['threads']}")
    typer.echo(f"dtypes: {', '.join(facts['dtypes'])}")
    optional = (f"{name} {'present' if there else 'absent'}" for name, there in facts["optional"].items())
    typer.echo(f"optional parts: {', '.join(optional)}")
