"""Two nodes: one loads a model, one restores images with it.

An IMAGE is a float32 tensor (B, H, W, C) in [0, 1] on the CPU, a MASK one of (B, H, W). ComfyUI runs nodes in PyTorch's
inference mode, whose tensors refuse gradients; guidance needs them, so both nodes leave it. Nothing heavy is imported
before a node runs, and nothing of ComfyUI is needed but its progress bar, its cancel button and its choice of device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from latentindigo import RestorationPipeline

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "Load", "Restore"]

MODEL_TYPE = "LATENTINDIGO"
CATEGORY = "image/restoration"
THE_PRESETS = -1.0  # A number of which ComfyUI knows no "none": the preset's own.


class Load:
    """Loads a model once; ComfyUI keeps it as long as the inputs and the files stay the same."""

    RETURN_TYPES = (MODEL_TYPE,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("For LatentINDIGO Restore.",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Load a LatentINDIGO model: the one in the package, a folder, or a hub id."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """The inputs, as ComfyUI describes them."""
        return {
            "required": {
                "model": (
                    "STRING",
                    {"default": "embedded", "tooltip": "'embedded', a model folder, or a hub id user/repo."},
                ),
                "dtype": (
                    ["auto", "float32", "bfloat16", "float16"],
                    {"default": "auto", "tooltip": "Numbers to compute with; auto: bfloat16 where it is fast."},
                ),
                "device": (["auto", "cpu"], {"default": "auto", "tooltip": "auto: the device that ComfyUI uses."}),
            },
            "optional": {
                "prior": (
                    "STRING",
                    {"default": "", "tooltip": "Another latent diffusion model to sample with: a folder or a hub id."},
                ),
                "init_model": (
                    "UPSCALE_MODEL",
                    {"tooltip": "A restorer such as Real-ESRGAN whose estimate sampling starts from."},
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: str | None = None, prior: str | None = None) -> bool | str:  # noqa: N802
        """True, or what is wrong with the names; None stands for an input that another node will give."""
        for label, name in (("model", model), ("prior", prior)):
            missing = label == "model" and name is not None and not name.strip()
            looks_local = bool(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name)
            if missing or (looks_local and not Path(name or "").expanduser().is_dir()):
                return f"{label}: expected 'embedded', a model folder or a hub id user/repo, got {name!r}"
        return True

    @classmethod
    def IS_CHANGED(cls, model: str, prior: str = "", **_: Any) -> str:  # noqa: N802
        """A text that changes when files of a model folder do; ComfyUI then loads the model anew."""
        return "\n".join(_fingerprint(name) for name in (model, prior))

    def load(
        self, model: str, dtype: str, device: str, prior: str = "", init_model: Any = None
    ) -> tuple[RestorationPipeline]:
        """Load a model.

        Args:
            model: "embedded", a folder, or a hub id.
            dtype: "auto", "float32", "bfloat16" or "float16".
            device: "auto" or "cpu".
            prior: Folder or hub id of another latent diffusion model, or "".
            init_model: What ComfyUI's node "Load Upscale Model" gives, or None.

        Returns:
            The pipeline.

        Raises:
            ImportError: latentindigo is not installed for the Python that runs ComfyUI.
            RuntimeError: The model cannot be loaded; the message says why.
            ValueError: The init model is no restorer of single photographs.
        """
        try:
            from latentindigo import RestorationPipeline
            from latentindigo.init_models import InitModel
            from latentindigo.jobs import fast_dtype
        except ModuleNotFoundError as error:
            if error.name != "latentindigo":
                raise
            raise ImportError(
                "the package latentindigo is missing; install it for the Python that runs ComfyUI "
                "(python -m pip install latentindigo)"
            ) from error
        import torch

        place = torch.device("cpu") if device == "cpu" else _comfy_device()
        with torch.inference_mode(mode=False):
            # Not `jobs.load_pipeline`: its quick import would hide packages that other nodes want from diffusers.
            pipe = RestorationPipeline.from_pretrained(
                _name(model),
                prior=_name(prior) or None,
                torch_dtype=fast_dtype(place) if dtype == "auto" else getattr(torch, dtype),
                device=place,
            )
            if init_model is not None:
                # In float32: other nodes hold the same object and expect it as it is.
                pipe.init_model = InitModel(init_model, name="the upscale model")
        return (pipe,)


class Restore:
    """Restores a batch of images; ComfyUI caches the result, for the same inputs give the same pixels."""

    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("image", "invented_detail")
    OUTPUT_TOOLTIPS = (
        "Restored images, the samples of an image after each other.",
        "Where detail was invented, four times brighter, one mask for each image.",
    )
    FUNCTION = "restore"
    CATEGORY = CATEGORY
    DESCRIPTION = "Restore and enlarge images, and show which detail was invented."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """The inputs, as ComfyUI describes them."""
        return {
            "required": {
                "model": (MODEL_TYPE, {"tooltip": "From LatentINDIGO Load."}),
                "image": ("IMAGE", {"tooltip": "Degraded images; an alpha channel is kept."}),
                "scale": (
                    "FLOAT",
                    {"default": 4.0, "min": 1.0, "max": 16.0, "step": 0.25, "tooltip": "Output size over input size."},
                ),
                "preset": (
                    ["default", "faithful", "vivid"],
                    {"default": "default", "tooltip": "How far to trust the photo, and how far the model."},
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2**64 - 1,
                        "control_after_generate": True,
                        "tooltip": "The same seed gives the same pixels; all images of a batch use it.",
                    },
                ),
            },
            "optional": {
                "fidelity": (
                    "FLOAT",
                    {
                        "default": THE_PRESETS,
                        "min": THE_PRESETS,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "Slide between vivid (0) and faithful (1); below 0: the preset's.",
                    },
                ),
                "steps": (
                    "INT",
                    {"default": 0, "min": 0, "max": 1000, "tooltip": "Denoiser evaluations; 0: the preset's."},
                ),
                "num_samples": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "Different results for each image."},
                ),
                "tile": (
                    ["auto", "off", "256", "384", "512", "768", "1024", "1536", "2048"],
                    {"default": "auto", "tooltip": "Side of a tile in output pixels; smaller ones need less memory."},
                ),
            },
        }

    def restore(
        self,
        model: RestorationPipeline,
        image: Tensor,
        scale: float,
        preset: str,
        seed: int,
        fidelity: float = THE_PRESETS,
        steps: int = 0,
        num_samples: int = 1,
        tile: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Restore images.

        Args:
            model: From `Load`.
            image: (B, H, W, 3) or, with alpha, (B, H, W, 4), in [0, 1]; what lies outside is cut off.
            scale: Output size over input size.
            preset: "faithful", "default" or "vivid".
            seed: Seed of the first sample of every image.
            fidelity: 0..1, or less for the preset's.
            steps: Denoiser evaluations, 0 for the preset's.
            num_samples: Samples for each image.
            tile: "auto", "off" or the side of a tile in output pixels.

        Returns:
            Restored images (B * num_samples, H', W', C) and maps of invented detail (B * num_samples, H', W'), in
            [0, 1] on the CPU.

        Raises:
            ValueError: The image has another shape.
        """
        import torch

        from latentindigo.jobs import MAP_GAIN
        from latentindigo.presets import blend_presets

        if image.ndim != 4 or image.shape[-1] not in (3, 4):
            raise ValueError(f"image: expected (B, H, W, 3) or (B, H, W, 4), got {tuple(image.shape)}")
        if not steps:
            chosen = model.presets[preset]
            if fidelity >= 0:
                chosen = blend_presets(model.presets["vivid"], model.presets["faithful"], fidelity)
            steps = chosen.steps
        with torch.inference_mode(mode=False):
            # Cloned out of inference mode.
            pixels = image.detach().to("cpu", torch.float32, copy=True).clone().movedim(-1, 1).clamp(0, 1)
            result = model(
                pixels[:, :3],
                scale=scale,
                preset=preset,
                fidelity=fidelity if fidelity >= 0 else None,
                steps=steps,
                num_samples=num_samples,
                seed=seed % 2**63,  # Samples count up from it, and generators end at 2^64.
                tile="auto" if tile == "auto" else None if tile == "off" else int(tile),
                output_type="pt",
                callback_on_step_end=_progress(len(pixels) * num_samples * steps),
            )
            images = torch.stack(list(result.images))
            if pixels.shape[1] == 4:
                alpha = torch.nn.functional.interpolate(
                    pixels[:, 3:], size=images.shape[-2:], mode="bicubic", antialias=True
                )
                images = torch.cat((images, alpha.clamp(0, 1).repeat_interleave(num_samples, 0)), 1)
            maps = torch.cat([detail.float() for detail in result.detail_maps]) * MAP_GAIN
        return images.cpu().float().movedim(1, -1).contiguous(), maps.cpu().clamp(0, 1)


def _progress(total: int) -> Callable[[Any, int, Any, dict[str, Any]], None]:
    """What is called after each step: moves ComfyUI's bar, and ends the call if the user pressed cancel.

    Args:
        total: Steps of all images; images of one size go through the loop together, and each counts.
    """
    management, utils = _comfy("comfy.model_management"), _comfy("comfy.utils")
    bar = None if utils is None else utils.ProgressBar(total)
    done = 0

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        nonlocal done
        if management is not None:
            management.throw_exception_if_processing_interrupted()
        # Scales beyond 11 take several passes: the bar is full after the first.
        done = min(total, done + len(tensors["z0"]))
        if bar is not None:
            bar.update_absolute(done)

    return after_step


def _comfy(name: str) -> Any:
    """A module of ComfyUI, or None where it does not run."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _comfy_device() -> Any:
    """The device that ComfyUI uses; without ComfyUI an accelerator if there is one."""
    import torch

    management = _comfy("comfy.model_management")
    if management is not None:
        return torch.device(management.get_torch_device())
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _name(text: str) -> str:
    """The name of a model as it was meant: without blanks around it, ~ opened."""
    text = text.strip()
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _fingerprint(name: str | None) -> str:
    """The files of a model folder with their sizes and times, or the name of what is no folder."""
    folder = Path(_name(name or ""))
    if not name or not folder.is_dir():
        return str(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = ((path.relative_to(folder).as_posix(), path.stat()) for path in files)
    return "\n".join([name, *(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in facts)])


NODE_CLASS_MAPPINGS: dict[str, type] = {"LatentINDIGOLoad": Load, "LatentINDIGORestore": Restore}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "LatentINDIGOLoad": "LatentINDIGO Load",
    "LatentINDIGORestore": "LatentINDIGO Restore",
}
