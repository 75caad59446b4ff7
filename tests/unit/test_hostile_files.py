"""Files that are damaged, too large, no pictures, or no files: one sentence each, and no pixel is ever made up."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import socket
import struct
import sys
import threading
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile

from latentindigo import images, opening
from latentindigo.images import (
    ImageReadError,
    LoadedImage,
    encode_image,
    list_images,
    load_image,
    read_metadata,
    save_image,
)
from latentindigo.safe_files import printable

WIDTH, HEIGHT = 48, 32


@pytest.fixture(scope="module")
def inputs(root: Path) -> Iterator[types.ModuleType]:
    """Return the module that makes the inputs of the fuzz run."""
    sys.path.insert(0, str(root / "benchmarks"))
    yield importlib.import_module("fuzz_inputs")
    sys.path.remove(str(root / "benchmarks"))


def photo(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Smooth colours with some noise: a picture that no codec stores as a constant."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 5) + np.cos(y / 7), np.cos(x / 6), np.sin((x + y) / 8)], axis=2)
    return Image.fromarray((127 + 50 * waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def seeds(inputs: types.ModuleType) -> list[tuple[str, bytes]]:
    """Return a small valid file of every kind."""
    return inputs.seed_files([photo()])


def file_bytes(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, width: int = 2, height: int = 2) -> bytes:
    """An 8-bit RGB PNG file of black pixels with more chunks before its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((1 + 3 * 2) * 2)))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *chunks, pixels, chunk(b"IEND", b"")])


def with_size(data: bytes, width: int, height: int, form: str = ">HH", swapped: bool = False) -> bytes:
    """The file with another size in its header."""
    pair = (HEIGHT, WIDTH) if swapped else (WIDTH, HEIGHT)
    new = (height, width) if swapped else (width, height)
    assert data.count(struct.pack(form, *pair)) >= 1
    return data.replace(struct.pack(form, *pair), struct.pack(form, *new), 1)


# ------------------------------------------------------------------------------------------------------- one sentence


def check_refused(load: Callable[..., object], data: bytes, expected: str) -> None:
    """A file is refused with one line that says what was expected and ends with a full stop."""
    try:
        load(data)
    except ImageReadError as error:
        message = str(error)
        assert message.endswith(".") and len(message) < 400, message
        assert printable(message) == message, "no control character may reach a terminal"
        assert expected in message, message
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} reached the caller") from error
    else:
        raise AssertionError("it was read")


def flipped_png() -> bytes:
    """A PNG file with one wrong bit in its pixels that inflates all the same."""
    data = file_bytes(photo(), "PNG", compress_level=0)
    at = data.index(b"IDAT") + 400
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def tiff_of(image: Image.Image) -> bytes:
    return file_bytes(image, "TIFF")


def tiff_bomb() -> bytes:
    exif = Image.Exif()
    exif.endian = "<"
    tags = {256: 2**20, 257: 2**20, 258: (8, 8, 8), 259: 1, 262: 2, 273: 0, 277: 3, 278: 2**20, 279: 100, 284: 1}
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes().removeprefix(b"Exif\0\0") + bytes(100)


BIG = b"x" * 2**21
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "zeros": (bytes(5000), "zeros only"),
    "text": (b"Dear Sir, this is no picture at all.\n", "it holds text"),
    "text in utf-8": ("Grüße aus Überlingen, mit ganz vielen Umlauten.".encode(), "it holds text"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF document"),
    "zip": (b"PK\x03\x04\x14\0\0\0", "a ZIP archive"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "a PostScript document"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "unknown data"),
    "escape sequences": (b"GIF89a\x1b]0;gotcha\x07\x1b[2J", "GIF"),
    "png header alone": (b"\x89PNG\r\n\x1a\n", "PNG of a kind"),
    "heic header alone": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "damaged"),
    "avif header alone": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "AVIF of a kind"),
    "tiff of nothing": (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "TIFF of a kind"),
    "tiff without an end": (b"II*\0\xff\xff\xff\x7f", "TIFF of a kind"),
    "flipped bit": (flipped_png(), "do not match their checksum"),
    "png bomb": (png(width=40000, height=40000), "40000x40000 pixels, more than the 180000000"),
    "jpeg bomb": (with_size(file_bytes(photo(), "JPEG"), 65000, 65000, swapped=True), "65000x65000 pixels"),
    "jpeg of grey": (
        with_size(file_bytes(photo(), "JPEG"), 9000, 9000, swapped=True),
        "bytes cannot hold the 9000x9000",
    ),
    "bmp bomb": (with_size(file_bytes(photo(), "BMP"), 60000, 50000, "<ii"), "60000x50000 pixels"),
    "gif bomb": (with_size(file_bytes(photo(), "GIF"), 65000, 65000, "<HH"), "65000x65000 pixels"),
    "tga bomb": (with_size(file_bytes(photo(), "TGA"), 65000, 65000, "<HH"), "65000x65000 pixels"),
    "tiff bomb": (tiff_bomb(), "1048576x1048576 pixels"),
    "ppm bomb": (b"P6 99999 99999 255\n" + bytes(100), "99999x99999 pixels"),
    "jpeg 2000 bomb": (
        with_size(file_bytes(photo(), "JPEG2000"), 2**20, 2**20, ">II", swapped=True),
        "1048576x1048576 pixels",
    ),
    "text bomb": (png(chunk(b"zTXt", b"c\0\0" + zlib.compress(BIG))), "packs more text"),
    "international text bomb": (png(chunk(b"iTXt", b"c\0\1\0\0\0" + zlib.compress(BIG))), "packs more text"),
    "many texts": (
        png(*[chunk(b"zTXt", b"c%d\0\0" % k + zlib.compress(BIG[: 2**20 - 1])) for k in range(70)]),
        "packs more text",
    ),
    "profile bomb": (png(chunk(b"iCCP", b"p\0\0" + zlib.compress(BIG))), "larger colour profile"),
    "no width": (png(width=0), "damaged"),
    "floats": (tiff_of(Image.new("F", (4, 4))), "floating-point"),
    "large numbers": (tiff_of(Image.new("I", (4, 4), 70000)), "32-bit"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes(name: str) -> None:
    check_refused(load_image, *HOSTILE[name])


@pytest.mark.parametrize(("data", "expected"), [HOSTILE["web page"], (png(), "")], ids=["another reason", "fine"])
def test_hostile_bytes_catches(data: bytes, expected: str) -> None:
    with pytest.raises(AssertionError):
        check_refused(load_image, data, expected + "!")


def test_hostile_files_are_named_and_fit_to_be_printed(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\u202egnp.png"
    path.write_bytes(b"text")
    with pytest.raises(ImageReadError, match=r"'a\\x1b\[31m\\u202egnp\.png' is no picture"):
        load_image(path)
    with pytest.raises(ImageReadError, match="no picture"):
        read_metadata(path)


def test_the_limit_of_pixels_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_bytes(photo(), "PNG")
    assert load_image(data, max_pixels=WIDTH * HEIGHT).size == (WIDTH, HEIGHT)
    with pytest.raises(ImageReadError, match=f"more than the 1535 .*LATENTINDIGO_MAX_PIXELS={WIDTH * HEIGHT}"):
        load_image(data, max_pixels=WIDTH * HEIGHT - 1)
    monkeypatch.setenv("LATENTINDIGO_MAX_PIXELS", "1000")
    with pytest.raises(ImageReadError, match="more than the 1000 "):
        load_image(data)
    monkeypatch.setenv("LATENTINDIGO_MAX_PIXELS", "2000")
    assert load_image(data).size == (WIDTH, HEIGHT)
    for wrong in ("many", "0", "-5", "1e9"):
        monkeypatch.setenv("LATENTINDIGO_MAX_PIXELS", wrong)
        with pytest.raises(ValueError, match="expected a number of pixels"):
            load_image(data)
    # Pillow's own limit belongs to the whole process: neither obeyed nor changed.
    monkeypatch.delenv("LATENTINDIGO_MAX_PIXELS")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image(data).size == (WIDTH, HEIGHT)


def test_bombs_take_no_memory() -> None:
    """Nothing is allocated for the pixels that a header claims before they are counted."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("png bomb", "jpeg bomb", "bmp bomb", "gif bomb", "text bomb", "many texts"):
        check_refused(load_image, *HOSTILE[name])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 2 ** (20 if sys.platform == "darwin" else 10), f"{grown} more"


def test_only_the_first_of_a_million_frames_is_decoded() -> None:
    frame = b"\x21\xf9\x04\0\0\0\0\0\x2c\0\0\0\0\1\0\1\0\0\x02\x02\x44\x01\0"
    data = b"GIF89a\1\0\1\0\x80\0\0\xff\0\0\0\0\xff" + frame * 1_000_000 + b";"
    done: list[LoadedImage] = []

    def load() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done.append(load_image(data))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(5)
    assert done and done[0].size == (1, 1), "the frames are counted or decoded"


# -------------------------------------------------------------------------------------------- nothing is ever made up


def check_nothing_made_up(load: Callable[[bytes], LoadedImage], data: bytes) -> int:
    """However a file is cut, it is refused, or gives the pixels of the whole; returns how often it was refused."""
    whole = load(data)
    refused = 0
    places = {len(data) * k // 12 for k in range(12)} | {len(data) - k for k in (1, 2, 4, 8, 12, 40)}
    for place in sorted(place for place in places if place > 0):
        try:
            cut = load(data[:place])
        except ImageReadError:
            refused += 1
        else:
            assert torch.equal(cut.rgb, whole.rgb), f"cut at {place} of {len(data)}, pixels differ"
            assert (cut.alpha is None) == (whole.alpha is None)
    return refused


@pytest.mark.filterwarnings("ignore:.*all but the first", "ignore::UserWarning:PIL")
def test_no_truncated_file_is_filled_up(seeds: list[tuple[str, bytes]]) -> None:
    tried = [check_nothing_made_up(load_image, data) for _, data in seeds]
    assert len({form for form, _ in seeds}) == 11 and min(tried) >= 3


@pytest.mark.filterwarnings("ignore:.*plain grey")
def test_no_truncated_file_is_filled_up_catches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(AssertionError, match="pixels differ"):
        check_nothing_made_up(load_image, file_bytes(photo(), "JPEG"))


def test_a_wrong_bit_in_a_png_is_never_shown() -> None:
    """Pillow skips the checksums of pixels; some changes inflate all the same, and it shows other pixels."""
    data = file_bytes(photo(), "PNG")
    whole = np.asarray(photo())
    start, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    shown_by_pillow = 0
    for at in range(start, end):
        changed = data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]
        try:
            shown_by_pillow += bool((np.asarray(Image.open(io.BytesIO(changed))) != whole).any())
        except (OSError, SyntaxError):
            continue
        with pytest.raises(ImageReadError, match="checksum"):
            load_image(changed)
    assert shown_by_pillow > 0, "or this test shows nothing"


def test_a_flat_picture_is_no_bomb() -> None:
    """The least that a JPEG can take is far more than what is taken for impossible."""
    flat = Image.new("L", (4000, 4000), 200)
    assert load_image(file_bytes(flat, "JPEG", progressive=True, optimize=True, quality=1)).size == (4000, 4000)


def test_a_jpeg_that_was_closed_too_early_is_said_to_be() -> None:
    data = file_bytes(photo(96, 96), "JPEG", quality=90)
    with pytest.warns(UserWarning, match="its lower end is plain grey, as in a photo that was cut short"):
        load_image(data[: len(data) // 2] + b"\xff\xd9")
    load_image(data)  # and the whole one is not: warnings are errors here


@pytest.mark.filterwarnings("ignore")
def test_a_small_fuzz_run(inputs: types.ModuleType, seeds: list[tuple[str, bytes]], tmp_path: Path) -> None:
    """Some hundred damaged files; the long run is benchmarks/fuzz_images.py."""
    fuzz = importlib.import_module("fuzz_images")
    outcomes: dict[str, int] = {"loaded": 0, "refused": 0}
    for index in range(200):
        form, kind, data = inputs.mutated(seeds, 7, index)
        assert inputs.mutated(seeds, 7, index)[2] == data, "inputs depend on their number alone"
        try:
            outcomes[fuzz.try_input(data, index, tmp_path, 2**16)["outcome"]] += 1
        except Exception as error:
            raise AssertionError(f"input {index}, {form}, {kind}") from error
    assert min(outcomes.values()) > 20, outcomes


DYING = """
import json, os, sys, time
for line in sys.stdin:
    number = int(line)
    if number == 1:
        os.abort()
    if number == 2:
        time.sleep(60)
    print(json.dumps({"input": number}), flush=True)
"""


def test_the_fuzz_run_sees_what_dies_and_what_hangs(
    inputs: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz = importlib.import_module("fuzz_images")
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    worker = fuzz.Worker([sys.executable, "-c", DYING])
    answers = [worker.ask(number) for number in (0, 1, 0, 2, 0)]
    worker.close()
    assert answers == [{"input": 0}, {"code": -6}, {"input": 0}, {"hang": True}, {"input": 0}]
    monkeypatch.setattr(opening, "_identify", lambda *_: 1 // 0)
    monkeypatch.setattr(images, "DECODE_ERRORS", (OSError,))
    with pytest.raises(ZeroDivisionError):  # which the worker reports as a crash
        fuzz.try_input(png(), 0, tmp_path)


# ----------------------------------------------------------------------------------------------------- files, or not


def in_time(action: Callable[[], object], seconds: float = 5) -> BaseException | None:
    """Run something that may block for ever; give back what it raised."""
    caught: list[BaseException | None] = []

    def run() -> None:
        try:
            action()
            caught.append(None)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert caught, "it hangs"
    return caught[0]


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "null.png").symlink_to("/dev/zero")
    (tmp_path / "inside.png").symlink_to("folder.png/x/y.png")
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(tmp_path)  # names of sockets are short
        server.bind("socket.png")
        os.chdir(before)
        for name, expected in (
            ("pipe.png", "a pipe, a socket or a device"),
            ("socket.png", "a pipe, a socket or a device"),
            ("null.png", "a pipe, a socket or a device"),
            ("folder.png", "is a folder"),
            ("loop.png", "link, which leads back to itself"),
            ("gone.png", "still there"),
            ("inside.png", "still there"),
            ("x" * 300 + ".png", "shorter name"),
            ("nul\0l.png", "no file name"),
        ):
            for load in (load_image, read_metadata):
                error = in_time(lambda load=load, name=name: load(tmp_path / name))
                assert isinstance(error, ImageReadError) and expected in str(error), (name, error)
                assert str(error).endswith(".") and printable(str(error)) == str(error)


@pytest.mark.parametrize(("number", "expected"), [(5, "fails; copy what is left"), (13, "change its permissions")])
def test_unreadable_disks(number: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png())

    class Stream(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(opening, "open", lambda *_: Stream(), raising=False)
    with pytest.raises(ImageReadError, match=f"a.png' cannot be read: {os.strerror(number)}; .*{expected}"):
        load_image(tmp_path / "a.png")


def test_a_file_too_large_to_read_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "a.tif", "wb") as stream:
        stream.truncate(3 * 2**30)  # takes no room
    monkeypatch.setattr(opening, "MAX_FILE_BYTES", 2**20)
    with pytest.raises(ImageReadError, match="larger than"):
        load_image(tmp_path / "a.tif")


def test_a_folder_with_everything_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "deep/b.png", "locked/c.png", "-rf.png", "e\u0301.png", "\u00e9.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "deep" / "up").symlink_to(tmp_path)  # followed, it would never end
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "x.png").mkdir()
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    with open(raw, "wb") as stream:
        stream.write(png())
    scan = os.scandir

    def refuse(path: Any = ".") -> Any:
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(UserWarning, match=r"locked' is left out: Permission denied"):
        found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert set(found) == {"-rf.png", "a.png", "deep/b.png", "e\u0301.png", "\u00e9.jpg", "loop.png", "\udcff\udcfe.png"}
    assert load_image(tmp_path / "\udcff\udcfe.png").name == r"\xff\xfe.png"


def test_printable() -> None:
    assert opening.one_line(ValueError("a\x1b[2J\n b.")) == r"a\x1b[2J b"
    assert opening.one_line(KeyError(258)) == "258 is missing"
    assert printable("Grüße 猫 👩‍👧.jpg") == "Grüße 猫 👩‍👧.jpg"
    assert printable("a\nb\x1b[2J\x07\x9b1m\x7f\u2028\u202e\udcff") == r"a\x0ab\x1b[2J\x07\x9b1m\x7f\u2028\u202e\xff"
    assert printable(printable("\x1b")) == printable("\x1b")


# ------------------------------------------------------------------------------------------- formats and what is kept


def heif(image: Image.Image, **options: Any) -> bytes:
    from_pillow = pytest.importorskip("pillow_heif").from_pillow
    buffer = io.BytesIO()
    from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


def distance(image: LoadedImage, expected: Image.Image) -> float:
    return float((image.rgb - torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255).abs().mean())


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", ["HEIF", "AVIF"])
def test_heic_and_avif_stand_upright_once(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = orientation, "Camera"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options: dict[str, Any] = {"exif": exif.tobytes(), "icc_profile": icc, "quality": 95}
    stored = photo()
    data = heif(stored, **options) if form == "HEIF" else file_bytes(stored, "AVIF", speed=10, **options)
    turned = stored.rotate({1: 0, 3: 180, 6: 270, 8: 90}[orientation], expand=True)
    image = load_image(data)
    assert image.size == turned.size and distance(image, turned) < 0.03
    assert image.icc == icc and image.exif is not None
    kept = Image.Exif()
    kept.load(image.exif)
    assert kept[ExifTags.Base.Make] == "Camera" and ExifTags.Base.Orientation not in kept


def test_heic_with_opacity_and_with_ten_bits() -> None:
    picture = photo().convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    alpha = load_image(heif(picture, quality=-1)).alpha
    assert alpha is not None and float(alpha[0, 0].mean()) < 0.1 < 0.9 < float(alpha[0, -1].mean())
    wide = (np.asarray(photo()).astype(np.uint16) * 257).tobytes()
    buffer = io.BytesIO()
    pytest.importorskip("pillow_heif").from_bytes("RGB;16", (WIDTH, HEIGHT), wide).save(buffer, quality=95)
    image = load_image(buffer.getvalue())
    assert image.bits == 8 and distance(image, photo()) < 0.03, "ten bits are read as eight"


def test_optional_decoders_are_named_where_they_are_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heic, avif = heif(photo()), file_bytes(photo(), "AVIF", speed=10)
    Image.init()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    check_refused(load_image, heic, "pip install 'latentindigo[heif]'")
    opener = Image.OPEN["AVIF"]
    monkeypatch.delitem(Image.OPEN, "AVIF")
    monkeypatch.setitem(sys.modules, "pillow_avif", None)
    check_refused(load_image, avif, "pip install 'latentindigo[avif]'")
    # A Pillow built without AVIF still has the opener, which says so.
    monkeypatch.setitem(Image.OPEN, "AVIF", (opener[0], lambda prefix: "no AVIF here"))
    check_refused(load_image, avif, "pip install 'latentindigo[avif]'")

    # The plug-in registers itself when it is imported.
    monkeypatch.setitem(Image.OPEN, "KEPT", opener)
    (tmp_path / "pillow_avif.py").write_text("from PIL import Image\nImage.OPEN['AVIF'] = Image.OPEN['KEPT']\n")
    monkeypatch.delitem(sys.modules, "pillow_avif")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_image(avif).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_of_several_pictures_counts(form: str) -> None:
    first, second = photo(), photo().transpose(Image.Transpose.ROTATE_180)
    data = file_bytes(first, form, save_all=True, append_images=[second])
    with pytest.warns(UserWarning, match="holds several pictures; all but the first are left out"):
        image = load_image(data)
    assert distance(image, first) < 0.06 < distance(image, second)


def test_a_profile_of_lab_does_not_stay_on_what_is_rgb_by_now() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    data = file_bytes(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF", icc_profile=profile)
    assert load_image(data).icc is None


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("comment", [7, (1, 2), 0.5], ids=str)
def test_a_comment_that_is_no_text_is_left_out(comment: Any, suffix: str) -> None:
    """One such photo would end a run of thousands, for no decoder is to blame for what happens when it is written."""
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    picture = load_image(file_bytes(Image.new("RGB", (8, 8)), "JPEG", exif=exif))
    assert read_metadata(encode_image(picture, f"a{suffix}", metadata={"seed": 1})) == {"seed": 1}


def test_a_pointer_in_the_wrong_place_does_not_spoil_the_result() -> None:
    exif = Image.Exif()
    exif[ExifTags.IFD.Interop] = 7
    exif[ExifTags.Base.Make] = "Camera"
    picture = load_image(file_bytes(Image.new("RGB", (8, 8)), "JPEG", exif=exif))
    written = load_image(encode_image(picture, "a.tif", metadata={"seed": 1}))
    assert written.exif is not None
    assert b"Camera" in written.exif


def test_unusual_modes() -> None:
    grey = Image.linear_gradient("L").resize((WIDTH, HEIGHT))
    for mode, form in (("LA", "PNG"), ("LA", "TIFF"), ("1", "TIFF"), ("I;16", "PNG"), ("I;16B", "TIFF")):
        image = load_image(file_bytes(grey.convert("I;16" if "I" in mode else mode).convert(mode), form))
        assert image.mode == "L" and (image.alpha is not None) == (mode == "LA"), (mode, form)
        assert image.bits == (16 if "I" in mode else 8)
    neutral = load_image(file_bytes(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF"))
    assert float((neutral.rgb.amax(0) - neutral.rgb.amin(0)).max()) < 0.02, "a neutral Lab colour is grey"
    clear = photo().quantize(16)
    image = load_image(file_bytes(clear, "PNG", transparency=bytes([0, 128] + [255] * 14)))
    assert image.alpha is not None and len(image.alpha.unique()) == 3, "each colour of a palette has its opacity"
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for form in ("JPEG", "TIFF"):  # Adobe's JPEG files store the inks inverted
        image = load_image(file_bytes(red, form))
        assert float(image.rgb[0].min()) > 0.8 > 0.3 > float(image.rgb[1].max()), form


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_libtiff_does_not_write_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    for compression in ("tiff_lzw", "jpeg"):
        data = file_bytes(photo(), "TIFF", compression=compression)
        for place in range(8, 200, 40):  # pixels: the directory comes last
            with contextlib.suppress(ImageReadError):
                load_image(data[:place] + bytes(8) + data[place + 8 :])
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("name", ["é" * 125, "猫" * 83, "👩" * 62, "x" * 250, "-rf", "\udcff"])
def test_any_name_that_a_disk_takes_can_be_written(tmp_path: Path, name: str, suffix: str) -> None:
    name = os.fsdecode(os.fsencode(name)[: 255 - len(suffix)].decode(errors="ignore") or os.fsencode(name))
    save_image(LoadedImage(torch.zeros(3, 2, 2)), tmp_path / f"{name}{suffix}")
    assert os.listdir(tmp_path) == [f"{name}{suffix}"]


STAGES = {"open": ("builtins", "open"), "reach the disk": ("os", "fsync"), "take the name": ("os", "replace")}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [28, 122, 5, 30, 13])
def test_a_disk_may_fail_at_every_stage(
    stage: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left, what was there stays, and the sentence names the target, not the temporary file."""
    target = tmp_path / "p.png"
    target.write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), "somewhere else")

    module, name = STAGES[stage]
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{name}", fail)
        error = in_time(lambda: save_image(LoadedImage(torch.zeros(3, 2, 2)), target, overwrite=True))
    assert isinstance(error, OSError) and error.errno == number
    assert error.filename == str(target)
    assert f"cannot be written: {os.strerror(number)}" in str(error)
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["p.png"]
