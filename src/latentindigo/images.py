"""The only place where pixels meet files: loading, saving, Pillow's own JPEG and resize, and comparison sheets.

A picture enters as a `LoadedImage`: RGB in [0, 1] plus everything that has to survive the restoration untouched (alpha,
colour profile, EXIF, bit depth, being grey). It leaves through `save_image`, which writes all of that back and never
leaves half a file behind.

What a file must be before it is decoded stands in `latentindigo.opening`, how it becomes samples in
`latentindigo.decoding`, and how 16-bit samples and EXIF become bytes in `latentindigo.encoding`.
"""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latentindigo.decoding import Samples, decode
from latentindigo.encoding import METADATA_KEY, exif_to_write, png16, short_exif, stored_metadata, tiff
from latentindigo.opening import (
    DECODE_ERRORS,
    READ_SUFFIXES,
    ImageReadError,
    damaged,
    has_more_frames,
    one_line,
    open_picture,
    read_file,
)
from latentindigo.safe_files import printable, refuse_overwrite, write_whole

__all__ = [
    "READ_SUFFIXES",
    "WRITE_SUFFIXES",
    "ImageReadError",
    "LoadedImage",
    "contact_sheet",
    "encode_image",
    "from_pil",
    "list_images",
    "load_image",
    "pil_jpeg",
    "pil_resize",
    "read_metadata",
    "save_image",
    "to_pil",
]

WRITE_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
_STRIP_PIXELS = 2**20  # Quantised at a time.
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
}


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """A picture as the pipeline sees it, with what must survive the restoration.

    Attributes:
        rgb: Pixels, float32, (3, H, W), [0, 1]; a grey picture holds its one channel three times.
        alpha: Opacity, (1, H, W), [0, 1], or None. Colours are not multiplied by it.
        mode: "RGB", or "L" for a picture that is grey and stays grey.
        bits: Bits per sample of the source, 8 or 16, used again by formats that can hold them.
        icc: Colour profile, or None. Pixels are in this profile's space; nothing converts them.
        exif: EXIF block with orientation removed (it is applied to the pixels), or None.
        name: File name for messages.
    """

    rgb: Float[Tensor, "3 h w"]
    alpha: Float[Tensor, "1 h w"] | None = None
    mode: str = "RGB"
    bits: int = 8
    icc: bytes | None = None
    exif: bytes | None = None
    name: str = "image"

    def __post_init__(self) -> None:
        if self.rgb.ndim != 3 or self.rgb.shape[0] != 3:
            raise ValueError(f"LoadedImage.rgb: expected (3, H, W), got {tuple(self.rgb.shape)}; repeat a grey channel")
        if self.alpha is not None and self.alpha.shape != (1, *self.rgb.shape[1:]):
            raise ValueError(
                f"LoadedImage.alpha: expected {(1, *self.rgb.shape[1:])} to match rgb, got {tuple(self.alpha.shape)}; "
                "resize it with the picture"
            )
        if self.mode not in ("RGB", "L") or self.bits not in (8, 16):
            raise ValueError(
                f"LoadedImage: expected mode RGB or L and 8 or 16 bits, got {self.mode!r}, {self.bits}; convert first"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[2], self.rgb.shape[1]

    @property
    def is_uint16(self) -> bool:
        """Whether the source had 16 bits per sample."""
        return self.bits == 16

    def replace_pixels(self, rgb: Float[Tensor, "3 h2 w2"], alpha: Float[Tensor, "1 h2 w2"] | None) -> LoadedImage:
        """Give new pixels, of any size, to the same picture: mode, bits, profile, EXIF and name stay.

        Args:
            rgb: New pixels, (3, H', W'), [0, 1].
            alpha: New opacity, (1, H', W'), [0, 1], or None for an opaque result.

        Returns:
            A new `LoadedImage`.
        """
        return replace(self, rgb=rgb, alpha=alpha)


# ---------------------------------------------------------------------------------------------------------- reading


def list_images(folder: str | os.PathLike[str], recursive: bool = True) -> list[Path]:
    """Pictures in a folder by file name ending, in an order that is the same on every machine.

    Whether they can be read is not asked: a link that leads nowhere is listed, and fails when it is loaded. A folder
    that may not be searched is left out with a warning.

    Args:
        folder: Folder to search.
        recursive: Also search the folders inside it, but not those that are links: they may lead back.

    Returns:
        Paths that start with `folder`, sorted by their parts. Hidden files and folders are left out.

    Raises:
        ValueError: `folder` is not a folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"list_images: expected a folder, got '{printable(str(root))}'; pass an existing folder")

    def left_out(error: OSError) -> None:
        place = printable(str(error.filename))
        warnings.warn(f"'{place}' is left out: {error.strerror or one_line(error)}", stacklevel=2)

    found: list[Path] = []
    for place, folders, files in os.walk(root, onerror=left_out):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        for name in files:
            if os.path.splitext(name)[1].lower() in READ_SUFFIXES and not name.startswith("."):
                found.append(Path(place, name))
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def load_image(
    source: str | os.PathLike[str] | bytes, name: str | None = None, *, max_pixels: int | None = None
) -> LoadedImage:
    """Read a picture upright, with everything that has to survive.

    The EXIF orientation is applied. Palette pictures become RGB, CMYK becomes sRGB (through its profile if it has one)
    at 8 bits. Of an animation or of pages the first counts, with a warning. 16-bit grey, RGB and RGBA PNG and TIFF
    files keep all their bits; HEIC and AVIF are read at 8 bits.

    Args:
        source: Path of a file, or the bytes of one.
        name: Name for messages, None for the path's.
        max_pixels: Most pixels to decode; None means 180 million, or what LATENTINDIGO_MAX_PIXELS says.

    Returns:
        The picture, float32 on the CPU.

    Raises:
        ImageReadError: The file is missing, damaged, cut short, too large, no file, or no picture.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    name = printable(name or ("image" if isinstance(source, bytes) else Path(source).name))
    try:
        with open_picture(data, name, max_pixels) as image:
            samples = decode(image, name, data, max_pixels)
            if has_more_frames(image):
                warnings.warn(f"'{name}' holds several pictures; all but the first are left out", stacklevel=2)
    except ImageReadError:
        raise
    except DECODE_ERRORS as error:
        raise damaged(name, error) from error
    return _from_decoded(samples, name)


def from_pil(image: Image.Image, name: str = "image") -> LoadedImage:
    """Turn a Pillow image of any mode into a `LoadedImage`; orientation is applied, the argument is left alone.

    Args:
        image: Pillow image.
        name: Name for messages.

    Returns:
        The picture, float32 on the CPU.

    Raises:
        ImageReadError: The mode cannot be shown as RGB, or loading its file fails.
    """
    try:
        return _from_decoded(decode(image.copy(), name), name)
    except ImageReadError:
        raise
    except DECODE_ERRORS as error:
        raise ImageReadError(f"'{name}' cannot be converted to RGB: {one_line(error)}.") from error


def _from_decoded(samples: Samples, name: str) -> LoadedImage:
    rgb = _to_tensor(samples.colour, samples.bits)
    return LoadedImage(
        rgb=rgb.expand(3, -1, -1).contiguous(),
        alpha=None if samples.alpha is None else _to_tensor(samples.alpha, samples.bits),
        mode="L" if len(rgb) == 1 else "RGB",
        bits=samples.bits,
        icc=samples.icc,
        exif=samples.exif,
        name=name,
    )


def _to_tensor(samples: np.ndarray, bits: int) -> Tensor:
    # Divided in place: for the largest pictures each copy of the floats is gigabytes.
    return torch.from_numpy(samples.transpose(2, 0, 1).astype(np.float32, order="C")).div_(2**bits - 1)


# ---------------------------------------------------------------------------------------------------------- writing


def to_pil(image: LoadedImage | Float[Tensor, "c h w"]) -> Image.Image:
    """Make an 8-bit Pillow image; Pillow has no 16-bit colour, so `save_image` is the way to keep 16 bits.

    Args:
        image: A `LoadedImage`, or a tensor (1, H, W), (2, H, W), (3, H, W) or (4, H, W) in [0, 1] meant as grey,
            grey + alpha, RGB or RGBA.

    Returns:
        An image of mode L, LA, RGB or RGBA.

    Raises:
        ValueError: The tensor has another shape.
    """
    if isinstance(image, LoadedImage):
        picture = _from_samples(_to_samples(image, 8))
        if image.icc:
            picture.info["icc_profile"] = image.icc
        return picture
    if image.ndim != 3 or not 1 <= image.shape[0] <= 4:
        raise ValueError(
            f"to_pil: expected (1..4, H, W), got {tuple(image.shape)}; pass one image of a batch at a time"
        )
    return _from_samples(_quantise(image, 8))


def _from_samples(samples: np.ndarray) -> Image.Image:
    return Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)


def _quantise(x: Tensor, bits: int) -> np.ndarray:
    """(C, H, W) in [0, 1] to (H, W, C) integers, rounded to nearest; in strips, so that no float copy is made."""
    peak = 2**bits - 1
    channels, height, width = x.shape
    out = np.empty((height, width, channels), np.uint8 if bits == 8 else np.uint16)
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        strip = x[:, top : top + rows].detach().to("cpu", torch.float32)
        out[top : top + rows] = (strip.clamp(0, 1) * peak).round().permute(1, 2, 0).numpy()
    return out


def _to_samples(image: LoadedImage, bits: int) -> np.ndarray:
    """(H, W, 1..4) integers: grey or RGB, then alpha."""
    colour = image.rgb
    if image.mode == "L":
        luma = torch.tensor([0.299, 0.587, 0.114])  # Rec. 601, as Pillow's convert("L")
        colour = (colour.detach().to("cpu", torch.float32) * luma[:, None, None]).sum(0, keepdim=True)
    samples = _quantise(colour, bits)
    if image.alpha is None:
        return samples
    return np.concatenate((samples, _quantise(image.alpha, bits)), axis=2)


def save_image(
    image: LoadedImage,
    path: str | os.PathLike[str],
    *,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    quality: int = 95,
) -> None:
    """Write a picture so that the file is complete or not there at all.

    The bytes go to a hidden file in the same folder, reach the disk, and only then take the name. PNG and TIFF keep 16
    bits; JPEG and WebP have 8. JPEG has no alpha: the picture is laid over white, with a warning. Metadata is stored as
    JSON: in PNG as the text `latentindigo`, elsewhere in the EXIF user comment.

    Args:
        image: The picture.
        path: File name ending in .png, .jpg, .jpeg, .webp, .tif or .tiff; its folder must exist.
        metadata: JSON-serialisable settings to store, or None.
        overwrite: Replace an existing file.
        quality: JPEG and WebP quality, 1 to 100.

    Raises:
        FileExistsError: The file exists and `overwrite` is False.
        ValueError: The ending is unknown, the metadata is not JSON, or the format cannot hold the picture.
        OSError: The disk is full or the folder cannot be written to.
    """
    target = Path(path)
    _require_encoding(target.name, quality)
    refuse_overwrite(target, overwrite)
    write_whole(target, encode_image(image, target.name, metadata=metadata, quality=quality), overwrite)


def encode_image(image: LoadedImage, name: str, *, metadata: dict[str, Any] | None = None, quality: int = 95) -> bytes:
    """The bytes that `save_image` writes, for places that are no local file.

    Args:
        image: The picture.
        name: File name; its ending decides the format, as in `save_image`.
        metadata: JSON-serialisable settings to store, or None.
        quality: JPEG and WebP quality, 1 to 100.

    Returns:
        The file's content.

    Raises:
        ValueError: The ending is unknown, the metadata is not JSON, or the format cannot hold the picture.
    """
    form = _require_encoding(name, quality)
    try:
        text = None if metadata is None else json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_image: metadata must be JSON: {error}; pass plain dicts, lists and numbers") from error
    try:
        return _encode(image, form, text, quality)
    except (OSError, ValueError, OverflowError, RuntimeError, struct.error) as error:
        width, height = image.size
        raise ValueError(
            f"save_image: {form} cannot hold this picture of {width}x{height} pixels ({one_line(error)}); save as PNG"
        ) from error


def _require_encoding(name: str, quality: int) -> str:
    """The format that a file name asks for."""
    form = WRITE_SUFFIXES.get(Path(name).suffix.lower())
    if form is None:
        raise ValueError(
            f"save_image: expected a name ending in one of {', '.join(WRITE_SUFFIXES)}, got '{name}'; rename it"
        )
    if not 1 <= quality <= 100:
        raise ValueError(f"save_image: expected quality from 1 to 100, got {quality}; 95 is a good choice")
    return form


def _encode(image: LoadedImage, form: str, text: str | None, quality: int) -> bytes:
    exif = exif_to_write(image.exif, image.size, None if form == "PNG" else text)
    if image.bits == 16 and form == "PNG":
        return png16(_to_samples(image, 16), exif, image.icc, text)
    if form == "TIFF":
        return tiff(_to_samples(image, image.bits), exif, image.icc)
    if form == "JPEG" and image.alpha is not None:
        warnings.warn(f"'{image.name}': JPEG has no transparency; the picture is laid over white", stacklevel=3)
        alpha = image.alpha.to(image.rgb)
        image = image.replace_pixels(image.rgb * alpha + (1 - alpha), None)
    picture = to_pil(image)
    options: dict[str, Any] = {"icc_profile": image.icc} if image.icc else {}
    if len(exif):
        options["exif"] = short_exif(exif, image.name) if form == "JPEG" else exif.tobytes()
    if form == "PNG" and text is not None:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(METADATA_KEY, text)
    elif form == "JPEG":
        # Above this quality halved chroma is the largest loss left in the file.
        options |= {"quality": quality, "subsampling": 0 if quality >= 90 else 2}
    elif form == "WEBP":
        options |= {"quality": quality, "method": 4}
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def read_metadata(path: str | os.PathLike[str] | bytes) -> dict[str, Any] | None:
    """The settings that `save_image` stored in a file.

    Args:
        path: Picture file, or its bytes.

    Returns:
        The stored dict, or None if the file carries none.

    Raises:
        ImageReadError: The file is missing, damaged, or no picture.
    """
    name = "image" if isinstance(path, bytes) else printable(Path(path).name)
    data = path if isinstance(path, bytes) else read_file(path)
    try:
        with open_picture(data, name) as image:
            return stored_metadata(image)
    except ImageReadError:
        raise
    except DECODE_ERRORS as error:
        raise damaged(name, error) from error


# --------------------------------------------------------------------------------------- Pillow on tensors, sheets


def pil_jpeg(
    x: Float[Tensor, "*batch 3 h w"], quality: int | float | Sequence[int | float] | Tensor
) -> Float[Tensor, "*batch 3 h w"]:
    """Write and read back as JPEG with Pillow, 4:2:0: the real thing, not differentiable.

    Args:
        x: Pixels, (3, H, W) or (B, 3, H, W), [0, 1]; clamped and rounded to 8 bits first.
        quality: 1 to 100, one for all or one per image; rounded to an integer.

    Returns:
        A new tensor of the same shape, dtype and device, with 8-bit values.

    Raises:
        ValueError: The shape or a quality is out of range.
    """
    if x.ndim not in (3, 4) or x.shape[-3] != 3:
        raise ValueError(f"pil_jpeg: expected (3, H, W) or (B, 3, H, W), got {tuple(x.shape)}; pass RGB")
    images = x if x.ndim == 4 else x[None]
    levels = torch.as_tensor(quality, dtype=torch.float64).detach().cpu().reshape(-1).expand(len(images)).tolist()
    if any(not 1 <= level <= 100 for level in levels):
        raise ValueError(f"pil_jpeg: expected quality from 1 to 100, got {levels}; 10 is already very poor")
    decoded: list[Tensor] = []
    for image, level in zip(images, levels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(_quantise(image, 8)).save(buffer, "JPEG", quality=round(level), subsampling=2)
        decoded.append(_to_tensor(np.asarray(Image.open(buffer)), 8))
    return torch.stack(decoded).reshape(x.shape).to(x)


def pil_resize(
    x: Float[Tensor, "*batch c h w"], size: tuple[int, int], method: str = "bicubic"
) -> Float[Tensor, "*batch c h2 w2"]:
    """Resize with Pillow's antialiased filters, without rounding to 8 bits.

    Each channel goes through Pillow's float mode, so the filters are Pillow's but values are neither rounded between
    the two passes nor clamped: bicubic and Lanczos may leave [0, 1] a little. Not differentiable.

    Args:
        x: (C, H, W) or (B, C, H, W).
        size: (width, height) of the result, as Pillow orders them.
        method: "nearest", "bilinear", "bicubic", "lanczos" or "area" (Pillow's box).

    Returns:
        A new tensor of the requested size, same dtype and device.

    Raises:
        ValueError: The shape, size or method is not one of the above.
    """
    if x.ndim not in (3, 4):
        raise ValueError(f"pil_resize: expected (C, H, W) or (B, C, H, W), got {tuple(x.shape)}; add or drop axes")
    if method not in _RESAMPLING or min(size) < 1:
        raise ValueError(
            f"pil_resize: expected a size of at least 1x1 and one of {sorted(_RESAMPLING)}, got {size} and {method!r}"
        )
    width, height = size
    planes = x.detach().to("cpu", torch.float32).reshape(-1, *x.shape[-2:]).numpy()
    resized = [np.asarray(Image.fromarray(plane).resize((width, height), _RESAMPLING[method])) for plane in planes]
    return torch.from_numpy(np.stack(resized)).reshape(*x.shape[:-2], height, width).to(x)


def contact_sheet(
    rows: Sequence[Sequence[Float[Tensor, "... _ _ _"]]], labels: Sequence[str], cell: int | tuple[int, int] = 256
) -> Image.Image:
    """Lay pictures out in a grid with a heading per column, for instance input, bicubic, restored, invented detail.

    Args:
        rows: One list of pictures per row, each (3, H, W) or (1, H, W) in [0, 1], of any size; a short row leaves
            cells blank.
        labels: Column headings.
        cell: Largest width and height of a picture in the sheet; pictures keep their aspect and are enlarged by
            whole pixels only as far as the cell allows.

    Returns:
        An RGB image on white.

    Raises:
        ValueError: There are no rows, or a row has more pictures than there are labels.
    """
    if not rows or any(len(row) > len(labels) for row in rows):
        raise ValueError(
            f"contact_sheet: expected rows of at most {len(labels)} pictures, got {[len(row) for row in rows]}; "
            "give one label per column"
        )
    cell_w, cell_h = (cell, cell) if isinstance(cell, int) else cell
    gap = max(4, min(cell_w, cell_h) // 48)
    font = ImageFont.load_default(size=max(10, cell_w // 16))
    heading = max(10, cell_w // 16) + 2 * gap
    sheet_size = (len(labels) * (cell_w + gap) + gap, heading + len(rows) * (cell_h + gap))
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        draw.text((gap + column * (cell_w + gap) + cell_w // 2, heading // 2), label, "black", font, anchor="mm")
    for index, row in enumerate(rows):
        for column, picture in enumerate(row):
            thumb = _fit(to_pil(picture).convert("RGB"), cell_w, cell_h)
            left = gap + column * (cell_w + gap) + (cell_w - thumb.width) // 2
            top = heading + index * (cell_h + gap) + (cell_h - thumb.height) // 2
            sheet.paste(thumb, (left, top))
    return sheet


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Shrink with Lanczos, enlarge by nearest neighbour so that a small input shows its pixels."""
    factor = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST)
