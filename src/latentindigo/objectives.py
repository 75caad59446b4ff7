"""What each part of the model is trained for: one objective per part.

| part | trained networks | loss (names of the method) |
| --- | --- | --- |
| autoencoder | E, D | L1(D(E(x)), x) + L1 of its gradients |
| denoiser | latent denoiser | v-prediction: ‖v(z_t, t) - (alpha eps - sigma z_0)‖² |
| estimator | stage-one estimate and F | Charbonnier(estimate(y, gamma), x) + regression of the damage from gamma |
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
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, ModelMixin, UNet2DModel
from torch import Tensor, nn

from latentindigo.autoencoder import PatchAutoencoder, fit_patch_basis
from latentindigo.data import PhotoFolder, sample_generator
from latentindigo.degradations import apply, draw_training
from latentindigo.images import contact_sheet
from latentindigo.inn import DegradationEncoder, Estimator, InvertibleNet
from latentindigo.model_folder import model_folder

__all__ = ["OBJECTIVES", "Objective"]

SCALES = (4, 2, 1)
LEVELS = {4: 2, 2: 1, 1: 0}
SHARD = "15MB"


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


def _degraded(photos: PhotoFolder, config: RunSettings, numbers: Sequence[int]) -> dict[str, Tensor]:
    """Pairs (x, y) with the noise- and JPEG-free y and the damage's summary; one scale for the whole batch."""
    draw = sample_generator(config.seed, 2, numbers[0] // len(numbers))
    scale = SCALES[int(torch.multinomial(torch.tensor([0.6, 0.2, 0.2]), 1, generator=draw))]
    x = _clean_crops(photos, config, numbers)
    noisy, clean, damage = [], [], []
    for image, number in zip(x, numbers, strict=True):
        params = draw_training(sample_generator(config.seed, 3, number), scale)
        noisy.append(apply(image[None], params, sample_generator(config.seed, 4, number)))
        clean.append(apply(image[None], params, sample_generator(config.seed, 4, number), noise=False, jpeg=False))
        summary = params.summary()
        damage.append(torch.tensor([summary.blur, summary.noise, summary.jpeg]))
    return {
        "x": x,
        "y": torch.cat(noisy),
        "y_clean": torch.cat(clean),
        "damage": torch.stack(damage).float(),
        "scale": torch.tensor(scale),
    }


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
    """The latent denoiser: v-prediction at timesteps drawn as 999 u^timestep_power."""

    settings = frozenset({"base", "timestep_power"})

    def __init__(self, model: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        base = model_folder(settings.get("base", "embedded"))
        self.vae = _frozen(PatchAutoencoder.from_pretrained(base / "vae"))
        self.denoiser = UNet2DModel(**model)
        self.networks = {"denoiser": self.denoiser}
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
        )
        self.register_buffer("alpha_bar", self.scheduler.alphas_cumprod.float(), persistent=False)
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
        return z, alpha * z + sigma * batch["noise"], alpha, sigma

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """‖v - v_target‖², v_target = alpha eps - sigma z_0."""
        z, z_t, alpha, sigma = self._noised(batch)
        v = self.denoiser(z_t, batch["t"]).sample.float()
        return {"loss": (v - (alpha * batch["noise"] - sigma * z)).square().mean()}

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clean image, noisy latents decoded, and the denoised estimate z_0 decoded."""
        _, z_t, alpha, sigma = self._noised(batch)
        z0 = alpha * z_t - sigma * self.denoiser(z_t, batch["t"]).sample.float()
        shown = {"D(z_t)": z_t, "D(z0)": z0}
        return {"x": batch["x"]} | {k: (self.vae.decode(v).sample + 1) / 2 for k, v in shown.items()}

    def save_networks(self, folder: Path) -> None:
        """The denoiser and the scheduler that fits it."""
        super().save_networks(folder)
        self.scheduler.save_pretrained(folder / "scheduler")


class EstimatorObjective(Objective):
    """The stage-one estimate together with the degradation encoder F that conditions it.

    A Charbonnier loss, whose minimum is close to the posterior mean, plus the regression of the damage from gamma, so
    that gamma says what was done to y and not only what the estimator needs. F is frozen in the parts that follow; with
    `train_encoder = false` it stays that of `base`, so that an estimator can be trained on without retraining those.
    """

    settings = frozenset({"base", "damage_weight", "train_encoder"})

    def __init__(self, model: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        self.estimator = Estimator(**model)
        self.networks = {"estimator": self.estimator}
        if settings.get("train_encoder", True):
            self.degradation_encoder = DegradationEncoder(gamma_dim=self.estimator.config["gamma_dim"])
            self.networks["degradation_encoder"] = self.degradation_encoder
        else:
            base = model_folder(settings.get("base", "embedded"))
            self.degradation_encoder = _frozen(DegradationEncoder.from_pretrained(base / "degradation_encoder"))
        self.damage_weight = float(settings.get("damage_weight", 0.1))

    def batch(self, photos: PhotoFolder, config: RunSettings, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Pairs (x, y)."""
        return _degraded(photos, config, numbers)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """sqrt(error² + eps²) + regression of the damage; the gain over bicubic in dB beside them."""
        x, y = batch["x"], batch["y"]
        gamma = self.degradation_encoder(y)
        out = self.estimator(y, gamma, LEVELS[int(batch["scale"])]).float()
        error = ((out - x).square() + 1e-4).sqrt().mean()
        damage = _damage_loss(self.degradation_encoder, gamma, batch["damage"])
        plain = F.interpolate(y, size=x.shape[-2:], mode="bicubic", antialias=True)
        gain = ((plain - x).square().mean() / (out - x).square().mean()).log10() * 10
        return {
            "loss": error + self.damage_weight * damage,
            "error": error.detach(),
            "damage": damage.detach(),
            "gain_db": gain.detach(),
        }

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clean image, degraded image enlarged, estimate."""
        plain = F.interpolate(batch["y"], size=batch["x"].shape[-2:], mode="nearest")
        gamma = self.degradation_encoder(batch["y"])
        estimate = self.estimator(batch["y"], gamma, LEVELS[int(batch["scale"])])
        return {"x": batch["x"], "y": plain, "estimate": estimate}


def _damage_loss(encoder: DegradationEncoder, gamma: Tensor, damage: Tensor) -> Tensor:
    """Regression of blur, noise and JPEG strength from gamma, each divided by its training range."""
    estimate = encoder.estimate(gamma)
    ranges = gamma.new_tensor([3.2, 30 / 255, 1.0])
    stacked = torch.stack([estimate.blur, estimate.noise, estimate.jpeg], dim=-1)
    return F.smooth_l1_loss(stacked / ranges, damage / ranges, beta=0.1)


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


class LatentINNObjective(Objective):
    """The latent INN: coarse part of z = E(x) against E(y), with E and F frozen."""

    settings = frozenset({"base", "inverse_weight"})

    def __init__(self, model: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        base = model_folder(settings.get("base", "embedded"))
        self.vae = _frozen(PatchAutoencoder.from_pretrained(base / "vae"))
        self.degradation_encoder = _frozen(DegradationEncoder.from_pretrained(base / "degradation_encoder"))
        self.latent_inn = InvertibleNet(**model)
        self.networks = {"latent_inn": self.latent_inn}
        self.inverse_weight = float(settings.get("inverse_weight", 0.1))

    def batch(self, photos: PhotoFolder, config: RunSettings, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Pairs (x, y) with the noise- and JPEG-free y."""
        return _degraded(photos, config, numbers)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """‖z_c - E(y)‖² + lambda ‖g⁻¹(E(y), z_d, gamma) - z‖²."""
        levels = LEVELS[int(batch["scale"])]
        with torch.no_grad():
            gamma = self.degradation_encoder(batch["y"])
            z = self.vae.encode(batch["x"] * 2 - 1).latents.float()
            clean, measured = (self.vae.encode(batch[k] * 2 - 1).latents.float() for k in ("y_clean", "y"))
        z_c, z_d = self.latent_inn(z, gamma, levels)
        coarse = (z_c - clean).square().mean()
        inverse = (self.latent_inn.inverse(measured, z_d, gamma, levels) - z).square().mean()
        return {
            "loss": coarse + self.inverse_weight * inverse,
            "coarse": coarse.detach(),
            "inverse": inverse.detach(),
        }

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clean image, y, and D(g⁻¹(E(y), z_d, gamma))."""
        levels = LEVELS[int(batch["scale"])]
        gamma = self.degradation_encoder(batch["y"])
        z = self.vae.encode(batch["x"] * 2 - 1).latents
        z_c, z_d = self.latent_inn(z, gamma, levels)
        target = self.vae.encode(batch["y"] * 2 - 1).latents
        z_inv = self.latent_inn.inverse(target, z_d, gamma, levels)
        size = batch["x"].shape[-2:]
        return {
            "x": batch["x"],
            "y": F.interpolate(batch["y"], size=size),
            "D(z_c)": F.interpolate((self.vae.decode(z_c).sample.float() + 1) / 2, size=size),
            "D(z_inv)": (self.vae.decode(z_inv).sample + 1) / 2,
        }


OBJECTIVES: dict[str, type[Objective]] = {
    "autoencoder": AutoencoderObjective,
    "denoiser": DenoiserObjective,
    "estimator": EstimatorObjective,
    "pixel-inn": PixelINNObjective,
    "latent-inn": LatentINNObjective,
}
