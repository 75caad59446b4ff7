"""Letters of four sizes over a smooth grey ramp: what `medium` damage leaves of them, and what the presets make of it.

python benchmarks/text_sheet.py docs/images/text.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bench import say
from PIL import Image, ImageDraw, ImageFont

from latentindigo import RestorationPipeline
from latentindigo.degradations import STANDARD, degrade
from latentindigo.images import contact_sheet, from_pil

WIDTH, HEIGHT, RAMP = 512, 256, 64
LINES = ((8, 14), (24, 20), (56, 32), (112, 56))  # Top of a line, and size of its letters.
TEXT = "Restored is not recovered 1924"


def drawing() -> torch.Tensor:
    """The clean picture, (1, 3, H, W)."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    for top, size in LINES:
        draw.text((8, top), TEXT, "black", ImageFont.load_default(size))
    x = from_pil(picture).rgb
    x[:, HEIGHT - RAMP :] = torch.linspace(0.25, 0.8, WIDTH)
    return x[None]


def main() -> None:
    """Damage the drawing, restore it, and write the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    y = degrade(drawing(), STANDARD["medium"], torch.Generator().manual_seed(0))
    pipe = RestorationPipeline.from_pretrained()
    presets = ("faithful", "default", "vivid")
    restored = [pipe(y, 4, preset=preset, output_type="pt").images[0] for preset in presets]
    before = y[0].repeat_interleave(4, -1).repeat_interleave(4, -2)
    for name, x in zip(("before", *presets), (before, *restored), strict=True):
        # Down the columns the ramp is constant: what deviates is grain.
        say(f"{name}: grain on the ramp {255 * float(x[:, 8 - RAMP : -8].std(-2).mean()):.1f} of 255")
    # Two by two: side by side the letters would be too small to see.
    upper = contact_sheet([[before, restored[0]]], ["before", presets[0]], cell=(WIDTH, HEIGHT))
    lower = contact_sheet([restored[1:]], list(presets[1:]), cell=(WIDTH, HEIGHT))
    sheet = Image.new("RGB", (upper.width, upper.height + lower.height), "white")
    sheet.paste(upper, (0, 0))
    sheet.paste(lower, (0, upper.height))
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
