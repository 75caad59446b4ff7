"""The picture of the page that the documentation shows: an example, restored by the embedded model, in Chromium.

`python tests/app_picture.py` renews `docs/images/app.png`.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from web_page import running

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "app.png"


def main() -> None:
    """Restore an example and take a picture of the page."""
    with running() as (browser, url):
        tab = browser.new_page(viewport={"width": 1180, "height": 830})
        tab.goto(url)
        tab.get_by_role("button", name="Coffee").click()
        tab.locator("#photo img").wait_for()
        tab.get_by_role("button", name="Restore").click()
        tab.locator("#status").get_by_text("Done in").wait_for(timeout=60_000)
        tab.evaluate("Promise.all([...document.querySelectorAll('.li-frame img')].map(image => image.decode()))")
        tab.mouse.move(5, 5)
        tab.evaluate("document.activeElement.blur()")
        tab.wait_for_timeout(500)
        shot = Image.open(io.BytesIO(tab.screenshot(full_page=True)))
        shot.convert("RGB").quantize(255, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
