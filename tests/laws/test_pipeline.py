"""Laws of the pipeline, each with a planted defect that breaks it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import latentindigo.pipeline as pipeline_module
import latentindigo.stages as stages_module
from latentindigo.canvas import free_memory, halved, tiling_for
from latentindigo.guidance import DataTerm, LatentINN, LearnedForward
from latentindigo.pipeline import RestorationPipeline
from latentindigo.prior import LatentPrior, in_full_precision
from latentindigo.texture import uneven
from latentindigo.tiling import TilingConfig
from tiny import tiny_pipeline as build_pipeline
from tolerances import TOL, assert_close

Restore = Callable[..., Any]

FAST: dict[str, Any] = {"steps": 2, "output_type": "pt"}
METHODS = [("latent-inn", "projection"), ("latent-inn", "stopped"), ("latent-inn", "through")]
METHODS += [("pixel-inn", "projection"), ("pixel-inn", "stopped"), ("pixel-inn", "through"), ("unguided", "stopped")]


def photo(height: int = 12, width: int = 10, seed: int = 0) -> Tensor:
    """A smooth random picture, (3, H, W) in [0, 1]."""
    noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)


# --- image alone = image in a batch ----------------------------------------------------------------------------------


def check_alone_is_batch(restore: Restore, **settings: Any) -> None:
    """An image's result does not depend on what it is restored with."""
    images = [photo(seed=1), photo(seed=2), photo(seed=3)]
    together = restore(images, **settings).images
    for k, image in enumerate(images):
        assert_close(together[k], restore(image, **settings).images[0])


@pytest.mark.parametrize(("method", "update"), METHODS)
def test_alone_is_batch(tiny_pipeline: RestorationPipeline, method: str, update: str) -> None:
    check_alone_is_batch(tiny_pipeline, scale=2, method=method, update=update, **FAST)


def test_alone_is_batch_when_refined_and_noisy(tiny_pipeline: RestorationPipeline) -> None:
    guidance: dict[str, Any] = {"refine": True, "refine_lr": 1e-2, "beta": 0.8, "regulariser": "renoise"}
    check_alone_is_batch(tiny_pipeline, scale=2, guidance=guidance, eta=0.7, **FAST)


def test_alone_is_batch_catches_a_norm_over_the_batch(
    tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def norm_of_the_batch(self: DataTerm, residual: Tensor) -> Tensor:
        return residual.square().sum().sqrt().expand(len(residual))

    monkeypatch.setattr(DataTerm, "_norm", norm_of_the_batch)
    settings: dict[str, Any] = {"scale": 2, "update": "stopped", "guidance": {"zeta": 50.0}, **FAST}
    with pytest.raises(AssertionError):
        check_alone_is_batch(tiny_pipeline, **settings)


def test_alone_is_batch_catches_shared_refinement(
    tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LearnedForward.__init__

    def share_the_copy(self: LearnedForward, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._private = [self._private[0]] * len(self._private)
        self._optimizers = [torch.optim.Adam(self._private[0].parameters(), lr=0.1)] * len(self._private)

    monkeypatch.setattr(LearnedForward, "__init__", share_the_copy)
    settings: dict[str, Any] = {
        "scale": 2,
        "guidance": {"refine": True, "refine_lr": 0.1, "beta": 1.0, "noise_weight": 0.0},
        **FAST,
    }
    with pytest.raises(AssertionError):
        check_alone_is_batch(tiny_pipeline, **settings)


# --- same seed, same bytes -------------------------------------------------------------------------------------------


def check_reproducible(restore: Restore) -> None:
    """One seed gives one result, and another seed another one."""
    settings: dict[str, Any] = {"scale": 2, "strength": 0.8, **FAST}
    first, again = (restore(photo(), seed=7, **settings).images[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, restore(photo(), seed=8, **settings).images[0])
    assert not torch.equal(
        restore(photo(), seed=0, **settings).images[0], restore(photo(), seed=1, **settings).images[0]
    )


def test_reproducible(tiny_pipeline: RestorationPipeline) -> None:
    check_reproducible(tiny_pipeline)


def test_reproducible_catches_global_noise(tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentindigo.sampler.draw_noise", lambda like, generators: torch.randn_like(like))
    with pytest.raises(AssertionError):
        check_reproducible(tiny_pipeline)


def test_reproducible_catches_an_ignored_seed(
    tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sampler", "texture"):
        monkeypatch.setattr(f"latentindigo.{module}.draw_noise", lambda like, generators: torch.ones_like(like))
    with pytest.raises(AssertionError):
        check_reproducible(tiny_pipeline)


def test_sample_k_uses_seed_plus_k(tiny_pipeline: RestorationPipeline) -> None:
    settings: dict[str, Any] = {"scale": 2, "strength": 0.8, **FAST}
    samples = tiny_pipeline(photo(), num_samples=3, seed=5, **settings)
    for k in range(3):
        assert_close(samples.images[k], tiny_pipeline(photo(), seed=5 + k, **settings).images[0])
    assert samples.uncertainty is not None
    expected = torch.stack(samples.images).std(0).mean(0, keepdim=True)
    assert_close(samples.uncertainty[0], expected)
    assert float(expected.max()) > 0


def test_one_seed_per_image(tiny_pipeline: RestorationPipeline) -> None:
    settings: dict[str, Any] = {"scale": 2, "strength": 0.8, **FAST}
    both = tiny_pipeline([photo(), photo()], seed=[3, 4], **settings).images
    assert_close(both[1], tiny_pipeline(photo(), seed=4, **settings).images[0])
    assert not torch.equal(both[0], both[1])


# --- calling never changes the pipeline ------------------------------------------------------------------------------

REFINED = {"scale": 2, "guidance": {"refine": True, "refine_lr": 1e-2}, **FAST}


def check_unchanged(pipe: RestorationPipeline) -> None:
    """All weights are the same after a refined call."""
    before = pipe.weights_hash()
    for method in ("latent-inn", "pixel-inn"):
        pipe(photo(), method=method, **REFINED)
    assert pipe.weights_hash() == before


def test_unchanged_by_a_refined_call(tiny_pipeline: RestorationPipeline) -> None:
    check_unchanged(tiny_pipeline)


def test_unchanged_catches_refinement_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentindigo.guidance.private_copy", lambda network: network)
    with pytest.raises(AssertionError):
        check_unchanged(build_pipeline())


def test_hash_sees_every_weight() -> None:
    pipe = build_pipeline()
    before = pipe.weights_hash()
    with torch.no_grad():
        weight = next(iter(pipe.estimator.parameters()))
        weight[(0,) * weight.ndim] += 1e-6
    assert pipe.weights_hash() != before


def check_threads(pipe: RestorationPipeline) -> None:
    """Two threads at once give the pixels of two runs in turn."""
    settings: dict[str, Any] = {"scale": 2, "steps": 6, "output_type": "pt", "strength": 0.8}
    pictures = [photo(seed=1), photo(seed=2)]
    in_turn = [pipe(p, **settings).images[0] for p in pictures]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            at_once = list(pool.map(lambda p: pipe(p, **settings).images[0], pictures))
        for a, b in zip(at_once, in_turn, strict=True):
            assert torch.equal(a, b)


def test_threads(tiny_pipeline: RestorationPipeline) -> None:
    check_threads(tiny_pipeline)


def test_threads_catches_a_shared_target(tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    # The defect: the last target anyone set is everyone's, as if guidance kept it on the shared pipeline.
    original = LatentINN.__init__
    shared: dict[str, Tensor] = {}

    def remember(self: LatentINN, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        shared["target"] = self.target

    monkeypatch.setattr(LatentINN, "__init__", remember)
    everyones = property(lambda self: shared["target"], lambda self, value: shared.update(target=value))
    monkeypatch.setattr(LatentINN, "target", everyones, raising=False)
    with pytest.raises(AssertionError):
        for _ in range(20):  # A race: give the threads a chance to meet.
            check_threads(tiny_pipeline)


# --- what sampling changed is kept in part; the estimate's uncertainty is drawn -------------------------------------


def check_texture(restore: Restore) -> None:
    """Texture 0 is the start image whatever was sampled; a half lies half way, for a linear decoder nearly exactly."""
    settings: dict[str, Any] = {"scale": 2, "strength": 0.5, "residual": 1.0, **FAST}
    none, half, full = (restore(photo(), texture=share, **settings).images[0] for share in (0.0, 0.5, 1.0))
    other = restore(photo(), texture=0.0, **{**settings, "strength": 0.9}, seed=5).images[0]
    assert_close(other, none)
    assert float((full - none).abs().mean()) > 0.003
    # The tiny autoencoder is not linear, and pixels are clamped.
    assert float((half - (none + full) / 2).abs().mean()) < 0.25 * float((full - none).abs().mean())


def check_chroma(restore: Restore) -> None:
    """Without its share of colour a sample changes brightness only, and by as much as before."""
    settings: dict[str, Any] = {"scale": 2, "strength": 0.5, "spread": 1.0, "residual": 1.0, **FAST}
    # Away from black and white, where clamping bends colours, and small changes for the same reason.
    dull = 0.5 + 0.2 * (photo() - 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "wavelet_color_fix", lambda x, reference: x)
        start, whole, grey = (
            restore(dull, texture=share, chroma=chroma, **settings).images[0]
            for share, chroma in ((0.0, 1.0), (0.1, 1.0), (0.1, 0.0))
        )
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    change = ((whole - start) * luma).sum(0)
    assert float(change.abs().mean()) > 1e-3
    assert_close(grey - start, change.expand(3, -1, -1), torch.float32)


def test_colours_change_by_a_share(tiny_pipeline: RestorationPipeline) -> None:
    check_chroma(tiny_pipeline)


def test_colours_that_change_are_found(tiny_pipeline: RestorationPipeline) -> None:
    with pytest.raises(AssertionError):
        check_chroma(lambda image, chroma, **settings: tiny_pipeline(image, **settings))


def test_texture_is_a_share(tiny_pipeline: RestorationPipeline) -> None:
    check_texture(tiny_pipeline)


def test_texture_catches_a_share_that_is_ignored(tiny_pipeline: RestorationPipeline) -> None:
    with pytest.raises(AssertionError):
        check_texture(lambda image, texture, **settings: tiny_pipeline(image, **settings))


def check_same_size(restore: Restore) -> None:
    """At scale 1 the factor counts, at scale 2 it does not."""
    settings: dict[str, Any] = {"strength": 0.5, "spread": 1.0, **FAST}
    whole, half, factor = (
        restore(photo(), scale=1, texture=share, same_size=same, **settings).images[0]
        for share, same in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5))
    )
    assert float((whole - half).abs().mean()) > 1e-3
    assert_close(factor, half)
    larger = [restore(photo(), scale=2, texture=1.0, same_size=same, **settings).images[0] for same in (0.5, 1.0)]
    assert_close(*larger)


def test_less_texture_at_the_same_size(tiny_pipeline: RestorationPipeline) -> None:
    check_same_size(tiny_pipeline)


def test_texture_that_ignores_the_size_is_found(tiny_pipeline: RestorationPipeline) -> None:
    with pytest.raises(AssertionError):
        check_same_size(lambda image, same_size, **settings: tiny_pipeline(image, **settings))
    with pytest.raises(AssertionError):
        check_same_size(
            lambda image, texture, same_size, **settings: tiny_pipeline(image, texture=texture * same_size, **settings)
        )


def check_spread(pipe: RestorationPipeline) -> None:
    """Before sampling, each coefficient departs from the estimate by the standard deviation that the network tells."""
    seen: list[Tensor] = []
    inner = pipeline_module.restore_latent

    def watch(trajectory: Any, start: Tensor, *rest: Any) -> Tensor:
        seen.append(start)
        return inner(trajectory, start, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_module, "restore_latent", watch)
        for k, share in enumerate([0.0] + [0.5] * 64):
            pipe(photo(), scale=2, spread=share, seed=k, **FAST)
    mean, draws = seen[0], torch.stack(seen[1:])
    gamma = pipe.degradation_encoder(photo()[None])
    told = 0.5 * uneven(pipe.latent_inn.spread(mean, gamma))
    found = (draws - mean).square().mean(0).sqrt()
    assert float((found / told - 1).square().mean().sqrt()) < 0.15  # 64 draws: 1/sqrt(128) = 0.09
    # Every image's own generator draws, one after another: no two alike.
    assert not torch.equal(draws[0], draws[1])


def test_the_spread_is_drawn(tiny_pipeline: RestorationPipeline) -> None:
    check_spread(tiny_pipeline)


def test_a_spread_of_one_size_is_found(tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = pipeline_module.draw_around

    def flat(start: Tensor, *rest: Any) -> Tensor:
        moved = inner(start, *rest) - start
        return start + moved.sign() * moved.abs().mean()

    monkeypatch.setattr(pipeline_module, "draw_around", flat)
    with pytest.raises(AssertionError):
        check_spread(tiny_pipeline)


def test_alone_is_batch_with_spread(tiny_pipeline: RestorationPipeline) -> None:
    check_alone_is_batch(tiny_pipeline, scale=2, spread=0.7, texture=0.6, chroma=0.5, coarse=0.5, ensemble=3, **FAST)


# --- save -> load -> same output; settings reproduce -----------------------------------------------------------------


def check_round_trip(pipe: RestorationPipeline, folder: Path) -> None:
    """A saved and loaded pipeline gives the same pixels."""
    pipe.save_pretrained(folder)
    loaded = RestorationPipeline.from_pretrained(folder)
    for method in ("latent-inn", "pixel-inn"):
        settings: dict[str, Any] = {"scale": 2, "method": method, **FAST}
        assert_close(loaded(photo(), **settings).images[0], pipe(photo(), **settings).images[0])
    assert loaded.presets == pipe.presets


def test_save_and_load(tiny_pipeline: RestorationPipeline, tmp_path: Path) -> None:
    check_round_trip(tiny_pipeline, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]


def test_save_and_load_catches_a_lost_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build_pipeline()
    broken = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in broken.latent_inn.steps.parameters():
            parameter.zero_()
    monkeypatch.setattr(pipe, "save_pretrained", broken.save_pretrained)
    with pytest.raises(AssertionError):
        check_round_trip(pipe, tmp_path)


def check_settings_reproduce(restore: Restore) -> None:
    """`settings`, given back, give the output back."""
    calls: list[dict[str, Any]] = [
        {"preset": "vivid", "scale": 2.0},
        {"fidelity": 0.3, "scale": 3.0, "guidance": {"beta": 0.7}},
        {"size": (20, 20), "crop": True, "method": "pixel-inn", "update": "stopped", "seed": 4},
    ]
    for call in calls:
        first = restore(photo(), output_type="pt", **{"steps": 2, **call})
        again = restore(photo(), output_type="pt", **first.settings)
        assert torch.equal(first.images[0], again.images[0])


def test_settings_reproduce(tiny_pipeline: RestorationPipeline) -> None:
    check_settings_reproduce(tiny_pipeline)


def test_settings_reproduce_catches_a_forgotten_setting(tiny_pipeline: RestorationPipeline) -> None:
    def forgetful(*args: Any, **kwargs: Any) -> Any:
        output = tiny_pipeline(*args, **kwargs)
        output.settings.pop("guidance")
        return output

    with pytest.raises(AssertionError):
        check_settings_reproduce(forgetful)


# --- LatentINN never decodes in the loop -----------------------------------------------------------------------------


def check_no_decoding(pipe: RestorationPipeline, update: str) -> None:
    """Inside the loop LatentINN calls the denoiser and the INN, and neither decoder nor encoder."""
    loop = pipe(photo(), scale=4, method="latent-inn", update=update, **FAST).calls["loop"]
    assert loop["denoiser"] == 2
    assert loop["inn"] > 0
    assert loop["decoder"] == loop["encoder"] == loop["decoder_backward"] == 0
    assert loop["denoiser_backward"] == (2 if update == "through" else 0)


@pytest.mark.parametrize("update", ["projection", "stopped", "through"])
def test_latent_inn_never_decodes_in_the_loop(tiny_pipeline: RestorationPipeline, update: str) -> None:
    for preset in tiny_pipeline.presets.values():
        assert preset.guidance.regulariser not in ("consistency", "gluing")
    check_no_decoding(tiny_pipeline, update)


def test_no_decoding_catches_one_decode(tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_once_too_often(self: LatentINN, z0: Tensor) -> Tensor:
        self.prior.decode(z0)
        return z0

    monkeypatch.setattr(LatentINN, "open", decode_once_too_often)
    with pytest.raises(AssertionError):
        check_no_decoding(tiny_pipeline, "projection")


# --- geometry --------------------------------------------------------------------------------------------------------


def check_no_shift(restore: Restore, scale: float) -> None:
    """A picture with a left-right and top-bottom symmetry keeps its centre of mass at any scale."""
    height, width = 23, 31
    rows = torch.linspace(-1, 1, height)[:, None]
    columns = torch.linspace(-1, 1, width)[None, :]
    spot = torch.exp(-4 * (rows**2 + columns**2)).expand(3, -1, -1)
    x = restore(spot, scale=scale, output_type="pt").images[0].mean(0)
    assert x.shape == (round(height * scale), round(width * scale))
    for dim, side in ((0, x.shape[0]), (1, x.shape[1])):
        profile = x.sum(1 - dim)
        middle = (profile * (torch.arange(side) + 0.5)).sum() / profile.sum()
        assert abs(float(middle) / side - 0.5) < 0.25 / side, "the picture moved by more than a quarter of a pixel"


def neutral_pipeline() -> RestorationPipeline:
    """A pipeline whose networks start as they are built, before training: a bicubic enlargement plus nothing."""
    pipe = build_pipeline()
    with torch.no_grad():
        for parameter in pipe.estimator.tail.parameters():
            parameter.zero_()
    return pipe


NEUTRAL: dict[str, Any] = {"method": "unguided", "strength": 0.05, "steps": 1, "residual": 1.0}


@pytest.mark.parametrize("scale", [1, 2, 4, 0.5, 1.3, 2.7, 3.1, 5.3])
def test_the_picture_does_not_move(scale: float) -> None:
    pipe = neutral_pipeline()
    check_no_shift(lambda image, **kw: pipe(image, **NEUTRAL, **kw), scale)


def test_no_shift_catches_a_roll() -> None:
    pipe = neutral_pipeline()

    def rolled(image: Tensor, **kwargs: Any) -> Any:
        output = pipe(image, **NEUTRAL, **kwargs)
        output.images = [i.roll(1, -1) for i in output.images]
        return output

    with pytest.raises(AssertionError):
        check_no_shift(rolled, 4)


# --- tiles -----------------------------------------------------------------------------------------------------------


def check_tiles(pipe: RestorationPipeline, image: Tensor, scale: float, **more: Any) -> None:
    """A tiled run and an untiled run agree where the networks' reach is shorter than the overlap."""
    settings: dict[str, Any] = {"scale": scale, "steps": 2, "strength": 0.5, "output_type": "pt", **more}
    whole = pipe(image, tile=None, **settings)
    tiled = pipe(image, tile=256, **settings)
    for ours, theirs in ((tiled.images, whole.images), (tiled.detail_maps, whole.detail_maps)):
        assert float((ours[0] - theirs[0].float()).abs().mean()) < TOL[torch.float16].atol
    # In the rule "through" tiles ask the denoiser once more for their own graph.
    if more.get("update") != "through":
        assert tiled.calls["total"]["denoiser"] == whole.calls["total"]["denoiser"]


TILED: list[dict[str, Any]] = [
    {},
    {"init": "encode", "chroma": 0.2, "coarse": 0.3},
    {"init": "inverse"},
    {"init": "noise", "strength": 1.0},
    {"method": "pixel-inn", "update": "stopped"},
    {"update": "through", "guidance": {"refine": True}},
    {"guidance": {"regulariser": "gluing"}},
    {"guidance": {"regulariser": "consistency"}},
    {"ensemble": 3, "spread": 1.0, "texture": 1.2},
]


# The denoiser's group norm looks at the whole tile, hence the tolerance of half precision and a mean.
@pytest.mark.parametrize("more", TILED, ids=lambda more: "-".join(f"{k}-{v}" for k, v in more.items()) or "preset")
def test_tiles_agree(tiny_pipeline: RestorationPipeline, more: dict[str, Any]) -> None:
    check_tiles(tiny_pipeline, photo(100, 90), 4, **more)


@pytest.mark.parametrize("scale", [1, 2.7, 8])
def test_tiles_agree_at_every_scale(tiny_pipeline: RestorationPipeline, scale: float) -> None:
    side = round(350 / scale)
    check_tiles(tiny_pipeline, photo(side, side + 7), scale)


@pytest.mark.parametrize(("size", "scale"), [((1, 1), 4), ((1, 400), 1), ((700, 1), 0.7), ((3, 90), 4)])
def test_thin_images_in_tiles(tiny_pipeline: RestorationPipeline, size: tuple[int, int], scale: float) -> None:
    out = tiny_pipeline(torch.rand(3, *size), scale, tile=256, steps=1, output_type="pt").images[0]
    assert tuple(out.shape) == (3, *(max(1, round(side * scale)) for side in size))
    assert bool(out.isfinite().all())


def test_a_ribbon_is_restored(tiny_pipeline: RestorationPipeline) -> None:
    """16 pixels high and 8000 wide, by the size that is wanted and by tiles that the pipeline chooses."""
    out = tiny_pipeline(torch.rand(3, 4, 2000), size=(8000, 16), tile=512, steps=1, output_type="pt").images[0]
    assert tuple(out.shape) == (3, 16, 8000)
    assert bool(out.isfinite().all())


def test_foreign_tiles_overlap_as_far_as_the_networks_look(
    tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = ForeignAutoencoder()
    foreign.inner = tiny_pipeline.vae
    pipe = RestorationPipeline(**{**tiny_pipeline.components, "vae": foreign})
    seen: list[TilingConfig] = []
    tiled = LatentPrior.tiled

    def spy(prior: LatentPrior, tiling: TilingConfig | None, batch: int = 1) -> LatentPrior:
        if tiling is not None:
            seen.append(tiling)
        return tiled(prior, tiling, batch)

    monkeypatch.setattr(LatentPrior, "tiled", spy)
    settings: dict[str, Any] = {"tile": 768, "output_type": "pt", "steps": 1, "method": "unguided"}
    pipe(photo(200, 30), 4, **settings)
    pipe(photo(200, 30), 4, **settings)
    tiny_pipeline(photo(200, 30), 4, **settings)
    ours, again, embedded = seen
    assert ours == again
    assert 112 <= ours.overlap <= 144
    assert embedded.overlap == 64


class ForeignAutoencoder(ModelMixin, ConfigMixin):
    """An autoencoder of another class whose decoder looks 14 cells far."""

    @register_to_config
    def __init__(self, latent_channels: int = 4, downsampling: int = 8) -> None:
        super().__init__()
        self.inner: Any = None

    def encode(self, x: Tensor) -> Any:
        return self.inner.encode(x)

    def decode(self, z: Tensor) -> Any:
        return self.inner.decode(F.avg_pool2d(z, 29, stride=1, padding=14))


def test_tiles_catch_a_seam(tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(fn: Callable[[Tensor], Tensor], x: Tensor, tile: int, *args: Any, **kwargs: Any) -> Tensor:
        return fn(x.roll(tile // 4, -1))

    monkeypatch.setattr("latentindigo.prior.tiled_map", cut)
    with pytest.raises(AssertionError):
        check_tiles(tiny_pipeline, photo(100, 90), 4)


def test_a_huge_canvas_lies_in_a_file(tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"tile": 256, "steps": 1, "output_type": "pt"}
    in_memory = tiny_pipeline(photo(100, 90), 4, **settings).images[0]
    monkeypatch.setattr("latentindigo.tiling.MAPPED_BYTES", 0)
    assert torch.equal(tiny_pipeline(photo(100, 90), 4, **settings).images[0], in_memory)


def test_restoring_asks_for_no_double_precision(tiny_pipeline: RestorationPipeline) -> None:
    """Apple's accelerators have none. Matrices are made and inverted on the CPU; no picture or latent is."""

    class NoDoubles(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float64 and out.numel() > 64 * 64:
                raise AssertionError(f"{func} in double precision")
            return out

    with NoDoubles():
        tiny_pipeline(photo(80, 70), 4, **FAST)
        tiny_pipeline(photo(80, 70), 4, update="stopped", **FAST)


# --- asked for: compiling, checkpointing -----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "update"), [("pixel-inn", "stopped"), ("latent-inn", "through")])
def test_checkpointing_keeps_less_and_changes_nothing(method: str, update: str) -> None:
    pipe = build_pipeline()
    image = photo(24, 20)
    settings: dict[str, Any] = {"scale": 4, "method": method, "update": update, **FAST}

    def run() -> tuple[Tensor, int]:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return pipe(image, **settings).images[0], kept

    plain, much = run()
    pipe.enable_checkpointing()
    spared, little = run()
    assert_close(spared, plain)
    assert little < 0.8 * much


def test_compiling_leaves_weights_alone_and_compiles_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build_pipeline()
    before, compiled = pipe.weights_hash(), []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    assert pipe.compile_networks() is pipe
    assert pipe.weights_hash() == before
    assert set(compiled) == {pipe.denoiser, pipe.estimator, *pipe.vae.children()}
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


# --- memory and precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_halves_the_tiles_and_goes_on(
    tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    settings: dict[str, Any] = {"steps": 1, "output_type": "pt"}
    wanted = tiny_pipeline(photo(150, 140), 4, tile=256, **settings)
    inner, tried = RestorationPipeline._pass, []

    def short_of_memory(self: Any, y: Tensor, target: Any, seeds: Any, run: Any, calls: Any, loop_calls: Any) -> Any:
        tried.append(run.tile)
        if run.tile is None or run.tile == "auto" or run.tile.tile > 256:
            calls.denoiser += 7
            raise error
        return inner(self, y, target, seeds, run, calls, loop_calls)

    monkeypatch.setattr(RestorationPipeline, "_pass", short_of_memory)
    with pytest.warns(UserWarning, match="memory ran out; going on with tiles of 256 pixels"):
        found = tiny_pipeline(photo(150, 140), 4, tile=512, **settings)
    assert [t.tile for t in tried] == [512, 256]
    assert torch.equal(found.images[0], wanted.images[0])
    assert found.calls == wanted.calls
    # Where tiles are as small as they get, the error is the answer; and it is no other error that is hidden.
    monkeypatch.setattr("latentindigo.pipeline.halved", lambda tile, pixels: None)
    with pytest.raises(type(error)):
        tiny_pipeline(photo(150, 140), 4, tile=512, **settings)


def test_other_errors_are_not_taken_for_lack_of_memory(
    tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(RestorationPipeline, "_pass", broken)
    with pytest.raises(RuntimeError, match="something else"):
        tiny_pipeline(photo(20, 20), 4)


def test_what_half_precision_cannot_hold_is_computed_in_full() -> None:
    class Large(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(1e4))

        def forward(self, x: Tensor) -> Tensor:
            return (self.factor * x * 100) / 1e6

    network = Large().half()
    x = torch.ones(3)

    def run(net: Large) -> Tensor:
        return net(x.to(net.factor.dtype))

    with pytest.warns(UserWarning, match="not finite in torch.float16"):
        assert torch.equal(in_full_precision(network, run), x)
    assert network.factor.dtype == torch.float16, "the network is left as it is"
    # In float32 a number that is not finite is the network's answer.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not in_full_precision(Large(), lambda net: net(x * float("inf"))).isfinite().any()


def test_automatic_tiles_fit_into_free_memory() -> None:
    wide, cost = 1e12, 400
    assert tiling_for("auto", 1536 * 1536, wide, cost) is None
    large = tiling_for("auto", 2048 * 2048, wide, cost)
    assert large is not None
    assert 1024 <= large.tile <= 1536
    short = tiling_for("auto", 2048 * 2048, 2 * cost * 700 * 700, cost)
    assert short is not None
    assert 640 <= short.tile <= 700
    least = tiling_for("auto", 2048 * 2048, 1.0, cost)
    assert least is not None
    assert least.tile == 256
    assert tiling_for(None, 10**9, 1.0, cost) is None
    assert tiling_for(TilingConfig(512, 64), 10, 1.0, cost) == TilingConfig(512, 64)
    assert halved(TilingConfig(1024, 64), 1) == TilingConfig(512, 64)
    assert halved(None, 4000 * 4000) == TilingConfig(1984, 64)
    assert halved("auto", 4000 * 4000) == TilingConfig(640, 64)
    assert halved(TilingConfig(640, 64), 1) == TilingConfig(320, 64)
    assert halved("auto", 300 * 300) is None
    assert halved(TilingConfig(256, 64), 10**8) is None
    assert free_memory(torch.device("cpu")) > 2**20
