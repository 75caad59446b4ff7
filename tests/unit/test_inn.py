"""Plain behaviour of the saved networks: sizes, defaults, ranges, refusals, precision."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from latentindigo import inn
from latentindigo.inn import DegradationEncoder, DegradationEstimate, Estimator, InvertibleNet, _amplified, _cell_basis
from tolerances import assert_close, in_dtype, randomise_

GAMMA_DIM = 6


def small_inn() -> InvertibleNet:
    return randomise_(InvertibleNet(gamma_dim=GAMMA_DIM, hidden=6, blocks=1, num_steps=2), 1, 0.5)


def small_encoder() -> DegradationEncoder:
    return randomise_(DegradationEncoder(gamma_dim=GAMMA_DIM, width=4), 2)


def small_estimator() -> Estimator:
    return randomise_(Estimator(width=8, blocks=1, gamma_dim=GAMMA_DIM), 3)


def count_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


# --------------------------------------------------------------------------------------------------------- defaults


def test_default_sizes_are_small() -> None:
    assert 200_000 < count_parameters(InvertibleNet()) < 500_000
    assert count_parameters(DegradationEncoder()) < 500_000
    assert count_parameters(Estimator()) < 2_000_000


def test_saved_classes_keep_their_address() -> None:
    """Checkpoints and pipelines record module and class; diffusers finds the loader by the name ModelMixin in here."""
    for kind in (InvertibleNet, DegradationEncoder, Estimator):
        assert kind.__module__ == "latentindigo.inn"
        assert kind().config["gamma_dim"] == 64
    assert hasattr(inn, "ModelMixin")


def test_untrained_inn_is_haar() -> None:
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        x_c, _ = InvertibleNet()(x, torch.randn(1, 64), levels=2)
    assert_close(x_c, nn.functional.avg_pool2d(x, 4))


def test_settled_twin_computes_the_same() -> None:
    net = randomise_(InvertibleNet(channels=4, gamma_dim=GAMMA_DIM, hidden=8, blocks=1, num_steps=2, mix=True), 1, 0.2)
    assert net.settled() is net, "weights that are trained must stay the trained ones"
    net.requires_grad_(False)
    assert net.settled() is net, "nothing to gain in float32"
    twin = net.compute_in(torch.bfloat16).settled()
    assert twin is not net and twin.band_mix is net.band_mix
    assert {p.dtype for p in twin.steps.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in net.steps.parameters()} == {torch.float32}
    gamma, found = torch.randn(1, GAMMA_DIM), []
    for one in (net, twin):
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        x_c, x_d, updates = one.split(x, gamma)
        back = one.inverse(0.9 * x_c, x_d, gamma, 2, updates)
        found.append((x_c, back, torch.autograd.grad(back.square().sum(), x)[0]))
    (coarse, back, gradient), (twins_coarse, twins_back, twins_gradient) = found
    assert torch.equal(coarse, twins_coarse) and torch.equal(back, twins_back)
    # Backward, autocast lets PyTorch choose other kernels; each is right to what bfloat16 holds.
    assert (gradient - twins_gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize(("levels", "size"), [(0, (6, 5)), (1, (12, 10)), (2, (24, 20))])
def test_untrained_estimate_is_pillows_bicubic(levels: int, size: tuple[int, int]) -> None:
    y = torch.rand(1, 3, 6, 5)
    with torch.no_grad():
        x_hat = Estimator()(y, torch.randn(1, 64), levels=levels)
    assert x_hat.shape == (1, 3, *size)
    for channel in range(3):
        image = Image.fromarray(y[0, channel].numpy()).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        assert_close(x_hat[0, channel], torch.from_numpy(np.array(image)))


# ------------------------------------------------------------------------------------------------------- InvertibleNet


def test_shapes_of_parts() -> None:
    net, x, gamma = small_inn(), torch.rand(2, 3, 16, 8), torch.randn(2, GAMMA_DIM)
    expected = {
        0: ((2, 3, 16, 8), [(2, 9, 16, 8)]),
        1: ((2, 3, 8, 4), [(2, 9, 8, 4)]),
        2: ((2, 3, 4, 2), [(2, 9, 8, 4), (2, 9, 4, 2)]),
        3: ((2, 3, 2, 1), [(2, 9, 8, 4), (2, 9, 4, 2), (2, 9, 2, 1)]),
    }
    for levels, (coarse, details) in expected.items():
        x_c, x_d = net(x, gamma, levels)
        assert x_c.shape == coarse
        assert isinstance(x_d, tuple)
        assert [tuple(part.shape) for part in x_d] == details


def test_levels_share_their_weights() -> None:
    """One network serves every scale: the second level of two is the first level of one."""
    net, x, gamma = small_inn(), torch.rand(1, 3, 16, 16), torch.randn(1, GAMMA_DIM)
    with torch.no_grad():
        x_c2, x_d2 = net(x, gamma, 2)
        x_c1, x_d1 = net(x, gamma, 1)
        x_c11, x_d11 = net(x_c1, gamma, 1)
    assert_close(x_c2, x_c11)
    assert_close(x_d2[0], x_d1[0])
    assert_close(x_d2[1], x_d11[0])


def test_one_gamma_serves_a_batch() -> None:
    net, x, gamma = small_inn(), torch.rand(3, 3, 8, 8), torch.randn(1, GAMMA_DIM)
    with torch.no_grad():
        assert_close(net(x, gamma)[0], net(x, gamma.expand(3, -1))[0])


def test_a_measurement_replaces_the_coarse_part() -> None:
    """What the method needs: g^-1(y, x_d) is an image whose coarse part is y."""
    net, gamma = small_inn(), torch.randn(1, GAMMA_DIM)
    y = torch.rand(1, 3, 4, 4)
    with torch.no_grad():
        _, x_d = net(torch.rand(1, 3, 16, 16), gamma, 2)
        assert_close(net(net.inverse(y, x_d, gamma, 2), gamma, 2)[0], y)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_what_split_knows_inverse_need_not_compute(levels: int) -> None:
    """The inverse with `split`'s updates is the same, and it does use them."""
    net, gamma = small_inn(), torch.randn(1, GAMMA_DIM)
    x, y = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16 >> levels, 16 >> levels)
    with torch.no_grad():
        x_c, x_d, updates = net.split(x, gamma, levels)
        plain_c, plain_d = net(x, gamma, levels)
        assert torch.equal(x_c, plain_c)
        assert all(torch.equal(a, b) for a, b in zip(x_d, plain_d, strict=True))
        known = net.inverse(y, x_d, gamma, levels, updates)
        assert torch.equal(known, net.inverse(y, x_d, gamma, levels))
        others = [update + 1 for update in updates]
        assert not torch.equal(known, net.inverse(y, x_d, gamma, levels, others))


def test_inn_refusals() -> None:
    net, gamma = small_inn(), torch.randn(1, GAMMA_DIM)
    with pytest.raises(ValueError, match="3 channels expected, got 4"):
        net(torch.rand(1, 4, 8, 8), gamma)
    with pytest.raises(ValueError, match=r"gamma of shape \(1, 6\).*got \(1, 7\)"):
        net(torch.rand(1, 3, 8, 8), torch.randn(1, GAMMA_DIM + 1))
    x_c, x_d = net(torch.rand(1, 3, 8, 8), gamma, 2)
    with pytest.raises(ValueError, match="1 detail tensors expected for levels=1, got 2"):
        net.inverse(x_c, x_d, gamma, 1)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        InvertibleNet(num_steps=0)


# --------------------------------------------------------------------------------------------------- DegradationEncoder


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 3), (33, 17)])
def test_encoder_takes_any_size(size: tuple[int, int]) -> None:
    gamma = small_encoder()(torch.rand(2, 3, *size))
    assert gamma.shape == (2, GAMMA_DIM)
    assert gamma.isfinite().all()


def test_encoder_survives_a_flat_image() -> None:
    """The standard deviation of a constant has no gradient of its own; the embedding still must."""
    net, y = small_encoder(), torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    net(y).square().sum().backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())


def test_encoder_sees_the_noise_level() -> None:
    net, clean = small_encoder(), torch.full((1, 3, 32, 32), 0.5)
    noise = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        weak, strong = net(clean + 0.01 * noise), net(clean + 0.1 * noise)
    assert (weak - strong).abs().max() > 1e-3


def test_estimates_are_never_negative() -> None:
    estimate = small_encoder().estimate(10 * torch.randn(50, GAMMA_DIM))
    assert isinstance(estimate, DegradationEstimate)
    for field in dataclasses.fields(estimate):
        value: Tensor = getattr(estimate, field.name)
        assert value.shape == (50,)
        assert (value >= 0).all()


def test_estimates_train() -> None:
    """A few steps of regression move all three strengths to their targets, in their own units."""
    net, gamma = small_encoder(), torch.randn(1, GAMMA_DIM)
    optimizer = torch.optim.Adam(net.head.parameters(), lr=0.1)
    target = torch.tensor([1.6, 15 / 255, 0.5])
    values = target
    for _ in range(200):
        estimate = net.estimate(gamma)
        values = torch.cat((estimate.blur, estimate.noise, estimate.jpeg))
        optimizer.zero_grad()
        ((values - target) / target).square().sum().backward()
        optimizer.step()
    # An optimiser after 200 steps, not an identity: the table's bfloat16 row.
    assert_close(values.detach(), target, torch.bfloat16)


def test_encoder_refusals() -> None:
    with pytest.raises(ValueError, match=r"3 channels \(RGB\) expected, got 1"):
        small_encoder()(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="gamma of shape"):
        small_encoder().estimate(torch.randn(1, GAMMA_DIM + 1))
    with pytest.raises(ValueError, match="at least 1"):
        DegradationEncoder(width=0)


# ------------------------------------------------------------------------------------------------------------ Estimator


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 12)])
def test_estimator_takes_any_size(levels: int, size: tuple[int, int]) -> None:
    height, width = size
    x_hat = small_estimator()(torch.rand(2, 3, height, width), torch.randn(2, GAMMA_DIM), levels)
    assert x_hat.shape == (2, 3, height * 2**levels, width * 2**levels)
    assert x_hat.isfinite().all()


def test_estimate_is_not_clamped() -> None:
    """Clamping would stop gradients and hide an overshoot; the pipeline clamps once, at the end."""
    x_hat = small_estimator()(torch.ones(1, 3, 8, 8), torch.randn(1, GAMMA_DIM), 2)
    assert x_hat.max() > 1 or x_hat.min() < 0


def test_scales_share_the_body() -> None:
    net = small_estimator()
    net(torch.rand(1, 3, 8, 8), torch.randn(1, GAMMA_DIM), 0).sum().backward()
    used = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in net.named_parameters()} - used == {
        "inputs.1.weight",
        "inputs.1.bias",
        "inputs.2.weight",
        "inputs.2.bias",
    }


def test_estimator_refusals() -> None:
    net, y, gamma = small_estimator(), torch.rand(1, 3, 8, 8), torch.randn(1, GAMMA_DIM)
    with pytest.raises(ValueError, match="levels 0, 1 or 2 expected, got 3.*several passes"):
        net(y, gamma, 3)
    with pytest.raises(ValueError, match=r"3 channels \(RGB\) expected, got 1"):
        net(y[:, :1], gamma)
    with pytest.raises(ValueError, match="gamma of shape"):
        net(y, gamma[:, :-1])
    with pytest.raises(ValueError, match="must be at least 1, got 96, 0 and 64"):
        Estimator(blocks=0)


@pytest.mark.parametrize("block", [2, 4])
def test_cells_are_an_orthonormal_cosine_transform(block: int) -> None:
    basis = _cell_basis(block)[:, :, 0, 0]
    assert_close(basis @ basis.T, torch.eye(3 * block**2))
    # A flat cell has its means only, and a cell that rises from left to right no vertical frequency.
    cell = torch.linspace(0, 1, block)[None].expand(block, block)
    coefficients = (basis @ cell.repeat(3, 1, 1).flatten()).reshape(3, block, block)
    assert_close(coefficients[:, 1:], torch.zeros(3, block - 1, block))
    assert_close(coefficients[:, 0, 0], torch.full((3,), 0.5 * block))
    assert float(coefficients[0, 0, 1].abs()) > 0.3
    assert_close(_amplified(basis[:, :, None, None])[0, :, 0, 0], basis[0] / block)


def test_the_spread_must_have_been_asked_for() -> None:
    z, gamma = torch.randn(1, 4, 8, 8), torch.randn(1, GAMMA_DIM)
    made = InvertibleNet(channels=4, gamma_dim=GAMMA_DIM, hidden=4, blocks=1, num_steps=1, spread=True)
    told = randomise_(made, 0).spread(100 * z, gamma).detach()
    assert told.shape == z.shape
    assert float(torch.tensor(-5.0).exp()) <= float(told.min()) < float(told.max()) <= float(torch.tensor(1.001).exp())
    without = InvertibleNet(channels=4, gamma_dim=GAMMA_DIM, hidden=4, blocks=1, num_steps=1)
    assert made.has_spread
    assert not without.has_spread
    with pytest.raises(ValueError, match="made without a spread; use one whose config says spread = true"):
        without.spread(z, gamma)


# ------------------------------------------------------------------------------------------------------------ precision


def run_all(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Run the three networks with weights of a dtype on a float32 image, the encoder's embedding feeding the others."""
    gamma = in_dtype(small_encoder(), dtype)(x)
    net = in_dtype(small_inn(), dtype)
    x_c, x_d = net(x, gamma, 2)
    return [x_c, *x_d, net.inverse(x_c, x_d, gamma, 2), in_dtype(small_estimator(), dtype)(x, gamma, 1)]


def test_half_precision_weights_keep_the_image_in_float32() -> None:
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        outputs = run_all(x, torch.bfloat16)
    assert all(output.dtype == torch.float32 and output.isfinite().all() for output in outputs)
    assert_close(outputs[3], x, torch.bfloat16)


def test_autocast_keeps_the_image_in_float32_and_trains() -> None:
    x = torch.rand(1, 3, 16, 16)
    nets = (small_encoder(), small_inn(), small_estimator())
    encoder, net, estimator = nets
    with torch.autocast("cpu", torch.bfloat16):
        gamma = encoder(x)
        x_c, x_d = net(x, gamma, 2)
        x_inv = net.inverse(x_c + 0.01, x_d, gamma, 2)
        x_hat = estimator(x_c, gamma, 2)
        estimate = encoder.estimate(gamma)
    assert x_c.dtype == x_inv.dtype == x_hat.dtype == torch.float32
    loss = x_c.square().mean() + x_inv.square().mean() + x_hat.square().mean() + estimate.noise.float().sum()
    loss.backward()
    for module in nets:
        for name, parameter in module.named_parameters():
            if not name.startswith("inputs."):  # only one of the estimator's input layers is used per scale
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
