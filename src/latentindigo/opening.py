"""From a file to an opened picture that is safe to decode: is it a file, which format, how many pixels, is it whole?

Everything here is decided before a pixel is decoded. Only formats that hold pictures and nothing else are tried. A
refusal is an `ImageReadError`, one sentence.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from latentindigo.safe_files import explain, printable

__all__ = [
    "DECODE_ERRORS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "READ_SUFFIXES",
    "ImageReadError",
    "damaged",
    "has_more_frames",
    "one_line",
    "open_picture",
    "quiet_libtiff",
    "read_file",
]

READ_SUFFIXES = frozenset(
    ".avif .bmp .gif .heic .heif .hif .jfif .jp2 .jpeg .jpg .pgm .png .ppm .tga .tif .tiff .webp".split()
)
MAX_PIXELS = 180_000_000  # 20 to 27 bytes each while a picture is read: 5 GB.
MAX_FILE_BYTES = 2**31
# A block of 8x8 pixels takes a bit or more, in the scan that holds its mean; only arithmetic coding could beat that.
_JPEG_PIXELS_PER_BYTE = 8 * 64
_PIXELS_VARIABLE = "LATENTINDIGO_MAX_PIXELS"

# Pillow can open far more; some of it (EPS, WMF) starts other programs. TGA comes last: it has no signature.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP", "JPEG2000", "PPM", "TGA")
_KNOWN = "PNG, JPEG, WebP, TIFF, AVIF, HEIC, GIF, BMP, JPEG 2000, PPM or TGA"
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
# What often bears a picture's name by mistake; a failed download is a web page.
_STRANGERS = {
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"<svg": "an SVG drawing",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<?xml": "an XML document",
    b"8bps": "a Photoshop document",
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cjxl ": "a JPEG XL picture",
}
# What Pillow raises on damaged files depends on the format and on the byte that is wrong.
DECODE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    SyntaxError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageReadError(ValueError):
    """A file that cannot be read as a picture; the message is one sentence fit to show to a user."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line without a full stop, or its class where it says nothing.

    Args:
        error: The error.

    Returns:
        Text to build a sentence around.
    """
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return printable(" ".join(text.split())).rstrip(".") or type(error).__name__


def damaged(name: str, error: BaseException) -> ImageReadError:
    """The refusal of a file that a decoder stumbles over.

    Args:
        name: Name of the file.
        error: What the decoder raised.

    Returns:
        The error to raise.
    """
    if "MAX_TEXT" in str(error):  # Pillow's bounds for what is packed in a PNG's text and profile
        return ImageReadError(
            f"'{name}' packs more text, or a larger colour profile, than is unpacked (1 MiB each); save it without."
        )
    return ImageReadError(f"'{name}' is damaged or cut short ({one_line(error)}); copy or download it again.")


# ---------------------------------------------------------------------------------------------------------------- files


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a file whole, if it is one and of a reasonable size.

    Args:
        path: Path of a file, or of a link to one. A pipe or a device could block or never end, so it is not opened.

    Returns:
        Its bytes, at least one.

    Raises:
        ImageReadError: It is missing, no file, unreadable, empty, or larger than `MAX_FILE_BYTES`.
    """
    name = printable(os.fspath(path))
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a pipe, a socket or a device"
            raise ImageReadError(f"'{name}' is {kind}; give the file of a picture.")
        with open(path, "rb") as stream:
            # Asking for one byte more than the most would set aside room for all of them.
            data = stream.read() if facts.st_size <= MAX_FILE_BYTES else None
    except OSError as error:
        raise ImageReadError(f"'{name}' cannot be read: {explain(error)}.") from error
    except ValueError as error:
        if isinstance(error, ImageReadError):
            raise
        raise ImageReadError(f"'{name}' is no file name: {one_line(error)}.") from error
    if data is None:
        raise ImageReadError(
            f"'{name}' is larger than {MAX_FILE_BYTES // 2**30} GiB, the most that is read; cut it into parts first."
        )
    if not data:
        raise ImageReadError(f"'{name}' is empty (0 bytes); copy or download it again.")
    return data


# -------------------------------------------------------------------------------------------------------------- opening


def open_picture(data: bytes, name: str = "image", max_pixels: int | None = None) -> Image.Image:
    """Open the bytes of a picture file.

    Args:
        data: The whole file.
        name: Name for messages.
        max_pixels: Most pixels to agree to; None takes the environment's LATENTINDIGO_MAX_PIXELS, else `MAX_PIXELS`.

    Returns:
        Pillow's image, not decoded yet. Its size is within the limit, and a PNG file's checksums hold.

    Raises:
        ImageReadError: The bytes are no picture, of no format that can be read here, too many pixels, or damaged.
        ValueError: The limit in the environment is no number.
    """
    limit = _pixel_limit(max_pixels)
    if not data:
        raise ImageReadError(f"'{name}' is empty (0 bytes); copy or download it again.")
    image = _identify(data, name)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageReadError(f"'{name}' is damaged: its header says {width}x{height} pixels; copy it again.")
    if width * height > limit:
        raise ImageReadError(
            f"'{name}' has {width}x{height} pixels, more than the {limit} that are opened; if you trust the file, set "
            f"{_PIXELS_VARIABLE}={width * height}."
        )
    if image.format == "PNG":
        _check_png(data, name)
    if image.format in ("JPEG", "MPO") and width * height > _JPEG_PIXELS_PER_BYTE * len(data):
        # The decoder would fill what is missing with grey, however much it is.
        raise ImageReadError(
            f"'{name}' is damaged or cut short: its {len(data)} bytes cannot hold the {width}x{height} pixels that its "
            "header says; copy or download it again."
        )
    return image


def _pixel_limit(max_pixels: int | None) -> int:
    if max_pixels is not None:
        return max_pixels
    text = os.environ.get(_PIXELS_VARIABLE, "")
    if not text:
        return MAX_PIXELS
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise ValueError(f"{_PIXELS_VARIABLE}: expected a number of pixels such as {MAX_PIXELS}, got {text!r}")
    return int(text)


def _identify(data: bytes, name: str) -> Image.Image:
    # Pillow's own open() would apply its limit of pixels, a setting of the whole process, and try formats in turn.
    Image.init()
    wanted = _heif_family(data)
    if wanted == "HEIF":
        return _open_heif(data, name)
    if wanted == "AVIF":
        _find_avif(name)
    for form in (wanted,) if wanted else _FORMATS:
        factory, accept = Image.OPEN.get(form, (None, None))
        verdict = factory is not None and (accept is None or accept(data[:16]))
        if factory is None or not verdict:
            continue
        if isinstance(verdict, str):
            raise ImageReadError(f"'{name}' cannot be read by the Pillow installed here: {verdict}.")
        try:
            with quiet_libtiff():
                return factory(io.BytesIO(data), "")
        except Image.DecompressionBombError as error:  # a GIF whose first frame is larger than the header says
            raise ImageReadError(f"'{name}' is damaged: its first frame has more pixels than its header.") from error
        except DECODE_ERRORS as error:
            if accept is None:  # no signature, so it was only a guess
                continue
            if "MAX_TEXT" in str(error):
                raise damaged(name, error) from error
            raise ImageReadError(
                f"'{name}' is damaged, cut short, or {form} of a kind that cannot be read ({one_line(error)}); copy it "
                "again, or save it in another format."
            ) from error
    raise ImageReadError(f"'{name}' is no picture: it holds {_describe(data)}; expected {_KNOWN}.")


def _describe(data: bytes) -> str:
    head = data[:512]
    start = head.lstrip().lower()
    for signature, kind in _STRANGERS.items():
        if start.startswith(signature.lower()):
            return kind
    if not any(head):
        return "zeros only"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        text = head[: error.start].decode("utf-8") if error.start > len(head) - 4 else ""
    return "text" if text and all(char.isprintable() or char in "\t\r\n" for char in text) else "unknown data"


def _heif_family(data: bytes) -> str | None:
    """AVIF or HEIF, by the brands at the beginning of the file."""
    if data[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(data[:4], "big"), 256, len(data))
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}
    return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEIF_BRANDS else None


def _open_heif(data: bytes, name: str) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile  # optional, and only for those who have such photos
    except ImportError as error:
        raise ImageReadError(
            f"'{name}' is a HEIC photo, which needs one more package: pip install 'latentindigo[heif]'."
        ) from error
    try:
        return HeifImageFile(io.BytesIO(data), "")
    except DECODE_ERRORS as error:
        raise damaged(name, error) from error


def _find_avif(name: str) -> None:
    """Pillow reads AVIF from 11.3 on; before that, or built without it, a plug-in does."""
    _, accept = Image.OPEN.get("AVIF", (None, None))
    if accept is not None and accept(b"\0\0\0\x20ftypavif") is True:
        return
    try:
        import pillow_avif  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        raise ImageReadError(
            f"'{name}' is an AVIF picture, which the Pillow installed here does not read: pip install "
            "'latentindigo[avif]', or Pillow 11.3 or newer."
        ) from error


def _check_png(data: bytes, name: str) -> None:
    """Compare the checksums of the pixels' chunks, which Pillow skips; a chunk cut short is found when decoding."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if kind == b"IEND" or end + 4 > len(data):
            return
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ImageReadError(f"'{name}' is damaged: its pixels do not match their checksum; copy it again.")
        at = end + 4


def has_more_frames(image: Image.Image) -> bool:
    """Whether a file holds pictures after its first: an animation, or pages.

    Args:
        image: An opened file, still open. Frames are not counted: there may be millions.

    Returns:
        False too where the file is too damaged to tell.
    """
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:
        return False


@contextlib.contextmanager
def quiet_libtiff() -> Iterator[None]:
    """Keep libtiff from writing to stderr on its own; what it has to say comes back as an exception anyway.

    The library's handler belongs to the whole process and is put back. Where the library cannot be reached, as in
    builds that contain it, nothing changes.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            set_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            stack.callback(set_handler, set_handler(None))
        yield
