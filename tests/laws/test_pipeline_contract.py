"""What diffusers asks of its own pipelines, asked of this one.

diffusers tests its pipelines with a mixin that is not part of its wheel. Each property is stated here anew, as a check
that runs on the real pipeline and on one with the defect it must catch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import tiny
from latentindigo.pipeline import RestorationOutput, RestorationPipeline

FAST: dict[str, Any] = {"steps": 2, "scale": 2, "output_type": "pt"}
HALF = [torch.bfloat16, torch.float16]
Pipe = Callable[..., Any]


def picture(seed: int = 1, height: int = 9, width: int = 14) -> Tensor:
    """A random picture, (3, H, W) in [0, 1]."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


class Broken:
    """A pipeline with one defect: its call is replaced, the rest is the tiny pipeline's."""

    def __init__(self, pipe: RestorationPipeline, call: Callable[..., Any]) -> None:
        self.pipe, self.call = pipe, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


# ------------------------------------------------------------------------------------------------------------ outputs


def check_dict_and_tuple(pipe: Pipe) -> None:
    """`return_dict=False` gives the same values, in the order of the fields, none left out."""
    told = pipe(picture(), **FAST)
    plain = pipe(picture(), return_dict=False, **FAST)
    assert isinstance(plain, tuple)
    assert len(plain) == 5
    images, maps, uncertainty, settings, calls = plain
    assert torch.equal(images[0], told.images[0])
    assert torch.equal(maps[0], told.detail_maps[0])
    assert uncertainty is None
    assert (settings, calls) == (told.settings, told.calls)


def check_batch_is_singles(pipe: Pipe) -> None:
    """An image in a batch is the image alone: as a list, as a tensor, and whatever stands beside it."""
    pictures, seeds = [picture(1), picture(2), picture(3, 5, 6)], [3, 4, 5]
    alone = [pipe(x, seed=seed, **FAST).images[0] for x, seed in zip(pictures, seeds, strict=True)]
    together = pipe(pictures, seed=seeds, **FAST).images
    stacked = pipe(torch.stack(pictures[:2]), seed=seeds[:2], **FAST).images
    for found, expected in [*zip(together, alone, strict=True), *zip(stacked, alone[:2], strict=True)]:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def check_samples(pipe: Pipe) -> None:
    """Several samples: image by image, each that of its own seed, and a map of where they differ."""
    pictures = [picture(1), picture(2)]
    several = pipe(pictures, num_samples=2, seed=7, **FAST)
    assert [len(several.images), len(several.detail_maps), len(several.uncertainty)] == [4, 4, 2]
    alone = [pipe(x, seed=seed, **FAST).images[0] for x in pictures for seed in (7, 8)]
    for found, expected in zip(several.images, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    spread = torch.stack(several.images[:2]).std(0).mean(0, keepdim=True)
    torch.testing.assert_close(several.uncertainty[0], spread)
    assert float(spread.max()) > 0


def check_seeds(pipe: Pipe) -> None:
    """A seed decides everything, seed 0 too, and the global generator neither matters nor moves."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = pipe(picture(), seed=0, **FAST).images[0]
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(2)
    assert torch.equal(pipe(picture(), seed=0, **FAST).images[0], first)
    assert not torch.equal(pipe(picture(), seed=1, **FAST).images[0], first)


def check_callbacks(pipe: Pipe) -> None:
    """Called after each step with live values; what it raises ends the call, and the next call is as if none was."""
    expected = pipe(picture(), **FAST).images[0]
    seen: list[tuple[int, int]] = []

    def look(told: Any, step: int, timestep: int, values: dict[str, Tensor]) -> None:
        assert set(values) == {"latents", "z0"}
        assert values["latents"].shape == values["z0"].shape
        seen.append((step, timestep))

    assert torch.equal(pipe(picture(), callback_on_step_end=look, **FAST).images[0], expected)
    assert [step for step, _ in seen] == [0, 1]
    assert seen[0][1] > seen[1][1]

    def stop(told: Any, step: int, timestep: int, values: dict[str, Tensor]) -> None:
        raise InterruptedError(f"after step {step}")

    with pytest.raises(InterruptedError, match="after step 0"):
        pipe(picture(), callback_on_step_end=stop, **FAST)
    assert torch.equal(pipe(picture(), **FAST).images[0], expected)


@pytest.mark.parametrize(
    "check", [check_dict_and_tuple, check_batch_is_singles, check_samples, check_seeds, check_callbacks]
)
def test_outputs(check: Callable[[Pipe], None], tiny_pipeline: RestorationPipeline) -> None:
    check(tiny_pipeline)


def test_output_checks_find_defects(tiny_pipeline: RestorationPipeline) -> None:
    calls = [0]

    def without_nothing(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        output = tiny_pipeline(*args, **kwargs)
        return output if return_dict else output.to_tuple()

    def first_seed_for_all(image: Any, seed: Any = 0, **kwargs: Any) -> Any:
        return tiny_pipeline(image, seed=seed if isinstance(seed, int) else seed[0], **kwargs)

    def one_seed_for_all_samples(image: Any, num_samples: int = 1, **kwargs: Any) -> RestorationOutput:
        output = tiny_pipeline(image, num_samples=num_samples, **kwargs)
        output.images = [x for x in output.images[::num_samples] for _ in range(num_samples)]
        return output

    def global_noise(*args: Any, **kwargs: Any) -> RestorationOutput:
        output = tiny_pipeline(*args, **kwargs)
        output.images = [x + 1e-3 * torch.randn_like(x) for x in output.images]
        return output

    def remembers(*args: Any, **kwargs: Any) -> RestorationOutput:
        calls[0] += 1
        output = tiny_pipeline(*args, **kwargs)
        output.images = [x + 1e-3 * calls[0] for x in output.images]
        return output

    with pytest.raises(AssertionError):
        check_dict_and_tuple(without_nothing)
    with pytest.raises(AssertionError):
        check_batch_is_singles(first_seed_for_all)
    with pytest.raises(AssertionError):
        check_samples(one_seed_for_all_samples)
    with pytest.raises(AssertionError, match="global generator"):
        check_seeds(global_noise)
    with pytest.raises(AssertionError):
        check_callbacks(remembers)


# ----------------------------------------------------------------------------------------------------- saving, loading


def check_round_trip(pipe: Any, folder: Path) -> None:
    """Saved and loaded it is the same: weights, presets, output."""
    pipe.save_pretrained(folder)
    loaded = type(pipe).from_pretrained(folder)
    assert loaded.weights_hash() == pipe.weights_hash()
    assert loaded.presets == pipe.presets
    torch.testing.assert_close(loaded(picture(), **FAST).images[0], pipe(picture(), **FAST).images[0])


def check_only_safetensors(folder: Path) -> None:
    """No pickle anywhere, and no shard above 15 MB."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}, sorted(path.name for path in files)
    assert any(path.suffix == ".safetensors" for path in files)
    assert max(path.stat().st_size for path in files) <= 15e6


def check_optional_parts(pipe: Any, folder: Path) -> None:
    """Parts that may be missing are missing after saving and loading too, and it restores without them."""
    bare = type(pipe)(**{**pipe.components, "latent_inn": None, "estimator": None})
    bare.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["latent_inn"] == index["estimator"] == [None, None]
    assert not (folder / "latent_inn").exists()
    loaded = type(pipe).from_pretrained(folder)
    assert loaded.latent_inn is None
    assert loaded.estimator is None
    output = loaded(picture(), **FAST)
    assert (output.settings["method"], output.settings["init"]) == ("pixel-inn", "encode")
    torch.testing.assert_close(output.images[0], bare(picture(), **FAST).images[0])


def test_round_trip(tiny_pipeline: RestorationPipeline, tmp_path: Path) -> None:
    check_round_trip(tiny_pipeline, tmp_path)
    check_only_safetensors(tmp_path)
    (tmp_path / "vae" / "weights.bin").write_bytes(b"x")
    with pytest.raises(AssertionError):
        check_only_safetensors(tmp_path)


def test_optional_parts(tiny_pipeline: RestorationPipeline, tmp_path: Path) -> None:
    check_optional_parts(tiny_pipeline, tmp_path)


def test_saving_checks_find_defects(tmp_path: Path) -> None:
    class Forgetful(RestorationPipeline):
        def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
            kept = {name: value.clone() for name, value in self.pixel_inn.state_dict().items()}
            for parameter in self.pixel_inn.parameters():
                parameter.zero_()
            super().save_pretrained(save_directory, **kwargs)
            self.pixel_inn.load_state_dict(kept)

    class Needy(RestorationPipeline):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return super().from_pretrained(*args, **{"estimator": tiny.tiny_pipeline().estimator, **kwargs})

    with torch.no_grad(), pytest.raises(AssertionError):
        check_round_trip(Forgetful(**tiny.tiny_pipeline().components), tmp_path / "a")
    with pytest.raises(AssertionError):
        check_optional_parts(Needy(**tiny.tiny_pipeline().components), tmp_path / "b")


def test_pickles_are_refused(tiny_pipeline: RestorationPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors only"):
        tiny_pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- components, dtype, device


def check_components(pipe: Any, rebuild: Callable[[Any], Any]) -> None:
    """What is built anew from the components is the same pipeline and shares their weights."""
    again = rebuild(pipe)
    assert set(again.components) == set(pipe.components)
    assert all(again.components[name] is part for name, part in pipe.components.items())
    assert again.presets == pipe.presets
    assert torch.equal(again(picture(), **FAST).images[0], pipe(picture(), **FAST).images[0])


REBUILT: list[Callable[[Any], Any]] = [
    lambda pipe: RestorationPipeline(**pipe.components),
    lambda pipe: RestorationPipeline.from_pipe(pipe),
]


@pytest.mark.parametrize("rebuild", REBUILT, ids=["components", "from_pipe"])
def test_components(tiny_pipeline: RestorationPipeline, rebuild: Callable[[Any], Any]) -> None:
    check_components(tiny_pipeline, rebuild)


def test_other_components_are_noticed(tiny_pipeline: RestorationPipeline) -> None:
    with pytest.raises(AssertionError):
        check_components(tiny_pipeline, lambda pipe: tiny.tiny_pipeline(seed=5))


def check_half_precision(pipe: Any, dtype: torch.dtype) -> None:
    """In half precision: no NaN, close to float32, and what must be exact stays float32."""
    exact = tiny.tiny_pipeline()(picture(), **FAST)
    assert pipe.to("cpu", dtype) is pipe
    assert pipe.vae.dtype == pipe.denoiser.dtype == pipe.estimator.dtype == dtype
    assert {pipe.pixel_inn.dtype, pipe.latent_inn.dtype, pipe.degradation_encoder.dtype} == {torch.float32}
    output = pipe(picture(), **FAST)
    values = [*output.images, *output.detail_maps]
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in values)
    assert float((output.images[0] - exact.images[0]).square().mean().sqrt()) < 0.02
    assert pipe.to(torch.float32).denoiser.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.filterwarnings("ignore:.*not finite")
def test_half_precision(dtype: torch.dtype) -> None:
    check_half_precision(tiny.tiny_pipeline(), dtype)


def test_half_precision_check_finds_defects() -> None:
    class Coarse(RestorationPipeline):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            return DiffusionPipeline.to(self, *args, **kwargs)

    with pytest.raises(AssertionError):
        check_half_precision(Coarse(**tiny.tiny_pipeline().components), torch.bfloat16)


def check_device_moves(pipe: Any, device: str) -> None:
    """All networks go where the pipeline goes, however it is said, and come back."""
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    expected = pipe(picture(), **FAST).images[0]
    for move in ((device,), (torch.device(device),), (device, torch.float32)):
        pipe.to(*move)
        assert {p.device.type for network in networks for p in network.parameters()} == {device}
        assert pipe.device.type == device
        torch.testing.assert_close(pipe(picture(), **FAST).images[0], expected, atol=1e-3, rtol=1e-3)
        pipe.to("cpu")
    pipe.to(device=device)
    assert {p.device.type for network in networks for p in network.parameters()} == {device}
    pipe.to("cpu")
    assert torch.equal(pipe(picture(), **FAST).images[0], expected)


def test_device_moves() -> None:
    check_device_moves(tiny.tiny_pipeline(), "cpu")


@pytest.mark.gpu
def test_device_moves_to_an_accelerator() -> None:
    check_device_moves(tiny.tiny_pipeline(), "cuda")


def test_device_check_finds_defects() -> None:
    pipe = tiny.tiny_pipeline()

    class Stays(RestorationPipeline):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            return self

    with pytest.raises(AssertionError):
        check_device_moves(Stays(**pipe.components), "meta")


# ------------------------------------------------------------------------------------------------------- progress bars


def check_progress_bar(pipe: Any, capsys: Any) -> None:
    """Silent as it comes; diffusers' switch shows one step of the bar for each step, and hides it again."""

    def shown() -> str:
        pipe(picture(), **FAST)
        return capsys.readouterr().err

    pipe.set_progress_bar_config(disable=False)
    assert "2/2" in shown()
    pipe.set_progress_bar_config(disable=True)
    assert shown() == ""


def test_progress_bar(capsys: Any) -> None:
    pipe = tiny.tiny_pipeline()
    pipe(picture(), **FAST)
    assert capsys.readouterr().err == ""
    check_progress_bar(pipe, capsys)


def test_progress_check_finds_defects(capsys: Any) -> None:
    pipe = tiny.tiny_pipeline()

    def silent(*args: Any, **kwargs: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        return pipe(*args, **kwargs)

    with pytest.raises(AssertionError):
        check_progress_bar(Broken(pipe, silent), capsys)
