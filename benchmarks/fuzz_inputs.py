"""Inputs of the fuzz run: small valid files of every format, and damage that depends only on a number.

`seed_files` makes each kind of file that can be read, from real photographs. `mutated` damages one of them: bits,
bytes, lengths, dimensions, chunks, the end of the file, or halves of two files put together.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from latentindigo.encoding import png16, tiff
from latentindigo.opening import DECODE_ERRORS

__all__ = ["MUTATIONS", "Seed", "mutated", "seed_files"]

Seed = tuple[str, bytes]
SIDE = 96


def seed_files(photos: Sequence[Image.Image]) -> list[Seed]:
    """Every kind of file that can be read, made of each photograph, at most 96 pixels wide and high.

    Args:
        photos: RGB pictures of any size.

    Returns:
        (format, bytes), those of one photograph one after the other. HEIC is left out where pillow-heif is absent.
    """
    found = []
    for photo in photos:
        picture = photo.convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        found += _pillow_kinds(picture) + _wide_kinds(picture) + _heif_kinds(picture)
    return found


def _file(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _exif(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera", orientation
    exif[0x8769] = {0xA002: 5, 0x829A: 1 / 60, 0x9286: b"ASCII\0\0\0by the sea"}
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    return exif


def _pillow_kinds(picture: Image.Image) -> list[Seed]:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rich: dict[str, Any] = {"icc_profile": icc, "exif": _exif().tobytes()}
    grey, two, cmyk = picture.convert("L"), picture.convert("1"), picture.convert("CMYK")
    palette, alpha = picture.quantize(32), picture.convert("RGBA")
    alpha.putalpha(grey)
    moving: dict[str, Any] = {"save_all": True, "append_images": [picture.transpose(Image.Transpose.ROTATE_180)] * 2}
    kinds = [
        ("jpeg", picture, "JPEG", {"quality": 85, **rich}),
        ("jpeg", picture, "JPEG", {"progressive": True, "quality": 60}),
        ("jpeg", grey, "JPEG", {"restart_marker_rows": 1}),
        ("jpeg", cmyk, "JPEG", {"icc_profile": icc}),
        ("png", picture, "PNG", rich),
        ("png", grey, "PNG", {"bits": 4}),
        ("png", palette, "PNG", {"transparency": bytes(range(32))}),
        ("png", alpha, "PNG", {}),
        ("png", two, "PNG", {}),
        ("png", picture, "PNG", moving),
        ("webp", picture, "WEBP", {"quality": 70, **rich}),
        ("webp", alpha, "WEBP", {"lossless": True}),
        ("webp", picture, "WEBP", moving),
        ("tiff", picture, "TIFF", {"compression": "tiff_lzw", "icc_profile": icc}),
        ("tiff", alpha, "TIFF", {"compression": "tiff_adobe_deflate", "strip_size": 2000}),
        ("tiff", picture, "TIFF", {"compression": "jpeg"}),
        ("tiff", two, "TIFF", {"compression": "group4"}),
        ("tiff", cmyk, "TIFF", {"compression": "packbits"}),
        ("tiff", picture.convert("LAB"), "TIFF", {}),
        ("tiff", palette, "TIFF", {}),
        ("tiff", picture, "TIFF", moving),
        ("gif", picture, "GIF", {}),
        ("gif", picture, "GIF", {"transparency": 3, **moving}),
        ("avif", picture, "AVIF", {"quality": 60, "speed": 10, **rich}),
        ("avif", alpha, "AVIF", {"speed": 10}),
        ("avif", picture, "AVIF", {"speed": 10, **moving}),
        ("bmp", picture, "BMP", {}),
        ("bmp", palette, "BMP", {}),
        ("jp2", picture, "JPEG2000", {}),
        ("jp2", alpha, "JPEG2000", {"irreversible": True, "quality_mode": "rates", "quality_layers": [20, 5]}),
        ("jp2", picture, "JPEG2000", {"no_jp2": True, "tile_size": (32, 32)}),
        ("tga", picture, "TGA", {}),
        ("tga", alpha, "TGA", {"compression": "tga_rle"}),
        ("ppm", picture, "PPM", {}),
        ("ppm", grey, "PPM", {}),
    ]
    return [(name, _file(image, form, **options)) for name, image, form, options in kinds]


def _wide_kinds(picture: Image.Image) -> list[Seed]:
    """16 bits, which Pillow writes for grey only, interlaced PNG, and separate planes."""
    colour = np.asarray(picture).astype(np.uint16) * 257
    grey = Image.fromarray(colour[..., 0])
    with_alpha = np.concatenate([colour, colour[..., :1]], axis=2)
    planes = _plain_tiff(np.asarray(picture).transpose(2, 0, 1).tobytes(), picture.size)
    return [
        ("png", png16(colour, _exif(), None, '{"seed": 1}')),
        ("png", png16(with_alpha[..., 2:], Image.Exif(), None, None)),
        ("png", _interlaced(np.asarray(picture))),
        ("png", _file(grey, "PNG")),
        ("tiff", tiff(with_alpha, _exif(), None)),
        ("tiff", _file(grey, "TIFF")),
        ("tiff", planes),
    ]


def _heif_kinds(picture: Image.Image) -> list[Seed]:
    try:
        from pillow_heif import from_pillow
    except ImportError:
        return []
    alpha = picture.convert("RGBA")
    files = []
    for image, options in ((picture, {"quality": 60, "exif": _exif(1).tobytes()}), (alpha, {"quality": -1})):
        buffer = io.BytesIO()
        from_pillow(image).save(buffer, **options)
        files.append(("heic", buffer.getvalue()))
    return files


def _plain_tiff(planes: bytes, size: tuple[int, int]) -> bytes:
    """Uncompressed RGB whose channels lie one after the other."""
    width, height = size
    exif = Image.Exif()
    exif.endian = "<"
    third = len(planes) // 3
    tags: dict[int, Any] = {256: width, 257: height, 258: (8, 8, 8), 259: 1, 262: 2, 277: 3, 278: height, 284: 2}
    tags |= {273: (0, third, 2 * third), 279: (third, third, third)}
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes().removeprefix(b"Exif\0\0") + planes


def _interlaced(pixels: np.ndarray) -> bytes:
    """8-bit RGB PNG in the seven passes of Adam7, unfiltered."""
    height, width, _ = pixels.shape
    rows = []
    for top, left, down, right in (
        (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1),
    ):  # fmt: skip
        part = pixels[top::down, left::right]
        if part.size:
            rows += [b"\0" + row.tobytes() for row in part]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    ]
    made = (struct.pack(">I", len(body)) + kind + body + _crc(kind + body) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def _crc(body: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(body))


# --------------------------------------------------------------------------------------------------------------- damage

Rng = np.random.Generator


def _where(rng: Rng, data: bytearray) -> int:
    """A place in the file; every other time in its first 600 bytes, where headers are."""
    return int(rng.integers(min(len(data), 600) if rng.random() < 0.5 else len(data)))


def _bits(rng: Rng, data: bytearray, other: bytes) -> bytearray:
    for _ in range(int(rng.integers(1, 9))):
        data[_where(rng, data)] ^= 1 << int(rng.integers(8))
    return data


def _bytes(rng: Rng, data: bytearray, other: bytes) -> bytearray:
    for _ in range(int(rng.integers(1, 17))):
        data[_where(rng, data)] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
    return data


def _truncated(rng: Rng, data: bytearray, other: bytes) -> bytearray:
    return data[: int(rng.integers(len(data)))]


def _holed(rng: Rng, data: bytearray, other: bytes) -> bytearray:
    """A part overwritten with zeros, as lost sectors are."""
    start, length = _where(rng, data), int(rng.integers(1, 1 + len(data) // 2))
    data[start : start + length] = bytes(len(data[start : start + length]))
    return data


def _deleted(rng: Rng, data: bytearray, other: bytes) -> bytearray:
    start = _where(rng, data)
    del data[start : start + int(rng.integers(1, 65))]
    return data


def _doubled(rng: Rng, data: bytearray, other: bytes) -> bytearray:
    start, length = _where(rng, data), int(rng.integers(1, 513))
    return data[: start + length] + data[start:]


def _swapped(rng: Rng, data: bytearray, other: bytes) -> bytearray:
    length = int(rng.integers(1, 129))
    first, second = sorted((_where(rng, data), _where(rng, data)))
    if first + length > second:
        return data[::-1]
    parts = data[:first], data[first : first + length], data[first + length : second]
    return parts[0] + data[second : second + length] + parts[2] + parts[1] + data[second + length :]


def _spliced(rng: Rng, data: bytearray, other: bytes) -> bytearray:
    return data[: _where(rng, data)] + other[int(rng.integers(len(other))) :]


def _numbers(rng: Rng, data: bytearray, other: bytes) -> bytearray:
    """A length, an offset or a dimension, in either byte order and 2 or 4 bytes, replaced by an extreme one."""
    for _ in range(int(rng.integers(1, 4))):
        at, order, wide = _where(rng, data), str(rng.choice(["<", ">"])), bool(rng.integers(2))
        value = int(rng.choice([0, 1, 2, 255, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1]))
        field = struct.pack(f"{order}I", value) if wide else struct.pack(f"{order}H", value & 0xFFFF)
        data[at : at + len(field)] = field[: len(data) - at]
    return data


def _sizes(rng: Rng, data: bytearray, other: bytes) -> bytearray:
    """The picture's own width or height, wherever the header repeats it, replaced by a larger or smaller one."""
    width, height = _size_of(bytes(data))
    value = int(rng.choice([0, 1, 3, 33, 97, 200, 1000, 4000, 16384, 65535, 2**31 - 1]))
    side = width if rng.integers(2) else height
    head, rest = data[:600], data[600:]
    for order in "<>":
        for form, top in (("I", 2**32 - 1), ("H", 65535)):
            head = head.replace(struct.pack(order + form, side), struct.pack(order + form, min(value, top)))
    for kind in (b"IHDR",):  # a PNG's header is checked: with a wrong checksum nothing further would be tried
        at = bytes(head).find(kind)
        if at >= 0 and len(head) >= at + 21:
            head[at + 17 : at + 21] = _crc(bytes(head[at : at + 17]))
    return head + rest


def _size_of(data: bytes) -> tuple[int, int]:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            return image.size
    except DECODE_ERRORS:  # damaged already
        return SIDE, SIDE


MUTATIONS: dict[str, Callable[[Rng, bytearray, bytes], bytearray]] = {
    "bits": _bits,
    "bytes": _bytes,
    "cut short": _truncated,
    "zeros": _holed,
    "deleted": _deleted,
    "doubled": _doubled,
    "swapped": _swapped,
    "two files": _spliced,
    "numbers": _numbers,
    "dimensions": _sizes,
}


def _repair_png(data: bytearray, rng: Rng) -> bytearray:
    """Give a damaged PNG right checksums, or the damage would never get past them."""
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = _crc(bytes(data[at + 4 : end]))
        at = end + 4
    return data


def mutated(seeds: Sequence[Seed], seed: int, index: int) -> tuple[str, str, bytes]:
    """Input number `index`, always the same for the same seed files.

    Args:
        seeds: From `seed_files`, and others.
        seed: Seed of the whole run.
        index: Number of the input; the files are taken in turn, so that all formats are tried alike.

    Returns:
        Format, kind of damage ("a + b" where there were two), and the bytes.
    """
    rng = np.random.default_rng([seed, index])
    form, whole = seeds[index % len(seeds)]
    other = seeds[int(rng.integers(len(seeds)))][1]
    names = [str(rng.choice(list(MUTATIONS))) for _ in range(1 if rng.random() < 0.75 else 2)]
    data = bytearray(whole)
    for name in names:
        data = MUTATIONS[name](rng, data, other) if data else data
    if form.endswith("png") and rng.random() < 0.7:
        data = _repair_png(data, rng)
    return form, " + ".join(names), bytes(data)
