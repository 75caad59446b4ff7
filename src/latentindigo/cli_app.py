"""The command `latentindigo app`: the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentindigo.cli_options import (
    DtypeOption,
    GuidanceVaeOption,
    LatentInnOption,
    PriorConfigOption,
    PriorOption,
)
from latentindigo.command import (
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

__all__ = ["web_app"]

_SERVER, _LIMITS = "Server", "Limits"


def web_app(
    *,
    model: ModelOption = "embedded",
    prior: PriorOption = None,
    prior_config: PriorConfigOption = None,
    guidance_vae: GuidanceVaeOption = None,
    latent_inn: LatentInnOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    concurrency: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=64,
            help="Photos restored at the same time; each needs memory of its own.",
            rich_help_panel=SPEED,
        ),
    ] = 1,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen at; 0.0.0.0 lets other computers in, which wants --auth.",
            rich_help_panel=_SERVER,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=_SERVER),
    ] = 7860,
    auth: Annotated[
        str | None,
        typer.Option(
            metavar="USER:PASSWORD",
            envvar="LATENTINDIGO_AUTH",
            help="Ask visitors for these; other users of this computer can see it in the list of processes, so better "
            "set LATENTINDIGO_AUTH or give --auth-file.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    auth_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="File whose first line is USER:PASSWORD.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in a browser.", rich_help_panel=_SERVER)
    ] = False,
    queue: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=10_000, help="Photos that may wait; more are refused.", rich_help_panel=_LIMITS
        ),
    ] = 20,
    max_upload: Annotated[
        float,
        typer.Option(metavar="MB", min=0.01, max=10_000, help="Largest file.", rich_help_panel=_LIMITS),
    ] = 50.0,
    max_pixels: Annotated[
        float,
        typer.Option(
            metavar="MEGAPIXELS",
            min=0.001,
            max=10_000,
            help="Most pixels of a photo, and of all results of one restoration together.",
            rich_help_panel=_LIMITS,
        ),
    ] = 24.0,
    keep: Annotated[
        float,
        typer.Option(
            metavar="MINUTES",
            min=0.1,
            max=100_000,
            help="Age at which uploads and results are deleted.",
            rich_help_panel=_LIMITS,
        ),
    ] = 30.0,
) -> None:
    """Serve the page; see `latentindigo app --help`."""
    console = stderr_console()
    with short_warnings(console), exit_codes(console, ValueError=ExitCode.USAGE):
        from latentindigo import jobs
        from latentindigo.web import PageSettings, serve
        from latentindigo.web_jobs import Limits

        settings = PageSettings(
            host=host,
            port=port,
            auth=_credentials(auth, auth_file),
            queue=queue,
            concurrency=concurrency,
            limits=Limits(
                upload_bytes=round(max_upload * 2**20), pixels=round(max_pixels * 1e6), keep_seconds=keep * 60
            ),
            open_browser=open_browser,
        )
        if not settings.is_local and settings.auth is None:
            console.print("warning:", style="yellow", end=" ")
            console.print(f"everybody who can reach {host} can use this page; --auth asks for a password", markup=False)
        set_threads(threads)
        serve(
            lambda: jobs.load_pipeline(
                model,
                prior=prior,
                prior_config=prior_config,
                guidance_vae=guidance_vae,
                latent_inn=latent_inn,
                dtype=dtype,
                device=device,
            ),
            settings,
            model=model,
            foreign=prior is not None and latent_inn is None,
            on_ready=lambda address: typer.echo(f"{address}  (press Ctrl+C to stop)"),
        )


def _credentials(auth: str | None, auth_file: Path | None) -> tuple[str, str] | None:
    """User and password from an option, the environment or a file."""
    if auth_file is not None:
        lines = auth_file.read_text(encoding="utf-8").splitlines()
        auth = lines[0] if lines else ""
    if auth is None:
        return None
    user, colon, password = auth.strip().partition(":")
    if not (colon and user and password):
        raise ValueError("auth: expected USER:PASSWORD, both of at least one character")
    return user, password
