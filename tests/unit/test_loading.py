"""Loading another latent diffusion model: folders, variants, single files, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import build, tiny_autoencoder, tokens_for
from latentindigo.loading import load_autoencoder, load_prior
from latentindigo.pipeline import ModelLoadError, RestorationPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sd15", tmp_path_factory.mktemp("sd15"))


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


# --- the original keys ----------------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_key(key: str) -> str:
    """The name that the original code gives a tensor of `families.text_unet` (one layer per block)."""
    for new, old in UNET_ENDS.items():
        if key.startswith(new + "."):
            return key.replace(new, old, 1)
    side, *rest = key.split(".")
    if side == "mid_block":
        place = f"middle_block.{2 * int(rest[1]) if rest[0] == 'resnets' else 1}"
        kind, tail = rest[0], ".".join(rest[2:])
    else:
        block, kind, index = int(rest[0]), rest[1], int(rest[2])
        tail = ".".join(rest[3:])
        if kind == "downsamplers":
            return f"input_blocks.{2 * block + 2}.0.op.{tail.removeprefix('conv.')}"
        if kind == "upsamplers":  # Stands after the attention, where there is one; the first block has none.
            return f"output_blocks.{2 * block + 1}.1.{tail}"
        number = 2 * block + 1 + index if side == "down_blocks" else 2 * block + index
        name = "input_blocks" if side == "down_blocks" else "output_blocks"
        place = f"{name}.{number}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        part = tail.split(".")[0]
        tail = tail.replace(part, RESNET[part], 1)
    return f"{place}.{tail}"


def vae_entry(key: str, value: Tensor, blocks: int = 3) -> tuple[str, Tensor]:
    """The same for an AutoencoderKL, whose attention is made of 1x1 convolutions there."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0" in key:
        key = key.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in ATTENTION.items():
            key = key.replace(f"attn_1.{new}.", f"attn_1.{old}.")
        if value.ndim == 2:
            value = value[:, :, None, None]
    return key, value


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a checkpoint in the original keys, and a folder with nothing but configurations."""
    root = tmp_path_factory.mktemp("single")
    parts = load_prior(folder)
    weights = {f"model.diffusion_model.{unet_key(k)}": v for k, v in parts.denoiser.state_dict().items()}
    for key, value in parts.vae.state_dict().items():
        name, tensor = vae_entry(key, value)
        weights[f"first_stage_model.{name}"] = tensor.contiguous()
    save_file(weights, root / "model.safetensors")
    config = root / "config"
    for path in folder.rglob("*.json"):
        target = config / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return root / "model.safetensors", config


def test_a_single_file_in_the_original_keys_loads_offline(folder: Path, single: tuple[Path, Path]) -> None:
    file, config = single
    pipe = RestorationPipeline.from_pretrained("embedded", prior=file, prior_config=config)
    want = load_prior(folder)
    for network, original in ((pipe.denoiser, want.denoiser), (pipe.vae, want.vae)):
        state = network.state_dict()
        for key, value in original.state_dict().items():
            assert torch.equal(state[key], value), key
    pipe.conditioning = tokens_for("sd15")
    assert pipe(torch.rand(1, 3, 8, 8), steps=1, output_type="pt").images[0].shape == (3, 32, 32)


def test_a_single_file_takes_a_missing_autoencoder_from_the_configurations(
    folder: Path, single: tuple[Path, Path], tmp_path: Path
) -> None:
    weights = {k: v for k, v in load_file(single[0]).items() if k.startswith("model.")}
    save_file(weights, tmp_path / "unet.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no autoencoder; put one's weights into config/vae"):
        load_prior(tmp_path / "unet.safetensors", config=single[1])
    full = load_prior(tmp_path / "unet.safetensors", config=folder)
    assert full.capabilities == load_prior(folder).capabilities


def test_a_single_file_without_configurations_says_what_to_give(single: tuple[Path, Path]) -> None:
    with pytest.raises(ModelLoadError, match=r"weights without configurations.*\(--prior-config FOLDER\)"):
        RestorationPipeline.from_pretrained("embedded", prior=single[0])


@pytest.mark.parametrize("change", [{"layers_per_block": 2}, {"block_out_channels": [8, 24]}])
def test_a_single_file_with_another_models_configuration_is_refused(
    single: tuple[Path, Path], change: dict[str, Any], tmp_path: Path
) -> None:
    config = copied(single[1], tmp_path / "config")
    described = json.loads((config / "unet" / "config.json").read_text())
    (config / "unet" / "config.json").write_text(json.dumps(described | change))
    with pytest.raises(ValueError, match=r"give the configuration of that very model"):
        load_prior(single[0], config=config)


@pytest.mark.parametrize("name", ["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.weight"])
def test_a_file_that_lacks_tensors_is_refused(single: tuple[Path, Path], name: str, tmp_path: Path) -> None:
    weights = load_file(single[0])
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model.safetensors' does not hold the .*of that very model"):
        load_prior(tmp_path / "model.safetensors", config=single[1])


def test_a_broken_file_is_told_apart(single: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "half.safetensors").write_bytes(single[0].read_bytes()[:2000])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_prior(tmp_path / "half.safetensors", config=single[1])


# --- folders --------------------------------------------------------------------------------------------------------


def test_what_a_folder_says_about_itself(folder: Path, tmp_path: Path) -> None:
    assert load_prior(folder).text_folder is None
    other = copied(folder, tmp_path / "with-text")
    (other / "text_encoder").mkdir()
    (other / "text_encoder" / "config.json").write_text("{}")
    assert load_prior(other).text_folder == other
    assert RestorationPipeline.from_pretrained("embedded", prior=other).text_folder == other


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_with_how_to_convert(folder: Path, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"not opened")
    with pytest.raises(ModelLoadError, match=r"got the pickle.*from_single_file\('model.*save_pretrained\('model'\)"):
        RestorationPipeline.from_pretrained("embedded", prior=file)
    other = copied(folder, tmp_path / "pickled")
    (other / "unet" / "diffusion_pytorch_model.safetensors").rename(other / "unet" / f"pytorch_model{suffix}")
    with pytest.raises(ModelLoadError, match=r"got the pickle.*UNet2DConditionModel\.from_pretrained\('pickled/unet'"):
        RestorationPipeline.from_pretrained("embedded", prior=other)


def test_weights_that_come_only_as_a_variant_are_found(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "half")
    plain = other / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    got, want = load_prior(other).denoiser.state_dict(), load_prior(folder).denoiser.state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_missing_and_foreign_parts_are_named(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "broken")
    shutil.rmtree(other / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"'broken' lacks scheduler"):
        load_prior(other)
    shutil.copytree(folder / "scheduler", other / "scheduler")
    (other / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected weights .* in broken/unet, found none"):
        load_prior(other)
    (other / "unet" / "config.json").write_text('{"_class_name": "UNet9D"}')
    with pytest.raises(ValueError, match=r"broken/unet is of class 'UNet9D', which diffusers does not have"):
        load_prior(other)
    with pytest.raises(ValueError, match=r"expected a single .safetensors file together with a prior_config"):
        load_prior(folder, config=folder)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_prior(tmp_path / "none.safetensors")
    with pytest.raises(ModelLoadError, match="prior_config describes a prior, and none is given"):
        RestorationPipeline.from_pretrained("embedded", prior_config=folder)


def test_a_transformer_of_an_unknown_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "dit")
    shutil.rmtree(other / "unet")
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=8, norm_num_groups=4
    )
    network.save_pretrained(other / "transformer")
    with pytest.raises(ValueError, match=r"expected a denoiser among UNet2DModel, .*, got DiTTransformer2DModel"):
        load_prior(other)


def test_the_scheduler_of_stable_diffusion_1_gives_way_to_ddim(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "pndm")
    levels: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    diffusers.PNDMScheduler(**levels, skip_prk_steps=True, steps_offset=1).save_pretrained(other / "scheduler")
    with pytest.warns(UserWarning, match="DDIMScheduler is used with its noise levels"):
        scheduler = load_prior(other).scheduler
    assert isinstance(scheduler, diffusers.DDIMScheduler)
    assert torch.equal(scheduler.alphas_cumprod, diffusers.DDIMScheduler(**levels).alphas_cumprod)
    assert scheduler.config["steps_offset"] == 1


# --- the cheap autoencoder ------------------------------------------------------------------------------------------


def test_the_cheap_autoencoder_guides_and_the_full_one_decodes(folder: Path, tmp_path: Path) -> None:
    tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    pipe = RestorationPipeline.from_pretrained("embedded", prior=folder, guidance_vae=tmp_path / "tiny")
    pipe.conditioning = tokens_for("sd15")
    ran: list[str] = []
    for name in ("vae", "guidance_vae"):
        getattr(pipe, name).decoder.register_forward_hook(lambda *_, name=name: ran.append(name))
    settings: dict[str, Any] = {"steps": 3, "output_type": "pt", "update": "stopped", "method": "pixel-inn"}
    x = torch.rand(1, 3, 8, 8)
    got = pipe(x, **settings).images[0]
    assert ran[:3] == ["guidance_vae"] * 3
    assert ran[3:]
    assert set(ran[3:]) == {"vae"}
    pipe.save_pretrained(tmp_path / "saved")
    again = RestorationPipeline.from_pretrained(tmp_path / "saved")
    assert type(again.guidance_vae) is diffusers.AutoencoderTiny
    pipe.guidance_vae = None
    assert not torch.equal(pipe(x, **settings).images[0], got)


def test_a_cheap_autoencoder_of_other_latents_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny_autoencoder(channels=6).save_pretrained(tmp_path / "vae")
    assert load_autoencoder(tmp_path).config["latent_channels"] == 6
    with pytest.raises(ModelLoadError, match=r"expected a guidance autoencoder of 4 latent channels.*got 6 and 4"):
        RestorationPipeline.from_pretrained("embedded", prior=folder, guidance_vae=tmp_path)


def test_a_denoiser_that_is_told_nothing_says_so(folder: Path) -> None:
    pipe = RestorationPipeline.from_pretrained("embedded", prior=folder)
    with pytest.raises(FileNotFoundError, match=r"folders text_encoder and tokenizer .* found none; add them, or give"):
        pipe(torch.rand(1, 3, 8, 8), steps=1)
    with pytest.raises(ValueError, match=r"expected a conditioning .* stable-diffusion .*set pipe\.conditioning"):
        pipe.prior.trajectory(1)
