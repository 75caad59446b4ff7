"""Lay out real photographs before and after: nearest, bicubic, default, vivid, at scale 4.

    python benchmarks/real_sheet.py docs/images/real.jpg

Only photographs whose source repository has a permissive licence are shown (see `docs/credits.md`). Each row is the
central part of one photograph.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from bench import ROOT
from torch import Tensor

from latentindigo import RestorationPipeline
from latentindigo.images import contact_sheet, load_image, pil_resize

PHOTOS = (
    "BSRGAN/Lincoln.png",
    "BSRGAN/building.png",
    "BSRGAN/computer.png",
    "BSRGAN/dog.png",
    "BSRGAN/oldphoto2.png",
    "SwinIR/00003.png",
    "SwinIR/0014.jpg",
    "SCUNet/RNI15/Window.png",
    "SCUNet/real3/palace.png",
    "Real-ESRGAN/wolf_gray.jpg",
    "DiffBIR/real47/20.jpg",
    "DiffBIR/real47/56.jpg",
)
SCALE, PART = 4, 80  # The part of y that is shown, in its own pixels.


def row(pipe: RestorationPipeline, y: Tensor) -> list[Tensor]:
    """The four pictures of a photograph (3, h, w)."""
    size = (y.shape[-1] * SCALE, y.shape[-2] * SCALE)
    near = y.repeat_interleave(SCALE, -1).repeat_interleave(SCALE, -2)
    found = [near, pil_resize(y, size).clamp(0, 1)]
    found += [pipe(y, SCALE, preset=preset, output_type="pt").images[0] for preset in ("default", "vivid")]
    return found


def main() -> None:
    """Restore the photographs and write the sheet."""
    data = os.environ.get("LATENTINDIGO_DATA", ROOT.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--data", type=Path, default=Path(data), help="folder with real")
    parser.add_argument("--model", default="embedded")
    args = parser.parse_args()
    pipe = RestorationPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    cells: list[list[Tensor]] = []
    for name in PHOTOS:
        y = load_image(args.data / "real" / name).rgb
        # A margin around the part that is shown, so that its borders are those of the whole photograph's result.
        top, left = (max(0, side - PART) // 2 for side in y.shape[-2:])
        margin = [min(24, top), min(24, left)]
        y = y[:, top - margin[0] : top + PART + 24, left - margin[1] : left + PART + 24]
        cut = [slice(SCALE * m, SCALE * (m + PART)) for m in margin]
        cells.append([x[:, cut[0], cut[1]] for x in row(pipe, y)])
    # Two photographs side by side.
    rows = [cells[k] + cells[k + 1] for k in range(0, len(cells), 2)]
    contact_sheet(rows, ["before", "bicubic", "default", "vivid"] * 2, SCALE * PART).save(args.target)


if __name__ == "__main__":
    main()
