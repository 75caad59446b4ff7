"""`latentindigo batch`: the pixels of `restore`, exit codes, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from batches import NAMES, make_album, manifest, results, stray
from batches import job_of as job_over
from latentindigo import jobs
from latentindigo.cli import ExitCode, app
from latentindigo.storage import open_folder

QUICK = ("--steps", "1", "--scale", "2", "--device", "cpu")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Return a folder with five photos."""
    return make_album(tmp_path / "in")


@pytest.fixture(autouse=True)
def exact_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32 on every machine."""
    monkeypatch.setattr(jobs, "fast_dtype", lambda device: torch.float32)


def test_the_same_files_as_restore(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    options = ("--model", tiny_model, "--seed", 3, "--num-samples", 2, "--detail-map", "--uncertainty-map", *QUICK)
    first = run("batch", album, tmp_path / "many", *options)
    assert first.exit_code == ExitCode.DONE, first.output
    second = run("restore", album, "-o", tmp_path / "one-by-one", "--recursive", *options)
    assert second.exit_code == ExitCode.DONE, second.output
    assert results(tmp_path / "many") == results(tmp_path / "one-by-one")
    assert sorted(first.stdout.splitlines()) == list(results(tmp_path / "many"))
    assert "5 restored, 0 kept, 0 failed" in first.stderr


def test_options_reach_the_settings(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    options: dict[str, tuple[str, str, Any]] = {
        "--size": ("20x20", "size", [20, 20]),
        "--preset": ("faithful", "preset", "faithful"),
        "--method": ("pixel-inn", "method", "pixel-inn"),
        "--update": ("stopped", "update", "stopped"),
        "--init": ("encode", "init", "encode"),
        "--steps": ("2", "steps", 2),
        "--strength": ("0.5", "strength", 0.5),
        "--fidelity": ("0.25", "fidelity", 0.25),
        "--seed": ("3", "seed", 3),
        "--tile": ("256", "tile", 256),
        "--scheduler": ("euler", "scheduler", "euler"),
    }
    given = [word for option, (text, *_) in options.items() for word in (option, text)]
    few = ("--include", "*.png", "--exclude", "trip", "--no-quality", "--threads", 1)
    result = run("batch", album, tmp_path / "out", "--model", tiny_model, "--crop", "--json", *few, *given)
    assert result.exit_code == ExitCode.DONE, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["input"] for row in rows] == ["a.png", "b.png"]
    assert rows[0]["niqe"] is rows[0]["invented"] is None
    settings = rows[0]["settings"]
    assert settings["crop"] is True
    assert {name: settings[name] for _, name, _ in options.values()} == {n: value for _, n, value in options.values()}


def test_a_bad_photo_is_named_and_a_second_run_goes_on(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    (album / "bad.png").write_bytes(b"no picture")
    arguments = ("batch", album, tmp_path / "out", "--model", tiny_model, "--json", *QUICK)
    for expected in ("5 restored, 0 kept, 1 failed", "0 restored, 5 kept, 1 failed"):
        result = run(*arguments)
        assert result.exit_code == ExitCode.SOME_FAILED
        assert "failed: bad.png: 'bad.png' is no picture" in result.stderr
        assert expected in result.stderr
        assert len(result.stdout.splitlines()) == 6
    assert not stray(tmp_path / "out")


def test_a_name_cannot_command_the_terminal(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    (album / "x\x1b]0;owned\x07.png").write_bytes(b"no picture")
    result = run("batch", album, tmp_path / "out", "--model", tiny_model, *QUICK)
    assert "\x1b]0;" not in result.stderr
    assert "failed: x\\x1b]0;owned\\x07.png" in result.stderr


def test_a_reader_that_leaves_early_changes_no_exit_code(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    command = [sys.executable, "-m", "latentindigo", "batch", str(album), str(tmp_path / "out"), "--model"]
    environment = {**os.environ, "PYTHONPATH": str(Path(jobs.__file__).parents[1])}
    with subprocess.Popen(
        [*command, str(tiny_model), *QUICK], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert "5 restored" in errors
    assert "BrokenPipe" not in errors


def test_a_manifest_by_name(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    import pyarrow.parquet as pq

    options = ("--model", tiny_model, "--manifest", tmp_path / "lists" / "all.parquet", *QUICK)
    assert run("batch", album, tmp_path / "out", *options).exit_code == ExitCode.DONE
    assert pq.read_table(tmp_path / "lists" / "all.parquet")["input"].to_pylist() == NAMES
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_what_libraries_print_is_no_result(
    album: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentindigo import batch

    real = batch.restore_picture
    noisy = lambda *given, **named: (sys.stdout.write("noise\n"), real(*given, **named))[1]  # noqa: E731
    monkeypatch.setattr(batch, "restore_picture", noisy)
    result = run("batch", album, tmp_path / "out", "--model", tiny_model, *QUICK)
    assert sorted(result.stdout.splitlines()) == list(results(tmp_path / "out"))
    assert result.stderr.count("noise") == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("IN", "IN"), ExitCode.USAGE, "apart from the input folder"),
        (("IN/a.png", "OUT"), ExitCode.USAGE, "`restore` takes single ones"),
        (("IN", "OUT", "--include", "*.webp"), ExitCode.USAGE, "no photos in"),
        (("IN", "OUT", "--manifest", "m.csv"), ExitCode.USAGE, "ending in .jsonl or .parquet"),
        (("IN", "OUT", "--workers", "2"), ExitCode.USAGE, "add --engine ray"),
        (("IN", "OUT", "--device", "nonsense"), ExitCode.USAGE, "'nonsense' cannot be used"),
        (("IN", "OUT", "--model", "/no/such/model"), ExitCode.MODEL, "/no/such/model"),
        (("gopher://a/b", "OUT"), ExitCode.USAGE, "in a store that fsspec knows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_use(
    album: Path, tmp_path: Path, tiny_model: Path, arguments: tuple[str, ...], code: ExitCode, message: str
) -> None:
    named = {"IN": album, "IN/a.png": album / "a.png", "OUT": tmp_path / "out"}
    places = [named.get(word, word) for word in arguments]
    model = () if "--model" in arguments else ("--model", tiny_model)
    result = run("batch", *places, *model, "--steps", 1)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_a_folder_in_use_is_refused(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    with open_folder(str(tmp_path / "out")).lock():
        result = run("batch", album, tmp_path / "out", "--model", tiny_model, *QUICK)
    assert result.exit_code == ExitCode.USAGE
    assert f"process {os.getpid()}" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(MemoryError(), ExitCode.RESOURCES), (KeyError("x"), ExitCode.SOME_FAILED)]
)
def test_what_failed_decides_the_code(
    album: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: ExitCode
) -> None:
    from latentindigo import batch

    def broken(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(batch, "restore_picture", broken)
    result = run("batch", album, tmp_path / "out", "--model", tiny_model, *QUICK)
    assert result.exit_code == code
    assert "failed again: a.png" in result.stderr
    assert "0 restored, 0 kept, 5 failed" in result.stderr


def test_the_interrupt_key_stops_in_order(
    album: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentindigo import batch

    real, calls = batch.restore_picture, iter([None, None, KeyboardInterrupt()])

    def interrupted(*given: Any, **named: Any) -> Any:
        if error := next(calls):
            raise error
        return real(*given, **named)

    monkeypatch.setattr(batch, "restore_picture", interrupted)
    result = run("batch", album, tmp_path / "out", "--model", tiny_model, *QUICK)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "stopped; the same command goes on from here"
    assert list(results(tmp_path / "out")) == ["a.png", "b.png"], "a.png and the one of b.gif"


SLOW = """
import sys, time
from latentindigo import batch
from latentindigo.cli import main
real = batch.restore_picture
def slow(*given, **named):
    time.sleep(0.3)
    return real(*given, **named)
batch.restore_picture = slow
main()
"""


def test_a_stop_is_orderly(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "batch",
        str(album),
        str(out),
        "--model",
        str(tiny_model),
        "--no-quality",
        "--dtype",
        "float32",
        *QUICK,
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(jobs.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (out / "a.png").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "stopped; the same command goes on from here"
    done = list(results(out))
    assert 1 <= len(done) < 5
    assert not [name for name in stray(out) if "journal" not in name]
    again = run(*arguments)
    assert again.exit_code == ExitCode.DONE
    assert f"{5 - len(done)} restored, {len(done)} kept" in again.stderr
    assert len(manifest(job_over(album, out=out))) == 5
