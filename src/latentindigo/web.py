"""The web page: Gradio's components, what they call, and the server around them.

The page has no logic of its own. It turns fields into a `RestoreSettings`, follows `web_jobs.Studio`, and shows what
that tells. Every request passes `web_guard.Guard` first.

Gradio is imported here and nowhere else, and late: its import takes seconds and reads the environment, which has to be
set before. It would send usage statistics, look up its newest version and fetch fonts; all of that is switched off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from latentindigo import web_parts
from latentindigo.jobs import Restorer, RestoreSettings, resolve_settings
from latentindigo.web_guard import Guard, Listeners, Tickets
from latentindigo.web_jobs import FORMATS, Finished, Limits, RefusedError, StoppedError, Studio, TemporaryFolder

__all__ = ["PageSettings", "make_app", "serve"]

_QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
_PRESETS = [("Faithful", "faithful"), ("Default", "default"), ("Vivid", "vivid"), ("By the slider", "slider")]
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
_SECONDS_TO_END = 3


@dataclasses.dataclass(frozen=True)
class PageSettings:
    """How the page is served; the options of `latentindigo app`.

    Attributes:
        host: Address to listen at.
        port: Port; 0 takes a free one.
        auth: (user, password) that visitors must know, or None.
        queue: Photos that may wait; more are refused politely.
        concurrency: Photos restored at the same time.
        limits: How much one visitor may ask for.
        open_browser: Open the page once it is there.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    auth: tuple[str, str] | None = None
    queue: int = 20
    concurrency: int = 1
    limits: Limits = dataclasses.field(default_factory=Limits)
    open_browser: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: expected 0 to 65535, got {self.port}")
        for name in ("queue", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.auth is not None and not all(self.auth):
            raise ValueError("auth: expected USER:PASSWORD, both of at least one character")

    @property
    def is_local(self) -> bool:
        """Whether only programs on this computer can reach the page."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


# ------------------------------------------------------------------------------------------------------------- serving


def serve(
    load: Callable[[], Restorer],
    settings: PageSettings,
    *,
    model: str = "embedded",
    foreign: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until the process is told to stop; then everything temporary is deleted.

    Args:
        load: Gives the pipeline.
        settings: Where and how.
        model: "embedded", a folder, or a hub id; its presets tell how many steps there will be.
        foreign: Whether a prior without a latent INN samples.
        on_ready: Called with the page's address once it can be opened.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: The address cannot be listened at.
        ModelLoadError: The model cannot be loaded.
    """
    with _ending_orderly(), _listening(settings) as listener, TemporaryFolder(settings.limits) as folder:
        _import_gradio(folder.path)
        import uvicorn

        studio = make_studio(load(), folder, settings, model=model, foreign=foreign)
        app = make_app(studio, settings)

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started and on_ready is not None:
                    on_ready(_address(settings, listener))
                if self.started and settings.open_browser:
                    webbrowser.open(_address(settings, listener))

        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_SECONDS_TO_END,
        )
        try:
            with contextlib.suppress(KeyboardInterrupt):
                Server(config).run(sockets=[listener])
        finally:
            studio.close()


@contextlib.contextmanager
def _ending_orderly() -> Iterator[None]:
    """Let SIGTERM unwind what is open, from before the model is loaded.

    uvicorn ends its loop at a signal and then raises the signal again, to the handler that was there before. The one of
    the operating system would end the process before anything is cleaned up.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _listening(settings: PageSettings) -> Iterator[socket.socket]:
    """A socket at the address, open from the start: a taken port is known before the model is loaded."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=256)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot listen at {settings.host}, port {settings.port} ({reason}); give another --port, 0 for a free one"
        ) from error
    with listener:
        yield listener


def _address(settings: PageSettings, listener: socket.socket) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http://{host}:{listener.getsockname()[1]}/"


def make_studio(
    pipe: Restorer,
    folder: TemporaryFolder,
    settings: PageSettings,
    *,
    model: str = "embedded",
    foreign: bool = False,
) -> Studio:
    """Put a pipeline to work for the page.

    Args:
        pipe: The pipeline.
        folder: Where files go.
        settings: How the page is served.
        model: Whose presets tell how many steps there will be.
        foreign: Whether a prior without a latent INN samples.

    Returns:
        The studio.
    """
    from latentindigo.preview import preview

    prior: Any = getattr(pipe, "prior", None)
    return Studio(
        pipe,
        folder,
        settings.limits,
        concurrency=settings.concurrency,
        steps_of=lambda wish: int(resolve_settings(wish, model, foreign=foreign)["steps"]),
        preview=lambda z0, size: preview(prior, z0, size),
    )


def make_app(studio: Studio, settings: PageSettings) -> Guard:
    """Build the page and its server application.

    Args:
        studio: Restores.
        settings: How the page is served.

    Returns:
        An ASGI application.

    Raises:
        ImportError: Gradio is not installed.
    """
    gr = _import_gradio(studio.folder.path)
    import fastapi

    examples = _copy_examples(studio.folder.kept)
    listeners = Listeners()
    page = _build_page(gr, studio, settings, examples, listeners)
    page.queue(max_size=settings.queue, default_concurrency_limit=settings.concurrency)
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        server_name=settings.host,
        server_port=settings.port,
        footer_links=[],
        run_history=False,
        auth=settings.auth,
        allowed_paths=[],
        show_error=True,
        max_file_size=settings.limits.upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(gr),
        head=web_parts.HEAD,
    )
    tickets = Tickets(str(path) for path in examples.values())
    return Guard(
        app,
        folder=studio.folder.path,
        upload_bytes=settings.limits.upload_bytes,
        tickets=tickets,
        listeners=listeners,
        locked=settings.auth is not None,
        # A proxy in front may well use another name; who lets others in sets a password.
        local=settings.auth is None and settings.is_local,
    )


def _theme(gr: Any) -> Any:
    """Fonts of the visitor's own system, and small print that has enough contrast (4.5 : 1) in both colour schemes."""
    quiet = dict.fromkeys(
        ("body_text_color_subdued", "block_info_text_color", "block_label_text_color"), "*neutral_600"
    )
    quiet |= dict.fromkeys(("block_title_text_color", "input_placeholder_color"), "*neutral_600")
    dark = {f"{name}_dark": "*neutral_300" for name in quiet}
    strong = {"button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700"}
    strong |= {f"{name}_dark": value for name, value in strong.items()}
    strong |= {"color_accent": "*primary_600", "slider_color": "*primary_600"}
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=_FONTS, font_mono=_MONO)
    return theme.set(**quiet, **dark, **strong)


def _import_gradio(folder: Path) -> Any:
    """Gradio, which must not phone home, and must keep its files in a folder that goes with this page."""
    os.environ.update(_QUIET, GRADIO_TEMP_DIR=str(folder))
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f"the web page needs Gradio ({error}); install it: pip install 'latentindigo[app]'"
        ) from error
    return gradio


def _copy_examples(folder: Path) -> dict[str, Path]:
    """The demo's photos, inside the folder that may be served; name -> path."""
    packaged = Path(__file__).parent / "photos"
    source = packaged if packaged.is_dir() else Path(__file__).parents[2] / "examples" / "photos"
    copies = {}
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, folder / path.name)
        copies[path.stem] = folder / path.name
    return copies


# ------------------------------------------------------------------------------------------------------------ the page


def _reading(gr: Any, folder: Path) -> Callable[[Any], tuple[bytes, str] | None]:
    """What the photo's field hands on: the bytes of the file, untouched, and its name.

    Gradio's image component would decode the file and write it again, without its profile and its 16 bits.
    """

    def read(payload: Any) -> tuple[bytes, str] | None:
        if payload is None or not payload.path:
            return None
        path = Path(payload.path).resolve()
        # The guard let it pass; this is the second lock on the same door.
        if not path.is_relative_to(folder):
            raise gr.Error("That file was not uploaded to this page.", print_exception=False)
        try:
            return path.read_bytes(), payload.orig_name or path.name
        except OSError:
            raise gr.Error(
                "The photo was deleted from this server meanwhile; upload it again.", print_exception=False
            ) from None

    return read


def _build_page(
    gr: Any, studio: Studio, settings: PageSettings, examples: dict[str, Path], listeners: Listeners
) -> Any:
    minutes = f"{settings.limits.keep_seconds / 60:g}"
    with gr.Blocks(title="LatentINDIGO", analytics_enabled=False) as page:
        gr.Markdown(web_parts.INTRODUCTION.format(minutes=minutes))
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                photo, fields = _build_form(gr, studio.folder.path, examples)
                with gr.Row():
                    start = gr.Button("Restore", variant="primary", elem_id="start")
                    cancel = gr.Button("Cancel", elem_id="cancel")
            with gr.Column(scale=7, min_width=300):
                status = gr.HTML(web_parts.waiting("Choose a photo, then press Restore."), elem_id="status")
                with gr.Tabs(overflow_behavior="wrap"):
                    with gr.Tab("Result"):
                        view = gr.HTML(
                            web_parts.maps((), "", "The result appears here, beside the photo as it was."),
                            elem_id="view",
                        )
                    with gr.Tab("Invented detail"):
                        gr.Markdown(web_parts.ABOUT_DETAIL)
                        detail = gr.HTML(web_parts.maps((), "", "This map comes with the result."), elem_id="detail")
                    with gr.Tab("Uncertainty"):
                        gr.Markdown(web_parts.ABOUT_UNCERTAINTY)
                        spread = gr.HTML(
                            web_parts.maps((), "", "This map comes with 2 or more samples."), elem_id="uncertainty"
                        )
                files = gr.HTML("", elem_id="files")
        shown = [status, view, detail, spread, files]
        run = start.click(
            _page_call(gr, studio, listeners),
            inputs=[photo, *fields],
            outputs=shown,
            api_name="page",
            api_visibility="private",
            concurrency_id="restore",
            concurrency_limit=settings.concurrency,
            show_progress="minimal",
            show_progress_on=status,
        )
        cancel.click(fn=None, cancels=[run])
        cancel.click(fn=None, js=f"() => {json.dumps(web_parts.waiting('Cancelled.'))}", outputs=status)
        _build_api(gr, studio, settings, [photo, *fields])

        def leave(request: Any) -> None:
            studio.leave(request.session_hash)

        # Closed tabs and clients that ended: their connection that says "still here" breaks.
        page.unload(_asking_who(gr, leave))
    return page


def _build_form(gr: Any, folder: Path, examples: dict[str, Path]) -> tuple[Any, list[Any]]:
    """The photo's place, the examples and the settings; the settings in the order of `_wish`'s arguments."""
    photo = gr.Image(
        label="Photo",
        type="filepath",
        sources=["upload", "clipboard"],
        height=240,
        buttons=[],
        elem_id="photo",
        alt_text="The photo to restore",
        placeholder="Drop a photo here\n- or -\nclick to choose one",
    )
    # Not a class of our own: Gradio would write a file of type hints beside its source.
    photo.preprocess = _reading(gr, folder)
    gr.Markdown("Examples", elem_id="examples-label")
    with gr.Row(elem_id="examples"):
        for name, path in examples.items():
            # The page fills its own field: no call to the server, and no path but this one.
            value: dict[str, Any] = {
                "path": str(path),
                "url": web_parts.address(path),
                "orig_name": path.name,
            }
            value["meta"] = {"_type": "gradio.FileData"}
            button = gr.Button(name.capitalize(), size="sm", min_width=60)
            button.click(fn=None, js=f"() => ({json.dumps(value)})", outputs=photo)
    scale = gr.Slider(1, 16, value=4, step=0.5, label="Scale", info="Output size over input size")
    preset = gr.Radio(
        _PRESETS, value="default", label="Preset", info="How far to trust the photo, and how far the model"
    )
    fidelity = gr.Slider(0, 1, value=0.5, step=0.05, label="Fidelity", info="0 = vivid, 1 = faithful")
    fidelity.input(fn=None, js="() => 'slider'", outputs=preset)
    with gr.Row():
        seed = gr.Number(value=0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, min_width=90)
        samples = gr.Slider(1, 8, value=1, step=1, label="Samples", min_width=120)
    with gr.Accordion("Size in pixels, file format", open=False):
        with gr.Row():
            width = gr.Number(0, label="Width, 0 = by scale", precision=0, minimum=0, maximum=65535, min_width=90)
            height = gr.Number(0, label="Height, 0 = by scale", precision=0, minimum=0, maximum=65535, min_width=90)
        crop = gr.Checkbox(label="Cut to this size", info="Otherwise the photo fits inside and keeps its aspect")
        form = gr.Dropdown(list(FORMATS), value="as the photo", label="Format of the result")
    return photo, [scale, width, height, crop, preset, fidelity, seed, samples, form]


def _wish(
    scale: float,
    width: int | None,
    height: int | None,
    crop: bool,
    preset: str,
    fidelity: float,
    seed: int | None,
    samples: int,
) -> RestoreSettings:
    """The page's fields as settings; what does not fit is refused in one sentence."""
    if bool(width) != bool(height):
        raise RefusedError("A size needs a width and a height; give both, or set both to 0 to use the scale.")
    size = (int(width), int(height)) if width and height else None
    by_slider = preset == "slider"
    try:
        return RestoreSettings(
            scale=float(scale),
            size=size,
            crop=bool(crop) and size is not None,
            preset="default" if by_slider else preset,
            fidelity=float(fidelity) if by_slider else None,
            num_samples=int(samples),
            seed=int(seed or 0),
        )
    except ValueError as error:
        raise RefusedError(f"{error}.") from error


def _page_call(gr: Any, studio: Studio, listeners: Listeners) -> Callable[..., AsyncIterator[tuple[Any, ...]]]:
    """What the button does: status, view, map of detail, map of uncertainty, files, again and again."""

    async def restore(
        photo: tuple[bytes, str] | None,
        scale: float,
        width: int | None,
        height: int | None,
        crop: bool,
        preset: str,
        fidelity: float,
        seed: int | None,
        num_samples: int,
        format: str,  # noqa: A002  (the name that clients write)
        request: Any,
    ) -> AsyncIterator[tuple[Any, ...]]:
        same, no_files = gr.skip(), ""
        data, name = photo or (None, "")
        try:
            wish = _wish(scale, width, height, crop, preset, fidelity, seed, num_samples)
            yield web_parts.waiting("Reading the photo …"), same, same, same, no_files
            async with contextlib.aclosing(
                studio.follow(data, name, wish, FORMATS.get(format, ""), request.session_hash)
            ) as steps:
                async for now in steps:
                    if isinstance(now, Finished):
                        yield _shown(now)
                    # Pictures that nobody fetches would fill the server's memory.
                    elif request.session_hash in listeners:
                        yield (*web_parts.step(now), same, same, same)
        except RefusedError as refusal:
            yield web_parts.failed(str(refusal)), same, same, same, no_files
        except StoppedError:
            yield web_parts.waiting("Cancelled."), same, same, same, no_files

    return _asking_who(gr, restore)


def _asking_who(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell Gradio which parameter is the request; it reads that from the type, which is not known before its import."""
    function.__annotations__["request"] = gr.Request
    return function


def _shown(result: Finished) -> tuple[str, str, str, str, str]:
    """Status, comparison, map of detail, map of uncertainty, files to download."""
    notes = " ".join(("", *result.notes))
    few = "" if result.shown_uncertainty else "Take 2 or more samples for this map."
    spread = () if result.shown_uncertainty is None else (result.shown_uncertainty,)
    return (
        web_parts.waiting(f"Done in {result.seconds:.1f} s.{notes}"),
        web_parts.compare(result),
        web_parts.maps(result.shown_details, "Map of invented detail"),
        web_parts.maps(spread, "Map of uncertainty", few),
        web_parts.downloads(result),
    )


def _build_api(gr: Any, studio: Studio, settings: PageSettings, inputs: list[Any]) -> None:
    """The same restoration for programs: `client.predict(photo, ..., api_name="/restore")`."""

    async def restore(
        photo: tuple[bytes, str] | None,
        scale: float,
        width: int | None,
        height: int | None,
        crop: bool,
        preset: str,
        fidelity: float,
        seed: int | None,
        num_samples: int,
        format: str,  # noqa: A002  (the name that clients write)
        request: Any,
    ) -> tuple[list[str], list[str], str | None, dict[str, Any]]:
        """Restore one photo.

        Returns:
            Restored pictures, maps of invented detail, map of uncertainty or None, and the settings used.
        """
        data, name = photo or (None, "")
        finished = None
        try:
            wish = _wish(scale, width, height, crop, preset, fidelity, seed, num_samples)
            async with contextlib.aclosing(
                studio.follow(data, name, wish, FORMATS.get(format, ""), request.session_hash)
            ) as steps:
                async for now in steps:
                    finished = now if isinstance(now, Finished) else finished
        except (RefusedError, StoppedError) as refusal:
            raise gr.Error(str(refusal) or "Cancelled.", print_exception=False) from None
        if finished is None:
            raise gr.Error("Cancelled.", print_exception=False)
        return (
            [str(path) for path in finished.pictures],
            [str(path) for path in finished.detail_maps],
            None if finished.uncertainty is None else str(finished.uncertainty),
            finished.settings,
        )

    with gr.Row(visible=False):
        pictures = gr.File(file_count="multiple", label="Restored pictures")
        details = gr.File(file_count="multiple", label="Maps of invented detail")
        spread = gr.File(label="Map of uncertainty")
        used = gr.JSON(label="Settings used")
        call = gr.Button("restore")
    call.click(
        _asking_who(gr, restore),
        inputs=inputs,
        outputs=[pictures, details, spread, used],
        api_name="restore",
        concurrency_id="restore",
        concurrency_limit=settings.concurrency,
    )
