"""The byte level of written picture files: 16-bit samples in PNG and TIFF, and EXIF with the stored settings.

Pillow has no 16-bit colour mode, so such files are written by the small PNG and TIFF encoders here. EXIF is copied
without the tags that describe the file it came from.

Only bytes, NumPy arrays and Pillow's objects: tensors, file names and what a `LoadedImage` is belong to
`latentindigo.images`.
"""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from latentindigo.opening import DECODE_ERRORS, one_line

__all__ = [
    "METADATA_KEY",
    "exif_to_write",
    "kept_exif",
    "png16",
    "short_exif",
    "stored_metadata",
    "tiff",
]

METADATA_KEY = "latentindigo"

# IFD0 tags of a TIFF that describe the stored samples, not the photo; copied into another file they would be lies.
_STRUCTURAL_TAGS = frozenset(
    [*range(254, 260), 262, 263, 264, 265, 266, 273, 274, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293]
    + [297, 301, 317, 318, 319, 320, *range(321, 326), 330, 332, 333, 334, 336, 337, 338, 339, 340, 341, 342, 347]
    + [*range(512, 522), 529, 530, 531, 532, 700, 33723, 34377, 34675]
)
# Copied by content, where they belong; elsewhere, in damaged EXIF, they lead nowhere.
_POINTERS = frozenset({ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop})
_USER_COMMENT = 0x9286
_PIXEL_WIDTH, _PIXEL_HEIGHT = 0xA002, 0xA003


# ---------------------------------------------------------------------------------------------------- EXIF and settings


def kept_exif(image: Image.Image, name: str) -> bytes | None:
    """Take the EXIF without orientation and without the tags that describe how this file stores its samples.

    Args:
        image: Pillow image.
        name: Name for the warning about damaged EXIF, which is left out.

    Returns:
        The EXIF block, or None if there is none.
    """
    try:
        exif = _copy_exif(image.getexif())
        return exif.tobytes() if len(exif) else None
    except DECODE_ERRORS as error:
        warnings.warn(f"'{name}': its EXIF is damaged and is left out ({one_line(error)})", stacklevel=2)
        return None


def _copy_exif(source: Image.Exif) -> Image.Exif:
    copy = Image.Exif()
    copy.endian = source.endian
    details = dict(source.get_ifd(ExifTags.IFD.Exif))
    if ExifTags.IFD.Interop in details:
        details[ExifTags.IFD.Interop] = dict(source.get_ifd(ExifTags.IFD.Interop))
    position = dict(source.get_ifd(ExifTags.IFD.GPSInfo))
    for tag, value in source.items():
        if tag not in _STRUCTURAL_TAGS and tag not in _POINTERS:
            copy[tag] = value
    if details:
        copy[ExifTags.IFD.Exif] = details
    if position:
        copy[ExifTags.IFD.GPSInfo] = position
    return copy


def exif_to_write(block: bytes | None, size: tuple[int, int], text: str | None) -> Image.Exif:
    """Build the EXIF of a result: the source's with the new size, and with the settings in its user comment.

    Args:
        block: EXIF of the source, or None.
        size: (width, height) of the result.
        text: Settings as JSON, or None.

    Returns:
        A new EXIF object, empty if there is nothing to write.
    """
    source = Image.Exif()
    if block:
        source.load(block)
    exif = _copy_exif(source)
    details = dict(exif.get(ExifTags.IFD.Exif, {}))
    width, height = size
    for tag, side in ((_PIXEL_WIDTH, width), (_PIXEL_HEIGHT, height)):
        if tag in details:
            details[tag] = side
    if text is not None:
        comment: dict[str, Any] = {METADATA_KEY: json.loads(text)}
        earlier = _user_comment(details)
        if earlier:  # the photographer's own words are not ours to delete
            ours = _our_comment(earlier)
            comment["comment"] = ours.get("comment", "") if ours else earlier
        details[_USER_COMMENT] = b"ASCII\0\0\0" + json.dumps(comment).encode("ascii")
    if details:
        exif[ExifTags.IFD.Exif] = details
    return exif


def short_exif(exif: Image.Exif, name: str) -> bytes:
    """Return EXIF that fits into a JPEG segment of 64 KiB; maker notes are what makes a block longer than that.

    Args:
        exif: EXIF to write; loses its maker notes, with a warning, where it is too long.
        name: Name for the warning.

    Returns:
        The EXIF block.
    """
    data = exif.tobytes()
    if len(data) > 65533:
        warnings.warn(f"'{name}': its EXIF is too long for JPEG; the maker notes are left out", stacklevel=4)
        details = exif.get(ExifTags.IFD.Exif, {})
        exif[ExifTags.IFD.Exif] = {tag: value for tag, value in details.items() if tag != ExifTags.IFD.MakerNote}
        data = exif.tobytes()
    return data


def stored_metadata(image: Image.Image) -> dict[str, Any] | None:
    """Read the settings back that `png16`, Pillow's PNG text or `exif_to_write` stored.

    Args:
        image: An opened file.

    Returns:
        The stored dict, or None if the file carries none.
    """
    if image.format == "PNG":
        text = image.info.get(METADATA_KEY)
        comment = _our_comment(f'{{"{METADATA_KEY}": {text}}}') if text else {}
    else:
        comment = _our_comment(_user_comment(dict(image.getexif().get_ifd(ExifTags.IFD.Exif))))
    content = comment.get(METADATA_KEY)
    return content if isinstance(content, dict) else None


def _user_comment(details: dict[int, Any]) -> str:
    raw = details.get(_USER_COMMENT, b"")
    if isinstance(raw, str):
        return raw.strip("\0 ")
    if not isinstance(raw, bytes):  # numbers, in a damaged file
        return ""
    code, body = raw[:8], raw[8:]
    encoding = "utf-16" if code.startswith(b"UNICODE") else "utf-8"
    return body.decode(encoding, errors="replace").strip("\0 ")


def _our_comment(comment: str) -> dict[str, Any]:
    try:
        content = json.loads(comment)
    except ValueError:
        return {}
    return content if isinstance(content, dict) and METADATA_KEY in content else {}


# -------------------------------------------------------------------------------------------------------------- writing


def png16(samples: np.ndarray, exif: Image.Exif, icc: bytes | None, text: str | None) -> bytes:
    """Write a PNG file of 16-bit samples, after the PNG specification (third edition).

    Args:
        samples: uint16, (H, W, 1..4): grey, grey + alpha, RGB or RGBA.
        exif: EXIF; an empty one is left out.
        icc: Colour profile, or None.
        text: Settings as JSON, or None.

    Returns:
        The whole file.
    """
    height, width, channels = samples.shape

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    if icc:
        parts.append(chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    if len(exif):
        parts.append(chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    if text is not None:
        parts.append(chunk(b"tEXt", METADATA_KEY.encode() + b"\0" + text.encode("latin-1")))
    rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    sub, up = rows.copy(), rows.copy()
    sub[:, 2 * channels :] -= rows[:, : -2 * channels]
    up[1:] -= rows[:-1]
    # Per row the filter whose output, as signed bytes, is smallest: the specification's own rule of thumb.
    cost = [np.abs(filtered.view(np.int8).astype(np.int32)).sum(axis=1) for filtered in (sub, up)]
    use_up = cost[1] < cost[0]
    filtered = np.where(use_up[:, None], up, sub)
    kinds = np.where(use_up, 2, 1).astype(np.uint8)[:, None]
    parts.append(chunk(b"IDAT", zlib.compress(np.concatenate([kinds, filtered], axis=1).tobytes(), 6)))
    parts.append(chunk(b"IEND", b""))
    return b"".join(parts)


def tiff(samples: np.ndarray, exif: Image.Exif, icc: bytes | None) -> bytes:
    """Write a baseline TIFF file: one deflated strip behind the directory.

    An EXIF block is itself a TIFF file without pixels, so the sample layout is added to it and Pillow lays it out.
    16-bit grey with alpha is written as RGBA, because hardly any reader, Pillow included, takes it as it is.

    Args:
        samples: uint8 or uint16, (H, W, 1..4): grey, grey + alpha, RGB or RGBA.
        exif: EXIF; the layout of the samples is added to it.
        icc: Colour profile, or None.

    Returns:
        The whole file.

    Raises:
        ValueError: The samples need more than the 4 GiB that a TIFF file can hold.
    """
    if samples.shape[2] == 2 and samples.dtype == np.uint16:
        samples = np.concatenate([samples[..., :1].repeat(3, axis=2), samples[..., 1:]], axis=2)
    height, width, channels = samples.shape
    strip = zlib.compress(samples.astype(samples.dtype.newbyteorder("<")).tobytes(), 6)
    if len(strip) > 2**32 - 2**20:
        raise ValueError("more than 4 GiB of samples")
    layout: dict[int, Any] = {
        256: width,
        257: height,
        258: (samples.itemsize * 8,) * channels,
        259: 8,  # deflate
        262: 1 if channels < 3 else 2,  # black is zero, or RGB
        273: 0,  # strip offset: Pillow adds the length of the directory
        277: channels,
        278: height,
        279: len(strip),
        284: 1,  # samples interleaved
    }
    if channels in (2, 4):
        layout[338] = 2  # alpha that colours are not multiplied by
    if icc:
        layout[34675] = icc
    exif.endian = "<"
    for tag, value in layout.items():
        exif[tag] = value
    return exif.tobytes().removeprefix(b"Exif\0\0") + strip
