"""Fit NIQE to the training photographs and write the model that the package ships.

    python benchmarks/fit_niqe.py

The photographs are those that networks may be trained on: what a recipe excludes, and the tuning images, stay out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from pathlib import Path

from latentindigo.data import PhotoFolder
from latentindigo.quality import NIQE_FILE, Niqe

ROOT = Path(__file__).resolve().parent.parent


def training_photos(data: Path, patch: int) -> PhotoFolder:
    """The photographs below `data`/train without those that any recipe leaves out, sides of at least one patch."""
    recipes = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "recipes").glob("*.toml"))]
    exclude = sorted({pattern for recipe in recipes for pattern in recipe.get("exclude", [])})
    return PhotoFolder(data / "train", exclude=exclude, exclude_file=ROOT / "recipes" / "tune.txt", min_side=patch)


def main() -> None:
    """Fit and write."""
    data = os.environ.get("LATENTINDIGO_DATA", ROOT.parent / "shared" / "data")
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path(data), help="folder with train")
    parser.add_argument("--out", type=Path, default=NIQE_FILE, help="file to write")
    parser.add_argument("--patch", type=int, default=64, help="side of a patch in pixels")
    args = parser.parse_args()
    photos = training_photos(args.data, args.patch)
    niqe = Niqe.fit((image.float() / 255 for image in photos.images), args.patch)
    niqe.save(args.out)
    sys.stdout.write(f"{niqe.images} photographs, {args.out.stat().st_size} bytes: {args.out}\n")


if __name__ == "__main__":
    main()
