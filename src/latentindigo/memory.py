"""What fits into the memory of an accelerator: prior, method, size and offloading, from recorded sizes.

    memory = weights that are there at one time + the largest peak of activations + what the runtime itself takes

`prior_sizes.json` holds what `benchmarks/memory_table.py` counted and traced on networks of the published
configurations: numbers of weights, and bytes at the peak of each stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CARDS", "METHODS", "OFFLOADS", "SIZES", "PriorSizes", "memory_table", "memory_tables", "what_fits"]

SIZES = Path(__file__).parent / "prior_sizes.json"
METHODS = (
    "unguided",
    "latent-inn stopped",
    "latent-inn through",
    "pixel-inn stopped",
    "pixel-inn through",
    "pixel-inn stopped, tiny decoder",
)
OFFLOADS = ("none", "model", "sequential")
CARDS = (4, 8, 12, 24)  # GB
BYTES = 2  # Of a weight: bfloat16 or float16.
RUNTIME = 0.6e9  # Bytes of a CUDA context with its libraries.
SLACK = 1.1  # The allocator's gaps and the convolutions' workspaces, on activations.
GUIDES = 8e6  # Bytes of degradation encoder and estimator, in float32.
TILE = 512  # Side of a tile in pixels, overlaps included, where the whole picture does not fit.


@dataclass(frozen=True)
class PriorSizes:
    """Sizes of one prior.

    Attributes:
        title: Name for people.
        weights: Numbers in each network.
        largest_layer: Numbers in the largest single layer of all networks.
        peaks: Side of the picture in pixels -> stage -> bytes of activations at its peak, batch 1, bfloat16.
    """

    title: str
    weights: Mapping[str, int]
    largest_layer: int
    peaks: Mapping[int, Mapping[str, int]]

    @staticmethod
    def load() -> dict[str, PriorSizes]:
        """The recorded sizes by name of the prior."""
        found = json.loads(SIZES.read_text(encoding="utf-8"))
        return {
            name: PriorSizes(**{**entry, "peaks": {int(side): stages for side, stages in entry["peaks"].items()}})
            for name, entry in found.items()
        }

    def needed(self, method: str, side: int, offload: str) -> float:
        """Bytes of accelerator memory that a restoration needs, without tiles.

        Args:
            method: One of `METHODS`.
            side: Side of the square output in pixels, one that was traced.
            offload: One of `OFFLOADS`.

        Returns:
            Bytes, the runtime's own included; text encoders not, whose embeddings are made before.

        Raises:
            ValueError: For another method or offload, or a size that was not traced.
        """
        if method not in METHODS or offload not in OFFLOADS or side not in self.peaks:
            known = [", ".join(map(str, names)) for names in (METHODS, OFFLOADS, self.peaks)]
            raise ValueError(
                f"expected a method among {known[0]}, an offload among {known[1]} and a side among {known[2]}, got "
                f"{method!r}, {offload!r} and {side}"
            )
        stages = self._stages(method, side, offload)
        return RUNTIME + max(weights + SLACK * activations for weights, activations in stages)

    def _stages(self, method: str, side: int, offload: str) -> list[tuple[float, float]]:
        """(bytes of weights, bytes of activations) of coding, denoising and guidance."""
        p = self.peaks[side]
        # What is differentiated in one go adds up.
        guidance = {
            "unguided": 0,
            "latent-inn stopped": p["latent_inn"],
            "latent-inn through": p["denoise_gradient"] + p["latent_inn"],
            "pixel-inn stopped": p["decode_gradient"] + p["pixel_inn"],
            "pixel-inn through": p["denoise_gradient"] + p["decode_gradient"] + p["pixel_inn"],
            "pixel-inn stopped, tiny decoder": p["tiny_decode_gradient"] + p["pixel_inn"],
        }[method]
        activations = max(p["encode"], p["decode"]), p["denoise"], guidance
        return list(zip(self._weights(method, offload), activations, strict=True))

    def _weights(self, method: str, offload: str) -> tuple[float, float, float]:
        """Bytes of the weights that are there while it codes, denoises and guides."""
        sizes = {part: BYTES * count for part, count in self.weights.items()}
        inns = 2 * (sizes["pixel_inn"] + sizes["latent_inn"]) + GUIDES  # They stay in float32.
        tiny, denoiser, vae = "tiny" in method, sizes["denoiser"], sizes["vae"]
        guide = sizes["guidance_vae"] if tiny else vae if method.startswith("pixel-inn") else 0
        if offload == "none":
            everything = denoiser + vae + inns + (guide if tiny else 0)
            return everything, everything, everything
        if offload == "model":
            return vae + inns, denoiser + inns, denoiser + inns + guide
        # A gradient keeps the weights of the layers it goes back through, until it has passed.
        layer = BYTES * self.largest_layer
        return layer, layer, inns + guide + (denoiser if "through" in method else layer)


def memory_table(sizes: PriorSizes) -> list[tuple[str, str, list[float]]]:
    """GB that one prior needs.

    Args:
        sizes: The prior.

    Returns:
        (method, offload, [GB at each traced side]) for every method and offload.
    """
    sides = sorted(sizes.peaks)
    return [(m, o, [sizes.needed(m, side, o) / 1e9 for side in sides]) for m in METHODS for o in OFFLOADS]


def what_fits(found: Mapping[str, PriorSizes], cards: Sequence[int] = CARDS) -> list[dict[str, str]]:
    """The quickest way to restore to 1024² on each accelerator.

    Args:
        found: Sizes by name.
        cards: Memory of accelerators in GB.

    Returns:
        One row for each prior and method: "prior", "method", and "<n> GB" -> an offload, with ", tiles" where the
        picture does not fit whole, or "–".
    """
    return [
        {"prior": sizes.title, "method": method, **{f"{card} GB": _advice(sizes, method, card) for card in cards}}
        for sizes in found.values()
        for method in METHODS
    ]


def memory_tables(found: Mapping[str, PriorSizes], cards: Sequence[int] = CARDS) -> str:
    """The tables of docs/memory.md.

    Args:
        found: Sizes by name.
        cards: Memory of accelerators in GB.

    Returns:
        Markdown.
    """
    heads = ["Prior", "Method", *(f"{card} GB" for card in cards)]
    lines = [_row(heads), _row(["---"] * len(heads))]
    lines += [_row(list(row.values())) for row in what_fits(found, cards)]
    lines += ["", "## The numbers behind", ""]
    for sizes in found.values():
        sides = sorted(sizes.peaks)
        counts = ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in sizes.weights.items())
        heads = ["Method", "Offload", *(f"{side}², GB" for side in sides)]
        lines += [f"### {sizes.title}", "", f"Weights: {counts}.", "", _row(heads), _row(["---"] * len(heads))]
        for method, offload, values in memory_table(sizes):
            lines.append(_row([method, offload, *(f"{value:.1f}" for value in values)]))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _advice(sizes: PriorSizes, method: str, card: float) -> str:
    """The quickest way to restore 1024² on a card: tiles cost less than a denoiser that travels layer by layer."""
    for offloads in (("none", "model"), ("sequential",)):
        for side, tiles in ((1024, ""), (TILE, ", tiles")):
            for offload in offloads:
                if sizes.needed(method, side, offload) <= card * 1e9:
                    return f"{offload}{tiles}"
    return "–"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
