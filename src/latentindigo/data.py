"""Photographs for training: folders, exclusions, and crops that depend only on (seed, sample number).

Every random choice of a sample is drawn from a generator seeded by the run's seed and the sample's number, so that a
killed run goes on with the very samples it would have seen, whatever the batch size of the workers.
"""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentindigo.images import list_images, load_image

__all__ = ["PhotoFolder", "sample_generator"]


def sample_generator(seed: int, *numbers: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of `seed` and `numbers` (for example the sample's number)."""
    key = np.array([seed, *numbers], dtype=np.int64).tobytes()
    # PyTorch's CPU generator uses the low 32 bits of its seed. A checksum fills them and never maps two sample numbers
    # of one stream to the same seed: it tells all keys apart that differ in one run of at most 32 bits.
    return torch.Generator().manual_seed(zlib.crc32(key, 0x9E3779B9))


def _listed(path: Path) -> set[str]:
    return {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}


def _is_excluded(name: str, patterns: Sequence[str], left_out: set[str]) -> bool:
    parts = name.split("/")
    tails = ["/".join(parts[k:]) for k in range(len(parts))]
    return any(tail in left_out or any(fnmatch.fnmatch(tail, p) for p in patterns) for tail in tails)


class PhotoFolder:
    """The clean photographs of a folder, decoded once and kept in memory as 8-bit pixels.

    Args:
        root: Folder, searched recursively.
        exclude: Glob patterns of paths that must not be used ("ddnm_faces/*"), relative to `root` or to any folder
            below it: giving the folder above by mistake must not let excluded photos in.
        exclude_file: Text file with one path per line to leave out as well (the tuning images), relative likewise.
        only_file: Text file with one relative path per line; only these are used.
        min_side: Images whose short side is smaller are left out.

    Raises:
        ValueError: If no image is left.
    """

    def __init__(
        self,
        root: Path,
        *,
        exclude: Sequence[str] = (),
        exclude_file: Path | None = None,
        only_file: Path | None = None,
        min_side: int = 64,
    ) -> None:
        names = {path.relative_to(root).as_posix(): path for path in list_images(root, recursive=True)}
        left_out = _listed(exclude_file) if exclude_file else set()
        kept = [n for n in sorted(names) if not _is_excluded(n, exclude, left_out)]
        if only_file is not None:
            wanted = _listed(only_file)
            kept = [n for n in sorted(names) if n in wanted]
        with ThreadPoolExecutor(4) as pool:
            images = list(pool.map(lambda n: (load_image(names[n]).rgb * 255).round().byte(), kept))
        pairs = [(n, i) for n, i in zip(kept, images, strict=True) if min(i.shape[-2:]) >= min_side]
        if not pairs:
            raise ValueError(
                f"expected photographs of at least {min_side} pixels below {root}, found none; "
                "check the folder and the recipe's exclude list"
            )
        self.names = [n for n, _ in pairs]
        self.images = [i for _, i in pairs]

    def __len__(self) -> int:
        return len(self.images)

    def crop(
        self, generator: torch.Generator, size: int, *, min_scale: float = 0.5, index: int | None = None
    ) -> Float[Tensor, "3 size size"]:
        """A random square crop with scale jitter and flips.

        Args:
            generator: Source of every choice.
            size: Side in pixels.
            min_scale: The photo is shrunk (antialiased) by a factor drawn log-uniformly from [min_scale, 1] first.
            index: Photo to crop; drawn when None.

        Returns:
            Pixels in [0, 1].
        """
        draw = torch.rand(6, generator=generator).tolist()
        photo = self.images[int(draw[0] * len(self)) if index is None else index]
        height, width = photo.shape[-2:]
        # The crop in source pixels: `size / factor`, limited by the photo (then it is enlarged a little instead).
        source = min(round(size / min_scale ** draw[1]), height, width)
        top, left = int(draw[2] * (height - source + 1)), int(draw[3] * (width - source + 1))
        crop = photo[:, top : top + source, left : left + source].float() / 255
        if source != size:
            crop = F.interpolate(crop[None], size=(size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
        if draw[4] < 0.5:
            crop = crop.flip(-1)
        if draw[5] < 0.1:
            crop = crop.transpose(-1, -2)
        return crop
