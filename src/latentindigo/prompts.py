"""Prompts of a text-conditioned prior: from words to embeddings, with text encoders that are gone afterwards.

A prior in diffusers' layout brings its text encoders and tokenizers as folders. They are loaded one at a time, run once
for each prompt, and freed before sampling begins. What they gave is kept: in the process, keyed by the files that made
it, and in `prompts.safetensors` of a saved pipeline, which needs no text encoder for the prompts it holds.

| family | folders | tokens | pooled |
| --- | --- | --- | --- |
| sd | text_encoder: CLIP | its last hidden states | none |
| sdxl | text_encoder: CLIP, text_encoder_2: CLIP with projection | last but one of both, side by side | of the second |
| sd3 | text_encoder, _2: CLIP with projection, text_encoder_3: T5 or none | last but one of both, then T5 | of both |
| flux | text_encoder: CLIP, text_encoder_2: T5 | T5 | of CLIP, without projection |

transformers is imported when a text encoder runs and not before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import json
import math
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentindigo.conditioning import Conditioning, PromptEmbeddings

__all__ = ["PROMPTS_FILE", "PromptChoice", "PromptDefaults", "PromptTraits", "Prompter", "TextFamily", "text_family"]

TextFamily = Literal["sd", "sdxl", "sd3", "flux"]

PROMPTS_FILE = "prompts.safetensors"
KEPT = 16  # Prompts kept in the process; those of FLUX take 4 MB each.
T5_TOKENS = 256  # Of SD3 and FLUX.1-schnell.
FLUX_TOKENS = 512  # Of FLUX.1-dev.

_CLIP, _PROJECTED, _T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_FAMILIES: dict[tuple[str, ...], TextFamily] = {
    (_CLIP,): "sd",
    (_CLIP, _PROJECTED): "sdxl",
    (_PROJECTED, _PROJECTED): "sd3",
    (_PROJECTED, _PROJECTED, _T5): "sd3",
    (_CLIP, _T5): "flux",
}
_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# Parts of names by which models for few steps are published; their scheduler does not always tell.
_FEW_STEP_NAMES = ("turbo", "lightning", "lcm", "schnell", "hyper-sd")


@dataclass(frozen=True)
class PromptDefaults:
    """What is asked of a prior when the user asks nothing. Data, not code.

    Attributes:
        positive: The prompt.
        negative: What classifier-free guidance moves away from.
        guidance_scale: Its strength; 1 = the prompt alone, one network pass per step.
    """

    positive: str = "a sharp, detailed photograph, natural texture"
    negative: str = "blurry, noisy, compression artefacts, oversmoothed"
    guidance_scale: float = 4.0


# Networks distilled for few steps have swallowed their guidance; others take the scale as an input.
_FEW_STEPS = PromptDefaults(guidance_scale=1.0)
_EMBEDDED_SCALE = PromptDefaults(guidance_scale=3.5)


@dataclass(frozen=True)
class PromptChoice:
    """The prompts of one restoration, all defaults filled in; given back, it chooses itself.

    Attributes:
        prompt: Words, or embeddings of the user's own.
        negative_prompt: Likewise; None = no classifier-free guidance.
        guidance_scale: At least 1.
    """

    prompt: str | PromptEmbeddings
    negative_prompt: str | PromptEmbeddings | None
    guidance_scale: float


@dataclass(frozen=True)
class PromptTraits:
    """What is special about the prompts of one prior; written into a saved pipeline.

    Attributes:
        defaults: What is asked where the user asks nothing.
        zero_negative: Whether an empty negative prompt means embeddings of zero (SDXL).
        embedded_scale: Whether the network takes the guidance scale as an input and knows no negative prompt
            (FLUX.1-dev, LCM).
    """

    defaults: PromptDefaults = PromptDefaults()
    zero_negative: bool = False
    embedded_scale: bool = False


def text_family(folder: Path) -> TextFamily | None:
    """Which text encoders a prior has.

    Args:
        folder: Folder of the prior.

    Returns:
        The family, None where there is no folder `text_encoder`.

    Raises:
        ValueError: If the text encoders are of no known family, or not described.
    """
    present = [folder / name for name in _FOLDERS if (folder / name).is_dir()]
    if not present:
        return None
    kinds = tuple(_json(path / "config.json").get("architectures", ["no class"])[0] for path in present)
    if kinds not in _FAMILIES or [path.name for path in present] != list(_FOLDERS[: len(kinds)]):
        known = "; ".join(" + ".join(kinds) for kinds in _FAMILIES)
        raise ValueError(
            f"expected text encoders of a known family ({known}), got {' + '.join(kinds)} in {folder.name!r}; give "
            "embeddings of your own: prompt=PromptEmbeddings(tokens, pooled)"
        )
    return _FAMILIES[kinds]


class Prompter:
    """The prompts of one prior: fills in defaults, and turns words into embeddings.

    It holds embeddings and no text encoder. Two threads may share it.
    """

    def __init__(
        self,
        folder: Path | None,
        dtype: torch.dtype = torch.float32,
        *,
        traits: PromptTraits | None = None,
        known: dict[str, PromptEmbeddings] | None = None,
    ) -> None:
        """Describe the prompts of a prior; loads no weights. See `from_prior` and `from_saved`.

        Args:
            folder: Folder of the prior with its text encoders, or None where only `known` prompts can be had.
            dtype: Dtype that the text encoders compute in.
            traits: What is special about the prior.
            known: Embeddings by prompt.
        """
        self._folder = folder
        self._dtype = dtype
        self._traits = traits or PromptTraits()
        self._known = dict(known or {})

    @property
    def defaults(self) -> PromptDefaults:
        """What is asked where the user asks nothing."""
        return self._traits.defaults

    @classmethod
    def from_prior(cls, folder: Path, dtype: torch.dtype = torch.float32) -> Prompter:
        """Prompts of a prior in diffusers' layout, with the defaults that suit it.

        Args:
            folder: Folder of the prior; its text encoders may be missing until words are to be embedded.
            dtype: Dtype that the text encoders compute in.

        Returns:
            The prompter; no weights are read.
        """
        index, scheduler = _json(folder / "model_index.json"), _json(folder / "scheduler" / "scheduler_config.json")
        network = _denoiser_config(folder)
        embedded_scale = bool(network.get("guidance_embeds")) or network.get("time_cond_proj_dim") is not None
        kind = scheduler.get("_class_name", "")
        # A hub snapshot is named by its commit, the folder above by the model.
        above = folder.absolute().parent
        model = above.parent.name if above.name == "snapshots" else ""
        names = f"{folder.name} {model} {index.get('_name_or_path', '')}".lower()
        few_steps = (
            any(part in names for part in _FEW_STEP_NAMES)
            or kind == "LCMScheduler"
            or (kind.startswith("Euler") and scheduler.get("timestep_spacing") == "trailing")
        )
        defaults = _EMBEDDED_SCALE if embedded_scale else _FEW_STEPS if few_steps else PromptDefaults()
        zero_negative = bool(index.get("force_zeros_for_empty_prompt", "XL" in index.get("_class_name", "")))
        return cls(folder, dtype, traits=PromptTraits(defaults, zero_negative, embedded_scale))

    @classmethod
    def from_saved(cls, folder: Path) -> Prompter | None:
        """Prompts of a saved pipeline.

        Args:
            folder: Folder of the pipeline.

        Returns:
            The prompter, None where the folder holds no `prompts.safetensors`.

        Raises:
            ValueError: If the file does not hold prompts.
        """
        path = folder / PROMPTS_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["prompts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            known = {
                text: PromptEmbeddings(tensors[f"{k}.tokens"], tensors.get(f"{k}.pooled"))
                for k, text in enumerate(about["texts"])
            }
            traits = dict(about["traits"])
            traits["defaults"] = PromptDefaults(**traits["defaults"])
            return cls(None, traits=PromptTraits(**traits), known=known)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold prompts ({error}); save the pipeline again") from error

    def save(self, folder: Path) -> None:
        """Write the defaults' embeddings, the empty prompt's and all that were used, so that no text encoder is needed.

        Args:
            folder: Folder of a saved pipeline; nothing is written where no prompt can be embedded.
        """
        wanted = dict.fromkeys((self.defaults.positive, "", *self._known))
        if not self._traits.embedded_scale:
            wanted[self.defaults.negative] = None
        with contextlib.suppress(OSError, ImportError, ValueError):
            self.embed(list(wanted))
        if not self._known:
            (folder / PROMPTS_FILE).unlink(missing_ok=True)  # Of a model that lay here before.
            return
        tensors: dict[str, Tensor] = {}
        for k, prompt in enumerate(self._known.values()):
            tensors[f"{k}.tokens"] = prompt.tokens.contiguous()
            if prompt.pooled is not None:
                tensors[f"{k}.pooled"] = prompt.pooled.contiguous()
        about = {"texts": list(self._known), "traits": dataclasses.asdict(self._traits)}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / PROMPTS_FILE, metadata={"prompts": json.dumps(about)})

    def choose(
        self,
        prompt: str | PromptEmbeddings | None = None,
        negative_prompt: str | PromptEmbeddings | None = None,
        guidance_scale: float | None = None,
        *,
        few_steps: bool = False,
    ) -> PromptChoice:
        """Fill in the defaults; embeds nothing.

        Args:
            prompt: None = the default; "" = the empty prompt, without classifier-free guidance unless it is asked for.
            negative_prompt: None = the default.
            guidance_scale: At least 1; None = the default.
            few_steps: Whether the scheduler is one for distilled networks, whose default scale is 1.

        Returns:
            The choice.

        Raises:
            ValueError: If the scale is below 1, or a negative prompt could have no effect.
        """
        scale = guidance_scale
        if scale is None:
            plain = few_steps or (prompt == "" and negative_prompt is None)
            scale = 1.0 if plain and not self._traits.embedded_scale else self.defaults.guidance_scale
        if not (1.0 <= scale < math.inf):
            raise ValueError(f"guidance_scale: expected at least 1 (1 = the prompt alone), got {scale}")
        positive = self.defaults.positive if prompt is None else prompt
        if self._traits.embedded_scale or scale == 1.0:
            if negative_prompt not in (None, ""):
                reason = (
                    "this network takes no negative prompt" if self._traits.embedded_scale else "at 1 it is ignored"
                )
                way_out = "leave it out" if self._traits.embedded_scale else "leave it out or give a larger scale"
                raise ValueError(f"negative_prompt: expected none with guidance_scale={scale:g} ({reason}); {way_out}")
            return PromptChoice(positive, None, float(scale))
        return PromptChoice(
            positive, self.defaults.negative if negative_prompt is None else negative_prompt, float(scale)
        )

    def conditioning(self, choice: PromptChoice, device: torch.device | str = "cpu") -> Conditioning:
        """Embed a choice.

        Args:
            choice: What `choose` returned.
            device: Where text encoders run.

        Returns:
            What the denoiser is told, on the CPU.

        Raises:
            FileNotFoundError: If words are to be embedded and the prior has no text encoders.
            ImportError: If transformers is not installed.
            ValueError: If the text encoders are of no known family.
        """
        negative = choice.negative_prompt
        texts = [text for text in (choice.prompt, negative) if isinstance(text, str)]
        found = dict(zip(texts, self.embed(texts, device), strict=True))
        positive = found[choice.prompt] if isinstance(choice.prompt, str) else choice.prompt
        if isinstance(negative, str):
            zero = negative == "" and self._traits.zero_negative
            negative = _zeros_like(positive) if zero else found[negative]
        return Conditioning(positive, negative, choice.guidance_scale)

    def embed(self, texts: Sequence[str], device: torch.device | str = "cpu") -> list[PromptEmbeddings]:
        """Embeddings of prompts, from what is known or else from the text encoders.

        Args:
            texts: Prompts; what is beyond the encoder's length is cut off with a warning.
            device: Where text encoders run; the CPU where that device has too little memory.

        Returns:
            One embedding for each, on the CPU.

        Raises:
            FileNotFoundError: If there are no text encoders.
            ImportError: If transformers is not installed.
            ValueError: If the text encoders are of no known family.
        """
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._known.update(self._encode(missing, torch.device(device)))
        return [self._known[text] for text in texts]

    def _encode(self, texts: Sequence[str], device: torch.device) -> dict[str, PromptEmbeddings]:
        folder = self._folder
        if folder is None:
            held = ", ".join(repr(text) for text in self._known) or "none"
            raise FileNotFoundError(
                f"expected text encoders to read the prompt {texts[0]!r}, found none beside this model (it holds the "
                f"prompts: {held}); give one of those, embeddings (prompt=PromptEmbeddings(tokens, pooled)), or load "
                "the prior with its text encoders"
            )
        family = text_family(folder)
        if family is None:
            raise FileNotFoundError(
                f"expected the folders text_encoder and tokenizer in {folder.name!r} to read the prompt {texts[0]!r}, "
                "found none; add them, or give embeddings: prompt=PromptEmbeddings(tokens, pooled)"
            )
        if importlib.util.find_spec("transformers") is None:
            raise ImportError("prompts need transformers, which is not installed; pip install latentindigo[text]")
        files = (str(folder.absolute()), _fingerprint(folder), str(self._dtype))
        # One thread at a time: two would load the encoders twice.
        with _LOCK:
            missing = [text for text in texts if (files, text) not in _CACHE]
            if missing:
                made = _run_family(family, folder, missing, self._dtype, device)
                _CACHE.update({(files, text): prompt for text, prompt in zip(missing, made, strict=True)})
            found = {text: _CACHE[files, text] for text in texts}
            for text in texts:
                _CACHE.move_to_end((files, text))
            while len(_CACHE) > KEPT:
                _CACHE.popitem(last=False)
        return found


_CACHE: OrderedDict[tuple[tuple[str, ...], str], PromptEmbeddings] = OrderedDict()
_LOCK = threading.Lock()


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _denoiser_config(folder: Path) -> dict[str, Any]:
    found = (_json(folder / name / "config.json") for name in ("transformer", "unet", "denoiser"))
    return next((config for config in found if config), {})


def _zeros_like(prompt: PromptEmbeddings) -> PromptEmbeddings:
    pooled = None if prompt.pooled is None else torch.zeros_like(prompt.pooled)
    return PromptEmbeddings(torch.zeros_like(prompt.tokens), pooled)


def _fingerprint(folder: Path) -> str:
    """Name, size and time of every file that the embeddings depend on."""
    names = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    files = sorted(path for name in names for path in (folder / name).glob("**/*") if path.is_file())
    stats = [(path, path.stat()) for path in files]
    return "|".join(f"{os.fspath(path.relative_to(folder))}:{s.st_size}:{s.st_mtime_ns}" for path, s in stats)


# --- the families ---------------------------------------------------------------------------------------------------


def _run_family(
    family: TextFamily, folder: Path, texts: Sequence[str], dtype: torch.dtype, device: torch.device
) -> list[PromptEmbeddings]:
    """Embed prompts as the pipelines of diffusers do, one encoder in memory at a time."""

    def run(number: int, read: Callable[[Any], tuple[Tensor, ...]], tokens: int | None = None) -> list[Any]:
        return _run_encoder(folder, number, texts, read, dtype, device, tokens)

    if family == "sd":
        return [PromptEmbeddings(tokens) for (tokens,) in run(1, lambda out: (out[0],))]
    if family == "sdxl":
        first, second = run(1, _last_but_one), run(2, _last_but_one)
        return [
            PromptEmbeddings(torch.cat((a, b), -1), pooled) for (a, _), (b, pooled) in zip(first, second, strict=True)
        ]
    if family == "flux":
        pooled = run(1, lambda out: (out.pooler_output,))
        long = _denoiser_config(folder).get("guidance_embeds", False)
        tokens = run(2, lambda out: (out[0],), FLUX_TOKENS if long else T5_TOKENS)
        return [PromptEmbeddings(*t, *p) for t, p in zip(tokens, pooled, strict=True)]
    first, second = run(1, _last_but_one), run(2, _last_but_one)
    if (folder / _FOLDERS[2]).is_dir():
        third = [tokens for (tokens,) in run(3, lambda out: (out[0],), T5_TOKENS)]
    else:
        width = int(_denoiser_config(folder).get("joint_attention_dim", 4096))
        third = [torch.zeros(1, T5_TOKENS, width, dtype=dtype)] * len(texts)
    prompts = []
    for (a, pooled_a), (b, pooled_b), t5 in zip(first, second, third, strict=True):
        clip = torch.cat((a, b), -1)
        tokens = torch.cat((F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5), -2)
        prompts.append(PromptEmbeddings(tokens, torch.cat((pooled_a, pooled_b), -1)))
    return prompts


def _last_but_one(out: Any) -> tuple[Tensor, ...]:
    """Last but one hidden states, and the first output: the pooled one where the encoder has a projection."""
    return out.hidden_states[-2], out[0]


def _run_encoder(
    folder: Path,
    number: int,
    texts: Sequence[str],
    read: Callable[[Any], tuple[Tensor, ...]],
    dtype: torch.dtype,
    device: torch.device,
    tokens: int | None,
) -> list[tuple[Tensor, ...]]:
    """Load a tokenizer and a text encoder, run the prompts, and let go of both."""
    suffix = "" if number == 1 else f"_{number}"
    encoder_folder, tokenizer_folder = folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}"
    if not tokenizer_folder.is_dir():
        raise FileNotFoundError(f"expected a folder {tokenizer_folder.name} in {folder.name!r}, found none; add it")
    results = None
    try:
        with _quiet_transformers():
            results, encoder = _encode_texts(encoder_folder, tokenizer_folder, texts, read, dtype, device, tokens)
        if encoder() is not None:
            gc.collect()  # Slow, and needed only where the encoder is part of a cycle.
    except torch.OutOfMemoryError:
        pass  # Outside the handler: its traceback holds on to the encoder.
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if results is not None:
        return results
    gc.collect()
    warnings.warn(f"{encoder_folder.name} does not fit into the memory of {device}; it runs on the CPU", stacklevel=2)
    return _run_encoder(folder, number, texts, read, dtype, torch.device("cpu"), tokens)


@torch.no_grad()
def _encode_texts(
    encoder_folder: Path,
    tokenizer_folder: Path,
    texts: Sequence[str],
    read: Callable[[Any], tuple[Tensor, ...]],
    dtype: torch.dtype,
    device: torch.device,
    tokens: int | None,
) -> tuple[list[tuple[Tensor, ...]], weakref.ref[Any]]:
    """What the encoder says, on the CPU, and a reference that tells whether it is still there."""
    import transformers

    kind = _json(encoder_folder / "config.json")["architectures"][0]
    is_t5 = kind == _T5
    # By name: the module finds its classes when they are asked for.
    tokenizer_class: Any = getattr(transformers, "T5TokenizerFast" if is_t5 else "CLIPTokenizer")
    encoder_class: Any = getattr(transformers, kind)
    try:
        tokenizer = tokenizer_class.from_pretrained(tokenizer_folder)
    except (OSError, ValueError, TypeError) as error:
        raise FileNotFoundError(
            f"expected a tokenizer in {tokenizer_folder.parent.name}/{tokenizer_folder.name}, found none or a part of "
            "one; fetch the folder again, or give embeddings: prompt=PromptEmbeddings(tokens, pooled)"
        ) from error
    plain, half = (any(encoder_folder.glob(f"model{v}.safetensors*")) for v in ("", ".fp16"))
    try:
        encoder = encoder_class.from_pretrained(
            encoder_folder, dtype=dtype, use_safetensors=True, variant="fp16" if half and not plain else None
        )
    except OSError as error:
        raise FileNotFoundError(
            f"expected safetensors weights in {encoder_folder.parent.name}/{encoder_folder.name}, found none (pickle "
            "files are not read, they may run code); save them with safe_serialization=True"
        ) from error
    encoder.eval().to(device)
    length = tokens or min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    results = []
    for text in texts:
        given = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if len(tokenizer(text, verbose=False).input_ids) > length:
            warnings.warn(
                f"the prompt is cut off: {encoder_folder.name} reads {length} tokens of {text[:40]!r}...", stacklevel=2
            )
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = {"attention_mask": given.attention_mask.to(device)} if masked and not is_t5 else {}
        out = encoder(given.input_ids.to(device), output_hidden_states=not is_t5, **mask)
        results.append(tuple(t.to(dtype).cpu() for t in read(out)))
    return results, weakref.ref(encoder)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide progress bars and notes on unused weights while an encoder loads."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
