"""Restore the photos of `examples/photos` with the model that ships in the package, offline.

    python examples/demo.py [--out FOLDER]

Writes one restored picture per photo and one comparison sheet, and prints where.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from latentindigo import RestorationPipeline
from latentindigo.images import contact_sheet, list_images, load_image, pil_resize, save_image
from latentindigo.jobs import MAP_GAIN

PHOTOS = Path(__file__).parent / "photos"
SCALE = 4


def restore_photos(out: Path, model: str = "embedded") -> Path:
    """Restore every photo and lay out the comparison.

    Args:
        out: Folder for the pictures; those of an earlier demo are replaced.
        model: Model to use.

    Returns:
        The comparison sheet.
    """
    out.mkdir(parents=True, exist_ok=True)
    pipe = RestorationPipeline.from_pretrained(model)
    rows = []
    for path in list_images(PHOTOS):
        started = time.perf_counter()
        photo = load_image(path)
        result = pipe(photo.rgb, scale=SCALE, output_type="pt")
        restored, detail_map = result.images[0], result.detail_maps[0]
        target = out / f"{path.stem}.png"
        save_image(photo.replace_pixels(restored, None), target, metadata=result.settings, overwrite=True)
        height, width = restored.shape[-2:]
        bicubic = pil_resize(photo.rgb, (width, height), "bicubic").clamp(0, 1)
        rows.append([photo.rgb, bicubic, restored, (detail_map * MAP_GAIN).clamp(0, 1)])
        print(f"{path.name} -> {target} ({width} x {height}, {time.perf_counter() - started:.1f} s)")
    sheet = out / "comparison.png"
    labels = ["input", "bicubic", "restored", f"invented detail, x{MAP_GAIN:g}"]
    contact_sheet(rows, labels, cell=(480, 400)).save(sheet)
    return sheet


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args()
    started = time.perf_counter()
    sheet = restore_photos(options.out)
    print(f"comparison sheet: {sheet.resolve()} ({time.perf_counter() - started:.0f} s in all)")


if __name__ == "__main__":
    main()
