"""The data term of a large image, tile by tile: what `guidance` does to a whole image, in memory for one tile.

The loss is that of the whole image, with its norms over all of it, and the tiles' windows w_i sum to 1 at every place:

    ‖r‖² = Σ_i Σ w_i r_i²          first pass: a sum, no graph
    ∇‖r‖ = Σ_i ∇(½ Σ w_i r_i²) / ‖r‖          second pass: one tile's graph at a time

A tile's own residual r_i differs from that of the whole image only near its borders, where w_i is small.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.guidance import DataTerm, ForwardModel, Part, PixelINN, per_image
from latentindigo.prior import Calls
from latentindigo.tiling import Tile, Tiles

__all__ = ["TiledData", "counted_once", "simulate"]


@contextmanager
def counted_once(calls: Calls, tiles: Tiles) -> Iterator[None]:
    """Inside, every tile calls the networks alike; they count as the calls for one whole image."""
    before = dataclasses.asdict(calls)
    yield
    for name, count in before.items():
        setattr(calls, name, count + (getattr(calls, name) - count) // len(tiles))


def simulate(
    model: ForwardModel, u: Float[Tensor, "b c h w"], tiles: Tiles, num: int, den: int, like: Tensor
) -> Float[Tensor, "b c h2 w2"]:
    """The coarse part of u, tile by tile.

    Args:
        model: g.
        u: Image or latent on a grid `num` times as fine as the tiles' canvas; it may be kept elsewhere, in less
            precision.
        tiles: Tiles of the latent canvas.
        num: See `u`.
        den: How many times smaller the coarse part is.
        like: A tensor of the device and dtype to compute in.

    Returns:
        The coarse part (B, C, h/den, w/den).
    """
    fusion = tiles.fusion(num, den)
    for tile in tiles:
        fusion.add(tile, model.split(tile.cut(u, num).to(like))[0])
    return fusion.result()


class TiledData(DataTerm):
    """A data term that works on one tile of the latent canvas at a time *(ours)*.

    Args:
        term: The data term of the whole image; its target stays where it is and is cut.
        tiles: Tiles of the latent canvas.
        levels: J: the target of LatentINN is 2^J times smaller than the latent.
    """

    keeps_graph = False

    def __init__(self, term: DataTerm, tiles: Tiles, levels: int) -> None:
        self.term, self.tiles = term, tiles
        # The grids of u and of the target, relative to the latent canvas.
        self._fine = term.prior.downsampling if isinstance(term, PixelINN) else 1
        self._coarse = 2**levels
        self.prior, self.forward_model, self.config = term.prior, term.forward_model, term.config
        self.target, self.noise, self.size_factor = term.target, term.noise, term.size_factor

    def open(self, z0: Tensor) -> Tensor:
        """The representation of a whole image; `refine` opens tile by tile."""
        return self.term.open(z0)

    def close(self, u_inv: Tensor, u: Tensor, z0: Tensor) -> Tensor:
        """As the whole term closes."""
        return self.term.close(u_inv, u, z0)

    def consistent(self, z0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """z_inv of every tile, fused."""
        fusion = self.tiles.fusion()
        with counted_once(self.prior.calls, self.tiles):
            for tile in self.tiles:
                fusion.add(tile, self._part(tile).consistent(tile.cut(z0)))
        return fusion.result()

    def loss(self, z0: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """The loss of the whole image; without a graph."""
        return sum(
            (weight * norm for weight, norm in self._norms(z0)),
            start=torch.zeros(len(z0), dtype=z0.dtype, device=z0.device),
        )

    def descent(self, z0: Float[Tensor, "b c h w"], gain: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Correction of the rule "stopped", see `DataTerm.descent`."""
        return self._summed_gradients(z0, z0, lambda part: part, gain)

    def descent_through(
        self,
        z0: Float[Tensor, "b c h w"],
        z_t: Float[Tensor, "b c h w"],
        gain: Float[Tensor, " b"],
        predict: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Correction of the rule "through"; the denoiser is asked once more for each tile, with a graph.

        Args:
            z0: Estimate of the clean latent, for the norms.
            z_t: Noisy latent.
            gain: See `DataTerm.gain`.
            predict: z_t -> z0 of a tile.

        Returns:
            The correction to add to z_{t-1}.

        Raises:
            ValueError: Without `predict`.
        """
        if predict is None:
            raise ValueError("tiles need the denoiser once more for this rule: give predict")
        return self._summed_gradients(z0.detach(), z_t, predict, gain)

    def refine(self, z0: Float[Tensor, "b c h w"]) -> None:
        """One step of refining the forward model; the tiles' gradients are summed first."""
        if self.config.refine:
            with counted_once(self.prior.calls, self.tiles):
                self.term.forward_model.refine(self._opened(z0.detach()))

    def _opened(self, z0: Tensor) -> Iterator[Part]:
        for tile in self.tiles:
            part = self._part(tile)
            with torch.no_grad():
                u = part.open(tile.cut(z0))
            yield u, part.target, self.tiles.weight(tile, self._fine, self._coarse)

    def _part(self, tile: Tile) -> Any:
        """The data term of one tile."""
        part = copy.copy(self.term)
        part.target = tile.cut(self.target, self._fine, self._coarse)
        return part

    def _squares(self, tile: Tile, z0: Tensor) -> list[tuple[float, Tensor]]:
        """Σ w r² over one tile, per image, for each residual, with the residuals' weights in the loss."""
        found: list[tuple[float, Tensor]] = []
        for (weight, residual), den in zip(self._part(tile).residuals(z0), (self._coarse, 1), strict=False):
            window = self.tiles.weight(tile, self._fine, den).to(residual)
            found.append((weight, (window * residual.square()).flatten(1).sum(1)))
        return found

    @torch.no_grad()
    def _norms(self, z0: Tensor) -> list[tuple[float, Tensor]]:
        """The loss's weights and the norms of the whole image."""
        sums: list[tuple[float, Tensor]] = []
        with counted_once(self.prior.calls, self.tiles):
            for tile in self.tiles:
                found = self._squares(tile, tile.cut(z0))
                sums = [(w, a + b) for (w, a), (_, b) in zip(sums, found, strict=True)] if sums else found
        return [(weight, (square + 1e-12).sqrt() * self.size_factor) for weight, square in sums]

    def _summed_gradients(
        self, z0: Tensor, leaf: Tensor, predict: Callable[[Tensor], Tensor], gain: Tensor
    ) -> Float[Tensor, "b c h w"]:
        norms = self._norms(z0)
        gradient = torch.zeros_like(leaf)
        with counted_once(self.prior.calls, self.tiles):
            for tile in self.tiles:
                with torch.enable_grad():
                    part = tile.cut(leaf).detach().requires_grad_()
                    squares = self._squares(tile, predict(part))
                    loss = sum(
                        (0.5 * w * self.size_factor**2 * s / n).sum()
                        for (w, s), (_, n) in zip(squares, norms, strict=True)
                    )
                    (found,) = torch.autograd.grad(torch.as_tensor(loss), part)
                tile.cut(gradient).add_(found)
        return -self.config.zeta_at_once * per_image(gain) * gradient
