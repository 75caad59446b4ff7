"""`latentindigo benchmark`: what it prints where, the files it leaves, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from latentindigo import evaluation, metrics
from latentindigo.cli import ExitCode, app
from latentindigo.images import LoadedImage, save_image


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["benchmark", *(str(argument) for argument in arguments)])


@pytest.fixture(autouse=True)
def quick_swd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few patches: the distance itself is tested elsewhere."""
    monkeypatch.setattr(evaluation, "swd", lambda x, ref, **_: metrics.swd(x, ref, patches=100, projections=4))


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in ("a.png", "b.png"):
        save_image(LoadedImage(torch.rand(3, 48, 64, generator=generator)), folder / name)
    return folder


def test_tables_on_stdout_and_files_in_the_folder(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    chosen = ("--method", "bicubic", "--method", "lanczos", "--crop", 32, "--model", tiny_model, "--device", "cpu")
    result = run(album, "-o", out, *chosen, "--protocol", "mild", "--protocol", "noise15", "--name", "try")
    assert result.exit_code == ExitCode.DONE, result.output
    assert "`mild` (version 1): ×4, 2 images of album, crops of 32², RGB, seed 0" in result.stdout
    assert "| noise15 | lanczos |" in result.stdout
    names = {path.name[10:] for path in out.iterdir()}
    assert names == {"-try.json", "-try.md", "-try.png", "-try-mild.png", "-try-noise15.png"}
    assert "result file" in result.stderr


def test_json_and_a_method_of_ones_own(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from latentindigo.baselines import Lanczos\n\ndef make(pipe):\n    return Lanczos('mine')\n", encoding="utf-8"
    )
    chosen = ("--method", "lanczos", "--add", mine, "--no-controls", "--limit", 1, "--model", tiny_model)
    result = run(album, "-o", tmp_path / "out", *chosen, "--json")
    assert result.exit_code == ExitCode.DONE, result.output
    ours, theirs = sorted(json.loads(result.stdout), key=lambda entry: entry["method"])
    assert (ours["method"], theirs["method"]) == ("lanczos", "mine")
    assert ours["psnr"] == theirs["psnr"]


def test_usage_errors_are_one_sentence(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    out = ("-o", tmp_path / "out", "--model", tiny_model)
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((album, *out, "--method", "nonsense"), "unknown method nonsense; known: bicubic"),
        ((album, *out, "--protocol", "nonsense"), "unknown protocol 'nonsense'; known: mild"),
        ((tmp_path / "empty", *out, "--method", "bicubic"), "no image"),
        ((album, *out, "--add", tmp_path / "none.py"), "a Python file that defines make(pipe)"),
    ):
        result = run(*arguments)
        assert result.exit_code == ExitCode.USAGE, result.output
        assert message in " ".join(result.stderr.split())
        assert result.stdout == ""
    assert run(tmp_path / "nowhere", *out).exit_code == ExitCode.USAGE
    assert run(album, "-o", tmp_path / "out", "--model", "no/such/model").exit_code == ExitCode.MODEL
