"""One worker against two on a Ray cluster of this machine, and against no cluster: the same bytes, and how fast.

    python benchmarks/batch_ray.py --out benchmarks/results --date 2026-11-26

Every run restores the same drawn photos with the embedded model, one CPU thread to a worker. Time is counted from the
first result to the last, so that starting Ray and loading the model do not count; they are told apart.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from batch_kills import counted, draw_album, say

from latentindigo.evaluation import Protocol, make_row, write_results


def main() -> None:
    """Run, compare, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of result files")
    parser.add_argument("--date", required=True, help="first part of the file's name")
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--side", type=int, default=96, help="width of the photos in pixels")
    parser.add_argument("--scale", type=int, default=2)
    args = parser.parse_args()
    protocol = Protocol("batch", "none", args.scale, "drawn", crop=args.side, count=args.photos)
    rows, summary, bytes_of = [], [], {}
    runs = {"local": [], "ray, 1 worker": ["1"], "ray, 2 workers": ["2"]}
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="batch-ray-") as place:
        draw_album(Path(place, "in"), args.photos, args.side)
        for number, (name, workers) in enumerate(runs.items()):
            out = Path(place, f"out{number}")
            moments = run(Path(place, "in"), out, args.scale, workers)
            bytes_of[name] = digest(out)
            steady = (len(moments) - 2) / (moments[-1] - moments[1])
            figures = {"seconds": moments[-1], "first_result": moments[1], "photos_per_second": steady}
            rows.append(make_row(name, "", "batch", "all photos", **figures))
            entry = {"method": name, "variant": "", "protocol": "batch"}
            summary.append(entry | {k: {"mean": v, "low": v, "high": v} for k, v in figures.items()})
            say(f"{name}: {figures}")
    equal = {name: int(bytes_of[name] == bytes_of["local"]) for name in runs}
    facts = {"same_bytes_as_local": equal, "load_before": busy, "cores": os.cpu_count()}
    summary = [entry | counted({"same_bytes": equal[entry["method"]]}) for entry in summary]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.date}-batch-ray.json"
    write_results(path, "batch-ray", [protocol], rows, summary, settings={"facts": facts})
    say(str(facts))
    if not all(equal.values()):
        sys.exit("two engines wrote different bytes")


def run(source: Path, out: Path, scale: int, workers: list[str]) -> list[float]:
    """Seconds from the start to each printed result, the start (0) first."""
    command = [sys.executable, "-m", "latentindigo", "batch", str(source), str(out), "--scale", str(scale)]
    ray = ["--engine", "ray", "--workers", *workers] if workers else []
    started, moments = time.monotonic(), [0.0]
    options = ["--threads", "1", "--device", "cpu", "--json"]
    with subprocess.Popen([*command, *options, *ray], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        for _ in process.stdout or ():
            moments.append(time.monotonic() - started)
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}")
    return moments


def digest(out: Path) -> str:
    """One hash of all pictures and their names."""
    total = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix in (".png", ".jpg", ".webp") and ".latentindigo" not in path.parts:
            total.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()
