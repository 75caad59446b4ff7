"""The page in a real Chromium: upload, restore, compare, download, cancel, bad files, keyboard, telephone."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentindigo.images import load_image, read_metadata
from web_page import Page, photo, until

pytestmark = pytest.mark.web

TELEPHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}


@pytest.fixture
def tab(browser: Any, page: Page) -> Iterator[Any]:
    """A fresh visit to the page; at its end nothing may have been asked of another host, and no script failed."""
    context = browser.new_context(viewport=DESK, permissions=["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    asked: list[str] = []
    broken: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: broken.append(str(error)))
    opened.on("console", lambda line: broken.append(line.text) if "Content Security Policy" in line.text else None)
    opened.goto(page.url)
    opened.get_by_role("button", name="Restore").wait_for()
    yield opened
    context.close()
    check_hosts(asked, page.url)
    assert broken == []
    assert page.guard.attempts() == []


def check_hosts(asked: list[str], url: str) -> None:
    """Raise AssertionError if a browser asked another host than the page's for anything."""
    elsewhere = [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert asked
    assert not elsewhere, f"the page asks other hosts: {elsewhere}"


def give(tab: Any, data: bytes, name: str) -> None:
    """Upload a photo as a visitor does, and wait until it is there."""
    field = tab.locator("#photo")
    if field.get_by_role("button", name="Remove Image").count():
        field.get_by_role("button", name="Remove Image").click()
    with tab.expect_response(lambda response: "/upload?" in response.url or response.url.endswith("/upload")):
        field.locator("input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": data})
    field.locator("img").wait_for()


def restore(tab: Any) -> None:
    tab.get_by_role("button", name="Restore").click()
    tab.locator("#status").get_by_text("Done in").wait_for(timeout=60_000)


def shares(tab: Any) -> str:
    return tab.locator(".li-compare").evaluate("figure => getComputedStyle(figure).getPropertyValue('--at')")


def test_upload_restore_compare_download(tab: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    give(tab, photo(form="JPEG", quality=95, exif=exif), "holiday.jpg")
    tab.get_by_label("number input for Scale").fill("2")
    tab.get_by_label("number input for Samples").fill("2")
    # Live: a bar, and the estimate as a picture. They come and go, so that the page itself has to take notes.
    tab.evaluate(
        """() => {
            window.notes = {looks: new Set(), lines: new Set()};
            const look = () => {
                const image = document.querySelector(".li-preview"), line = document.querySelector("#status");
                if (image) window.notes.looks.add(image.src);
                window.notes.lines.add(line.innerText.trim());
            };
            new MutationObserver(look).observe(document.body, {childList: true, subtree: true, attributes: true});
        }"""
    )
    restore(tab)
    looks, lines = tab.evaluate("[[...window.notes.looks], [...window.notes.lines]]")
    assert len(looks) >= 3
    assert len([line for line in lines if re.fullmatch(r"Step [1-8] of 8", line)]) >= 3
    sizes = tab.evaluate(
        """sources => Promise.all(sources.map(async source => {
            const image = new Image();
            image.src = source;
            await image.decode();
            return [image.naturalWidth, image.naturalHeight];
        }))""",
        looks,
    )
    assert sizes == [[96, 96]] * len(looks)
    # Both pictures are there; the keyboard moves the line, and with it what is seen.
    frame = tab.locator(".li-frame")
    widths = frame.evaluate(
        "f => Promise.all([...f.querySelectorAll('img')].map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert widths == [96, 48]
    slider = frame.get_by_role("slider")
    slider.focus()
    for _ in range(5):
        tab.keyboard.press("ArrowRight")
    assert shares(tab) == "55%"
    tab.keyboard.press("Home")
    after = frame.screenshot()
    tab.keyboard.press("End")
    before = frame.screenshot()
    assert shares(tab) == "100%"
    assert after != before
    box = frame.bounding_box()
    tab.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    assert 20 <= float(shares(tab).rstrip("%")) <= 30
    # The other sample.
    first = tab.locator(".li-after").get_attribute("src")
    tab.get_by_label("Shown sample").select_option(index=1)
    assert tab.locator(".li-after").get_attribute("src") != first
    # Maps, each with its sentence.
    for name, sentence, count in (
        ("Invented detail", "structure the model supplied", 2),
        ("Uncertainty", "the samples differ", 1),
    ):
        tab.get_by_role("tab", name=name).click()
        tab.get_by_text(sentence).wait_for(state="visible")
        tab.locator(".li-map:visible").first.wait_for()  # The picture may come after its sentence.
        assert tab.locator(".li-map:visible").count() == count
    # Downloads hold the metadata of the photo and the settings of the restoration.
    links = tab.locator("#files a")
    assert links.count() == 5
    with tab.expect_download() as download:
        links.first.click()
    assert download.value.suggested_filename == "holiday-restored-1.jpg"
    download.value.save_as(tmp_path / "result.jpg")
    assert load_image(tmp_path / "result.jpg").size == (96, 96)
    with Image.open(tmp_path / "result.jpg") as image:
        assert image.getexif()[0x010F] == "Camera"
    stored = read_metadata(tmp_path / "result.jpg")
    assert stored is not None
    assert (stored["settings"]["scale"], stored["settings"]["num_samples"]) == (2.0, 2)


def test_cancelling_stops_the_work(tab: Any) -> None:
    give(tab, photo(160), "large.png")
    tab.get_by_label("number input for Samples").fill("6")
    tab.get_by_role("button", name="Restore").click()
    tab.locator(".li-preview").wait_for()
    tab.get_by_role("button", name="Cancel").click()
    tab.get_by_text("Cancelled.").wait_for(timeout=5000)
    # The next photo does not wait for the one that was given up, which would take about a minute.
    give(tab, photo(24), "small.png")
    tab.get_by_label("number input for Samples").fill("1")
    tab.get_by_label("number input for Scale").fill("1")
    tab.get_by_role("button", name="Restore").click()
    tab.locator("#status").get_by_text("Done in").wait_for(timeout=15_000)
    assert "24 × 24 → 24 × 24" in tab.locator(".li-compare").inner_text()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"just text", "is no picture: it holds text"),
        (photo()[:400], "is damaged or cut short"),
        (photo(600), "pixels, and this page makes at most"),
    ],
    ids=["text", "cut", "large"],
)
def test_a_bad_file_gives_one_sentence(tab: Any, data: bytes, sentence: str) -> None:
    give(tab, data, "bad.png")
    tab.get_by_label("number input for Scale").fill("16")
    tab.get_by_role("button", name="Restore").click()
    alarm = tab.get_by_role("alert").filter(has_text=sentence)
    alarm.wait_for()
    assert alarm.inner_text().count(". ") == 0
    assert tab.locator("#files a").count() == 0


def test_without_a_photo_the_page_says_what_to_do(tab: Any) -> None:
    tab.get_by_role("button", name="Restore").click()
    tab.get_by_role("alert").filter(has_text="There is no photo yet").wait_for()


def test_an_example_a_preset_and_the_slider(tab: Any) -> None:
    tab.get_by_role("button", name="Coffee").click()
    tab.locator("#photo img").wait_for()
    tab.get_by_label("number input for Scale").fill("1")
    slider = tab.get_by_label("range slider for Fidelity")
    slider.focus()
    tab.keyboard.press("End")
    until(lambda: tab.get_by_role("radio", name="By the slider").is_checked(), 5)
    restore(tab)
    assert "150 × 100 → 150 × 100" in tab.locator(".li-compare").inner_text()
    href = tab.locator("#files a").first.get_attribute("href")
    data = tab.request.get(tab.url + href).body()
    with Image.open(io.BytesIO(data)) as image:
        assert '"fidelity": 1.0' in image.info["latentindigo"]


def test_a_photo_can_be_pasted(tab: Any) -> None:
    tab.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(30, 20);
            canvas.getContext("2d").fillRect(5, 5, 10, 10);
            const blob = await canvas.convertToBlob({type: "image/png"});
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }"""
    )
    tab.get_by_role("button", name="Paste from clipboard").click()
    tab.locator("#photo img").wait_for()
    tab.get_by_label("number input for Scale").fill("1")
    restore(tab)
    assert "30 × 20 → 30 × 20" in tab.locator(".li-compare").inner_text()


def test_everything_can_be_reached_and_worked_by_keyboard(tab: Any) -> None:
    """From the top of the page by the Tab key, in the order of the page, with a focus that can be seen."""
    names = []
    for _ in range(60):
        tab.keyboard.press("Tab")
        name, outline = tab.evaluate(
            """() => {
                const e = document.activeElement, label = e.labels?.[0]?.innerText;
                const style = getComputedStyle(e);
                return [e.getAttribute("aria-label") || label || e.innerText, style.outlineStyle + style.outlineWidth];
            }"""
        )
        if names and name == names[0]:
            break
        names.append(name)
        if tab.evaluate("document.activeElement !== document.body"):
            assert name.strip(), "a field without a name for screen readers"
            assert outline == "solid3px", f"{name!r} does not show that it has the focus: {outline}"
    order = ["Upload file", "Coffee", "range slider for Scale", "Vivid", "range slider for Fidelity", "Seed"]
    order += ["range slider for Samples", "Restore", "Cancel"]
    places = [next(k for k, name in enumerate(names) if wanted in name) for wanted in order]
    assert places == sorted(places)
    tab.get_by_role("button", name="Rocket").focus()
    tab.keyboard.press("Enter")
    tab.locator("#photo img").wait_for()
    tab.get_by_label("number input for Scale").fill("1")
    tab.get_by_role("button", name="Restore").focus()
    tab.keyboard.press("Enter")
    tab.locator("#status").get_by_text("Done in").wait_for(timeout=60_000)
    tab.get_by_role("tab", name="Uncertainty").focus()
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowLeft")
    assert shares(tab) == "49%"


def test_small_print_has_enough_contrast(tab: Any) -> None:
    """4.5 to 1, in both colour schemes, for the text of labels and hints."""
    ratio = """() => {
        const parse = text => text.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
            v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
        ).reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
        const ground = e => {
            for (; e; e = e.parentElement) {
                const colour = parse(getComputedStyle(e).backgroundColor);
                if (colour.length < 4 || colour[3] === 1) return colour;
            }
            return parse(getComputedStyle(document.documentElement).colorScheme === "dark" ? "0 0 0" : "255 255 255");
        };
        const low = [];
        for (const e of document.querySelectorAll("span, p, label, button, h1, h2, a, td")) {
            const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
            if (!own || !e.offsetParent || e.closest(".li-frame") || getComputedStyle(e).opacity < 1) continue;
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
            const found = (a + 0.05) / (b + 0.05);
            if (found < 4.5) low.push(e.innerText.slice(0, 40) + " " + found.toFixed(2));
        }
        return low;
    }"""
    for scheme in ("light", "dark"):
        tab.goto(f"{tab.url.split('?')[0]}?__theme={scheme}")
        tab.get_by_role("button", name="Restore").wait_for()
        assert tab.evaluate(ratio) == [], scheme
        assert tab.evaluate("document.documentElement.lang") == "en"


def test_it_is_readable_on_a_telephone(tab: Any) -> None:
    tab.set_viewport_size(TELEPHONE)
    tab.reload()
    tab.get_by_role("button", name="Chelsea").click()
    tab.get_by_label("number input for Scale").fill("1")
    restore(tab)
    for name in ("Result", "Invented detail", "Uncertainty"):
        tab.get_by_role("tab", name=name).click()
        width = tab.evaluate("document.documentElement.scrollWidth")
        assert width <= TELEPHONE["width"], f"{name}: the page is {width} pixels wide"
    size = tab.get_by_text("Restored photo").evaluate("e => parseFloat(getComputedStyle(e).fontSize)")
    assert size >= 14
    for name in ("Restore", "Cancel"):
        assert tab.get_by_role("button", name=name).bounding_box()["height"] >= 40


def test_a_request_to_another_host_is_found(page: Page) -> None:
    check_hosts([page.url, "data:image/png;base64,"], page.url)
    with pytest.raises(AssertionError, match="googleapis"):
        check_hosts([page.url, "https://fonts.googleapis.com/css2"], page.url)
