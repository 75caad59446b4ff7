"""Make the degraded photos of `examples/photos`; run again only to change them (it needs scikit-image).

Four photographs that scikit-image ships are made four times smaller and worse, each in its own way: blurred, shrunk,
made noisy, and for three of them compressed as JPEG. Sources and terms are named in `docs/credits.md`.

    python examples/make_photos.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

FOLDER = Path(__file__).parent / "photos"
SCALE = 4


@dataclass(frozen=True)
class Damage:
    """What is done to one photo.

    Attributes:
        blur: Standard deviation of a Gaussian blur, in pixels of the clean photo.
        noise: Standard deviation of Gaussian noise, in grey levels of 255.
        jpeg: JPEG quality, or None to save as PNG.
    """

    blur: float
    noise: float
    jpeg: int | None


PHOTOS = {
    "astronaut": Damage(blur=1.5, noise=8, jpeg=70),
    "chelsea": Damage(blur=0.8, noise=3, jpeg=90),
    "coffee": Damage(blur=1.5, noise=10, jpeg=None),
    "rocket": Damage(blur=2.0, noise=5, jpeg=60),
}


def degrade(photo: Image.Image, damage: Damage, generator: np.random.Generator) -> Image.Image:
    """Blur, shrink by `SCALE` and add noise; compression comes with saving."""
    blurred = photo.filter(ImageFilter.GaussianBlur(damage.blur))
    small = blurred.resize((photo.width // SCALE, photo.height // SCALE), Image.Resampling.BICUBIC)
    pixels = np.asarray(small, np.float64)
    noisy = pixels + damage.noise * generator.standard_normal(pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def main() -> None:
    """Write all photos."""
    from skimage import data  # pyright: ignore[reportMissingImports]  (needed by this script only)

    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (name, damage) in enumerate(PHOTOS.items()):
        photo = Image.fromarray(getattr(data, name)())
        photo = photo.crop((0, 0, photo.width // SCALE * SCALE, photo.height // SCALE * SCALE))
        small = degrade(photo, damage, np.random.default_rng(number))
        path = FOLDER / f"{name}.{'png' if damage.jpeg is None else 'jpg'}"
        if damage.jpeg is None:
            small.save(path, optimize=True)
        else:
            small.save(path, quality=damage.jpeg)
        print(f"{path.name}: {small.width} x {small.height}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
