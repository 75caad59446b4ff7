"""Laws of the sampling loop: costs, null guidance, agreement of methods and schedulers, independence of images."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from latentindigo import sampler
from latentindigo.few_steps import make_scheduler
from latentindigo.guidance import (
    AutoencoderConsistency,
    DataTerm,
    GuidanceConfig,
    LatentINN,
    LearnedForward,
    PixelINN,
    Regulariser,
    Renoise,
    Update,
    draw_noise,
    make_regulariser,
)
from latentindigo.inn import InvertibleNet
from latentindigo.metrics import psnr
from latentindigo.prior import Calls, LatentPrior
from latentindigo.sampler import restore_latent
from tolerances import assert_close, in_dtype, randomise_
from toys import ConvDenoiser, LinearVAE, gaussian_prior, randn

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
RULES: tuple[Update, ...] = ("projection", "stopped", "through")
KINDS: dict[str, type[DataTerm]] = {"pixel": PixelINN, "latent": LatentINN}
GAMMA_DIM = 6
SPREAD = 0.4  # Standard deviation of the latents.
# Strong enough on these small pictures that guidance decides where a sample ends.
STRONG = GuidanceConfig(zeta=60.0, beta=0.5, noise_weight=0.0)
Make = Callable[[], Any]


def ddim() -> DDIMScheduler:
    # "trailing", so that a strength of 1 starts at the noisiest level and not some way below it.
    return DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")


def euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**SD)


def dpm() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**SD)


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(**SD)


def flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


SCHEDULERS: list[Make] = [ddim, euler, dpm, unipc, flow]


@dataclass(frozen=True)
class Setting:
    """One restoration, in miniature; every field may be replaced to plant a defect.

    The measurement of image k is the coarse part of the latent `truth(k)`.
    """

    name: str = "latent"
    update: Update = "projection"
    config: GuidanceConfig = STRONG
    make: Make = ddim
    kind: str | None = "v_prediction"
    dtype: torch.dtype = torch.float64
    steps: int = 4
    strength: float = 0.7
    eta: float = 0.0
    levels: int = 1
    images: tuple[int, ...] = (0, 1)
    vae: LinearVAE | None = None
    gaussian: bool = False
    data_class: type[DataTerm] | None = None
    forward_class: type[LearnedForward] = LearnedForward
    regulariser_class: Callable[..., Regulariser] | None = None
    generators: Callable[[Sequence[int]], list[torch.Generator]] = lambda images: [
        torch.Generator().manual_seed(100 + k) for k in images
    ]

    @property
    def autoencoder(self) -> LinearVAE:
        return in_dtype(self.vae or LinearVAE(), self.dtype)

    def prior(self, calls: Calls) -> LatentPrior:
        kind = "flow_prediction" if self.make is flow else self.kind
        vae = self.autoencoder
        scheduler = self.make()
        if self.gaussian:
            # The exact denoiser of what `latents` draws.
            return gaussian_prior(scheduler, kind, vae=vae, mean=0.0, std=SPREAD).counting(calls)
        denoiser = in_dtype(ConvDenoiser(vae.config.latent_channels), self.dtype)
        return LatentPrior(vae, denoiser, scheduler, prediction_type=kind).counting(calls)

    def latents(self, seed: int) -> Tensor:
        channels = self.autoencoder.config.latent_channels
        rows = [SPREAD * randn(channels, 8, 8, seed=seed + k, dtype=self.dtype) for k in self.images]
        return torch.stack(rows)

    def inn(self, channels: int) -> InvertibleNet:
        net = InvertibleNet(channels=channels, gamma_dim=GAMMA_DIM, hidden=6, blocks=1, num_steps=1, offset=0.0)
        return in_dtype(randomise_(net, 1, 0.5).requires_grad_(False), self.dtype)

    def data(self, prior: LatentPrior) -> DataTerm | None:
        if self.name == "unguided":
            return None
        truth = self.latents(10)
        u = prior.decode(truth) if self.name == "pixel" else truth
        gamma = torch.stack([randn(GAMMA_DIM, seed=50 + k, dtype=self.dtype) for k in self.images])
        inn = self.inn(u.shape[1])

        def count(passes: int) -> None:
            prior.calls.inn += passes

        lr = self.config.refine_lr if self.config.refine else None
        target, _ = inn(u, gamma, self.levels)
        model = self.forward_class(inn, gamma, self.levels, lr, count)
        noise = torch.full((len(truth),), 0.02, dtype=self.dtype)
        pixels = truth.shape[-1] * truth.shape[-2] * prior.downsampling**2
        return (self.data_class or KINDS[self.name])(prior, model, target, pixels, self.config, noise)

    def run(self) -> tuple[Tensor, Calls, DataTerm | None]:
        """Run the loop; return the latent, what the loop alone has called, and the data term."""
        calls = Calls()
        prior = self.prior(calls)
        data = self.data(prior)
        make = self.regulariser_class
        regulariser = make(self.config.regulariser_weight, prior) if make else make_regulariser(self.config, prior)
        before = asdict(calls)
        trajectory = prior.trajectory(self.steps, self.strength, eta=self.eta)
        with torch.no_grad():  # As the pipeline does; the rules that need gradients switch them on.
            z = restore_latent(
                trajectory, self.latents(20), data, self.update, regulariser, self.generators(self.images)
            )
        inside = Calls(**{name: value - before[name] for name, value in asdict(calls).items()})
        return z, inside, data

    @property
    def latent(self) -> Tensor:
        return self.run()[0]


# --- costs are counted -----------------------------------------------------------------------------------------------


def expected_calls(setting: Setting) -> Calls:
    """Return the costs of the method's table, for a run of this setting."""
    steps, pixel = setting.steps, setting.name == "pixel"
    guided = 0 if setting.name == "unguided" else steps // min(steps, setting.config.every_k)
    gradient = setting.update != "projection"
    return Calls(
        denoiser=steps,
        denoiser_backward=guided if setting.update == "through" else 0,
        decoder=guided if pixel else 0,
        decoder_backward=guided if pixel and gradient else 0,
        # A projected image goes back to the latent space, and so does the image before it, to cancel E's own error.
        encoder=2 * guided if pixel and not gradient else 0,
        inn=2 * guided,
    )


def check_calls(setting: Setting) -> None:
    """Each network runs exactly as often as the table of costs says; LatentINN never leaves the latent space."""
    calls = setting.run()[1]
    assert calls == expected_calls(setting)
    if setting.name == "latent":
        assert (calls.decoder, calls.decoder_backward, calls.encoder) == (0, 0, 0)


@pytest.mark.parametrize(("steps", "every_k", "guided"), [(10, 3, [2, 5, 8]), (4, 1, [0, 1, 2, 3]), (4, 9, [3])])
def test_the_last_of_every_k_steps_is_guided(steps: int, every_k: int, guided: list[int]) -> None:
    seen: list[int] = []

    class Recording(LatentINN):
        def projection(self, z0: Tensor, gain: Tensor) -> Tensor:
            seen.append(self.prior.calls.denoiser - 1)
            return super().projection(z0, gain)

    config = replace(STRONG, every_k=every_k)
    replace(Setting("latent", "projection", config), steps=steps, data_class=Recording).run()
    assert seen == guided


def test_a_guided_step_stands_for_those_without() -> None:
    """Three steps at once: what three projections in turn leave of a distance, and more than three gradient steps."""
    config = replace(STRONG, beta=0.5, zeta=2.0, every_k=3)
    assert config.beta_at_once == 1 - 0.5**3
    assert config.zeta_at_once == 3**1.5 * 2.0
    assert replace(config, every_k=1, beta=0.3).beta_at_once == 0.3


class LeavesTheLatentSpace(LatentINN):
    """Defect: a round trip through the autoencoder in every guided step."""

    def open(self, z0: Tensor) -> Tensor:
        return self.prior.encode(self.prior.decode(z0))


class GradientAnyway(LatentINN):
    """Defect: a stopped gradient taken through the denoiser's graph, or a projection that takes a gradient as well."""

    def projection(self, z0: Tensor, gain: Tensor) -> Tensor:
        self.descent(z0, gain)
        return super().projection(z0, gain)


@pytest.mark.parametrize("every_k", [1, 3])
@pytest.mark.parametrize("update", RULES)
@pytest.mark.parametrize("name", KINDS)
def test_calls_are_those_of_the_table(name: str, update: Update, every_k: int) -> None:
    check_calls(Setting(name, update, replace(STRONG, every_k=every_k)))


def test_an_unguided_run_calls_the_denoiser_alone() -> None:
    check_calls(Setting("unguided"))


@pytest.mark.parametrize("update", RULES)
def test_default_guidance_of_latent_inn_leaves_the_autoencoder_alone(update: Update) -> None:
    check_calls(Setting("latent", update, GuidanceConfig()))


@pytest.mark.parametrize("defect", [LeavesTheLatentSpace, GradientAnyway])
def test_call_law_finds_hidden_costs(defect: type[DataTerm]) -> None:
    with pytest.raises(AssertionError):
        check_calls(Setting(data_class=defect))


def test_call_law_finds_a_second_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = sampler.Trajectory.predict

    def twice(self: Any, z_t: Tensor, i: int) -> Any:
        predict(self, z_t, i)
        return predict(self, z_t, i)

    monkeypatch.setattr(sampler.Trajectory, "predict", twice)
    with pytest.raises(AssertionError):
        check_calls(Setting())


# --- null guidance ---------------------------------------------------------------------------------------------------


def check_zero_weight_is_unguided(setting: Setting) -> None:
    """With zeta = beta = 0 the guided loop gives what the unguided loop gives.

    Bit for bit where z_0 need not be rewritten as another kind of output ("through" never touches it, and a network
    that predicts z_0 itself writes it back as it is), else to rounding.
    """
    null = replace(setting, config=replace(setting.config, zeta=0.0, beta=0.0))
    guided, unguided = null.latent, replace(null, name="unguided").latent
    if setting.update == "through" or setting.kind == "sample":
        assert torch.equal(guided, unguided)
    else:
        assert_close(guided, unguided)


class Insists(LatentINN):
    """Defect: a step of at least 0.001, whatever the weight."""

    def projection(self, z0: Tensor, gain: Tensor) -> Tensor:
        return super().projection(z0, gain) + 1e-3

    def descent(self, z0: Tensor, gain: Tensor) -> Tensor:
        return super().descent(z0, gain) + 1e-3

    def descent_through(self, z0: Tensor, z_t: Tensor, gain: Tensor, predict: Any = None) -> Tensor:
        return super().descent_through(z0, z_t, gain, predict) + 1e-3


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("update", RULES)
def test_zero_weight_is_unguided(update: Update, make: Make) -> None:
    check_zero_weight_is_unguided(Setting("latent", update, make=make))


@pytest.mark.parametrize("update", RULES)
@pytest.mark.parametrize("name", KINDS)
def test_zero_weight_is_unguided_bit_for_bit(name: str, update: Update) -> None:
    check_zero_weight_is_unguided(Setting(name, update, kind="sample", dtype=torch.float32))


@pytest.mark.parametrize("update", RULES)
def test_null_law_finds_a_step_that_stays(update: Update) -> None:
    with pytest.raises(AssertionError):
        check_zero_weight_is_unguided(Setting("latent", update, data_class=Insists))


def check_unguided_is_the_stock_loop(setting: Setting) -> None:
    """Without guidance the loop is the scheduler's own loop, bit for bit."""
    prior, scheduler = setting.prior(Calls()), setting.make()
    scheduler.set_timesteps(setting.steps)
    trajectory = prior.trajectory(setting.steps, 1.0)
    start = setting.latents(20)
    z_t = trajectory.noise(torch.zeros_like(start), draw_noise(start, setting.generators(setting.images)))
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = prior.denoiser(z_t, t.expand(len(z_t))).sample
            z_t = scheduler.step(output, t, z_t, return_dict=False)[0]
    assert torch.equal(setting.latent, z_t)


STOCK = Setting("unguided", strength=1.0, dtype=torch.float32)


@pytest.mark.parametrize("make", [ddim, dpm, unipc, flow])
def test_unguided_is_the_stock_loop(make: Make) -> None:
    scheduler = make()
    if make is not flow:
        scheduler.register_to_config(prediction_type="v_prediction")
    check_unguided_is_the_stock_loop(replace(STOCK, make=lambda: scheduler, kind=None))


def test_stock_law_finds_a_loop_that_adds_noise() -> None:
    with pytest.raises(AssertionError):
        check_unguided_is_the_stock_loop(replace(STOCK, regulariser_class=Renoise))


# --- guidance does what it is for ------------------------------------------------------------------------------------


def check_guidance_lowers_the_data_term(setting: Setting) -> None:
    """A guided sample agrees better with its measurement than the unguided one from the same noise."""
    guided, _, data = setting.run()
    unguided = replace(setting, name="unguided").latent
    assert data is not None
    with torch.no_grad():
        assert (data.loss(guided) < data.loss(unguided)).all()


class Uphill(PixelINN):
    """Defect: every rule in the wrong direction."""

    def projection(self, z0: Tensor, gain: Tensor) -> Tensor:
        return super().projection(z0, -gain)

    def descent(self, z0: Tensor, gain: Tensor) -> Tensor:
        return super().descent(z0, -gain)

    def descent_through(self, z0: Tensor, z_t: Tensor, gain: Tensor, predict: Any = None) -> Tensor:
        return super().descent_through(z0, z_t, -gain, predict)


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("update", RULES)
def test_guidance_lowers_the_data_term(update: Update, make: Make) -> None:
    check_guidance_lowers_the_data_term(Setting("latent", update, make=make))


def turbo() -> EulerAncestralDiscreteScheduler:
    return EulerAncestralDiscreteScheduler(**SD, timestep_spacing="trailing")


FEW_STEPS: dict[str, Make] = {
    "lcm": lambda: make_scheduler("lcm", ddim()),
    "turbo": turbo,
    "euler": lambda: make_scheduler("euler", ddim()),
    "dpm++": lambda: make_scheduler("dpm++", ddim()),
    "unipc": lambda: make_scheduler("unipc", ddim()),
}


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("name", FEW_STEPS)
def test_few_guided_steps_lower_the_data_term(name: str, steps: int, strength: float) -> None:
    for kind in KINDS:
        setting = Setting(kind, make=FEW_STEPS[name], kind="epsilon", steps=steps, strength=strength, gaussian=True)
        guided, calls, _ = setting.run()
        assert guided.isfinite().all()
        assert calls.denoiser == steps
        check_guidance_lowers_the_data_term(setting)


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("kind", ["euler", "dpm++", "unipc"])
def test_few_guided_steps_of_flow_matching_lower_the_data_term(kind: str, steps: int) -> None:
    setting = Setting(
        make=lambda: make_scheduler(kind, flow()), kind="flow_prediction", steps=steps, strength=0.7, gaussian=True
    )
    check_guidance_lowers_the_data_term(setting)


def test_few_step_law_finds_a_wrong_direction() -> None:
    for make in FEW_STEPS.values():
        with pytest.raises(AssertionError):
            check_guidance_lowers_the_data_term(
                Setting("pixel", make=make, kind="epsilon", gaussian=True, data_class=Uphill)
            )


@pytest.mark.parametrize("update", RULES)
def test_guidance_law_finds_a_wrong_direction(update: Update) -> None:
    check_guidance_lowers_the_data_term(Setting("pixel", update))
    with pytest.raises(AssertionError):
        check_guidance_lowers_the_data_term(Setting("pixel", update, data_class=Uphill))


# --- PixelINN = LatentINN over the identity --------------------------------------------------------------------------


class SignedPixels(PixelINN):
    """Defect: measures in [-1, 1] what is given in [0, 1]."""

    def open(self, z0: Tensor) -> Tensor:
        return 2 * super().open(z0) - 1


def check_methods_agree_over_the_identity(setting: Setting) -> None:
    """With E = D = identity and one network, PixelINN and LatentINN draw the same sample."""
    identity = LinearVAE(factor=1, identity=True, scaling_factor=0.5, shift_factor=-1.0)
    pixel = replace(setting, name="pixel", vae=identity)
    latent = replace(setting, name="latent", vae=identity, data_class=None)
    assert_close(pixel.latent, latent.latent)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("update", RULES)
def test_methods_agree_over_the_identity(update: Update, refine: bool) -> None:
    check_methods_agree_over_the_identity(Setting(update=update, config=replace(STRONG, refine=refine, refine_lr=1e-3)))


@pytest.mark.parametrize("update", RULES)
def test_agreement_of_methods_finds_a_range_error(update: Update) -> None:
    with pytest.raises(AssertionError):
        check_methods_agree_over_the_identity(Setting(update=update, data_class=SignedPixels))


# --- schedulers agree at one zeta ------------------------------------------------------------------------------------


AGREEMENT_DB = 0.1  # The law's own figure.


class StoredCoordinates(Regulariser):
    """Defect: corrects z/alpha, what Euler stores, as if it were z."""

    def limit(self, correction: Tensor, sigma: float) -> Tensor:
        return correction / math.sqrt(1 - sigma * sigma)


SCHEDULED = Setting(
    # Few and soft steps from much noise, so that what the first ones did still shows in the end.
    gaussian=True,
    dtype=torch.float32,
    steps=3,
    strength=0.95,
    levels=0,
    config=replace(STRONG, zeta=150.0, beta=0.2),
)


def check_schedulers_agree(setting: Setting, defect: Callable[..., Regulariser] | None = None) -> None:
    """DDIM (eta = 0) and Euler reach the same PSNR on the same time steps with the same weights."""
    prior, truth = setting.prior(Calls()), setting.latents(10)
    clean = prior.decode(truth)

    def quality(run: Setting) -> Tensor:
        return psnr(prior.decode(run.latent), clean)

    one = quality(replace(setting, make=ddim))
    other = quality(replace(setting, make=euler, regulariser_class=defect))
    unguided = quality(replace(setting, make=ddim, name="unguided"))
    assert ((one - unguided).abs() > 3 * AGREEMENT_DB).all(), "guidance is too weak to show a difference"
    assert ((one - other).abs() <= AGREEMENT_DB).all(), f"DDIM {one} dB, Euler {other} dB"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("update", RULES)
@pytest.mark.parametrize("name", KINDS)
def test_ddim_and_euler_agree(name: str, update: Update, kind: str) -> None:
    check_schedulers_agree(replace(SCHEDULED, name=name, update=update, kind=kind))


@pytest.mark.parametrize("update", RULES)
def test_scheduler_law_finds_a_correction_in_stored_coordinates(update: Update) -> None:
    with pytest.raises(AssertionError):
        check_schedulers_agree(replace(SCHEDULED, update=update), StoredCoordinates)


# --- an image does not feel its neighbours ---------------------------------------------------------------------------


class OneForAll(LearnedForward):
    """Defect: all images of a batch refine one copy."""

    def __init__(self, inn: InvertibleNet, gamma: Tensor, levels: int, refine_lr: float | None, count: Any) -> None:
        super().__init__(inn, gamma, levels, refine_lr, count)
        self._private = [self._private[0] for _ in gamma]
        self._optimizers = [self._optimizers[0] for _ in gamma]


def one_stream(images: Sequence[int]) -> list[torch.Generator]:
    """Defect: one generator for the whole batch."""
    return [torch.Generator().manual_seed(7)] * len(images)


def check_alone_is_together(setting: Setting) -> None:
    """Every image of a batch becomes what it becomes alone."""
    together = setting.latent
    for k, image in enumerate(setting.images):
        assert_close(together[k : k + 1], replace(setting, images=(image,)).latent)


NOISY = Setting(eta=1.0, config=replace(STRONG, refine=True, refine_lr=1e-2, regulariser="renoise"))


@pytest.mark.parametrize("update", RULES)
@pytest.mark.parametrize("name", KINDS)
def test_alone_is_together(name: str, update: Update) -> None:
    check_alone_is_together(replace(NOISY, name=name, update=update))


def test_independence_law_finds_a_shared_copy() -> None:
    with pytest.raises(AssertionError):
        check_alone_is_together(replace(NOISY, forward_class=OneForAll))


def test_independence_law_finds_a_shared_generator() -> None:
    with pytest.raises(AssertionError):
        check_alone_is_together(replace(NOISY, generators=one_stream))


# --- same seed, same bytes; other seed, other sample -----------------------------------------------------------------


def unseeded(images: Sequence[int]) -> list[torch.Generator]:
    """Defect: generators that nobody seeded."""
    made = [torch.Generator() for _ in images]
    for generator in made:
        generator.seed()
    return made


def check_repeatable(setting: Setting) -> None:
    """Two runs give the same bytes."""
    assert torch.equal(setting.latent, setting.latent)


@pytest.mark.parametrize("update", RULES)
def test_repeatable(update: Update) -> None:
    check_repeatable(replace(NOISY, update=update, dtype=torch.float32))


def test_repeatability_law_finds_unseeded_noise() -> None:
    with pytest.raises(AssertionError):
        check_repeatable(replace(NOISY, generators=unseeded))


# --- the trained network stays as it is ------------------------------------------------------------------------------


class Careless(LearnedForward):
    """Defect: refines the trained network itself."""

    def __init__(self, inn: InvertibleNet, gamma: Tensor, levels: int, refine_lr: float | None, count: Any) -> None:
        super().__init__(inn, gamma, levels, refine_lr, count)
        self._private = [inn.requires_grad_(True) for _ in gamma]
        self._optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in self._private]


def check_trained_weights_stay(setting: Setting) -> None:
    """A refined run changes the sample, and no weight of the trained network."""
    data = setting.run()[2]
    assert data is not None
    assert isinstance(data.forward_model, LearnedForward)
    shared = data.forward_model._shared
    trained = setting.inn(shared.config["channels"]).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in shared.state_dict().items())
    plain = replace(setting, config=replace(setting.config, refine=False))
    assert not torch.equal(setting.latent, plain.latent), "refinement changes nothing"


REFINED = Setting(config=replace(STRONG, refine=True, refine_lr=1e-2))


@pytest.mark.parametrize("update", RULES)
def test_trained_weights_stay(update: Update) -> None:
    check_trained_weights_stay(replace(REFINED, update=update))


def test_weights_law_finds_refinement_in_place() -> None:
    with pytest.raises(AssertionError):
        check_trained_weights_stay(replace(REFINED, forward_class=Careless))


# --- regularisers act where they say ---------------------------------------------------------------------------------


class SaysItStays(AutoencoderConsistency):
    """Defect: calls the autoencoder and does not say so."""

    decodes = False


def check_decodes_tells_the_truth(make: Callable[..., Regulariser]) -> None:
    """A regulariser calls the autoencoder in LatentINN's loop exactly if its class says so."""
    setting = Setting(regulariser_class=make)
    calls = setting.run()[1]
    uses_autoencoder = calls.decoder + calls.encoder > 0
    assert uses_autoencoder == make(0.1, setting.prior(Calls())).decodes


@pytest.mark.parametrize("name", [None, "consistency", "gluing", "renoise", "trust"])
def test_decodes_tells_the_truth(name: str | None) -> None:
    config = GuidanceConfig(regulariser=name)
    check_decodes_tells_the_truth(lambda weight, prior: make_regulariser(config, prior))


def test_decoding_law_finds_a_hidden_autoencoder() -> None:
    with pytest.raises(AssertionError):
        check_decodes_tells_the_truth(SaysItStays)


class Shrink(Regulariser):
    """A regulariser that pulls without the autoencoder; a loop that asks `decodes` first would skip it."""

    def pull(self, z0: Tensor, data: DataTerm) -> Tensor:
        return z0 * (1 - self.weight)


class Idle(Regulariser):
    """Defect: never acts."""


def check_pull_reaches_the_sample(make: type[Regulariser]) -> None:
    """What `pull` returns is the clean latent that the last step arrives at."""
    pulled = replace(Setting(), regulariser_class=make, config=replace(STRONG, regulariser_weight=1.0)).latent
    # Schedulers keep their noise levels in float32.
    assert_close(pulled, torch.zeros_like(pulled), torch.float32)


def test_pull_reaches_the_sample() -> None:
    check_pull_reaches_the_sample(Shrink)


def test_pull_law_finds_a_regulariser_that_is_skipped() -> None:
    with pytest.raises(AssertionError):
        check_pull_reaches_the_sample(Idle)


# --- where sampling starts -------------------------------------------------------------------------------------------


def ends(strength: float, restore: Callable[..., Tensor] = restore_latent) -> tuple[Tensor, Tensor]:
    """Ends of two runs that differ in the start image alone."""
    prior = gaussian_prior(ddim(), "v_prediction")
    results = []
    for start in (torch.zeros(1, 12, 4, 4), torch.ones(1, 12, 4, 4)):
        trajectory = prior.trajectory(3, strength)
        nothing = Regulariser(0.0, prior)
        with torch.no_grad():
            results.append(restore(trajectory, start, None, "stopped", nothing, [torch.Generator().manual_seed(0)]))
    return results[0], results[1]


def check_start_counts_below_pure_noise(restore: Callable[..., Tensor]) -> None:
    """The start image matters at a strength of 0.5 and is gone in pure noise."""
    assert torch.equal(*ends(1.0, restore))
    low, high = ends(0.5, restore)
    assert float((high - low).mean()) > 0.1


def leaks(trajectory: Any, start: Tensor, *rest: Any) -> Tensor:
    """Defect: lets the start image through at any strength."""
    return restore_latent(trajectory, start, *rest) + 1e-3 * start


def test_start_counts_below_pure_noise() -> None:
    check_start_counts_below_pure_noise(restore_latent)


def test_start_law_finds_a_leak() -> None:
    with pytest.raises(AssertionError):
        check_start_counts_below_pure_noise(leaks)


# --- the loop stays readable -----------------------------------------------------------------------------------------


LONGEST_LOOP = 40


def check_loop_is_flat_and_short(source: str) -> None:
    """The body of `restore_latent`, without its docstring, is one flat loop of at most 40 lines."""
    (function,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "restore_latent"]
    body = function.body[1:] if ast.get_docstring(function) else function.body
    length = (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1
    assert length <= LONGEST_LOOP, f"{length} lines"
    inside = [node for statement in body for node in ast.walk(statement)]
    assert sum(isinstance(node, (ast.For, ast.While)) for node in inside) == 1
    assert not [node for node in inside if isinstance(node, (ast.FunctionDef, ast.Lambda))]


def test_loop_is_flat_and_short() -> None:
    check_loop_is_flat_and_short(inspect.getsource(sampler))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    return z_t\n", "\n" * LONGEST_LOOP + "    return z_t\n"),
        ("    return z_t\n", "    for _ in range(2):\n        pass\n    return z_t\n"),
    ],
)
def test_loop_law_finds_length_and_nesting(old: str, new: str) -> None:
    source = inspect.getsource(sampler)
    assert old in source
    with pytest.raises(AssertionError):
        check_loop_is_flat_and_short(source.replace(old, new))


# --- the callback ----------------------------------------------------------------------------------------------------


def test_callback_sees_every_step_and_may_stop_the_run() -> None:
    setting = Setting()
    prior = setting.prior(Calls())
    seen: list[tuple[int, bool]] = []

    def on_step(i: int, z_t: Tensor, z0: Tensor) -> None:
        seen.append((i, z_t.requires_grad or z0.requires_grad))
        if i == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_latent(
            prior.trajectory(4, 0.7),
            setting.latents(20),
            setting.data(prior),
            "through",
            Regulariser(0.0, prior),
            setting.generators(setting.images),
            on_step,
        )
    assert seen == [(0, False), (1, False), (2, False)]


def test_the_start_is_not_changed() -> None:
    setting = Setting()
    prior, start = setting.prior(Calls()), setting.latents(20)
    kept = start.clone()
    z = restore_latent(
        prior.trajectory(2, 0.7),
        start,
        setting.data(prior),
        "through",
        Regulariser(0.0, prior),
        setting.generators(setting.images),
    )
    assert torch.equal(start, kept)
    assert not start.requires_grad
    assert not z.requires_grad
