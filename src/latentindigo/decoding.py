"""From an opened picture to its samples: upright, 8 or 16 bits, grey or RGB, with opacity, profile and EXIF.

Pillow has no 16-bit colour mode. Such files are decoded twice through Pillow, once for the high and once for the low
bytes of every sample. Palettes, CMYK, Lab and the like become RGB here.

Only bytes, NumPy arrays and Pillow's objects: tensors and what a `LoadedImage` is belong to `latentindigo.images`.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

from latentindigo.encoding import kept_exif
from latentindigo.opening import ImageReadError, open_picture, quiet_libtiff

__all__ = ["Samples", "decode"]


class Samples(NamedTuple):
    """A decoded picture.

    Attributes:
        colour: Grey or RGB, (H, W, 1 or 3), uint8 or uint16.
        alpha: Opacity, (H, W, 1), or None.
        bits: Bits per sample, 8 or 16.
        icc: Colour profile that holds for `colour`, or None.
        exif: EXIF without orientation, or None.
    """

    colour: np.ndarray
    alpha: np.ndarray | None
    bits: int
    icc: bytes | None
    exif: bytes | None


def decode(image: Image.Image, name: str, data: bytes | None = None, max_pixels: int | None = None) -> Samples:
    """Decode an opened picture, upright, to all the bits it has.

    Args:
        image: Pillow image of any mode.
        name: Name for messages.
        data: The file it was opened from; without it, Pillow's own 8 bits per colour are all there is.
        max_pixels: Limit it was opened with.

    Returns:
        The samples and what goes with them.

    Raises:
        ImageReadError: The values are floating-point or 32-bit, or 16-bit colours lie in separate planes; damage raises
            one of `DECODE_ERRORS`.
    """
    with quiet_libtiff():
        _refuse_planes(image, name)
        wide = None if data is None else _wide_samples(data, image, name, max_pixels)
        samples = _wide(image, name, wide) if wide is not None else _narrow(image, name)
    if image.format in ("JPEG", "MPO") and samples.colour.shape[0] >= 16 and (samples.colour[-8:] == 128).all():
        # What a decoder puts where a JPEG stream ends too early; anything else it makes up cannot be told from a photo.
        warnings.warn(f"'{name}': its lower end is plain grey, as in a photo that was cut short", stacklevel=3)
    return samples


def _wide(image: Image.Image, name: str, wide: np.ndarray) -> Samples:
    key = image.info.get("transparency")
    exif = kept_exif(image, name)
    colours = 1 if wide.shape[2] == 2 else 3
    colour, alpha = wide[..., :colours], wide[..., colours:]
    if isinstance(key, tuple):
        alpha = _colour_key_alpha(colour, key)
    return Samples(colour, alpha if alpha.shape[2] else None, 16, image.info.get("icc_profile"), exif)


def _narrow(image: Image.Image, name: str) -> Samples:
    """What Pillow decodes without loss: 8 bits, or 16 bits of grey."""
    image.load()
    icc, key = image.info.get("icc_profile"), image.info.get("transparency")
    exif = kept_exif(image, name)
    if image.mode.startswith("I"):
        grey = np.asarray(ImageOps.exif_transpose(image))[..., None]
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageReadError(f"'{name}' holds 32-bit values; convert it to 8 or 16 bits per channel first.")
        grey = grey.astype(np.uint16)
        alpha = _colour_key_alpha(grey, (key,)) if isinstance(key, int) else None
        white_is_zero = image.format == "TIFF" and _tag_of(image, 262) == 0
        return Samples(65535 - grey if white_is_zero else grey, alpha, 16, icc, exif)
    flat, icc = _to_8bit(ImageOps.exif_transpose(image), name, icc)
    values = np.asarray(flat)
    values = values[..., None] if values.ndim == 2 else values
    colours = 1 if flat.mode in ("L", "LA") else 3
    alpha = values[..., colours:]
    return Samples(values[..., :colours], alpha if alpha.shape[2] else None, 8, icc, exif)


def _refuse_planes(image: Image.Image, name: str) -> None:
    if image.format == "TIFF" and _tag_of(image, 284) == 2 and 16 in (_tag_of(image, 258) or ()):
        raise ImageReadError(f"'{name}' keeps its 16-bit channels in separate planes; save it with interleaved ones.")


def _tag_of(image: Image.Image, tag: int) -> Any:
    """Value of a TIFF tag, or None where the image is no TIFF file or lacks it."""
    return getattr(image, "tag_v2", {}).get(tag)


def _wide_samples(data: bytes, image: Image.Image, name: str, max_pixels: int | None) -> np.ndarray | None:
    """Decode a PNG or TIFF file to its full 16-bit samples.

    Pillow reads a 16-bit colour sample as its high byte. Asking for the opposite byte order makes it read the low byte,
    whatever the compression, interlacing or tiling, so two passes give all 16 bits.

    Gives upright samples (H, W, 2 to 4 channels), or None where Pillow's own decoding keeps everything.
    """
    if image.format not in ("PNG", "TIFF"):
        return None
    tiles = getattr(image, "tile", [])
    raw_modes = {str(tile.args if isinstance(tile.args, str) else tile.args[0]) for tile in tiles}
    if len(raw_modes) != 1:
        return None
    family, _, order = raw_modes.pop().rpartition(";16")
    if (family, order) == ("LA", "B"):
        # Read as four 8-bit channels, a grey-alpha pixel is the high and low byte of each sample in turn.
        pairs = _pass(data, name, max_pixels, "RGBA")
        return _joined(pairs[..., 0::2], pairs[..., 1::2])
    if family not in ("RGB", "RGBA", "RGBX", "RGBa") or order not in ("L", "B", "N"):
        return None
    order = order if order != "N" else {"little": "L", "big": "B"}[sys.byteorder]
    plain = family.replace("a", "A")  # "RGBa" would divide by alpha in 8 bits
    orders = order, "B" if order == "L" else "L"
    wide = _joined(*(_pass(data, name, max_pixels, f"{plain};16{o}") for o in orders))
    if family == "RGBa":
        opacity = np.maximum(wide[..., 3:].astype(np.float64), 1) / 65535
        colour = np.minimum(wide[..., :3] / opacity, 65535)
        wide = np.concatenate([np.rint(colour).astype(np.uint16), wide[..., 3:]], axis=2)
    return wide


def _joined(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """16-bit samples of their bytes; in place, for such pictures are large."""
    wide = high.astype(np.uint16)
    wide <<= 8
    wide |= low
    return wide


def _pass(data: bytes, name: str, max_pixels: int | None, raw_mode: str) -> np.ndarray:
    """Decode once with Pillow, taking its samples in `raw_mode`; upright."""
    image = open_picture(data, name, max_pixels)
    if not isinstance(image, ImageFile.ImageFile):
        raise ValueError(f"no decoder for {image.format}")
    image.tile = [
        tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *(tile.args or ())[1:]))
        for tile in image.tile
    ]
    return np.asarray(ImageOps.exif_transpose(image))


def _colour_key_alpha(samples: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    opaque = (samples != np.array(key)).any(axis=2, keepdims=True)
    return opaque.astype(np.uint16) * 65535


def _to_8bit(image: Image.Image, name: str, icc: bytes | None) -> tuple[Image.Image, bytes | None]:
    """One of L, LA, RGB, RGBA, and the profile that holds for it."""
    if image.mode == "F":
        raise ImageReadError(f"'{name}' holds floating-point values; convert it to 8 or 16 bits per channel first.")
    transparent = image.has_transparency_data
    if image.mode in ("1", "L", "LA", "La"):
        return image.convert("LA" if transparent else "L"), icc
    if image.mode == "CMYK":
        return _cmyk_to_srgb(image, icc), None
    if image.mode == "LAB":
        icc = None  # It describes Lab, and Pillow makes sRGB of that.
    colour = image.convert("RGBA" if transparent else "RGB")
    if image.mode in ("P", "PA"):
        red, green, blue = colour.split()[:3]
        if red.tobytes() == green.tobytes() == blue.tobytes():  # a palette of greys is a grey picture
            colour = colour.convert("LA" if transparent else "L")
    return colour, icc


def _cmyk_to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Through the embedded profile where there is a usable one; it no longer holds for the result."""
    if icc:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")
