"""Comparing restorers side by side: one process, every method on the same pixels, in an order that turns.

`evaluation` measures one method; here methods meet. Image k is restored by all of them before image k + 1, beginning
with another one each time, so that a machine which slows down, or heats up, slows all alike.

| word | meaning |
| --- | --- |
| contender | a restorer with its place in the table: method, variant |
| told | what a method knows of the degradation: "blind", the true operator, or only "bicubic" |
| `extra_mb` | peak memory during the call above what the process held before it, the model included |
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from latentindigo.baselines import Pipeline, Restorer
from latentindigo.controls import CONTROLS, matched
from latentindigo.evaluation import (
    Interval,
    Pair,
    Protocol,
    Restored,
    Row,
    SwdParts,
    bootstrap_interval,
    make_row,
    measure,
    paired_difference,
    peak_mb,
    ratio_of_sums,
    reset_peak,
    swd_difference,
    swd_interval,
    swd_parts,
)
from latentindigo.images import list_images, load_image
from latentindigo.metrics import gradient_energy, round8
from latentindigo.operators import Operator
from latentindigo.prior import Calls, LatentPrior
from latentindigo.quality import MS_SSIM_MIN_SIDE, Niqe, consistency, gmsd, ms_ssim

__all__ = [
    "COMPARED",
    "Contender",
    "Measured",
    "compare",
    "compared_to",
    "controls_beside",
    "release_memory",
    "summary_of",
    "unreferenced_pairs",
]

COMPARED = ("ms_ssim", "gmsd", "niqe", "consistency")
"""Per-image measures beside those of `evaluation.METRICS`."""
_SWD_SIDE = 25


@dataclass(frozen=True)
class Contender:
    """A restorer and its place in the table.

    Attributes:
        method: Name of the method.
        variant: What it was told or how it was set; "" if there is one only.
        restorer: Restores a batch, see `baselines.Restorer`.
    """

    method: str
    variant: str
    restorer: Restorer

    @property
    def key(self) -> tuple[str, str]:
        """(method, variant)."""
        return self.method, self.variant


@dataclass(frozen=True)
class Measured:
    """What one contender did under one protocol.

    Attributes:
        contender: Who.
        protocol: On what.
        rows: One per image.
        images: Its images as 8-bit files would hold them.
        swd: Distance of all images, see `evaluation.swd_parts`; None without clean images, or where one is too small.
    """

    contender: Contender
    protocol: Protocol
    rows: list[Row]
    images: list[UInt8[Tensor, "3 h w"]]
    swd: SwdParts | None


def unreferenced_pairs(folder: Path, count: int | None = None) -> list[Pair]:
    """The photographs of a folder as they are: nothing is degraded, and nothing clean is known.

    Args:
        folder: Folder of photographs, searched with the folders inside it.
        count: The first N only.

    Returns:
        Pairs whose `clean` is empty, (3, 0, 0).

    Raises:
        ValueError: If there is no image.
    """
    names = [path.relative_to(folder).as_posix() for path in list_images(folder, recursive=True)][:count]
    if not names:
        raise ValueError(f"no image found in {folder.name!r}; name a folder that holds photographs")
    return [Pair(name, torch.zeros(3, 0, 0), load_image(folder / name).rgb, k) for k, name in enumerate(names)]


# ---------------------------------------------------------------------------------------------------------------- run


def compare(
    contenders: Sequence[Contender],
    protocol: Protocol,
    pairs: Sequence[Pair],
    *,
    operator: Operator | None = None,
    niqe: Niqe | None = None,
    on_image: Callable[[int, Contender, Row], None] | None = None,
) -> list[Measured]:
    """Restore every image by every contender, one image at a time, in an order that turns.

    Args:
        contenders: Who takes part; image i gets the seed i from each of them.
        protocol: What the pairs are.
        pairs: From `evaluation.make_pairs`, or `unreferenced_pairs`.
        operator: The true linear operator behind y, for `consistency`; None leaves that out.
        niqe: The model for `niqe`; None leaves that out.
        on_image: Called after each restoration with the image's place, the contender and the row.

    Returns:
        One `Measured` per contender, in their order; rows and images in the order of the pairs.

    Raises:
        ValueError: If two contenders share a key, there are no pairs, or a restorer breaks its contract.
    """
    keys = [c.key for c in contenders]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice or not keys or not pairs:
        raise ValueError(f"different contenders and at least one image expected, got {twice or keys} and {len(pairs)}")
    for contender in contenders:
        _restore(contender, pairs[0], protocol.scale)
    rows: list[list[Row]] = [[] for _ in contenders]
    images: list[list[Tensor]] = [[] for _ in contenders]
    for k, pair in enumerate(pairs):
        for n in _turned(len(contenders), k):
            row, x = _measure(contenders[n], pair, protocol, operator, niqe)
            rows[n].append(row)
            images[n].append((x * 255).round().to(torch.uint8))
            if on_image is not None:
                on_image(k, contenders[n], row)
    return [Measured(c, protocol, r, i, _swd_of(i, pairs)) for c, r, i in zip(contenders, rows, images, strict=True)]


def _swd_of(images: Sequence[UInt8[Tensor, "3 h w"]], pairs: Sequence[Pair]) -> SwdParts | None:
    if min(min(pair.clean.shape[-2:]) for pair in pairs) < _SWD_SIDE:
        return None
    return swd_parts(_floats(images), [pair.clean for pair in pairs])


def _turned(count: int, k: int) -> list[int]:
    """The order of image k: 0 .. count-1, beginning with another one each time."""
    return [(n + k) % count for n in range(count)]


def _restore(contender: Contender, pair: Pair, scale: int) -> Restored:
    """One image through one contender, with its network calls counted where they can be."""
    restorer = contender.restorer
    if isinstance(restorer, Pipeline):
        out = restorer.output(pair.y[None], scale, [pair.number])
        return Restored(list(out.images), out.calls["total"], out.calls["loop"], out.settings)
    prior = getattr(restorer, "prior", None)
    before = dataclasses.asdict(prior.calls) if isinstance(prior, LatentPrior) else {}
    x = restorer(pair.y[None], scale, [pair.number])
    wanted = (1, 3, pair.y.shape[-2] * scale, pair.y.shape[-1] * scale)
    if tuple(x.shape) != wanted or not bool(torch.isfinite(x).all()):
        raise ValueError(f"{contender.method}: {wanted} finite pixels expected for {pair.name}, got {tuple(x.shape)}")
    after = dataclasses.asdict(prior.calls) if isinstance(prior, LatentPrior) else dataclasses.asdict(Calls())
    return Restored([x[0].detach().cpu()], {name: n - before.get(name, 0) for name, n in after.items()})


def _measure(
    contender: Contender, pair: Pair, protocol: Protocol, operator: Operator | None, niqe: Niqe | None
) -> tuple[Row, Tensor]:
    release_memory()
    held = _resident_mb()
    reset_peak()
    start = time.perf_counter()
    out = _restore(contender, pair, protocol.scale)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, peak_mb()
    x = round8(out.images[0].float())
    values: dict[str, Any] = {"seconds": seconds, "peak_mb": peak, "extra_mb": round(max(0.0, peak - held), 1)}
    values |= {"nfe": contender.restorer.nfe, "calls": out.calls, **_quality(x, pair, operator, niqe)}
    return make_row(contender.method, contender.variant, protocol.name, pair.name, **values), x


def _quality(x: Tensor, pair: Pair, operator: Operator | None, niqe: Niqe | None) -> dict[str, float]:
    """Every measure of one image that can be taken of it."""
    values: dict[str, float] = {}
    if pair.clean.numel():
        values |= measure(x, pair.clean)
        if min(x.shape[-2:]) >= MS_SSIM_MIN_SIDE:
            values["ms_ssim"] = float(ms_ssim(x[None], round8(pair.clean)[None]))
        values["gmsd"] = float(gmsd(x[None], round8(pair.clean)[None]))
    if niqe is not None and min(x.shape[-2:]) >= 2 * niqe.patch:
        values["niqe"] = niqe.score(x)
    if operator is not None:
        values["consistency"] = float(consistency(x[None], pair.y[None], operator.forward))
    return values


def controls_beside(
    measured: Sequence[Measured],
    pairs: Sequence[Pair],
    *,
    like: Sequence[tuple[str, str]],
    bases: Sequence[str] = ("bicubic", "estimator"),
    operator: Operator | None = None,
    niqe: Niqe | None = None,
) -> list[Measured]:
    """The controls on every base, as rough as each of the methods that they are to stand beside.

    Args:
        measured: From `compare`, with the bases and the methods.
        pairs: The same pairs, with clean images.
        like: (method, variant) of the methods.
        bases: Methods whose images the controls start from.
        operator: See `compare`.
        niqe: See `compare`.

    Returns:
        One `Measured` per method, base and control, named "grain on estimator", "as rough as default". They cost
        nothing worth a clock, so seconds and memory are null.
    """
    by_key = {m.contender.key: m for m in measured}
    clean = [pair.clean for pair in pairs]
    found: list[Measured] = []
    for key in like:
        energy = gradient_energy(_floats(by_key[key].images), clean)
        for base in (m for m in measured if m.contender.method in bases):
            for name, control in CONTROLS.items():
                protocol = base.protocol
                images, _ = matched(_floats(base.images), clean, energy, control, protocol.scale)
                label = (f"{name} on {base.contender.method}", f"as rough as {' '.join(key)}")
                rows = [
                    make_row(*label, protocol.name, pair.name, nfe=0, **_quality(x, pair, operator, niqe))
                    for x, pair in zip(images, pairs, strict=True)
                ]
                restored = [(x * 255).round().to(torch.uint8) for x in images]
                control_of = Contender(*label, base.contender.restorer)
                found.append(Measured(control_of, protocol, rows, restored, _swd_of(restored, pairs)))
    return found


def release_memory() -> None:
    """Give freed memory back to the system, so that one method's leavings are not another's base (glibc only)."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident_mb() -> float:
    """Memory held now in MB: the accelerator's once it is in use, else resident; NaN where the system does not tell."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return torch.cuda.memory_allocated() / 1e6
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 1e6
    return math.nan


# ------------------------------------------------------------------------------------------------------------ summary


def summary_of(measured: Measured, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Summary entry of one contender: every measure as {"mean", "low", "high"}, 95 % intervals over images.

    Args:
        measured: From `compare`.
        pairs: The same pairs.

    Returns:
        The entry. Measures that no row has are left out.
    """
    rows = measured.rows
    entry: dict[str, Any] = {key: rows[0][key] for key in ("method", "variant", "protocol")}
    for name in ("psnr", "ssim", *COMPARED, "seconds", "extra_mb"):
        values = [row.get(name) for row in rows]
        if all(value is not None for value in values):
            entry[name] = bootstrap_interval([float(v) for v in values if v is not None])._asdict()
    if "seconds" in entry:
        seconds = sorted(row["seconds"] for row in rows)
        entry["seconds"]["median"] = seconds[len(seconds) // 2]
    if all(pair.clean.numel() for pair in pairs):
        sums = [(row["gradient_restored"], row["gradient_clean"]) for row in rows]
        entry["gradient_energy"] = bootstrap_interval(sums, statistic=ratio_of_sums)._asdict()
    if measured.swd is not None:
        entry["swd"] = swd_interval(measured.swd)._asdict()
    return entry


def compared_to(
    ours: Measured, theirs: Measured, metrics: Sequence[str] = ("psnr", "niqe", "swd")
) -> dict[str, Interval]:
    """Paired differences ours - theirs with 95 % intervals, over the same images.

    Args:
        ours: From `compare`.
        theirs: From the same call.
        metrics: Measures; per image by bootstrap, swd by leaving out a tenth of the images at a time.

    Returns:
        The measures that both have.
    """
    found: dict[str, Interval] = {}
    both = [*ours.rows, *theirs.rows]
    for name in metrics:
        if name == "swd":
            if ours.swd is not None and theirs.swd is not None:
                found[name] = swd_difference(ours.swd, theirs.swd)
        elif all(row.get(name) is not None for row in both):
            keys = ours.contender.key, theirs.contender.key
            found[name] = paired_difference(both, *keys, ours.protocol.name, name)
    return found


def _floats(images: Sequence[UInt8[Tensor, "3 h w"]]) -> list[Float[Tensor, "3 h w"]]:
    return [x.float() / 255 for x in images]
