"""Laws of the saved networks. Each law runs on the real thing and on a planted defect that it must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentindigo import inn as inn_module
from latentindigo import traces as traces_module
from latentindigo.inn import DegradationEncoder, Estimator, InvertibleNet
from latentindigo.jpeg import jpeg
from latentindigo.lifting import lift
from latentindigo.traces import COMB_QUALITIES, TRACES, traces
from tolerances import assert_close, in_dtype, randomise_

GAMMA_DIM = 6
DTYPES = [torch.float64, torch.float32]
LEVELS = [0, 1, 2, 3]

# The kinds of invertible network in use, small: pixels, latents with and without band mix and gain, no Haar step.
INNS: dict[str, dict[str, Any]] = {
    "pixel": {"channels": 3, "offset": 0.5},
    "latent": {"channels": 5, "offset": 0.0},
    "mixed": {"channels": 4, "offset": 0.0, "mix": True, "gain": True},
    "no-haar": {"channels": 2, "offset": 0.0, "haar": False},
}


def make_inn(name: str = "pixel", kind: type[InvertibleNet] = InvertibleNet, scale: float = 0.5) -> InvertibleNet:
    net = kind(gamma_dim=GAMMA_DIM, hidden=6, blocks=1, num_steps=2, **INNS[name])
    net = randomise_(net, 1, scale).eval()
    if net.band_mix is not None:
        # Random and well conditioned, as trained ones are: a random matrix alone may be nearly singular.
        turn = torch.linalg.qr(net.band_mix.matrix.detach()).Q
        net.band_mix.matrix.data = turn * torch.linspace(0.5, 2.0, len(turn))
    return net


def make_encoder(kind: type[DegradationEncoder] = DegradationEncoder) -> DegradationEncoder:
    return randomise_(kind(gamma_dim=GAMMA_DIM, width=4), 2).eval()


def make_estimator(kind: type[Estimator] = Estimator) -> Estimator:
    return randomise_(kind(width=8, blocks=1, gamma_dim=GAMMA_DIM), 3).eval()


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw pixels in [0, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_gamma(batch: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn((batch, GAMMA_DIM), generator=torch.Generator().manual_seed(seed), dtype=dtype)


# What a network computes, as one tuple of tensors: laws about all three networks run over this list.
Outputs = Callable[[Any, Tensor, Tensor], tuple[Tensor, ...]]


def inn_outputs(net: InvertibleNet, x: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
    x_c, x_d = net(x, gamma, levels=2)
    return x_c, *x_d, net.inverse(x_c * 0.9, x_d, gamma, levels=2), *undecimated_outputs(net, x, gamma)


def undecimated_outputs(net: InvertibleNet, x: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
    x_c, x_d = net(x, gamma, levels=0)
    return x_c, *x_d


def encoder_outputs(net: DegradationEncoder, x: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
    embedding = net(x)
    estimate = net.estimate(embedding)
    return embedding, estimate.blur, estimate.noise, estimate.jpeg


def estimator_outputs(net: Estimator, x: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
    return tuple(net(x, gamma, levels=levels) for levels in (0, 1, 2))


NETS: dict[str, tuple[Callable[..., ModelMixin], Outputs]] = {
    "inn": (make_inn, inn_outputs),
    "encoder": (make_encoder, encoder_outputs),
    "estimator": (make_estimator, estimator_outputs),
}


# ------------------------------------------------------------------------------------------------- planted defects


class ForgottenOffset(InvertibleNet):
    """Centres the input on the way forward only."""

    def inverse(
        self,
        x_c: Tensor,
        x_d: Sequence[Tensor],
        gamma: Tensor,
        levels: int = 2,
        updates: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return super().inverse(x_c, x_d, gamma, levels) - self.config["offset"]


class TransposedMix(InvertibleNet):
    """Takes the transpose of the band mix for its inverse, which holds for rotations only."""

    def inverse(
        self,
        x_c: Tensor,
        x_d: Sequence[Tensor],
        gamma: Tensor,
        levels: int = 2,
        updates: Sequence[Tensor] | None = None,
    ) -> Tensor:
        if self.band_mix is None:
            return super().inverse(x_c, x_d, gamma, levels)
        kept = self.band_mix.matrix.data
        try:
            self.band_mix.matrix.data = torch.linalg.inv(kept).T.contiguous()
            return super().inverse(x_c, x_d, gamma, levels)
        finally:
            self.band_mix.matrix.data = kept


class OneWayGain(InvertibleNet):
    """Forgets the coarse gain on the way back."""

    def inverse(
        self,
        x_c: Tensor,
        x_d: Sequence[Tensor],
        gamma: Tensor,
        levels: int = 2,
        updates: Sequence[Tensor] | None = None,
    ) -> Tensor:
        gain, self.coarse_gain = self.coarse_gain, None
        try:
            return super().inverse(x_c, x_d, gamma, levels)
        finally:
            self.coarse_gain = gain


class RoundingInn(InvertibleNet):
    """Keeps the coarse part in half precision."""

    def forward(self, x: Tensor, gamma: Tensor, levels: int = 2) -> tuple[Tensor, tuple[Tensor, ...]]:
        x_c, x_d = super().forward(x, gamma, levels)
        return x_c.half().to(x.dtype), x_d


class ClampingInn(InvertibleNet):
    """Clamps a coarse part to [0, 1], which its own output may leave."""

    def inverse(
        self,
        x_c: Tensor,
        x_d: Sequence[Tensor],
        gamma: Tensor,
        levels: int = 2,
        updates: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return super().inverse(x_c.clamp(0, 1), x_d, gamma, levels)


class PaddingInn(InvertibleNet):
    """Accepts any size, and returns another one."""

    def forward(self, x: Tensor, gamma: Tensor, levels: int = 2) -> tuple[Tensor, tuple[Tensor, ...]]:
        multiple = 2**levels
        bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
        return super().forward(torch.nn.functional.pad(x, (0, right, 0, bottom)), gamma, levels)


class InPlaceInn(InvertibleNet):
    """Centres the caller's own tensor."""

    def forward(self, x: Tensor, gamma: Tensor, levels: int = 2) -> tuple[Tensor, tuple[Tensor, ...]]:
        x -= 0.5
        x_c, x_d = super().forward(x + 0.5, gamma, levels)
        x += 0.5
        return x_c, x_d


class DetachedInn(InvertibleNet):
    """Right values, but the details do not depend on gamma as far as autograd knows."""

    def forward(self, x: Tensor, gamma: Tensor, levels: int = 2) -> tuple[Tensor, tuple[Tensor, ...]]:
        return super().forward(x, gamma.detach(), levels)

    def inverse(
        self,
        x_c: Tensor,
        x_d: Sequence[Tensor],
        gamma: Tensor,
        levels: int = 2,
        updates: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return super().inverse(x_c, x_d, gamma.detach(), levels)


class DeafInn(InvertibleNet):
    """Does not listen to gamma."""

    def forward(self, x: Tensor, gamma: Tensor, levels: int = 2) -> tuple[Tensor, tuple[Tensor, ...]]:
        return super().forward(x, torch.zeros_like(gamma), levels)


class DeafEstimator(Estimator):
    """Does not listen to gamma."""

    def forward(self, y: Tensor, gamma: Tensor, levels: int = 2) -> Tensor:
        return super().forward(y, torch.zeros_like(gamma), levels)


class UnsavedState(DegradationEncoder):
    """Holds a random tensor that the state dict does not know."""

    @register_to_config
    def __init__(self, gamma_dim: int = 64, width: int = 32) -> None:
        super().__init__(gamma_dim=gamma_dim, width=width)
        self.secret = torch.randn(gamma_dim)

    def forward(self, y: Tensor) -> Tensor:
        return super().forward(y) + self.secret


class UnsavedSetting(InvertibleNet):
    """Behaves by an attribute that is not in the config."""

    sign = 1.0

    def forward(self, x: Tensor, gamma: Tensor, levels: int = 2) -> tuple[Tensor, tuple[Tensor, ...]]:
        x_c, x_d = super().forward(x, gamma, levels)
        return self.sign * x_c, x_d


class BatchMeanEncoder(DegradationEncoder):
    """Normalises by the batch: an image's embedding depends on its neighbours."""

    def forward(self, y: Tensor) -> Tensor:
        embedding = super().forward(y)
        return embedding - embedding.mean(dim=0, keepdim=True)


class OtherWhenCompiled(Estimator):
    """Computes something else in a compiled graph."""

    def forward(self, y: Tensor, gamma: Tensor, levels: int = 2) -> Tensor:
        out = super().forward(y, gamma, levels)
        return out + 0.1 if torch.compiler.is_compiling() else out


# ------------------------------------------------------------------------------------------------------- inversion


@torch.no_grad()
def check_inverse_undoes_forward(net: InvertibleNet, x: Tensor, gamma: Tensor, levels: int) -> None:
    x_c, x_d = net(x, gamma, levels)
    assert_close(net.inverse(x_c, x_d, gamma, levels), x)


@torch.no_grad()
def check_forward_undoes_inverse(
    net: InvertibleNet, x_c: Tensor, x_d: Sequence[Tensor], gamma: Tensor, levels: int
) -> None:
    new_c, new_d = net(net.inverse(x_c, x_d, gamma, levels), gamma, levels)
    assert_close(new_c, x_c)
    for new, old in zip(new_d, x_d, strict=True):
        assert_close(new, old)


def draw_parts(channels: int, levels: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Draw a measurement and details that no forward transform produced."""
    x_d = [
        draw(2, 3 * channels, 2 * 2**power, 3 * 2**power, dtype=dtype, seed=power) - 0.5
        for power in reversed(range(max(levels, 1)))
    ]
    return draw(2, channels, 2, 3, dtype=dtype, seed=7), x_d


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", INNS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(height=st.integers(1, 4), width=st.integers(1, 4))
def test_inverse_undoes_forward(name: str, levels: int, dtype: torch.dtype, height: int, width: int) -> None:
    net = in_dtype(make_inn(name), dtype)
    x = draw(2, INNS[name]["channels"], height * 2**levels, width * 2**levels, dtype=dtype)
    check_inverse_undoes_forward(net, x, draw_gamma(2, dtype), levels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS)
def test_inverse_undoes_forward_at_the_size_in_use(levels: int, dtype: torch.dtype) -> None:
    net = in_dtype(randomise_(InvertibleNet(), 4, 0.5), dtype)
    gamma = torch.randn(1, 64, dtype=dtype)
    check_inverse_undoes_forward(net, draw(1, 3, 24, 16, dtype=dtype), gamma, levels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS[1:])
@pytest.mark.parametrize("name", INNS)
def test_forward_undoes_inverse(name: str, levels: int, dtype: torch.dtype) -> None:
    net = in_dtype(make_inn(name), dtype)
    x_c, x_d = draw_parts(INNS[name]["channels"], levels, dtype)
    check_forward_undoes_inverse(net, x_c, x_d, draw_gamma(2, dtype), levels)


def test_the_undecimated_transform_has_a_left_inverse_only() -> None:
    x_c, x_d = draw_parts(3, 0, torch.float32)
    with pytest.raises(AssertionError):
        check_forward_undoes_inverse(make_inn(), x_c, x_d, draw_gamma(2), 0)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", [ForgottenOffset, RoundingInn, ClampingInn])
def test_a_wrong_inverse_is_found(kind: type[InvertibleNet], levels: int) -> None:
    net, x = make_inn(kind=kind), draw(1, 3, 8, 8)
    with pytest.raises(AssertionError):
        check_inverse_undoes_forward(net, x, draw_gamma(), levels)


@pytest.mark.parametrize("kind", [TransposedMix, OneWayGain])
def test_a_wrong_inverse_of_mix_or_gain_is_found(kind: type[InvertibleNet]) -> None:
    net, x = make_inn("mixed", kind), draw(1, 4, 8, 8)
    with pytest.raises(AssertionError):
        check_inverse_undoes_forward(net, x, draw_gamma(), 2)


@pytest.mark.parametrize("kind", [ForgottenOffset, RoundingInn])
def test_a_wrong_forward_is_found(kind: type[InvertibleNet]) -> None:
    x_c, x_d = draw_parts(3, 2, torch.float32)
    with pytest.raises(AssertionError):
        check_forward_undoes_inverse(make_inn(kind=kind), x_c, x_d, draw_gamma(2), 2)


@torch.no_grad()
def check_away_from_wavelet(net: InvertibleNet) -> None:
    """The weights under test change every part by more than a constant."""
    x, gamma = draw(1, 3, 16, 16), draw_gamma()
    x_c, x_d = net(x, gamma, 2)
    haar_c, haar_d = lift(x, [], gamma, 2)
    for new, old in zip((x_c, *x_d), (haar_c, *haar_d), strict=True):
        assert (new - old).std(dim=(-2, -1)).mean() > 0.02


def test_the_weights_under_test_are_far_from_the_identity() -> None:
    check_away_from_wavelet(make_inn())
    with pytest.raises(AssertionError):
        check_away_from_wavelet(InvertibleNet(gamma_dim=GAMMA_DIM, hidden=6, blocks=1, num_steps=2))


# ------------------------------------------------------------------------------------------- sizes, inputs, gradients


def check_refuses_sizes(net: InvertibleNet, levels: int) -> None:
    multiple = 2**levels
    for height, width in ((multiple + multiple // 2, multiple), (multiple, 2 * multiple + 1), (1, 1)):
        try:
            net(draw(1, 3, height, width), draw_gamma(), levels)
        except ValueError as error:
            message = str(error)
            assert f"multiples of {multiple}" in message, "the message names what was expected"
            assert f"{height}x{width}" in message, "the message names what was passed"
            assert "pad" in message, "the message names the way out"
        else:
            raise AssertionError(f"{height}x{width} was accepted")


@pytest.mark.parametrize("levels", LEVELS[1:])
def test_wrong_sizes_are_refused(levels: int) -> None:
    check_refuses_sizes(make_inn(), levels)


@pytest.mark.parametrize("levels", LEVELS[1:])
def test_silent_padding_is_found(levels: int) -> None:
    with pytest.raises(AssertionError, match="was accepted"):
        check_refuses_sizes(make_inn(kind=PaddingInn), levels)


@torch.no_grad()
def check_inputs_unchanged(function: Callable[..., object], *inputs: Tensor) -> None:
    copies = [tensor.clone() for tensor in inputs]
    versions = [tensor._version for tensor in inputs]
    function(*inputs)
    for tensor, copy, version in zip(inputs, copies, versions, strict=True):
        assert torch.equal(tensor, copy), "a value changed"
        assert tensor._version == version, "written to, even if the values came back"
        assert not tensor.requires_grad, "requires_grad_ was called on the caller's tensor"


@pytest.mark.parametrize("name", NETS)
def test_inputs_are_not_mutated(name: str) -> None:
    make, outputs = NETS[name]
    net = make()
    check_inputs_unchanged(lambda x, gamma: outputs(net, x, gamma), draw(1, 3, 8, 8), draw_gamma())


def test_inverse_does_not_mutate_its_inputs() -> None:
    net = make_inn()
    x_c, x_d = draw_parts(3, 2, torch.float32)
    check_inputs_unchanged(lambda gamma, x_c, *x_d: net.inverse(x_c, x_d, gamma, 2), draw_gamma(2), x_c, *x_d)


def test_an_in_place_network_is_found() -> None:
    net = make_inn(kind=InPlaceInn)
    with pytest.raises(AssertionError):
        check_inputs_unchanged(lambda x, gamma: net(x, gamma), draw(1, 3, 8, 8), draw_gamma())


def check_gradients(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Compare the gradient with finite differences in float64; their own error sets gradcheck's tolerance."""
    leaves = [tensor.detach().clone().requires_grad_(True) for tensor in inputs]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, raise_exception=False)


def flat_forward(net: InvertibleNet, levels: int) -> Callable[..., tuple[Tensor, ...]]:
    def function(x: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        x_c, x_d = net(x, gamma, levels)
        return x_c, *x_d

    return function


def flat_inverse(net: InvertibleNet, levels: int) -> Callable[..., tuple[Tensor, ...]]:
    def function(gamma: Tensor, x_c: Tensor, *x_d: Tensor) -> tuple[Tensor, ...]:
        return (net.inverse(x_c, x_d, gamma, levels),)

    return function


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_gradients_of_both_directions(levels: int) -> None:
    net = make_inn().double()
    x, gamma = draw(1, 3, 8, 4, dtype=torch.float64), draw_gamma(dtype=torch.float64)
    check_gradients(flat_forward(net, levels), x, gamma)
    x_c, x_d = net(x, gamma, levels)
    check_gradients(flat_inverse(net, levels), gamma, x_c, *x_d)


def test_a_detached_gamma_is_found() -> None:
    net = make_inn(kind=DetachedInn).double()
    x, gamma = draw(1, 3, 2, 2, dtype=torch.float64), draw_gamma(dtype=torch.float64)
    with pytest.raises(AssertionError):
        check_gradients(flat_forward(net, 1), x, gamma)
    x_c, x_d = net(x, gamma, 1)
    with pytest.raises(AssertionError):
        check_gradients(flat_inverse(net, 1), gamma, x_c, *x_d)


# --------------------------------------------------------------------------------------------------- gamma and batches


@torch.no_grad()
def check_depends_on_gamma(net: ModelMixin, outputs: Outputs) -> None:
    x = draw(1, 3, 8, 8)
    for one, other in zip(outputs(net, x, draw_gamma(seed=1)), outputs(net, x, draw_gamma(seed=2)), strict=True):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["inn", "estimator"])
def test_outputs_depend_on_gamma(name: str) -> None:
    make, outputs = NETS[name]
    check_depends_on_gamma(make(), outputs)


def test_deaf_networks_are_found() -> None:
    for net, outputs in ((make_inn(kind=DeafInn), inn_outputs), (make_estimator(DeafEstimator), estimator_outputs)):
        with pytest.raises(AssertionError):
            check_depends_on_gamma(net, outputs)


@torch.no_grad()
def check_alone_as_in_a_batch(net: ModelMixin, outputs: Outputs) -> None:
    x, gamma = draw(3, 3, 8, 8), draw_gamma(3)
    together = outputs(net, x, gamma)
    for index in range(3):
        alone = outputs(net, x[index : index + 1], gamma[index : index + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            assert_close(one[0], all_of_them[index])


@pytest.mark.parametrize("name", NETS)
def test_an_image_alone_is_the_image_in_a_batch(name: str) -> None:
    make, outputs = NETS[name]
    check_alone_as_in_a_batch(make(), outputs)


def test_a_batch_statistic_is_found() -> None:
    with pytest.raises(AssertionError):
        check_alone_as_in_a_batch(make_encoder(BatchMeanEncoder), encoder_outputs)


# ---------------------------------------------------------------------------------------------------- save and load


@torch.no_grad()
def check_survives_saving(net: ModelMixin, outputs: Outputs, folder: Path) -> None:
    net.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = type(net).from_pretrained(folder)
    x, gamma = draw(1, 3, 8, 8), draw_gamma()
    for after, before in zip(outputs(loaded, x, gamma), outputs(net, x, gamma), strict=True):
        assert_close(after, before)


@pytest.mark.parametrize("name", NETS)
def test_networks_survive_saving(name: str, tmp_path: Path) -> None:
    make, outputs = NETS[name]
    check_survives_saving(make(), outputs, tmp_path)


def test_every_setting_survives_saving(tmp_path: Path) -> None:
    net = InvertibleNet(
        channels=2, gamma_dim=3, hidden=4, blocks=3, num_steps=1, haar=False, offset=0.25, mix=True, gain=True,
        spread=True,
    )  # fmt: skip
    net.save_pretrained(tmp_path)
    loaded = InvertibleNet.from_pretrained(tmp_path)
    assert {key: value for key, value in loaded.config.items() if not key.startswith("_")} == {
        "channels": 2,
        "gamma_dim": 3,
        "hidden": 4,
        "blocks": 3,
        "num_steps": 1,
        "haar": False,
        "offset": 0.25,
        "mix": True,
        "gain": True,
        "spread": True,
    }


def test_unsaved_state_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_survives_saving(make_encoder(UnsavedState), encoder_outputs, tmp_path)


def test_an_unsaved_setting_is_found(tmp_path: Path) -> None:
    net = randomise_(UnsavedSetting(gamma_dim=GAMMA_DIM, hidden=6, blocks=1, num_steps=2), 1, 0.5)
    net.sign = -1.0
    with pytest.raises(AssertionError):
        check_survives_saving(net, inn_outputs, tmp_path)


# ------------------------------------------------------------------------------------------------------ compilation


@pytest.fixture
def no_shape_checks() -> Iterator[None]:
    """Switch the run-time shape checks off, as they are for users: the compiler cannot trace the checker."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    jaxtyping.config.update("jaxtyping_disable", before)


@torch.no_grad()
def check_compiled_is_eager(net: Any, *inputs: Any, backend: str = "inductor") -> None:
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=backend)
    for after, before in zip(_flatten(compiled(*inputs)), _flatten(net(*inputs)), strict=True):
        assert_close(after, before)


def _flatten(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in _flatten(part)]


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that compiles a network."""
    test = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")(test)  # the compiler's own
    return pytest.mark.slow(pytest.mark.usefixtures("no_shape_checks")(test))


def tiny_inn() -> InvertibleNet:
    """One step only: the time goes into compiling, and every step compiles to the same code."""
    return randomise_(InvertibleNet(gamma_dim=GAMMA_DIM, hidden=4, blocks=1, num_steps=1), 1, 0.5).eval()


@compiles
@pytest.mark.parametrize("levels", [0, 2])
def test_compiled_inn_computes_the_same(levels: int) -> None:
    check_compiled_is_eager(tiny_inn(), draw(1, 3, 8, 8), draw_gamma(), levels)


@compiles
@pytest.mark.parametrize("levels", [0, 1])
def test_compiled_inverse_computes_the_same(levels: int) -> None:
    net = tiny_inn()
    x_c, x_d = draw_parts(3, levels, torch.float32)
    check_compiled_is_eager(net.inverse, x_c, x_d, draw_gamma(2), levels)


@compiles
@pytest.mark.parametrize("levels", [0, 2])
def test_compiled_estimator_computes_the_same(levels: int) -> None:
    # PyTorch 2.13's inductor fails on a CPU ("vr must not be None") when a pixel-shuffle meets replicated borders, so
    # what is checked is the traced graph.
    check_compiled_is_eager(make_estimator(), draw(1, 3, 8, 8), draw_gamma(), levels, backend="aot_eager")


@compiles
def test_compiled_encoder_computes_the_same() -> None:
    check_compiled_is_eager(make_encoder(), draw(1, 3, 8, 8))


@compiles
def test_a_network_that_differs_when_compiled_is_found() -> None:
    with pytest.raises(AssertionError):
        check_compiled_is_eager(
            make_estimator(OtherWhenCompiled), draw(1, 3, 8, 8), draw_gamma(), 2, backend="aot_eager"
        )


# --------------------------------------------------------------------------------------------------- self-ensemble

Ensemble = Callable[[Estimator, Tensor, Tensor, int], Tensor]


@torch.no_grad()
def check_ensemble(ensemble: Ensemble, levels: int) -> None:
    """The mean over all views of a flipped or transposed image is the flipped or transposed mean."""
    net, y, gamma = make_estimator(), draw(2, 3, 8, 12), draw_gamma(2)
    straight = ensemble(net, y, gamma, levels)
    assert float((straight - net(y, gamma, levels)).abs().max()) > 1e-3
    for turn in (lambda u: u.flip(-1), lambda u: u.flip(-2), lambda u: u.transpose(-2, -1)):
        turned = ensemble(net, turn(y).contiguous(), gamma, levels)
        assert_close(turned, turn(straight), torch.float32)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_a_self_ensemble_knows_no_direction(levels: int) -> None:
    check_ensemble(Estimator.self_ensemble, levels)


def test_a_missing_view_is_found() -> None:
    def fewer(net: Estimator, y: Tensor, gamma: Tensor, levels: int) -> Tensor:
        return net.self_ensemble(y, gamma, levels, views=7)

    with pytest.raises(AssertionError):
        check_ensemble(fewer, 2)


def test_one_view_is_the_network_and_views_are_counted() -> None:
    net, y, gamma = make_estimator(), draw(1, 3, 7, 9), draw_gamma()
    assert torch.equal(net.self_ensemble(y, gamma, 1, views=1), net(y, gamma, 1))
    for views in (0, 9):
        with pytest.raises(ValueError, match=f"1 to 8 views expected, got {views}"):
            net.self_ensemble(y, gamma, 1, views=views)


# ------------------------------------------------------------------------------------------------- traces of damage

Combs = Callable[[Tensor], Tensor]


def told_quality(combs: Combs, y: Tensor) -> Tensor:
    """The quality whose comb fits best; of qualities whose steps divide one another, all fit: the coarsest counts."""
    fits = combs(y)[:, : len(COMB_QUALITIES)]
    good = fits > 0.8 * fits.max(1, keepdim=True).values
    return torch.tensor(COMB_QUALITIES)[good.float().argmax(1)]


def check_combs(combs: Combs) -> None:
    """The combs name the quality of a JPEG file, whatever the picture."""
    cells = torch.nn.functional.interpolate(draw(4, 3, 24, 20), scale_factor=4, mode="bicubic").clamp(0, 1)
    noisy = (cells + 0.05 * torch.randn(cells.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for quality in (10, 30, 50, 70, 90):
        assert told_quality(combs, jpeg(noisy, quality)).tolist() == [quality] * 4


def jpeg_combs_of(y: Tensor) -> Tensor:
    return traces(y)[:, 16 : 16 + 2 * len(COMB_QUALITIES)]


def test_combs_tell_the_quality() -> None:
    check_combs(jpeg_combs_of)


def test_combs_off_the_grid_are_found() -> None:
    with pytest.raises(AssertionError):
        check_combs(lambda y: jpeg_combs_of(y.roll((3, 2), (-2, -1))))


def test_traces_are_finite_and_counted() -> None:
    for y in (torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 9, 70), draw(2, 3, 31, 8)):
        found = traces(y)
        assert found.shape == (2, TRACES)
        assert bool(found.isfinite().all())
    with pytest.raises(ValueError, match="at least 8 pixels"):
        traces(torch.zeros(1, 3, 7, 20))


@pytest.mark.parametrize("size", [(203, 177), (64, 16), (16, 400), (97, 33)])
@torch.no_grad()
def test_the_embedding_does_not_depend_on_the_strips(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = randomise_(DegradationEncoder(gamma_dim=8, width=4), 3, 0.5).double()
    y = torch.rand(2, 3, *size, dtype=torch.float64)
    whole = encoder(y)
    for module in (inn_module, traces_module):
        monkeypatch.setattr(module, "_STRIP_PIXELS", size[1] * 16)
    assert len(inn_module._strips(*size)) == size[0] // 16
    torch.testing.assert_close(encoder(y), whole, rtol=0, atol=1e-9)
    # Strips that cannot see their neighbours would not do.
    monkeypatch.setattr(inn_module, "_STRIP_HALO", 0)
    if size[0] >= 32:
        assert (encoder(y) - whole).abs().max() > 1e-6
