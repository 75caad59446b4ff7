"""The latent prior's plain behaviour: real diffusers networks, counters, refusals, time steps, dtypes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor, nn

from latentindigo.prior import Calls, LatentPrior, Prediction
from tolerances import TOL, randomise_
from toys import ConvDenoiser, LinearVAE, gaussian_prior, randn


def ddim(**more: Any) -> DDIMScheduler:
    return DDIMScheduler(**{"clip_sample": False, **more})


def kl_autoencoder() -> AutoencoderKL:
    # As a dictionary because diffusers annotates these tuples with a length of one.
    config: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "layers_per_block": 1,
        "scaling_factor": 0.7,
        "shift_factor": 0.2,
    }
    return AutoencoderKL(**config).eval()


def unet(channels: int = 4) -> nn.Module:
    model = UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    return randomise_(model).eval()


@pytest.fixture
def prior() -> LatentPrior:
    return LatentPrior(kl_autoencoder(), unet(), ddim())


# --- real networks ---------------------------------------------------------------------------------------------------


def test_capabilities_are_read_from_diffusers_configurations(prior: LatentPrior) -> None:
    assert (prior.downsampling, prior.latent_channels, prior.size_multiple) == (2, 4, 4)
    assert prior.prediction_type == "epsilon"
    assert prior.dtype == torch.float32
    assert prior.device == torch.device("cpu")


def test_size_multiple_is_what_the_networks_need(prior: LatentPrior) -> None:
    trajectory = prior.trajectory(2, 0.5)
    fits = prior.encode(torch.rand(1, 3, 4, 12))
    trajectory.predict(fits, 0)
    does_not = prior.encode(torch.rand(1, 3, 4, 10))
    with pytest.raises(ValueError, match=r"multiples of 2, got 2x5; pad the image to multiples of 4 pixels"):
        trajectory.predict(does_not, 0)
    with pytest.raises(ValueError, match=r"multiples of 2, got 5x4"):
        prior.encode(torch.rand(1, 3, 5, 4))


def test_encode_takes_the_mode_and_applies_scale_and_shift(prior: LatentPrior) -> None:
    x = torch.rand(1, 3, 8, 8)
    mode = prior.vae.encode(2 * x - 1).latent_dist.mode()
    torch.testing.assert_close(prior.encode(x), (mode - 0.2) * 0.7)
    z = randn(1, 4, 4, 4)
    torch.testing.assert_close(prior.decode(z), (prior.vae.decode(z / 0.7 + 0.2).sample + 1) / 2)


def test_an_autoencoder_with_plain_latents_and_channelwise_statistics() -> None:
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).eval()
    prior = LatentPrior(tiny, unet(), ddim())
    assert prior.latent_channels == 4
    assert prior.downsampling == 8 // prior.encode(torch.rand(1, 3, 8, 8)).shape[-1]

    vae = LinearVAE(1, identity=True, scaling_factor=2.0, shift_factor=0.0)
    vae.config.latents_mean, vae.config.latents_std = [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]
    channelwise = gaussian_prior(ddim(), vae=vae)
    x = torch.rand(1, 3, 2, 2)
    z = channelwise.encode(x)
    torch.testing.assert_close(z[:, 2], ((2 * x - 1)[:, 2] - 0.3) * 2.0 / 4.0)
    torch.testing.assert_close(channelwise.decode(z), x)


def test_capabilities_are_tried_out_where_no_configuration_tells_them() -> None:
    vae = LinearVAE(4)
    vae.config = SimpleNamespace(scaling_factor=1.0)
    prior = LatentPrior(vae, ConvDenoiser(48), ddim())
    assert (prior.downsampling, prior.latent_channels) == (4, 48)


def test_an_autoencoder_that_speaks_another_language_is_refused() -> None:
    vae = LinearVAE()
    vae.encode = lambda x: SimpleNamespace(codes=x)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"expected encode\(\) to return"):
        gaussian_prior(ddim(), vae=vae).encode(torch.rand(1, 3, 4, 4))


def test_channels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a denoiser with in_channels=4"):
        LatentPrior(kl_autoencoder(), unet(8), ddim())


def test_networks_keep_their_dtype_and_the_state_is_float32() -> None:
    exact = LatentPrior(kl_autoencoder(), unet(), ddim())
    half = LatentPrior(copy.deepcopy(exact.vae).bfloat16(), copy.deepcopy(exact.denoiser).bfloat16(), ddim())
    assert half.dtype == torch.bfloat16
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        z = half.encode(x)
        trajectory = half.trajectory(3, 0.5)
        prediction = trajectory.predict(z, 0)
        following = trajectory.step(prediction, prediction.z0, z, 0)
        decoded = half.decode(z)
        for tensor in (z, prediction.z0, prediction.model_output, following, decoded):
            assert tensor.dtype == torch.float32
        tolerance = TOL[torch.bfloat16]
        want = exact.trajectory(3, 0.5).predict(z, 0).z0
        torch.testing.assert_close(prediction.z0, want, atol=tolerance.atol, rtol=tolerance.rtol)
    assert half.denoiser.dtype == half.vae.dtype == torch.bfloat16


# --- counters --------------------------------------------------------------------------------------------------------


def test_every_network_call_is_counted(prior: LatentPrior) -> None:
    calls = Calls()
    view = prior.counting(calls)
    trajectory = view.trajectory(3, 0.5)
    z = view.encode(torch.rand(1, 3, 8, 8)).detach()
    with torch.no_grad():
        for i in range(3):
            prediction = trajectory.predict(z, i)
            z = trajectory.step(prediction, prediction.z0, z, i)
        view.decode(z)
    assert asdict(calls) == {
        "denoiser": 3,
        "denoiser_backward": 0,
        "decoder": 1,
        "decoder_backward": 0,
        "encoder": 1,
        "inn": 0,
    }
    leaf = z.clone().requires_grad_()
    loss = view.decode(trajectory.predict(leaf, 0).z0).square().sum()
    torch.autograd.grad(loss, leaf)
    assert (calls.denoiser, calls.denoiser_backward, calls.decoder, calls.decoder_backward) == (4, 1, 2, 1)
    assert prior.calls == Calls(), "a view must not count into its origin"


def test_backward_is_counted_only_where_it_ran(prior: LatentPrior) -> None:
    for parameter in [*prior.denoiser.parameters(), *prior.vae.parameters()]:
        parameter.requires_grad_(False)
    z = randn(1, 4, 4, 4)
    output = prior.trajectory(2, 0.5).predict(z, 0)
    assert not output.z0.requires_grad
    leaf = z.clone().requires_grad_()
    prior.trajectory(2, 0.5).predict(leaf, 0)  # A graph that nobody walks back.
    assert (prior.calls.denoiser, prior.calls.denoiser_backward) == (2, 0)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        HeunDiscreteScheduler,
        KDPM2DiscreteScheduler,
        PNDMScheduler,
        DPMSolverSinglestepScheduler,
        EDMEulerScheduler,
    ],
)
def test_schedulers_that_cannot_be_driven_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"(one denoiser evaluation per step|coordinates are known).*use one of DDIM"):
        LatentPrior(LinearVAE(), ConvDenoiser(12), make())


def test_flow_schedules_that_cannot_be_driven_are_refused() -> None:
    with pytest.raises(ValueError, match="invert_sigmas"):
        LatentPrior(LinearVAE(), ConvDenoiser(12), FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    shifting = UniPCMultistepScheduler(use_flow_sigmas=True, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="expected a fixed time shift, got UniPC"):
        LatentPrior(LinearVAE(), ConvDenoiser(12), shifting)


def test_a_time_shift_that_depends_on_the_size_needs_the_size() -> None:
    prior = LatentPrior(LinearVAE(), ConvDenoiser(12), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match="expected the size of the latent"):
        prior.trajectory(4, 0.5)
    starts = [float(prior.trajectory(4, latent_size=(side, side)).timesteps[1]) for side in (16, 64)]
    assert starts[0] < starts[1]  # Larger pictures stay at high noise for longer.


def test_prediction_types_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="expected ε, sample or flow prediction with a flow schedule"):
        LatentPrior(LinearVAE(), ConvDenoiser(12), FlowMatchEulerDiscreteScheduler(), prediction_type="v_prediction")
    with pytest.raises(ValueError, match="expected a prediction_type among"):
        LatentPrior(LinearVAE(), ConvDenoiser(12), ddim(prediction_type="noise"))


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("make", [ddim, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_zero_terminal_snr_is_refused_for_epsilon_and_fine_for_v(make: Any) -> None:
    prior = gaussian_prior(make(**ZERO_SNR))
    with pytest.raises(ValueError, match="α > 0 at the first time step of an ε-predicting network.*v-predicting"):
        prior.trajectory(8, 1.0)
    assert prior.trajectory(8, 0.9).start_strength == pytest.approx(0.9, abs=2e-3)

    trajectory = gaussian_prior(make(**ZERO_SNR), "v_prediction").trajectory(8, 1.0)
    assert trajectory.alpha_sigma(0)[0] < 1e-3
    assert trajectory.pure_noise
    z_t = randn(1, 12, 4, 4)
    for i in range(8):
        prediction = trajectory.predict(z_t, i)
        z_t = trajectory.step(prediction, prediction.z0.clone(), z_t, i)
        assert torch.isfinite(z_t).all()


@pytest.mark.parametrize("flag", ["clip_sample", "thresholding"])
def test_clipping_is_switched_off_with_a_warning(flag: str) -> None:
    scheduler = ddim(**{flag: True})
    with pytest.warns(UserWarning, match=f"{flag} on.*would clip latents"):
        clipped = gaussian_prior(scheduler)
    assert scheduler.config[flag] is True, "the caller's scheduler must stay as it is"
    plain = gaussian_prior(ddim())
    z_t = 5.0 * randn(1, 12, 4, 4)
    results: list[Tensor] = []
    for prior in (clipped, plain):
        trajectory = prior.trajectory(2, 0.5)
        prediction = trajectory.predict(z_t, 0)
        results.append(trajectory.step(prediction, prediction.z0, z_t, 0))
    assert torch.equal(results[0], results[1])


def test_eta_belongs_to_ddim() -> None:
    with pytest.raises(ValueError, match="UniPCMultistepScheduler does not know eta"):
        gaussian_prior(UniPCMultistepScheduler()).trajectory(4, eta=0.5)
    with pytest.raises(ValueError, match=r"expected eta in \[0, 1\]"):
        gaussian_prior(ddim()).trajectory(4, eta=1.5)


def test_stochastic_steps_need_one_generator_per_image() -> None:
    prior = gaussian_prior(ddim())
    z_t = randn(2, 12, 4, 4)
    trajectory = prior.trajectory(3, 0.5, eta=1.0)
    prediction = trajectory.predict(z_t, 0)
    with pytest.raises(ValueError, match=r"one torch.Generator per image, got none"):
        trajectory.step(prediction, prediction.z0, z_t, 0)
    with pytest.raises(ValueError, match="one generator for each of 2 images, got 1"):
        trajectory.step(prediction, prediction.z0, z_t, 0, [torch.Generator()])
    state = torch.random.get_rng_state()
    trajectory = prior.trajectory(3, 0.5, eta=1.0)
    trajectory.step(prediction, prediction.z0, z_t, 0, [torch.Generator(), torch.Generator()])
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state was used"


def test_steps_out_of_order_are_refused() -> None:
    trajectory = gaussian_prior(ddim()).trajectory(4, 0.5)
    z_t = randn(1, 12, 4, 4)
    prediction = trajectory.predict(z_t, 1)
    with pytest.raises(ValueError, match="expected step 0"):
        trajectory.step(prediction, prediction.z0, z_t, 1)
    for i in (0, 1):
        trajectory.step(prediction, prediction.z0, z_t, i)
    with pytest.raises(ValueError, match="expected step 2"):
        trajectory.step(prediction, prediction.z0, z_t, 0)
    with pytest.raises(ValueError, match=r"expected an evaluation in 0\.\.3, got 4"):
        trajectory.predict(z_t, 4)
    with pytest.raises(ValueError, match=r"expected a level in 0\.\.4, got 5"):
        trajectory.alpha_sigma(5)


# --- steps and strength ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "strength"), [(0, 0.5), (4, 0.0), (4, 1.01), (4, -0.5)])
def test_nonsense_is_refused(steps: int, strength: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        gaussian_prior(ddim()).trajectory(steps, strength)


def test_a_strength_below_the_smallest_noise_is_refused_with_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"at least 0\.010 for 1 steps"):
        gaussian_prior(ddim()).trajectory(1, 0.005)
    with pytest.raises(ValueError, match=r"at least 0\.\d+ for 60 steps.*fewer steps or a larger strength"):
        gaussian_prior(ddim()).trajectory(60, 0.1)
    with pytest.raises(ValueError, match="with 50 trained levels"):
        gaussian_prior(LCMScheduler()).trajectory(8, 0.2)
    with pytest.raises(ValueError, match="the smallest trained noise level"):
        gaussian_prior(FlowMatchEulerDiscreteScheduler()).trajectory(4, 1e-4)
    with pytest.raises(ValueError, match="the nearest is"):
        gaussian_prior(EulerDiscreteScheduler(use_karras_sigmas=True)).trajectory(1, 0.5)


def test_the_smallest_strength_on_offer_works() -> None:
    trajectory = gaussian_prior(ddim()).trajectory(1, 0.011)
    assert trajectory.timesteps.tolist() == [0]
    z_t = randn(1, 12, 4, 4)
    prediction = trajectory.predict(z_t, 0)
    torch.testing.assert_close(trajectory.step(prediction, prediction.z0, z_t, 0), prediction.z0)


def test_time_steps_fall_evenly_and_end_above_zero() -> None:
    trajectory = gaussian_prior(ddim()).trajectory(3, 0.639)
    assert trajectory.timesteps.tolist() == [224, 149, 74]
    assert len(trajectory) == 3
    assert trajectory.alpha_sigma(3) == (1.0, 0.0)


def test_full_strength_is_the_schedulers_own_grid() -> None:
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    trajectory = gaussian_prior(scheduler).trajectory(6)
    scheduler.set_timesteps(6)
    assert trajectory.timesteps.tolist() == scheduler.timesteps.tolist()
    assert trajectory.pure_noise
    assert not gaussian_prior(scheduler).trajectory(6, 0.6).pure_noise


def test_schedulers_that_stop_above_zero_say_so() -> None:
    alpha, sigma = gaussian_prior(ddim(set_alpha_to_one=False)).trajectory(4, 0.5).alpha_sigma(4)
    assert alpha**2 == pytest.approx(0.9999)
    assert sigma**2 == pytest.approx(1e-4, rel=1e-2)


def test_noise_and_levels_agree() -> None:
    trajectory = gaussian_prior(EulerDiscreteScheduler()).trajectory(4, 0.8)
    z0, noise = randn(1, 12, 4, 4), randn(1, 12, 4, 4, seed=1)
    for i in (0, 2):
        alpha, sigma = trajectory.alpha_sigma(i)
        assert alpha**2 + sigma**2 == pytest.approx(1.0)
        torch.testing.assert_close(trajectory.noise(z0, noise, i), alpha * z0 + sigma * noise)
    flow = gaussian_prior(FlowMatchEulerDiscreteScheduler(shift=3.0)).trajectory(4, 0.8)
    alpha, sigma = flow.alpha_sigma(0)
    assert alpha + sigma == pytest.approx(1.0)
    assert flow.start_strength == pytest.approx(0.8, abs=1e-5)


# --- nothing of the caller's is changed ------------------------------------------------------------------------------


def test_inputs_networks_and_scheduler_stay_as_they_were(prior: LatentPrior) -> None:
    scheduler = DPMSolverMultistepScheduler()
    config, state = dict(scheduler.config), {k: copy.deepcopy(v) for k, v in vars(scheduler).items()}
    used = LatentPrior(prior.vae, prior.denoiser, scheduler, prediction_type="v_prediction")
    weights = {name: value.clone() for name, value in prior.denoiser.state_dict().items()}
    z_t = randn(1, 4, 4, 4)
    kept = z_t.clone()
    trajectory = used.trajectory(4, 0.7)
    with torch.no_grad():
        for i in range(4):
            prediction = trajectory.predict(z_t, i)
            before = (prediction.z0.clone(), prediction.model_output.clone())
            wish = prediction.z0 + 0.1
            trajectory.step(prediction, wish, z_t, i)
            assert torch.equal(prediction.z0, before[0])
            assert torch.equal(prediction.model_output, before[1])
    assert torch.equal(z_t, kept)
    assert dict(scheduler.config) == config
    for name, value in state.items():
        now = vars(scheduler)[name]
        assert torch.equal(now, value) if isinstance(value, Tensor) else now == value
    assert all(torch.equal(value, weights[name]) for name, value in prior.denoiser.state_dict().items())


def test_threads_may_share_a_prior() -> None:
    prior = LatentPrior(LinearVAE(), ConvDenoiser(12), DPMSolverMultistepScheduler())

    def restore(seed: int) -> tuple[Tensor, Calls]:
        calls = Calls()
        trajectory = prior.counting(calls).trajectory(4 + seed % 3, 0.8)
        z_t = randn(1, 12, 4, 4, seed=seed)
        with torch.no_grad():
            for i in range(len(trajectory)):
                prediction = trajectory.predict(z_t, i)
                z_t = trajectory.step(prediction, 0.9 * prediction.z0, z_t, i)
        return z_t, calls

    alone = [restore(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(restore, range(6)))
    for (z_a, calls_a), (z_b, calls_b) in zip(alone, together, strict=True):
        assert torch.equal(z_a, z_b)
        assert calls_a == calls_b


def test_a_step_keeps_no_graph() -> None:
    prior = gaussian_prior(DPMSolverMultistepScheduler())
    trajectory = prior.trajectory(3, 0.7)
    z_t = randn(1, 12, 4, 4).requires_grad_()
    prediction = trajectory.predict(z_t, 0)
    assert prediction.z0.requires_grad
    assert not trajectory.step(prediction, prediction.z0, z_t, 0).requires_grad
    plain = prediction.detach()
    assert isinstance(plain, Prediction)
    assert not plain.z0.requires_grad
    assert not plain.model_output.requires_grad


def test_a_network_without_configuration_or_weights_is_enough() -> None:
    class Nothing(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.zeros_like(z))

    prior = LatentPrior(LinearVAE(), Nothing(), ddim(), prediction_type="sample")
    assert prior.size_multiple == 2
    assert prior.trajectory(2, 0.5).predict(randn(1, 12, 3, 3), 0).z0.abs().max() == 0.0
