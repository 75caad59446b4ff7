"""Other people's restorers as the stage-one estimate: any image-to-image network that spandrel recognises.

spandrel tells ESRGAN, SwinIR, HAT, SCUNet and dozens of other architectures by their weights and describes each by one
interface. It is an optional extra (`pip install 'latentindigo[init-models]'`) and imported here only, when a file is
loaded. `InitModel` needs the interface and not the package.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentindigo.canvas import is_out_of_memory, pad_to

__all__ = ["InitModel", "load_init_model"]

INSTALL = "pip install 'latentindigo[init-models]'"
PURPOSES = ("SR", "Restoration")
NEEDED = (
    *("scale", "input_channels", "output_channels", "purpose", "size_requirements"),
    *("supports_half", "supports_bfloat16", "to", "eval"),
)
# Peak memory above the weights for each pixel that comes out: some four feature maps of 64 channels in float32.
BYTES_PER_PIXEL = 1000
_MOVING = threading.Lock()


class InitModel:
    """An image-to-image network behind one call: any size, any batch, colour, float32 in and out.

    Args:
        model: Has the interface of spandrel's `ImageModelDescriptor`: `scale`, `input_channels`, `output_channels`,
            `purpose`, `size_requirements` (`minimum`, `multiple_of`, `square`), `supports_half`, `supports_bfloat16`,
            `to(device=, dtype=)`, `eval()`, and a call that takes (1, C, h, w) in [0, 1] to
            (1, C, h * scale, w * scale).
        dtype: What it computes in where it can; float32 where it cannot.
        name: What messages and results call it.
        sha256: Hash of its file, or None.

    Raises:
        ValueError: It is no restorer of single images (a face model, an inpainting model, a model of videos), or its
            channels are neither 3 and 3 nor 1 and 1.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype = torch.float32, name: str = "init model", sha256: str | None = None
    ) -> None:
        purpose = getattr(model, "purpose", type(model).__name__)
        if purpose not in PURPOSES or not all(hasattr(model, attribute) for attribute in NEEDED):
            raise ValueError(
                f"{name} is a model for {purpose!r}; expected one that restores or enlarges single photographs "
                f"({' or '.join(PURPOSES)})"
            )
        channels = (model.input_channels, model.output_channels)
        if channels not in ((3, 3), (1, 1)):
            raise ValueError(
                f"{name} takes {channels[0]} channels and gives {channels[1]}; expected 3 and 3 (colour) or 1 and 1 "
                "(grey)"
            )
        supported = {torch.float16: model.supports_half, torch.bfloat16: model.supports_bfloat16}
        self._model = model.eval()
        self._grey = channels[0] == 1
        self.dtype: torch.dtype = dtype if supported.get(dtype, False) else torch.float32
        self.name, self.sha256 = name, sha256

    @property
    def scale(self) -> int:
        """Its own factor of enlargement."""
        return self._model.scale

    @property
    def multiple(self) -> int:
        """Tiles whose borders lie on multiples of this need no padding and no shift of its grid."""
        return max(1, self._model.size_requirements.multiple_of or 1)

    def cost(self, levels: int) -> int:
        """Bytes of working memory for each pixel of a canvas that is 2^levels times as large as y."""
        return math.ceil(BYTES_PER_PIXEL * (self.scale / 2**levels) ** 2)

    @torch.no_grad()
    def __call__(self, y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 hx wx"]:
        """Restore and enlarge by the model's own scale.

        A grey model is given each colour on its own.

        Args:
            y: Degraded image (B, 3, h, w) in [0, 1], any size. The model goes to its device.

        Returns:
            Estimate (B, 3, h * scale, w * scale) in [0, 1], float32.

        Raises:
            ValueError: The model gives another size than its scale says.
        """
        with _MOVING:  # Another thread must not meet it half moved.
            self._model.to(device=y.device, dtype=self.dtype)
        parts = y.reshape(-1, 1, 1, *y.shape[-2:]) if self._grey else y[:, None]
        # One by one: that is what the interface promises. The stack is a copy, free of spandrel's inference mode.
        restored = torch.stack([self._one(part) for part in parts])
        return restored.reshape(len(y), 3, *restored.shape[-2:])

    def _one(self, y: Tensor) -> Tensor:
        """One image (1, C, h, w), padded to what the model takes and cut again."""
        height, width = y.shape[-2:]
        padded = pad_to(y, *self._size(width, height))
        # A copy: some models write into what they are given.
        output = self._model(padded.to(self.dtype, copy=True))
        expected = (padded.shape[-2] * self.scale, padded.shape[-1] * self.scale)
        if output.shape[-2:] != expected:
            raise ValueError(
                f"{self.name} is of scale {self.scale} and made {tuple(output.shape[-2:])} of "
                f"{tuple(padded.shape[-2:])} pixels; expected {expected}"
            )
        if self.dtype != torch.float32 and not bool(output.isfinite().all()):
            warnings.warn(
                f"{self.name} gave numbers that are not finite in {self.dtype}; this part is computed again in "
                "float32. Load the model with float32 (--dtype float32) to save the time",
                stacklevel=2,
            )
            output = copy.deepcopy(self._model).to(device=y.device, dtype=torch.float32)(padded.float().clone())
        return output[..., : height * self.scale, : width * self.scale].float().clamp(0, 1)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """The smallest (width, height) that holds an image and that the model takes."""
        needs, multiple = self._model.size_requirements, self.multiple
        sides = [-(-max(side, needs.minimum or 0) // multiple) * multiple for side in (width, height)]
        return (max(sides), max(sides)) if needs.square else (sides[0], sides[1])


def load_init_model(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> InitModel:
    """Load a restorer from a file, through spandrel.

    Args:
        path: A .safetensors file of an architecture that spandrel knows.
        dtype: What it computes in where it can.

    Returns:
        The model, on the CPU until it is called.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no safetensors file, holds an unknown architecture, or a model of another kind.
        ImportError: spandrel is not installed, or cannot be imported.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"expected a .safetensors file, got {str(path)!r}, which is no file")
    if file.suffix.lower() != ".safetensors":
        raise ValueError(
            f"expected a .safetensors file, got {file.name!r}: pickled weights can run code when they are read; "
            "convert them once: safetensors.torch.save_file(torch.load(old, weights_only=True), new); "
            "docs/integrations.md has the details"
        )
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{file.name!r} is no readable safetensors file ({error}); fetch or convert it again"
        ) from error
    try:
        spandrel: Any = importlib.import_module("spandrel")
    except ImportError as error:
        reason = "is not installed" if error.name == "spandrel" else f"cannot be imported ({error})"
        raise ImportError(f"an init model is read by the package spandrel, which {reason}: {INSTALL}") from error
    try:
        model = spandrel.ModelLoader().load_from_file(file)
    except Exception as error:  # Its errors have no base of their own.
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"spandrel recognises no model in {file.name!r} ({reason})") from error
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return InitModel(model, dtype, file.name, digest)
