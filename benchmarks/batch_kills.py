"""Kill a folder job again and again: is every result whole in the end, and nothing done twice without need?

    python benchmarks/batch_kills.py --out benchmarks/results --date 2026-11-26
    python benchmarks/batch_kills.py --out benchmarks/results --date 2026-11-26 --engine ray --kills 6

With the local engine the command `latentindigo batch` is started, killed with SIGKILL at a random moment, and started
again, as often as was asked, and then left alone. With Ray it is started once, and its actors are killed one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from latentindigo.batch_records import Row, is_current, read_record
from latentindigo.evaluation import Protocol, make_row, write_results
from latentindigo.images import LoadedImage, load_image, save_image
from latentindigo.storage import open_folder

SIDE = 48
STEPS = 2


def main() -> None:
    """Run the kills and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of result files")
    parser.add_argument("--date", required=True, help="first part of the file's name")
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batch-kills-") as place:
        run = Kills(args, Path(place))
        run.kill_actors() if args.engine == "ray" else run.kill_jobs()
        facts = run.judge()
    suite = "batch-kills" + ("-ray" if args.engine == "ray" else "")
    protocol = Protocol("batch", "none", 2, "drawn", seed=args.seed, count=args.photos)
    rows = [
        make_row(f"kill of {run.victim}", "", "batch", f"kill {k}", **moment) for k, moment in enumerate(run.moments)
    ]
    summary = {"method": f"kill of {run.victim}", "variant": "", "protocol": "batch"}
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"{args.date}-{suite}.json"
    write_results(target, suite, [protocol], rows, [summary | counted(facts)], settings={"facts": facts})
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    wrong = {name: facts[name] for name in ("missing", "damaged", "without_need", "stray") if facts[name]}
    if wrong:
        sys.exit(f"not as it should be: {wrong}")


def counted(facts: dict[str, Any]) -> dict[str, Any]:
    """Numbers as the schema wants them: intervals of no width."""
    numbers = {name: value for name, value in facts.items() if isinstance(value, int)}
    return {name: {"mean": value, "low": value, "high": value} for name, value in numbers.items()}


class Kills:
    """A folder of photos, a job over it, and what became of both."""

    def __init__(self, args: argparse.Namespace, place: Path) -> None:
        self.args = args
        self.source, self.out = place / "in", place / "out"
        self.random = random.Random(args.seed)  # noqa: S311  (moments, no secrets)
        self.moments: list[dict[str, Any]] = []
        self.victim = "an actor" if args.engine == "ray" else "the job"
        self.without_need: list[str] = []
        draw_album(self.source, args.photos)

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command in a process group of its own."""
        command = [sys.executable, "-m", "latentindigo", "batch", str(self.source), str(self.out)]
        options = ["--scale", "2", "--steps", str(STEPS), "--threads", "1", "--device", "cpu", "--json"]
        if self.args.engine == "ray":
            options += ["--engine", "ray", "--workers", "2"]
        return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, start_new_session=True)  # noqa: S603

    def complete(self) -> dict[str, str]:
        """Photos whose record says that nothing is left to do, and when that record was made."""
        out, found = open_folder(str(self.out)), {}
        for path in sorted(self.source.rglob("*.*")):
            name = path.relative_to(self.source).as_posix()
            record = read_record(out, name)
            told = record and (record["input_sha256"], record["settings_sha256"], record["outputs"], out)
            if record and told and is_current(record, *told):
                found[name] = record["finished"]
        return found

    def compare(self, before: dict[str, str]) -> dict[str, str]:
        """What is complete now; what was complete before and has been made again is noted."""
        after = self.complete()
        self.without_need += [name for name, finished in before.items() if after.get(name) != finished]
        return after

    def kill_jobs(self) -> None:
        """Kill at a random moment after the first photo of a run was looked at, or, every fifth time, during the start.

        The moment is drawn so that all kills together leave about a tenth of the photos for the last run.
        """
        done: dict[str, str] = {}
        for number in range(self.args.kills):
            process, started = self.start(), time.monotonic()
            journal = self.out / ".latentindigo" / "journal.jsonl"
            journal.unlink(missing_ok=True)
            early = number % 5 == 4
            while not early and process.poll() is None and not (journal.exists() and journal.stat().st_size):
                time.sleep(0.002)
            begun = time.monotonic() - started
            # Runs of which one in five dies early, and the others at this many photos on average.
            share = 0.9 * self.args.photos / (0.8 * self.args.kills)
            wait = self.random.uniform(0, 3 if early else 2 * share * self.seconds_each())
            time.sleep(wait)
            finished = process.poll() is not None
            if not finished:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            lasted = time.monotonic() - started
            after = self.compare(done)
            done = after
            left = len(list((self.out / ".latentindigo" / "partial").glob("*"))) if self.out.exists() else 0
            moment = {"complete": len(done), "half_written": left, "begun": round(begun, 3), "ended": int(finished)}
            self.moments.append({"seconds": round(lasted, 3), **moment})
            say(f"kill {number}: {moment}")
        process = self.start()
        process.wait()
        self.last = process.returncode
        self.compare(done)

    def seconds_each(self) -> float:
        """What a photo takes, as the records say."""
        records = [json.loads(path.read_text())["seconds"] for path in self.out.rglob("records/**/*.json")]
        return sum(records) / len(records) if records else 0.15

    def kill_actors(self) -> None:
        """Kill an actor at a random moment, then the next one when two are at work again."""
        process, started = self.start(), time.monotonic()
        done: dict[str, str] = {}
        for number in range(self.args.kills):
            actors: list[int] = []
            count = len(done)
            # The next photo shows that an actor is at work; then a random moment within a few.
            while process.poll() is None and (len(actors) < 1 or len(done) <= count):
                time.sleep(0.05)
                actors, done = actors_of(process.pid), self.compare(done)
            # So that the photos last for all kills: one has been waited for, the other worker goes on meanwhile.
            share = max(0.2, 0.7 * self.args.photos / self.args.kills - 1)
            time.sleep(self.random.uniform(0, share * self.seconds_each()))
            actors = actors_of(process.pid)
            if process.poll() is not None or not actors:
                say("the job ended before all kills")
                break
            os.kill(self.random.choice(actors), signal.SIGKILL)
            done = self.compare(done)
            self.moments.append({"seconds": round(time.monotonic() - started, 3), "complete": len(done)})
            say(f"kill {number}: {self.moments[-1]}")
        process.wait()
        self.last = process.returncode
        self.compare(done)

    def judge(self) -> dict[str, Any]:
        """Look at everything that is there in the end."""
        expected = {path.relative_to(self.source).as_posix() for path in self.source.rglob("*.*")}
        done = self.complete()
        damaged = []
        for name in done:
            size = load_image(self.out / name).size
            if size != tuple(2 * side for side in load_image(self.source / name).size):
                damaged.append(name)
        known = expected | {f".latentindigo/records/{name}.json" for name in expected}
        known |= {"manifest.jsonl", ".latentindigo/lock"}
        files = {p.relative_to(self.out).as_posix() for p in self.out.rglob("*") if p.is_file()}
        rows: list[Row] = [json.loads(line) for line in (self.out / "manifest.jsonl").read_text().splitlines()]
        return {
            "photos": len(expected),
            "kills": len(self.moments),
            "exit_code": self.last,
            "missing": sorted(expected - done.keys()),
            "damaged": damaged,
            "without_need": self.without_need,
            "stray": sorted(files - known),
            "kills_amid_writing": sum(bool(moment.get("half_written")) for moment in self.moments),
            "manifest_rows": len(rows),
            "manifest_failed": sum(row["status"] == "failed" for row in rows),
        }


def draw_album(folder: Path, photos: int, side: int = SIDE) -> None:
    """Photos with edges, gradients and noise, some in folders, as PNG, JPEG and WebP."""
    for number in range(photos):
        generator = torch.Generator().manual_seed(number)
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (side * 3 // 4, side), mode="bicubic")[0]
        smooth[:, : side // 3, : 4 + number % 20] = torch.rand(3, 1, 1, generator=generator)
        x = (smooth + 0.03 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
        name = f"{number:03}{('.png', '.jpg', '.webp')[number % 3]}"
        path = folder / ("trip/day" if number % 4 == 3 else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(LoadedImage(x), path)


def actors_of(driver: int) -> list[int]:
    """Processes of Ray's actors that hold a model, among the descendants of a process."""
    parents, named = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if command.startswith(b"ray::MapWorker"):
            named.append(int(folder.name))

    def descends(process: int) -> bool:
        while process > 1 and process != driver:
            process = parents.get(process, 0)
        return process == driver

    return [process for process in named if descends(process)]


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
