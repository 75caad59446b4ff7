"""Networks whose weights come and go: every entry brings them, and nothing else depends on where they are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, CpuOffload, ModelHook, UserCpuOffloadHook, add_hook_to_module
from torch import Tensor, nn

import tiny
from latentindigo.autoencoder import PatchAutoencoder
from latentindigo.guidance import LearnedForward
from latentindigo.inn import DegradationEncoder, Estimator, InvertibleNet
from latentindigo.offloading import entry, execution_device, private_copy, weights_of
from latentindigo.pipeline import RestorationPipeline
from latentindigo.prior import in_full_precision

CPU = torch.device("cpu")
FAST: dict[str, Any] = {"steps": 2, "output_type": "pt"}
GAMMA = torch.linspace(-1, 1, tiny.GAMMA_DIM)[None]
# Public methods that compute nothing with weights that could be elsewhere.
NO_ENTRIES = {"forward", "compute_in", "settled", "set_patch_basis"}


def picture(*shape: int) -> Tensor:
    """Numbers in [0, 1]."""
    return torch.rand(shape or (3, 9, 14), generator=torch.Generator().manual_seed(1))


def inverse(inn: InvertibleNet) -> Tensor:
    channels = inn.config["channels"]
    return inn.inverse(picture(1, channels, 4, 4), [picture(1, 3 * channels, 4, 4)], GAMMA, 1)


ENTRIES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "pixel inverse": ("pixel_inn", inverse),
    "latent inverse": ("latent_inn", inverse),
    "spread": ("latent_inn", lambda inn: inn.spread(picture(1, 4, 4, 4), GAMMA)),
    "estimate": ("degradation_encoder", lambda encoder: encoder.estimate(GAMMA).noise),
    "self_ensemble": ("estimator", lambda estimator: estimator.self_ensemble(picture(1, 3, 8, 8), GAMMA, 2, 2)),
    "encode": ("vae", lambda vae: vae.encode(picture(1, 3, 16, 16)).latents),
    "decode": ("vae", lambda vae: vae.decode(picture(1, 4, 2, 2)).sample),
}


def whole(network: nn.Module) -> nn.Module:
    """Offload as model offload does: all weights come before a call; here they have no values before that."""
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    hook = AlignDevicesHook(CPU, offload=True, weights_map=kept, place_submodules=True)
    return add_hook_to_module(network, hook)


def by_layers(network: nn.Module) -> nn.Module:
    """Offload as sequential offload does: a layer's weights come when it is called, and go again."""
    cpu_offload(network, CPU)
    return network


@pytest.mark.parametrize("offload", [whole, by_layers])
@pytest.mark.parametrize("name", ENTRIES)
def test_entries_bring_their_weights(name: str, offload: Callable[[nn.Module], nn.Module]) -> None:
    part, call = ENTRIES[name]
    network = getattr(tiny.tiny_pipeline(), part)
    with torch.no_grad():
        expected = call(network)
        offload(network)
        assert all(p.is_meta for p in network.parameters())
        torch.testing.assert_close(call(network), expected, atol=0, rtol=0)


class Seen(ModelHook):
    """A hook that only remembers that it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.asked += 1
        return args, kwargs


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_ask_the_hook(name: str) -> None:
    part, call = ENTRIES[name]
    hook = Seen()
    # The method alone: what it calls inside may ask the hook too, and is not what is tested here.
    network = add_hook_to_module(getattr(tiny.tiny_pipeline(), part), hook)
    asked: list[int] = []
    forward = network.forward
    network.forward = lambda *args: (asked.append(hook.asked), forward(*args))[1]
    call(network)
    assert (asked[0] if asked else hook.asked) >= 1


def entries_of(kind: type) -> dict[str, Any]:
    """Public methods that a class adds to diffusers' own."""
    found = inspect.getmembers(kind, inspect.isfunction)
    return {n: f for n, f in found if n in vars(kind) and not n.startswith("_") and n not in NO_ENTRIES}


def unmarked(kind: type) -> list[str]:
    """Entries that do not bring the weights."""
    return [n for n, f in entries_of(kind).items() if "pre_forward" not in wrapper_names(f)]


def wrapper_names(function: Any) -> set[str]:
    """Names that the wrappers around a method use."""
    names: set[str] = set()
    while function is not None:
        names |= set(getattr(function, "__code__", entry.__code__).co_names)
        function = getattr(function, "__wrapped__", None)
    return names


@pytest.mark.parametrize("kind", [InvertibleNet, DegradationEncoder, Estimator, PatchAutoencoder])
def test_no_entry_is_forgotten(kind: type) -> None:
    assert unmarked(kind) == []


def test_a_forgotten_entry_is_found() -> None:
    class Forgetful(InvertibleNet):
        def inverse(self, x_c: Tensor, *_: Any, **__: Any) -> Tensor:
            return x_c

    assert unmarked(Forgetful) == ["inverse"]


class Stray(InvertibleNet):
    """Planted: the inverse without its mark."""

    inverse = inspect.unwrap(InvertibleNet.inverse)


def test_an_unmarked_entry_fails_under_offload() -> None:
    network = Stray(**{**tiny.tiny_pipeline().pixel_inn.config})
    whole(network)
    with pytest.raises((RuntimeError, NotImplementedError)):
        inverse(network)


# --------------------------------------------------------------------------------------------------- copies and hashes


@pytest.mark.parametrize("offload", [whole, by_layers])
def test_a_private_copy_is_free(offload: Callable[[nn.Module], nn.Module]) -> None:
    inn = tiny.tiny_pipeline().latent_inn
    assert inn is not None
    before = {name: value.clone() for name, value in inn.state_dict().items()}
    expected = inverse(inn)
    offload(inn)
    copied = private_copy(inn)
    assert not any(hasattr(module, "_hf_hook") for module in copied.modules())
    torch.testing.assert_close(inverse(copied), expected, atol=0, rtol=0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    # Neither the original nor what its hooks hold was touched.
    torch.testing.assert_close(inverse(inn), expected, atol=0, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(inn).items())


def test_a_private_copy_leaves_the_other_networks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of model offload know the network before them; copying them would copy its weights."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    hook = CpuOffload(CPU)
    add_hook_to_module(first, hook)
    add_hook_to_module(second, CpuOffload(CPU, prev_module_hook=UserCpuOffloadHook(first, hook)))
    copies: list[Any] = []
    monkeypatch.setattr(CpuOffload, "__deepcopy__", lambda self, memo: copies.append(self), raising=False)
    private_copy(second)
    assert not copies
    copy.deepcopy(second)
    assert copies


@pytest.mark.parametrize("offload", [whole, by_layers])
def test_refinement_under_offload(offload: Callable[[nn.Module], nn.Module]) -> None:
    u, target = picture(1, 3, 8, 8), picture(1, 3, 4, 4)

    def refined(inn: InvertibleNet) -> Tensor:
        model = LearnedForward(inn, GAMMA, 1, refine_lr=1e-2)
        model.refine([(u, target, None)])
        return model.split(u)[0].detach()

    inn = tiny.tiny_pipeline().pixel_inn
    with torch.no_grad():
        as_trained = inn(u, GAMMA, 1)[0]
    expected = refined(inn)
    offload(inn)
    torch.testing.assert_close(refined(inn), expected, atol=0, rtol=0)
    assert not torch.equal(expected, as_trained)


def test_full_precision_under_offload() -> None:
    network = nn.Linear(2, 2).to(torch.float16).requires_grad_(False)
    cpu_offload(network, CPU)
    x = torch.full((1, 2), 6e4)

    with pytest.warns(UserWarning, match="again in float32"):
        output = in_full_precision(network, lambda layer: 1e3 * layer(x.to(layer.weight.dtype)))
    assert output.isfinite().all()
    assert network.weight.is_meta


def test_where_a_network_computes() -> None:
    layer = nn.Linear(2, 2)
    assert execution_device(layer) == CPU
    assert execution_device(nn.ReLU()) == CPU
    layer = nn.Sequential(nn.Linear(2, 2)).to("meta")
    assert execution_device(layer).type == "meta"
    cpu_offload(layer, torch.device("cpu:0"), state_dict={"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)})
    assert execution_device(layer) == torch.device("cpu:0")


# ------------------------------------------------------------------------------------------------------- the pipeline

SWITCHES = ["enable_model_cpu_offload", "enable_sequential_cpu_offload"]
CALLS: dict[str, dict[str, Any]] = {
    "latent": {"method": "latent-inn", "update": "stopped"},
    "latent through, refined": {"method": "latent-inn", "update": "through", "guidance": {"refine": True}},
    "pixel through": {"method": "pixel-inn", "update": "through"},
    "pixel projection, inverse": {"method": "pixel-inn", "update": "projection", "init": "inverse"},
    "tiles": {"tile": 256, "size": (64, 320)},
}


def offload(pipe: RestorationPipeline, switch: str) -> None:
    """Turn a switch of diffusers; a CPU serves as the accelerator.

    The sequential one would ask for "cpu:0", a name under which accelerate makes plain tensors of the weights: what it
    does is repeated here with "cpu".
    """
    if switch == SWITCHES[0]:
        pipe.enable_model_cpu_offload(device="cpu")
        return
    for network in pipe.components.values():
        if isinstance(network, nn.Module):
            cpu_offload(network, CPU, offload_buffers=len(network._parameters) > 0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_diffusers(switch: str, name: str, tiny_pipeline: RestorationPipeline) -> None:
    y = picture(3, 80, 16) if name == "tiles" else picture()
    expected = tiny_pipeline(y, **CALLS[name], **FAST)
    pipe = tiny.tiny_pipeline()
    offload(pipe, switch)
    assert all(p.is_meta for p in pipe.denoiser.parameters()) == (switch == SWITCHES[1])
    output = pipe(y, **CALLS[name], **FAST)
    torch.testing.assert_close(output.images[0], expected.images[0], atol=0, rtol=0)
    torch.testing.assert_close(output.detail_maps[0], expected.detail_maps[0], atol=0, rtol=0)
    assert pipe.weights_hash() == tiny_pipeline.weights_hash()


def test_saving_needs_the_weights(tiny_pipeline: RestorationPipeline, tmp_path: Any) -> None:
    pipe = tiny.tiny_pipeline()
    offload(pipe, SWITCHES[1])
    with pytest.raises(ValueError, match="remove_all_hooks"):
        pipe.save_pretrained(tmp_path)
    pipe.remove_all_hooks()
    pipe.save_pretrained(tmp_path)
    assert RestorationPipeline.from_pretrained(tmp_path).weights_hash() == tiny_pipeline.weights_hash()


def test_the_denoiser_stays_between_the_steps() -> None:
    """Whatever guidance calls between two steps comes before the denoiser in the order, and so never sends it away."""
    order = RestorationPipeline.model_cpu_offload_seq.split("->")
    assert {"vae", "pixel_inn", "latent_inn"} < set(order[: order.index("denoiser")])
    assert order[-2:] == ["vae", "denoiser"]


def test_the_denoiser_makes_room_for_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    events: list[str] = []
    offload_hook, decode = UserCpuOffloadHook.offload, pipe.vae.decode
    monkeypatch.setattr(
        UserCpuOffloadHook,
        "offload",
        lambda hook: (events.append("away" if hook.model is pipe.denoiser else ""), offload_hook(hook))[1],
    )
    monkeypatch.setattr(pipe.vae, "decode", lambda *args: (events.append("decode"), decode(*args))[1])
    pipe(picture(), callback_on_step_end=lambda *_: events.append("step"), method="latent-inn", **FAST)
    told = [event for event in events if event]
    assert told[:4] == ["step", "step", "away", "decode"]


def test_hooks_are_set_anew_after_a_call_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    freed: list[bool] = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))

    def cancel(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(picture(), callback_on_step_end=cancel, **FAST)
    assert freed == [True]


@pytest.mark.parametrize("switch", SWITCHES)
def test_without_an_accelerator_the_switches_say_so(switch: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(RuntimeError, match="accelerator"):
        getattr(tiny.tiny_pipeline(), switch)()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_diffusers_on_an_accelerator(switch: str, name: str) -> None:
    y = picture(3, 80, 16) if name == "tiles" else picture()
    expected = tiny.tiny_pipeline().to("cuda")(y, **CALLS[name], **FAST)
    pipe = tiny.tiny_pipeline()
    getattr(pipe, switch)()
    output = pipe(y, **CALLS[name], **FAST)
    # The same device computes; only where weights rest differs. Convolutions on it may choose another algorithm.
    torch.testing.assert_close(output.images[0], expected.images[0], atol=1e-3, rtol=1e-3)
    assert all(p.device.type in ("cpu", "meta") for p in pipe.denoiser.parameters())


def test_switches_that_have_nothing_to_do_say_so() -> None:
    pipe = tiny.tiny_pipeline()
    with pytest.warns(UserWarning, match="PatchAutoencoder has no enable_tiling; call with tile=512"):
        pipe.enable_vae_tiling()
    with pytest.warns(UserWarning, match="PatchAutoencoder has no enable_slicing"):
        pipe.enable_vae_slicing()
    with pytest.warns(UserWarning, match="no network of this model has attention"):
        pipe.enable_attention_slicing()
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    pipe.disable_attention_slicing()


def test_switches_reach_networks_that_have_them() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import Attention, SlicedAttnProcessor

    blocks: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    kinds: dict[str, Any] = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(latent_channels=4, **kinds, **blocks)
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    denoiser = UNet2DConditionModel(cross_attention_dim=8, attention_head_dim=2, layers_per_block=1, **kinds, **blocks)
    parts = {**tiny.tiny_pipeline().components, "vae": vae, "denoiser": denoiser, "latent_inn": None}
    pipe = RestorationPipeline(**parts)

    def slicing() -> set[bool]:
        layers = [part for part in denoiser.modules() if isinstance(part, Attention)]
        return {isinstance(layer.processor, SlicedAttnProcessor) for layer in layers}

    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    pipe.enable_attention_slicing("max")
    assert (vae.use_tiling, vae.use_slicing, slicing()) == (True, True, {True})
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    pipe.disable_attention_slicing()
    assert (vae.use_tiling, vae.use_slicing, slicing()) == (False, False, {False})
