"""Evaluation: degraded pairs, measured rows, intervals, and the result files of `benchmarks/results`.

A *protocol* says which images are degraded how, a *method* restores, `evaluate` gives one row per image, `summarise`
one entry per method with 95 % intervals, `write_results` the file whose schema `check_result_schema` defines.

| word | meaning |
| --- | --- |
| row | one image restored by one method under one protocol |
| `gradient_energy` | of a row its own ratio; of a summary Σ restored / Σ clean over all images |
| `swd` | distance between two sets of images: null in rows, a number in summaries |
| interval | percentile bootstrap over images; of `swd` a jackknife over tenths of the images |
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo import __version__
from latentindigo.data import sample_generator
from latentindigo.degradations import degrade
from latentindigo.images import list_images, load_image, pil_jpeg
from latentindigo.metrics import gradient_energy_sums, psnr, round8, ssim, swd
from latentindigo.pipeline import RestorationPipeline
from latentindigo.prior import Calls

__all__ = [
    "CALLS", "METRICS", "Interval", "Method", "Pair", "Protocol", "Restored", "Result", "Row", "SwdParts",
    "bootstrap_interval", "check_result_schema", "evaluate", "machine_info", "make_pairs", "make_row",
    "markdown_table", "measure", "paired_difference", "peak_mb", "ratio_of_sums", "reset_peak", "summarise",
    "swd_difference", "swd_interval", "swd_parts", "versions", "write_results",
]  # fmt: skip

SCHEMA = 1
METRICS = ("psnr", "ssim", "gradient_energy", "swd")
"""Measures of every result file."""
CALLS = tuple(f.name for f in dataclasses.fields(Calls))
"""Names of the counted network calls."""
# Keys and texts that would name a machine, a user, or a place on a disk; searched in the JSON text.
_PRIVATE = r'"(host|hostname|node|user)":|"(/|~/|[A-Za-z]:\\\\)[^"]*"|/(home|Users)/[^"]*'

Row = dict[str, Any]
Degrader = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Protocol:
    """What is restored: which images, degraded how. Two results compare only if their protocols are equal.

    Attributes:
        name: Name in the result file.
        degradation: A name of `degradations.STANDARD`, or of the benchmark's own degradation.
        scale: Output size over input size.
        images: Name of the set of images ("val", "tune"), never a path.
        seed: Seed of the degradations; image i has its own generator, from (seed, i).
        crop: Side of the centre crop, None for whole images.
        count: Number of images, None for all; the first ones, so that a short run is a part of the long one.
        version: Raised when anything about the protocol changes under the same name.
    """

    name: str
    degradation: str
    scale: int
    images: str
    seed: int = 0
    crop: int | None = None
    count: int | None = None
    version: int = 1

    def __post_init__(self) -> None:
        for key in ("scale", "crop", "count"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"protocol {self.name!r}: {key} must be at least 1, got {value}; None leaves it out")


class Pair(NamedTuple):
    """A clean image (3, H, W), its degraded form (3, h, w), its name relative to the folder, its number."""

    name: str
    clean: Tensor
    y: Tensor
    number: int


def make_pairs(
    folder: Path, protocol: Protocol, names: Sequence[str] | None = None, degrader: Degrader | None = None
) -> list[Pair]:
    """Degrade the images of a folder as a protocol says, with Pillow's JPEG.

    Args:
        folder: Folder of clean images.
        protocol: What to do.
        names: Paths relative to the folder, in this order; None takes every image of the folder, sorted.
        degrader: f(x (1, 3, H, W), generator) -> y in place of the standard degradation.

    Returns:
        Pairs; pair i depends on its image and (seed, i) alone. Clean images are cut (centred) to the protocol's crop
        and to a multiple of its scale.

    Raises:
        ValueError: If there is no image, or one is smaller than the scale.
    """
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in list_images(folder, recursive=True)]
    if not names:
        raise ValueError(f"protocol {protocol.name!r} found no image; check the folder of {protocol.images!r}")
    pairs: list[Pair] = []
    for number, name in enumerate(names[: protocol.count]):
        x = load_image(folder / name).rgb
        height, width = (min(n, protocol.crop or n) // protocol.scale * protocol.scale for n in x.shape[-2:])
        if min(height, width) < 1:
            raise ValueError(f"{name}: at least {protocol.scale} pixels on each side expected, got {tuple(x.shape)}")
        top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
        x = x[None, :, top : top + height, left : left + width]
        generator = sample_generator(protocol.seed, number)
        y = degrader(x, generator) if degrader else degrade(x, protocol.degradation, generator, jpeg=pil_jpeg)
        pairs.append(Pair(name, x[0], y[0], number))
    return pairs


# ------------------------------------------------------------------------------------------------------------- methods


class Restored(NamedTuple):
    """Restored images (3, H, W), network calls in all and inside the sampling loop, and the settings used."""

    images: list[Tensor]
    calls: dict[str, int] = {}
    loop_calls: dict[str, int] = {}
    settings: dict[str, Any] = {}


@dataclass(frozen=True)
class Method:
    """A named restoration: degraded images (3, h, w) and one seed for each -> `Restored`."""

    method: str
    variant: str
    restore: Callable[[list[Tensor], list[int]], Restored]


# ------------------------------------------------------------------------------------------------------------- measure


class Result(NamedTuple):
    """Rows of one method under one protocol, its images as 8-bit files would hold them, and its settings."""

    rows: list[Row]
    images: list[Tensor]
    settings: dict[str, Any]


def measure(restored: Float[Tensor, "3 h w"], clean: Float[Tensor, "3 h w"]) -> dict[str, float]:
    """PSNR, SSIM and gradient energies on RGB, whole image, rounded to 8 bits.

    Args:
        restored: Restored image, (3, H, W); clamped to [0, 1].
        clean: Clean image of the same size.

    Returns:
        psnr, ssim, gradient_energy (a ratio), and its two sums gradient_restored and gradient_clean.

    Raises:
        ValueError: If the sizes differ.
    """
    x, ref = round8(restored.float())[None], round8(clean.float())[None]
    ours, theirs = (float(e) for e in gradient_energy_sums(x, ref))
    sums = {"gradient_restored": ours, "gradient_clean": theirs}
    ratio = ours / theirs if theirs else math.nan
    return {"psnr": float(psnr(x, ref)), "ssim": float(ssim(x, ref)), "gradient_energy": ratio, **sums}


def make_row(method: str, variant: str, protocol: str, image: str, **values: Any) -> Row:
    """A row with every key of the schema; what is not given is null (calls: 0)."""
    row: Row = {"method": method, "variant": variant, "protocol": protocol, "image": image}
    calls = dict.fromkeys(CALLS, 0) | values.pop("calls", {})
    return row | dict.fromkeys((*METRICS, "seconds", "peak_mb")) | values | {"calls": calls}


def evaluate(
    method: Method, protocol: Protocol, pairs: Sequence[Pair], *, batch: int = 1, warm_up: bool = True
) -> Result:
    """Restore all pairs and measure each; image i gets the seed i.

    Args:
        method: What to run.
        protocol: Only its name is used.
        pairs: From `make_pairs`.
        batch: Images of one size restored in one call; calls are then those of the batch, seconds its mean.
        warm_up: Run the first image once before the clock starts.

    Returns:
        Rows and images in the order of the pairs.
    """
    if warm_up:
        method.restore([pairs[0].y], [pairs[0].number])
    by_size: dict[tuple[int, ...], list[int]] = {}
    for k, pair in enumerate(pairs):
        by_size.setdefault(tuple(pair.y.shape), []).append(k)
    done: dict[int, tuple[Row, Tensor]] = {}
    settings: dict[str, Any] = {}
    for group in (members[i : i + batch] for members in by_size.values() for i in range(0, len(members), batch)):
        reset_peak()
        start = time.perf_counter()
        out = method.restore([pairs[k].y for k in group], [pairs[k].number for k in group])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent = {"seconds": (time.perf_counter() - start) / len(group), "peak_mb": peak_mb(), "batch": len(group)}
        settings = {k: v for k, v in out.settings.items() if k != "seed"}
        for k, x in zip(group, out.images, strict=True):
            values = {**measure(x, pairs[k].clean), **spent, "calls": out.calls, "loop_calls": out.loop_calls}
            done[k] = make_row(method.method, method.variant, protocol.name, pairs[k].name, **values), round8(x)
    ordered = [done[k] for k in range(len(pairs))]
    return Result([row for row, _ in ordered], [x for _, x in ordered], settings)


def reset_peak() -> None:
    """Start a new memory peak where the system can (Linux, CUDA); elsewhere it stays the peak of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Peak memory in MB since `reset_peak`: the accelerator's once it is in use, else the resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    with contextlib.suppress(OSError):
        # Not getrusage on Linux: what it tells begins with the peak of the process that started this one.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return round(int(found[1]) * 1024 / 1e6, 1)
    try:
        import resource
    except ImportError:  # Windows has no such module.
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


# ----------------------------------------------------------------------------------------------------------- intervals


class Interval(NamedTuple):
    """An estimate and its 95 % interval; low and high are NaN where one image tells nothing about others."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float] | Sequence[Sequence[float]],
    seed: int = 0,
    statistic: Callable[[Tensor], Tensor] | None = None,
    repeats: int = 2000,
) -> Interval:
    """Percentile bootstrap over images, 95 %, expanded for few images (see `_tail`).

    Args:
        values: One number per image, or k numbers per image.
        seed: Seed of the resampling.
        statistic: Maps (repeats, n, k) to (repeats,); None is the mean.
        repeats: Resamples.

    Returns:
        The statistic of all images, and the interval from its resamples.

    Raises:
        ValueError: If there are no values.
    """
    if len(values) == 0:
        raise ValueError("bootstrap_interval needs at least one value, got none; run on one image or more")
    data = torch.as_tensor(values, dtype=torch.float64).reshape(len(values), -1)
    chosen = statistic or (lambda samples: samples[..., 0].mean(-1))
    estimate = float(chosen(data[None])[0])
    if len(data) < 2 or not bool(data.isfinite().all()):
        return Interval(estimate, math.nan, math.nan)
    index = torch.randint(len(data), (repeats, len(data)), generator=torch.Generator().manual_seed(seed))
    tail = _tail(len(data))
    low, high = torch.quantile(chosen(data[index]), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high)


def _tail(n: int) -> float:
    """Share cut off at each end: Φ(-t sqrt(n / (n - 1))) with Student's t of n - 1 degrees, 2.5 % for large n.

    A plain percentile interval of few images is too narrow twice: the bootstrap divides by n where n - 1 is due, and
    takes the normal's tails. Student's quantile is expanded in powers of 1 / (n - 1).
    """
    z, v = 1.959964, n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return 0.5 * math.erfc(t * math.sqrt(n / v) / math.sqrt(2))


def ratio_of_sums(samples: Float[Tensor, "r n 2"]) -> Float[Tensor, " r"]:
    """Σ a / Σ b over the images of each resample, for `bootstrap_interval`."""
    return samples[..., 0].sum(-1) / samples[..., 1].sum(-1)


def paired_difference(
    rows: Sequence[Row], method: tuple[str, str], baseline: tuple[str, str], protocol: str, metric: str = "psnr"
) -> Interval:
    """Mean difference to a baseline, image by image, with a bootstrap over images.

    Args:
        rows: Rows of both, in any order.
        method: (method, variant).
        baseline: (method, variant) to subtract.
        protocol: Name of the protocol.
        metric: Key of the rows.

    Returns:
        The interval of method - baseline.

    Raises:
        ValueError: If the two were not run on the same images.
    """
    ours, theirs = (
        {r["image"]: r[metric] for r in rows if (r["method"], r["variant"], r["protocol"]) == (*key, protocol)}
        for key in (method, baseline)
    )
    if not ours or ours.keys() != theirs.keys():
        raise ValueError(f"{method} and {baseline} must share all images to be paired, got {len(ours)}, {len(theirs)}")
    return bootstrap_interval([ours[name] - theirs[name] for name in ours])


SwdParts = tuple[float, Float[Tensor, " g"]]


def swd_parts(images: Sequence[Tensor], clean: Sequence[Tensor]) -> SwdParts:
    """The distance of two sets, and of the sets without a tenth of the images each: what swd's intervals are made of.

    Args:
        images: Restored images.
        clean: Clean images, in the same order.

    Returns:
        The distance (NaN where an image is too small for it), and one per tenth that is left out (none for one image).
    """
    n = len(images)
    if min(min(x.shape[-2:]) for x in images) < 25:
        return math.nan, torch.zeros(0)
    groups = min(10, n) if n > 1 else 0
    kept = [[k for k in range(n) if k % groups != g] for g in range(groups)]
    # Only the spread is wanted here: a third of the patches and an eighth of the directions show it.
    fast = {"patches": 10_000, "projections": 16}
    return swd(images, clean), torch.tensor(
        [swd([images[k] for k in ks], [clean[k] for k in ks], **fast) for ks in kept]
    )


def _jackknife_error(parts: Float[Tensor, " g"]) -> float:
    groups = len(parts)
    return 1.96 * float(((groups - 1) / groups * (parts - parts.mean()).square().sum()).sqrt())


def swd_interval(parts: SwdParts) -> Interval:
    """The distance and its 95 % interval, from the spread when a tenth of the images is left out at a time."""
    value, left_out = parts
    if not len(left_out):
        return Interval(value, math.nan, math.nan)
    error = _jackknife_error(left_out)
    return Interval(value, max(0.0, value - error), value + error)


def swd_difference(ours: SwdParts, theirs: SwdParts) -> Interval:
    """The difference of two methods' distances, ours - theirs, paired: the same tenths are left out of both."""
    value = ours[0] - theirs[0]
    if not len(ours[1]) or len(ours[1]) != len(theirs[1]):
        return Interval(value, math.nan, math.nan)
    error = _jackknife_error(ours[1] - theirs[1])
    return Interval(value, value - error, value + error)


def summarise(result: Result, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Summary entry of one method: psnr, ssim, gradient_energy, swd and seconds as {"mean", "low", "high"}.

    Args:
        result: From `evaluate`.
        pairs: The same pairs.

    Returns:
        The entry; `seconds` has its median too.
    """
    rows = result.rows
    seconds = [r["seconds"] for r in rows]
    sums = [(r["gradient_restored"], r["gradient_clean"]) for r in rows]
    return {key: rows[0][key] for key in ("method", "variant", "protocol")} | {
        "psnr": bootstrap_interval([r["psnr"] for r in rows])._asdict(),
        "ssim": bootstrap_interval([r["ssim"] for r in rows])._asdict(),
        "gradient_energy": bootstrap_interval(sums, statistic=ratio_of_sums)._asdict(),
        "swd": swd_interval(swd_parts(result.images, [p.clean for p in pairs]))._asdict(),
        "seconds": bootstrap_interval(seconds)._asdict() | {"median": sorted(seconds)[len(seconds) // 2]},
    }


# -------------------------------------------------------------------------------------------------------- result files


def machine_info() -> dict[str, Any]:
    """The kind of machine, never its name: system, processor, cores, threads in use, accelerator."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = named.group(1) if named else processor
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    counts = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"system": platform.system(), "processor": processor, **counts, "accelerator": accelerator}


def versions(pipe: RestorationPipeline | None = None) -> dict[str, str]:
    """Versions of what numbers depend on, a hash of this package's source, and dtype and hash of the weights."""
    found = {"latentindigo": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "numpy", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    source = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    found["source"] = hashlib.sha256(source).hexdigest()[:16]
    if pipe is not None:
        found |= {"weights": pipe.weights_hash()[:16], "dtype": str(pipe.prior.dtype).removeprefix("torch.")}
    return found


def write_results(
    path: Path,
    suite: str,
    protocols: Sequence[Protocol],
    rows: Sequence[Row],
    summary: Sequence[Mapping[str, Any]],
    *,
    pipe: RestorationPipeline | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Check and write a result file; it is complete or not there at all, and replaces an earlier one.

    Args:
        path: `<date>-<suite>.json`; its folder must exist.
        suite: Name of the suite.
        protocols: All protocols that rows name.
        rows: See `make_row`.
        summary: See `summarise`.
        pipe: Its weights' hash and dtype are recorded.
        settings: "method variant" -> the settings that reproduce the rows.

    Raises:
        ValueError: If the content does not fit the schema.
    """
    content = {"schema": SCHEMA, "suite": suite, "machine": machine_info(), "versions": versions(pipe)}
    named = {p.name: dataclasses.asdict(p) for p in protocols}
    result = _plain({**content, "protocols": named, "settings": settings or {}, "rows": rows, "summary": summary})
    check_result_schema(result)
    # One row to a line: small enough to keep, and a change shows as the rows that changed.
    lists = {k: "[\n" + ",\n".join(map(json.dumps, v)) + "\n]" for k, v in result.items() if isinstance(v, list)}
    blocks = [f"{json.dumps(k)}: {lists.get(k) or json.dumps(v, indent=1)}" for k, v in result.items()]
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """JSON's types only: NaN and infinity become null, objects the name of their class."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else type(value).__name__


def check_result_schema(result: Mapping[str, Any]) -> None:
    """Refuse what is no result file of schema 1.

    Args:
        result: The decoded JSON.

    Raises:
        ValueError: With the place and the reason: a missing key, a wrong type, an unknown protocol, two rows of one
            image, a summary without rows, an interval that does not hold its mean, a path or name of a machine.
    """
    _need(result.get("schema") == SCHEMA, "schema", f"{SCHEMA} expected, got {result.get('schema')!r}")
    kinds = {"suite": str, "machine": dict, "versions": dict, "protocols": dict, "rows": list, "summary": list}
    for key, kind in kinds.items():
        _need(isinstance(result.get(key), kind), key, f"a {kind.__name__} expected")
    for name, protocol in result["protocols"].items():
        missing = {"name", "version", "degradation", "scale", "images", "seed"} - set(protocol)
        _need(not missing, f"protocols.{name}", f"lacks {sorted(missing)}")
    seen: set[tuple[str, ...]] = set()
    for i, row in enumerate(result["rows"]):
        key = _check_names(row, f"rows[{i}]", ("method", "variant", "protocol", "image"), result["protocols"])
        _need(key not in seen, f"rows[{i}]", f"a second row of {key}")
        seen.add(key)
        wrong = [n for n in (*METRICS, "seconds", "peak_mb") if n not in row or not _is_number(row[n])]
        _need(not wrong, f"rows[{i}]", f"finite numbers or null expected for {wrong}")
        calls = row.get("calls")
        named = isinstance(calls, dict) and set(calls) == set(CALLS)
        counted = named and all(type(n) is int and n >= 0 for n in calls.values())
        _need(counted, f"rows[{i}].calls", f"a count for each of {', '.join(CALLS)} expected, got {calls!r}")
    measured = {key[:3] for key in seen}
    for i, entry in enumerate(result["summary"]):
        key = _check_names(entry, f"summary[{i}]", ("method", "variant", "protocol"), result["protocols"])
        _need(key in measured, f"summary[{i}]", f"no row of {key}")
        for name in set(entry) - {"method", "variant", "protocol"}:
            interval, order = entry[name], ("low", "mean", "high")
            fits = isinstance(interval, dict) and all(k in interval and _is_number(interval[k]) for k in order)
            known = [interval[k] for k in order if interval[k] is not None] if fits else []
            _need(fits and known == sorted(known), f"summary[{i}].{name}", "low <= mean <= high or null expected")
    private = re.search(_PRIVATE, json.dumps(result, ensure_ascii=False))
    _need(private is None, "text", f"{private and private.group()!r} gives away a machine, a user or a path")


def _need(condition: bool, place: str, reason: str) -> None:
    if not condition:
        raise ValueError(f"result file, {place}: {reason}")


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _check_names(item: Any, place: str, names: Sequence[str], protocols: Mapping[str, Any]) -> tuple[str, ...]:
    _need(
        isinstance(item, dict) and all(isinstance(item.get(n), str) for n in names), place, f"texts expected: {names}"
    )
    _need(item["protocol"] in protocols, place, f"unknown protocol {item['protocol']!r}")
    return tuple(item[n] for n in names)


def markdown_table(
    summary: Sequence[Mapping[str, Any]], metrics: Sequence[str] = (*METRICS, "seconds"), rows: Sequence[Row] = ()
) -> str:
    """Summary entries as a Markdown table, "mean [low, high]" in each cell.

    Args:
        summary: Entries of `summarise`.
        metrics: Columns; an entry without one gets an empty cell.
        rows: With rows, a column of network calls per image (or batch) is added.

    Returns:
        The table.
    """
    calls = {(r["method"], r["variant"], r["protocol"]): r["calls"] for r in rows}
    heads = ["protocol", "method", "variant", *metrics, *(["calls"] if rows else [])]
    lines = [heads, ["---"] * len(heads)]
    for entry in summary:
        key = entry["method"], entry["variant"], entry["protocol"]
        counted = [", ".join(f"{name} {n}" for name, n in calls.get(key, {}).items() if n)] if rows else []
        lines.append([key[2], key[0], key[1], *(_cell(entry.get(name)) for name in metrics), *counted])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(interval: Mapping[str, float | None] | None) -> str:
    values = [(interval or {}).get(k) for k in ("mean", "low", "high")]
    shown = [f"{v:.4g}" for v in values if v is not None and math.isfinite(v)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else shown[0] if shown else ""
