"""The ComfyUI nodes, run as ComfyUI runs nodes.

ComfyUI is no package that could be installed here. What its loader, its validation and its executor ask of a node is
written down again in this file, and each demand is shown to be one by a node that breaks it.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import latentindigo
from latentindigo.jobs import MAP_GAIN
from latentindigo.pipeline import RestorationPipeline
from tolerances import assert_close

PACKAGE = Path(__file__).parents[2] / "integrations" / "comfyui"
TYPES = {"STRING", "INT", "FLOAT", "BOOLEAN", "IMAGE", "MASK", "UPSCALE_MODEL", "LATENTINDIGO"}
OPTIONS = {"default", "min", "max", "step", "round", "tooltip", "multiline", "control_after_generate", "forceInput"}
CONVERT: dict[Any, Callable[[Any], Any]] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


# ------------------------------------------------------------------------------------------------ what ComfyUI demands


def load_package(folder: Path) -> ModuleType:
    """Import a folder of custom nodes under a name made from its path, outside of every package."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check_node(node: Any) -> None:
    """Raise AssertionError unless ComfyUI could list a node, draw its widgets and call it by name."""
    declared = node.INPUT_TYPES()
    assert set(declared) <= {"required", "optional", "hidden"} and "required" in declared, "groups of inputs"
    inputs = {**declared["required"], **declared.get("optional", {})}
    for name, entry in inputs.items():
        assert isinstance(entry, tuple) and 1 <= len(entry) <= 2, f"{name}: a tuple of type and options"
        kind, options = entry[0], (*entry, {})[1]
        assert set(options) <= OPTIONS, f"{name}: unknown options {set(options) - OPTIONS}"
        if isinstance(kind, list):
            assert kind and all(isinstance(choice, str) for choice in kind), f"{name}: choices"
            assert options.get("default", kind[0]) in kind, f"{name}: default"
        else:
            assert kind in TYPES, f"{name}: type {kind}"
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], f"{name}: default"
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    assert set(parameters) - {"self"} == set(inputs), "parameters and inputs"
    for name in declared.get("optional", {}):
        assert parameters[name].default is not inspect.Parameter.empty, f"{name}: optional, but has no default"
    assert isinstance(node.RETURN_TYPES, tuple) and set(node.RETURN_TYPES) <= TYPES, "RETURN_TYPES"
    assert len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES), "names of the outputs"
    assert node.CATEGORY and node.DESCRIPTION, "menu"
    json.dumps([declared, node.RETURN_TYPES])  # They are sent to the browser.


def check_output(kind: str, value: Any) -> None:
    """Raise AssertionError unless a value is what ComfyUI's own nodes expect of its type."""
    if kind in ("IMAGE", "MASK"):
        assert isinstance(value, Tensor) and value.dtype == torch.float32 and value.device.type == "cpu", kind
        assert value.ndim == (4 if kind == "IMAGE" else 3), f"{kind}: {tuple(value.shape)}"
        assert kind == "MASK" or value.shape[-1] in (3, 4), f"{kind}: {tuple(value.shape)}"
        assert value.isfinite().all() and value.min() >= 0 and value.max() <= 1, f"{kind}: range"


class Comfy:
    """A small ComfyUI: validates a graph of nodes, runs it, and keeps results whose inputs did not change."""

    def __init__(self, nodes: dict[str, Any]) -> None:
        self.nodes = nodes
        self.cache: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        self.ran: list[str] = []

    def problems(self, graph: dict[str, Any], key: str) -> list[str]:
        """What forbids to run a node; literal values are converted in place."""
        node, given = self.nodes[graph[key]["class_type"]], graph[key]["inputs"]
        declared = node.INPUT_TYPES()
        check = getattr(node, "VALIDATE_INPUTS", None)
        own = inspect.getfullargspec(check).args if check else []
        problems: list[str] = []
        for name, entry in {**declared["required"], **declared.get("optional", {})}.items():
            kind, options = entry[0], (*entry, {})[1]
            if name not in given:
                problems += [f"{name}: missing"] if name in declared["required"] else []
            elif isinstance(given[name], list):
                source, slot = given[name]
                sent = self.nodes[graph[source]["class_type"]].RETURN_TYPES[slot]
                if sent != kind:
                    problems.append(f"{name}: {sent} is no {kind}")
                problems += self.problems(graph, source)
            else:
                value = given[name] = CONVERT.get(str(kind), lambda x: x)(given[name])
                if name in own:
                    continue
                if value < options.get("min", value) or value > options.get("max", value):
                    problems.append(f"{name}: {value} out of range")
                if isinstance(kind, list) and value not in kind:
                    problems.append(f"{name}: {value} not in the list")
        if check:
            # What another node gives is not known yet.
            known = {n: None if isinstance(v, list) else v for n, v in given.items() if n in own}
            verdict = check(**known)
            problems += [] if verdict is True else [str(verdict)]
        return problems

    def run(self, graph: dict[str, Any], key: str) -> tuple[Any, ...]:
        """The outputs of a node, those before it first, all in inference mode."""
        found = self.problems(graph, key)
        assert not found, found
        with torch.inference_mode():
            return self._run(graph, key)

    def _run(self, graph: dict[str, Any], key: str) -> tuple[Any, ...]:
        node, given = self.nodes[graph[key]["class_type"]], graph[key]["inputs"]
        values = {n: self._run(graph, v[0])[v[1]] if isinstance(v, list) else v for n, v in given.items()}
        changed = getattr(node, "IS_CHANGED", lambda **_: None)(
            **{name: None if isinstance(given[name], list) else value for name, value in values.items()}
        )
        signature = (changed, [id(v) if isinstance(given[n], list) else v for n, v in values.items()])
        if key in self.cache and self.cache[key][0] == signature:
            return self.cache[key][1]
        outputs = getattr(node(), node.FUNCTION)(**values)
        assert isinstance(outputs, tuple) and len(outputs) == len(node.RETURN_TYPES), "one output for each type"
        for kind, value in zip(node.RETURN_TYPES, outputs, strict=True):
            if not issubclass(node, Source):  # What it gives may be wrong on purpose.
                check_output(kind, value)
        self.ran.append(key)
        self.cache[key] = (signature, outputs)
        return outputs


# ----------------------------------------------------------------------------------------------------------- the nodes


class Source:
    """Stands in for the nodes that load images and upscale models."""

    value: Any = None
    RETURN_TYPES = ("IMAGE", "UPSCALE_MODEL")
    FUNCTION = "give"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> int:
        return id(cls.value)

    def give(self) -> tuple[Any, Any]:
        return self.value, self.value


def image(batch: int = 1, channels: int = 3) -> Tensor:
    """What ComfyUI's loader gives, (B, H, W, C)."""
    return torch.rand(batch, 12, 10, channels, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def package() -> ModuleType:
    return load_package(PACKAGE)


@pytest.fixture
def comfy(package: ModuleType) -> Comfy:
    return Comfy({**package.NODE_CLASS_MAPPINGS, "Image": type("Image", (Source,), {"value": image()})})


def graph(model: object, /, load: dict[str, Any] | None = None, **restore: Any) -> dict[str, Any]:
    loader = {"model": str(model), "dtype": "float32", "device": "cpu", **(load or {})}
    wired = {"model": ["1", 0], "image": ["2", 0], "scale": 2.0, "preset": "default", "seed": 0, "steps": 2}
    return {
        "1": {"class_type": "LatentINDIGOLoad", "inputs": loader},
        "2": {"class_type": "Image", "inputs": {}},
        "3": {"class_type": "LatentINDIGORestore", "inputs": {**wired, **restore}},
    }


def test_the_package_is_what_comfyui_loads(package: ModuleType) -> None:
    assert set(package.NODE_CLASS_MAPPINGS) == set(package.NODE_DISPLAY_NAME_MAPPINGS)
    for node in package.NODE_CLASS_MAPPINGS.values():
        check_node(node)
    facts = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
    assert facts["tool"]["comfy"]["PublisherId"] and facts["tool"]["comfy"]["DisplayName"]
    assert facts["project"]["version"] == latentindigo.__version__


def test_a_restored_image_is_the_pipelines(comfy: Comfy, tiny_model: Path, tiny_pipeline: RestorationPipeline) -> None:
    settings = {"fidelity": 0.3, "num_samples": 2, "seed": 5, "preset": "vivid", "tile": "256"}
    restored, detail = comfy.run(graph(tiny_model, **settings), "3")
    expected = tiny_pipeline(image().movedim(-1, 1), scale=2, steps=2, output_type="pt", **{**settings, "tile": 256})
    assert restored.shape == (2, 24, 20, 3)
    assert_close(restored, torch.stack(expected.images).movedim(1, -1))
    assert_close(detail, (torch.cat(expected.detail_maps) * MAP_GAIN).clamp(0, 1))


def test_what_is_left_out_is_the_presets(comfy: Comfy, tiny_model: Path, tiny_pipeline: RestorationPipeline) -> None:
    wiring = graph(tiny_model, steps=0, fidelity=-1.0)
    expected = tiny_pipeline(image().movedim(-1, 1), scale=2, output_type="pt")
    assert_close(comfy.run(wiring, "3")[0], torch.stack(expected.images).movedim(1, -1))


def test_a_batch_is_its_images(comfy: Comfy, tiny_model: Path) -> None:
    comfy.nodes["Image"].value = image(3)
    both, detail = comfy.run(graph(tiny_model), "3")
    assert both.shape == (3, 24, 20, 3)
    assert detail.shape == (3, 24, 20)
    comfy.nodes["Image"].value = image(3)[1:2].clone()
    assert_close(comfy.run(graph(tiny_model), "3")[0], both[1:2])


def test_alpha_is_kept(comfy: Comfy, tiny_model: Path) -> None:
    picture = image(2, channels=4)
    picture[..., 3] = torch.tensor([0.25, 1.0])[:, None, None]
    comfy.nodes["Image"].value = picture
    restored, _ = comfy.run(graph(tiny_model, num_samples=2), "3")
    assert restored.shape == (4, 24, 20, 4)
    expected = torch.tensor([0.25, 0.25, 1.0, 1.0])[:, None, None].expand(4, 24, 20)
    assert_close(restored[..., 3], expected)


def test_pixels_beyond_the_range_are_cut_off_and_the_input_is_left_alone(comfy: Comfy, tiny_model: Path) -> None:
    loud = image() * 1.4 - 0.2
    before = loud.clone()
    comfy.nodes["Image"].value = loud
    restored, _ = comfy.run(graph(tiny_model), "3")
    assert torch.equal(loud, before)
    comfy.nodes["Image"].value = before.clamp(0, 1)
    assert torch.equal(comfy.run(graph(tiny_model), "3")[0], restored)


def test_another_shape_is_refused(package: ModuleType, tiny_pipeline: RestorationPipeline) -> None:
    node = package.NODE_CLASS_MAPPINGS["LatentINDIGORestore"]()
    with pytest.raises(ValueError, match=r"image: expected \(B, H, W, 3\).*got \(1, 12, 10, 1\)"):
        node.restore(tiny_pipeline, image(channels=1), 2.0, "default", 0)


def test_the_largest_seed_has_as_many_samples(comfy: Comfy, tiny_model: Path) -> None:
    restored, _ = comfy.run(graph(tiny_model, seed=2**64 - 1, num_samples=2, steps=1), "3")
    assert (restored[0] - restored[1]).abs().max() > 0


def test_gradients_work_in_inference_mode(comfy: Comfy, tiny_model: Path) -> None:
    """Guidance by gradients, as a model's presets may ask for it, on a model and an image of inference mode."""
    pipe = comfy.run(graph(tiny_model), "1")[0]
    assert not any(p.is_inference() for p in pipe.denoiser.parameters())
    for update in ("stopped", "through"):
        ours = {"method": "pixel-inn", "update": update, "steps": 1}
        pipe.presets["default"] = type(pipe.presets["default"])(**{**vars(pipe.presets["default"]), **ours})
        with torch.inference_mode():
            comfy.nodes["Image"].value = image() + 0
        assert comfy.nodes["Image"].value.is_inference()
        comfy.run(graph(tiny_model, steps=0), "3")


def test_a_model_is_loaded_once_and_again_when_its_files_change(comfy: Comfy, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    for seed in (0, 1, 1):
        comfy.run(graph(folder, seed=seed, steps=1), "3")
    assert comfy.ran == ["2", "1", "3", "3"] or comfy.ran == ["1", "2", "3", "3"]
    (folder / "presets.json").write_text((folder / "presets.json").read_text() + "\n")
    comfy.run(graph(folder, seed=1, steps=1), "3")
    assert comfy.ran[4:] == ["1", "3"]


def test_an_upscale_model_makes_the_start(comfy: Comfy, tiny_model: Path) -> None:
    class Repeat:
        """As much of spandrel's descriptor as the adapter asks for."""

        scale, purpose, supports_half, supports_bfloat16 = 2, "SR", True, True
        input_channels = output_channels = 3
        size_requirements = SimpleNamespace(minimum=0, multiple_of=1, square=False)
        calls = 0

        def to(self, device: Any = None, dtype: Any = None) -> Repeat:
            assert dtype == torch.float32, "other nodes hold the same object"
            return self

        def eval(self) -> Repeat:
            return self

        def __call__(self, y: Tensor) -> Tensor:
            self.calls += 1
            return y.repeat_interleave(2, -1).repeat_interleave(2, -2)

    descriptor = Repeat()
    comfy.nodes["Upscaler"] = type("Upscaler", (Source,), {"value": descriptor})
    wiring = graph(tiny_model, {"init_model": ["4", 1]}) | {"4": {"class_type": "Upscaler", "inputs": {}}}
    comfy.run(wiring, "3")
    assert descriptor.calls == 1


def test_the_model_of_the_package_restores(comfy: Comfy) -> None:
    restored, detail = comfy.run(graph("embedded", {"dtype": "auto"}), "3")
    assert restored.shape == (1, 24, 20, 3)
    enlarged = image().repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert (restored - enlarged).abs().mean() < (restored - enlarged.flip(1)).abs().mean()
    assert detail.max() > 0


# ---------------------------------------------------------------------------------------- beside ComfyUI's own modules


class InterruptedByUserError(Exception):
    """What ComfyUI raises when the user pressed cancel."""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Install stand-ins for the modules of ComfyUI that nodes may use; return what they saw."""
    seen = SimpleNamespace(bars=[], cancel_after=10**6, asked=0)

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total, self.values = total, []
            seen.bars.append(self)

        def update_absolute(self, value: int, total: int | None = None) -> None:
            self.values.append(value)

    def throw_exception_if_processing_interrupted() -> None:
        seen.asked += 1
        if seen.asked > seen.cancel_after:
            raise InterruptedByUserError

    modules = {name: ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management")}
    vars(modules["comfy.utils"])["ProgressBar"] = ProgressBar
    vars(modules["comfy.model_management"]).update(
        throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
        get_torch_device=lambda: torch.device("cpu"),
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.mark.parametrize("steps", [3, 0])
def test_the_bar_ends_full(comfy: Comfy, tiny_model: Path, host: SimpleNamespace, steps: int) -> None:
    comfy.nodes["Image"].value = image(2)
    comfy.run(graph(tiny_model, {"device": "auto"}, steps=steps, num_samples=2), "3")
    (bar,) = host.bars
    assert bar.values == sorted(bar.values)
    assert len(bar.values) > 1
    assert bar.values[-1] == bar.total
    assert steps in (0, bar.total / 4)


def test_cancel_ends_the_call(comfy: Comfy, tiny_model: Path, host: SimpleNamespace) -> None:
    host.cancel_after = 1
    with pytest.raises(InterruptedByUserError):
        comfy.run(graph(tiny_model, steps=3), "3")
    assert host.asked == 2
    host.cancel_after = 10**6
    comfy.run(graph(tiny_model, steps=3), "3")


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": 0.5}, "scale: 0.5 out of range"),
        ({"steps": -1}, "steps"),
        ({"preset": "bold"}, "preset: bold not in the list"),
        ({"tile": "100"}, "tile: 100"),
        ({"seed": -1}, "seed"),
        ({"fidelity": 1.5}, "fidelity"),
        ({"model": ["2", 0]}, "model: IMAGE is no LATENTINDIGO"),
    ],
    ids=str,
)
def test_wrong_values_are_found_before_anything_runs(comfy: Comfy, wrong: dict[str, Any], message: str) -> None:
    (problem,) = comfy.problems(graph("embedded", **wrong), "3")
    assert message in problem


@pytest.mark.parametrize(
    ("load", "valid"),
    [
        ({"model": ""}, False),
        ({"model": "/no/such/folder"}, False),
        ({"prior": "./none"}, False),
        ({"model": "user/repo"}, True),
        ({"prior": ""}, True),
        ({"model": ["5", 0]}, True),
    ],
    ids=str,
)
def test_names_of_models_are_checked(comfy: Comfy, load: dict[str, Any], valid: bool) -> None:
    comfy.nodes["Text"] = type("Text", (Source,), {"RETURN_TYPES": ("STRING",)})
    wiring = graph("embedded", load) | {"5": {"class_type": "Text", "inputs": {}}}
    problems = comfy.problems(wiring, "1")
    assert not problems if valid else "hub id user/repo, got" in problems[0]


def test_without_the_package_one_sentence_says_what_to_install(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent:
        """Finds no latentindigo, as in a Python without it."""

        def find_spec(self, name: str, *_: Any) -> None:
            if name.partition(".")[0] == "latentindigo":
                raise ModuleNotFoundError(f"No module named {name!r}", name="latentindigo")

    for name in [name for name in sys.modules if name.partition(".")[0] == "latentindigo"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match="latentindigo is missing; install it for the Python that runs ComfyUI"):
        package.NODE_CLASS_MAPPINGS["LatentINDIGOLoad"]().load("embedded", "float32", "cpu")


# ------------------------------------------------------------------------------------------------------ planted defects


def broken(package: ModuleType, **changes: Any) -> Any:
    return type("Broken", (package.NODE_CLASS_MAPPINGS["LatentINDIGORestore"],), changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RETURN_TYPES": "IMAGE"}, "RETURN_TYPES"),
        ({"RETURN_TYPES": ("IMAGE", "PICTURE")}, "RETURN_TYPES"),
        ({"RETURN_NAMES": ("image",)}, "names of the outputs"),
        ({"restore": lambda self, model, image: None}, "parameters and inputs"),
        ({"INPUT_TYPES": lambda: {"optional": {}}}, "groups"),
        ({"INPUT_TYPES": lambda: {"required": {"x": "IMAGE"}}}, "x: a tuple"),
        ({"INPUT_TYPES": lambda: {"required": {"x": ("PICTURE",)}}}, "x: type PICTURE"),
        ({"INPUT_TYPES": lambda: {"required": {"x": (["a"], {"default": "b"})}}}, "x: default"),
        ({"INPUT_TYPES": lambda: {"required": {"x": ("INT", {"default": 5, "min": 0, "max": 4})}}}, "x: default"),
        ({"INPUT_TYPES": lambda: {"required": {"x": ("INT", {"minimum": 0})}}}, "x: unknown options"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_node_is_found(package: ModuleType, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_node(broken(package, **changes))


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(8, 8, 3),
        torch.zeros(1, 8, 8, 3, dtype=torch.float64),
        torch.full((1, 8, 8, 3), 1.1),
        torch.full((1, 8, 8, 3), torch.nan),
        None,
    ],
    ids=["channels first", "no batch", "double", "too bright", "not finite", "nothing"],
)
def test_a_wrong_image_is_found(output: Any) -> None:
    with pytest.raises(AssertionError):
        check_output("IMAGE", output)


def test_a_wrong_number_of_outputs_is_found(comfy: Comfy, package: ModuleType, tiny_model: Path) -> None:
    node = package.NODE_CLASS_MAPPINGS["LatentINDIGORestore"]

    def restore(self: Any, **inputs: Any) -> Any:
        return node().restore(**inputs)[:1]

    comfy.nodes["LatentINDIGORestore"] = broken(package, restore=restore)
    with pytest.raises(AssertionError, match="one output for each type"):
        comfy.run(graph(tiny_model, steps=1), "3")
