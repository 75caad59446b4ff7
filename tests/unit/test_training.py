"""Training: recipes and their messages, runs that survive a kill, averages, clipping, and one step of every part."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from latentindigo import training
from latentindigo.autoencoder import PatchAutoencoder
from latentindigo.data import PhotoFolder, sample_generator
from latentindigo.degradations import blur, gaussian_kernel
from latentindigo.inn import DegradationEncoder, Estimator, InvertibleNet
from latentindigo.objectives import OBJECTIVES, LatentINNObjective, Objective, _band_response
from latentindigo.training import PARTS, TrainConfig, load_recipe, train
from tolerances import assert_close, randomise_

GAMMA_DIM = 8
VAE: dict[str, Any] = {
    "latent_channels": 4,
    "encoder_channels": [8, 8],
    "decoder_channels": [8, 8, 8],
    "decoder_blocks": [1, 1, 1],
}
INN: dict[str, Any] = {"gamma_dim": GAMMA_DIM, "hidden": 4, "blocks": 1, "num_steps": 1}
MODELS: dict[str, dict[str, Any]] = {
    "autoencoder": VAE,
    "denoiser": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "add_attention": False,
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    },
    "estimator": {"width": 8, "blocks": 1, "gamma_dim": GAMMA_DIM},
    "pixel-inn": {**INN, "channels": 3},
    "latent-inn": {**INN, "channels": 4, "offset": 0.0, "mix": True, "gain": True, "spread": True},
}
FOLDERS = {
    "autoencoder": {"vae"},
    "denoiser": {"denoiser", "scheduler"},
    "estimator": {"estimator", "degradation_encoder"},
    "pixel-inn": {"pixel_inn"},
    "latent-inn": {"latent_inn"},
}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Let every test choose its precision: accelerate keeps one state for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth photographs of 96 x 80 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for k in range(8):
        small = Image.fromarray(draw.integers(0, 256, (10, 12, 3), dtype=np.uint8))
        small.resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the parts that later parts are trained on, in half precision as in the package."""
    folder = tmp_path_factory.mktemp("base")
    vae, encoder = PatchAutoencoder(**VAE), DegradationEncoder(gamma_dim=GAMMA_DIM, width=4)
    parts = {"vae": vae, "degradation_encoder": encoder, "estimator": Estimator(**MODELS["estimator"])}
    for seed, (name, network) in enumerate(parts.items()):
        randomise_(network, seed, 0.5).half().save_pretrained(folder / name)
    return folder


def toml(value: Any) -> str:
    """Write numbers, strings, booleans and lists as TOML, which JSON happens to be for these."""
    return json.dumps(value)


def write_recipe(path: Path, part: str, base: Path, objective: dict[str, Any] | None = None, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "steps": 4, "batch_size": 2, "crop": 32, "learning_rate": 0.01, "warmup": 1, "ema_decay": 0.9, "bf16": False,
        "log_every": 1, "save_every": 2, "sample_every": 100, **changes,
    }  # fmt: skip
    lines = [f"part = {toml(part)}", *(f"{name} = {toml(value)}" for name, value in settings.items())]
    lines += ["[model]", *(f"{name} = {toml(value)}" for name, value in MODELS[part].items())]
    on_base = {} if part in ("autoencoder", "estimator") else {"base": str(base)}
    lines += ["[objective]", *(f"{name} = {toml(value)}" for name, value in {**on_base, **(objective or {})}.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


Run = Callable[..., Path]


@pytest.fixture
def run(photos: Path, base: Path, tmp_path: Path) -> Run:
    """Train a tiny part: run("pixel-inn", out="a", steps=3) returns the run's folder."""

    def start(part: str = "pixel-inn", out: str = "run", resume: bool = True, **changes: Any) -> Path:
        init_from = changes.pop("init_from", None)
        recipe = write_recipe(tmp_path / f"{out}.toml", part, base, **changes)
        folder = tmp_path / out
        train(part, photos, recipe, folder, init_from=init_from, resume=resume, device="cpu", progress=False)
        return folder

    return start


# --- recipes ---------------------------------------------------------------------------------------------------------


def built(part: str, config: TrainConfig) -> list[nn.Module]:
    """Build the networks of a packaged recipe without their numbers."""
    with torch.device("meta"):
        if part == "autoencoder":
            return [PatchAutoencoder(**config.model)]
        if part == "denoiser":
            return [UNet2DModel(**config.model)]
        if part == "estimator":
            return [Estimator(**config.model), DegradationEncoder(gamma_dim=config.model["gamma_dim"])]
        return [InvertibleNet(**config.model)]


def test_packaged_recipes_fit_together_and_into_32_megabytes() -> None:
    recipes = {part: load_recipe(part, None) for part in PARTS}
    weights = sum(p.numel() for part, c in recipes.items() for net in built(part, c) for p in net.parameters())
    assert 2 * weights <= 32e6, f"{2 * weights / 1e6:.1f} MB in half precision"
    channels = recipes["autoencoder"].model["latent_channels"]
    assert recipes["denoiser"].model["in_channels"] == recipes["denoiser"].model["out_channels"] == channels
    assert recipes["latent-inn"].model["channels"] == channels
    assert len({recipes[part].model["gamma_dim"] for part in ("estimator", "pixel-inn", "latent-inn")}) == 1
    # One stream of samples for each part.
    assert len({config.seed for config in recipes.values()}) == len(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_packaged_recipes_name_settings_that_their_objective_reads(part: str) -> None:
    # The recipe is refused otherwise; what is left to check is that the objectives read no names beyond those.
    source = inspect.getsource(OBJECTIVES[part])
    assert set(re.findall(r'settings\.get\("(\w+)"', source)) == OBJECTIVES[part].settings
    load_recipe(part, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "is no valid TOML"),
        ('steps = 3\nlerning_rate = 0.1\ncolour = "red"', "unknown settings colour, lerning_rate; known are .*seed"),
        ('part = "denoiser"\nsteps = 3', "is a recipe for 'denoiser', not for 'autoencoder'"),
        ("steps = 0", "steps must be at least 1, got 0"),
        ("steps = 3\ncrop = 40", r"crop must be a multiple of 32 .*, got 40"),
        ("steps = 3\nlearning_rate = 2.0", "learning_rate must lie between 0 and 1, got 2.0"),
        ("steps = 3\nsave_every = 0", "save_every must be at least 1"),
        ("crop = 32", "lacks the setting steps"),
        ('steps = "many"', "steps must be of type int, got 'many'"),
        ("steps = 3.5", "steps must be of type int, got 3.5"),
        ("steps = true", "steps must be of type int, got True"),
        ("steps = 3\nbf16 = 1", "bf16 must be of type bool, got 1"),
        ('steps = 3\nexclude = "a/*"', r"exclude must be of type tuple\[str, ...\], got 'a/\*'"),
        ("steps = 3\nmodel = 4", "model must be of type dict"),
        ("steps = 3\ntune_file = 4", "tune_file must be of type str"),
        (
            "steps = 3\n[objective]\nwhitenign = 1",
            r"\[objective\] has unknown settings whitenign; known are .*whitening",
        ),
    ],
)
def test_bad_recipes_are_refused(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe("autoencoder", recipe)


def test_missing_recipes_and_unknown_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a recipe file at .*nowhere.toml, found none"):
        load_recipe("autoencoder", tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match="part must be one of autoencoder, .*, got 'vae'"):
        load_recipe("vae", None)
    with pytest.raises(ValueError, match="part must be one of"):
        TrainConfig(part="vae", steps=1)


def test_overrides_win_and_none_does_not(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('steps = 5\nbatch_size = 3\ntune_file = "kept.txt"')
    config = load_recipe("estimator", recipe, {"steps": 9, "batch_size": None})
    assert (config.part, config.steps, config.batch_size) == ("estimator", 9, 3)
    assert config.tune_file == str(tmp_path / "kept.txt")


def test_learning_rate_warms_up_and_falls_to_a_twentieth() -> None:
    config = TrainConfig(part="estimator", steps=100, warmup=10, learning_rate=0.02)
    rates = [config.learning_rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.002, abs=1e-9)
    assert max(rates) == pytest.approx(0.02, abs=1e-9)
    assert rates[9] == rates[10] == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.001, abs=1e-9)


def test_a_model_that_the_part_cannot_be_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "pixel-inn", {**MODELS["pixel-inn"], "colour": 3})
    with pytest.raises(ValueError, match=r"the recipe's \[model\] does not fit the part 'pixel-inn': .*colour"):
        run()


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def is_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        low, high = np.asarray(picture.convert("L")).min(), np.asarray(picture.convert("L")).max()
        return picture.format == "PNG" and bool(high - low > 50)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_trains(part: str, run: Run) -> None:
    folder = run(part, steps=2)
    assert {path.name for path in (folder / "final").iterdir()} == FOLDERS[part]
    for name in FOLDERS[part] - {"scheduler"}:
        (weights,) = (folder / "final" / name).glob("*.safetensors")
        assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
        assert json.loads((folder / "final" / name / "config.json").read_text())["_class_name"]
    assert [line["step"] for line in lines_of(folder)] == [1, 2]
    assert is_picture(folder / "samples" / "0000002.png")
    assert is_picture(folder / "curves.png")


def test_bf16_autocast_trains(run: Run) -> None:
    folder = run("autoencoder", steps=2, bf16=True)
    assert all(np.isfinite(line["loss"]) for line in lines_of(folder))
    weights = load_file(folder / "checkpoint" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_training_lowers_the_loss(run: Run) -> None:
    lines = lines_of(run("autoencoder", steps=24, batch_size=4, save_every=100))
    first, last = (np.mean([line["loss"] for line in part]) for part in (lines[:6], lines[-6:]))
    assert last < 0.97 * first


def test_logs_checkpoints_and_samples_come_when_the_recipe_says(run: Run) -> None:
    folder = run(steps=5, log_every=3, save_every=3, sample_every=2)
    assert [line["step"] for line in lines_of(folder)] == [3, 5]
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0000002.png", "0000004.png", "0000005.png"]
    assert json.loads((folder / "checkpoint" / "state.json").read_text())["step"] == 5
    assert {"loss", "coarse", "step", "seconds", "samples_per_second"} <= set(lines_of(folder)[0])


def test_curves_are_left_out_without_matplotlib(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = run(steps=1)
    assert not (folder / "curves.png").exists()
    assert "latentindigo[train]" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = OBJECTIVES["pixel-inn"].forward
    monkeypatch.setattr(
        OBJECTIVES["pixel-inn"],
        "forward",
        lambda self, batch: {name: value * float("nan") for name, value in forward(self, batch).items()},
    )
    with pytest.raises(RuntimeError, match="the loss of step 1 is not finite; lower learning_rate"):
        run()


def test_an_unusable_data_folder_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    recipe = write_recipe(tmp_path / "r.toml", "autoencoder", base)
    with pytest.raises(ValueError, match="photographs of at least 32 pixels"):
        train("autoencoder", tmp_path / "empty", recipe, tmp_path / "out", device="cpu", progress=False)


def test_tuning_photos_and_excluded_ones_are_not_trained_on(
    photos: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    class Spy(PhotoFolder):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            seen.append(self.names)

    monkeypatch.setattr(training, "PhotoFolder", Spy)
    (tmp_path / "tune.txt").write_text("1.png\n3.png\n")
    recipe = write_recipe(tmp_path / "r.toml", "autoencoder", base, steps=1, exclude=["[45].png"], tune_file="tune.txt")
    train("autoencoder", photos, recipe, tmp_path / "out", device="cpu", progress=False)
    assert seen == [["0.png", "2.png", "6.png", "7.png"]]


# --- a killed run goes on --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, part: str, call: int) -> Callable[[], None]:
    """Make the part's n-th loss of the process a kill; returns what takes the trap away."""
    forward = OBJECTIVES[part].forward
    calls = 0

    def trapped(self: Objective, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return forward(self, batch)

    monkeypatch.setattr(OBJECTIVES[part], "forward", trapped)
    return lambda: monkeypatch.setattr(OBJECTIVES[part], "forward", forward)


def check_same_run(one: Path, other: Path) -> None:
    """Two runs ended with the same bits: weights, averages, optimiser state, exported networks, and log."""
    for file in sorted(one.glob("checkpoint/*.safetensors")) + sorted(one.glob("final/*/*.safetensors")):
        mine, yours = load_file(file), load_file(other / file.relative_to(one))
        assert mine.keys() == yours.keys()
        for name, value in mine.items():
            assert torch.equal(value, yours[name]), f"{file.name}: {name} differs"
    timeless = [
        [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_second")} for line in lines_of(folder)]
        for folder in (one, other)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_run_goes_on_to_the_same_numbers(part: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(part, "whole", steps=5)
    release = kill_at(monkeypatch, part, 4)
    with pytest.raises(Killed):
        run(part, "killed", steps=5)
    release()
    # Two checkpointed steps, and a third that was logged and lost.
    assert [line["step"] for line in lines_of(whole.parent / "killed")] == [1, 2, 3]
    assert json.loads((whole.parent / "killed" / "checkpoint" / "state.json").read_text())["step"] == 2
    check_same_run(whole, run(part, "killed", steps=5))


def test_resuming_is_seen_to_fail_when_state_is_lost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(out="whole", steps=5)
    release = kill_at(monkeypatch, "pixel-inn", 4)
    with pytest.raises(Killed):
        run(out="killed", steps=5)
    release()
    load, lost = training._load_checkpoint, ""

    def forgetful(out: Path, objective: Any, optimizer: Any, average: Any) -> int:
        kept = {name: value.clone() for name, value in average.weights.items()}
        step = load(out, objective, optimizer, average)
        if lost == "optimizer":
            optimizer.state.clear()
        elif lost == "average":
            average.weights = kept
        elif lost == "step":
            step -= 1
        return step

    monkeypatch.setattr(training, "_load_checkpoint", forgetful)
    for lost in ("optimizer", "average", "step", ""):
        shutil.copytree(whole.parent / "killed", whole.parent / f"without {lost}")
        resumed = run(out=f"without {lost}", steps=5)
        if lost:
            with pytest.raises(AssertionError):
                check_same_run(whole, resumed)
        else:
            check_same_run(whole, resumed)


def test_a_kill_between_the_renames_loses_one_interval_at_most(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(out="whole", steps=5)
    replace = os.replace
    renames = 0

    def trapped(source: Any, target: Any) -> None:
        nonlocal renames
        renames += 1
        # Of the second checkpoint: the old one has been moved aside, the new one is not in its place yet.
        if renames == 3:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(training.os, "replace", trapped)
    with pytest.raises(Killed):
        run(out="killed", steps=5)
    monkeypatch.setattr(training.os, "replace", replace)
    killed = whole.parent / "killed"
    assert not (killed / "checkpoint").exists()
    assert json.loads((killed / "checkpoint.old" / "state.json").read_text())["step"] == 2
    check_same_run(whole, run(out="killed", steps=5))
    assert sorted(path.name for path in killed.glob("checkpoint*")) == ["checkpoint"]


def test_a_kill_while_writing_leaves_the_old_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(out="whole", steps=5)
    save = training.save_file
    files = 0

    def trapped(tensors: Any, path: Path) -> None:
        nonlocal files
        files += 1
        if files == 5:  # The second file of the second checkpoint, cut short.
            Path(path).write_bytes(b"{")
            raise Killed
        save(tensors, path)

    monkeypatch.setattr(training, "save_file", trapped)
    with pytest.raises(Killed):
        run(out="killed", steps=5)
    monkeypatch.setattr(training, "save_file", save)
    check_same_run(whole, run(out="killed", steps=5))


def test_a_kill_amid_a_log_line_does_not_stop_the_next_run(run: Run) -> None:
    folder = run(steps=2)
    whole = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(whole + '{"loss": 0.1, "st')
    run(steps=2)
    assert (folder / "log.jsonl").read_text() == whole


def test_a_second_kill_leaves_the_checkpoint_moved_aside(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(out="whole", steps=5)
    release = kill_at(monkeypatch, "pixel-inn", 4)
    with pytest.raises(Killed):
        run(out="killed", steps=5)
    release()
    killed = whole.parent / "killed"
    (killed / "checkpoint").rename(killed / "checkpoint.old")

    def trapped(source: Any, target: Any) -> None:
        raise Killed

    # The next run starts from the one moved aside, and is killed just before its own first one is in its place.
    with monkeypatch.context() as trap, pytest.raises(Killed):
        trap.setattr(training.os, "replace", trapped)
        run(out="killed", steps=5)
    assert not (killed / "checkpoint").exists()
    assert (killed / "checkpoint.old" / "model.safetensors").is_file()
    check_same_run(whole, run(out="killed", steps=5))


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"seed": 9}, {"crop": 64}])
def test_a_checkpoint_does_not_go_on_under_other_settings(change: dict[str, Any], run: Run) -> None:
    run(steps=2)
    (name,) = change
    with pytest.raises(ValueError, match=rf"is a run with another {name}; choose another folder with --out"):
        run(steps=4, **change)


def test_a_finished_run_may_be_made_longer(run: Run) -> None:
    run(steps=2)
    folder = run(steps=4, log_every=2)
    assert [line["step"] for line in lines_of(folder)] == [1, 2, 4]


def test_a_finished_run_stays_finished(run: Run) -> None:
    folder = run(steps=2)
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    log = (folder / "log.jsonl").read_text()
    run(steps=2)
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before
    assert (folder / "log.jsonl").read_text() == log


def test_starting_anew_does_not_overwrite_a_run(run: Run) -> None:
    run(steps=1)
    with pytest.raises(ValueError, match="already holds a checkpoint; resume it or choose another folder"):
        run(steps=1, resume=False)


@pytest.mark.slow
def test_a_run_that_the_system_kills_goes_on(run: Run, photos: Path, base: Path, tmp_path: Path) -> None:
    whole = run(out="whole", steps=60, save_every=1)
    recipe = write_recipe(tmp_path / "killed.toml", "pixel-inn", base, steps=60, save_every=1)
    killed = tmp_path / "killed"
    code = (
        "import sys; from pathlib import Path; import torch; from latentindigo.training import train; "
        f"torch.set_num_threads({torch.get_num_threads()}); p = [Path(a) for a in sys.argv[1:]]; "
        "train('pixel-inn', *p, device='cpu', progress=False)"
    )
    paths = [str(photos), str(recipe), str(killed)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, *paths], env=environment)
    while process.poll() is None and not (killed / "checkpoint").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    train("pixel-inn", photos, recipe, killed, device="cpu", progress=False)
    check_same_run(whole, killed)


# --- starting from other weights -------------------------------------------------------------------------------------


def test_init_from_starts_from_the_weights_of_a_model_folder(run: Run) -> None:
    first = run(out="first", steps=3)
    second = run(out="second", steps=1, learning_rate=1e-9, init_from=str(first / "final"))
    mine = load_file(next((second / "final" / "pixel_inn").glob("*.safetensors")))
    yours = load_file(next((first / "final" / "pixel_inn").glob("*.safetensors")))
    for name, value in mine.items():
        assert_close(value, yours[name], torch.float32)


def test_a_checkpoint_goes_before_init_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    other = run(out="other", steps=1, seed=5)
    whole = run(out="whole", steps=4)
    release = kill_at(monkeypatch, "pixel-inn", 4)
    with pytest.raises(Killed):
        run(out="killed", steps=4)
    release()
    check_same_run(whole, run(out="killed", steps=4, init_from=str(other / "final")))


def test_init_from_a_model_without_the_part_is_refused(run: Run, base: Path) -> None:
    with pytest.raises(ValueError, match="expected weights of 'pixel_inn' in .*, found no such folder"):
        run(init_from=str(base))


def test_init_from_weights_of_another_shape_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(out="first", steps=1)
    monkeypatch.setitem(MODELS, "pixel-inn", {**MODELS["pixel-inn"], "hidden": 6})
    with pytest.raises(ValueError, match=r"weights of 'pixel_inn' in .* do not fit the recipe's \[model\]"):
        run(out="second", init_from=str(first / "final"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that is asked for in vain")
def test_a_device_that_is_not_there_is_refused(photos: Path, base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", "pixel-inn", base)
    with pytest.raises(ValueError, match="device 'cuda' was asked for"):
        train("pixel-inn", photos, recipe, tmp_path / "out", device="cuda", progress=False)


# --- average, clipping, objectives -----------------------------------------------------------------------------------


def test_the_average_follows_slowly_and_swaps_back() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    start = module.weight.detach().clone()
    average = training._Average(module, decay=0.9)
    assert set(average.weights) == {"weight"}
    module.weight.data += 1.0
    average.update(module, 0)  # The first step: decay (1 + 0) / (10 + 0).
    assert_close(average.weights["weight"], start + 0.9)
    average.update(module, 1000)  # Later on: the recipe's decay.
    assert_close(average.weights["weight"], start + 0.91)
    average.swap(module)
    assert_close(module.weight.detach(), start + 0.91)
    assert_close(average.weights["weight"], start + 1.0)
    average.swap(module)
    assert_close(module.weight.detach(), start + 1.0)


def test_the_exported_weights_are_the_average(run: Run) -> None:
    folder = run(steps=4)
    exported = load_file(next((folder / "final" / "pixel_inn").glob("*.safetensors")))
    average = load_file(folder / "checkpoint" / "average.safetensors")
    live = load_file(folder / "checkpoint" / "model.safetensors")
    assert {f"pixel_inn.{name}" for name in exported} == set(average)
    assert all(torch.equal(value, average[f"pixel_inn.{name}"].half()) for name, value in exported.items())
    assert not all(torch.equal(value, live[f"pixel_inn.{name}"].half()) for name, value in exported.items())


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradients_are_clipped(clip: float, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **keywords: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return step(self, *args, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(steps=2, grad_clip=clip)
    assert len(norms) == 2
    if clip < 1:
        assert norms == pytest.approx([clip, clip], rel=1e-3)
    else:
        assert min(norms) > 1e-2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What objectives read of a run."""

    crop: int = 32
    seed: int = 0
    min_scale: float = 0.5
    batch_size: int = 2


def objective_of(part: str, base: Path) -> Objective:
    objective = OBJECTIVES[part](MODELS[part], {} if part in ("autoencoder", "estimator") else {"base": str(base)})
    for seed, network in enumerate(objective.networks.values()):
        # Layers that start at zero would keep gradients from what lies before them.
        randomise_(network, seed, 0.5)
    return objective


@pytest.mark.parametrize("part", PARTS)
def test_gradients_reach_all_trained_weights_and_no_others(part: str, base: Path, photos: Path) -> None:
    objective, folder = objective_of(part, base), PhotoFolder(photos, min_side=32)
    for number in range(0, 40, 2):  # Enough batches to meet all three scales.
        logs = objective(objective.batch(folder, Settings(), range(number, number + 2)))
        assert all(value.ndim == 0 and torch.isfinite(value) for value in logs.values())
        logs["loss"].backward()
    trained = {id(p) for network in objective.networks.values() for p in network.parameters()}
    for name, parameter in objective.named_parameters():
        if id(parameter) in trained:
            assert parameter.grad is not None, f"no gradient reaches {name}"
            assert parameter.grad.abs().max() > 0, f"no gradient reaches {name}"
        else:
            assert not parameter.requires_grad, f"{name} is not frozen"
            assert parameter.grad is None


@pytest.mark.parametrize("part", PARTS)
def test_batches_depend_on_seed_and_number_alone(part: str, base: Path, photos: Path) -> None:
    objective, folder = objective_of(part, base), PhotoFolder(photos, min_side=32)
    first = objective.batch(folder, Settings(), range(4, 6))
    objective.batch(folder, Settings(), range(6, 8))
    torch.manual_seed(77)
    again = objective.batch(folder, Settings(), range(4, 6))
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    other = objective.batch(folder, Settings(seed=1), range(4, 6))
    assert not torch.equal(first["x"], other["x"])


def test_degraded_pairs_belong_together(base: Path, photos: Path) -> None:
    objective, folder = objective_of("pixel-inn", base), PhotoFolder(photos, min_side=32)
    scales: set[int] = set()
    for number in range(0, 40, 2):
        batch = objective.batch(folder, Settings(), range(number, number + 2))
        scale = int(batch["scale"])
        scales.add(scale)
        assert batch["y"].shape == batch["y_clean"].shape == (2, 3, 32 // scale, 32 // scale)
        assert batch["damage"].shape == (2, 3)
        assert 0 <= float(batch["y"].min()) <= float(batch["y"].max()) <= 1
        # Both are the same picture: noise and JPEG blocks do not move it.
        assert abs(float(batch["y"].mean() - batch["y_clean"].mean())) < 0.1
    assert scales == {1, 2, 4}


def test_an_estimator_may_be_trained_beside_a_frozen_encoder(run: Run, base: Path) -> None:
    objective = {"train_encoder": False, "base": str(base), "damage_weight": 0.0}
    folder = run("estimator", steps=2, objective=objective)
    assert {path.name for path in (folder / "final").iterdir()} == {"estimator"}
    trained = load_file(folder / "checkpoint" / "model.safetensors")
    assert trained
    assert all(name.startswith("estimator.") for name in trained)


def test_an_encoder_may_be_trained_alone_and_goes_on_from_another(run: Run, base: Path) -> None:
    alone = run("estimator", "alone", steps=2, objective={"train_estimator": False, "classical": 1.0})
    assert {path.name for path in (alone / "final").iterdir()} == {"degradation_encoder"}
    trained = load_file(alone / "checkpoint" / "model.safetensors")
    assert trained
    assert all(name.startswith("degradation_encoder.") for name in trained)
    # Named as the base, it is what the next run starts from.
    objective = OBJECTIVES["estimator"](MODELS["estimator"], {"base": str(base)})
    saved = load_file(base / "degradation_encoder" / "diffusion_pytorch_model.safetensors")
    weights = objective.networks["degradation_encoder"].state_dict()
    assert all(torch.equal(weights[name], value.float()) for name, value in saved.items())
    assert all(p.requires_grad for p in objective.networks["degradation_encoder"].parameters())
    with pytest.raises(ValueError, match="both false; set one of them to true"):
        OBJECTIVES["estimator"](MODELS["estimator"], {"train_estimator": False, "train_encoder": False})


def test_the_band_response_tells_what_a_blur_has_left() -> None:
    x = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    y = F.interpolate(x, size=(32, 32), mode="bicubic", antialias=True)
    # The same without a blur; half the contrast in all bands; a blur takes more of each higher band.
    torch.testing.assert_close(_band_response(y, x), torch.zeros(2, 4), atol=1e-4, rtol=0)
    halved = 0.5 + 0.5 * (y - 0.5)
    torch.testing.assert_close(_band_response(halved, x), torch.full((2, 4), 0.5).log(), atol=1e-2, rtol=0)
    left = _band_response(blur(y, gaussian_kernel(9, 0.7)), x)
    assert bool((left.diff(dim=1) < -0.1).all())


def test_the_response_is_learned_beside_the_damage(run: Run) -> None:
    folder = run("estimator", steps=3, objective={"response_weight": 0.1})
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all({"response", "damage", "gain_db"} <= set(line) for line in logged)
    # The head is part of the run, not of the model.
    assert any(name.startswith("response_head.") for name in load_file(folder / "checkpoint" / "model.safetensors"))
    assert {path.name for path in (folder / "final").iterdir()} == FOLDERS["estimator"]


@torch.no_grad()
def test_the_band_mix_starts_as_the_best_linear_map(base: Path, photos: Path) -> None:
    objective = objective_of("latent-inn", base)
    assert isinstance(objective, LatentINNObjective)
    crops = torch.stack([PhotoFolder(photos, min_side=32).crop(sample_generator(9, n), 64) for n in range(16)])
    z, half = (
        objective.vae.encode(images * 2 - 1).latents
        for images in (crops, F.interpolate(crops, scale_factor=0.5, mode="bicubic", antialias=True))
    )
    gamma = torch.zeros(1, GAMMA_DIM)

    def error() -> float:
        return float((objective.latent_inn(z, gamma, 1)[0] - half).square().mean())

    before = error()  # The mean of each channel.
    objective.prepare(PhotoFolder(photos, min_side=32), 0)
    assert error() < 0.5 * before
    mix = objective.latent_inn.band_mix
    assert mix is not None
    assert float(torch.linalg.matrix_rank(mix.matrix)) == len(mix.matrix)


def test_an_unconditioned_network_ignores_gamma_once_trained_and_saved(run: Run) -> None:
    z, gammas = torch.randn(1, 4, 16, 16), torch.randn(2, 1, GAMMA_DIM)

    @torch.no_grad()
    def coarse_parts(folder: Path) -> list[Tensor]:
        network = InvertibleNet.from_pretrained(folder / "final" / "latent_inn")
        return [network(z, gamma, 1)[0] for gamma in gammas]

    assert torch.equal(*coarse_parts(run("latent-inn", "deaf", steps=3, objective={"conditioned": False})))
    assert not torch.equal(*coarse_parts(run("latent-inn", "hears", steps=3)))


def test_the_spread_is_the_error_of_the_estimate(base: Path, photos: Path) -> None:
    objective = objective_of("latent-inn", base)
    assert isinstance(objective, LatentINNObjective)
    assert objective.estimator is not None
    folder = PhotoFolder(photos, min_side=32)
    head = objective.latent_inn.detail_spread
    assert head is not None
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for step in range(60):
        batch = objective.batch(folder, Settings(), range(2 * step, 2 * step + 2))
        loss = objective(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    told, true = [], []
    with torch.no_grad():
        for number in range(200, 240, 2):
            batch = objective.batch(folder, Settings(), range(number, number + 2))
            gamma = objective.degradation_encoder(batch["y"])
            levels = {4: 2, 2: 1, 1: 0}[int(batch["scale"])]
            guess = objective.vae.encode(objective.estimator(batch["y"], gamma, levels).clamp(0, 1) * 2 - 1).latents
            told.append(objective.latent_inn.spread(guess, gamma).square().mean())
            true.append((guess - objective.vae.encode(batch["x"] * 2 - 1).latents).square().mean())
    ratio = float(torch.stack(told).mean() / torch.stack(true).mean())
    assert 0.4 < ratio < 2.5, ratio


def test_frozen_parts_are_read_in_single_precision(base: Path) -> None:
    for part in ("denoiser", "pixel-inn", "latent-inn"):
        assert {p.dtype for p in objective_of(part, base).parameters()} == {torch.float32}


def test_the_autoencoder_starts_at_the_best_linear_code(photos: Path) -> None:
    objective, folder = OBJECTIVES["autoencoder"](MODELS["autoencoder"], {}), PhotoFolder(photos, min_side=32)
    batch = objective.batch(folder, Settings(), range(4))
    with torch.no_grad():
        before = float(objective(batch)["psnr"])
        objective.prepare(folder, 0)
        after = float(objective(batch)["psnr"])
    assert after > before + 3


def test_training_is_quiet_about_warnings(run: Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("latent-inn", steps=1)
