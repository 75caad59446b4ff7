"""Tiny text encoders and tokenizers of every family, random, written to disk as diffusers' pipelines save them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

__all__ = ["write_text_encoders"]

# Widths of the CLIP encoders and of their projections (0 = none), and of T5: what the denoisers of families.py read.
CLIPS: dict[str, list[tuple[int, int]]] = {
    "sd": [(16, 0)],
    "sdxl": [(8, 0), (8, 12)],
    "sd3": [(6, 6), (6, 6)],
    "flux": [(12, 0)],
}
T5_WIDTH = 16
WORDS = ("sharp", "photo", "blurry", "noise", "detail", "natural")


def _save_clip_tokenizer(folder: Path) -> int:
    """Save a tokenizer of letters; returns the size of its vocabulary."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, ",", "."]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: k for k, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)
    # As the published folders have it, which are older than the file that holds everything.
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return len(tokens)


def _save_t5_tokenizer(folder: Path) -> int:
    import transformers

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    letters = [(letter, -4.0) for letter in [*string.ascii_lowercase, ",", "."]]
    words = [(f"▁{word}", -3.0) for word in WORDS]
    vocabulary: Any = [*special, *letters, *words]
    tokenizer = getattr(transformers, "T5TokenizerFast")(  # noqa: B009  (its type stubs do not name it)
        vocab=vocabulary, extra_ids=0, model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def _save_clip(folder: Path, number: str, seed: int, width: int, projection: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = _save_clip_tokenizer(folder / f"tokenizer{number}")
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection or width,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    torch.manual_seed(seed)
    encoder: Any = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    _spread(encoder)
    encoder.save_pretrained(folder / f"text_encoder{number}")


def _save_t5(folder: Path, number: str, seed: int) -> None:
    from transformers import T5Config, T5EncoderModel

    size = _save_t5_tokenizer(folder / f"tokenizer{number}")
    config = T5Config(vocab_size=size, d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    torch.manual_seed(seed)
    encoder: Any = T5EncoderModel(config)
    _spread(encoder)
    encoder.save_pretrained(folder / f"text_encoder{number}")


@torch.no_grad()
def _spread(encoder: Any) -> None:
    """Random weights large enough that every token and every layer shows in the result."""
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.3)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


def write_text_encoders(folder: Path, family: str, *, t5: bool = True) -> Path:
    """Write the text encoders and tokenizers of a family.

    Args:
        folder: Folder of a prior, made if missing; a denoiser of `families.build` may lie there.
        family: "sd", "sdxl", "sd3" or "flux".
        t5: Whether SD3 has its third encoder.

    Returns:
        The folder, with a `model_index.json` and a `transformer/config.json` as far as prompts need them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for k, (width, projection) in enumerate(CLIPS[family]):
        _save_clip(folder, "" if k == 0 else f"_{k + 1}", k, width, projection)
    if family == "flux":
        _save_t5(folder, "_2", seed=5)
    elif family == "sd3" and t5:
        _save_t5(folder, "_3", seed=5)
    index: dict[str, Any] = {"_class_name": f"{family} pipeline"}
    if family == "sdxl":
        index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    if family in ("sd3", "flux") and not (folder / "transformer").is_dir():
        (folder / "transformer").mkdir()
        config = {"joint_attention_dim": T5_WIDTH} if family == "sd3" else {"guidance_embeds": True}
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder
