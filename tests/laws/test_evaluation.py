"""Laws of evaluation: perfect is perfect, worse ranks worse, intervals cover, pairs and rows stand on their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentindigo import evaluation, metrics
from latentindigo.data import sample_generator
from latentindigo.degradations import add_gaussian_noise
from latentindigo.evaluation import (
    Interval,
    Method,
    Pair,
    Protocol,
    Restored,
    Result,
    Row,
    bootstrap_interval,
    evaluate,
    make_pairs,
    make_row,
    measure,
    paired_difference,
    ratio_of_sums,
    summarise,
)
from latentindigo.images import LoadedImage, save_image
from tolerances import TOL

Measure = Callable[[Tensor, Tensor], dict[str, float]]
PROTOCOL = Protocol("toy", "noise15", 1, "toys")


@pytest.fixture(autouse=True)
def quick_swd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws hold for any number of patches; a few keep the tests quick."""
    monkeypatch.setattr(evaluation, "swd", lambda x, ref, **_: metrics.swd(x, ref, patches=400, projections=8))


def texture(seed: int, height: int = 32, width: int = 40) -> Tensor:
    """A picture on the 8-bit grid with structure at several scales, away from black and white: (3, H, W)."""
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=False)[0]
    fine = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed + 99))
    return metrics.round8((0.5 + 0.5 * (smooth - 0.5) + 0.15 * (fine - 0.5)).clamp(0.1, 0.9))


def noisy(x: Tensor, amount: float, seed: int = 7) -> Tensor:
    return add_gaussian_noise(x[None], amount, torch.Generator().manual_seed(seed))[0]


def toy_pairs(sizes: Sequence[tuple[int, int]] = ((32, 40),) * 4) -> list[Pair]:
    clean = [texture(k, *size) for k, size in enumerate(sizes)]
    return [Pair(f"{k}.png", x, noisy(x, 0.1, k), k) for k, x in enumerate(clean)]


def adding_noise(amount: float) -> Method:
    """A method whose result is the input plus noise of its own, from the seed."""

    def restore(images: list[Tensor], seeds: list[int]) -> Restored:
        return Restored([noisy(y, amount, 1000 + s) for y, s in zip(images, seeds, strict=True)], {"denoiser": 1})

    return Method("toy", f"noise {amount}", restore)


# ------------------------------------------------------------------------------------------------- measure, summarise


def check_perfect(measure: Measure) -> None:
    """measure(x, x) is perfect in every metric."""
    found = measure(texture(0), texture(0))
    assert math.isinf(found["psnr"])
    assert abs(found["ssim"] - 1) <= TOL[torch.float64].atol
    assert found["gradient_energy"] == 1


def check_worse_ranks_worse(measure: Measure) -> None:
    """The more noise or blur, the worse; noise adds gradient energy, blur takes it away."""
    x = texture(1)
    little, much = (measure(noisy(x, amount), x) for amount in (0.02, 0.06))
    blurred = measure(F.avg_pool2d(F.pad(x[None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0], x)
    assert little["psnr"] > much["psnr"] + 3
    assert little["ssim"] > much["ssim"]
    assert blurred["gradient_energy"] < 1 < little["gradient_energy"] < much["gradient_energy"]


def check_eight_bits(measure: Measure) -> None:
    """What an 8-bit file cannot hold does not count."""
    assert math.isinf(measure(texture(2) + 0.3 / 255, texture(2))["psnr"])


def misaligned(x: Tensor, ref: Tensor) -> dict[str, float]:
    return measure(x, ref.roll(1, -1))


def swapped(x: Tensor, ref: Tensor) -> dict[str, float]:
    """Compares a picture with itself, whatever it was given to compare with."""
    return measure(x, x)


def unrounded(x: Tensor, ref: Tensor) -> dict[str, float]:
    return measure(x, ref) | {"psnr": float(metrics.psnr(x[None], ref[None]))}


def test_measure() -> None:
    check_perfect(measure)
    check_worse_ranks_worse(measure)
    check_eight_bits(measure)


@pytest.mark.parametrize(
    ("law", "defect"),
    [(check_perfect, misaligned), (check_worse_ranks_worse, swapped), (check_eight_bits, unrounded)],
    ids=["perfect", "ranks", "eight-bits"],
)
def test_measure_defects(law: Callable[[Measure], None], defect: Measure) -> None:
    with pytest.raises(AssertionError):
        law(defect)


Summarise = Callable[[Result, Sequence[Pair]], dict[str, Any]]


def check_worse_method(evaluate: Callable[..., Result], summarise: Summarise) -> None:
    """A planted worse method ranks worse in every metric of the summary, and the paired interval says so."""
    pairs = toy_pairs()
    good, bad = (evaluate(adding_noise(amount), PROTOCOL, pairs, warm_up=False) for amount in (0.01, 0.1))
    better, worse = summarise(good, pairs), summarise(bad, pairs)
    assert better["psnr"]["mean"] > worse["psnr"]["mean"]
    assert better["ssim"]["mean"] > worse["ssim"]["mean"]
    assert better["swd"]["mean"] < worse["swd"]["mean"]
    assert 1 < better["gradient_energy"]["mean"] < worse["gradient_energy"]["mean"]
    difference = paired_difference([*good.rows, *bad.rows], ("toy", "noise 0.1"), ("toy", "noise 0.01"), "toy")
    assert difference.low <= difference.mean <= difference.high < 0


def restoring_nothing(method: Method, protocol: Protocol, pairs: Sequence[Pair], warm_up: bool) -> Result:
    """Measures the input instead of the method's output."""
    idle = Method(method.method, method.variant, lambda images, seeds: Restored(images))
    return evaluate(idle, protocol, pairs, warm_up=warm_up)


def test_worse_method() -> None:
    check_worse_method(evaluate, summarise)
    with pytest.raises(AssertionError):
        check_worse_method(restoring_nothing, summarise)


def check_corpus_energy(summarise: Summarise) -> None:
    """Gradient energy of a set is Σ / Σ: a large rough image weighs more than a small flat one."""
    rough, flat = texture(0, 64, 64), 0.5 + 0.02 * (texture(1, 32, 32) - 0.5)
    pairs = [Pair("rough", rough, rough, 0), Pair("flat", flat, noisy(flat, 0.05), 1)]
    result = evaluate(Method("input", "", lambda images, seeds: Restored(images)), PROTOCOL, pairs, warm_up=False)
    wanted = metrics.gradient_energy(result.images, [metrics.round8(p.clean) for p in pairs])
    assert abs(summarise(result, pairs)["gradient_energy"]["mean"] / wanted - 1) <= TOL[torch.float32].rtol


def mean_of_ratios(result: Result, pairs: Sequence[Pair]) -> dict[str, Any]:
    ratios = [row["gradient_energy"] for row in result.rows]
    return summarise(result, pairs) | {"gradient_energy": bootstrap_interval(ratios)._asdict()}


def test_corpus_energy() -> None:
    check_corpus_energy(summarise)
    with pytest.raises(AssertionError):
        check_corpus_energy(mean_of_ratios)


def check_own_row(evaluate: Callable[..., Result]) -> None:
    """Row i belongs to pair i and does not depend on the batch, also when sizes are mixed."""
    pairs = toy_pairs([(32, 40), (28, 32), (32, 40), (28, 32), (32, 40)])
    alone = [evaluate(adding_noise(0.05), PROTOCOL, [pair], warm_up=False) for pair in pairs]
    for batch in (1, 2, 5):
        together = evaluate(adding_noise(0.05), PROTOCOL, pairs, batch=batch, warm_up=False)
        for k, (one, row, x) in enumerate(zip(alone, together.rows, together.images, strict=True)):
            assert row["image"] == pairs[k].name
            assert row["psnr"] == one.rows[0]["psnr"]
            assert torch.equal(x, one.images[0])


def by_size(method: Method, protocol: Protocol, pairs: Sequence[Pair], *, batch: int = 1, warm_up: bool) -> Result:
    """Leaves the rows in the order in which batches of one size were run."""
    ordered = sorted(pairs, key=lambda pair: pair.clean.numel())
    return evaluate(method, protocol, ordered, batch=batch, warm_up=warm_up)


def seeded_by_position(
    method: Method, protocol: Protocol, pairs: Sequence[Pair], *, batch: int = 1, warm_up: bool
) -> Result:
    """Seeds an image by its place in the list instead of its number."""
    renumbered = [pair._replace(number=k) for k, pair in enumerate(pairs)]
    return evaluate(method, protocol, renumbered, batch=batch, warm_up=warm_up)


def test_own_row() -> None:
    check_own_row(evaluate)
    for defect in (by_size, seeded_by_position):
        with pytest.raises(AssertionError):
            check_own_row(defect)


# ----------------------------------------------------------------------------------------------------------- intervals

IntervalFn = Callable[..., Interval]


def check_coverage(interval: IntervalFn, skewed: bool) -> None:
    """About 95 of 100 intervals hold the true mean, and not all of them either."""
    generator = torch.Generator().manual_seed(5)
    trials, n = 300, 40
    draws = torch.randn(trials, n, generator=generator, dtype=torch.float64)
    truth = 24.0
    values = truth + (draws.square() - 1 if skewed else 2 * draws)
    # A mean of 40 skewed values is a little off the normal shape, which costs every bootstrap a few percent.
    low, high = (0.88, 0.98) if skewed else (0.92, 0.98)
    intervals = [interval(row.tolist(), seed=k, repeats=400) for k, row in enumerate(values)]
    covered = sum(i.low <= truth <= i.high for i in intervals) / trials
    assert low <= covered <= high, f"{covered:.3f} of the intervals cover the truth"
    assert all(i.low <= i.mean <= i.high for i in intervals)


def check_ratio_coverage(interval: IntervalFn) -> None:
    """The same for a ratio of sums over images of very different weight."""
    generator = torch.Generator().manual_seed(7)
    trials, n, truth = 300, 40, 0.8
    clean = torch.rand(trials, n, generator=generator, dtype=torch.float64) * 9 + 1
    restored = clean * (truth + 0.3 * torch.randn(trials, n, generator=generator, dtype=torch.float64))
    covered = 0
    for k in range(trials):
        pairs = torch.stack([restored[k], clean[k]], -1).tolist()
        found = interval(pairs, seed=k, statistic=ratio_of_sums, repeats=400)
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / trials <= 0.98, f"{covered / trials:.3f} of the intervals cover the truth"


def too_narrow(values: Any, **settings: Any) -> Interval:
    """Half the width: what a confusion of 95 % with two thirds would give."""
    found = bootstrap_interval(values, **settings)
    return Interval(found.mean, (found.mean + found.low) / 2, (found.mean + found.high) / 2)


def too_wide(values: Any, **settings: Any) -> Interval:
    """The spread of images instead of that of their mean."""
    found = bootstrap_interval(values, **settings)
    factor = math.sqrt(len(values))
    return Interval(
        found.mean, found.mean - factor * (found.mean - found.low), found.mean + factor * (found.high - found.mean)
    )


def test_coverage() -> None:
    check_coverage(bootstrap_interval, skewed=False)
    check_coverage(bootstrap_interval, skewed=True)
    check_ratio_coverage(bootstrap_interval)


@pytest.mark.parametrize("law", [partial(check_coverage, skewed=False), check_ratio_coverage], ids=["mean", "ratio"])
@pytest.mark.parametrize("defect", [too_narrow, too_wide])
def test_coverage_defects(law: Callable[[IntervalFn], None], defect: IntervalFn) -> None:
    with pytest.raises(AssertionError):
        law(defect)


def check_paired(difference: Callable[..., Interval]) -> None:
    """Images differ by 10 dB, methods by 0.1 dB on each: pairing shows it whatever order the rows have."""
    generator = torch.Generator().manual_seed(3)
    level = (20 + 10 * torch.rand(30, generator=generator)).tolist()
    noise = torch.randn(30, generator=generator)
    jitter = (0.02 * (noise - noise.mean())).tolist()  # The mean of this draw is the truth.
    ours = [
        make_row("a", "", "p", str(k), psnr=v + 0.1 + j) for k, (v, j) in enumerate(zip(level, jitter, strict=True))
    ]
    theirs = [make_row("b", "", "p", str(k), psnr=v) for k, v in enumerate(level)]
    found = difference([*ours, *reversed(theirs)], ("a", ""), ("b", ""), "p")
    assert found.low <= 0.1 <= found.high
    assert found.high - found.low < 0.05


def unpaired(rows: Sequence[Row], method: tuple[str, str], baseline: tuple[str, str], protocol: str) -> Interval:
    ours, theirs = (bootstrap_interval([r["psnr"] for r in rows if r["method"] == k[0]]) for k in (method, baseline))
    return Interval(ours.mean - theirs.mean, ours.low - theirs.high, ours.high - theirs.low)


def by_position(rows: Sequence[Row], method: tuple[str, str], baseline: tuple[str, str], protocol: str) -> Interval:
    ours, theirs = ([r["psnr"] for r in rows if r["method"] == k[0]] for k in (method, baseline))
    return bootstrap_interval([a - b for a, b in zip(ours, theirs, strict=True)])


def test_paired() -> None:
    check_paired(paired_difference)
    for defect in (unpaired, by_position):
        with pytest.raises(AssertionError):
            check_paired(defect)


# --------------------------------------------------------------------------------------------------------------- pairs


def check_pair_alone(make_pairs: Callable[..., list[Pair]], folder: Path) -> None:
    """Pair i depends on its image and (seed, i) alone; another image before it, or fewer after it, change nothing."""
    for name, image in (
        ("a.png", texture(0)),
        ("b.png", texture(1)),
        ("c.png", texture(1)),
        ("z.png", texture(2, 20, 24)),
    ):
        save_image(LoadedImage(image), folder / name, overwrite=True)
    pairs = make_pairs(folder, PROTOCOL, ["a.png", "b.png", "c.png"])
    other = make_pairs(folder, PROTOCOL, ["z.png", "b.png"])
    short = make_pairs(folder, dataclasses.replace(PROTOCOL, count=2), ["a.png", "b.png", "c.png"])
    reseeded = make_pairs(folder, dataclasses.replace(PROTOCOL, seed=1), ["a.png", "b.png"])
    assert torch.equal(pairs[1].y, other[1].y)
    assert [p.name for p in short] == ["a.png", "b.png"]
    assert all(torch.equal(p.y, q.y) for p, q in zip(pairs, short, strict=False))
    assert not torch.equal(pairs[1].y, reseeded[1].y)
    assert torch.equal(pairs[1].clean, pairs[2].clean)
    assert not torch.equal(pairs[1].y, pairs[2].y)
    assert torch.equal(pairs[0].clean, texture(0))


def one_generator(folder: Path, protocol: Protocol, names: Sequence[str]) -> list[Pair]:
    """Draws the noise of all images from one stream, so that each depends on the sizes of those before it."""
    shared = sample_generator(protocol.seed)
    return make_pairs(folder, protocol, names, lambda x, _: add_gaussian_noise(x, 15 / 255, shared))


def one_noise(folder: Path, protocol: Protocol, names: Sequence[str]) -> list[Pair]:
    """Gives every image the same noise."""
    return make_pairs(
        folder, protocol, names, lambda x, _: add_gaussian_noise(x, 15 / 255, sample_generator(protocol.seed))
    )


def test_pair_alone(tmp_path: Path) -> None:
    check_pair_alone(make_pairs, tmp_path)
    for defect in (one_generator, one_noise):
        with pytest.raises(AssertionError):
            check_pair_alone(defect, tmp_path)


def test_pair_sizes(tmp_path: Path) -> None:
    save_image(LoadedImage(texture(0, 35, 50)), tmp_path / "a.png")
    (pair,) = make_pairs(tmp_path, Protocol("toy", "medium", 4, "toys", crop=30))
    assert tuple(pair.clean.shape) == (3, 28, 28)
    assert tuple(pair.y.shape) == (3, 7, 7)
    assert torch.equal(pair.clean, texture(0, 35, 50)[:, 3:31, 11:39])
    with pytest.raises(ValueError, match="at least 64 pixels"):
        make_pairs(tmp_path, Protocol("toy", "medium", 64, "toys"))
    with pytest.raises(ValueError, match="found no image"):
        make_pairs(tmp_path, PROTOCOL, [])
    with pytest.raises(ValueError, match="count must be at least 1"):
        Protocol("toy", "medium", 4, "toys", count=0)
