"""What each part of the model is trained for: one objective per part.

| part | trained networks | loss (names of the method) |
| --- | --- | --- |
| autoencoder | E, D | L1(D(E(x)), x) + L1 of its gradients |
| denoiser | latent denoiser | v-prediction ‖v(z_t, t) - (alpha eps - sigma z_0)‖², or flow ‖v(z_t, t) - (eps - z_0)‖² |
| estimator | stage-one estimate and F | log ‖estimate(y, gamma) - x‖² + regression of the damage from gamma |
| pixel-inn | g (pixels) | ‖x_c - y‖² + lambda ‖g⁻¹(y, x_d, gamma) - x‖² + mu ‖g⁻¹(x_c, 0, gamma) - x‖² |
| latent-inn | g (latents) | the first two on z = E(x) with target E(y) |

Noise and JPEG blocks of y cannot be predicted from x, so the coarse part learns their mean; its loss takes the
noise- and JPEG-free y as target, which has (nearly) that mean without the variance (ours). The inverse is trained on
the y that it will be given, noise and all, so that it learns not to amplify noise while it undoes blur. The last term
makes "no details" mean "as smooth as the coarse part says", which the map of invented detail relies on (ours).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin, UNet2DModel
from torch import Tensor, nn

from latentindigo.autoencoder import PatchAutoencoder, fit_patch_basis
from latentindigo.data import PhotoFolder, sample_generator
from latentindigo.degradations import apply, check_training_range, draw_simple, draw_training
from latentindigo.images import contact_sheet
from latentindigo.inn import DegradationEncoder, Estimator, InvertibleNet
from latentindigo.latents import decode_latents, encode_pixels, latent_grid
from latentindigo.lifting import CoarseGain, ConditionedBlocks, haar_lift, lazy_split
from latentindigo.loading import load_autoencoder
from latentindigo.model_folder import model_folder

__all__ = ["OBJECTIVES", "Objective"]

SCALES = (4, 2, 1)
LEVELS = {4: 2, 2: 1, 1: 0}
SHARD = "15MB"
RESPONSE_BANDS = 4
ERROR_FLOOR = 2e-3  # 27 dB: much better images have no more weight in the estimator's loss. With 1e-4 they led it.
ENCODER_CROP = 96  # Largest side of the part of y that F is trained on.


@runtime_checkable
class RunSettings(Protocol):
    """The fields of a training run that objectives read."""

    @property
    def crop(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def min_scale(self) -> float: ...
    @property
    def batch_size(self) -> int: ...


class Objective(nn.Module):
    """A part's networks, batches and loss.

    Every subclass names the networks it trains in `networks` (component name -> network); everything else it holds
    is frozen.
    """

    networks: dict[str, ModelMixin]
    settings: frozenset[str]
    """Names that the recipe's table [objective] may set."""

    def prepare(self, photos: PhotoFolder, seed: int) -> None:
        """Initialise weights from the data; the default leaves them as they are."""

    @abstractmethod
    def batch(self, photos: PhotoFolder, config: RunSettings, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The samples of these numbers."""

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss ("loss") and its parts, scalars."""

    @abstractmethod
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named image batches (B, 3, H, W) that show what the part does."""

    def save_samples(self, photos: PhotoFolder, config: RunSettings, path: Path) -> None:
        """Write a grid of `pictures` for the fixed samples 0 to 5."""
        path.parent.mkdir(parents=True, exist_ok=True)
        device = next(self.parameters()).device
        batch = {k: v.to(device) for k, v in self.batch(photos, config, range(min(6, config.batch_size))).items()}
        with torch.no_grad():
            columns = self.pictures(batch)
        rows = [list(images) for images in zip(*[c.float().cpu().clamp(0, 1) for c in columns.values()], strict=True)]
        contact_sheet(rows, list(columns), config.crop).save(path)

    def save_networks(self, folder: Path) -> None:
        """Save the trained networks in half precision, in diffusers' format, below `folder`."""
        for name, network in self.networks.items():
            kind: Any = type(network)
            # Where the weights were loaded from is no part of the model, and would tell the machine's paths.
            half = kind.from_config({k: v for k, v in network.config.items() if k != "_name_or_path"})
            half.load_state_dict(network.state_dict())
            half.half().save_pretrained(folder / name, max_shard_size=SHARD)

    def load_weights(self, model: str) -> None:
        """Start from the weights of a model folder (or of a run's `final` folder)."""
        folder = model_folder(model)
        for name, network in self.networks.items():
            if not (folder / name).is_dir():
                raise ValueError(f"expected weights of {name!r} in {folder}, found no such folder")
            saved = type(network).from_pretrained(folder / name)
            try:
                network.load_state_dict(saved.state_dict())
            except RuntimeError as error:
                raise ValueError(
                    f"the weights of {name!r} in {folder} do not fit the recipe's [model]; make the two agree: {error}"
                ) from error


def _frozen(network: nn.Module) -> Any:
    return network.requires_grad_(False).eval()


def _clean_crops(photos: PhotoFolder, config: RunSettings, numbers: Sequence[int]) -> Tensor:
    crops = [photos.crop(sample_generator(config.seed, 1, n), config.crop, min_scale=config.min_scale) for n in numbers]
    return torch.stack(crops)


def _degraded(
    photos: PhotoFolder, config: RunSettings, numbers: Sequence[int], *, clean: bool = True, classical: float = 0.0
) -> dict[str, Tensor]:
    """Pairs (x, y) and the damage's summary; one scale for the whole batch.

    Args:
        photos: The photographs.
        config: Settings of the run.
        numbers: Sample numbers.
        clean: Also make `y_clean`, the noise- and JPEG-free y.
        classical: Share of samples that are drawn from classical degradations with mostly every damage on, in place
            of the training mixture.
    """
    draw = sample_generator(config.seed, 2, numbers[0] // len(numbers))
    scale = SCALES[int(torch.multinomial(torch.tensor([0.6, 0.2, 0.2]), 1, generator=draw))]
    x = _clean_crops(photos, config, numbers)
    noisy, noiseless, damage = [], [], []
    for image, number in zip(x, numbers, strict=True):
        generator = sample_generator(config.seed, 3, number)
        if classical and float(torch.rand((), generator=generator)) < classical:
            params = draw_simple(generator, scale, probability=0.85)
        else:
            params = draw_training(generator, scale)
        check_training_range(params)
        noisy.append(apply(image[None], params, sample_generator(config.seed, 4, number)))
        if clean:
            generator = sample_generator(config.seed, 4, number)
            noiseless.append(apply(image[None], params, generator, noise=False, jpeg=False))
        damage.append(torch.tensor(params.summary()))
    batch = {"x": x, "y": torch.cat(noisy), "damage": torch.stack(damage).float(), "scale": torch.tensor(scale)}
    return batch | ({"y_clean": torch.cat(noiseless)} if clean else {})


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


class AutoencoderObjective(Objective):
    """E and D: L1 on pixels and on forward differences, since an autoencoder loses sharpness first."""

    settings = frozenset({"gradient_weight", "whitening"})

    def __init__(self, model: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        self.vae = PatchAutoencoder(**model)
        self.networks = {"vae": self.vae}
        self.gradient_weight = float(settings.get("gradient_weight", 0.5))
        self.whitening = float(settings.get("whitening", 0.5))

    def prepare(self, photos: PhotoFolder, seed: int) -> None:
        """Fit the patch basis on 64 000 patches of the photographs."""
        crops = torch.stack([photos.crop(sample_generator(seed, 0, n), 128) for n in range(250)])
        patches = F.unfold(crops * 2 - 1, 8, stride=8).transpose(1, 2).reshape(-1, 192)
        self.vae.set_patch_basis(*fit_patch_basis(patches, self.vae.config["latent_channels"], self.whitening))

    def batch(self, photos: PhotoFolder, config: RunSettings, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Clean crops."""
        return {"x": _clean_crops(photos, config, numbers)}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L1 + gradient L1, and the PSNR it stands for."""
        x = batch["x"] * 2 - 1
        out = self.vae(x).float()
        pixel = (out - x).abs().mean()
        gradient = sum((a - b).abs().mean() for a, b in zip(_gradients(out), _gradients(x), strict=True))
        mse = ((out - x) / 2).square().mean().detach()
        return {"loss": pixel + self.gradient_weight * gradient, "psnr": -10 * mse.log10()}

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clean image, round trip, and five times their difference."""
        out = (self.vae(batch["x"] * 2 - 1) + 1) / 2
        return {"x": batch["x"], "D(E(x))": out, "difference x 5": (out - batch["x"]) * 5 + 0.5}


class DenoiserObjective(Objective):
    """The latent denoiser: v-prediction or flow matching, at the noise levels of timesteps 999 u^timestep_power.

    Both see the same noise levels sigma/alpha. Flow matching scales z_t to alpha + sigma = 1, tells the network its
    time t = sigma, and predicts eps - z_0.
    """

    settings = frozenset({"base", "prediction", "timestep_power"})

    def __init__(self, model: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        base = model_folder(settings.get("base", "embedded"))
        self.vae = _frozen(PatchAutoencoder.from_pretrained(base / "vae"))
        self.denoiser = UNet2DModel(**model)
        self.networks = {"denoiser": self.denoiser}
        prediction = settings.get("prediction", "v")
        if prediction not in ("v", "flow"):
            raise ValueError(f"prediction must be 'v' or 'flow', got {prediction!r}")
        self.flow = prediction == "flow"
        # Second order: in 8 steps it gives what DDIM needs about 25 for.
        diffusion = DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            algorithm_type="dpmsolver++",
            solver_order=2,
            final_sigmas_type="zero",
            timestep_spacing="trailing",
        )
        self.scheduler = FlowMatchEulerDiscreteScheduler() if self.flow else diffusion
        self.register_buffer("alpha_bar", diffusion.alphas_cumprod.float(), persistent=False)
        # Low noise is where restoration spends its steps: t = 999 u^power, power 1 is uniform.
        self.timestep_power = float(settings.get("timestep_power", 1.3))

    def batch(self, photos: PhotoFolder, config: RunSettings, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Clean crops, timesteps and noise."""
        x = _clean_crops(photos, config, numbers)
        side, channels = config.crop // 8, self.vae.config["latent_channels"]
        noise, times = [], []
        for number in numbers:
            generator = sample_generator(config.seed, 5, number)
            u = torch.rand((), generator=generator)
            times.append((u**self.timestep_power * 999.999).long())
            noise.append(torch.randn(channels, side, side, generator=generator))
        return {"x": x, "t": torch.stack(times), "noise": torch.stack(noise)}

    def _noised(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.no_grad():
            z = self.vae.encode(batch["x"] * 2 - 1).latents.float()
        alpha_bar = self.get_buffer("alpha_bar")[batch["t"]][:, None, None, None]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.flow:
            alpha, sigma = alpha / (alpha + sigma), sigma / (alpha + sigma)
        return z, alpha * z + sigma * batch["noise"], alpha, sigma

    def _output(self, z_t: Tensor, batch: dict[str, Tensor], sigma: Tensor) -> Tensor:
        times = 1000 * sigma.flatten() if self.flow else batch["t"]
        return self.denoiser(z_t, times).sample.float()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """‖v - v_target‖², v_target = alpha eps - sigma z_0, or eps - z_0 for flow matching."""
        z, z_t, alpha, sigma = self._noised(batch)
        noise = batch["noise"]
        target = noise - z if self.flow else alpha * noise - sigma * z
        return {"loss": (self._output(z_t, batch, sigma) - target).square().mean()}

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clean image, noisy latents decoded, and the denoised estimate z_0 decoded."""
        _, z_t, alpha, sigma = self._noised(batch)
        output = self._output(z_t, batch, sigma)
        z0 = z_t - sigma * output if self.flow else alpha * z_t - sigma * output
        shown = {"D(z_t)": z_t, "D(z0)": z0}
        return {"x": batch["x"]} | {k: (self.vae.decode(v).sample + 1) / 2 for k, v in shown.items()}

    def save_networks(self, folder: Path) -> None:
        """The denoiser and the scheduler that fits it."""
        super().save_networks(folder)
        self.scheduler.save_pretrained(folder / "scheduler")


class EstimatorObjective(Objective):
    """The stage-one estimate together with the degradation encoder F that conditions it *(ours)*.

    The logarithm of each image's squared error, whose minimum is close to the posterior mean and which weighs an easy
    image's decibel like a hard one's, plus the regression of the damage from gamma, so that gamma says what was done
    to y and not only what the estimator needs. F is frozen in the parts that follow.

    Either network can be trained by itself. `train_estimator = false` trains F alone on the regression, many times
    faster. `train_encoder = false` leaves F as it is in `base`. F starts from `base` where that is named.
    `conditioned = false` hides gamma from the estimator: a plain regression network, to compare with.
    """

    settings = frozenset(
        {
            "base",
            "classical",
            "conditioned",
            "damage_weight",
            "response_weight",
            "train_encoder",
            "train_estimator",
        }
    )

    def __init__(self, model: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        self.networks = {}
        self.train_estimator = bool(settings.get("train_estimator", True))
        self.estimator = Estimator(**model)
        if self.train_estimator:
            self.networks["estimator"] = self.estimator
        else:
            self.estimator.requires_grad_(False)
        train_encoder = bool(settings.get("train_encoder", True))
        if not (train_encoder or self.train_estimator):
            raise ValueError("train_encoder and train_estimator are both false; set one of them to true")
        if train_encoder and "base" not in settings:
            self.degradation_encoder = DegradationEncoder(gamma_dim=self.estimator.config["gamma_dim"])
        else:
            base = model_folder(settings.get("base", "embedded"))
            self.degradation_encoder = DegradationEncoder.from_pretrained(base / "degradation_encoder")
        if train_encoder:
            self.networks["degradation_encoder"] = self.degradation_encoder.train()
        else:
            _frozen(self.degradation_encoder)
        self.conditioned = bool(settings.get("conditioned", True))
        self.damage_weight = float(settings.get("damage_weight", 1.0))
        self.classical = float(settings.get("classical", 0.0))
        self.response_weight = float(settings.get("response_weight", 0.0)) if train_encoder else 0.0
        self.response_head = nn.Linear(self.estimator.config["gamma_dim"], RESPONSE_BANDS)
        self.response_head.requires_grad_(self.response_weight > 0)

    def batch(self, photos: PhotoFolder, config: RunSettings, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Pairs (x, y)."""
        clean = self.response_weight > 0
        batch = _degraded(photos, config, numbers, clean=clean, classical=self.classical)
        if clean:
            # Only the response is kept: y_clean itself is not needed, and need not travel to an accelerator.
            batch["response"] = _band_response(batch.pop("y_clean"), batch["x"])
        return batch

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """log(‖estimate - x‖² + eps) + regression of the damage; the gain over bicubic in dB beside them."""
        x, y = batch["x"], batch["y"]
        # What describes the damage is the same all over y; a part of it is enough, and at scale 1 much cheaper.
        gamma = self.degradation_encoder(y[..., :ENCODER_CROP, :ENCODER_CROP])
        damage = _damage_loss(self.degradation_encoder, gamma, batch["damage"])
        total, logs = self.damage_weight * damage, {"damage": damage.detach()}
        if self.response_weight:
            response = (self.response_head(gamma).float() - batch["response"]).square().mean()
            total, logs["response"] = total + self.response_weight * response, response.detach()
        if not self.train_estimator:
            return {"loss": total} | logs
        out = self._estimate(y, gamma, int(batch["scale"])).float()
        plain = F.interpolate(y, size=x.shape[-2:], mode="bicubic", antialias=True)
        error, before = ((image - x).square().mean((1, 2, 3)) + ERROR_FLOOR for image in (out, plain))
        logs["gain_db"] = 10 * (before / error).log10().mean().detach()
        return {"loss": total + 0.1 * error.log().mean()} | logs

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clean image, degraded image enlarged, estimate."""
        columns = {"x": batch["x"], "y": F.interpolate(batch["y"], size=batch["x"].shape[-2:], mode="nearest")}
        if not self.train_estimator:
            return columns
        gamma = self.degradation_encoder(batch["y"])
        return columns | {"estimate": self._estimate(batch["y"], gamma, int(batch["scale"]))}

    def _estimate(self, y: Tensor, gamma: Tensor, scale: int) -> Tensor:
        return self.estimator(y, gamma if self.conditioned else torch.zeros_like(gamma), LEVELS[scale])


def _damage_loss(encoder: DegradationEncoder, gamma: Tensor, damage: Tensor) -> Tensor:
    """Regression of blur, noise and JPEG strength from gamma, each divided by its training range."""
    estimate = encoder.estimate(gamma)
    ranges = gamma.new_tensor([3.2, 30 / 255, 1.0])
    stacked = torch.stack([estimate.blur, estimate.noise, estimate.jpeg], dim=-1)
    return F.smooth_l1_loss(stacked / ranges, damage / ranges, beta=0.1)


@torch.no_grad()
def _band_response(y_clean: Tensor, x: Tensor) -> Tensor:
    """How much of each band of frequencies a blur has left: log amplitudes (B, RESPONSE_BANDS), 0 = all of it.

    The bands divide the frequencies of y's grid, from the mean to half a cycle per pixel. What a band of y (without
    noise and JPEG) holds is compared with what it holds after downsampling x alone.
    """
    height, width = y_clean.shape[-2:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    band = ((rows.square() + columns.square()).sqrt() * 2 * RESPONSE_BANDS).long().clamp(max=RESPONSE_BANDS - 1)
    window = torch.hann_window(height, periodic=False)[:, None] * torch.hann_window(width, periodic=False)[None]

    def energies(image: Tensor) -> Tensor:
        grey = image.mean(1)
        spectrum = torch.fft.rfft2((grey - grey.mean((1, 2), keepdim=True)) * window).abs().square()
        return torch.stack([spectrum[:, band == k].mean(1) for k in range(RESPONSE_BANDS)], dim=1)

    plain = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True)
    # The floor is that of 8-bit rounding: what is weaker cannot be told from nothing.
    floor = window.square().sum() / (12 * 255**2)
    return 0.5 * ((energies(y_clean) + floor) / (energies(plain) + floor)).log()


class PixelINNObjective(Objective):
    """The pixel INN; the degradation encoder F is frozen."""

    settings = frozenset({"base", "detail_weight", "inverse_weight"})

    def __init__(self, model: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        base = model_folder(settings.get("base", "embedded"))
        self.degradation_encoder = _frozen(DegradationEncoder.from_pretrained(base / "degradation_encoder"))
        self.pixel_inn = InvertibleNet(**model)
        self.networks = {"pixel_inn": self.pixel_inn}
        self.inverse_weight = float(settings.get("inverse_weight", 0.5))
        self.detail_weight = float(settings.get("detail_weight", 0.2))

    def batch(self, photos: PhotoFolder, config: RunSettings, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Pairs (x, y) with the noise- and JPEG-free y."""
        return _degraded(photos, config, numbers)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """‖x_c - y‖² + lambda ‖g⁻¹(y, x_d, gamma) - x‖² + mu ‖g⁻¹(x_c, 0, gamma) - x‖²."""
        x, levels = batch["x"], LEVELS[int(batch["scale"])]
        with torch.no_grad():
            gamma = self.degradation_encoder(batch["y"])
        x_c, x_d = self.pixel_inn(x, gamma, levels)
        coarse = (x_c - batch["y_clean"]).square().mean()
        inverse = (self.pixel_inn.inverse(batch["y"], x_d, gamma, levels) - x).square().mean()
        # Without this term details need not vanish where x is smooth, and the map of invented detail would show that.
        none = tuple(torch.zeros_like(d) for d in x_d)
        smooth = (self.pixel_inn.inverse(x_c, none, gamma, levels) - x).square().mean()
        plain = F.interpolate(x, size=x_c.shape[-2:], mode="bicubic", antialias=True)
        ratio = coarse / (plain - batch["y_clean"]).square().mean().clamp_min(1e-6)
        return {
            "loss": coarse + self.inverse_weight * inverse + self.detail_weight * smooth,
            "coarse": coarse.detach(),
            "inverse": inverse.detach(),
            "smooth": smooth.detach(),
            "coarse_over_bicubic": ratio.detach(),
        }

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clean image, y, coarse part, g⁻¹(y, x_d, gamma)."""
        levels = LEVELS[int(batch["scale"])]
        gamma = self.degradation_encoder(batch["y"])
        x_c, x_d = self.pixel_inn(batch["x"], gamma, levels)
        size = batch["x"].shape[-2:]
        return {
            "x": batch["x"],
            "y": F.interpolate(batch["y"], size=size),
            "x_c": F.interpolate(x_c.float(), size=size),
            "g⁻¹(x_c, 0)": self.pixel_inn.inverse(x_c, tuple(torch.zeros_like(d) for d in x_d), gamma, levels),
            "g⁻¹(y, x_d)": self.pixel_inn.inverse(batch["y"], x_d, gamma, levels),
        }


def _cut_gamma_off(inn: InvertibleNet) -> None:
    """Set the weights that gamma is multiplied by to zero, and freeze them: every gamma then gives the same network."""
    for module in inn.modules():
        if isinstance(module, ConditionedBlocks):
            reader = module.scale[0]
        elif isinstance(module, CoarseGain):
            reader = module.logarithm[0]
        else:
            continue
        nn.init.zeros_(cast("nn.Linear", reader).weight).requires_grad_(False)


class LatentINNObjective(Objective):
    """The latent INN: coarse part of z = E(x) against E(y), with E, F and the stage-one estimate frozen.

    `prior` names another latent diffusion model: E and D are then its autoencoder, and the number of channels is that
    of its latents. F and the estimate come from `base` all the same.
    `conditioned = false` cuts gamma off inside the network, for good: what is saved ignores it too. For comparison.
    """

    settings = frozenset({"base", "conditioned", "inverse_weight", "prior", "spread_weight"})

    def __init__(self, model: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        base, prior = model_folder(settings.get("base", "embedded")), settings.get("prior")
        ours = prior is None
        self.vae: Any = _frozen(PatchAutoencoder.from_pretrained(base / "vae") if ours else load_autoencoder(prior))
        self.degradation_encoder = _frozen(DegradationEncoder.from_pretrained(base / "degradation_encoder"))
        self.downsampling, channels = latent_grid(self.vae)
        if model.get("channels", channels) != channels:
            raise ValueError(
                f"expected channels = {channels} in the recipe's [model], as many as the latents of "
                f"{'the base model' if ours else prior} have, got {model['channels']}; leave it out"
            )
        self.latent_inn = InvertibleNet(**{**model, "channels": channels})
        if not settings.get("conditioned", True):
            _cut_gamma_off(self.latent_inn)
        self.networks = {"latent_inn": self.latent_inn}
        self.inverse_weight = float(settings.get("inverse_weight", 0.1))
        self.spread_weight = float(settings.get("spread_weight", 0.1))
        self.estimator: Estimator | None = None
        if self.latent_inn.has_spread:
            self.estimator = _frozen(Estimator.from_pretrained(base / "estimator"))

    @torch.no_grad()
    def prepare(self, photos: PhotoFolder, seed: int) -> None:
        """Start the band mix, where there is one, as the best linear map from E(x) to E(x at half the size)."""
        mix = self.latent_inn.band_mix
        if mix is None:
            return
        # Other autoencoders are slow, and have fewer channels to fit.
        count, chunk = (400, 50) if isinstance(self.vae, PatchAutoencoder) else (100, 10)
        crops = torch.stack([photos.crop(sample_generator(seed, 0, n), 128) for n in range(count)])
        halves = F.interpolate(crops, scale_factor=0.5, mode="bicubic", antialias=True)
        fine, coarse = (
            torch.cat([encode_pixels(self.vae, part) for part in images.split(chunk)]) for images in (crops, halves)
        )
        bands = lazy_split(fine)
        if self.latent_inn.config["haar"]:
            bands = haar_lift(*bands)
        a, b = (t.transpose(0, 1).flatten(1).T.double() for t in (torch.cat(bands, dim=1), coarse))
        ridge = 1e-4 * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        best = torch.linalg.solve(a.T @ a + ridge, a.T @ b).T
        # The other rows span what the best map does not see, so that the whole is invertible and well conditioned.
        rest = torch.linalg.svd(best).Vh[best.shape[0] :]
        mix.matrix.copy_(torch.cat((best, rest)))

    def batch(self, photos: PhotoFolder, config: RunSettings, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Pairs (x, y) with the noise- and JPEG-free y."""
        smallest = max(SCALES) * self.downsampling
        if config.crop % smallest:
            raise ValueError(
                f"expected a crop that is a multiple of {smallest}, the autoencoder's {self.downsampling} pixels per "
                f"latent at scale {max(SCALES)}, got {config.crop}; mend the recipe"
            )
        return _degraded(photos, config, numbers)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """‖z_c - E(y)‖² + lambda ‖g⁻¹(E(y), z_d, gamma) - z‖², and the likelihood of the spread where there is one."""
        levels = LEVELS[int(batch["scale"])]
        with torch.no_grad():
            gamma = self.degradation_encoder(batch["y"])
            z, clean, measured = (encode_pixels(self.vae, batch[k]) for k in ("x", "y_clean", "y"))
        z_c, z_d = self.latent_inn(z, gamma, levels)
        coarse = (z_c - clean).square().mean()
        inverse = (self.latent_inn.inverse(measured, z_d, gamma, levels) - z).square().mean()
        total = coarse + self.inverse_weight * inverse
        logs = {"coarse": coarse.detach(), "inverse": inverse.detach()}
        if self.estimator is not None:
            spread = self._spread_loss(batch["y"], z, gamma, levels)
            total, logs["spread"] = total + self.spread_weight * spread, spread.detach()
        return {"loss": total} | logs

    def _spread_loss(self, y: Tensor, z: Tensor, gamma: Tensor, levels: int) -> Tensor:
        """-log N(z; E(estimate), spread²), without its constant: log s + (z - E(estimate))² / (2 s²)."""
        if self.estimator is None:
            raise RuntimeError("the spread is trained beside a stage-one estimate, and none was loaded")
        with torch.no_grad():
            estimate = self.estimator(y, gamma, levels).float().clamp(0, 1)
            guess = encode_pixels(self.vae, estimate)
        deviation = self.latent_inn.spread(guess, gamma).float()
        return (deviation.log() + 0.5 * ((z - guess) / deviation).square()).mean()

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clean image, y, and D(g⁻¹(E(y), z_d, gamma))."""
        levels = LEVELS[int(batch["scale"])]
        gamma = self.degradation_encoder(batch["y"])
        z = encode_pixels(self.vae, batch["x"])
        z_c, z_d = self.latent_inn(z, gamma, levels)
        z_inv = self.latent_inn.inverse(encode_pixels(self.vae, batch["y"]), z_d, gamma, levels)
        size = batch["x"].shape[-2:]
        return {
            "x": batch["x"],
            "y": F.interpolate(batch["y"], size=size),
            "D(z_c)": F.interpolate(decode_latents(self.vae, z_c), size=size),
            "D(z_inv)": decode_latents(self.vae, z_inv),
        }


OBJECTIVES: dict[str, type[Objective]] = {
    "autoencoder": AutoencoderObjective,
    "denoiser": DenoiserObjective,
    "estimator": EstimatorObjective,
    "pixel-inn": PixelINNObjective,
    "latent-inn": LatentINNObjective,
}
