"""The model card of a saved model: what can be read off its networks, and what only its maker knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

__all__ = ["CardFacts", "write_model_card"]

_JOBS = {
    "vae": "autoencoder: E and D",
    "denoiser": "the prior",
    "estimator": "stage-one estimate to start from",
    "degradation_encoder": "γ = F(y): describes the damage",
    "pixel_inn": "PixelINN guidance, map of invented detail",
    "latent_inn": "LatentINN guidance",
}


@dataclass(frozen=True)
class CardFacts:
    """What only the maker of a model knows.

    Attributes:
        title: Heading of the card.
        license: Licence of the weights: an identifier of the hub ("apache-2.0", "openrail++", ...) or "other", which
            says that the text below must be read.
        terms: Terms of use, in words.
        training_data: What the networks were trained on.
        base_model: Hub id of the model that this one builds on, or None.
    """

    title: str = "A LatentINDIGO model"
    license: str = "other"
    terms: str = "Not stated. Ask whoever made this model before you use it."
    training_data: str = "Not stated."
    base_model: str | None = None

    def __post_init__(self) -> None:
        for name in ("title", "license", "terms", "training_data"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: expected a text for the model card, got an empty one; leave it out instead")


def write_model_card(folder: Path, networks: Mapping[str, nn.Module], weights_hash: str, facts: CardFacts) -> Path:
    """Write README.md beside a saved model, with the header that the hub reads.

    Args:
        folder: Folder of the model.
        networks: Its networks by name.
        weights_hash: Hash over all weights, as results carry it.
        facts: What cannot be read off the networks.

    Returns:
        The file.
    """
    lines = ["---", f"license: {json.dumps(facts.license)}", "library_name: diffusers", "pipeline_tag: image-to-image"]
    if facts.base_model is not None:
        lines.append(f"base_model: {json.dumps(facts.base_model)}")
    lines += ["tags:", *(f"  - {tag}" for tag in ("latentindigo", "image-restoration", "super-resolution")), "---", ""]
    lines += [
        f"# {facts.title}",
        "",
        "Restores blurred, noisy, small or over-compressed photographs with a latent diffusion model that invertible "
        "networks guide. Detail that the input does not hold is invented; it may be wrong and look right.",
        "",
        "```python",
        "from latentindigo import RestorationPipeline",
        "",
        'pipe = RestorationPipeline.from_pretrained("user/repo")  # this repository, or its folder',
        'pipe(photo, scale=4).images[0].save("photo-large.png")  # photo: a Pillow image',
        "```",
        "",
        "## Parts",
        "",
        "| Folder | Class | Parameters | Job |",
        "| --- | --- | --- | --- |",
    ]
    for name, network in networks.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        lines.append(f"| `{name}` | {type(network).__name__} | {count:,} | {_JOBS.get(name, 'part of the prior')} |")
    lines += [
        "",
        f"All weights are safetensors. Hash of all of them, as results carry it: `{weights_hash}`.",
        "",
        *("## Training data", "", facts.training_data, "", "## Terms", "", facts.terms, ""),
    ]
    path = folder / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
