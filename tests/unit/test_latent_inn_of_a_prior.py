"""A latent INN for another autoencoder: trained by one command, resumed, checked against the prior, and used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from families import build, plain_unet
from latentindigo.data import PhotoFolder
from latentindigo.images import load_image
from latentindigo.latents import decode_latents, encode_pixels
from latentindigo.loading import load_latent_inn
from latentindigo.objectives import OBJECTIVES, LatentINNObjective
from latentindigo.pipeline import ModelLoadError, RestorationPipeline
from latentindigo.training import load_recipe, train
from tolerances import assert_close

INN = {
    "gamma_dim": 8,
    "hidden": 8,
    "blocks": 1,
    "num_steps": 1,
    "offset": 0.0,
    "mix": True,
    "gain": True,
    "spread": True,
}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for k in range(4):
        small = Image.fromarray(draw.integers(0, 256, (10, 12, 3), dtype=np.uint8))
        small.resize((160, 144), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> dict[int, Path]:
    """Priors by the number of their latent channels, latents of unit variance; the one with 16 has a shift."""
    root = tmp_path_factory.mktemp("priors")
    images = torch.stack([load_image(path).rgb for path in sorted(photos.iterdir())])[..., :96, :112]
    found = {}
    for channels in (4, 16):
        found[channels] = build("unconditional", root / f"prior{channels}")
        torch.manual_seed(channels)
        blocks: dict[str, Any] = {
            "block_out_channels": (8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        }
        vae = AutoencoderKL(
            layers_per_block=1, norm_num_groups=4, latent_channels=channels, mid_block_add_attention=False, **blocks
        )
        with torch.no_grad():
            z = vae.encode(images * 2 - 1).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
        shift = float(z.mean()) if channels == 16 else None
        vae.register_to_config(scaling_factor=1 / float(z.std()), shift_factor=shift)
        vae.save_pretrained(found[channels] / "vae")
        plain_unet(channels).save_pretrained(found[channels] / "unet")
    return found


def write_recipe(path: Path, base: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "steps": 50, "batch_size": 2, "crop": 32, "learning_rate": 0.002, "warmup": 5, "bf16": False,
        "log_every": 1, "save_every": 2, "sample_every": 100,
    }  # fmt: skip
    model = changes.pop("model", INN)
    tables = [{"part": "latent-inn", **settings, **changes}, {"base": str(base)}, model]
    lines = [[f"{name} = {json.dumps(value)}" for name, value in table.items()] for table in tables]
    path.write_text("\n".join([*lines[0], "[objective]", *lines[1], "[model]", *lines[2]]) + "\n")
    return path


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(
    photos: Path, priors: dict[int, Path], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Runs of 50 steps, by the number of latent channels."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for channels in priors:
        recipe = write_recipe(root / f"{channels}.toml", tiny_model)
        found[channels] = root / str(channels)
        train("latent-inn", photos, recipe, found[channels], device="cpu", progress=False, prior=str(priors[channels]))
        AcceleratorState._reset_state(reset_partial_state=True)
    return found


@pytest.mark.parametrize("channels", [4, 16])
def test_fifty_steps_lower_the_loss(channels: int, runs: dict[int, Path]) -> None:
    run = runs[channels]
    seen = losses(run)
    assert len(seen) == 50
    assert np.mean(seen[-10:]) < 0.9 * np.mean(seen[:10])
    assert load_latent_inn(run).config["channels"] == channels
    assert json.loads((run / "settings.json").read_text())["objective"]["prior"].endswith(f"prior{channels}")


@torch.no_grad()
def test_it_is_learning_that_lowers_the_loss(
    runs: dict[int, Path], photos: Path, priors: dict[int, Path], tiny_model: Path, tmp_path: Path
) -> None:
    config: Any = load_recipe("latent-inn", write_recipe(tmp_path / "r.toml", tiny_model))
    folder = PhotoFolder(photos)
    for channels, prior in priors.items():
        objective = OBJECTIVES["latent-inn"](INN, {"base": str(tiny_model), "prior": str(prior), "inverse_weight": 0.1})
        objective.prepare(folder, config.seed)
        batches = [objective.batch(folder, config, range(n, n + 2)) for n in range(200, 216, 2)]
        before = np.mean([float(objective(batch)["loss"]) for batch in batches])
        objective.load_weights(str(runs[channels] / "final"))
        after = np.mean([float(objective(batch)["loss"]) for batch in batches])
        # On samples that the run has not drawn.
        assert after < 0.95 * before, (channels, before, after)


def test_the_loss_is_taken_on_scaled_latents(priors: dict[int, Path], tiny_model: Path) -> None:
    objective = OBJECTIVES["latent-inn"](INN, {"base": str(tiny_model), "prior": str(priors[16])})
    assert isinstance(objective, LatentINNObjective)
    assert not any(p.requires_grad for p in objective.vae.parameters())
    x = torch.rand(1, 3, 32, 32)
    raw = objective.vae.encode(x * 2 - 1).latent_dist.mode()
    z = encode_pixels(objective.vae, x)
    shift, scale = objective.vae.config.shift_factor, objective.vae.config.scaling_factor
    assert abs(shift) > 1e-3
    assert_close(z, (raw - shift) * scale)
    assert 0.5 < float(z.std()) < 2
    assert_close(decode_latents(objective.vae, z), (objective.vae.decode(raw).sample + 1) / 2)
    pipe = RestorationPipeline.from_pretrained(tiny_model, prior=priors[16])
    assert_close(pipe.prior.encode(x), z)


def test_a_killed_run_goes_on_to_the_same_numbers(
    photos: Path, priors: dict[int, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", tiny_model, steps=5)

    def run(out: str, prior: Path) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        train("latent-inn", photos, recipe, tmp_path / out, device="cpu", progress=False, prior=str(prior))
        return tmp_path / out

    whole = run("whole", priors[4])
    forward, calls = LatentINNObjective.forward, []

    def trapped(self: LatentINNObjective, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, batch)

    with monkeypatch.context() as trap, pytest.raises(KeyboardInterrupt):
        trap.setattr(LatentINNObjective, "forward", trapped)
        run("killed", priors[4])
    resumed = run("killed", priors[4])
    for file in sorted(whole.glob("checkpoint/*.safetensors")) + sorted(whole.glob("final/*/*.safetensors")):
        mine, yours = load_file(file), load_file(resumed / file.relative_to(whole))
        assert all(torch.equal(value, yours[name]) for name, value in mine.items()), file.name
    # Another autoencoder is another run.
    with pytest.raises(ValueError, match="is a run with another objective; choose another folder"):
        run("killed", priors[16])


@pytest.mark.parametrize("channels", [4, 16])
def test_the_trained_network_restores(
    channels: int, runs: dict[int, Path], priors: dict[int, Path], tiny_model: Path, tmp_path: Path
) -> None:
    y = torch.rand(3, 12, 16)
    pipe = RestorationPipeline.from_pretrained(tiny_model, prior=priors[channels], latent_inn=runs[channels])
    result = pipe(y, output_type="pt", steps=2)
    assert result.settings["method"] == "latent-inn"
    assert result.images[0].shape == (3, 48, 64)
    assert result.images[0].isfinite().all()
    assert result.calls["loop"]["decoder"] == 0
    other = pipe(y, output_type="pt", steps=2, method="pixel-inn")
    assert not torch.equal(result.images[0], other.images[0])
    if channels == 16:
        pipe.save_pretrained(tmp_path)
        again = RestorationPipeline.from_pretrained(tmp_path)(y, output_type="pt", steps=2)
        assert_close(again.images[0], result.images[0])


def test_a_network_for_other_latents_is_refused(
    runs: dict[int, Path], priors: dict[int, Path], tiny_model: Path
) -> None:
    with pytest.raises(ModelLoadError, match="expected a latent INN with channels=16, .* got 4; train one with"):
        RestorationPipeline.from_pretrained(tiny_model, prior=priors[16], latent_inn=runs[4])
    with pytest.raises(ModelLoadError, match="expected a latent INN with gamma_dim=64, .* got 8"):
        RestorationPipeline.from_pretrained("embedded", prior=priors[4], latent_inn=runs[4])


def test_a_folder_without_the_network_is_refused(tiny_model: Path, photos: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"expected a latent INN in .*found none; train one with"):
        RestorationPipeline.from_pretrained(tiny_model, latent_inn=photos)
    with pytest.raises(ModelLoadError, match="expected a latent INN in 'estimator'"):
        RestorationPipeline.from_pretrained(tiny_model, latent_inn=tiny_model / "estimator")


def test_settings_that_do_not_fit_the_autoencoder_are_refused(
    photos: Path, priors: dict[int, Path], tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"base": str(tiny_model), "prior": str(priors[4])}
    with pytest.raises(ValueError, match=r"expected channels = 4 in the recipe's \[model\], .* got 48; leave it out"):
        OBJECTIVES["latent-inn"]({**INN, "channels": 48}, settings)
    objective = OBJECTIVES["latent-inn"](INN, settings)
    assert isinstance(objective, LatentINNObjective)
    objective.downsampling = 32
    config: Any = load_recipe("latent-inn", write_recipe(tmp_path / "r.toml", tiny_model, crop=96))
    with pytest.raises(ValueError, match="expected a crop that is a multiple of 128, .* got 96; mend the recipe"):
        objective.batch(PhotoFolder(photos), config, [0])
    with pytest.raises(ValueError, match="prior: only 'latent-inn' is trained for another autoencoder, got .*denoiser"):
        train("denoiser", photos, None, tmp_path / "out", prior=str(priors[4]))


def test_the_packaged_recipe_leaves_the_channels_to_the_autoencoder(root: Path) -> None:
    config = load_recipe("latent-inn", root / "recipes" / "latent-inn-prior.toml")
    ours = load_recipe("latent-inn", None)
    assert "channels" not in config.model
    assert config.model["gamma_dim"] == ours.model["gamma_dim"]
    assert (config.exclude, config.tune_file) == (ours.exclude, ours.tune_file)


@pytest.mark.slow
def test_one_command_trains_on_the_packaged_recipe(photos: Path, priors: dict[int, Path], tmp_path: Path) -> None:
    train("latent-inn", photos, None, tmp_path, overrides={"steps": 1}, device="cpu", prior=str(priors[4]))
    pipe = RestorationPipeline.from_pretrained("embedded", prior=priors[4], latent_inn=tmp_path)
    assert pipe(torch.rand(3, 16, 16), steps=2).settings["method"] == "latent-inn"
