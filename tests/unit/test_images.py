"""Pixel files: what goes in comes out, what is broken says so, and no file is ever half written."""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor

from latentindigo import images
from latentindigo.images import (
    WRITE_SUFFIXES,
    ImageReadError,
    LoadedImage,
    contact_sheet,
    from_pil,
    list_images,
    load_image,
    pil_jpeg,
    pil_resize,
    read_metadata,
    save_image,
    to_pil,
)
from tolerances import assert_close

SETTINGS = {"seed": 0, "preset": "default", "zeta": [0.5, 1e-3], "note": "é"}
LOSSLESS = (".png", ".tif", ".tiff")
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def random_pixels(channels: int, height: int, width: int, bits: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (channels, height, width), generator=generator).float() / (2**bits - 1)


def loaded(mode: str = "RGB", bits: int = 8, alpha: bool = False, size: tuple[int, int] = (23, 17)) -> LoadedImage:
    width, height = size
    rgb = random_pixels(3 if mode == "RGB" else 1, height, width, bits).expand(3, -1, -1).contiguous()
    opacity = random_pixels(1, height, width, bits, seed=1) if alpha else None
    return LoadedImage(
        rgb=rgb, alpha=opacity, mode=mode, bits=bits, icc=PROFILE, exif=camera_exif().tobytes(), name="p"
    )


def camera_exif(orientation: int = 1, comment: bytes | None = b"ASCII\0\0\0by the sea") -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.Base.Orientation] = orientation
    details: dict[int, Any] = {ExifTags.Base.ExifImageWidth: 5, ExifTags.Base.ExifImageHeight: 4, 0x829A: 1 / 60}
    if comment is not None:
        details[ExifTags.Base.UserComment] = comment
    exif[ExifTags.IFD.Exif] = details
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (1.0, 2.0, 3.0)}
    return exif


def parsed(exif: bytes | None) -> Image.Exif:
    assert exif is not None
    result = Image.Exif()
    result.load(exif)
    return result


def file_bytes(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_bytes(samples: np.ndarray, filters: list[int], extra: bytes = b"") -> bytes:
    """16-bit PNG with a chosen filter per row, written plainly from the specification."""
    height, width, channels = samples.shape
    step = 2 * channels
    rows = samples.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    lines: list[bytes] = []
    for y in range(height):
        kind, row = filters[y % len(filters)], rows[y]
        up = rows[y - 1] if y else np.zeros_like(row)
        left = np.concatenate([np.zeros(step, dtype=int), row[:-step]])
        corner = np.concatenate([np.zeros(step, dtype=int), up[:-step]])
        guess = left + up - corner
        away = [abs(guess - near) for near in (left, up, corner)]
        paeth = np.where((away[0] <= away[1]) & (away[0] <= away[2]), left, np.where(away[1] <= away[2], up, corner))
        predicted = [np.zeros_like(row), left, up, (left + up) // 2, paeth][kind]
        lines.append(bytes([kind]) + ((row - predicted) % 256).astype(np.uint8).tobytes())

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = chunk(b"tRNS", extra) if extra else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + body
        + chunk(b"IDAT", zlib.compress(b"".join(lines)))
        + chunk(b"IEND", b"")
    )


# -------------------------------------------------------------------------------------------------------- round trips


def check_round_trip(save: Callable[..., None], folder: Path, image: LoadedImage, suffix: str) -> None:
    """A lossless file gives back pixels, alpha, mode, bits, profile, EXIF and settings."""
    path = folder / f"p{suffix}"
    save(image, path, metadata=SETTINGS)
    again = load_image(path)
    assert torch.equal(again.rgb, image.rgb)
    assert (again.alpha is None) == (image.alpha is None)
    assert again.alpha is None or image.alpha is None or torch.equal(again.alpha, image.alpha)
    assert (again.mode, again.bits, again.icc, again.name) == (image.mode, image.bits, image.icc, path.name)
    assert parsed(again.exif)[ExifTags.Base.Make] == "Camera"
    assert read_metadata(path) == SETTINGS


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("alpha", [False, True])
def test_round_trip(tmp_path: Path, suffix: str, mode: str, bits: int, alpha: bool) -> None:
    if (mode, bits, alpha) == ("L", 16, True) and suffix != ".png":
        # TIFF readers do not take 16-bit grey with alpha, so that one combination is written as RGBA.
        image = loaded(mode, bits, alpha)
        save_image(image, tmp_path / "p.tif")
        again = load_image(tmp_path / "p.tif")
        assert torch.equal(again.rgb, image.rgb) and (again.mode, again.bits) == ("RGB", 16)
        return
    check_round_trip(save_image, tmp_path, loaded(mode, bits, alpha), suffix)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (300, 1)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_round_trip_of_extreme_shapes(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    for bits in (8, 16):
        path = tmp_path / f"{bits}{suffix}"
        image = loaded(bits=bits, alpha=True, size=size)
        save_image(image, path)
        assert torch.equal(load_image(path).rgb, image.rgb)


def keeps_8_bits(image: LoadedImage, path: Path, **options: Any) -> None:
    save_image(LoadedImage(image.rgb, image.alpha, image.mode, 8, image.icc, image.exif), path, **options)


def forgets_alpha(image: LoadedImage, path: Path, **options: Any) -> None:
    save_image(image.replace_pixels(image.rgb, None), path, **options)


def forgets_profile(image: LoadedImage, path: Path, **options: Any) -> None:
    save_image(LoadedImage(image.rgb, image.alpha, image.mode, image.bits, None, image.exif), path, **options)


def turns_grey_to_colour(image: LoadedImage, path: Path, **options: Any) -> None:
    save_image(LoadedImage(image.rgb, image.alpha, "RGB", image.bits, image.icc, image.exif), path, **options)


@pytest.mark.parametrize("defect", [keeps_8_bits, forgets_alpha, forgets_profile, turns_grey_to_colour])
def test_round_trip_catches(tmp_path: Path, defect: Callable[..., None]) -> None:
    with pytest.raises(AssertionError):
        check_round_trip(defect, tmp_path, loaded("L", 16, True), ".png")


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_formats_keep_the_rest(tmp_path: Path, suffix: str) -> None:
    smooth = torch.linspace(0.2, 0.8, 32).expand(3, 24, 32)
    image = loaded(size=(32, 24)).replace_pixels(smooth, None)
    path = tmp_path / f"p{suffix}"
    save_image(image, path, metadata=SETTINGS)
    again = load_image(path)
    assert float((again.rgb - smooth).abs().max()) < 3 / 255
    assert again.icc == PROFILE and read_metadata(path) == SETTINGS


def test_grey_jpeg_stays_grey(tmp_path: Path) -> None:
    save_image(loaded("L"), tmp_path / "p.jpg")
    with Image.open(tmp_path / "p.jpg") as image:
        assert image.mode == "L"
    assert load_image(tmp_path / "p.jpg").mode == "L"


def test_webp_keeps_alpha_and_jpeg_says_that_it_cannot(tmp_path: Path) -> None:
    image = loaded(alpha=True)
    save_image(image, tmp_path / "p.webp")
    alpha = load_image(tmp_path / "p.webp").alpha
    assert alpha is not None and image.alpha is not None and torch.equal(alpha, image.alpha)
    clear = image.replace_pixels(image.rgb, torch.zeros_like(image.alpha))
    with pytest.warns(UserWarning, match="laid over white"):
        save_image(clear, tmp_path / "p.jpg")
    assert float(load_image(tmp_path / "p.jpg").rgb.min()) == 1


def test_pixels_are_rounded_and_clamped(tmp_path: Path) -> None:
    values = torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 2.0]).expand(3, 1, 6)
    save_image(LoadedImage(values), tmp_path / "p.png")
    assert (load_image(tmp_path / "p.png").rgb[0, 0] * 255).round().tolist() == [0, 0, 0, 1, 255, 255]


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_and_reset(orientation: int, form: str) -> None:
    stored = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((8, 8), np.uint8)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Camera"
    image = load_image(file_bytes(stored.convert("RGB"), form, exif=exif.tobytes()))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    upright = stored if orientation == 1 else stored.transpose(Image.Transpose(turns[orientation]))
    assert image.size == upright.size
    expected = torch.from_numpy(np.asarray(upright).astype(np.float32)) / 255
    assert float((image.rgb[0] - expected).abs().max()) < 9 / 255  # JPEG and WebP are lossy
    assert ExifTags.Base.Orientation not in parsed(image.exif)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("filters", [[0], [1], [2], [3], [4], [4, 3, 2, 1, 0]])
def test_16_bit_png_with_any_filter(channels: int, filters: list[int]) -> None:
    samples = np.random.default_rng(1).integers(0, 65536, (7, 5, channels), dtype=np.uint16)
    image = load_image(png_bytes(samples, filters))
    colours = 1 if channels < 3 else 3
    assert image.bits == 16 and image.is_uint16 and image.mode == ("L" if colours == 1 else "RGB")
    values = samples.astype(np.float32).transpose(2, 0, 1) / np.float32(65535)
    assert np.array_equal(image.rgb.numpy()[:colours], values[:colours])
    assert (image.alpha is None) == (channels in (1, 3))
    assert image.alpha is None or np.array_equal(image.alpha.numpy(), values[colours:])


def test_16_bit_transparent_colour_compares_all_bits() -> None:
    samples = np.full((1, 2, 3), 0x1234, dtype=np.uint16)
    samples[0, 1, 2] = 0x1235
    alpha = load_image(png_bytes(samples, [0], extra=struct.pack(">HHH", 0x1234, 0x1234, 0x1234))).alpha
    assert alpha is not None and alpha.flatten().tolist() == [0, 1]
    alpha = load_image(png_bytes(samples[..., 2:], [0], extra=struct.pack(">H", 0x1234))).alpha
    assert alpha is not None and alpha.flatten().tolist() == [0, 1]


def tiff_bytes(
    samples: np.ndarray, order: str = "<", compressed: bool = False, orientation: int = 1, **tags: Any
) -> bytes:
    """16-bit TIFF in either byte order; further tags override."""
    data = samples.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compressed else data
    channels = samples.shape[2]
    exif = Image.Exif()
    exif.endian = order
    layout = {256: samples.shape[1], 257: samples.shape[0], 258: (16,) * channels, 259: 8 if compressed else 1}
    layout |= {262: 2 if channels > 2 else 1, 273: 0, 274: orientation, 277: channels, 278: samples.shape[0]}
    layout |= {279: len(data), 284: 1} | ({338: 2} if channels in (2, 4) else {})
    for tag, value in {**layout, **{int(name[1:]): value for name, value in tags.items()}}.items():
        exif[tag] = value
    return exif.tobytes().removeprefix(b"Exif\0\0") + data


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("orientation", [1, 6])
def test_16_bit_tiff(order: str, compressed: bool, channels: int, orientation: int) -> None:
    samples = np.random.default_rng(2).integers(0, 65536, (6, 9, channels), dtype=np.uint16)
    image = load_image(tiff_bytes(samples, order, compressed, orientation))
    upright = samples if orientation == 1 else np.rot90(samples, -1)
    colours = min(channels, 3)
    values = upright.astype(np.float32).transpose(2, 0, 1) / np.float32(65535)
    assert image.bits == 16 and np.array_equal(image.rgb.numpy()[:colours], values[:colours])
    assert (image.alpha is not None) == (channels == 4)
    assert image.alpha is None or np.array_equal(image.alpha.numpy(), values[3:])


def test_16_bit_tiff_with_premultiplied_alpha() -> None:
    samples = np.array([[[0x1000, 0x2000, 0x4000, 0x8000], [0, 0, 0, 0]]], dtype=np.uint16)
    image = load_image(tiff_bytes(samples, t338=1))
    expected = torch.tensor([0x1000, 0x2000, 0x4000]) / 0x8000
    assert_close(image.rgb[:, 0, 0], expected, torch.float16)  # 16-bit values: half a step of 65535
    assert float((image.rgb[:, 0, 0] - expected).abs().max()) < 1 / 65535


def test_grey_tiff_where_white_is_zero() -> None:
    image = load_image(tiff_bytes(np.array([[[0], [65535], [1]]], dtype=np.uint16), t262=0))
    assert (image.rgb[0, 0] * 65535).round().tolist() == [65535, 0, 65534]


def test_16_bit_planes_are_refused_rather_than_garbled() -> None:
    with pytest.raises(ImageReadError, match="separate planes"):
        load_image(tiff_bytes(np.zeros((2, 2, 3), dtype=np.uint16), t284=2))


def test_palette_two_level_and_animated_pictures() -> None:
    colour = Image.fromarray((random_pixels(3, 8, 8).permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    palette = colour.quantize(16)
    assert_close(load_image(file_bytes(palette, "PNG")).rgb, from_pil(palette.convert("RGB")).rgb)
    assert load_image(file_bytes(palette, "PNG", transparency=0)).alpha is not None
    assert load_image(file_bytes(colour.convert("L"), "GIF")).mode == "L"
    two = load_image(file_bytes(colour.convert("1"), "PNG"))
    assert two.mode == "L" and set(two.rgb.unique().tolist()) <= {0.0, 1.0}
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    with pytest.warns(UserWarning, match="all but the first are left out"):
        first = load_image(file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert first.rgb[:, 0, 0].tolist() == [1, 0, 0]


def test_transparent_colour_of_8_bit_png() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    alpha = load_image(file_bytes(image, "PNG", transparency=(1, 2, 3))).alpha
    assert alpha is not None and alpha.flatten().tolist() == [0, 1]
    alpha = load_image(file_bytes(image.convert("L"), "PNG", transparency=9)).alpha
    assert alpha is not None and alpha.flatten().tolist() == [1, 0]


def test_cmyk_becomes_srgb_without_its_profile() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for icc in (None, PROFILE):  # an RGB profile on CMYK data is unusable and must not stop the reading
        image = load_image(file_bytes(cmyk, "JPEG", quality=95, **({"icc_profile": icc} if icc else {})))
        assert image.mode == "RGB" and image.icc is None
        assert image.rgb[0].mean() > 0.8 > image.rgb[1].mean()


def test_from_pil_leaves_the_argument_alone_and_takes_any_mode() -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"):
        pil = Image.new(mode, (5, 4))
        result = from_pil(pil)
        assert pil.mode == mode and result.size == (5, 4)
        assert result.bits == (16 if mode.startswith("I") else 8)
    with pytest.raises(ImageReadError, match="floating-point"):
        from_pil(Image.new("F", (5, 4)))
    with pytest.raises(ImageReadError, match="32-bit"):
        from_pil(Image.new("I", (2, 2), 70000))


def test_to_pil_modes() -> None:
    assert to_pil(loaded("L", 16, True)).mode == "LA"
    assert to_pil(loaded("RGB", 16)).info["icc_profile"] == PROFILE
    assert [to_pil(torch.zeros(c, 2, 3)).mode for c in (1, 2, 3, 4)] == ["L", "LA", "RGB", "RGBA"]
    image = loaded(alpha=True)
    again = from_pil(to_pil(image))
    assert torch.equal(again.rgb, image.rgb)
    with pytest.raises((ValueError, TypeCheckError)):
        to_pil(torch.zeros(5, 2, 3))


# ------------------------------------------------------------------------------------------------------- broken files


def check_one_sentence(load: Callable[[bytes], object], data: bytes) -> None:
    """A damaged file raises ImageReadError with one line that ends with a full stop."""
    try:
        load(data)
    except ImageReadError as error:
        message = str(error)
        assert message.endswith(".") and "\n" not in message and len(message) < 300
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} reached the caller") from error
    else:
        raise AssertionError("no error")


BROKEN = {
    "empty": b"",
    "text": b"this is no picture at all, but long enough to look at",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "half a jpeg": file_bytes(Image.effect_noise((64, 64), 60), "JPEG")[:700],
    "half a png": file_bytes(Image.effect_noise((64, 64), 60), "PNG")[:900],
    "half a 16-bit png": png_bytes(np.random.default_rng(0).integers(0, 65536, (40, 40, 3), dtype=np.uint16), [4])[
        :900
    ],
    "half a tiff": tiff_bytes(np.zeros((20, 20, 3), dtype=np.uint16))[:500],
    "tiff of nothing": b"II*\0\x08\0\0\0\0\0\0\0\0\0",
    "png header only": b"\x89PNG\r\n\x1a\n",
    "half a webp": file_bytes(Image.effect_noise((64, 64), 60), "WEBP")[:400],
    "half a gif": file_bytes(Image.effect_noise((64, 64), 60), "GIF")[:300],
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(data: bytes) -> None:
    check_one_sentence(load_image, data)


def test_broken_files_catches_a_raw_pillow_error() -> None:
    with pytest.raises(AssertionError):
        check_one_sentence(lambda data: Image.open(io.BytesIO(data)).load(), BROKEN["text"])


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageReadError, match=r"cannot be read: No such file.*still there\."):
        load_image(tmp_path / "no.png")
    with pytest.raises(ImageReadError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageReadError):
        read_metadata(tmp_path / "no.png")


def test_damaged_exif_does_not_stop_the_reading() -> None:
    data = file_bytes(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x0f\0\x02")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(data).size == (8, 8)


# ------------------------------------------------------------------------------------------------------------- saving


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_failure_leaves_nothing(save: Callable[..., None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of writing leaves the old file as it was and no other file."""
    target = folder / "p.png"
    target.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device; free some room.*p\.png"):
        save(loaded(), target, overwrite=True)
    assert files_in(folder) == ["p.png"] and target.read_bytes() == b"old"


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_failure_leaves_nothing(save_image, tmp_path, monkeypatch)


def test_failure_leaves_nothing_catches_writing_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_place(image: LoadedImage, path: Path, **options: Any) -> None:
        with open(path, "wb") as stream:
            to_pil(image).save(stream, "PNG")
            os.fsync(stream.fileno())

    with pytest.raises(AssertionError):
        check_failure_leaves_nothing(in_place, tmp_path, monkeypatch)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    save_image(loaded(), path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="allow overwriting"):
        save_image(loaded("L"), path)
    assert path.read_bytes() == before
    save_image(loaded("L"), path, overwrite=True)
    assert path.read_bytes() != before and files_in(tmp_path) == ["p.png"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.png"
    sync = os.fsync

    def someone_else_writes(descriptor: int) -> None:
        path.write_bytes(b"theirs")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", someone_else_writes)
    with pytest.raises(FileExistsError):
        save_image(loaded(), path)
    assert path.read_bytes() == b"theirs" and files_in(tmp_path) == ["p.png"]


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ending in one of .png"):
        save_image(loaded(), tmp_path / "p.bmp")
    with pytest.raises(ValueError, match="quality from 1 to 100"):
        save_image(loaded(), tmp_path / "p.jpg", quality=0)
    with pytest.raises(ValueError, match="must be JSON"):
        save_image(loaded(), tmp_path / "p.png", metadata={"x": object()})
    with pytest.raises(ValueError, match="save as PNG"):
        save_image(LoadedImage(torch.zeros(3, 1, 17000)), tmp_path / "p.webp")
    with pytest.raises(OSError):
        save_image(loaded(), tmp_path / "no folder" / "p.png")
    assert files_in(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize("suffix", [s for s in WRITE_SUFFIXES if s != ".png"])
def test_exif_keeps_the_users_words_and_gets_the_new_size(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    save_image(loaded(), path, metadata=SETTINGS)
    save_image(load_image(path), path, metadata={"again": 1}, overwrite=True)
    assert read_metadata(path) == {"again": 1}
    exif = parsed(load_image(path).exif)
    details = exif.get_ifd(ExifTags.IFD.Exif)
    assert (details[ExifTags.Base.ExifImageWidth], details[ExifTags.Base.ExifImageHeight]) == (23, 17)
    assert json.loads(details[ExifTags.Base.UserComment][8:])["comment"] == "by the sea"
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N" and float(details[0x829A]) == pytest.approx(1 / 60)


def test_png_leaves_the_users_words_alone(tmp_path: Path) -> None:
    for bits in (8, 16):
        path = tmp_path / f"{bits}.png"
        save_image(loaded(bits=bits), path, metadata=SETTINGS)
        details = parsed(load_image(path).exif).get_ifd(ExifTags.IFD.Exif)
        assert details[ExifTags.Base.UserComment] == b"ASCII\0\0\0by the sea"
        with Image.open(path) as image:
            assert json.loads(image.info["latentindigo"]) == SETTINGS


def test_no_metadata_is_none(tmp_path: Path) -> None:
    for suffix in WRITE_SUFFIXES:
        save_image(loaded(), tmp_path / f"p{suffix}")
        assert read_metadata(tmp_path / f"p{suffix}") is None


def test_a_foreign_comment_is_no_metadata(tmp_path: Path) -> None:
    for comment in (b"UNICODE\0" + "für".encode("utf-16"), b"ASCII\0\0\0[1, 2]", b""):
        data = file_bytes(Image.new("RGB", (4, 4)), "JPEG", exif=camera_exif(comment=comment).tobytes())
        (tmp_path / "p.jpg").write_bytes(data)
        assert read_metadata(tmp_path / "p.jpg") is None
        save_image(load_image(data), tmp_path / "q.jpg", metadata=SETTINGS, overwrite=True)
        assert read_metadata(tmp_path / "q.jpg") == SETTINGS


def test_maker_notes_too_long_for_jpeg_are_left_out(tmp_path: Path) -> None:
    exif = camera_exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.IFD.MakerNote: b"m" * 70000, 0x829A: 1 / 60}
    image = LoadedImage(torch.zeros(3, 4, 4), exif=exif.tobytes())
    with pytest.warns(UserWarning, match="too long for JPEG"):
        save_image(image, tmp_path / "p.jpg", metadata=SETTINGS)
    assert read_metadata(tmp_path / "p.jpg") == SETTINGS
    save_image(image, tmp_path / "p.tif", metadata=SETTINGS)
    assert len(parsed(load_image(tmp_path / "p.tif").exif).get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.MakerNote]) == 70000


def test_sample_layout_of_a_tiff_is_not_carried_into_other_files(tmp_path: Path) -> None:
    save_image(loaded(bits=16, alpha=True), tmp_path / "p.tif")
    exif = parsed(load_image(tmp_path / "p.tif").exif)
    assert set(exif) == {ExifTags.Base.Make, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo}


# -------------------------------------------------------------------------------------------------- LoadedImage, lists


def test_replace_pixels_keeps_the_rest() -> None:
    image = loaded("L", 16, True)
    larger = image.replace_pixels(torch.zeros(3, 34, 46), torch.ones(1, 34, 46))
    assert larger.size == (46, 34) and larger.is_uint16
    kept = (image.mode, image.bits, image.icc, image.exif, image.name)
    assert (larger.mode, larger.bits, larger.icc, larger.exif, larger.name) == kept
    assert larger.replace_pixels(larger.rgb, None).alpha is None


def test_loaded_image_refuses_what_does_not_fit() -> None:
    with pytest.raises((ValueError, TypeCheckError)):
        LoadedImage(torch.zeros(1, 4, 4))
    with pytest.raises((ValueError, TypeCheckError)):
        LoadedImage(torch.zeros(3, 4, 4), torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match="8 or 16 bits"):
        LoadedImage(torch.zeros(3, 4, 4), bits=12)


def test_list_images(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png", "sub/c.tif", ".git/d.png", "a-b/e.webp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a-b/e.webp", "a.jpg", "b.PNG", "sub/c.tif"]
    assert [path.name for path in list_images(tmp_path, recursive=False)] == ["a.jpg", "b.PNG"]
    with pytest.raises(ValueError, match="existing folder"):
        list_images(tmp_path / "a.jpg")


def test_photos_load(data_dir: Path) -> None:
    paths = list_images(data_dir / "val")
    image = load_image(paths[0])
    assert image.rgb.dtype == torch.float32 and 0 <= float(image.rgb.min()) < float(image.rgb.max()) <= 1


# --------------------------------------------------------------------------------------------- Pillow on tensors, sheet


def test_pil_jpeg_is_pillows() -> None:
    x = random_pixels(3, 24, 32)
    picture = Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy())
    with Image.open(io.BytesIO(file_bytes(picture, "JPEG", quality=40, subsampling="4:2:0"))) as decoded:
        expected = torch.from_numpy(np.array(decoded)).permute(2, 0, 1).float() / 255
    before = x.clone()
    assert torch.equal(pil_jpeg(x, 40), expected) and torch.equal(x, before)
    batch = pil_jpeg(torch.stack([x, x]), torch.tensor([40.0, 90.0]))
    assert torch.equal(batch[0], expected) and torch.equal(batch[1], pil_jpeg(x, 90))
    assert pil_jpeg(x.double(), [40]).dtype == torch.float64
    with pytest.raises(ValueError, match="quality from 1 to 100"):
        pil_jpeg(x, 0)
    with pytest.raises((ValueError, TypeCheckError)):
        pil_jpeg(x[:1], 50)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "lanczos", "area"])
def test_pil_resize_is_pillows_without_the_rounding(method: str) -> None:
    x = 0.25 + 0.5 * random_pixels(3, 24, 32)
    picture = Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy())
    filters = {"area": Image.Resampling.BOX}
    resample = filters.get(method) or Image.Resampling[method.upper()]
    for size in ((8, 6), (50, 31)):
        result = pil_resize(x, size, method)
        eight = torch.from_numpy(np.array(picture.resize(size, resample))).permute(2, 0, 1) / 255
        assert result.shape == (3, size[1], size[0])
        assert float((result - eight).abs().max()) < 2.5 / 255
    flat = pil_resize(torch.full((2, 1, 5, 5), 0.123456), (9, 9), method)
    assert_close(flat, torch.full((2, 1, 9, 9), 0.123456))


def test_pil_resize_refuses() -> None:
    with pytest.raises(ValueError, match="bicubic"):
        pil_resize(torch.zeros(3, 4, 4), (2, 2), "cubic")
    with pytest.raises(ValueError, match="at least 1x1"):
        pil_resize(torch.zeros(3, 4, 4), (0, 2))


def test_contact_sheet() -> None:
    small, grey = torch.full((3, 4, 8), 0.5), torch.zeros(1, 100, 50)
    sheet = contact_sheet([[small, grey], [small]], ["input", "detail"], cell=64)
    pixels = np.asarray(sheet)
    assert sheet.mode == "RGB" and sheet.width > 2 * 64 and sheet.height > 2 * 64
    assert (pixels[:, 4:68] == 128).all(axis=2).sum() == 2 * 64 * 32  # enlarged to the cell, aspect kept
    assert (pixels == 0).all(axis=2)[18:].sum() == 32 * 64
    assert contact_sheet([[small]], ["x"], cell=(40, 20)).height < 64
    with pytest.raises(ValueError, match="one label per column"):
        contact_sheet([[small, grey]], ["input"])


def test_every_promised_format_can_be_written(tmp_path: Path) -> None:
    for suffix in WRITE_SUFFIXES:
        save_image(loaded(), tmp_path / f"P{suffix.upper()}")
        assert load_image(tmp_path / f"P{suffix.upper()}").size == (23, 17)
    assert set(WRITE_SUFFIXES) <= images.READ_SUFFIXES
    assert ImageOps.exif_transpose(to_pil(loaded())).size == (23, 17)
