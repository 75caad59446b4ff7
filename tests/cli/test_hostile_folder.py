"""The command over folders and disks as they are: each bad file is named once, the rest is done, nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from latentindigo.cli import ExitCode, app
from latentindigo.command import short_warnings, stderr_console
from latentindigo.images import LoadedImage, load_image, save_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
QUICK = ("--steps", "1", "--device", "cpu", "--dtype", "float32")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def picture(width: int = 12, height: int = 8, seed: int = 0) -> LoadedImage:
    return LoadedImage(torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def album(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with two good photos and one bad file of every kind between them."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    from fuzz_inputs import seed_files

    folder = tmp_path / "album"
    folder.mkdir()
    save_image(picture(), folder / "a.png")
    save_image(picture(), folder / "z.jpg")
    photo = Image.effect_noise((32, 24), 60).convert("RGB")
    for number, (form, data) in enumerate(seed_files([photo])):
        (folder / f"m{number:02}-cut.{form}").write_bytes(data[: len(data) // 4])
    for name, data in {
        "m-empty.png": b"",
        "m-text.png": b"Dear Sir,",
        "m-\x1b[31mred.png": b"text",
        "m-line\nbreak.png": b"text",
        "m-\udcff.png": b"text",
        "m-\u202egnp.png": b"text",
        "-m.png": b"text",
        "m" * 251 + ".png": b"text",
        "m-bomb.ppm": b"P6 99999 99999 255\n",
    }.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "m-pipe.png")
    (folder / "m-loop.png").symlink_to("m-loop.png")
    (folder / "m-gone.png").symlink_to("nowhere.png")
    return folder


def check_report(result: Result, out: Path, bad: int) -> None:
    """Two photos done and named on stdout; each other one named on one line of stderr; exit code 1; no other file."""
    assert result.exit_code == ExitCode.SOME_FAILED, result.output
    assert result.stdout.splitlines() == [str(out / "a.png"), str(out / "z.jpg")]
    assert sorted(os.listdir(out)) == ["a.png", "z.jpg"]
    lines = result.stderr.splitlines()
    failed = [line for line in lines if line.startswith("failed: ")]
    assert len(failed) == len(set(failed)) == bad, result.stderr
    assert all(line.endswith(".") for line in failed), [line for line in failed if not line.endswith(".")]
    assert lines[-1] == f"2 restored, {bad} failed"
    assert not {char for char in result.stderr if char < " " and char != "\n"} | (set(result.stderr) & {"\u202e"})


def test_a_folder_of_everything(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    bad = len(os.listdir(album)) - 2
    result = run("restore", album, "-o", tmp_path / "out", "--model", tiny_model, "--scale", 2, *QUICK)
    check_report(result, tmp_path / "out", bad)
    assert bad > 50
    assert load_image(tmp_path / "out" / "z.jpg").size == (24, 16)
    # Again as JSON, where names are exact: a program can open what it is told.
    again = run("restore", album, "-o", tmp_path / "json", "--model", tiny_model, "--scale", 1, "--json", *QUICK)
    rows = [json.loads(line) for line in again.stdout.splitlines()]
    assert {row["input"] for row in rows} == {str(path) for path in album.iterdir()}
    assert [row["status"] for row in rows].count("done") == 2
    assert all(row["kind"] == "input" for row in rows if row["error"])


def test_a_folder_of_everything_catches(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    result = run("restore", album, "-o", tmp_path / "out", "--model", tiny_model, "--scale", 1, *QUICK)
    (tmp_path / "out" / ".a.png.123.part").touch()
    with pytest.raises(AssertionError, match="part"):
        check_report(result, tmp_path / "out", len(os.listdir(album)) - 2)


def test_named_one_by_one(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    """As a shell's `*.png` would: a link that leads nowhere is one failure, not the end."""
    names = [album / "m-gone.png", album / "a.png", album / "m-loop.png", album / "m-pipe.png"]
    result = run("restore", *names, "-o", tmp_path / "out", "--model", tiny_model, *QUICK)
    assert result.exit_code == ExitCode.SOME_FAILED, result.output
    assert result.stdout.splitlines() == [str(tmp_path / "out" / "a.png")]
    for name in ("m-gone.png", "m-loop.png", "m-pipe.png"):
        assert sum(name in line for line in result.stderr.splitlines()) == 1


def test_a_name_that_is_no_text_comes_out_as_it_went_in(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in").mkdir()
    save_image(picture(), tmp_path / "in" / "\udcff.png")
    result = run("restore", tmp_path / "in", "-o", tmp_path / "out", "--model", tiny_model, *QUICK)
    assert result.exit_code == ExitCode.DONE, result.output
    assert result.stdout_bytes == os.fsencode(tmp_path / "out") + b"/\xff.png\n"
    assert (tmp_path / "out" / "\udcff.png").exists()


@pytest.mark.filterwarnings("default")
def test_warnings_of_pillow_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with short_warnings(stderr_console()):
        for place in ("site-packages/PIL/TiffImagePlugin.py", "site-packages/mine/TiffImagePlugin.py"):
            warnings.warn_explicit(f"from \x1b {place}", UserWarning, place, 1)
    assert capsys.readouterr().err == "warning: from \\x1b site-packages/mine/TiffImagePlugin.py\n"


# ---------------------------------------------------------------------------------------------------------- real disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 256 KiB, or skip where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount") if sys.platform == "linux" else None
    options = ("-t", "tmpfs", "-o", "size=256k", "tmpfs")
    if mount is None or subprocess.run([mount, *options, str(place)], capture_output=True).returncode:
        pytest.skip("needs a disk of its own: only root on Linux may mount one")
    yield place
    subprocess.run([shutil.which("umount") or "", str(place)], check=True)


def test_a_real_disk_that_is_full(small_disk: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Noise of 400x300 takes more than the 100 KB that are free, though photographs that large might not."""
    folder = tmp_path / "in"
    folder.mkdir()
    for k, (name, width, height) in enumerate([("a", 16, 8), ("b", 400, 300), ("c", 400, 300), ("d", 16, 9)]):
        save_image(picture(width, height, k), folder / f"{name}.png")
    (folder / "e.png").write_bytes(b"text")
    options = ("--model", tiny_model, "--scale", 1, "--init", "encode", *QUICK)
    (small_disk / "ballast").write_bytes(bytes(150_000))
    result = run("restore", folder, "-o", small_disk, *options)
    assert result.exit_code == ExitCode.RESOURCES, result.output
    assert result.stdout.splitlines() == [str(small_disk / name) for name in ("a.png", "d.png")]
    assert sorted(os.listdir(small_disk)) == ["a.png", "ballast", "d.png"]
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed")]
    assert len(failed) == 3
    assert "b.png' cannot be written: No space left on device; free some room or write to another disk" in failed[0]
    assert "c.png' is not computed: an earlier result, no larger, found no room" in failed[1]
    assert "e.png' is no picture" in failed[2]


def test_a_disk_mounted_for_reading_only(small_disk: Path, tmp_path: Path, tiny_model: Path) -> None:
    save_image(picture(), tmp_path / "a.png")
    subprocess.run([shutil.which("mount") or "", "-o", "remount,ro", str(small_disk)], check=True)
    result = run("restore", tmp_path / "a.png", "-o", small_disk / "out", "--model", tiny_model, *QUICK)
    assert result.exit_code == ExitCode.SOME_FAILED, result.output
    assert "out' cannot be written: Read-only file system; write to another folder." in result.stderr
