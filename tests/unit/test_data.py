"""Photographs for training: which ones, and crops that depend on their generator alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentindigo.data import PhotoFolder, sample_generator
from latentindigo.training import load_recipe


def photo(path: Path, seed: int, size: tuple[int, int] = (96, 80)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(["a/one.png", "a/two.png", "b/three.png", "b/four with spaces.png"]):
        photo(tmp_path / name, seed)
    photo(tmp_path / "a" / "small.png", 9, (200, 40))
    return tmp_path


ALL = ["a/one.png", "a/two.png", "b/four with spaces.png", "b/three.png"]


# --- which photographs -----------------------------------------------------------------------------------------------


def test_photos_are_found_sorted_and_small_ones_left_out(folder: Path) -> None:
    photos = PhotoFolder(folder)
    assert photos.names == ALL
    assert len(photos) == 4
    assert {tuple(image.shape) for image in photos.images} == {(3, 80, 96)}
    assert {image.dtype for image in photos.images} == {torch.uint8}
    assert "a/small.png" in PhotoFolder(folder, min_side=40).names


def test_patterns_and_lists_are_left_out(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "tune.txt"
    listed.write_text("a/one.png\nb/four with spaces.png\n\n")
    assert PhotoFolder(folder, exclude=["a/*"]).names == ALL[2:]
    assert PhotoFolder(folder, exclude_file=listed).names == ["a/two.png", "b/three.png"]
    assert PhotoFolder(folder, exclude=["b/*"], exclude_file=listed).names == ["a/two.png"]
    assert PhotoFolder(folder, only_file=listed).names == ["a/one.png", "b/four with spaces.png"]


def test_exclusions_hold_when_the_folder_above_is_given(folder: Path, tmp_path: Path) -> None:
    # Training on ".../data" instead of ".../data/train" must not let the excluded photographs in.
    listed = tmp_path / "tune.txt"
    listed.write_text("one.png\n")
    above = tmp_path / "above"
    above.mkdir()
    (folder / "a").rename(above / "a")
    (folder / "b").rename(above / "b")
    assert PhotoFolder(above, exclude=["three*"], exclude_file=listed).names == ["a/two.png", "b/four with spaces.png"]


def test_an_empty_selection_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="at least 64 pixels below .*found none; check the folder and the recipe's"):
        PhotoFolder(folder, exclude=["*"])
    with pytest.raises(ValueError, match="at least 999 pixels"):
        PhotoFolder(folder, min_side=999)


def test_recipes_keep_their_hands_off_the_tuning_photos_and_the_excluded_folders(root: Path) -> None:
    listed = (root / "recipes" / "tune.txt").read_text().splitlines()
    assert len(listed) == len(set(listed)) == 64
    for part in ("autoencoder", "denoiser", "estimator", "pixel-inn", "latent-inn"):
        config = load_recipe(part, root / "recipes" / f"{part}.toml")
        assert config.tune_file is not None
        assert Path(config.tune_file).read_text().splitlines() == listed
        assert {"deep_photo_style/*", "ddnm_faces/*"} <= set(config.exclude)


def test_the_tuning_photos_exist(data_dir: Path, root: Path) -> None:
    for name in (root / "recipes" / "tune.txt").read_text().splitlines():
        assert (data_dir / "train" / name).is_file(), name


# --- crops -----------------------------------------------------------------------------------------------------------


def test_a_crop_depends_on_its_generator_alone(folder: Path) -> None:
    photos = PhotoFolder(folder)

    def crop(number: int) -> torch.Tensor:
        return photos.crop(sample_generator(3, number), 32)

    first = crop(5)
    for other in (1, 2, 3):
        crop(other)
    torch.manual_seed(99)
    assert torch.equal(crop(5), first)
    assert not torch.equal(crop(6), first)


def test_crops_have_the_size_and_range(folder: Path) -> None:
    photos = PhotoFolder(folder)
    for number in range(40):
        crop = photos.crop(sample_generator(0, number), 48, min_scale=0.4)
        assert crop.shape == (3, 48, 48)
        assert crop.dtype == torch.float32
        assert 0 <= float(crop.min()) <= float(crop.max()) <= 1


def test_a_crop_larger_than_the_photo_is_enlarged(folder: Path) -> None:
    assert PhotoFolder(folder).crop(sample_generator(0, 1), 128).shape == (3, 128, 128)


def test_unscaled_crops_are_pixels_of_the_photo(folder: Path) -> None:
    photos = PhotoFolder(folder)
    source = photos.images[1].float() / 255
    crop = photos.crop(sample_generator(0, 4), 16, min_scale=1.0, index=1)
    ways = [crop, crop.flip(-1), crop.transpose(-1, -2), crop.transpose(-1, -2).flip(-1)]
    windows = source.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    assert any((windows == way).flatten(1).all(1).any() for way in ways)


def test_all_photos_flips_and_scales_occur(folder: Path) -> None:
    photos = PhotoFolder(folder, min_side=40)
    drawn = [photos.crop(sample_generator(1, n), 8, min_scale=0.5) for n in range(60)]
    spread = torch.stack([c.std() for c in drawn])
    # Shrinking averages noise away, so the crops' contrast tells their scales apart.
    assert float(spread.max() / spread.min()) > 1.3


def test_the_photos_are_not_changed_by_cropping(folder: Path) -> None:
    photos = PhotoFolder(folder)
    kept = [image.clone() for image in photos.images]
    for number in range(8):
        photos.crop(sample_generator(0, number), 80, min_scale=1.0).mul_(0)
    assert all(torch.equal(a, b) for a, b in zip(photos.images, kept, strict=True))


def test_every_number_has_its_own_stream() -> None:
    def draw(*numbers: int) -> float:
        return float(torch.rand((), generator=sample_generator(*numbers)))

    draws = [draw(seed, stream, number) for seed in range(3) for stream in range(6) for number in range(60)]
    assert len(set(draws)) > 0.999 * len(draws)
    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(2, 1), draw(1, 2, 0), draw(-1, 2), draw(0, 2)}) == 5
