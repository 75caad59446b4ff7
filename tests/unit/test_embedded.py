"""The model that ships in the package: complete, small enough, invertible with its trained weights, repeatable."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentindigo.images import load_image
from latentindigo.inn import InvertibleNet
from latentindigo.model_folder import EMBEDDED
from latentindigo.pipeline import RestorationPipeline
from tolerances import in_dtype

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def embedded() -> RestorationPipeline:
    """Return the embedded pipeline."""
    return RestorationPipeline.from_pretrained()


@pytest.fixture(scope="module")
def photo(root: Path) -> Tensor:
    """Return an example photo, (1, 3, 96, 96)."""
    return load_image(root / "examples" / "photos" / "astronaut.jpg").rgb[None, :, :96, :96]


def test_weights_are_small_safetensors() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in weights) <= 32 * MEGABYTE
    assert max(path.stat().st_size for path in weights) <= 15 * MEGABYTE


def test_configurations_name_no_path() -> None:
    for path in EMBEDDED.rglob("*.json"):
        if not path.name.endswith(".index.json"):
            assert '"/' not in path.read_text(), path


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_trained_networks_are_invertible(embedded: RestorationPipeline, photo: Tensor, levels: int) -> None:
    pixels = F.interpolate(photo, scale_factor=2, mode="bicubic", antialias=True).clamp(0, 1)
    latents = embedded.prior.encode(pixels)
    # The bars for trained weights, which amplify rounding more than the random ones of the tolerance table.
    for dtype, bar in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        gamma = embedded.degradation_encoder(photo).to(dtype)
        for network, u in ((embedded.pixel_inn, pixels), (embedded.latent_inn, latents)):
            copy = in_dtype(cast(InvertibleNet, InvertibleNet.from_config(network.config)), dtype)
            copy.load_state_dict({k: v.to(dtype) for k, v in network.state_dict().items()})
            with torch.no_grad():
                coarse, details = copy(u.to(dtype), gamma, levels)
                back = copy.inverse(coarse, details, gamma, levels)
            assert float((back - u).abs().max()) <= bar
            # The check means something: these weights do more than the fixed Haar step.
            assert float(details[0].abs().max()) > 0.01


def test_details_of_zero_stay_close_to_the_picture(embedded: RestorationPipeline) -> None:
    # The map of invented detail relies on it: where a picture is flat, nothing can have been invented.
    flat = torch.full((1, 3, 64, 64), 0.4)
    output = embedded(flat, scale=2, output_type="pt", method="unguided", steps=1, strength=0.05)
    assert float(output.detail_maps[0].mean()) < 0.05


def test_same_seed_same_bytes(embedded: RestorationPipeline, photo: Tensor) -> None:
    small = photo[..., :32, :40]
    before = embedded.weights_hash()
    first, again = (embedded(small, scale=4, seed=3).images[0].tobytes() for _ in range(2))
    assert first == again
    assert embedded.weights_hash() == before
