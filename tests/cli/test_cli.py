"""The command line: what it prints where, its exit codes, and that it does what the pipeline does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from help_tables import END, START, tables
from latentindigo import __version__, jobs, training
from latentindigo.cli import ExitCode, app
from latentindigo.images import LoadedImage, load_image, read_metadata, save_image
from latentindigo.pipeline import RestorationPipeline

QUICK = ("--steps", "1", "--device", "cpu")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Return a folder with two photos and a damaged file between them."""
    folder = tmp_path / "album"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in ("a.png", "c.png"):
        save_image(LoadedImage(torch.rand(3, 8, 12, generator=generator)), folder / name)
    (folder / "b.png").write_bytes(b"no picture")
    return folder


# ---------------------------------------------------------------------------------------------------------- restoring


@pytest.fixture(autouse=True)
def exact_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32 on every machine, as the pipelines do that results are compared with."""
    monkeypatch.setattr(jobs, "fast_dtype", lambda device: torch.float32)


def test_one_photo(album: Path, tmp_path: Path, tiny_model: Path, tiny_pipeline: RestorationPipeline) -> None:
    target = tmp_path / "x.png"
    result = run("restore", album / "a.png", "-o", target, "--model", tiny_model, "--seed", 5, *QUICK)
    assert result.exit_code == ExitCode.DONE, result.output
    assert result.stdout.splitlines() == [str(target)]
    expected = tiny_pipeline(load_image(album / "a.png").rgb, steps=1, seed=5, output_type="pt").images[0]
    assert (load_image(target).rgb - expected).abs().max() <= 0.51 / 255, "the file holds what the pipeline gives"
    metadata = read_metadata(target)
    assert metadata is not None
    assert (metadata["version"], metadata["model_hash"]) == (__version__, tiny_pipeline.weights_hash())


def test_a_folder_with_a_bad_file(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    result = run("restore", album, "-o", out, "--model", tiny_model, *QUICK)
    assert result.exit_code == ExitCode.SOME_FAILED
    assert result.stdout.splitlines() == [str(out / "a.png"), str(out / "c.png")]
    assert "b.png" in result.stderr
    assert "2 restored, 1 failed" in result.stderr


def test_one_json_object_per_photo(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    options = ("--num-samples", 2, "--detail-map", "--uncertainty-map", "--scale", 2, "--json")
    result = run("restore", album, "-o", tmp_path / "out", "--model", tiny_model, *options, *QUICK)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert rows[0]["output_size"] == [24, 16]
    assert rows[0]["settings"]["num_samples"] == 2
    assert rows[1]["error"]
    files = [*rows[0]["outputs"], *rows[0]["detail_maps"], rows[0]["uncertainty_map"]]
    assert len(files) == 5
    assert all(Path(name).is_file() for name in files)


def test_a_dry_run_writes_nothing(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    options = ("restore", album, "-o", tmp_path / "out", "--model", tiny_model, "--preset", "vivid", "--dry-run")
    result = run(*options)
    assert result.exit_code == ExitCode.DONE, result.output
    assert f"{album / 'a.png'} -> {tmp_path / 'out' / 'a.png'}" in result.stdout
    assert 'preset: "vivid"' in result.stdout
    assert "steps: " in result.stdout, "the preset's values are shown, not gaps"
    rows = [json.loads(line) for line in run(*options, "--json").stdout.splitlines()]
    assert [row["status"] for row in rows] == ["planned"] * 3
    assert not (tmp_path / "out").exists()


def test_options_reach_the_pipeline(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    options = {
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
    }
    given = [word for option, (text, *_) in options.items() for word in (option, text)]
    result = run("restore", album / "a.png", "-o", tmp_path, "--model", tiny_model, "--crop", "--json", *given)
    settings = json.loads(result.stdout)["settings"]
    assert settings["crop"] is True
    assert {name: settings[name] for _, name, _ in options.values()} == {n: value for _, n, value in options.values()}


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload_needs_an_accelerator(album: Path, tmp_path: Path, tiny_model: Path, offload: str) -> None:
    result = run("restore", album / "a.png", "-o", tmp_path, "--model", tiny_model, "--offload", offload, *QUICK)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert f"offload: '{offload}' keeps weights on the CPU" in result.stderr
    assert "leave it out, or name an accelerator" in result.stderr


@pytest.mark.parametrize(("offload", "switch"), [("model", "enable_model_cpu_offload"),
                                                 ("sequential", "enable_sequential_cpu_offload")])  # fmt: skip
def test_offload_turns_the_switch(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, offload: str, switch: str) -> None:
    """With an accelerator that only this test believes in: "meta" stands for it until something is computed."""
    turned: list[Any] = []
    monkeypatch.setattr(RestorationPipeline, switch, lambda pipe, device: turned.append((device, pipe.device.type)))
    jobs.load_pipeline(str(tiny_model), dtype="float32", device="meta", offload=offload)
    assert turned == [("meta", "cpu")]


# --------------------------------------------------------------------------------------------------------- exit codes


def test_nothing_is_overwritten_unasked(album: Path, tmp_path: Path, tiny_model: Path) -> None:
    target = tmp_path / "x.png"
    target.write_bytes(b"mine")
    options = ("restore", album / "a.png", "-o", target, "--model", tiny_model, *QUICK)
    result = run(*options)
    assert result.exit_code == ExitCode.SOME_FAILED
    assert "--overwrite" in result.stderr
    assert target.read_bytes() == b"mine"
    assert run(*options, "--overwrite").exit_code == ExitCode.DONE
    assert load_image(target).size == (48, 32)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-o", "out", "--scale", "0"),
        ("-o", "out", "--size", "big"),
        ("-o", "out", "--tile", "12"),
        ("-o", "out", "--preset", "bold"),
        ("-o", "out", "--strength", "0"),
        ("-o", "out", "--crop"),
        ("-o", "out", "--uncertainty-map"),
        ("-o", "out", "--device", "nonsense"),
        ("-o", "album"),
        ("-o", "out", "gone.png"),
        ("-o", "out", "--frobnicate"),
    ],
    ids=lambda options: " ".join(options) or "no output",
)
def test_wrong_usage(album: Path, tiny_model: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(album.parent)
    result = run("restore", "album", "--model", tiny_model, *options)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert result.stderr
    assert not result.stdout


@pytest.mark.parametrize("prior", [False, True], ids=["model", "prior"])
def test_a_model_that_cannot_be_loaded(album: Path, tmp_path: Path, tiny_model: Path, prior: bool) -> None:
    gone = tmp_path / "gone"
    models = ("--model", tiny_model, "--prior", gone) if prior else ("--model", gone)
    result = run("restore", album, "-o", tmp_path / "out", *models, *QUICK)
    assert result.exit_code == ExitCode.MODEL, result.output
    assert "gone" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory"), OSError(28, "No space left on device")],
    ids=["memory", "disk"],
)
def test_no_room(album: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cramped:
        """A pipeline for which every picture is too large."""

        def __call__(self, image: Any, **_: Any) -> Any:
            raise error

        def weights_hash(self) -> str:
            return ""

    monkeypatch.setattr(jobs, "load_pipeline", lambda *_, **__: Cramped())
    result = run("restore", album / "a.png", "-o", tmp_path / "out", "--json")
    assert result.exit_code == ExitCode.RESOURCES, result.output
    assert json.loads(result.stdout)["kind"] in ("memory", "disk")


# ------------------------------------------------------------------------------------------------- the other commands


def test_train_passes_everything_on(album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def record(*arguments: Any, **options: Any) -> Path:
        seen.append((arguments, options))
        return tmp_path / "run" / "final"

    monkeypatch.setattr(training, "train", record)
    recipe = tmp_path / "mine.toml"
    recipe.touch()
    result = run(
        "train", "latent-inn", album, "-o", tmp_path / "run", "--recipe", recipe, "--init-from", "embedded",
        "--resume", "--steps", 7, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == ExitCode.DONE, result.output
    assert result.stdout.splitlines() == [str(tmp_path / "run" / "final")]
    ((arguments, options),) = seen
    assert arguments == ("latent-inn", album, recipe, tmp_path / "run")
    assert options == {
        "init_from": "embedded",
        "resume": True,
        "overrides": {"steps": 7},
        "device": "cpu",
        "progress": True,
        "prior": None,
    }


def test_train_for_a_prior(album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(training, "train", lambda *_, **options: seen.update(options) or tmp_path)
    result = run("train", "latent-inn", album, "-o", tmp_path / "run", "--prior", "sd/")
    assert result.exit_code == ExitCode.DONE, result.output
    assert seen["prior"] == "sd/"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such setting"), ExitCode.USAGE),
        (FileNotFoundError("no such model"), ExitCode.MODEL),
        (RuntimeError("CUDA out of memory"), ExitCode.RESOURCES),
        (OSError(28, "No space left on device"), ExitCode.RESOURCES),
        (RuntimeError("the loss is not finite"), ExitCode.SOME_FAILED),
    ],
    ids=lambda value: value.name if isinstance(value, ExitCode) else "",
)
def test_train_fails_with_the_documented_codes(
    album: Path, tmp_path: Path, error: Exception, code: ExitCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Path:
        raise error

    monkeypatch.setattr(training, "train", fail)
    result = run("train", "denoiser", album, "-o", tmp_path / "run")
    assert result.exit_code == code, result.output
    assert str(error.args[-1]) in " ".join(result.stderr.split())


def test_info(tiny_model: Path, tiny_pipeline: RestorationPipeline) -> None:
    result = run("info", "--model", tiny_model)
    assert result.exit_code == ExitCode.DONE, result.output
    for text in (__version__, tiny_pipeline.weights_hash(), "device: cpu", "float32", "gradio"):
        assert text in result.stdout
    facts = json.loads(run("info", "--model", tiny_model, "--json").stdout)
    assert facts["model"]["hash"] == tiny_pipeline.weights_hash()


def test_info_without_a_model_still_informs(tmp_path: Path) -> None:
    result = run("info", "--model", tmp_path / "gone", "--json")
    assert result.exit_code == ExitCode.MODEL
    assert json.loads(result.stdout)["version"] == __version__


def test_version() -> None:
    assert run("--version").stdout == f"latentindigo {__version__}\n"


# ----------------------------------------------------------------------------------------------------- help and pages


def test_help_is_the_documented_one(root: Path) -> None:
    """The option tables of docs/cli.md are a snapshot of the help; `python tests/help_tables.py` renews them."""
    page = (root / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page.partition(START)[2].partition(END)[0].strip() == tables(app).strip()


@pytest.mark.parametrize("command", ["restore", "batch", "train", "info"])
def test_help_names_codes_and_gives_examples(command: str) -> None:
    text = " ".join(run(command, "--help").stdout.split())
    assert "Exit codes" in text
    assert text.count("$ latentindigo") >= 2


def test_every_exit_code_is_documented(root: Path) -> None:
    page = (root / "docs" / "cli.md").read_text(encoding="utf-8")
    for code in ExitCode:
        assert f"| {code.value} |" in page


def test_module_and_command_are_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["latentindigo", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("latentindigo", run_name="__main__")
    assert end.value.code == 0
    assert __version__ in capsys.readouterr().out
