"""Other people's restorers as the stage-one estimate: the adapter's contract, on networks with spandrel's interface."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from latentindigo.canvas import make_plan
from latentindigo.cli import ExitCode, app
from latentindigo.images import LoadedImage, read_metadata, save_image
from latentindigo.init_models import InitModel, load_init_model
from latentindigo.pipeline import ModelLoadError, RestorationPipeline
from latentindigo.presets import Preset
from latentindigo.stages import STORED, Start
from latentindigo.tiling import TilingConfig
from tiny import tiny_pipeline as build_pipeline
from tolerances import assert_close

HALF_STEP = 2**-11  # Of `STORED` just below 1, and a rounding.
INSTALL = r"pip install 'latentindigo\[init-models\]'"


@dataclass
class Size:
    """spandrel's `SizeRequirements`."""

    minimum: int = 0
    multiple_of: int = 1
    square: bool = False


class Enlarger(nn.Module):
    """A local network: a 5x5 kernel with fixed weights per channel, then each pixel repeated `scale` times."""

    def __init__(self, scale: int, channels: int = 3) -> None:
        super().__init__()
        self.scale = scale
        self.blur = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        kernel = torch.linspace(0.2, 1.8, 25).reshape(1, 1, 5, 5)
        self.blur.weight.data = (kernel / kernel.sum()).repeat(channels, 1, 1, 1)

    def forward(self, y: Tensor) -> Tensor:
        return F.interpolate(self.blur(y), scale_factor=self.scale, mode="nearest")


class Descriptor:
    """The interface of spandrel's `ImageModelDescriptor`, as strict as its documentation: one image, its own dtype.

    It runs in inference mode and clamps in place, as the original does. It does not pad: sizes that it does not take
    are an error here, so that the padding is ours.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        scale: int = 4,
        channels: tuple[int, int] = (3, 3),
        purpose: str = "SR",
        size: Size | None = None,
        half: bool = True,
        bfloat16: bool = True,
    ) -> None:
        self.model = network if network is not None else Enlarger(scale, channels[0])
        self.scale, (self.input_channels, self.output_channels) = scale, channels
        self.purpose, self.size_requirements = purpose, size or Size()
        self.supports_half, self.supports_bfloat16 = half, bfloat16
        self.seen: list[tuple[int, int]] = []
        self.dtypes: list[torch.dtype] = []

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Descriptor:
        refused = {torch.float16: not self.supports_half, torch.bfloat16: not self.supports_bfloat16}
        if dtype is not None and refused.get(dtype, False):
            raise TypeError(f"{dtype} is not supported")
        self.model.to(device=device, dtype=dtype)
        return self

    def eval(self) -> Descriptor:
        self.model.eval()
        return self

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        assert image.shape[:2] == (1, self.input_channels)
        assert image.dtype == self.dtype
        assert image.min() >= 0 and image.max() <= 1
        height, width = image.shape[-2:]
        needs = self.size_requirements
        assert min(height, width) >= needs.minimum
        assert height % needs.multiple_of == 0 and width % needs.multiple_of == 0
        assert not needs.square or height == width
        self.seen.append((height, width))
        self.dtypes.append(image.dtype)
        return self.model(image).clamp_(0, 1)


def photo(height: int = 12, width: int = 10, batch: int = 1, seed: int = 0) -> Tensor:
    """Smooth random pictures, (B, 3, H, W) in [0, 1]."""
    noise = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)


def with_model(descriptor: Descriptor, dtype: torch.dtype = torch.float32) -> RestorationPipeline:
    pipe = build_pipeline()
    pipe.init_model = InitModel(descriptor, dtype)
    return pipe


def start_of(
    model: InitModel, y: Tensor, levels: int, tiling: TilingConfig | None = None, init: Any = "estimator"
) -> Tensor:
    pipe = build_pipeline()
    size = (y.shape[-1] * 2**levels, y.shape[-2] * 2**levels)
    plan = make_plan(y.shape[-1], y.shape[-2], size, 1, 1, None)
    assert plan.levels == levels
    start = Start(pipe.estimator, pipe.pixel_inn, torch.device("cpu"), model)
    return start(y, torch.zeros(len(y), 8), plan, Preset(init=init), tiling)


# --------------------------------------------------------------------------------------------------------- the call


@pytest.mark.parametrize(
    ("size", "height", "width", "seen"),
    [
        (Size(), 12, 10, (12, 10)),
        (Size(multiple_of=8), 12, 10, (16, 16)),
        (Size(multiple_of=8), 16, 24, (16, 24)),
        (Size(minimum=32, multiple_of=8), 12, 40, (32, 40)),
        (Size(minimum=20, multiple_of=8), 12, 10, (24, 24)),
        (Size(square=True), 12, 10, (12, 12)),
        (Size(minimum=16, multiple_of=4, square=True), 5, 18, (20, 20)),
        (Size(minimum=64), 1, 1, (64, 64)),
    ],
    ids=str,
)
def test_any_size_goes_in_and_the_right_one_comes_out(
    size: Size, height: int, width: int, seen: tuple[int, int]
) -> None:
    descriptor = Descriptor(size=size)
    y = photo(height, width)
    x = InitModel(descriptor)(y)
    assert descriptor.seen == [seen]
    assert x.shape == (1, 3, 4 * height, 4 * width)
    # Away from the padding it is the network's own answer, in its place.
    inner = slice(0, max(0, 4 * min(height, width) - 8))
    expected = descriptor.model(y)[..., inner, inner]
    assert_close(x[..., inner, inner], expected)


def test_a_batch_is_its_images_one_by_one_and_the_input_is_left_alone() -> None:
    model = InitModel(Descriptor())
    y = photo(batch=3)
    before = y.clone()
    x = model(y)
    assert not x.is_inference(), "a tensor of spandrel's inference mode would refuse every gradient"
    assert x.dtype == torch.float32
    assert torch.equal(y, before)
    assert torch.equal(x[1:2], model(y[1:2]))


def test_a_model_that_writes_into_its_input_does_not_change_ours() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.5))

        def forward(self, y: Tensor) -> Tensor:
            return y.mul_(self.gain)

    y = photo()
    before = y.clone()
    x = InitModel(Descriptor(Careless(), scale=1, purpose="Restoration"))(y)
    assert torch.equal(y, before)
    assert_close(x, 0.5 * before)


def test_a_grey_model_gets_each_colour() -> None:
    descriptor = Descriptor(channels=(1, 1))
    y = photo(batch=2)
    x = InitModel(descriptor)(y)
    assert len(descriptor.seen) == 6
    assert_close(x, Descriptor().model(y).clamp(0, 1))


@pytest.mark.parametrize(
    ("wanted", "half", "bfloat16", "used"),
    [
        (torch.float32, True, True, torch.float32),
        (torch.bfloat16, True, True, torch.bfloat16),
        (torch.bfloat16, True, False, torch.float32),
        (torch.float16, False, True, torch.float32),
    ],
    ids=str,
)
def test_half_precision_only_where_it_is_supported(
    wanted: torch.dtype, half: bool, bfloat16: bool, used: torch.dtype
) -> None:
    descriptor = Descriptor(half=half, bfloat16=bfloat16)
    x = InitModel(descriptor, wanted)(photo())
    assert descriptor.dtypes == [used]
    assert x.dtype == torch.float32
    assert_close(x, Descriptor().model(photo()), used)


def test_numbers_that_are_not_finite_are_computed_again_in_float32() -> None:
    class Overflowing(Enlarger):
        def forward(self, y: Tensor) -> Tensor:
            return super().forward(y) if y.dtype == torch.float32 else super().forward(y) * torch.nan

    descriptor = Descriptor(Overflowing(4))
    model = InitModel(descriptor, torch.bfloat16)
    with pytest.warns(UserWarning, match="not finite in torch.bfloat16"):
        x = model(photo())
    assert bool(x.isfinite().all())
    assert descriptor.dtype == torch.bfloat16, "the model itself stays as it was"


def test_a_wrong_size_is_said() -> None:
    with pytest.raises(ValueError, match=r"of scale 4 and made \(24, 20\) of \(12, 10\) pixels; expected \(48, 40\)"):
        InitModel(Descriptor(Enlarger(2), scale=4))(photo())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"purpose": "FaceSR"}, "a model for 'FaceSR'; expected one that restores or enlarges"),
        ({"purpose": "Inpainting"}, "a model for 'Inpainting'"),
        ({"purpose": "VideoSR"}, "a model for 'VideoSR'"),
        ({"channels": (4, 4)}, "takes 4 channels and gives 4; expected 3 and 3"),
        ({"channels": (1, 3)}, "takes 1 channels and gives 3"),
    ],
    ids=str,
)
def test_another_kind_of_model_is_refused(kind: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InitModel(Descriptor(Enlarger(4), **kind), name="x.safetensors")


def test_what_has_no_such_interface_is_refused() -> None:
    with pytest.raises(ValueError, match="a model for 'Enlarger'"):
        InitModel(Enlarger(4))


# ---------------------------------------------------------------------------------------------------- the start image


@pytest.mark.parametrize(("scale", "levels"), [(4, 2), (2, 2), (4, 1), (4, 0), (1, 2), (4, 3)])
def test_the_start_lies_on_the_canvas_whatever_the_models_scale(scale: int, levels: int) -> None:
    descriptor = Descriptor(scale=scale, purpose="SR" if scale > 1 else "Restoration")
    y = photo(16, 24)
    x = start_of(InitModel(descriptor), y, levels)
    assert x.shape == (1, 3, 16 * 2**levels, 24 * 2**levels)
    assert descriptor.seen == [(16, 24)]
    own = descriptor.model(y).clamp(0, 1)
    expected = F.interpolate(own, size=x.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
    assert_close(x, own if scale == 2**levels else expected)


@pytest.mark.parametrize("init", ["encode", "inverse"])
def test_another_start_does_not_ask_the_model(init: str) -> None:
    descriptor = Descriptor()
    start_of(InitModel(descriptor), photo(16, 24), 2, init=init)
    assert descriptor.seen == []


@pytest.mark.parametrize(("scale", "size"), [(4, Size()), (4, Size(multiple_of=8)), (2, Size(multiple_of=16))])
def test_tiles_give_what_the_whole_gives(scale: int, size: Size) -> None:
    y = photo(112, 96)
    whole = start_of(InitModel(Descriptor(scale=scale, size=size)), y, 2)
    descriptor = Descriptor(scale=scale, size=size)
    tiled = start_of(InitModel(descriptor), y, 2, TilingConfig(256, 64))
    assert len(descriptor.seen) > 3
    assert max(max(sides) for sides in descriptor.seen) <= 64
    assert tiled.dtype == STORED
    torch.testing.assert_close(tiled.float(), whole, atol=HALF_STEP, rtol=0)


def test_tiles_lie_on_the_models_grid() -> None:
    """A model that looks at cells of two pixels answers another picture where tiles cut through its cells."""

    class Cells(Enlarger):
        def forward(self, y: Tensor) -> Tensor:
            x = F.interpolate(F.avg_pool2d(y, 2, ceil_mode=True), scale_factor=2 * self.scale, mode="nearest")
            return x[..., : self.scale * y.shape[-2], : self.scale * y.shape[-1]]

    def descriptor(size: Size) -> Descriptor:
        return Descriptor(Cells(4), size=size)

    y = photo(90, 106) * 0.5 + 0.5 * torch.rand(1, 3, 90, 106, generator=torch.Generator().manual_seed(1))
    whole = start_of(InitModel(descriptor(Size(multiple_of=2))), y, 2)
    tiled = start_of(InitModel(descriptor(Size(multiple_of=2))), y, 2, TilingConfig(256, 64)).float()
    shifted = start_of(InitModel(descriptor(Size())), y, 2, TilingConfig(256, 64)).float()
    torch.testing.assert_close(tiled, whole, atol=HALF_STEP, rtol=0)
    assert (shifted - whole).abs().max() > 0.05, "the picture would show a shift"


# ------------------------------------------------------------------------------------------------------ the pipeline


def restore(pipe: RestorationPipeline, **settings: Any) -> Any:
    return pipe(photo()[0], **{"scale": 4, "steps": 2, "output_type": "pt", **settings})


def test_the_pipeline_starts_from_it_and_stays_as_it_was() -> None:
    descriptor = Descriptor()
    pipe = with_model(descriptor)
    before = pipe.weights_hash()
    x = restore(pipe).images[0]
    assert len(descriptor.seen) == 1, "one view, whatever the ensemble of the preset"
    assert x.shape == (3, 48, 40)
    assert (x - restore(build_pipeline()).images[0]).abs().max() > 1e-3
    assert pipe.weights_hash() == before == build_pipeline().weights_hash()
    assert torch.equal(restore(pipe).images[0], x)
    # A start in one colour shows through: it is this model's estimate that is sampled from.
    with torch.no_grad():
        for parameter in descriptor.model.parameters():
            parameter.zero_()
    assert (restore(pipe).images[0] - x).abs().max() > 0.05


@pytest.mark.parametrize("update", ["projection", "stopped", "through"])
def test_gradients_pass_through_what_comes_after_it(update: str) -> None:
    x = restore(with_model(Descriptor()), method="pixel-inn", update=update, steps=1).images[0]
    assert bool(x.isfinite().all())


def test_no_spread_is_drawn_around_a_foreign_estimate() -> None:
    pipe = with_model(Descriptor())
    assert torch.equal(
        restore(pipe, spread=1.0, texture=0.5).images[0], restore(pipe, spread=0.0, texture=0.5).images[0]
    )
    pipe.init_model = None
    one, none = (restore(pipe, spread=s, texture=0.5).images[0] for s in (1.0, 0.0))
    assert (one - none).abs().max() > 1e-4, "our own estimate has one"


def test_a_model_without_an_estimator_gets_one() -> None:
    pipe = with_model(Descriptor())
    pipe.register_modules(estimator=None)
    assert restore(pipe).settings["init"] == "estimator"
    pipe.init_model = None
    assert restore(pipe).settings["init"] == "encode"


def test_it_is_no_part_of_a_saved_model(tmp_path: Path) -> None:
    pipe = with_model(Descriptor())
    pipe.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if "init" in path.name]
    assert "init_model" not in (tmp_path / "model_index.json").read_text()
    assert RestorationPipeline.from_pretrained(tmp_path).init_model is None


def test_a_large_model_is_given_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canvas that fits by our own networks' needs is tiled if the model enlarges far beyond it."""
    monkeypatch.setattr("latentindigo.pipeline.free_memory", lambda device: 2 * 320**2 * 2000.0)
    for scale, tiles in ((1, 1), (4, 4)):
        descriptor = Descriptor(scale=scale, purpose="SR" if scale > 1 else "Restoration")
        pipe = with_model(descriptor)
        pipe(photo(320, 320)[0], scale=1, steps=1, output_type="pt", method="unguided")
        assert len(descriptor.seen) == tiles


def test_copies_of_a_pipeline_restore_alike() -> None:
    pipe = with_model(Descriptor())
    assert torch.equal(restore(copy.deepcopy(pipe)).images[0], restore(pipe).images[0])


# --------------------------------------------------------------------------------------------------------- the files


Install = Callable[[Any], None]


@pytest.fixture
def spandrel(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return what installs a stand-in for spandrel whose loader gives a descriptor, or raises an exception."""

    def install(result: Any) -> None:
        class ModelLoader:
            def load_from_file(self, path: Path) -> Any:
                assert path.suffix == ".safetensors"
                if isinstance(result, Exception):
                    raise result
                return result

        module = ModuleType("spandrel")
        vars(module)["ModelLoader"] = ModelLoader
        monkeypatch.setitem(sys.modules, "spandrel", module)

    return install


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "RealESRGAN_x4.safetensors"
    save_file({"weight": torch.ones(1)}, path)
    return path


def test_a_file_is_loaded_through_spandrel(spandrel: Install, weights: Path) -> None:
    descriptor = Descriptor()
    spandrel(descriptor)
    model = load_init_model(weights, torch.bfloat16)
    assert (model.name, model.scale, model.dtype) == ("RealESRGAN_x4.safetensors", 4, torch.bfloat16)
    assert model.sha256 is not None and len(model.sha256) == 64
    model(photo())
    assert descriptor.seen == [(12, 10)]


def test_without_spandrel_one_sentence_says_how_to_get_it(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)  # None in this table means "not there".
    with pytest.raises(ImportError, match=rf"read by the package spandrel, which is not installed: {INSTALL}$"):
        load_init_model(weights)


def test_pickles_and_broken_files_are_refused(tmp_path: Path, spandrel: Install) -> None:
    spandrel(Descriptor())
    pickled = tmp_path / "RealESRGAN_x4.pth"
    torch.save({"weight": torch.ones(1)}, pickled)
    with pytest.raises(ValueError, match=r"expected a .safetensors file, got 'RealESRGAN_x4.pth'.*save_file\("):
        load_init_model(pickled)
    renamed = pickled.rename(tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match="'renamed.safetensors' is no readable safetensors file"):
        load_init_model(renamed)
    with pytest.raises(FileNotFoundError, match="which is no file"):
        load_init_model(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Descriptor(purpose="FaceSR"), "RealESRGAN_x4.safetensors is a model for 'FaceSR'"),
        (LookupError("unknown architecture"), "no model in 'RealESRGAN_x4.safetensors'.*unknown architecture"),
    ],
    ids=["face model", "unknown"],
)
def test_the_pipeline_says_what_is_wrong_with_a_file(
    result: Any, message: str, spandrel: Install, weights: Path, tiny_model: Path
) -> None:
    spandrel(result)
    with pytest.raises(ModelLoadError, match=rf"^init model .* could not be loaded: .*{message}"):
        RestorationPipeline.from_pretrained(tiny_model, init_model=weights)


def run(photograph: Path, out: Path, *options: object) -> Any:
    fixed = ("--steps", 1, "--device", "cpu", "--dtype", "float32")
    arguments = ("restore", photograph, "-o", out, *fixed, *options)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    save_image(LoadedImage(photo()[0]), tmp_path / "a.png")
    return tmp_path / "a.png"


def test_the_command_line_takes_one(
    spandrel: Install, weights: Path, photograph: Path, tiny_model: Path, tmp_path: Path
) -> None:
    descriptor = Descriptor()
    spandrel(descriptor)
    result = run(photograph, tmp_path / "x.png", "--model", tiny_model, "--init-model", weights)
    assert result.exit_code == ExitCode.DONE, result.output
    assert descriptor.seen
    metadata = read_metadata(tmp_path / "x.png")
    assert metadata is not None
    assert metadata["init_model"]["name"] == weights.name
    assert metadata["model_hash"] == build_pipeline().weights_hash()


@pytest.mark.parametrize("case", ["absent file", "face model", "absent spandrel"])
def test_the_command_line_ends_with_one_sentence(
    case: str,
    spandrel: Install,
    weights: Path,
    photograph: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spandrel(Descriptor(purpose="FaceSR"))
    if case == "absent spandrel":
        monkeypatch.setitem(sys.modules, "spandrel", None)
    file = tmp_path / "none.safetensors" if case == "absent file" else weights
    result = run(photograph, tmp_path / "x.png", "--model", tiny_model, "--init-model", file)
    assert result.exit_code == ExitCode.MODEL
    assert result.stderr.startswith("error: init model")
    assert len(result.stderr.strip().splitlines()) == 1
    assert {"absent file": "no file", "face model": "FaceSR", "absent spandrel": "pip install"}[case] in result.stderr


def real_esrgan(width: int = 4, growth: int = 32) -> dict[str, Tensor]:
    """Random weights under the names of a published Real-ESRGAN x4 file, one block deep."""
    convolutions = {"conv_first": (3, width), "conv_last": (width, 3)}
    convolutions |= {name: (width, width) for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr")}
    for part in (1, 2, 3):
        for n in range(1, 6):
            ends = (width + (n - 1) * growth, growth if n < 5 else width)
            convolutions[f"body.0.rdb{part}.conv{n}"] = ends
    weights = {f"{name}.weight": 0.1 * torch.randn(b, a, 3, 3) for name, (a, b) in convolutions.items()}
    return weights | {f"{name}.bias": torch.zeros(b) for name, (_, b) in convolutions.items()}


def test_a_real_file_through_the_real_spandrel(tmp_path: Path) -> None:
    """A tiny Real-ESRGAN, written here, is recognised, loaded and called."""
    pytest.importorskip("spandrel", reason="spandrel is not installed: pip install 'latentindigo[init-models]'")
    save_file(real_esrgan(), tmp_path / "tiny.safetensors")
    model = load_init_model(tmp_path / "tiny.safetensors")
    assert model.scale == 4
    x = model(photo(1, 10, batch=2))
    assert x.shape == (2, 3, 4, 40)
    assert not x.is_inference()
