"""The benchmark's metrics: refusals, missing packages, the NIQE model and its file, the shipped one and its fit."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from latentindigo import quality
from latentindigo.filters import blur, gaussian_kernel
from latentindigo.images import load_image, pil_jpeg
from latentindigo.metrics import round8
from latentindigo.quality import Niqe, consistency, gmsd, ms_ssim


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def niqe() -> Niqe:
    """Return an evaluator that learned white noise, and too little of it to be of use."""
    return Niqe.fit([noise(seed, 3, 64, 80) for seed in range(6)], patch=16)


# ------------------------------------------------------------------------------------------------------ full reference


@pytest.mark.parametrize("fn", [ms_ssim, gmsd])
def test_shapes_that_do_not_fit_are_refused(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises((ValueError, TypeCheckError)):
        fn(torch.zeros(1, 3, 180, 180), torch.zeros(1, 3, 180, 181))
    with pytest.raises(ValueError, match="repeat a grey image"):
        fn(torch.zeros(1, 1, 180, 180), torch.zeros(1, 1, 180, 180))


def test_small_images_are_refused_with_the_smallest_size() -> None:
    with pytest.raises(ValueError, match=r"at least 176 pixels, got \(180, 175\)"):
        ms_ssim(torch.zeros(1, 3, 180, 175), torch.zeros(1, 3, 180, 175))
    with pytest.raises(ValueError, match=r"at least 6 pixels"):
        gmsd(torch.zeros(1, 3, 5, 40), torch.zeros(1, 3, 5, 40))
    assert float(gmsd(torch.zeros(1, 3, 6, 6), torch.zeros(1, 3, 6, 6))) == 0


def test_opposite_structure_is_0_and_not_nan() -> None:
    x = noise(0, 1, 3, 176, 176)
    assert float(ms_ssim(1 - x, x)) == 0


def test_flat_images_have_values() -> None:
    flat, brighter = torch.full((1, 3, 176, 176), 0.4), torch.full((1, 3, 176, 176), 0.6)
    assert float(gmsd(flat, brighter)) == 0
    assert 0.9 < float(ms_ssim(flat, brighter)) < 1


def test_ms_ssim_without_torchmetrics_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r"torchmetrics.*pip install 'latentindigo\[benchmark\]'"):
        ms_ssim(torch.zeros(1, 3, 176, 176), torch.zeros(1, 3, 176, 176))


def test_consistency_refuses_another_operator() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\), got \(1, 3, 8, 8\)"):
        consistency(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4), lambda x: x)


def test_importing_the_module_imports_no_optional_package() -> None:
    code = "import sys, latentindigo.quality, latentindigo.learned_metrics; print(sorted(sys.modules))"
    from subprocess import run

    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "torchmetrics" not in done.stdout and "pyiqa" not in done.stdout and "diffusers" not in done.stdout


# ---------------------------------------------------------------------------------------------------------------- NIQE


def test_a_saved_model_is_the_same_model(niqe: Niqe, tmp_path: Path) -> None:
    niqe.save(tmp_path / "model.safetensors")
    loaded = Niqe.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.mean, niqe.mean) and torch.equal(loaded.covariance, niqe.covariance)
    assert (loaded.patch, loaded.images) == (16, 6)
    x = noise(9, 3, 48, 50)
    assert loaded.score(x) == niqe.score(x)


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Niqe.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no model at all")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    save_file({"mean": torch.zeros(36), "covariance": torch.zeros(36, 36)}, tmp_path / "untold.safetensors")
    for name in ("text.safetensors", "other.safetensors", "untold.safetensors"):
        with pytest.raises(ValueError, match=f"written by Niqe.save, got '{name}'"):
            Niqe.load(tmp_path / name)


def test_statistics_of_another_size_are_refused() -> None:
    with pytest.raises((ValueError, TypeCheckError)):
        Niqe(torch.zeros(18), torch.zeros(18, 18), 64, 1)
    for patch in (8, 33):
        with pytest.raises(ValueError, match="even patch"):
            Niqe(torch.zeros(36), torch.zeros(36, 36), patch, 1)


def test_images_without_statistics_are_refused(niqe: Niqe) -> None:
    for small in (noise(0, 3, 15, 64), noise(0, 3, 64, 15)):
        with pytest.raises(ValueError, match="sides of at least 16"):
            niqe.score(small)
    with pytest.raises(ValueError, match="at least two patches"):
        niqe.score(torch.full((3, 64, 64), 0.5))
    one = torch.full((3, 64, 64), 1.0)
    one[:, 5:11, 5:11] = noise(0, 3, 6, 6)  # The windows of three pixels to either side stay inside one patch.
    with pytest.raises(ValueError, match="got 1"):
        niqe.score(one)
    with pytest.raises((ValueError, TypeCheckError)):
        niqe.score(noise(0, 1, 64, 64))


def test_flat_parts_are_left_out(niqe: Niqe) -> None:
    """A clipped sky beside a texture gives a number, and never NaN; so does an image of one colour's two levels."""
    x = noise(1, 3, 64, 64)
    x[:, :32] = 1.0
    assert 0 <= niqe.score(x) < float("inf")
    levels = (noise(2, 1, 64, 64) > 0.99).float().expand(3, -1, -1)
    assert 0 <= niqe.score(levels) < float("inf")


@pytest.mark.parametrize(("images", "message"), [([], "got 0 from 0 images"), ([noise(0, 3, 64, 80)], "got 20 from 1")])
def test_too_little_to_learn_from_is_refused(images: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Niqe.fit(images, patch=16)


def test_a_score_does_not_change_the_image_or_depend_on_its_dtype(niqe: Niqe) -> None:
    x = round8(noise(3, 3, 64, 64)).requires_grad_()
    before = x.clone()
    assert niqe.score(x) == pytest.approx(niqe.score((255 * x.detach().double()).round() / 255), rel=1e-5)
    assert torch.equal(x, before)


def test_the_shipped_model_is_small_and_sound() -> None:
    shipped = Niqe.shipped()
    assert quality.NIQE_FILE.stat().st_size < 30_000
    assert shipped.patch == 64 and shipped.images > 1500
    assert shipped.mean.dtype == shipped.covariance.dtype == torch.float64
    assert float(torch.linalg.eigvalsh(shipped.covariance).min()) > 0
    shapes = shipped.mean[[0, 2, 6, 10, 14, 18, 20, 24, 28, 32]]
    assert 0.2 < float(shapes.min()) and float(shapes.max()) < 10


def test_a_crop_is_scored_in_a_tenth_of_a_second() -> None:
    shipped, x = Niqe.shipped(), noise(0, 3, 256, 256)
    seconds: list[float] = []
    for _ in range(5):
        start = time.process_time()
        shipped.score(x)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1


def test_the_shipped_model_ranks_damage_on_photographs(data_dir: Path) -> None:
    """Blur, white noise and JPEG raise the mean over photographs that the model has not seen."""
    shipped = Niqe.shipped()
    photos = [load_image(path).rgb for path in sorted((data_dir / "val").glob("*.png"))[:10]]
    generator = torch.Generator().manual_seed(0)

    def mean(damage: Callable[[Tensor], Tensor]) -> float:
        return sum(shipped.score(damage(x)) for x in photos) / len(photos)

    clean = mean(lambda x: x)
    blurred = [mean(lambda x, s=s: round8(blur(x[None], gaussian_kernel(15, s))[0])) for s in (1.0, 2.0)]
    noisy = [mean(lambda x, n=n: round8(x + n / 255 * torch.randn(x.shape, generator=generator))) for n in (10, 25)]
    pressed = [mean(lambda x, q=q: pil_jpeg(x, q)) for q in (50, 10)]
    for series in (blurred, noisy, pressed):
        assert clean < series[0] < series[1]


# ------------------------------------------------------------------------------------------------- the fitting script


def test_the_script_fits_what_may_be_trained_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = (root / "recipes" / "tune.txt").read_text(encoding="utf-8").split()[0]
    names = ["bsds/a.png", "bsds/b.png", "ddnm_faces/face.png", "deep_photo_style/style.png", "bsds/small.png"]
    for index, name in enumerate([*names, tune]):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 40 if "small" in name else 320
        pixels = np.random.default_rng(index).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = importlib.import_module("fit_niqe")
    assert script.training_photos(tmp_path, 64).names == ["bsds/a.png", "bsds/b.png"]
    target = tmp_path / "niqe.safetensors"
    monkeypatch.setattr(sys, "argv", ["fit_niqe.py", "--data", str(tmp_path), "--out", str(target)])
    script.main()
    assert Niqe.load(target).images == 2
    assert "2 photographs" in capsys.readouterr().out
