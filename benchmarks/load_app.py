"""The web page under load: many clients at once, each of which sends small photos again and again.

    python benchmarks/load_app.py                            # 30 clients for two minutes
    python benchmarks/load_app.py --seconds 20 --clients 8   # a quick look

Starts `latentindigo app` with the embedded model in a process of its own. Each client is a session of its own that
uploads a photo, asks for a restoration, waits for its answer and fetches the picture. A client that is told that the
queue is full waits a second and tries again. Writes `benchmarks/results/<date>-load-app.json`: in `settings.found` the
counts and the server's memory, sampled every second; each row is one answered photo.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import datetime
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from bench import ROOT
from PIL import Image

from latentindigo.evaluation import Protocol, bootstrap_interval, make_row, write_results
from latentindigo.web_guard import QUEUE_FULL

RESULTS = ROOT / "benchmarks" / "results"
SIDES = (24, 32, 48)
SETTINGS = [2, 0, 0, False, "default", 0.5, 0, 1, "as the photo"]


def photo(generator: random.Random) -> tuple[bytes, int]:
    """A small PNG, a different one each time, and its side."""
    side = generator.choice(SIDES)
    buffer = io.BytesIO()
    ramp = Image.linear_gradient("L").rotate(generator.randrange(360)).resize((side, side))
    Image.merge("RGB", (ramp, Image.effect_noise((side, side), 40), ramp.rotate(90))).save(buffer, "PNG")
    return buffer.getvalue(), side


class Tally:
    """What happened to everything that was sent."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []

    def wrong(self, what: str) -> None:
        """Note what should not happen."""
        self.counts["wrong"] += 1
        self.errors[what[:200]] += 1


async def visit(url: str, number: int, end: float, tally: Tally) -> None:
    """One client: one photo after the other until the time is over; what was accepted is always waited for."""
    generator = random.Random(number)  # noqa: S311  (photos, not secrets)
    session = f"client{number}"
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(180)) as client:
        config = (await client.get("config")).json()
        index = next(entry["id"] for entry in config["dependencies"] if entry["api_name"] == "restore")
        while time.monotonic() < end:
            try:
                await _one(client, session, index, generator, tally)
            except (httpx.HTTPError, ValueError, KeyError, IndexError, OSError) as error:
                tally.wrong(f"{type(error).__name__}: {error}")


async def _one(client: httpx.AsyncClient, session: str, index: int, generator: random.Random, tally: Tally) -> None:
    started = time.monotonic()
    data, side = photo(generator)
    uploaded = await client.post("gradio_api/upload", files={"files": ("photo.png", data)})
    named = {"path": uploaded.json()[0], "meta": {"_type": "gradio.FileData"}}
    body = {"data": [named, *SETTINGS], "fn_index": index, "session_hash": session}
    joined = await client.post("gradio_api/queue/join", json=body)
    tally.counts["sent"] += 1
    if joined.status_code == 503 and joined.json()["detail"] == QUEUE_FULL:
        tally.counts["refused politely"] += 1
        await asyncio.sleep(1)
        return
    if joined.status_code != 200:
        tally.wrong(f"join: {joined.status_code} {joined.text}")
        return
    tally.counts["accepted"] += 1
    output = await _answer(client, session)
    if not output["success"]:
        tally.wrong(f"answer: {output['output']}")
        return
    picture = await client.get(f"gradio_api/file={output['output']['data'][0][0]['path']}")
    with Image.open(io.BytesIO(picture.content)) as image:
        if image.size != (2 * side, 2 * side):
            tally.wrong(f"a picture of {image.size} came back for one of {side}")
            return
    tally.counts["answered"] += 1
    tally.seconds.append(time.monotonic() - started)


async def _answer(client: httpx.AsyncClient, session: str) -> dict[str, Any]:
    async with client.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: "):
                message = json.loads(line[6:])
                if message.get("msg") == "process_completed":
                    return message
                if message.get("msg") == "unexpected_error":
                    raise ValueError(f"unexpected error: {message.get('message')}")
    raise ValueError("the stream ended without an answer")


def memory_mb(process: int) -> float:
    """Resident memory of a process in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found.group(1)) / 1024 if found else 0.0


async def watch(process: int, samples: list[float], over: asyncio.Event) -> None:
    """Sample the server's memory every second."""
    while not over.is_set():
        samples.append(memory_mb(process))
        await asyncio.sleep(1)


async def load(url: str, process: int, clients: int, seconds: float) -> tuple[Tally, list[float]]:
    """Run all clients; the memory is sampled until the last accepted photo is answered."""
    tally, samples, over = Tally(), [], asyncio.Event()
    watcher = asyncio.create_task(watch(process, samples, over))
    end = time.monotonic() + seconds
    await asyncio.gather(*(visit(url, number, end, tally) for number in range(clients)))
    over.set()
    await watcher
    return tally, samples


def main() -> None:
    """Start the page, load it, write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=30, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=120, metavar="S", help="default: %(default)s")
    parser.add_argument("--queue", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: the results of this folder"
    )
    options = parser.parse_args()
    command = [sys.executable, "-m", "latentindigo", "app", "--port", "0", "--threads", "1"]
    command += ["--queue", str(options.queue), "--concurrency", str(options.concurrency)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TMPDIR": folder}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603
        try:
            url = (server.stdout.readline() if server.stdout else "").split()[0]
            tally, samples = asyncio.run(load(url, server.pid, options.clients, options.seconds))
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(timeout=60)
        left = len(list(Path(folder).iterdir()))
    third = max(1, len(samples) // 3)
    found = {
        **{name: tally.counts[name] for name in ("sent", "accepted", "answered", "refused politely", "wrong")},
        "errors": dict(tally.errors),
        "memory_mb": {
            "start": round(samples[0]),
            "peak": round(max(samples)),
            "median of the second third": round(statistics.median(samples[third : 2 * third] or samples)),
            "median of the last third": round(statistics.median(samples[2 * third :] or samples)),
        },
        "exit status": status,
        "temporary files left": left,
    }
    chosen = {key: value for key, value in vars(options).items() if key != "out"}
    rows = [
        make_row("app", "", "load", f"{k}", seconds=seconds, peak_mb=None) for k, seconds in enumerate(tally.seconds)
    ]
    spread = bootstrap_interval(tally.seconds)._asdict() if tally.seconds else None
    summary = [{"method": "app", "variant": "", "protocol": "load", "seconds": spread}] if rows else []
    target = options.out / f"{datetime.date.today().isoformat()}-load-app.json"
    write_results(
        target,
        "load-app",
        [Protocol("load", "none", 2, "drawn")],
        rows,
        summary,
        settings={"app": {**chosen, "found": found}},
    )
    sys.stdout.write(json.dumps({**chosen, **found}, indent=1) + f"\n{target}\n")
    bad = tally.counts["wrong"] or tally.counts["accepted"] != tally.counts["answered"] or status or left
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
