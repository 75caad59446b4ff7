"""Suites about one network at a time: coarse parts and round trips of the INNs, what gamma knows, the denoiser."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bench import Bench, entry_of
from torch import Tensor

from latentindigo.data import sample_generator
from latentindigo.degradations import Degradation, StandardDegradation, apply, degrade, draw_training
from latentindigo.evaluation import (
    Interval,
    Pair,
    Protocol,
    Row,
    bootstrap_interval,
    make_pairs,
    make_row,
    ratio_of_sums,
)
from latentindigo.images import list_images, pil_jpeg, pil_resize

EXCLUDED = ("deep_photo_style", "ddnm_faces")  # Not used for training either.
DAMAGE = ("blur", "noise", "jpeg")
NOISE_LEVELS = (0.2, 0.4, 0.64, 0.8, 0.95)


def coarse(bench: Bench) -> Sequence[str]:
    """How well coarse parts foretell the noise- and JPEG-free degraded image, and how exactly the INNs invert."""
    protocol = Protocol("random", "random", 4, "val")
    pairs = bench.pairs(protocol)
    pipe, prior = bench.pipe, bench.prior
    errors: dict[tuple[str, str], list[float]] = {}
    linear = _linear_map(bench) if pipe.latent_inn is not None else None
    for pair in pairs:
        x = pair.clean[None].to(prior.device)
        gamma = bench.gamma(pair.y)
        small = pil_resize(x, (x.shape[-1] // 4, x.shape[-2] // 4))
        target = without_noise(pair).to(x)
        found = {
            ("pixels", "bicubic"): (small, target),
            ("pixels", "pixel-inn"): (pipe.pixel_inn(x.to(gamma), gamma, 2)[0], target),
        }
        if pipe.latent_inn is not None and linear is not None:
            z, latent = prior.encode(x), prior.encode(target)
            found |= {
                ("latents", "E(bicubic)"): (prior.encode(small), latent),
                ("latents", "mean of 4x4"): (F.avg_pool2d(z, 4), latent),
                ("latents", "best linear map"): (linear(z), latent),
                ("latents", "latent-inn"): (pipe.latent_inn(z.to(gamma), gamma, 2)[0], latent),
            }
        for key, (guess, wanted) in found.items():
            errors.setdefault(key, []).append(float((guess.float() - wanted).square().mean()))
    for (space, method), mse in errors.items():
        base = errors[space, "bicubic" if space == "pixels" else "E(bicubic)"]
        rows = [make_row(method, space, protocol.name, p.name, mse=e) for p, e in zip(pairs, mse, strict=True)]
        ratio = bootstrap_interval(list(zip(mse, base, strict=True)), statistic=ratio_of_sums)
        bench.add(rows, entry_of(rows[0], mse=bootstrap_interval(mse), mse_over_bicubic=ratio))
    _round_trips(bench, protocol, pairs)
    return ("mse", "mse_over_bicubic", "max_error")


def without_noise(pair: Pair) -> Tensor:
    """The same draw of the second-order recipe, with its blurs and resizes only."""
    return degrade(pair.clean[None], "random", sample_generator(0, pair.number), jpeg=False, noise=False)


def _linear_map(bench: Bench) -> Callable[[Tensor], Tensor]:
    """Least squares from the 16 polyphase parts of z to E(noise-free y), fitted on training images."""
    folder = bench.folder("train")
    names = [path.relative_to(folder).as_posix() for path in list_images(folder)]
    usable = [n for n in names if not n.startswith(EXCLUDED)][:: max(1, len(names) // bench.args.fit_images)]
    pairs = make_pairs(folder, Protocol("fit", "random", 32, "train", crop=256), usable, lambda x, generator: x)
    inputs, targets = [], []
    for pair in pairs:
        z = F.pixel_unshuffle(bench.prior.encode(pair.clean[None].to(bench.prior.device)), 4)
        target = bench.prior.encode(without_noise(pair).to(z))
        inputs.append(F.pad(z.flatten(2)[0].T, (0, 1), value=1.0).double())
        targets.append(target.flatten(2)[0].T.double())
    a, b = torch.cat(inputs), torch.cat(targets)
    ridge = 1e-4 * len(a) * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    weights = torch.linalg.solve(a.T @ a + ridge, a.T @ b).float()

    def predict(z: Tensor) -> Tensor:
        return F.conv2d(F.pixel_unshuffle(z, 4), weights[:-1].T[..., None, None], weights[-1])

    return predict


def _round_trips(bench: Bench, protocol: Protocol, pairs: Sequence[Pair]) -> None:
    """Largest |g⁻¹(g(u)) - u| of each image, for both networks, two precisions, J = 0, 1, 2; low..high = all images."""
    for name, inn in (("pixel-inn", bench.pipe.pixel_inn), ("latent-inn", bench.pipe.latent_inn)):
        for dtype in (torch.float32, torch.float64):
            if inn is None:
                continue
            net = copy.deepcopy(inn)
            net = net.double() if dtype == torch.float64 else net.float()
            errors: dict[int, list[float]] = {0: [], 1: [], 2: []}
            for pair in pairs:
                x = pair.clean[None].to(bench.prior.device)
                u = (bench.prior.encode(x) if name == "latent-inn" else x).to(dtype)
                gamma = bench.gamma(pair.y).to(dtype)
                for levels, found in errors.items():
                    found.append(float((net.inverse(*net(u, gamma, levels), gamma, levels) - u).abs().max()))
            for levels, found in errors.items():
                variant = f"round trip {str(dtype).removeprefix('torch.')} J={levels}"
                rows = [
                    make_row(name, variant, protocol.name, p.name, max_error=e)
                    for p, e in zip(pairs, found, strict=True)
                ]
                spread = Interval(sum(found) / len(found), min(found), max(found))
                bench.add(rows, entry_of(rows[0], max_error=spread))


def probe(bench: Bench) -> Sequence[str]:
    """What gamma knows: a linear probe of blur, noise and JPEG, and the error of the encoder's own estimate."""
    columns = [f"{kind}_{name}" for kind in ("r2", "mae") for name in DAMAGE]
    draws_by_name = {
        "joint": lambda generator, scale: _draw_all(generator, scale, 30.0, (30, 95)),
        "blur alone": lambda generator, scale: _draw_all(generator, scale, 5.0, (90, 100)),
        "training mixture": draw_training,
    }
    for variant, draw in draws_by_name.items():
        fit = Protocol(f"probe-fit-{variant}", variant, 4, "tune", seed=1, crop=256)
        held = Protocol(f"probe-{variant}", variant, 4, "val", seed=2)
        embedded = [_embed(bench, p, draw, draws) for p, draws in ((fit, 12), (held, 4))]
        (_, gamma, truth, _), (names, held_gamma, held_truth, estimate) = embedded
        mean, std = gamma.mean(0), gamma.std(0) + 1e-6
        a = F.pad((gamma - mean) / std, (0, 1), value=1.0)
        ridge = 1e-3 * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        probed = F.pad((held_gamma - mean) / std, (0, 1), value=1.0) @ torch.linalg.solve(a.T @ a + ridge, a.T @ truth)
        for method, guess in (("linear probe", probed), ("estimate()", estimate)):
            rows: list[Row] = []
            for name, true, said in zip(names, held_truth.tolist(), guess.tolist(), strict=True):
                values = dict(zip(DAMAGE, true, strict=True)) | {
                    f"{k}_said": v for k, v in zip(DAMAGE, said, strict=True)
                }
                rows.append(make_row(method, variant, held.name, name, **values))
            both = torch.stack([held_truth, guess], -1)  # (samples, damages, 2)
            # Draws of one image stay together: the bootstrap is over images.
            count = len({name.split("#")[0] for name in names})
            intervals: dict[str, Interval] = {}
            for k, name in enumerate(DAMAGE):
                intervals[f"r2_{name}"] = bootstrap_interval(both[:, k].reshape(count, -1).tolist(), statistic=_r2)
                error = (both[:, k, 1] - both[:, k, 0]).abs().reshape(count, -1).mean(1)
                intervals[f"mae_{name}"] = bootstrap_interval(error.tolist())
            bench.add(rows, entry_of(rows[0], **intervals))
    return columns


def _draw_all(generator: torch.Generator, scale: int, noise: float, quality: tuple[int, int]) -> Degradation:
    """Blur U[0.2, 3], noise U[0, `noise`]/255 and JPEG of a quality in `quality`, all three on."""
    blur, level = torch.rand(2, generator=generator).tolist()
    chosen = int(torch.randint(quality[0], quality[1] + 1, (), generator=generator))
    named = StandardDegradation("probe", scale, blur=0.2 + 2.8 * blur, noise=noise * level, quality=chosen)
    return named.params(generator)


def _r2(samples: Tensor) -> Tensor:
    """1 - Σ (truth - guess)² / Σ (truth - mean)² of (repeats, images, draws * 2)."""
    truth, guess = samples.unflatten(-1, (-1, 2)).flatten(1, 2).unbind(-1)
    spread = (truth - truth.mean(1, keepdim=True)).square().sum(1)
    return 1 - (truth - guess).square().sum(1) / spread


def _embed(
    bench: Bench, protocol: Protocol, draw: Callable[..., Any], draws: int
) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Names "image#draw", gamma, true damage and estimated damage of random degradations; noise in 8-bit levels."""
    names, gammas, truths, estimates = [], [], [], []
    units = torch.tensor([1.0, 255.0, 1.0], dtype=torch.float64)
    for pair in bench.pairs(protocol, lambda x, generator: x):
        for k in range(draws):
            generator = sample_generator(protocol.seed, pair.number, k)
            params = draw(generator, protocol.scale)
            gamma = bench.gamma(apply(pair.clean[None], params, generator, jpeg=pil_jpeg)[0])
            said = bench.pipe.degradation_encoder.estimate(gamma)
            names.append(f"{pair.name}#{k}")
            gammas.append(gamma[0].double().cpu())
            truths.append(torch.tensor(params.summary(), dtype=torch.float64) * units)
            estimates.append(torch.cat([said.blur, said.noise, said.jpeg]).double().cpu() * units)
    return names, torch.stack(gammas), torch.stack(truths), torch.stack(estimates)


def denoising(bench: Bench) -> Sequence[str]:
    """Error of the denoiser's estimate z_0, mean over coefficients, from latents of clean images at five noise levels.

    The level is sigma/sqrt(alpha² + sigma²), so that v-prediction and flow matching are asked the same questions.
    """
    protocol = Protocol("denoising", "none", 1, "tune", crop=192)
    pairs = bench.pairs(protocol, lambda x, generator: x)
    prior = bench.prior
    for strength in NOISE_LEVELS:
        trajectory = prior.trajectory(1, strength)
        alpha, sigma = trajectory.alpha_sigma(0)
        level = sigma / math.hypot(alpha, sigma)
        rows, errors = [], []
        for pair in pairs:
            z = prior.encode(pair.clean[None].to(prior.device))
            noise = torch.randn(z.shape, generator=sample_generator(3, pair.number)).to(z)
            z0 = trajectory.predict(alpha * z + sigma * noise, 0).z0
            errors.append(float((z0 - z).square().mean()))
            rows.append(make_row("denoiser", f"{strength:g}", protocol.name, pair.name, mse=errors[-1], level=level))
        entry = {"mse": bootstrap_interval(errors), "level": bootstrap_interval([level] * len(errors))}
        bench.add(rows, entry_of(rows[0], **entry))
    return ("level", "mse")
