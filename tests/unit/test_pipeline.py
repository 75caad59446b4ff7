"""The pipeline's inputs, outputs and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from latentindigo.guidance import GuidanceConfig
from latentindigo.operators import Blur, Mask, Scale
from latentindigo.pipeline import ModelLoadError, RestorationPipeline

FAST: dict[str, Any] = {"steps": 2, "output_type": "pt"}


def noise(height: int = 9, width: int = 14) -> Tensor:
    """A random picture, (3, H, W) in [0, 1]."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (3, 2), (7, 300), (33, 17)])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_any_input_size(tiny_pipeline: RestorationPipeline, height: int, width: int, scale: int) -> None:
    output = tiny_pipeline(noise(height, width), scale=scale, **FAST)
    assert output.images[0].shape == (3, height * scale, width * scale)
    assert output.detail_maps[0].shape == (1, height * scale, width * scale)
    assert float(output.images[0].min()) >= 0
    assert float(output.images[0].max()) <= 1


def test_scales_beyond_eight_take_several_passes(tiny_pipeline: RestorationPipeline) -> None:
    output = tiny_pipeline(noise(4, 5), scale=16, **FAST)
    assert output.images[0].shape == (3, 64, 80)
    assert output.calls["loop"]["denoiser"] == 4


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [((40, 40), False, (3, 26, 40)), ((40, 40), True, (3, 40, 40)), ((7, 90), True, (3, 90, 7))],
)
def test_size_keeps_the_aspect(
    tiny_pipeline: RestorationPipeline, size: tuple[int, int], crop: bool, expected: tuple[int, ...]
) -> None:
    output = tiny_pipeline(noise(), size=size, crop=crop, **FAST)
    assert output.images[0].shape == expected
    assert output.detail_maps[0].shape == (1, *expected[1:])


@pytest.mark.parametrize("init", ["estimator", "encode", "inverse", "noise"])
@pytest.mark.parametrize("scale", [1, 4, 8])
def test_all_starts(tiny_pipeline: RestorationPipeline, init: str, scale: int) -> None:
    settings = {"init": init, "scale": scale, "strength": 0.4, **FAST}
    x = tiny_pipeline(noise(), **settings)
    assert x.images[0].isfinite().all()
    assert x.settings["init"] == init


def test_starts_differ(tiny_pipeline: RestorationPipeline) -> None:
    results = [
        tiny_pipeline(noise(), init=i, strength=0.3, **FAST).images[0] for i in ("estimator", "encode", "inverse")
    ]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_pure_noise_forgets_nothing_of_the_data_but_the_start(tiny_pipeline: RestorationPipeline) -> None:
    unguided = {"method": "unguided", "init": "noise", "guidance": None, **FAST}
    a, b = (tiny_pipeline(picture, **unguided).images[0] for picture in (noise(), 1 - noise()))
    # Unguided from noise, only the colour correction sees y.
    assert not torch.equal(a, b)


def test_kinds_of_input_agree(tiny_pipeline: RestorationPipeline) -> None:
    samples = (noise() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    pixels = torch.from_numpy(samples).permute(2, 0, 1).float() / 255
    kinds: list[Any] = [PIL.Image.fromarray(samples), samples, samples.astype(np.float32) / 255, pixels, pixels[None]]
    outputs = [tiny_pipeline(kind, **FAST).images[0] for kind in kinds]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    sixteen = (samples.astype(np.uint16) * 257).astype(np.uint16)
    torch.testing.assert_close(tiny_pipeline(sixteen, **FAST).images[0], outputs[0])


def test_kinds_of_output(tiny_pipeline: RestorationPipeline) -> None:
    settings: dict[str, Any] = {"steps": 2, "scale": 2}
    pil = tiny_pipeline(noise(), output_type="pil", **settings).images[0]
    array = tiny_pipeline(noise(), output_type="np", **settings).images[0]
    assert isinstance(pil, PIL.Image.Image)
    assert pil.size == (28, 18)
    assert array.shape == (18, 28, 3)
    assert np.abs(np.asarray(pil) / 255 - array).max() <= 0.5 / 255 + 1e-6


def test_grey_stays_grey(tiny_pipeline: RestorationPipeline) -> None:
    grey = PIL.Image.fromarray((noise()[0] * 255).to(torch.uint8).numpy())
    assert tiny_pipeline(grey, steps=2).images[0].mode == "L"


def test_alpha_is_no_colour(tiny_pipeline: RestorationPipeline) -> None:
    samples = (noise() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    opaque = np.concatenate([samples, np.full((*samples.shape[:2], 1), 255, np.uint8)], -1)
    a = tiny_pipeline(PIL.Image.fromarray(opaque), **FAST).images[0]
    torch.testing.assert_close(a, tiny_pipeline(PIL.Image.fromarray(samples), **FAST).images[0])


def test_inputs_are_not_changed(tiny_pipeline: RestorationPipeline) -> None:
    picture = noise()
    kept = picture.clone()
    tiny_pipeline(picture, **FAST)
    assert torch.equal(picture, kept)
    assert not picture.requires_grad


def test_list_of_sizes_keeps_its_order(tiny_pipeline: RestorationPipeline) -> None:
    pictures = [noise(9, 14), noise(5, 6), noise(9, 14)]
    shapes = [tuple(i.shape) for i in tiny_pipeline(pictures, scale=2, **FAST).images]
    assert shapes == [(3, 18, 28), (3, 10, 12), (3, 18, 28)]


def test_detail_map_is_what_the_details_add(tiny_pipeline: RestorationPipeline) -> None:
    pipe = tiny_pipeline
    picture = noise(8, 8)
    output = pipe(picture, scale=4, **FAST)
    x = output.images[0][None]
    with torch.no_grad():
        gamma = pipe.degradation_encoder(picture[None])
        coarse, details = pipe.pixel_inn(x, gamma, 2)
        without = pipe.pixel_inn.inverse(coarse, tuple(torch.zeros_like(d) for d in details), gamma, 2)
    expected = (x - without).abs().mean(1).clamp(0, 1)
    torch.testing.assert_close(output.detail_maps[0], expected, atol=1e-5, rtol=1e-5)
    assert float(expected.max()) > 0.01


@pytest.mark.parametrize(
    "operator", [Blur(torch.full((1, 5), 0.2)), Mask(torch.arange(20 * 24).reshape(20, 24) % 3 > 0), Scale(2)]
)
def test_known_operators(tiny_pipeline: RestorationPipeline, operator: Any) -> None:
    truth = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(2))
    y = operator.forward(truth)[0].clamp(0, 1)
    guidance = {"beta": 1.0, "noise_weight": 0.0}
    output = tiny_pipeline(y, operator=operator, guidance=guidance, **FAST)
    x = output.images[0]
    assert x.shape == (3, 20, 24)
    assert output.calls["loop"]["inn"] == 0
    free = tiny_pipeline(y, operator=operator, method="unguided", **FAST).images[0]
    told, untold = ((operator.forward(i[None])[0] - y).square().mean() for i in (x, free))
    assert told < untold


def test_operator_refuses_the_latent_method(tiny_pipeline: RestorationPipeline) -> None:
    with pytest.raises(ValueError, match="pixel-inn"):
        tiny_pipeline(noise(), operator=Scale(2), method="latent-inn")


def test_callback_sees_every_step_and_can_cancel(tiny_pipeline: RestorationPipeline) -> None:
    seen: list[tuple[int, int, set[str]]] = []
    tiny_pipeline(
        noise(), steps=3, output_type="pt", callback_on_step_end=lambda pipe, i, t, kw: seen.append((i, t, set(kw)))
    )
    assert [s[0] for s in seen] == [0, 1, 2]
    assert seen[0][1] > seen[1][1] > seen[2][1]
    assert seen[0][2] == {"latents", "z0"}

    def cancel(pipe: RestorationPipeline, step: int, timestep: int, values: dict[str, Tensor]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_pipeline(noise(), callback_on_step_end=cancel, **FAST)


def test_fidelity_moves_between_the_presets(tiny_pipeline: RestorationPipeline) -> None:
    ends = [tiny_pipeline(noise(), fidelity=f, output_type="pt").settings for f in (0.0, 1.0)]
    for settings, name in zip(ends, ("vivid", "faithful"), strict=True):
        assert settings["strength"] == tiny_pipeline.presets[name].strength
        assert settings["steps"] == tiny_pipeline.presets[name].steps


def test_guidance_as_object_or_dict(tiny_pipeline: RestorationPipeline) -> None:
    a = tiny_pipeline(noise(), guidance=GuidanceConfig(beta=0.9), **FAST)
    b = tiny_pipeline(noise(), guidance={"beta": 0.9}, **FAST)
    assert torch.equal(a.images[0], b.images[0])
    json.dumps(a.settings)  # plain data


def test_without_a_latent_inn_the_pixel_inn_guides(tiny_model: Path) -> None:
    pipe = RestorationPipeline.from_pretrained(tiny_model, latent_inn=None)
    assert pipe(noise(), **FAST).settings["method"] == "pixel-inn"
    with pytest.raises(ValueError, match="no latent INN"):
        pipe(noise(), method="latent-inn")


def test_another_prior(tiny_model: Path, tiny_pipeline: RestorationPipeline, tmp_path: Path) -> None:
    for name in ("vae", "denoiser", "scheduler"):
        getattr(tiny_pipeline, name).save_pretrained(tmp_path / name)
    pipe = RestorationPipeline.from_pretrained(tiny_model, prior=tmp_path)
    assert pipe.latent_inn is None
    # The spread of an estimate is known in one latent space only.
    alone = RestorationPipeline(**{**tiny_pipeline.components, "latent_inn": None})
    expected = alone(noise(), method="pixel-inn", **FAST).images[0]
    torch.testing.assert_close(pipe(noise(), **FAST).images[0], expected)


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"image": []}, "at least one image"),
    ({"image": torch.rand(4, 5)}, r"\(3, H, W\)"),
    ({"image": torch.rand(3, 5, 5) * 255}, "divide by 255"),
    ({"image": torch.full((3, 4, 4), float("nan"))}, r"\[0, 1\]"),
    ({"image": torch.zeros(3, 0, 4)}, "at least one pixel"),
    ({"image": np.zeros((4, 4, 7), np.uint8)}, "array"),
    ({"image": torch.zeros(3, 4, 4, dtype=torch.int64)}, "float tensor"),
    ({"scale": 0}, "scale"),
    ({"scale": float("inf")}, "scale"),
    ({"size": (0, 4)}, "size"),
    ({"preset": "best"}, "faithful"),
    ({"method": "magic"}, "latent-inn"),
    ({"update": "magic"}, "projection"),
    ({"init": "magic"}, "estimator"),
    ({"steps": 0}, "steps"),
    ({"strength": 1.5}, "strength"),
    ({"fidelity": 2.0}, "fidelity"),
    ({"num_samples": 0}, "num_samples"),
    ({"seed": [1, 2]}, "seeds"),
    ({"tile": 8}, "tile"),
    ({"output_type": "jpeg"}, "output_type"),
    ({"guidance": {"beta": 3.0}}, "beta"),
    ({"guidance": {"regulariser": "magic"}}, "trust"),
]


@pytest.mark.parametrize(
    ("call", "message"), BAD_CALLS, ids=[f"{next(iter(c))}-{k}" for k, (c, _) in enumerate(BAD_CALLS)]
)
def test_bad_calls_get_one_clear_sentence(
    tiny_pipeline: RestorationPipeline, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**{"image": noise(), "steps": 2, **call})


def test_loading_failures_say_what_is_wrong(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="model folder"):
        RestorationPipeline.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ModelLoadError, match=r"model_index\.json"):
        RestorationPipeline.from_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="vae"):
        RestorationPipeline.from_pretrained(tiny_model, prior=tmp_path)
