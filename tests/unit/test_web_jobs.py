"""The work behind the web page: what comes out, what is refused, and that it stops when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from latentindigo import web_jobs, web_parts
from latentindigo.images import LoadedImage, load_image, read_metadata, save_image
from latentindigo.jobs import MAP_GAIN, RestoreSettings, restore_file
from latentindigo.pipeline import RestorationPipeline
from latentindigo.planning import Task
from latentindigo.web import PageSettings, make_studio
from latentindigo.web_jobs import Finished, Limits, RefusedError, Step, StoppedError, Studio, TemporaryFolder

SMALL = RestoreSettings(scale=2, steps=2)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LIMITS = Limits(upload_bytes=200_000, pixels=100_000)


@pytest.fixture
def studio(tiny_pipeline: RestorationPipeline) -> Iterator[Studio]:
    """A studio with a tiny model and a folder that is gone afterwards."""
    with TemporaryFolder(LIMITS) as folder:
        made = make_studio(tiny_pipeline, folder, PageSettings(limits=LIMITS, concurrency=2))
        yield made
        made.close()


def encoded(form: str, mode: str = "RGB", size: tuple[int, int] = (20, 16), **options: Any) -> bytes:
    buffer = io.BytesIO()
    noise = Image.effect_noise(size, 60)
    Image.merge(mode, [noise] * len(mode)).save(buffer, form, **options)
    return buffer.getvalue()


def left(studio: Studio) -> list[Path]:
    """Files in the studio's folder."""
    return [path for path in studio.folder.path.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------------- what comes out


def test_it_is_the_restoration_of_the_command_line(studio: Studio, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    data = encoded("PNG", icc_profile=SRGB, exif=exif)
    settings = RestoreSettings(scale=2, steps=2, num_samples=2, seed=7)
    finished = studio.restore(data, "holiday.png", settings)
    (tmp_path / "holiday.png").write_bytes(data)
    outs = (tmp_path / "a.png", tmp_path / "b.png")
    details = (tmp_path / "c.png", tmp_path / "d.png")
    task = Task(tmp_path / "holiday.png", outs, details, tmp_path / "e.png")
    restore_file(studio.pipe, task, settings)
    assert [path.name for path in finished.downloads] == [
        "holiday-restored-1.png",
        "holiday-restored-2.png",
        "holiday-invented-1.png",
        "holiday-invented-2.png",
        "holiday-uncertainty.png",
    ]
    for got, expected in zip(finished.downloads, task.files, strict=True):
        one, two = load_image(got), load_image(expected)
        assert torch.equal(one.rgb, two.rgb)
        assert (one.icc, one.exif, one.bits) == (two.icc, two.exif, two.bits)
        assert read_metadata(got) == read_metadata(expected)
    assert load_image(finished.pictures[0]).icc == SRGB
    stored = read_metadata(finished.pictures[1])
    assert stored is not None
    assert (stored["seed"], stored["sample"], stored["settings"]["seed"]) == (8, 1, 7)
    assert (finished.input_size, finished.output_size) == ((20, 16), (40, 32))


def test_16_bits_transparency_and_greyness_are_kept(studio: Studio, tmp_path: Path) -> None:
    ramp = torch.linspace(0, 1, 16)[None, None, :].expand(1, 12, 16).contiguous()
    save_image(LoadedImage(ramp.expand(3, -1, -1), alpha=ramp, mode="L", bits=16), tmp_path / "grey.png")
    finished = studio.restore((tmp_path / "grey.png").read_bytes(), "grey.png", SMALL)
    result = load_image(finished.pictures[0])
    assert (result.bits, result.mode, result.alpha is not None, result.size) == (16, "L", True, (32, 24))


@pytest.mark.parametrize(
    ("form", "wanted", "suffix", "written"),
    [
        ("JPEG", "", ".jpg", "JPEG"),
        ("WEBP", "", ".webp", "WEBP"),
        ("TIFF", "", ".tif", "TIFF"),
        ("BMP", "", ".png", "PNG"),
        ("PNG", ".webp", ".webp", "WEBP"),
    ],
)
def test_the_format_is_the_photo_s_or_the_chosen_one(
    studio: Studio, form: str, wanted: str, suffix: str, written: str
) -> None:
    """Whatever the file's name says: the bytes count."""
    finished = studio.restore(encoded(form), "photo.gif", SMALL, wanted)
    assert finished.pictures[0].name == f"photo-restored{suffix}"
    with Image.open(finished.pictures[0]) as image:
        assert image.format == written


def test_transparency_in_jpeg_is_said_and_laid_over_white(studio: Studio) -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(clear, "PNG")
    finished = studio.restore(clear.getvalue(), "clear.png", SMALL, ".jpg")
    assert "transparency" in finished.notes[0]
    assert float(load_image(finished.pictures[0]).rgb.min()) > 0.95


def test_maps_on_the_page_are_those_in_the_files(studio: Studio) -> None:
    finished = studio.restore(encoded("PNG"), "a.png", RestoreSettings(scale=2, steps=2, num_samples=2))
    assert len(finished.shown_details) == 2
    assert finished.uncertainty is not None
    assert finished.shown_uncertainty is not None
    for file, shown in (
        (finished.detail_maps[0], finished.shown_details[0]),
        (finished.uncertainty, finished.shown_uncertainty),
    ):
        record = read_metadata(file)
        assert record is not None
        assert record["gain"] == MAP_GAIN
        assert (load_image(file).rgb - load_image(shown).rgb).abs().mean() < 0.05


def test_the_photo_is_shown_as_the_result_was_cut(studio: Studio) -> None:
    striped = Image.new("RGB", (40, 20), "red")
    striped.paste("blue", (10, 0, 30, 20))
    buffer = io.BytesIO()
    striped.save(buffer, "PNG")
    settings = RestoreSettings(size=(40, 40), crop=True, steps=1)
    finished = studio.restore(buffer.getvalue(), "a.png", settings)
    shown = load_image(finished.shown_before)
    assert (finished.output_size, shown.size) == ((40, 40), (20, 20))
    assert float(shown.rgb[2].mean()) > 0.9
    assert float(shown.rgb[0].mean()) < 0.1


@pytest.mark.parametrize(
    "name", ["../../etc/pass wd.png", "..\\..\\x.png", "/etc/cron.d/x", "", "<img onerror=x>.png", "ä" * 300]
)
def test_a_name_leads_nowhere(studio: Studio, name: str) -> None:
    finished = studio.restore(encoded("PNG"), name, SMALL)
    for path in finished.downloads:
        assert path.parent.parent == studio.folder.path
        assert set("/\\<>. ").isdisjoint(path.stem)
        assert len(path.name) < 100


def test_an_address_survives_a_temporary_folder_of_any_name() -> None:
    place = Path("/tmp/it's #1 50%/x?.png")  # noqa: S108
    address = web_parts.address(place)
    assert set("#?' ").isdisjoint(address)
    assert unquote(address) == f"gradio_api/file={place}"


# ----------------------------------------------------------------------------------------------------- what is refused


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose head announces 400 megapixels."""
    data = bytearray(encoded("PNG"))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "settings", "sentence"),
    [
        (b"I am no picture", SMALL, "'holiday.png' is no picture: it holds text"),
        (b"", SMALL, "'holiday.png' is empty"),
        (encoded("JPEG", size=(60, 60))[:500], SMALL, "'holiday.png' is damaged, cut short"),
        (bytes(300_000), SMALL, "0.286 MB, and this page takes at most 0.191 MB"),
        (bomb(), SMALL, "has 400 megapixels, and this page takes at most 0.1; make it smaller"),
        (encoded("JPEG", size=(400, 300)), SMALL, "has 0.12 megapixels, and this page takes at most 0.1"),
        (encoded("PNG", size=(30, 30)), RestoreSettings(scale=16), "480 x 480 pixels, and this page makes"),
        (encoded("PNG"), RestoreSettings(scale=8, num_samples=5), "in 5 samples, and this page makes"),
        (encoded("PNG"), RestoreSettings(size=(800, 800), crop=True), "1000 x 800 pixels before it is cut"),
        (encoded("PNG"), RestoreSettings(size=(1300, 16)), "65 times that of the photo.*choose a smaller size"),
        (encoded("PNG", size=(1, 2000)), SMALL, "2 x 4000 pixels, filled up to 64 x 4000, and this page makes"),
        (encoded("PNG", size=(1, 2000)), RestoreSettings(scale=1), "at once; give a smaller photo"),
        (encoded("PNG", size=(2000, 1)), RestoreSettings(scale=1, num_samples=2), "filled up to .* in 2 samples"),
        (encoded("PNG"), RestoreSettings(prompt="a cat"), "takes no text"),
    ],
    ids=[
        "text",
        "empty",
        "cut",
        "bytes",
        "bomb",
        "pixels",
        "scale",
        "samples",
        "crop",
        "size",
        "thin",
        "only thin",
        "thins",
        "prompt",
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    studio: Studio, data: bytes, settings: RestoreSettings, sentence: str
) -> None:
    with pytest.raises(RefusedError, match=sentence) as refusal:
        studio.restore(data, "../holiday.png", settings)
    assert "\n" not in str(refusal.value)
    assert str(studio.folder.path) not in str(refusal.value)
    assert left(studio) == []


@pytest.mark.parametrize("turned", [1, 6])
def test_the_limit_of_pixels_is_that_of_the_upright_photo(studio: Studio, turned: int) -> None:
    """300 x 200 pixels stand for 60000 either way, and a size in pixels is that of what people see."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    data = encoded("JPEG", size=(30, 20), exif=exif)
    finished = studio.restore(data, "a.jpg", RestoreSettings(size=(300, 300), steps=1))
    assert finished.output_size == ((300, 200) if turned == 1 else (200, 300))
    with pytest.raises(RefusedError, match="500 x 333" if turned == 1 else "333 x 500"):
        studio.restore(data, "a.jpg", RestoreSettings(size=(500, 500)))


def test_what_the_format_cannot_hold_is_refused_before_it_is_computed(
    tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_jobs, "restore_picture", lambda *_, **__: pytest.fail("it was computed"))
    limits = Limits(pixels=2_000_000)
    with TemporaryFolder(limits) as folder:
        studio = make_studio(tiny_pipeline, folder, PageSettings(limits=limits))
        with pytest.raises(RefusedError, match="WebP holds at most 16383 a side"):
            studio.restore(encoded("PNG", size=(9000, 3)), "a.png", SMALL, ".webp")
        free: Any = SimpleNamespace(free=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(RefusedError, match="disk of the server may be full"):
            studio.restore(encoded("PNG"), "a.png", SMALL)
        studio.close()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyError("bug")])
def test_nothing_is_left_of_a_result_that_cannot_be_written(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(web_jobs, "_show", fail)
    with pytest.raises(RefusedError if isinstance(error, RuntimeError) else KeyError):
        studio.restore(encoded("PNG"), "a.png", SMALL)
    assert left(studio) == []


def test_a_page_without_a_photo_says_so(studio: Studio) -> None:
    async def follow() -> None:
        async for _ in studio.follow(None, "", SMALL):
            pass

    with pytest.raises(RefusedError, match="no photo yet"):
        asyncio.run(follow())


@pytest.mark.parametrize("name", ["upload_bytes", "pixels", "keep_seconds", "folder_bytes"])
def test_limits_must_let_something_through(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})


# --------------------------------------------------------------------------------------------------- steps and stopping


def test_every_step_shows_the_estimate(studio: Studio) -> None:
    steps: list[Step] = []
    settings = RestoreSettings(scale=4, steps=5, num_samples=2)
    studio.restore(encoded("PNG"), "a.png", settings, on_step=steps.append)
    assert [(step.done, step.total) for step in steps] == [(k, 5) for k in range(1, 6)]
    assert {step.picture.size for step in steps} == {(80, 64)}
    assert len({step.picture.tobytes() for step in steps}) == 5


def test_large_scales_take_several_passes_and_the_count_knows(studio: Studio) -> None:
    steps: list[Step] = []
    studio.restore(encoded("PNG", size=(8, 8)), "a.png", RestoreSettings(scale=16, steps=2), on_step=steps.append)
    assert [(step.done, step.total) for step in steps] == [(k, 4) for k in range(1, 5)]


def test_stopping_ends_the_computation_at_the_next_step(studio: Studio) -> None:
    stop, seen = threading.Event(), []

    def on_step(step: Step) -> None:
        seen.append(step.done)
        if step.done == 2:
            stop.set()

    with pytest.raises(StoppedError):
        studio.restore(encoded("PNG"), "a.png", RestoreSettings(scale=2, steps=50), "", stop, on_step)
    assert seen == [1, 2]
    assert left(studio) == []


def check_that_leaving_stops(studio: Studio, leave: Any, steps: int = 400) -> None:
    """Raise AssertionError if denoiser steps go on after the one who asked has left."""
    count = 0
    original = studio._preview

    def counted(z0: Any, size: tuple[int, int]) -> Any:
        nonlocal count
        count += 1
        return original(z0, size)

    studio._preview = counted

    settings = RestoreSettings(scale=2, steps=steps, strength=0.9)

    async def visit() -> None:
        told = studio.follow(encoded("PNG"), "a.png", settings)
        await leave(told)

    asyncio.run(visit())
    time.sleep(0.1)
    reached = count
    time.sleep(0.3)
    assert count == reached, "the restoration went on"
    assert 0 < reached < steps


async def close_after_two(steps: Any) -> None:
    async with contextlib.aclosing(steps):
        async for step in steps:
            if step.done == 2:
                break


async def cancel_the_task(steps: Any) -> None:
    async def consume() -> None:
        async with contextlib.aclosing(steps):
            async for _ in steps:
                started.set()

    started = asyncio.Event()
    task = asyncio.create_task(consume())
    await asyncio.wait_for(started.wait(), 20)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [close_after_two, cancel_the_task])
def test_whoever_leaves_stops_the_computation(studio: Studio, leave: Any) -> None:
    check_that_leaving_stops(studio, leave)
    assert left(studio) == []


def test_a_computation_that_goes_on_is_found(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    restore: Any = studio.restore
    monkeypatch.setattr(studio, "restore", lambda *a: restore(*a[:4], None, a[5]))  # Deaf to `stop`.
    with pytest.raises(AssertionError, match="went on"):
        check_that_leaving_stops(studio, close_after_two, steps=120)


def test_two_visitors_at_once_get_what_each_would_get_alone(studio: Studio) -> None:
    photos = [encoded("PNG", size=(20, 16)), encoded("PNG", size=(24, 12))]
    settings = [RestoreSettings(scale=2, steps=6, seed=k) for k in (1, 2)]
    alone = [studio.restore(data, "a.png", wish).pictures[0] for data, wish in zip(photos, settings, strict=True)]

    async def one(data: bytes, wish: RestoreSettings) -> Finished:
        found = [step async for step in studio.follow(data, "a.png", wish)]
        assert isinstance(found[-1], Finished)
        return found[-1]

    async def both() -> list[Finished]:
        return await asyncio.gather(*(one(data, wish) for data, wish in zip(photos, settings, strict=True)))

    for expected, got in zip(alone, asyncio.run(both()), strict=True):
        assert torch.equal(load_image(got.pictures[0]).rgb, load_image(expected).rgb)


# ----------------------------------------------------------------------------------------------------- temporary files


def test_old_files_go_and_kept_ones_stay(tmp_path: Path) -> None:
    with TemporaryFolder(Limits(keep_seconds=100)) as folder:
        old, young, kept = folder.make() / "old.png", folder.make() / "young.png", folder.kept / "example.png"
        for path in (old, young, kept):
            path.write_bytes(b"x")
        for path in (old, old.parent, kept):
            os.utime(path, (time.time() - 200, time.time() - 200))
        folder.sweep()
        assert [path.exists() for path in (old, young, kept)] == [False, True, True]
        folder.sweep(now=time.time() + 1000)
        assert [path.exists() for path in (young, young.parent, old.parent, kept)] == [False, False, False, True]
    assert not folder.path.exists()


def test_sweeping_goes_on_where_a_folder_vanishes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio and failed restorations delete folders of their own while the sweeper looks into them."""
    scandir = os.scandir
    with TemporaryFolder(Limits(keep_seconds=100)) as folder:
        gone = folder.make()
        old = folder.make() / "old.png"
        old.write_bytes(b"x")
        os.utime(old, (time.time() - 200, time.time() - 200))

        def vanishing(path: Any) -> Any:
            if Path(path) == gone:
                gone.rmdir()
            return scandir(path)

        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", vanishing)
            folder.sweep()
        assert (gone.exists(), old.exists()) == (False, False)


def test_a_sweep_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_jobs, "_SWEEP_SECONDS", 0.01)
    swept: list[int] = []

    def failing(_: TemporaryFolder) -> None:
        swept.append(1)
        raise FileNotFoundError("gone meanwhile")

    monkeypatch.setattr(TemporaryFolder, "sweep", failing)
    with TemporaryFolder(Limits()):
        time.sleep(0.3)
    assert len(swept) > 2


def test_too_many_files_push_out_the_oldest() -> None:
    with TemporaryFolder(Limits(folder_bytes=250)) as folder:
        paths = [folder.make() / f"{k}.png" for k in range(4)]
        for age, path in zip((30, 20, 10, 0), paths, strict=True):
            path.write_bytes(bytes(100))
            os.utime(path, (time.time() - age, time.time() - age))
        folder.sweep()
        assert [path.exists() for path in paths] == [False, False, True, True]


def test_the_folder_is_private_and_its_names_cannot_be_guessed() -> None:
    with TemporaryFolder(Limits()) as folder:
        one, two = folder.make(), folder.make()
        assert folder.path.stat().st_mode & 0o077 == 0
        assert one != two
        assert len(one.name) > 30
