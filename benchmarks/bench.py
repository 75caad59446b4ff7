"""A benchmark's run: the model, the images, and what has been measured so far."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentindigo import RestorationPipeline
from latentindigo.evaluation import (
    Interval,
    Method,
    Pair,
    Protocol,
    Restored,
    Result,
    Row,
    evaluate,
    make_pairs,
    markdown_table,
    paired_difference,
    summarise,
    write_results,
)

ROOT = Path(__file__).resolve().parent.parent


class Bench:
    """One suite's run: the model, the images, and what has been measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if args.threads:
            torch.set_num_threads(args.threads)
        dtype = getattr(torch, args.dtype)
        self.pipe = RestorationPipeline.from_pretrained(args.model, torch_dtype=dtype, device=args.device)
        self.prior = self.pipe.prior
        self.protocols: list[Protocol] = []
        self.rows: list[Row] = []
        self.summary: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}

    def folder(self, name: str) -> Path:
        """A folder of the data."""
        folder = self.args.data / name
        if not folder.is_dir():
            sys.exit(f"no folder {name!r} in the data folder; name it with --data or LATENTINDIGO_DATA")
        return folder

    def pairs(self, protocol: Protocol, degrader: Callable[..., Tensor] | None = None) -> list[Pair]:
        """Register a protocol and make its pairs."""
        protocol = dataclasses.replace(protocol, count=self.args.limit)
        self.protocols.append(protocol)
        tune = protocol.images == "tune"
        names = (ROOT / "recipes" / "tune.txt").read_text().split() if tune else None
        return make_pairs(self.folder("train" if tune else protocol.images), protocol, names, degrader)

    def run(
        self, protocol: Protocol, pairs: Sequence[Pair], method: str, variant: str, restore: Callable[..., Restored]
    ) -> Result | None:
        """Evaluate one method unless --only leaves it out or it was run; the file is written anew after each.

        A suite of suites meets the same baselines several times; the second time gives None.
        """
        name = f"{method} {variant}".strip()
        if any((e["protocol"], e["method"], e["variant"]) == (protocol.name, method, variant) for e in self.summary):
            return None
        baseline = method in ("bicubic", "estimator", "input")
        if self.args.only and not baseline and not any(part in name for part in self.args.only):
            return None
        result = evaluate(Method(method, variant, restore), protocol, pairs, batch=self.args.batch)
        self.settings[f"{protocol.name}: {name}"] = result.settings
        self.add(result.rows, summarise(result, pairs))
        return result

    def add(self, rows: Sequence[Row], entry: dict[str, Any]) -> None:
        """Take in the rows and the summary of one method, save, and show the line."""
        self.rows += rows
        self.summary.append(entry)
        self.save()
        say(markdown_table([entry], [k for k in entry if k not in ("method", "variant", "protocol")]).split("\n")[-1])

    def difference(self, protocol: str, key: tuple[str, str], baseline: tuple[str, str], label: str) -> None:
        """Add the paired PSNR difference to a baseline to the method's summary, where both were run and have a PSNR."""
        entries = {(e["method"], e["variant"]): e for e in self.summary if e["protocol"] == protocol and "psnr" in e}
        if key in entries and baseline in entries and key != baseline:
            interval = paired_difference(self.rows, key, baseline, protocol)
            entries[key][f"psnr_minus_{label}"] = interval._asdict()

    @property
    def path(self) -> Path:
        """The result file."""
        return self.args.out / f"{self.args.date}-{self.args.suite}.json"

    def save(self) -> None:
        """Write the result file."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        content = (self.args.suite, self.protocols, self.rows, self.summary)
        write_results(self.path, *content, pipe=self.pipe, settings=self.settings)

    def gamma(self, y: Tensor) -> Tensor:
        """F(y) of one image (3, h, w)."""
        encoder = self.pipe.degradation_encoder
        return encoder(y[None].to(encoder.device, encoder.dtype))

    def guidance(self, preset: str, **changes: Any) -> dict[str, Any]:
        """A preset's guidance with what is not None replaced."""
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.asdict(self.pipe.presets[preset].guidance) | given


def say(text: str) -> None:
    """Print a line at once, so that a redirected log can be followed."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def entry_of(row: Row, **intervals: Interval) -> dict[str, Any]:
    """A summary entry for a row's method."""
    return {k: row[k] for k in ("method", "variant", "protocol")} | {k: v._asdict() for k, v in intervals.items()}
