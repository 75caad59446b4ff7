"""One benchmark from a folder of photographs to a report: protocols, contenders, controls, result file, tables, plots.

    run_contest(pipe, ContestSettings(photos, protocols=("medium", "severe"), methods=("bicubic", "default", "psld")))

A protocol is one of the standard degradations, applied to the photographs of the folder, or `real`, which takes them as
they are and has no reference. Each is frozen, named and versioned; results compare only where both agree.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentindigo.comparison import (
    Contender,
    Measured,
    compare,
    compared_to,
    controls_beside,
    summary_of,
    unreferenced_pairs,
)
from latentindigo.degradations import STANDARD
from latentindigo.evaluation import Pair, Protocol, Row, make_pairs, write_results
from latentindigo.pipeline import RestorationPipeline
from latentindigo.quality import Niqe
from latentindigo.report import image_grid, plot_quality, tables
from latentindigo.roster import NAMES, load_method, recruit, told_truth

__all__ = ["PROTOCOLS", "REAL", "ContestSettings", "protocol_named", "run_contest"]

REAL = "real"
PROTOCOLS = (*STANDARD, REAL)
PROTOCOL_VERSION = 1
_SHOWN_ROWS = 4


@dataclass(frozen=True)
class ContestSettings:
    """What is compared on what.

    Attributes:
        photos: Folder of photographs.
        protocols: From `PROTOCOLS`.
        methods: From `roster.NAMES`.
        method_files: Python files with more methods, see `roster.load_method`.
        rivals: Settings of the rivals, see `roster.load_settings`.
        references: (method, variant) of those that all others are compared with, pair by pair.
        controls: Whether `grain` and `unsharp` stand beside the presets default and vivid.
        limit: The first N photographs only.
        crop: Side of the centre crop; None = whole photographs.
        seed: Seed of the degradations.
    """

    photos: Path
    protocols: Sequence[str] = ("medium",)
    methods: Sequence[str] = NAMES
    method_files: Sequence[Path] = ()
    rivals: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    references: Sequence[tuple[str, str]] = (("latentindigo", "default"), ("latentindigo", "fidelity 0.6"))
    controls: bool = True
    limit: int | None = None
    crop: int | None = None
    seed: int = 0


def protocol_named(
    name: str, images: str, limit: int | None = None, crop: int | None = None, seed: int = 0
) -> Protocol:
    """A protocol by its name.

    Args:
        name: From `PROTOCOLS`; `real` restores at scale 4.
        images: Name of the set of images, never a path.
        limit: The first N images only.
        crop: Side of the centre crop.
        seed: Seed of the degradations.

    Returns:
        The protocol.

    Raises:
        ValueError: If there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    scale = 4 if name == REAL else STANDARD[name].scale
    degradation = "unknown" if name == REAL else name
    return Protocol(name, degradation, scale, images, seed, crop, limit, PROTOCOL_VERSION)


def run_contest(
    pipe: RestorationPipeline,
    settings: ContestSettings,
    target: Path,
    on_image: Callable[[Protocol, int, int, Contender, Row], None] | None = None,
) -> dict[str, Any]:
    """Run a benchmark and write its files; the result file is written anew after each protocol.

    Args:
        pipe: Our pipeline; rivals sample with its prior.
        settings: What is compared on what.
        target: Result file `<date>-<suite>.json`, or `<suite>.json`. Under the same name come `.md`, `.png`, and
            `-<protocol>.png` beside it.
        on_image: Called after each restoration with the protocol, the image's place, the number of images, the
            contender and the row.

    Returns:
        The decoded result file.

    Raises:
        ValueError: For unknown protocols or methods, an empty folder, or a method that breaks its contract.
        NoMatplotlibError: After everything else was written, if Matplotlib is missing.
    """
    protocols = [
        protocol_named(name, settings.photos.name, settings.limit, settings.crop, settings.seed)
        for name in settings.protocols
    ]
    rows: list[Row] = []
    summary: list[dict[str, Any]] = []
    used: dict[str, Any] = {}
    suite = re.sub(r"^\d{4}-\d{2}-\d{2}-", "", target.stem)
    target.parent.mkdir(parents=True, exist_ok=True)
    for protocol in protocols:
        pairs, measured = _run_protocol(pipe, settings, protocol, on_image)
        entries = [summary_of(m, pairs) for m in measured]
        for reference in settings.references:
            _compare_with_reference(reference, measured, entries)
        rows += [row for m in measured for row in m.rows]
        summary += entries
        used |= {f"{protocol.name}: {' '.join(m.contender.key)}": _settings_of(m.contender) for m in measured}
        done = protocols[: protocols.index(protocol) + 1]
        write_results(target, suite, done, rows, summary, pipe=pipe, settings=used)
        _save_grid(target.with_name(f"{target.stem}-{protocol.name}.png"), measured, pairs)
    result = json.loads(target.read_text())
    target.with_suffix(".md").write_text(tables(result))
    if any("psnr" in entry for entry in summary):
        plot_quality(result, target.with_suffix(".png"))
    return result


def _run_protocol(
    pipe: RestorationPipeline,
    settings: ContestSettings,
    protocol: Protocol,
    on_image: Callable[[Protocol, int, int, Contender, Row], None] | None,
) -> tuple[list[Pair], list[Measured]]:
    pairs = (
        unreferenced_pairs(settings.photos, settings.limit)
        if protocol.name == REAL
        else make_pairs(settings.photos, protocol)
    )
    contenders = recruit(settings.methods, pipe, protocol.degradation, protocol.scale, settings.rivals)
    contenders += [load_method(path, pipe) for path in settings.method_files]
    truth = told_truth(protocol.degradation)
    operator, niqe = truth and truth[0], Niqe.shipped()

    def shown(k: int, contender: Contender, row: Row) -> None:
        if on_image is not None:
            on_image(protocol, k, len(pairs), contender, row)

    measured = compare(contenders, protocol, pairs, operator=operator, niqe=niqe, on_image=shown)
    present = {m.contender.key for m in measured}
    like = [key for key in (("latentindigo", "default"), ("latentindigo", "vivid")) if key in present]
    # At scale 1 there is no lost band that grain could stand for.
    if settings.controls and protocol.scale > 1 and protocol.name != REAL:
        measured += controls_beside(measured, pairs, like=like, operator=operator, niqe=niqe)
    return pairs, measured


def _compare_with_reference(
    key: tuple[str, str], measured: Sequence[Measured], entries: Sequence[dict[str, Any]]
) -> None:
    """Add "<measure>_minus_<reference>" to every entry: its own minus the reference's, paired."""
    reference = next((m for m in measured if m.contender.key == key), None)
    if reference is None:
        return
    for m, entry in zip(measured, entries, strict=True):
        if m is not reference:
            found = compared_to(m, reference)
            entry |= {f"{name}_minus_{key[1] or key[0]}": interval._asdict() for name, interval in found.items()}


def _settings_of(contender: Contender) -> dict[str, Any]:
    restorer = contender.restorer
    if dataclasses.is_dataclass(restorer):
        return {f.name: getattr(restorer, f.name) for f in dataclasses.fields(restorer)}
    return dict(getattr(restorer, "settings", {}))


def _save_grid(path: Path, measured: Sequence[Measured], pairs: Sequence[Pair]) -> None:
    """The first images, clean beside every contender; controls are left out."""
    shown = [m for m in measured if " on " not in m.contender.method]
    columns = {
        f"{m.contender.method} {m.contender.variant}".strip(): [x.float() / 255 for x in m.images[:_SHOWN_ROWS]]
        for m in shown
    }
    if pairs[0].clean.numel():
        columns = {"clean": [pair.clean for pair in pairs[:_SHOWN_ROWS]]} | columns
    image_grid(columns).save(path)
