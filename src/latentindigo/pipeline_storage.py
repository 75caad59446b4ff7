"""The parts of a pipeline: how they are loaded, saved, shared, moved and told to save memory.

`latentindigo.pipeline` adds what is done with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import logging as diffusers_logging

from latentindigo.conditioning import Conditioning
from latentindigo.few_steps import SchedulerKind, make_scheduler
from latentindigo.init_models import InitModel, load_init_model
from latentindigo.inn import DegradationEncoder, Estimator, InvertibleNet
from latentindigo.loading import load_autoencoder, load_latent_inn, load_prior
from latentindigo.model_card import CardFacts, write_model_card
from latentindigo.model_folder import model_folder, upload_folder
from latentindigo.offloading import weights_of
from latentindigo.presets import load_presets, save_presets
from latentindigo.prior import LatentPrior
from latentindigo.prompts import Prompter
from latentindigo.tuning import checkpoint_networks, compile_networks

__all__ = ["ModelLoadError", "StoredPipeline"]

Pipe = TypeVar("Pipe", bound="StoredPipeline")

_EXACT = ("degradation_encoder", "pixel_inn", "latent_inn")  # gamma steers everything, and the INNs' sums are undone.


class ModelLoadError(RuntimeError):
    """A model could not be loaded; the message says what was expected and what to do."""


class StoredPipeline(DiffusionPipeline):
    """The networks of a restoration, with everything but the restoring; `RestorationPipeline` says what they are."""

    # A network that is called sends the one before it back to the CPU. The INNs and the autoencoder are called between
    # two steps: the denoiser comes last, so that it stays where it is, and so do weights that a gradient still needs.
    model_cpu_offload_seq = "degradation_encoder->estimator->pixel_inn->latent_inn->guidance_vae->vae->denoiser"
    _optional_components = ["latent_inn", "estimator", "guidance_vae"]  # noqa: RUF012 (the attribute that diffusers reads)

    def __init__(
        self,
        vae: ModelMixin,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        estimator: Estimator | None,
        degradation_encoder: DegradationEncoder,
        pixel_inn: InvertibleNet,
        latent_inn: InvertibleNet | None = None,
        guidance_vae: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            denoiser=denoiser,
            scheduler=scheduler,
            estimator=estimator,
            degradation_encoder=degradation_encoder,
            pixel_inn=pixel_inn,
            latent_inn=latent_inn,
            guidance_vae=guidance_vae,
        )
        self.conditioning: Conditioning | None = None
        self.text_folder: Path | None = None
        self.prompter: Prompter | None = None
        self.presets = load_presets(Path(os.devnull))
        self._reach: tuple[tuple[int, int], float] | None = None
        self.init_model: InitModel | None = None
        self.set_progress_bar_config(disable=True)
        for network in self._networks().values():
            # Channels last: a tenth to a quarter less time for convolutions, on CPUs and on tensor cores.
            frozen: Any = network.eval().requires_grad_(False)
            frozen.to(memory_format=torch.channels_last)

    # ------------------------------------------------------------------------------------------------ loading, saving

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  (diffusers' own signature is **kwargs)
        cls: type[Pipe],
        model: str | os.PathLike[str] = "embedded",
        *,
        prior: str | os.PathLike[str] | None = None,
        prior_config: str | os.PathLike[str] | None = None,
        guidance_vae: str | os.PathLike[str] | ModelMixin | None = None,
        latent_inn: str | os.PathLike[str] | InvertibleNet | None = "model",
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        init_model: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Pipe:
        """Load a model.

        Args:
            model: "embedded" (ships in the package), a folder, or a hub id.
            prior: Another latent diffusion model to sample with: a folder or hub id in diffusers' layout, or a single
                .safetensors file (`latentindigo.loading`); guidance then defaults to PixelINN, which serves any.
            prior_config: For a single file, a folder with the configurations of its parts, in diffusers' layout.
            guidance_vae: Folder or hub id of a cheap autoencoder (AutoencoderTiny) that stands in for the full one in
                the guided steps of PixelINN.
            latent_inn: Latent INN for the autoencoder of this model or prior, or its folder, for example the run folder
                of `latentindigo train latent-inn --prior PATH`; guidance then defaults to it. "model" = the saved one,
                none for another prior; None = none.
            torch_dtype: Dtype of autoencoder, denoiser and estimator, float32 by default. The degradation encoder and
                the sampler's state are always float32, and so are the INNs' weights and sums; with bfloat16 their
                predict and update networks compute in it.
            device: Where to put the networks, the CPU by default.
            init_model: A .safetensors file of a classical restorer such as Real-ESRGAN, which takes the estimator's
                place (see `latentindigo.init_models`); needs the extra `init-models`.
            **kwargs: `revision`, `token` and `cache_dir` say which files of the hub; the rest is passed to diffusers.

        Returns:
            The pipeline, ready to be called.

        Raises:
            ModelLoadError: If files are missing, broken or do not fit each other.
        """
        dtype = torch_dtype or torch.float32
        download = {name: kwargs.pop(name) for name in ("revision", "token", "cache_dir") if name in kwargs}
        access = {name: value for name, value in download.items() if name != "revision"}  # That is the model's own.
        try:
            restorer = None if init_model is None else load_init_model(init_model, dtype)
        except (OSError, ValueError, ImportError) as error:
            raise ModelLoadError(f"init model {str(init_model)!r} could not be loaded: {error}") from error
        try:
            folder = model_folder(model, **download)
            if not (folder / "model_index.json").is_file():
                raise FileNotFoundError(f"{folder.name!r} holds no model_index.json; give the folder of a saved model")
            parts: dict[str, Any] = {}
            found = None
            with _quiet_loading():
                if prior is not None:
                    found = load_prior(prior, config=prior_config, dtype=dtype, **access)
                    parts.update(vae=found.vae, denoiser=found.denoiser, scheduler=found.scheduler)
                    parts["latent_inn"] = None  # It belongs to the other autoencoder, and so does its stand-in.
                    parts["guidance_vae"] = None
                elif prior_config is not None:
                    raise ValueError("prior_config describes a prior, and none is given; give prior too")
                if guidance_vae is not None:
                    is_path = isinstance(guidance_vae, (str, os.PathLike))
                    parts["guidance_vae"] = load_autoencoder(guidance_vae, dtype, **access) if is_path else guidance_vae
                if latent_inn is None or isinstance(latent_inn, InvertibleNet):
                    parts["latent_inn"] = latent_inn
                elif latent_inn != "model":
                    parts["latent_inn"] = load_latent_inn(latent_inn, **access)
                dtypes = {"default": dtype, **dict.fromkeys(_EXACT, torch.float32)}
                pipe = super().from_pretrained(folder, dtype=dtypes, use_safetensors=True, **{**parts, **kwargs})
            for name, network in pipe._networks().items():
                lost = next((key for key, value in network.state_dict().items() if value.is_meta), None)
                if lost is not None:
                    raise ValueError(f"the weights of {name} are incomplete, {lost!r} is missing; fetch them again")
            pipe.presets, pipe.init_model = load_presets(folder), restorer
            pipe.text_folder = None if found is None else found.text_folder
            pipe._let_inns_compute_in(dtype)
            pipe._check_latent_inn()
            if pipe._build_prior().capabilities.token_width is not None:
                beside = folder if prior is None else Path(prior)
                # A saved pipeline may serve as a prior. Where text encoders lie beside it, they know all prompts.
                source = folder if prior is None else None if Path(prior).is_file() else model_folder(prior, **access)
                saved = None if source is None or pipe.text_folder is not None else Prompter.from_saved(source)
                pipe.prompter = saved or Prompter.from_prior(pipe.text_folder or beside, dtype)
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise ModelLoadError(f"model {str(model)!r} could not be loaded: {error}") from error
        return pipe if device is None else pipe.to(device)

    @classmethod
    def from_pipe(cls: type[Pipe], pipeline: Any, **kwargs: Any) -> Pipe:
        """A pipeline that shares the networks and presets of another; nothing is loaded or copied.

        Args:
            pipeline: A `RestorationPipeline`.
            **kwargs: Parts in place of its own, by name.

        Returns:
            The new pipeline.
        """
        made = cls(**{**pipeline.components, **kwargs})
        made.presets = dict(pipeline.presets)
        for name in ("conditioning", "text_folder", "prompter", "init_model"):
            setattr(made, name, getattr(pipeline, name))
        return made

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  (its flags pass through **kwargs)
        self,
        save_directory: str | os.PathLike[str],
        *,
        card: CardFacts | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save all parts, safetensors in shards of at most 15 MB, presets, embeddings of prompts, and a model card.

        Args:
            save_directory: Folder, made if missing.
            card: What the card says beside the facts of the networks. With None a card that lies there is kept.
            push_to_hub: Upload the folder to the hub as well, see `push_to_hub` for what follows.
            repo_id: Its name there, by default the folder's.
            commit_message: Title of the upload.
            private: Whether only you see it; None = as your account is set.
            token: Access token; None = the one that `hf auth login` stored.
            create_pr: Propose the files instead of putting them there.
            **kwargs: Passed to diffusers.

        Raises:
            ValueError: Asked for pickled weights, or weights that sequential offload holds.
            ConnectionError: If the hub cannot be reached or refuses.
        """
        if not kwargs.get("safe_serialization", True):
            raise ValueError("weights are saved as safetensors only, got safe_serialization=False; leave it out")
        if any(parameter.is_meta for network in self._networks().values() for parameter in network.parameters()):
            raise ValueError("sequential offload holds the weights; call remove_all_hooks() on the pipeline, then save")
        folder = Path(save_directory)
        super().save_pretrained(folder, **{"max_shard_size": "15MB", **kwargs})
        save_presets(self.presets, folder)
        if self.prompter is not None:
            self.prompter.save(folder)
        if card is not None or not (folder / "README.md").exists():
            write_model_card(folder, self._networks(), self.weights_hash(), card or CardFacts())
        if push_to_hub:
            name = repo_id or folder.resolve().name
            upload_folder(folder, name, message=commit_message, private=private, token=token, create_pr=create_pr)

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]  (diffusers' card asks the hub and a template)
        self, repo_id: str, *, card: CardFacts | None = None, **kwargs: Any
    ) -> None:
        """Save to a temporary folder and upload it, with its model card: `from_pretrained(repo_id)` then loads it.

        Args:
            repo_id: Name on the hub, "user/repo"; made if missing.
            card: What the card says beside the facts of the networks.
            **kwargs: `commit_message`, `private`, `token` and `create_pr` as `save_pretrained` has them.

        Raises:
            ConnectionError: If the hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=card, push_to_hub=True, repo_id=repo_id, **kwargs)

    def to(self: Pipe, *args: Any, **kwargs: Any) -> Pipe:
        """Move to a device, change the dtype, or both; as in `from_pretrained`, what must be exact stays float32.

        Args:
            *args: A device, a dtype, or both.
            **kwargs: Passed to diffusers.

        Returns:
            Itself.
        """
        given = (*args, kwargs.get("dtype"), kwargs.get("torch_dtype"))
        dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
        if dtype is None or dtype not in (torch.float16, torch.bfloat16):
            super().to(*args, **kwargs)
        else:
            named = {name: value for name, value in kwargs.items() if value is not dtype}
            super().to(*(value for value in args if value is not dtype), **named)
            for name, network in self._networks().items():
                if name not in _EXACT:
                    network.to(dtype=dtype)
        if dtype is not None:
            self._let_inns_compute_in(dtype)
        return self

    def _let_inns_compute_in(self, dtype: torch.dtype) -> None:
        for inn in (self.pixel_inn, self.latent_inn):
            if inn is not None:
                inn.compute_in(dtype if dtype == torch.bfloat16 else inn.dtype)

    # --------------------------------------------------------------------------------------------------------- memory

    def enable_vae_tiling(self) -> None:
        """Let the autoencoder work tile by tile, where it can by itself; the argument `tile` of a call always can."""
        self._switch_vae("enable_tiling")

    def disable_vae_tiling(self) -> None:
        """Undo `enable_vae_tiling`."""
        self._switch_vae("disable_tiling")

    def enable_vae_slicing(self) -> None:
        """Let the autoencoder work image by image in a batch, where it can."""
        self._switch_vae("enable_slicing")

    def disable_vae_slicing(self) -> None:
        """Undo `enable_vae_slicing`."""
        self._switch_vae("disable_slicing")

    def _switch_vae(self, name: str) -> None:
        if hasattr(self.vae, name):
            getattr(self.vae, name)()
        elif name.startswith("enable"):
            kind = type(self.vae).__name__
            warnings.warn(f"{kind} has no {name}; call with tile=512 to save memory instead", stacklevel=3)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention in slices, for less memory and more time; see diffusers.

        Args:
            slice_size: "auto" (two slices), "max", a number of heads, or None to undo it.
        """
        sliced = [network for network in self._networks().values() if hasattr(network, "set_attention_slice")]
        attends = any(hasattr(part, "set_processor") for network in sliced for part in network.modules())
        if slice_size is not None and not attends:
            warnings.warn(
                "no network of this model has attention to slice; call with tile=512 to save memory", stacklevel=2
            )
            return
        self.set_attention_slice(slice_size)  # pyright: ignore[reportArgumentType]  (its hint is narrower than it is)

    @property
    def prior(self) -> LatentPrior:
        """The latent diffusion model as five verbs; built anew from the registered parts."""
        return self._build_prior()

    def _build_prior(
        self, conditioning: Conditioning | None = None, scheduler: SchedulerKind | str = "model"
    ) -> LatentPrior:
        return LatentPrior(
            self.vae,
            self.denoiser,
            make_scheduler(scheduler, self.scheduler),
            conditioning=conditioning or self.conditioning,
            guidance_vae=self.guidance_vae,
        )

    def _check_latent_inn(self) -> None:
        """Refuse a latent INN of another autoencoder or of another degradation encoder."""
        if self.latent_inn is None:
            return
        channels, gamma_dim = self._build_prior().latent_channels, self.degradation_encoder.config["gamma_dim"]
        for name, expected in (("channels", channels), ("gamma_dim", gamma_dim)):
            got = self.latent_inn.config[name]
            if got != expected:
                raise ValueError(
                    f"expected a latent INN with {name}={expected}, which this model's autoencoder and degradation "
                    f"encoder ask for, got {got}; train one with `latentindigo train latent-inn --prior`"
                )

    def _networks(self) -> dict[str, torch.nn.Module]:
        return {n: c for n, c in self.components.items() if isinstance(c, torch.nn.Module)}

    def compile_networks(self: Pipe) -> Pipe:
        """Compile the large networks by `torch.compile`, see `latentindigo.tuning`.

        On an accelerator it pays for many images of one size. On a CPU convolutions take the time, and they stay what
        they are: measured, nothing is gained.

        Returns:
            Itself.
        """
        names = ("denoiser", "vae", "estimator")
        compile_networks(network for name, network in self._networks().items() if name in names)
        return self

    def enable_checkpointing(self: Pipe) -> Pipe:
        """Keep less of the networks for the gradients of "stopped" and "through", see `latentindigo.tuning`.

        Returns:
            Itself.
        """
        checkpoint_networks(self._networks().values())
        return self

    def weights_hash(self) -> str:
        """SHA-256 over names and values of all weights, as hexadecimal text; any change of a weight changes it."""
        digest = hashlib.sha256()
        for name, network in sorted(self._networks().items()):
            for key, value in sorted(weights_of(network).items()):
                digest.update(f"{name}.{key}:{value.dtype}:{tuple(value.shape)}".encode())
                # In the order of its indices, however it lies in memory.
                plain = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1))
                digest.update(plain.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide diffusers' progress bar: seven small files load in an instant and the bar only litters logs."""
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()
