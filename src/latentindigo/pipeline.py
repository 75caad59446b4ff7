"""`RestorationPipeline`: a degraded image in, restored images and maps of what was invented out.

One pass, in this order: plan the output grid, bring y to it, gamma = F(y), a start image, its latent, the sampling loop
(`latentindigo.sampler`), decode, colour correction against y, crop, map of invented detail.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from latentindigo.autoencoder import PatchAutoencoder
from latentindigo.canvas import (
    ImageInput,
    OnCanvas,
    Plan,
    centre_crop,
    free_memory,
    from_tensor,
    group_by_size,
    halved,
    is_out_of_memory,
    make_plan,
    output_size,
    overlapping,
    pad_to,
    tiling_for,
    tiling_from,
    to_coarse_grid,
    to_tensors,
)
from latentindigo.conditioning import Conditioning, PromptEmbeddings
from latentindigo.few_steps import SchedulerKind
from latentindigo.guidance import (
    DataTerm,
    GuidanceConfig,
    LatentINN,
    LearnedForward,
    LinearForward,
    PixelINN,
    Update,
    make_regulariser,
    trusted_target,
)
from latentindigo.operators import Operator
from latentindigo.pipeline_storage import ModelLoadError, StoredPipeline
from latentindigo.presets import Init, Method, Preset, blend_presets
from latentindigo.prior import Calls, LatentPrior
from latentindigo.prompts import Prompter, PromptTraits
from latentindigo.reach import reach_of
from latentindigo.sampler import restore_latent
from latentindigo.stages import Finish, Start, latent_tiles
from latentindigo.texture import draw_around, keep_texture, uneven
from latentindigo.tiled_guidance import TiledData, counted_once, simulate
from latentindigo.tiling import Tiles, TilingConfig

__all__ = ["ModelLoadError", "RestorationOutput", "RestorationPipeline"]

# Peak memory of a restoration above the loaded model, divided by its pixels: 470 to 600 were measured at 256² to 1024².
TILE_BYTES = 600
FOREIGN_TILE_BYTES = 10_000  # Stable Diffusion's autoencoder in float32, which is the hungriest part.
LARGEST_OVERLAP = 256  # Of tiles, in pixels, however far a network looks: the ramp hides what is left.
MOST_TILES_AT_ONCE = 16
MAX_SCALE = 8.0  # Of one pass; three levels reach a little further, more takes several passes.

StepEndCallback = Callable[["RestorationPipeline", int, int, dict[str, Tensor]], Any]


@dataclass
class RestorationOutput(BaseOutput):
    """What a restoration gives.

    Attributes:
        images: Restored images, sample by sample for each input: PIL images, arrays (H, W, 3) or tensors (3, H, W).
        detail_maps: Map of invented detail |x - g⁻¹(x_c, 0, gamma)| per image, (1, H, W) in [0, 1], mean over colours;
            [] if they were not asked for.
        uncertainty: Per-pixel standard deviation over the samples of each input, (1, H, W); None for one sample.
        settings: The call's settings with every default filled in; given back, they reproduce the output.
        calls: Counted network calls, "total" and those inside the sampling "loop".
    """

    images: list[Any]
    detail_maps: list[Tensor]
    uncertainty: list[Tensor] | None
    settings: dict[str, Any]
    calls: dict[str, dict[str, int]]


if TYPE_CHECKING:
    _Result = RestorationOutput  # To a type checker the usual case, or every caller would have to tell the two apart.
else:
    _Result = RestorationOutput | tuple


@dataclass(frozen=True)
class _Run:
    """Everything about a call that does not depend on the image."""

    preset: Preset
    operator: Operator | None
    tile: TilingConfig | None | Literal["auto"]
    callback: StepEndCallback | None
    conditioning: Conditioning | None = None
    scheduler: SchedulerKind | str = "model"
    mapped: bool = True


class RestorationPipeline(StoredPipeline):
    """Blind restoration by a latent diffusion model guided by an invertible network *(paper: LatentINDIGO)*.

    Args:
        vae: Autoencoder of the latent diffusion model.
        denoiser: Its denoiser.
        scheduler: Any one-evaluation-per-step scheduler of diffusers.
        estimator: Stage-one estimate, for init="estimator".
        degradation_encoder: F.
        pixel_inn: g in pixels; serves every latent diffusion model.
        latent_inn: g in the latent space of this autoencoder, or None.
        guidance_vae: Cheap autoencoder of the same latents (AutoencoderTiny) for guidance in pixels, or None.

    Attributes:
        conditioning: What a text-conditioned denoiser is told, None for the others; not saved with the model.
        text_folder: Folder with the text encoders that belong to the denoiser, None where there are none.
        init_model: Restorer that makes the stage-one estimate in the estimator's place, or None. It is no part of the
            model: neither saved with it nor in its hash.
        prompter: Makes embeddings of prompts for a text-conditioned denoiser, or None.
    """

    # ------------------------------------------------------------------------------------------------------- the call

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
        scale: float = 4.0,
        size: tuple[int, int] | None = None,
        *,
        crop: bool = False,
        preset: str = "default",
        method: Method | str | None = None,
        update: Update | str | None = None,
        init: Init | str | None = None,
        steps: int | None = None,
        strength: float | None = None,
        guidance: GuidanceConfig | dict[str, Any] | None = None,
        fidelity: float | None = None,
        operator: Operator | None = None,
        num_samples: int = 1,
        seed: int | Sequence[int] = 0,
        tile: Literal["auto"] | int | None = "auto",
        output_type: Literal["pil", "np", "pt"] | str = "pil",
        detail_maps: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        prompt: str | PromptEmbeddings | None = None,
        negative_prompt: str | PromptEmbeddings | None = None,
        guidance_scale: float | None = None,
        scheduler: SchedulerKind | str = "model",
        eta: float | None = None,
        residual: float | None = None,
        spread: float | None = None,
        texture: float | None = None,
        chroma: float | None = None,
        coarse: float | None = None,
        same_size: float | None = None,
        ensemble: int | None = None,
        return_dict: bool = True,
    ) -> _Result:
        """Restore one image, a batch, or a list of images of any sizes.

        Args:
            image: PIL image, (H, W, C) array (uint8, or float in [0, 1]), (B, 3, H, W) or (3, H, W) tensor in [0, 1],
                or a list of them.
            scale: Output size over input size; any positive number.
            size: (width, height) of the output instead of `scale`; the aspect is kept, the image fits inside.
            crop: With `size`, fill it and crop the rest.
            preset: "faithful", "default" or "vivid"; what follows overrides it, None = the preset's value.
            method: "latent-inn", "pixel-inn" or "unguided".
            update: "projection", "stopped" or "through".
            init: "estimator", "encode", "inverse" or "noise".
            steps: Denoiser evaluations.
            strength: Noise level sigma/sqrt(alpha² + sigma²) at the start; 1 = pure noise.
            guidance: Weights, steps, regulariser and refinement.
            fidelity: 0..1, moves between "vivid" and "faithful" and replaces the preset's numbers.
            operator: None = blind; a `latentindigo.operators` object = the known degradation, which replaces the
                coarse branch (pixel guidance only).
            num_samples: Samples per image; sample k uses seed + k.
            seed: One seed for all images, or one per image.
            tile: "auto", the side of a tile in output pixels, or None to never tile.
            output_type: "pil", "np" or "pt".
            detail_maps: Whether maps of invented detail are made; without them a restoration is an eighth faster.
            callback_on_step_end: Called as f(pipe, step, timestep, {"latents": z_t, "z0": z0}) after each step; what
                it raises ends the call.
            prompt: For text-conditioned priors: words or embeddings. None = the prior's default, "" = the empty prompt
                without classifier-free guidance.
            negative_prompt: What classifier-free guidance moves away from; None = the prior's default.
            guidance_scale: Strength of classifier-free guidance, at least 1 = the prompt alone.
            scheduler: "model" = the saved one, or "ddim", "dpm++", "unipc", "euler", "lcm" on its noise levels.
            eta: Share of fresh noise in each step, for schedulers that know it.
            residual: Share of what the autoencoder lost of the start image that is added back, 0..1.
            spread: Share of the stage-one estimate's uncertainty that is drawn before sampling, 0..1.
            texture: Share of what sampling changed about the start image that is kept, 0..2.
            chroma: Share of what it changed about the colours that is kept, 0..1.
            coarse: Share of what it changed where the input itself shows the image that is kept, 0..1.
            same_size: Factor on `texture` where the output is about as large as the input, 0..1.
            ensemble: Views of y (flipped, transposed) over which the stage-one estimate is averaged, 1..8.
            return_dict: False gives a plain tuple of the output's five fields, in their order.

        Returns:
            Images, maps of invented detail, uncertainty, and the settings used.

        Raises:
            ValueError: For images or settings that do not fit; the message says what was expected.
        """
        images, is_grey = to_tensors(image)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        seeds = [seed] * len(images) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(images):
            raise ValueError(f"one seed, or one per image, expected: got {len(seeds)} seeds for {len(images)} images")
        chosen = self._resolve(
            preset, fidelity, operator, method=method, update=update, init=init, steps=steps, strength=strength,
            guidance=guidance, eta=eta, residual=residual, spread=spread, texture=texture,
            chroma=chroma, coarse=coarse, same_size=same_size, ensemble=ensemble,
        )  # fmt: skip
        conditioning, told = self._tell(prompt, negative_prompt, guidance_scale, few_steps=scheduler == "lcm")
        run = _Run(chosen, operator, tiling_from(tile), callback_on_step_end, conditioning, scheduler, detail_maps)
        jobs = [(k, s + n) for k, s in enumerate(seeds) for n in range(num_samples)]
        restored: list[Tensor] = [torch.empty(0)] * len(jobs)
        maps: list[Tensor] = [torch.empty(0)] * len(jobs)
        calls, loop_calls = Calls(), Calls()
        # An operator's pseudo-inverse is damped by one noise level, so its images go one by one.
        groups = group_by_size(jobs, images, scale, size) if operator is None else [[n] for n in range(len(jobs))]
        try:
            for group in groups:
                batch = torch.stack([images[jobs[n][0]] for n in group])
                target = output_size(batch.shape[-1], batch.shape[-2], scale, size, crop)
                outputs = self._restore(batch, target, [jobs[n][1] for n in group], run, calls, loop_calls)
                for n, x, detail in zip(group, *outputs, strict=True):
                    restored[n], maps[n] = (centre_crop(t, size) if crop and size else t for t in (x, detail))
        finally:
            self.maybe_free_model_hooks()  # Offloaded networks go back to the CPU, the last one and after errors too.
        uncertainty = None
        if num_samples > 1:
            samples = [torch.stack(restored[k : k + num_samples]) for k in range(0, len(jobs), num_samples)]
            uncertainty = [s.std(0).mean(0, keepdim=True) for s in samples]
        settings: dict[str, Any] = {
            "scale": float(scale), "size": size, "crop": crop, "preset": preset, "fidelity": fidelity,
            "operator": operator, "num_samples": num_samples, "seed": seed if isinstance(seed, int) else seeds,
            "tile": tile, "scheduler": scheduler, **told, **dataclasses.asdict(chosen),
        }  # fmt: skip
        grey = [is_grey[k] for k, _ in jobs]
        output = RestorationOutput(
            images=[from_tensor(x, output_type, g) for x, g in zip(restored, grey, strict=True)],
            detail_maps=maps if detail_maps else [],
            uncertainty=uncertainty,
            settings=settings,
            calls={"total": dataclasses.asdict(calls), "loop": dataclasses.asdict(loop_calls)},
        )
        # Not `to_tuple`, which leaves out what is None and moves the rest.
        if not return_dict:
            plain: Any = tuple(getattr(output, field.name) for field in dataclasses.fields(output))
            return plain
        return output

    def _tell(
        self,
        prompt: str | PromptEmbeddings | None,
        negative_prompt: str | PromptEmbeddings | None,
        guidance_scale: float | None,
        *,
        few_steps: bool,
    ) -> tuple[Conditioning | None, dict[str, Any]]:
        """What the denoiser is told, and the settings that say so; text encoders are gone when this returns."""
        told = {"prompt": prompt, "negative_prompt": negative_prompt, "guidance_scale": guidance_scale}
        silent = all(value is None for value in told.values())
        capabilities = self._build_prior().capabilities
        if capabilities.token_width is None:
            if not silent:
                given = ", ".join(name for name, value in told.items() if value is not None)
                raise ValueError(
                    f"{given}: this model's denoiser takes no text; leave it out, or load a prior that does"
                )
            return None, told
        mine = self.conditioning
        if silent and mine is not None:
            told = {"prompt": mine.positive, "negative_prompt": mine.negative, "guidance_scale": mine.guidance_scale}
            return mine, told
        traits = PromptTraits(embedded_scale=capabilities.distilled_guidance)
        prompter = self.prompter or Prompter(None, traits=traits)
        choice = prompter.choose(prompt, negative_prompt, guidance_scale, few_steps=few_steps)
        return prompter.conditioning(choice, self._execution_device), vars(choice)

    def _resolve(self, preset: str, fidelity: float | None, operator: Operator | None, **overrides: Any) -> Preset:
        """The preset with everything that overrides it."""
        if preset not in self.presets:
            raise ValueError(f"preset must be one of {', '.join(self.presets)}, got {preset!r}")
        base = self.presets[preset]
        if fidelity is not None:
            base = blend_presets(self.presets["vivid"], self.presets["faithful"], fidelity)
        if isinstance(overrides.get("guidance"), dict):
            overrides["guidance"] = GuidanceConfig(**overrides["guidance"])
        given = {name: value for name, value in overrides.items() if value is not None}
        if operator is not None:
            if given.setdefault("method", "pixel-inn") == "latent-inn":
                raise ValueError("a known operator acts on pixels; use method='pixel-inn' or 'unguided' with it")
            given.setdefault("update", "projection")
        chosen = dataclasses.replace(base, **given)
        if chosen.method == "latent-inn" and self.latent_inn is None:
            if overrides.get("method") is not None:
                raise ValueError("this model has no latent INN; use method='pixel-inn', or train one")
            chosen = dataclasses.replace(chosen, method="pixel-inn")
        if chosen.init == "estimator" and self.estimator is None and self.init_model is None:
            chosen = dataclasses.replace(chosen, init="encode")
        return chosen

    @torch.no_grad()
    def _restore(
        self, y: Tensor, target: tuple[int, int], seeds: Sequence[int], run: _Run, calls: Calls, loop_calls: Calls
    ) -> tuple[Tensor, Tensor]:
        """Restore a batch of images of one size; passes of at most x8, each from the last one's output."""
        operator = run.operator
        while operator is None and max(target[0] / y.shape[-1], target[1] / y.shape[-2]) > MAX_SCALE * math.sqrt(2):
            unmapped = dataclasses.replace(run, mapped=False)
            y, _ = self._fitting_pass(y, (4 * y.shape[-1], 4 * y.shape[-2]), seeds, unmapped, calls, loop_calls)
            y = y.float()
        return self._fitting_pass(y, target, seeds, run, calls, loop_calls)

    def _fitting_pass(
        self, y: Tensor, target: tuple[int, int], seeds: Sequence[int], run: _Run, calls: Calls, loop_calls: Calls
    ) -> tuple[Tensor, Tensor]:
        """One pass, and if memory runs out the same with tiles of half the side."""
        while True:
            counted = copy.copy(calls), copy.copy(loop_calls)
            try:
                return self._pass(y, target, seeds, run, calls, loop_calls)
            except (MemoryError, RuntimeError) as error:
                smaller = halved(run.tile, target[0] * target[1])
                if not is_out_of_memory(error) or smaller is None:
                    raise
            # Outside the handler: the error's traceback holds on to the tensors that filled the memory.
            for kept, counter in zip(counted, (calls, loop_calls), strict=True):
                vars(counter).update(vars(kept))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"memory ran out; going on with tiles of {smaller.tile} pixels. Give --tile {smaller.tile} to begin "
                "with them",
                stacklevel=4,
            )
            run = dataclasses.replace(run, tile=smaller)

    def _pass(
        self, y: Tensor, target: tuple[int, int], seeds: Sequence[int], run: _Run, calls: Calls, loop_calls: Calls
    ) -> tuple[Tensor, Tensor]:
        """One pass: a batch (B, 3, h, w) to images (B, 3, H, W) and maps of invented detail (B, 1, H, W)."""
        device = self._execution_device
        settings, operator = run.preset, run.operator
        prior = self._build_prior(run.conditioning, run.scheduler).counting(calls)
        plan = make_plan(y.shape[-1], y.shape[-2], target, prior.downsampling, prior.size_multiple, operator)
        cost = self._cost(plan, settings)
        tiling = tiling_for(run.tile, plan.pixels, free_memory(device), cost)
        if tiling is not None:
            tiling = overlapping(tiling.tile, self._overlap(prior, tiling), prior.size_multiple)
            prior = prior.tiled(tiling, self._tiles_at_once(tiling, cost, prior.device))
        # A known operator acts on the whole image; tiles of everything else stay off the device until their turn.
        tiles = latent_tiles(prior, plan, tiling if operator is None else None)
        y = y if len(tiles) > 1 else y.to(device)
        # Holes and known blur are no unknown damage: gamma describes what the operator does not explain.
        coarse = to_coarse_grid(y, target, plan) if operator is None else operator.initial(y)
        gamma = self.degradation_encoder(coarse).to(device)
        noise = self.degradation_encoder.estimate(gamma).noise.float()
        gamma = gamma.to(self.pixel_inn.dtype)
        padded = y if operator is not None else pad_to(coarse, plan.padded_width, plan.padded_height)
        if operator is None:
            begin = Start(self.estimator, self.pixel_inn, device, self.init_model)(
                padded, gamma, plan, settings, tiling
            )
        else:
            begin = pad_to(operator.initial(y), plan.padded_width, plan.padded_height).clamp(0, 1)
        start = prior.encode(begin)
        data = self._data_term(prior, padded, (begin, start), gamma, noise, plan, settings, operator, tiles)
        measured = None
        if operator is not None and data is not None:
            # What was measured is kept to the pixel; only the rest is the prior's.
            measured = partial(OnCanvas(operator, plan).project, y=y, noise=float(noise.mean()))
        spread = self._spread(start, gamma, settings, operator, tiles)
        z = self._sample(prior, start, data, spread, plan, run, seeds, loop_calls)
        del data, spread  # Each as large as the latent; the finish has tiles of the picture to hold.
        blind, inn = operator is None, self.pixel_inn
        finish = Finish(prior, inn, gamma, plan.levels, settings, blind, tiles, device, measured, run.mapped)
        x, detail = finish(z, start, begin, padded)
        return x[..., : plan.height, : plan.width].cpu(), detail[..., : plan.height, : plan.width].cpu()

    def _sample(
        self,
        prior: LatentPrior,
        start: Tensor,
        data: DataTerm | None,
        spread: Tensor | None,
        plan: Plan,
        run: _Run,
        seeds: Sequence[int],
        loop_calls: Calls,
    ) -> Tensor:
        """The sampled latent; what sampling alone needs is free again when it returns."""
        settings, calls = run.preset, prior.calls
        strength = 1.0 if settings.init == "noise" else settings.strength
        trajectory = prior.trajectory(
            settings.steps, strength, eta=settings.eta, latent_size=(start.shape[-2], start.shape[-1])
        )
        generators = [torch.Generator().manual_seed(s) for s in seeds]

        def on_step(i: int, z_t: Tensor, z0: Tensor) -> None:
            bar.update()
            if run.callback is not None:
                run.callback(self, i, int(trajectory.timesteps[i]), {"latents": z_t, "z0": z0})

        before = copy.copy(calls)
        regulariser = make_regulariser(settings.guidance, prior)
        seeded = draw_around(start, spread, settings.spread, generators)
        progress: Any = self.progress_bar  # Its parameters have no hints, so that one of them seems to be required.
        with progress(total=settings.steps) as bar:
            z = restore_latent(trajectory, seeded, data, settings.update, regulariser, generators, on_step)
        for hook in getattr(self, "_all_hooks", ()):  # Of model offload: decoding needs the denoiser's place.
            if hook.model is self.denoiser:
                hook.offload()
        for name, value in dataclasses.asdict(calls).items():
            setattr(loop_calls, name, getattr(loop_calls, name) + value - getattr(before, name))
        if settings.init == "noise":
            return z
        return keep_texture(z, start, spread, settings.texture * (1.0 if plan.levels else settings.same_size))

    def _overlap(self, prior: LatentPrior, tiling: TilingConfig) -> float:
        """Pixels that tiles must overlap by: known for the embedded networks, measured for others, once."""
        if isinstance(self.vae, PatchAutoencoder):
            return tiling.overlap
        networks = id(self.vae), id(self.denoiser)
        if self._reach is None or self._reach[0] != networks:
            self._reach = networks, _measured_reach(prior)
        return max(tiling.overlap, min(LARGEST_OVERLAP, self._reach[1]))

    def _tiles_at_once(self, tiling: TilingConfig, cost: int, device: torch.device) -> int:
        """Tiles in one pass of a network: one on a CPU, which is busy with it; as many as fit on an accelerator."""
        if device.type == "cpu":
            return 1
        free = free_memory(device)
        fitting = 0.25 * free / (cost * tiling.tile**2) if math.isfinite(free) else 1
        return max(1, min(MOST_TILES_AT_ONCE, int(fitting)))

    def _cost(self, plan: Plan, settings: Preset) -> int:
        """Bytes of working memory for each pixel of a tile."""
        cost = TILE_BYTES if isinstance(self.vae, PatchAutoencoder) else FOREIGN_TILE_BYTES
        if self.init_model is not None and settings.init == "estimator":
            cost = max(cost, self.init_model.cost(plan.levels))
        return cost

    def _spread(
        self, start: Tensor, gamma: Tensor, settings: Preset, operator: Operator | None, tiles: Tiles
    ) -> Tensor | None:
        """How far the latent of the stage-one estimate is likely to lie from the truth, None where nothing tells."""
        blind_estimate = operator is None and settings.init == "estimator" and self.estimator is not None
        # It was learned for the errors of our estimator, and says nothing about another model's.
        ours = blind_estimate and self.init_model is None
        if not ours or self.latent_inn is None or not self.latent_inn.has_spread:
            return None
        fusion = tiles.fusion()
        for tile in tiles:
            fusion.add(tile, self.latent_inn.spread(tile.cut(start), gamma.to(self.latent_inn.dtype)))
        return uneven(fusion.result())

    def _data_term(
        self,
        prior: LatentPrior,
        y: Tensor,
        begin: tuple[Tensor, Tensor],
        gamma: Tensor,
        noise: Tensor,
        plan: Plan,
        settings: Preset,
        operator: Operator | None,
        tiles: Tiles,
    ) -> DataTerm | None:
        """PixelINN, LatentINN, the known operator, or nothing."""
        if settings.method == "unguided":
            return None
        calls, factor = prior.calls, 2**plan.levels
        guidance = dataclasses.replace(settings.guidance, every_k=min(settings.guidance.every_k, settings.steps))

        def count(passes: int) -> None:
            calls.inn += passes

        lr = settings.guidance.refine_lr if settings.guidance.refine else None
        if operator is not None:
            model = LinearForward(OnCanvas(operator, plan), float(noise.mean()))
            return PixelINN(prior.for_guidance(), model, y, plan.pixels, guidance, noise)
        variance, shrink = noise.square()[:, None, None, None], settings.guidance.shrink
        gain = _noise_gain(prior)
        if settings.method == "latent-inn" and self.latent_inn is not None:
            model = LearnedForward(self.latent_inn, gamma.to(self.latent_inn.dtype), plan.levels, lr, count)
            with counted_once(calls, tiles):
                simulated = simulate(model, begin[1], tiles, 1, factor, begin[1])
            target = trusted_target(prior.encode(y), simulated, variance * gain, shrink)
            data = LatentINN(prior, model, target, plan.pixels, guidance, noise)
        else:
            model = LearnedForward(self.pixel_inn, gamma, plan.levels, lr, count)
            with counted_once(calls, tiles):
                simulated = simulate(model, begin[0], tiles, prior.downsampling, factor, gamma)
            target = trusted_target(y.to(simulated), simulated, variance, shrink)
            unit = float(gain.mean().sqrt())
            data = PixelINN(prior.for_guidance(), model, target, plan.pixels, guidance, noise, unit)
        return data if len(tiles) == 1 else TiledData(data, tiles, plan.levels)


def _measured_reach(prior: LatentPrior) -> float:
    """The farthest that encoder, denoiser and decoder look, in pixels, on a canvas of 64 latent cells."""
    prior = prior.tiled(None).counting(Calls())
    generator, side = torch.Generator().manual_seed(0), 64
    z = torch.randn((1, prior.latent_channels, side, side), generator=generator).to(prior.device)
    x = torch.rand((1, 3, side * prior.downsampling, side * prior.downsampling), generator=generator).to(prior.device)
    trajectory = prior.trajectory(2, 0.5, latent_size=(side, side))
    return max(
        reach_of(prior.encode, x),
        prior.downsampling * reach_of(prior.decode, z),
        prior.downsampling * reach_of(lambda z_t: trajectory.predict(z_t, 1).z0, z),
    )


def _noise_gain(prior: LatentPrior) -> Tensor:
    """Variance per latent channel that the encoder makes of white pixel noise of variance 1, (1, c, 1, 1)."""
    side = max(64, 4 * prior.downsampling)
    grey = torch.full((1, 3, side, side), 0.5)
    step = 0.02  # Noise of 5/255: the encoder is nearly linear in it.
    noise = torch.randn(grey.shape, generator=torch.Generator().manual_seed(0))
    response = prior.encode((grey + step * noise).to(prior.device)) - prior.encode(grey.to(prior.device))
    return response.var((-2, -1), keepdim=True) / step**2
