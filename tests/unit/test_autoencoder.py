"""The embedded autoencoder: its linear start, its interface, its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from latentindigo.autoencoder import AutoencoderOutput, PatchAutoencoder, fit_patch_basis
from latentindigo.prior import LatentPrior
from tolerances import TOL, assert_close, randomise_
from toys import ConvDenoiser, randn

SMALL: dict[str, Any] = {
    "latent_channels": 6,
    "encoder_channels": (8, 8),
    "decoder_channels": (8, 8, 8),
    "decoder_blocks": (1, 1, 1),
}


def small(*, random: bool = True) -> PatchAutoencoder:
    net = PatchAutoencoder(**SMALL).eval().requires_grad_(False)
    return randomise_(net, 1, 0.5) if random else net


def pictures(batch: int = 2, height: int = 32, width: int = 48) -> Tensor:
    """Smooth random pictures in [-1, 1]."""
    coarse = randn(batch, 3, height // 8, width // 8, seed=2)
    return nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic").tanh()


def patches_of(x: Tensor) -> Tensor:
    return nn.functional.unfold(x, 8, stride=8).transpose(1, 2).reshape(-1, 192)


def fitted(whitening: float = 0.5, channels: int = 6) -> tuple[PatchAutoencoder, Tensor]:
    x = pictures(8)
    net = PatchAutoencoder(**{**SMALL, "latent_channels": channels}).eval().requires_grad_(False)
    net.set_patch_basis(*fit_patch_basis(patches_of(x), channels, whitening))
    return net, x


# --- the basis -------------------------------------------------------------------------------------------------------


def test_basis_is_orthonormal_and_sorted() -> None:
    patches = patches_of(pictures(8))
    basis, mean, gains = fit_patch_basis(patches, 6, 0.5)
    assert_close(basis @ basis.T, torch.eye(6))
    assert_close(mean, patches.mean(0))
    spread = ((patches - mean) @ basis.T).std(0)
    assert (spread[:-1] >= spread[1:]).all()
    # Weaker directions are amplified more.
    assert (gains[:-1] <= gains[1:]).all()


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_latents_have_unit_mean_variance(whitening: float) -> None:
    net, x = fitted(whitening)
    z = net.encode(x)
    assert isinstance(z, AutoencoderOutput)
    variance = z.latents.var((0, 2, 3), correction=0)
    assert float(variance.mean()) == pytest.approx(1.0, abs=1e-3)
    if whitening == 0.0:
        assert_close(variance, torch.ones(6), torch.bfloat16)


def test_whitening_of_one_keeps_pixel_distances() -> None:
    net, x = fitted(1.0)
    difference = x[:4] - x[4:]
    basis, _, _ = fit_patch_basis(patches_of(x), 6, 1.0)
    z = net.encode_base(x)
    in_span = (patches_of(difference) @ basis.T).norm()
    ratio = (z[:4] - z[4:]).norm() / in_span
    again = net.encode_base(0.5 * x)
    assert_close((again[:4] - again[4:]).norm() / (0.5 * in_span), ratio)


def test_an_untrained_autoencoder_is_the_linear_one() -> None:
    net, x = fitted(0.5)
    basis, mean, _ = fit_patch_basis(patches_of(x), 6, 0.5)
    colour = mean.reshape(3, -1).mean(1).repeat_interleave(64)
    patches = patches_of(x)
    expected = (patches - mean) @ basis.T @ basis + colour
    assert_close(patches_of(net(x)), expected)


def test_all_directions_together_lose_nothing_but_the_mean_patch() -> None:
    # 192 of 192 directions span every patch; only the mean patch comes back as its mean colour.
    x = randn(12, 3, 64, 64, seed=9)
    net = PatchAutoencoder(**{**SMALL, "latent_channels": 192}).requires_grad_(False)
    basis, mean, gains = fit_patch_basis(patches_of(x), 192, 0.5)
    net.set_patch_basis(basis, mean, gains)
    lost = mean - mean.reshape(3, -1).mean(1).repeat_interleave(64)
    error = patches_of(net(x)) - (patches_of(x) - lost)
    # 192 products per number, twice.
    assert float(error.abs().max()) <= 10 * TOL[torch.float32].atol


# --- the networks ----------------------------------------------------------------------------------------------------


def test_encode_and_decode_have_diffusers_interface() -> None:
    net, x = small(), pictures()
    encoded, (z,) = net.encode(x), net.encode(x, return_dict=False)
    assert z.shape == (2, 6, 4, 6)
    assert isinstance(encoded, AutoencoderOutput)
    assert torch.equal(encoded.latents, z)
    decoded = net.decode(z)
    (sample,) = net.decode(z, return_dict=False)
    assert sample.shape == x.shape
    assert not isinstance(decoded, tuple)
    assert torch.equal(decoded.sample, sample)
    assert_close(net(x), sample)


def test_it_is_local_and_has_no_statistics_of_the_whole_image() -> None:
    # Far enough from the seam a tile decodes to what the whole picture decodes to: tiles agree.
    net, z = small(), randn(1, 6, 4, 24, seed=3)
    whole, left = net.decode(z, return_dict=False)[0], net.decode(z[..., :12], return_dict=False)[0]
    assert_close(left[..., :32], whole[..., :32])


def test_gradients_pass_both_ways() -> None:
    net = small()
    x = pictures(1).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x)
    assert (gradient != 0).float().mean() > 0.9


@pytest.mark.parametrize("size", [(33, 48), (32, 44)])
def test_sides_that_are_no_multiples_of_8_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 8, got \({size[0]}, {size[1]}\); pad the image first"):
        small().encode(torch.zeros(1, 3, *size))


def test_other_patch_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size must be 8 .*, got 4"):
        PatchAutoencoder(patch_size=4)


def test_more_directions_than_a_patch_has_are_refused() -> None:
    with pytest.raises(ValueError, match="latent_channels must lie in 1..192, got 193"):
        fit_patch_basis(torch.zeros(4, 192), 193, 0.5)


def test_the_residual_starts_at_zero() -> None:
    net = small(random=False)
    x = pictures()
    assert torch.equal(net.encode_residual(x), torch.zeros(2, 6, 4, 6))
    assert torch.equal(net.decode_residual(torch.ones(1, 6, 4, 6)), torch.zeros(1, 3, 32, 48))


def test_save_and_load(tmp_path: Path) -> None:
    net, x = small(), pictures()
    net.save_pretrained(tmp_path)
    loaded = PatchAutoencoder.from_pretrained(tmp_path)
    assert dict(loaded.config)["decoder_blocks"] in ([1, 1, 1], (1, 1, 1))
    assert torch.equal(loaded(x), net(x))


def test_the_prior_reads_its_grid_off_the_configuration() -> None:
    prior = LatentPrior(small(), ConvDenoiser(6), DDIMScheduler(clip_sample=False), prediction_type="v_prediction")
    assert (prior.downsampling, prior.latent_channels, prior.size_multiple) == (8, 6, 8)
    x = (pictures() + 1) / 2
    assert_close(prior.encode(x), prior.vae.encode(2 * x - 1).latents)
