"""Loading another latent diffusion model: a folder in diffusers' layout, a model of the hub, a `.safetensors` file.

Everything goes through diffusers' own loaders (`from_pretrained`, `from_single_file`). Weights are read from
safetensors only: a pickle runs code when it is opened.

    FOLDER/vae/  FOLDER/scheduler/  and one of  FOLDER/{denoiser,unet,transformer}/
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from latentindigo.autoencoder import PatchAutoencoder
from latentindigo.backbones import Capabilities
from latentindigo.inn import InvertibleNet
from latentindigo.model_folder import model_folder
from latentindigo.prior import LatentPrior

__all__ = ["PriorParts", "load_autoencoder", "load_latent_inn", "load_prior"]

_DENOISERS = ("denoiser", "unet", "transformer")
_CONFIGS = ("config.json", "scheduler_config.json")
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_VAE_KEYS = ("first_stage_model.", "vae.", "encoder.conv_in.", "decoder.conv_in.")
_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class PriorParts:
    """A latent diffusion model in parts.

    Attributes:
        vae: Autoencoder.
        denoiser: Denoiser.
        scheduler: Scheduler.
        text_folder: Folder that holds the text encoders (text_encoder, text_encoder_2, ...), None where there are none.
        capabilities: What the model is and needs.
    """

    vae: Any
    denoiser: Any
    scheduler: Any
    text_folder: Path | None
    capabilities: Capabilities


def load_prior(
    source: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    **download: Any,
) -> PriorParts:
    """Load a latent diffusion model.

    Args:
        source: A folder in diffusers' layout, a hub id "user/repo", or a `.safetensors` file that holds a whole model
            in the keys of its original code.
        config: For a file: a folder in diffusers' layout with the configurations of the parts (weights are not needed).
            None asks the hub for the usual ones of the model that the file seems to be.
        dtype: Dtype of the networks.
        **download: `token` and `cache_dir` for the hub.

    Returns:
        The parts; text encoders are not loaded, only their folder is named.

    Raises:
        FileNotFoundError: If there is no such model, or parts or configurations are missing.
        ValueError: If weights are pickles, broken or incomplete, or of a class that cannot be driven.
    """
    path = Path(source)
    if path.is_file():
        return _load_file(path, None if config is None else model_folder(config, **download), dtype)
    if config is not None:
        raise ValueError(
            f"expected a single .safetensors file together with a prior_config, got {str(source)!r}, which is none; "
            "a folder brings its own configurations"
        )
    if path.suffix in (".safetensors", *_PICKLES):
        raise FileNotFoundError(f"there is no file {str(source)!r}")
    folder = model_folder(source, **download)
    denoiser = _denoiser_folder(folder, ("vae", "scheduler"))
    return _parts(
        _load_network(folder / "vae", dtype),
        _load_network(folder / denoiser, dtype),
        _load_scheduler(folder / "scheduler"),
        folder,
    )


def load_autoencoder(source: Any, dtype: torch.dtype = torch.float32, **download: Any) -> Any:
    """Load an autoencoder alone, for example an AutoencoderTiny.

    Args:
        source: A folder or hub id that holds it, itself or in a folder `vae` inside.
        dtype: Its dtype.
        **download: `token` and `cache_dir` for the hub.

    Returns:
        The autoencoder.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If its weights are pickles, or its class is unknown.
    """
    folder = model_folder(source, **download)
    return _load_network(folder if (folder / "config.json").is_file() else folder / "vae", dtype)


def load_latent_inn(source: str | os.PathLike[str], **download: Any) -> InvertibleNet:
    """Load a latent INN alone, in float32.

    Args:
        source: Its folder, or one that holds it: `final` of a training run, the run folder, or a saved model.
        **download: `token` and `cache_dir` for the hub.

    Returns:
        The network.

    Raises:
        FileNotFoundError: If it is missing.
    """
    folder = model_folder(source, **download)
    places = [folder, folder / "latent_inn", folder / "final" / "latent_inn"]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None or _json_class(found) != InvertibleNet.__name__:
        raise FileNotFoundError(
            f"expected a latent INN in {folder.name!r} (latent_inn/ or final/latent_inn/), found none; train one with "
            "`latentindigo train latent-inn --prior`"
        )
    return InvertibleNet.from_pretrained(found, dtype=torch.float32, use_safetensors=True)


def _json_class(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text()).get("_class_name", "")


def _parts(vae: Any, denoiser: Any, scheduler: Any, folder: Path) -> PriorParts:
    has_text = any((entry / "config.json").is_file() for entry in folder.glob("text_encoder*"))
    capabilities = LatentPrior(vae, denoiser, scheduler).capabilities
    return PriorParts(vae, denoiser, scheduler, folder if has_text else None, capabilities)


def _denoiser_folder(folder: Path, needed: tuple[str, ...]) -> str:
    """Name of the denoiser's folder, once everything that is needed is seen to be there."""
    denoiser = next((name for name in _DENOISERS if (folder / name).is_dir()), None)
    missing = [name for name in needed if not (folder / name).is_dir()]
    if denoiser is None or missing:
        raise FileNotFoundError(
            f"a prior needs the folders vae, denoiser (or unet, or transformer) and scheduler; {folder.name!r} lacks "
            f"{', '.join(missing + ([] if denoiser else ['denoiser']))}"
        )
    return denoiser


# --- one part -------------------------------------------------------------------------------------------------------


def _class_of(folder: Path) -> Any:
    """The class that a part's configuration names: one of diffusers' or of ours."""
    config = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    place = f"{folder.parent.name}/{folder.name}"
    if config is None:
        raise FileNotFoundError(f"expected a configuration in {place}, found none")
    name = json.loads(config.read_text()).get("_class_name", "")
    kind = PatchAutoencoder if name == "PatchAutoencoder" else getattr(diffusers, name, None) if name else None
    if kind is None:
        raise ValueError(f"{place} is of class {name!r}, which diffusers does not have")
    return kind


def _load_network(folder: Path, dtype: torch.dtype) -> Any:
    kind = _class_of(folder)
    variant = _variant(folder)
    return kind.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, **({"variant": variant} if variant else {})
    )


def _variant(folder: Path) -> str | None:
    """Which of a part's weights to read: None = the plain ones, else a variant such as "fp16" if there is nothing else.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If there are only pickles.
    """
    place = f"{folder.parent.name}/{folder.name}"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            loader = f"{_class_of(folder).__name__}.from_pretrained"
            raise ValueError(_refusal(f"{place}/{pickles[0]}", loader, place, place))
        raise FileNotFoundError(f"expected weights (*.safetensors) in {place}, found none")
    # NAME.safetensors or NAME-00001-of-00002.safetensors; a variant stands between NAME and what follows.
    rests = [name[len(_STEM) :] for name in files if name.startswith(_STEM)]
    if any(rest == ".safetensors" or rest.startswith("-") for rest in rests):
        return None
    variants = sorted({rest[1:].split(".")[0].split("-")[0] for rest in rests})
    return variants[0] if variants else None


def _load_scheduler(folder: Path) -> Any:
    kind = _class_of(folder)
    if kind.__name__ != "PNDMScheduler":
        return kind.from_pretrained(folder, local_files_only=True)
    # Stable Diffusion 1.x ships with it; DDIM walks the same noise levels with one evaluation per step.
    warnings.warn(
        "PNDMScheduler mixes evaluations of several steps, which guidance cannot act on; DDIMScheduler is used with "
        "its noise levels",
        stacklevel=2,
    )
    config = dict(kind.load_config(folder, local_files_only=True))
    return diffusers.DDIMScheduler.from_config({**config, "clip_sample": False})


def _refusal(file: str, loader: str, source: str, target: str) -> str:
    return (
        f"expected safetensors, got the pickle {file!r}, which could run any code when it is opened; if you trust it, "
        f"convert it once with diffusers, {loader}({source!r}).save_pretrained({target!r}), and give {target!r}"
    )


# --- one file -------------------------------------------------------------------------------------------------------


def _load_file(file: Path, config: Path | None, dtype: torch.dtype) -> PriorParts:
    """A whole model out of one file; configurations, and the autoencoder if the file has none, from a folder."""
    if file.suffix != ".safetensors":
        if file.suffix in _PICKLES:
            raise ValueError(_refusal(file.name, "StableDiffusionPipeline.from_single_file", file.name, file.stem))
        raise ValueError(f"expected a .safetensors file, a folder or a hub id, got the file {file.name!r}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file.name!r} is no whole safetensors file ({error}); download it again") from error
    if config is None:
        config = _usual_config(file, weights)
    denoiser = _denoiser_folder(config, ("vae", "scheduler"))
    if any(key.startswith(_VAE_KEYS) for key in weights):
        vae = _load_from(weights, config / "vae", file, dtype)
    elif any((config / "vae").glob("*.safetensors")):
        vae = _load_network(config / "vae", dtype)
    else:
        raise FileNotFoundError(
            f"{file.name!r} holds no autoencoder; put one's weights into {config.name}/vae, beside its config.json"
        )
    network = _load_from(weights, config / denoiser, file, dtype)
    return _parts(vae, network, _load_scheduler(config / "scheduler"), config)


def _load_from(weights: dict[str, torch.Tensor], part: Path, file: Path, dtype: torch.dtype) -> Any:
    """One network out of the file's tensors, converted from the original keys by diffusers."""
    kind = _class_of(part)
    if not hasattr(kind, "from_single_file"):
        raise ValueError(
            f"{kind.__name__} cannot be read from a single file; give a folder in diffusers' layout instead"
        )
    try:
        # Some converters take entries out of the dictionary they are given: each gets its own.
        return kind.from_single_file(
            dict(weights), config=str(part.parent), subfolder=part.name, local_files_only=True, dtype=dtype
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{file.name!r} does not hold the {kind.__name__} that {part.parent.name}/{part.name} describes "
            f"({reason[0] if reason else type(error).__name__}); give the configuration of that very model"
        ) from error


def _usual_config(file: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The hub's configurations of the model that the file seems to be."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository = fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*merges.txt", "*spiece.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(
            f"{file.name!r} holds weights without configurations, and the hub could not provide those of "
            f"{repository!r} ({type(error).__name__}); give a folder with vae, unet (or transformer) and scheduler "
            "configurations as prior_config (--prior-config FOLDER)"
        ) from error
