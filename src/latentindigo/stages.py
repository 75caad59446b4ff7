"""What happens to the picture before and after sampling, tile by tile: the start image, and the finish.

    coarse y --start--> begin (canvas) --E--> start latent        sampling        z --finish--> restored image, map

Both stages are functions of a neighbourhood, so one code serves whole images (one tile) and tiles. With tiles, nothing
as large as the canvas is held in more than half precision, or on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentindigo.canvas import Plan
from latentindigo.color import wavelet_color_fix
from latentindigo.init_models import InitModel
from latentindigo.inn import Estimator, InvertibleNet
from latentindigo.presets import Preset
from latentindigo.prior import LatentPrior, in_full_precision
from latentindigo.texture import keep_chroma, keep_coarse
from latentindigo.tiled_guidance import counted_once
from latentindigo.tiling import Tiles, TilingConfig

__all__ = ["STORED", "Finish", "Start", "latent_tiles"]

START_OVERLAP = 64  # Pixels of the canvas; the estimator looks 26 far and takes a quarter of all time.
STORED = torch.float16  # What a canvas is kept in when it is tiled; its steps near 1 are an eighth of an 8-bit level.


def latent_tiles(prior: LatentPrior, plan: Plan, tiling: TilingConfig | None) -> Tiles:
    """The tiles of the latent canvas; their borders lie on the grids of the coarse image and of the coarse latent."""
    factor = prior.downsampling
    size = (plan.padded_height * 2**plan.levels // factor, plan.padded_width * 2**plan.levels // factor)
    if tiling is None:
        return Tiles(size, None)
    multiple = max(prior.size_multiple // factor, 2**plan.levels)
    return Tiles(size, TilingConfig(tiling.tile // factor, tiling.overlap // factor), multiple)


@dataclass(frozen=True)
class Start:
    """The image that sampling starts from.

    Attributes:
        estimator: Stage-one estimate, for init = "estimator".
        pixel_inn: g in pixels, for init = "inverse".
        device: Where tiles are computed.
        init_model: Takes the estimator's place.
    """

    estimator: Estimator | None
    pixel_inn: InvertibleNet
    device: torch.device
    init_model: InitModel | None = None

    def __call__(
        self,
        y: Float[Tensor, "b 3 h w"],
        gamma: Float[Tensor, "b d"],
        plan: Plan,
        settings: Preset,
        tiling: TilingConfig | None,
    ) -> Float[Tensor, "b 3 H W"]:
        """Make it.

        Args:
            y: Padded image on the coarse grid, [0, 1].
            gamma: Degradation embedding.
            plan: Geometry.
            settings: Where to start.
            tiling: Tile and overlap in pixels of the canvas; None = the whole image at once.

        Returns:
            The image on the canvas, in [0, 1]; with tiles in `STORED` and where y is.
        """
        levels = plan.levels
        if tiling is None:
            return self._part(y.to(self.device), gamma, levels, settings)
        cells = self._cells(y, levels, settings, tiling)
        fusion = cells.fusion(2**levels, dtype=STORED, device=y.device)
        for tile in cells:
            fusion.add(tile, self._part(tile.cut(y).to(self.device), gamma, levels, settings))
        return fusion.result()

    def _cells(self, y: Tensor, levels: int, settings: Preset, tiling: TilingConfig) -> Tiles:
        """The tiles of y."""
        coarse = TilingConfig(tiling.tile >> levels, tiling.overlap >> levels)
        if settings.init == "estimator" and self.init_model is not None:
            # On the model's own grid as far as the sides allow. A foreign network may look far and pads as it likes:
            # what lies near a tile's border is not taken at all.
            multiple = math.gcd(self.init_model.multiple, coarse.overlap, *y.shape[-2:])
            return Tiles(y.shape[-2:], coarse, multiple, reach=coarse.overlap // 2)
        # The estimator's cells of four pixels must not be cut.
        narrow = TilingConfig(coarse.tile, min(START_OVERLAP >> levels, coarse.overlap))
        return Tiles(y.shape[-2:], narrow, max(1, 4 >> min(levels, 2)))

    def _part(self, y: Tensor, gamma: Tensor, levels: int, settings: Preset) -> Tensor:
        size = (y.shape[-2] * 2**levels, y.shape[-1] * 2**levels)
        x = y
        if settings.init == "estimator" and self.init_model is not None:
            x = self.init_model(y)
        elif settings.init == "estimator" and self.estimator is not None:

            def estimate(network: Estimator) -> Tensor:
                return network.self_ensemble(y, gamma.to(network.dtype), min(levels, 2), settings.ensemble)

            x = in_full_precision(self.estimator, estimate).float().clamp(0, 1)
        elif settings.init == "inverse":
            # g⁻¹(y, 0, gamma): y with every detail set to zero.
            part = y.to(self.pixel_inn.dtype)
            x = self.pixel_inn.inverse(part, no_details(part, levels), gamma, levels).float().clamp(0, 1)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return x


@dataclass(frozen=True)
class Finish:
    """From the sampled latent to the restored image and its map of invented detail.

    Attributes:
        prior: The latent diffusion model, for D.
        pixel_inn: g in pixels, for the map.
        gamma: Degradation embedding (B, d).
        levels: J.
        settings: What is kept of what sampling changed.
        colours: Whether low frequencies are taken from y.
        tiles: Tiles of the latent canvas.
        device: Where tiles are computed.
        measured: Puts back what a known operator measured; it acts on the whole image, so there is one tile then.
        mapped: Whether the map is made; it takes an eighth of a restoration's time.
    """

    prior: LatentPrior
    pixel_inn: InvertibleNet
    gamma: Float[Tensor, "b d"]
    levels: int
    settings: Preset
    colours: bool
    tiles: Tiles
    device: torch.device
    measured: Callable[[Tensor], Tensor] | None = None
    mapped: bool = True

    def __call__(
        self,
        z: Float[Tensor, "b c h w"],
        start: Float[Tensor, "b c h w"],
        begin: Float[Tensor, "b 3 H W"],
        y: Float[Tensor, "b 3 hc wc"],
    ) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 1 H W"]]:
        """Finish every tile.

        Args:
            z: Sampled latent.
            start: Latent of the start image.
            begin: The start image on the canvas.
            y: Padded image on the coarse grid.

        Returns:
            The restored image in [0, 1] and the map of invented detail (zeros if it is not made), on the canvas; with
            tiles in `STORED`.
        """
        factor = self.prior.downsampling
        dtype = None if len(self.tiles) == 1 else STORED
        images, maps = (self.tiles.fusion(factor, dtype=dtype, device=y.device) for _ in range(2))
        with counted_once(self.prior.calls, self.tiles):
            for tile in self.tiles:
                parts = tile.cut(begin, factor), tile.cut(y, factor, 2**self.levels)
                x = self._image(tile.cut(z), tile.cut(start), *(part.to(self.device, z.dtype) for part in parts))
                images.add(tile, x)
                if self.mapped:
                    maps.add(tile, self.detail(x))
        image = images.result()
        return image, maps.result() if self.mapped else image.new_zeros(()).expand(len(image), 1, *image.shape[-2:])

    def _image(self, z: Tensor, start: Tensor, begin: Tensor, y: Tensor) -> Tensor:
        settings = self.settings
        x = self.prior.decode(z)
        if settings.init != "noise" and (settings.residual or min(settings.chroma, settings.coarse) < 1):
            # What the autoencoder alone loses of the start image is no judgement of the prior's: give it back.
            kept = self.prior.decode(start)
            unchanged = kept + settings.residual * (begin - kept)
            x = keep_chroma(x + unchanged - kept, unchanged, settings.chroma)
            # At scale 1 y has no band of its own above its grid: half its resolution is taken for well seen.
            x = keep_coarse(x, unchanged, max(2, 2**self.levels), settings.coarse)
        if self.colours:
            x = wavelet_color_fix(x, F.interpolate(y, size=x.shape[-2:], mode="bicubic", antialias=True))
        if self.measured is not None:
            x = self.measured(x)
        return x.clamp(0, 1)

    def detail(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 1 H W"]:
        """Map of invented detail |x - g⁻¹(x_c, 0, gamma)|, mean over the colours *(ours: provenance of detail)*."""
        x = x.to(self.pixel_inn.dtype)
        coarse, _ = self.pixel_inn(x, self.gamma, self.levels)
        measured = self.pixel_inn.inverse(coarse, no_details(coarse, self.levels), self.gamma, self.levels)
        return (x - measured).abs().mean(1, keepdim=True).float().clamp(0, 1)


def no_details(coarse: Tensor, levels: int) -> tuple[Tensor, ...]:
    """Details of zero that belong to a coarse part (B, C, h, w), finest first."""
    b, c, h, w = coarse.shape
    sizes = [(h << j, w << j) for j in range(levels)][::-1] or [(h, w)]
    return tuple(coarse.new_zeros(b, 3 * c, *s) for s in sizes)
