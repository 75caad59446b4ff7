"""Damaged picture files by the thousand: each is read or refused with one sentence; nothing crashes, hangs or swells.

    python benchmarks/fuzz_images.py --count 20000            # goes on where an earlier run was stopped
    python benchmarks/fuzz_images.py --show 1234              # what became of one input, and its bytes to a file

Seeds are the photographs of LATENTINDIGO_DATA/real as they are, and small files of every format made of some of them.
Each input depends on the seed and its number alone. A worker process reads it with `load_image`; what could be read is
written to the formats that can be written, and read back. The parent kills a worker that takes too long, starts another
when one dies, and names the input.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import re
import select
import subprocess  # noqa: S404
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUTCOMES = ("loaded", "refused", "crash", "hang", "memory")
MAX_PIXELS = 2**22  # Limit of pixels in the run: a header may claim that many, and gets the memory for them.
# A picture takes 20 to 27 bytes a pixel while it is read, and once more when its copy is read back beside it: 226 MB.
# The rest is what the encoders need on top.
BOUND_MB = 300
SECONDS = 10
SAVED_PIXELS = 2**18  # Larger pictures are written to one format, in turn, instead of all.

# ------------------------------------------------------------------------------------------------------------ one input


def sentence_class(message: str) -> str:
    """A refusal without what is particular to the file: what `load_image` objected to."""
    for pattern, kind in (
        (r"is empty", "empty"),
        (r"is no picture", "no picture"),
        (r"pixels, more than", "too many pixels"),
        (r"checksum", "checksum"),
        (r"of a kind that cannot be read|header", "header"),
        (r"holds (32-bit|floating)|separate planes", "values"),
        (r"is damaged or cut short", "damaged or cut short"),
    ):
        if re.search(pattern, message):
            return kind
    return "other"


def check_sentence(message: str) -> None:
    """One line that ends with a full stop, of a length that can be read, without what a terminal would obey."""
    from latentindigo.safe_files import printable

    if not message.endswith(".") or len(message) > 500 or printable(message) != message:
        raise AssertionError(f"no sentence: {message!r}")


def try_input(data: bytes, number: int, folder: Path, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Read one damaged file; write and read back what could be read.

    Args:
        data: The file.
        number: Its number, which chooses the format for a large picture.
        folder: Folder to write to.
        max_pixels: Limit of pixels.

    Returns:
        "outcome" (loaded, refused or crash) and "detail".
    """
    from latentindigo.images import WRITE_SUFFIXES, ImageReadError, load_image, save_image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = load_image(data, max_pixels=max_pixels)
        except ImageReadError as error:
            check_sentence(str(error))
            return {"outcome": "refused", "detail": sentence_class(str(error)), "message": str(error)}
        low, high = float(picture.rgb.min()), float(picture.rgb.max())
        if not (0 <= low <= high <= 1 and math.isfinite(high)):
            raise AssertionError(f"values from {low} to {high}")
        suffixes = list(WRITE_SUFFIXES)
        if picture.rgb[0].numel() > SAVED_PIXELS:
            suffixes = [suffixes[number % len(suffixes)]]
        for suffix in suffixes:
            target = folder / f"x{suffix}"
            try:
                save_image(picture, target, metadata={"seed": number}, overwrite=True)
            except ValueError as error:  # a side that the format cannot hold
                if max(picture.size) < 16000 or not str(error).startswith("save_image"):
                    raise
                continue
            again = load_image(target, max_pixels=max_pixels)
            if again.size != picture.size:
                raise AssertionError(f"{suffix}: {again.size} read back, {picture.size} written")
            if suffix in (".png", ".tif", ".tiff") and not bool((again.rgb == picture.rgb).all()):
                raise AssertionError(f"{suffix}: other pixels read back")
    return {"outcome": "loaded", "detail": f"{picture.mode}, {picture.bits} bits"}


def worker(seeds: list[tuple[str, bytes]], seed: int) -> None:
    """Read numbers from stdin, answer each with one line of JSON on stdout."""
    import resource

    from fuzz_inputs import mutated

    # The bound proper is checked afterwards; this one only keeps the machine alive.
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    with tempfile.TemporaryDirectory() as folder:
        # What is loaded once at the first picture is no picture's memory.
        try_input(seeds[0][1], 0, Path(folder))
        for line in sys.stdin:
            number = int(line)
            form, kind, data = mutated(seeds, seed, number)
            Path("/proc/self/clear_refs").write_text("5")
            before, started = resident_mb("VmRSS"), time.perf_counter()
            try:
                result = try_input(data, number, Path(folder))
            except Exception as error:  # noqa: BLE001 - any error but a refusal is what is looked for
                result = {"outcome": "crash", "detail": f"{type(error).__name__}: {error}"[:300]}
            result |= {"seconds": round(time.perf_counter() - started, 4)}
            result |= {"mb": round(resident_mb("VmHWM") - before, 1)}
            if result["outcome"] != "crash" and result["mb"] > BOUND_MB:
                result |= {"outcome": "memory"}
            answers.write(json.dumps({"input": number, "format": form, "damage": kind, **result}) + "\n")
            answers.flush()


def resident_mb(field: str) -> float:
    """A field of this process's memory, in MB; VmHWM is the peak since it was last reset."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(field + ":")[2].split()[0]) / 1024


# --------------------------------------------------------------------------------------------------------- all inputs


class Worker:
    """One worker process, replaced when it dies or hangs."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process: subprocess.Popen[str] | None = None

    def ask(self, number: int) -> dict[str, Any] | None:
        """The worker's answer, or None where there is none: it hangs ("hang" is set) or is dead."""
        if self.process is None:
            self.process = subprocess.Popen(  # noqa: S603
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            # The first answer takes as long as the imports.
            patience = SECONDS + 60
        else:
            patience = SECONDS
        process = self.process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], patience)
        line = process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        process.kill()
        code = process.wait()
        self.close()
        return {"hang": True} if not ready else {"code": code}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what was written to a dead process cannot be flushed
                        stream.close()
            self.process.wait()
            self.process = None


def make_seeds(folder: Path, photos: int) -> list[tuple[str, bytes]]:
    """Real files as they are, and small files of every format made of some of them, in a fixed order."""
    import io

    from fuzz_inputs import seed_files
    from PIL import Image

    from latentindigo.images import list_images

    real = [(path.suffix.lower().replace("jpeg", "jpg"), path.read_bytes()) for path in list_images(folder)]
    chosen = [Image.open(io.BytesIO(data)) for _, data in real[:: max(1, len(real) // photos)][:photos]]
    names = {".jpg": "real jpeg", ".png": "real png"}
    return [*seed_files(chosen), *((names[suffix], data) for suffix, data in real)]


def run(args: argparse.Namespace, numbers: Iterable[int], log: Path) -> Iterator[dict[str, Any]]:
    """Try inputs one after the other and log every answer."""
    command = [sys.executable, __file__, "--worker", "--seed", str(args.seed), "--photos", str(args.photos)]
    asked = Worker([*command, "--data", str(args.data)])
    seeds = make_seeds(args.data / "real", args.photos)
    with log.open("a") as stream:
        for number in numbers:
            answer = asked.ask(number)
            if answer is None or "input" not in answer:
                hung = bool(answer and "hang" in answer)
                outcome = {"outcome": "hang" if hung else "crash", "detail": f"process ended: {answer}"}
                from fuzz_inputs import mutated

                form, kind, _ = mutated(seeds, args.seed, number)
                answer = {"input": number, "format": form, "damage": kind, **outcome, "seconds": SECONDS, "mb": None}
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
            yield answer
    asked.close()


def write(args: argparse.Namespace, answers: list[dict[str, Any]]) -> Path:
    """The result file: one row per format, with counts by outcome, kind of refusal and kind of damage."""
    from latentindigo.evaluation import Protocol, make_row, write_results

    rows = []
    for form in dict.fromkeys(a["format"] for a in sorted(answers, key=lambda a: a["input"])):
        of_form = [a for a in answers if a["format"] == form]
        counts = collections.Counter(a["outcome"] for a in of_form)
        refused = collections.Counter(a["detail"] for a in of_form if a["outcome"] == "refused")
        damage = collections.Counter(d for a in of_form for d in a["damage"].split(" + "))
        seconds = [a["seconds"] for a in of_form]
        values = {
            "seconds": sum(seconds) / len(seconds),
            "slowest_seconds": max(seconds),
            "peak_mb": max((a["mb"] for a in of_form if a["mb"] is not None), default=None),
            "tried": len(of_form),
            "outcomes": {name: counts[name] for name in OUTCOMES},
            "refused_as": dict(refused.most_common()),
            "damage": dict(damage.most_common()),
        }
        rows.append(make_row(form, "", "fuzz", "all", **values))
    bad = [a for a in answers if a["outcome"] not in ("loaded", "refused")]
    settings = {
        "inputs": len(answers),
        "seed": args.seed,
        "max_pixels": MAX_PIXELS,
        "bound_mb": BOUND_MB,
        "seconds_each": SECONDS,
        "versions": library_versions(),
        "failures": [{k: a[k] for k in ("input", "format", "damage", "outcome", "detail")} for a in bad],
    }
    path = args.out / f"{args.date}-fuzz-images.json"
    write_results(
        path, "fuzz-images", [Protocol("fuzz", "damaged bytes", 1, "real", args.seed)], rows, [], settings=settings
    )
    return path


def library_versions() -> dict[str, str | None]:
    """The decoders: what a crash would be a crash of."""
    from PIL import __version__, features

    found = {"pillow": __version__}
    for name in ("libjpeg_turbo", "zlib", "libtiff", "webp", "avif", "jpg_2000"):
        found[name] = features.version(name)
    try:
        import pillow_heif
    except ImportError:
        return found
    return found | {"pillow_heif": pillow_heif.__version__, "libheif": pillow_heif.libheif_version()}


def main() -> None:
    """Try what has not been tried yet, then write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=20000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photos", type=int, default=4, help="photographs that small files are made of")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LATENTINDIGO_DATA", "../shared/data")))
    parser.add_argument("--log", type=Path, default=Path("fuzz.jsonl"), help="answers so far; a run goes on from them")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--show", type=int, metavar="N", help="try input N here and keep its bytes as fuzz-N.bin")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker or args.show is not None:
        seeds = make_seeds(args.data / "real", args.photos)
        if args.worker:
            worker(seeds, args.seed)
            return
        from fuzz_inputs import mutated

        form, kind, data = mutated(seeds, args.seed, args.show)
        Path(f"fuzz-{args.show}.bin").write_bytes(data)
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(f"{form}, {kind}, {len(data)} bytes: {try_input(data, args.show, Path(folder))}\n")
        return
    before = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []
    done = {answer["input"]: answer for answer in before}
    missing = [number for number in range(args.count) if number not in done]
    for answer in run(args, missing, args.log):
        done[answer["input"]] = answer
        if answer["outcome"] not in ("loaded", "refused"):
            sys.stdout.write(json.dumps(answer) + "\n")
        if len(done) % 1000 == 0:
            counts = collections.Counter(a["outcome"] for a in done.values())
            sys.stdout.write(f"{len(done)}: {dict(counts)}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{write(args, [done[n] for n in sorted(done) if n < args.count])}\n")


if __name__ == "__main__":
    main()
