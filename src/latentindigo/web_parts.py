"""The pieces of the web page that are HTML, CSS and a few lines of script: status, comparison, maps, looks.

Every word that comes from a visitor is escaped. Pictures are named by addresses here, or held inside the page.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from latentindigo.jobs import MAP_GAIN
from latentindigo.web_jobs import Finished, Step

__all__ = [
    "ABOUT_DETAIL",
    "ABOUT_UNCERTAINTY",
    "HEAD",
    "INTRODUCTION",
    "address",
    "compare",
    "downloads",
    "failed",
    "maps",
    "step",
    "waiting",
]

INTRODUCTION = (
    "# LatentINDIGO\n\nRestores blurred, noisy, small or over-compressed photos, and shows which detail was invented. "
    "Photos stay on the computer that runs this page, and are deleted after {minutes} minutes."
)
ABOUT_DETAIL = (
    f"The brighter a place, the more structure the model supplied that the photo does not determine, right or wrong; "
    f"brightness is enlarged {MAP_GAIN:g} times."
)
ABOUT_UNCERTAINTY = (
    f"The brighter a place, the more the samples differ there; dark does not mean right, for all samples can share one "
    f"error; brightness is enlarged {MAP_GAIN:g} times."
)
EMPTY = "<p class='li-empty'>{}</p>"


def waiting(sentence: str) -> str:
    """A line that says what is going on; screen readers read it out when it changes."""
    return f"<p class='li-status' role='status' aria-live='polite'>{html.escape(sentence)}</p>"


def failed(sentence: str) -> str:
    """A failure, as one sentence that screen readers read out at once."""
    return f"<p class='li-status li-failed' role='alert'>{html.escape(sentence)}</p>"


def step(now: Step) -> tuple[str, str]:
    """What is shown after a denoiser step.

    Args:
        now: The step.

    Returns:
        The status line with its bar, and the estimate as a picture inside the page.
    """
    buffer = io.BytesIO()
    now.picture.convert("RGB").save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    line = (
        f"<p class='li-status' role='status' aria-live='off'>Step {now.done} of {now.total} "
        f"<progress max='{now.total}' value='{now.done}' aria-label='Steps done'></progress></p>"
    )
    look = (
        f"<figure class='li-figure'><img class='li-preview' src='data:image/jpeg;base64,{data}' "
        f"alt='Estimate after step {now.done} of {now.total}'>"
        f"<figcaption>Estimate after step {now.done} of {now.total}, before the finish</figcaption></figure>"
    )
    return line, look


def compare(result: Finished) -> str:
    """Photo and result in one frame, with a slider between them that mouse, finger and arrow keys move.

    Args:
        result: A restoration; with several samples there is a choice of the one that is shown.

    Returns:
        HTML.
    """
    width, height = result.output_size
    addresses = [address(path) for path in result.shown_after]
    choice = ""
    if len(addresses) > 1:
        first = result.settings["seed"]
        options = "".join(
            f"<option value='{place}'>Sample {index + 1} (seed {first + index})</option>"
            for index, place in enumerate(addresses)
        )
        choice = (
            "<label class='li-choice'>Shown sample <select onchange=\"this.closest('figure')."
            f"querySelector('.li-after').src = this.value\">{options}</select></label>"
        )
    return (
        f"<figure class='li-figure li-compare' style='--at:50%'>{choice}"
        f"<div class='li-frame' style='--ratio:{width / height:.5f}'>"
        f"<img class='li-after' src='{addresses[0]}' alt='Restored photo'>"
        f"<img class='li-before' src='{address(result.shown_before)}' alt='The photo as it was, enlarged'>"
        "<span class='li-tag li-left' aria-hidden='true'>before</span>"
        "<span class='li-tag li-right' aria-hidden='true'>after</span>"
        "<span class='li-line' aria-hidden='true'></span>"
        "<input type='range' min='0' max='100' value='50' step='1' "
        "aria-label='Before and after: how much of the photo as it was is shown, in percent from the left' "
        "oninput=\"this.closest('figure').style.setProperty('--at', this.value + '%')\"></div>"
        f"<figcaption>{result.input_size[0]} × {result.input_size[1]} → {width} × {height} pixels. "
        "Drag the line, or press the arrow keys.</figcaption></figure>"
    )


def maps(paths: Sequence[Path], name: str, absent: str = "") -> str:
    """Maps one below the other.

    Args:
        paths: Files to show.
        name: What they are, for people who do not see them.
        absent: Shown where there are none.

    Returns:
        HTML.
    """
    if not paths:
        return EMPTY.format(html.escape(absent))
    figures = []
    for index, path in enumerate(paths):
        caption = f"<figcaption>Sample {index + 1}</figcaption>" if len(paths) > 1 else ""
        figures.append(
            f"<figure class='li-figure'><img class='li-map' src='{address(path)}' "
            f"alt='{html.escape(name)}, sample {index + 1}'>{caption}</figure>"
        )
    return "".join(figures)


def downloads(result: Finished) -> str:
    """Links to every file of a restoration, by what they are.

    Args:
        result: The restoration.

    Returns:
        HTML.
    """
    several = len(result.pictures) > 1
    numbers = [f", sample {index + 1}" if several else "" for index in range(len(result.pictures))]
    rows = [(f"Restored photo{number}", path) for number, path in zip(numbers, result.pictures, strict=True)]
    rows += [
        (f"Map of invented detail{number}", path) for number, path in zip(numbers, result.detail_maps, strict=False)
    ]
    rows += [] if result.uncertainty is None else [("Map of uncertainty", result.uncertainty)]
    items = "".join(
        f"<li><a href='{address(path)}' download='{html.escape(path.name, quote=True)}'>{what}</a> "
        f"<span>{path.suffix[1:].upper()}, {max(1, round(path.stat().st_size / 1000))} kB</span></li>"
        for what, path in rows
    )
    return f"<section class='li-downloads' aria-label='Download'><h2>Download</h2><ul>{items}</ul></section>"


def address(path: Path) -> str:
    """Where the page finds a file of the temporary folder; relative, so that it holds behind a proxy too."""
    return f"gradio_api/file={quote(path.as_posix())}"  # Nothing is left in it that HTML would have to escape.


_CSS = """
.gradio-container, .gradio-container .main { min-width: 0 !important; width: 100% !important; box-sizing: border-box; }
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; overflow-x: clip; }
.gradio-container h1 { font-size: 1.7rem; margin: .2rem 0 .3rem; }
.gradio-container :is(a, button, input, select, textarea, summary, [tabindex]):focus-visible {
  outline: 3px solid #4f46e5 !important; outline-offset: 2px !important; }
.dark .gradio-container :is(a, button, input, select, textarea, summary, [tabindex]):focus-visible,
.dark :focus-visible { outline-color: #a5b4fc !important; }
.li-status { margin: 0; padding: .55rem .75rem; border-radius: 8px; min-height: 1.4em;
  background: var(--background-fill-secondary); color: var(--body-text-color); }
.li-status progress { width: 100%; height: .6rem; display: block; margin-top: .35rem; appearance: none; border: 0;
  border-radius: 99px; overflow: hidden; background: #cbd5e1; }
.li-status progress::-webkit-progress-bar { background: #cbd5e1; }
.li-status progress::-webkit-progress-value { background: #4f46e5; transition: width .2s; }
.li-status progress::-moz-progress-bar { background: #4f46e5; }
.li-failed { background: #fef2f2; color: #991b1b; border: 1px solid #dc2626; }
.dark .li-failed { background: #450a0a; color: #fecaca; }
.li-empty { padding: 3.5rem 1rem; text-align: center; color: var(--body-text-color); opacity: .85;
  border: 1px dashed var(--border-color-primary); border-radius: 8px; }
.li-figure { margin: 0 0 .75rem; }
.li-figure figcaption { font-size: .9rem; margin-top: .4rem; color: var(--body-text-color); }
.li-figure img { margin: 0; }
.li-preview, .li-map { display: block; width: auto; max-width: 100%; max-height: 70vh; border-radius: 8px; }
.li-preview, .li-map { min-width: min(100%, 640px); object-fit: contain; object-position: left; }
.li-choice { display: flex; gap: .5rem; align-items: center; margin-bottom: .5rem; color: var(--body-text-color); }
.li-choice select { padding: .35rem .5rem; border-radius: 6px; border: 1px solid var(--border-color-primary);
  background: var(--input-background-fill); color: var(--body-text-color); }
.li-frame { position: relative; overflow: hidden; border-radius: 8px; margin: 0 auto;
  width: min(100%, calc(70vh * var(--ratio))); aspect-ratio: var(--ratio); background: #8884; }
.li-frame img { position: absolute; inset: 0; width: 100%; height: 100%; max-width: none; object-fit: fill; }
.li-before { clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.li-line { position: absolute; top: 0; bottom: 0; left: var(--at); width: 3px; margin-left: -1.5px; background: #fff;
  box-shadow: 0 0 4px #000; pointer-events: none; }
.li-line::after { content: '◂ ▸'; position: absolute; top: 50%; left: 50%; transform: translate(-50%, -50%);
  width: 2.5rem; height: 2.5rem; line-height: 2.5rem; text-align: center; border-radius: 50%; white-space: nowrap;
  font-size: .95rem; background: #fff; color: #111827; box-shadow: 0 0 4px #000; }
.li-frame input[type=range] { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; touch-action: pan-y; }
.li-frame:focus-within { outline: 3px solid #4f46e5; outline-offset: 2px; }
.li-tag { position: absolute; top: .5rem; padding: .1rem .5rem; border-radius: 4px; background: #000a;
  color: #fff !important;   font-size: .85rem; pointer-events: none; }
.li-left { left: .5rem; } .li-right { right: .5rem; }
.li-downloads { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem .9rem; }
.li-downloads h2 { font-size: 1rem !important; margin: 0 0 .3rem !important; }
.li-downloads ul { list-style: none !important; margin: 0 !important; padding: 0 !important; }
.li-downloads li { margin: 0 !important; padding: .3rem 0 !important;
  display: flex; gap: 1rem; justify-content: space-between; }
.li-downloads a { color: var(--link-text-color); text-decoration: underline; }
.li-downloads span { white-space: nowrap; color: var(--body-text-color-subdued); }
.gradio-container .html-container { padding: 0 !important; }
#examples-label { margin-bottom: -.6rem; font-size: .9rem; }
#examples { gap: .5rem; } #examples button { min-width: 0; padding-inline: .25rem; }
footer { display: none !important; }
.dark .gradio-container [role=tab][aria-selected=true] { color: #a5b4fc !important; }
@media (max-width: 640px) {
  .gradio-container .main { padding: .5rem !important; }
  .gradio-container .tab-container button { padding: 0 .5rem !important; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""

# In the head, not by Gradio's parameter for styles, which loses what stands inside media queries. The language is set
# where browsers and screen readers look for it.
HEAD = (
    "<meta name='description' content='Restores photos and shows which detail was invented.'>"
    f"<style>{_CSS}</style><script>document.documentElement.lang = 'en';</script>"
)
