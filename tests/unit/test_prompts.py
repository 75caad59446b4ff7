"""Prompts: the embeddings of diffusers' own pipelines, encoders that are gone, caches, saved prompts, and defaults."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import shutil
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentindigo import prompts
from latentindigo.conditioning import PromptEmbeddings
from latentindigo.prompts import PROMPTS_FILE, Prompter, text_family
from text_families import write_text_encoders

FAMILIES = ("sd", "sdxl", "sd3", "sd3 without T5", "flux")
POSITIVE, NEGATIVE = "a sharp photo, natural detail", "blurry, noise"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Text encoders of every family."""
    root = tmp_path_factory.mktemp("families")
    return {name: write_text_encoders(root / name, name.split()[0], t5="without" not in name) for name in FAMILIES}


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    """Every test starts with no prompt kept."""
    prompts._CACHE.clear()
    yield
    prompts._CACHE.clear()


# --- the embeddings of diffusers -------------------------------------------------------------------------------------


def reference(name: str, folder: Path, negative: str | None = NEGATIVE) -> dict[str, Tensor | None]:
    """What the family's own pipeline of diffusers makes of the two prompts."""
    import diffusers
    import transformers

    parts: dict[str, Any] = {}
    none: Any = None  # What a prompt does not need.
    for number in ("", "_2", "_3"):
        encoder, tokenizer = folder / f"text_encoder{number}", folder / f"tokenizer{number}"
        if encoder.is_dir():
            kind = json.loads((encoder / "config.json").read_text())["architectures"][0]
            reader: Any = getattr(transformers, "T5TokenizerFast" if kind.startswith("T5") else "CLIPTokenizer")
            parts |= {
                f"text_encoder{number}": getattr(transformers, kind).from_pretrained(encoder),
                f"tokenizer{number}": reader.from_pretrained(tokenizer),
            }
    family = name.split()[0]
    if family == "sd":
        pipe: Any = diffusers.StableDiffusionPipeline(
            vae=none, unet=none, scheduler=none, safety_checker=none, feature_extractor=none,
            requires_safety_checker=False, **parts,
        )  # fmt: skip
        made = pipe.encode_prompt(POSITIVE, "cpu", 1, True, negative_prompt=negative)
        return {"tokens": made[0], "negative": made[1], "pooled": None, "negative_pooled": None}
    if family == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(vae=none, unet=none, scheduler=none, add_watermarker=False, **parts)
        made = pipe.encode_prompt(POSITIVE, device="cpu", negative_prompt=negative)
    elif family == "sd3":
        parts = {"text_encoder_3": None, "tokenizer_3": None, **parts}
        pipe = diffusers.StableDiffusion3Pipeline(transformer=none, vae=none, scheduler=none, **parts)
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=16))
        made = pipe.encode_prompt(POSITIVE, None, None, device="cpu", negative_prompt=negative)
    else:
        pipe = diffusers.FluxPipeline(transformer=none, vae=none, scheduler=none, **parts)
        one, other = (pipe.encode_prompt(text, device="cpu") for text in (POSITIVE, negative))
        return {"tokens": one[0], "pooled": one[1], "negative": other[0], "negative_pooled": other[1]}
    return dict(zip(("tokens", "negative", "pooled", "negative_pooled"), made, strict=True))


def same(mine: Tensor | None, theirs: Tensor | None) -> bool:
    return theirs is None if mine is None else theirs is not None and torch.equal(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_are_those_of_the_familys_own_pipeline(name: str, folders: dict[str, Path]) -> None:
    theirs = reference(name, folders[name])
    positive, negative = Prompter.from_prior(folders[name]).embed([POSITIVE, NEGATIVE])
    assert same(positive.tokens, theirs["tokens"])
    assert same(positive.pooled, theirs["pooled"])
    assert same(negative.tokens, theirs["negative"])
    assert same(negative.pooled, theirs["negative_pooled"])
    assert float((positive.tokens - negative.tokens).abs().max()) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("zero", [True, False])
def test_an_empty_negative_prompt_is_zero_where_the_model_was_trained_so(zero: bool, tmp_path: Path) -> None:
    folder = write_text_encoders(tmp_path, "sdxl")
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": zero}
    (folder / "model_index.json").write_text(json.dumps(index))
    prompter = Prompter.from_prior(folder)
    told = prompter.conditioning(prompter.choose(POSITIVE, "", 5.0))
    assert told.negative is not None
    assert told.negative.pooled is not None
    expected = reference("sdxl", folder, None if zero else "")
    assert torch.equal(told.negative.tokens, expected["negative"])  # pyright: ignore[reportArgumentType]
    assert torch.equal(told.negative.pooled, expected["negative_pooled"])  # pyright: ignore[reportArgumentType]
    assert bool(told.negative.tokens.any()) is not zero
    # The empty prompt itself is read.
    assert bool(prompter.conditioning(prompter.choose("")).positive.tokens.any())


def test_flux_schnell_reads_256_tokens(tmp_path: Path) -> None:
    folder = write_text_encoders(tmp_path, "flux")
    (folder / "transformer" / "config.json").write_text(json.dumps({"guidance_embeds": False}))
    assert Prompter.from_prior(folder).embed([POSITIVE])[0].tokens.shape[1] == 256


def test_half_precision_encoders_give_half_precision(folders: dict[str, Path]) -> None:
    (prompt,) = Prompter.from_prior(folders["sd3"], torch.bfloat16).embed([POSITIVE])
    assert prompt.pooled is not None
    assert (prompt.tokens.dtype, prompt.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    (full,) = Prompter.from_prior(folders["sd3"]).embed([POSITIVE])
    assert 0 < float((prompt.tokens - full.tokens).abs().mean()) < 0.05 * float(full.tokens.abs().mean())


def test_a_prompt_that_is_too_long_is_cut_off_and_said_so(folders: dict[str, Path]) -> None:
    prompter = Prompter.from_prior(folders["sd"])
    with pytest.warns(UserWarning, match="the prompt is cut off: text_encoder reads 77 tokens of 'x x x"):
        long, longer = prompter.embed(["x " * 90, "x " * 99])
    assert torch.equal(long.tokens, longer.tokens)


# --- encoders are loaded one at a time, freed, and asked once --------------------------------------------------------


@dataclasses.dataclass
class Watch:
    """Every text encoder that was loaded, and how many earlier ones were alive at that time."""

    loaded: list[weakref.ref[Any]] = dataclasses.field(default_factory=list)
    beside: list[int] = dataclasses.field(default_factory=list)

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self.loaded)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    import transformers

    seen = Watch()
    for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"):
        kind = getattr(transformers, name)
        load = kind.from_pretrained

        def from_pretrained(*args: Any, _load: Any = load, **keywords: Any) -> Any:
            seen.beside.append(sum(ref() is not None for ref in seen.loaded))
            encoder = _load(*args, **keywords)
            seen.loaded.append(weakref.ref(encoder))
            return encoder

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_no_encoder_survives_and_no_two_are_alive(name: str, folders: dict[str, Path], watch: Watch) -> None:
    prompter = Prompter.from_prior(folders[name])
    told = prompter.conditioning(prompter.choose(POSITIVE, guidance_scale=3.0))
    assert len(watch.loaded) == {"sd": 1, "sdxl": 2, "sd3": 3, "sd3 without T5": 2, "flux": 2}[name]
    assert watch.beside == [0] * len(watch.loaded)
    assert watch.alive == 0
    assert told.positive.tokens.isfinite().all()


def test_an_encoder_is_freed_when_it_fails(
    folders: dict[str, Path], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(out: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(prompts, "_last_but_one", fails)
    with pytest.raises(RuntimeError, match="planted"):
        Prompter.from_prior(folders["sdxl"]).embed([POSITIVE])
    gc.collect()  # pytest's own frames form a cycle with the traceback.
    assert (len(watch.loaded), watch.alive) == (1, 0)


def test_an_encoder_that_does_not_fit_runs_on_the_cpu(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, devices = prompts._encode_texts, []

    def small(*args: Any) -> Any:
        devices.append(args[5].type)
        if devices[-1] != "cpu":
            raise torch.OutOfMemoryError
        return encode(*args)

    monkeypatch.setattr(prompts, "_encode_texts", small)
    with pytest.warns(UserWarning, match="text_encoder does not fit into the memory of meta; it runs on the CPU"):
        (prompt,) = Prompter.from_prior(folders["sd"]).embed([POSITIVE], "meta")
    assert (devices, prompt.tokens.device.type) == (["meta", "cpu"], "cpu")


def test_a_kept_encoder_would_be_seen(folders: dict[str, Path], watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    encode = prompts._encode_texts

    def keeps(encoder_folder: Path, *rest: Any) -> Any:
        import transformers

        kept.append(transformers.CLIPTextModel.from_pretrained(encoder_folder))
        return encode(encoder_folder, *rest)

    monkeypatch.setattr(prompts, "_encode_texts", keeps)
    Prompter.from_prior(folders["sd"]).embed([POSITIVE])
    assert watch.alive == 1
    assert watch.beside == [0, 1]


def test_prompts_are_read_once_in_a_process_until_the_files_change(
    folders: dict[str, Path], watch: Watch, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["sd"], tmp_path / "copy")
    first = Prompter.from_prior(folder).embed([POSITIVE, NEGATIVE])
    again = Prompter.from_prior(folder).embed([NEGATIVE, POSITIVE])
    assert len(watch.loaded) == 1
    assert torch.equal(first[0].tokens, again[1].tokens)
    Prompter.from_prior(folder).embed([POSITIVE, "another"])
    assert len(watch.loaded) == 2
    os.utime(folder / "text_encoder" / "model.safetensors", ns=(1, 1))
    Prompter.from_prior(folder).embed([POSITIVE])
    assert len(watch.loaded) == 3
    Prompter.from_prior(folder, torch.bfloat16).embed([POSITIVE])
    assert len(watch.loaded) == 4


def test_only_the_latest_prompts_are_kept(folders: dict[str, Path]) -> None:
    Prompter.from_prior(folders["sd"]).embed([f"x {k}" for k in range(prompts.KEPT + 3)])
    assert [text for _, text in prompts._CACHE] == [f"x {k}" for k in range(3, prompts.KEPT + 3)]


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_a_prior_without_text_encoders_says_so_and_takes_embeddings(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    assert text_family(tmp_path) is None
    prompter = Prompter.from_prior(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"expected the folders text_encoder and tokenizer in .*add them, or give emb"
    ):
        prompter.conditioning(prompter.choose())
    mine = PromptEmbeddings(torch.ones(1, 7, 16))
    told = prompter.conditioning(prompter.choose(mine, mine, 2.0))
    assert told.positive is told.negative is mine


def test_missing_transformers_are_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "transformers" else find(n, *a))
    with pytest.raises(ImportError, match=r"pip install latentindigo\[text\]"):
        Prompter.from_prior(folders["sd"]).embed([POSITIVE])


def test_pickled_encoders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd"], tmp_path / "pickled")
    from safetensors.torch import load_file

    weights = load_file(folder / "text_encoder" / "model.safetensors")
    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save(weights, folder / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"expected safetensors weights in pickled/text_encoder, found none"):
        Prompter.from_prior(folder).embed([POSITIVE])


@pytest.mark.parametrize("defect", ["unknown encoder", "no second encoder", "no tokenizer"])
def test_text_encoders_of_no_known_family_are_refused(defect: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sdxl"], tmp_path / "odd")
    message = "expected text encoders of a known family .*; give embeddings of your own"
    if defect == "unknown encoder":
        (folder / "text_encoder" / "config.json").write_text(json.dumps({"architectures": ["GemmaModel"]}))
    elif defect == "no second encoder":
        shutil.move(folder / "text_encoder_2", folder / "text_encoder_3")
    else:
        shutil.rmtree(folder / "tokenizer_2")
        message = "expected a folder tokenizer_2 in 'odd', found none"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Prompter.from_prior(folder).embed([POSITIVE])


# --- saved prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_saved_prompts_need_no_encoder(name: str, folders: dict[str, Path], tmp_path: Path, watch: Watch) -> None:
    before = Prompter.from_prior(folders[name])
    told = before.conditioning(before.choose(POSITIVE, guidance_scale=3.0))
    before.save(tmp_path / "saved")
    prompts._CACHE.clear()
    loaded = len(watch.loaded)
    after = Prompter.from_saved(tmp_path / "saved")
    assert after is not None
    assert after._traits == before._traits
    again = after.conditioning(after.choose(POSITIVE, guidance_scale=3.0))
    assert same(again.positive.tokens, told.positive.tokens)
    assert same(again.positive.pooled, told.positive.pooled)
    assert (again.negative is None) is (told.negative is None) is (name == "flux")
    for words in (None, ""):  # The defaults and the empty prompt come along unasked.
        after.conditioning(after.choose(words))
    assert len(watch.loaded) == loaded
    with pytest.raises(FileNotFoundError, match=r"found none beside this model \(it holds the prompts: .*'a sharp"):
        after.embed(["never seen"])


def test_nothing_is_saved_where_nothing_can_be_read(tmp_path: Path) -> None:
    Prompter.from_prior(tmp_path).save(tmp_path / "saved")
    assert Prompter.from_saved(tmp_path / "saved") is None


def test_a_broken_prompt_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / PROMPTS_FILE, metadata={"prompts": '{"texts": ["a"], "traits": {}}'})
    with pytest.raises(ValueError, match=r"prompts.safetensors does not hold prompts .*save the pipeline again"):
        Prompter.from_saved(tmp_path)


# --- defaults --------------------------------------------------------------------------------------------------------


def test_defaults_ask_for_a_sharp_photograph() -> None:
    choice = Prompter(None).choose()
    assert choice.prompt == "a sharp, detailed photograph, natural texture"
    assert choice.negative_prompt == "blurry, noisy, compression artefacts, oversmoothed"
    assert 3 <= choice.guidance_scale <= 5


def test_the_empty_prompt_is_without_guidance_unless_it_is_asked_for() -> None:
    prompter = Prompter(None)
    plain = prompter.choose("")
    assert (plain.prompt, plain.negative_prompt, plain.guidance_scale) == ("", None, 1.0)
    assert prompter.choose("", guidance_scale=3.0).negative_prompt == prompter.defaults.negative
    assert prompter.choose("", "grey").guidance_scale == prompter.defaults.guidance_scale


def test_what_was_chosen_chooses_itself(folders: dict[str, Path]) -> None:
    for prompter in (Prompter(None), Prompter.from_prior(folders["flux"])):
        asked: list[dict[str, Any]] = [
            {},
            {"prompt": ""},
            {"prompt": "a", "guidance_scale": 2.0},
            {"guidance_scale": 1.0},
        ]
        for given in asked:
            choice = prompter.choose(**given)
            assert prompter.choose(choice.prompt, choice.negative_prompt, choice.guidance_scale) == choice


@pytest.mark.parametrize(
    ("name", "scheduler", "few"),
    [
        ("sd-v1-5", {"_class_name": "PNDMScheduler"}, False),
        ("sdxl", {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, False),
        ("mine", {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, True),
        ("mine", {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, True),
        ("mine", {"_class_name": "LCMScheduler"}, True),
        ("sd3.5-large-turbo", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, True),
        ("lcm-with-scale", {"_class_name": "LCMScheduler", "time_cond_proj_dim": 8}, None),
        ("models--black-forest-labs--FLUX.1-schnell/snapshots/0a1b", {}, True),
    ],
)
def test_networks_for_few_steps_are_not_guided_by_default(
    name: str, scheduler: dict[str, Any], few: bool | None, tmp_path: Path
) -> None:
    folder = tmp_path / name
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(
        json.dumps({"time_cond_proj_dim": scheduler.get("time_cond_proj_dim")})
    )
    choice = Prompter.from_prior(folder).choose()
    # None: the scale is an input of the network.
    assert (choice.guidance_scale == 1.0) is bool(few)
    assert (choice.negative_prompt is None) is (few is not False)


def test_a_scheduler_for_few_steps_turns_guidance_off() -> None:
    assert Prompter(None).choose(few_steps=True).guidance_scale == 1.0


def test_an_embedded_scale_knows_no_negative_prompt(folders: dict[str, Path]) -> None:
    prompter = Prompter.from_prior(folders["flux"])
    assert (prompter.choose().negative_prompt, prompter.choose("").guidance_scale) == (None, 3.5)
    with pytest.raises(ValueError, match="this network takes no negative prompt.*; leave it out"):
        prompter.choose(negative_prompt="blurry")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_scale": 0.5}, r"guidance_scale: expected at least 1 .*, got 0.5"),
        ({"guidance_scale": float("nan")}, r"guidance_scale: expected at least 1"),
        ({"negative_prompt": "x", "guidance_scale": 1.0}, r"at 1 it is ignored\); leave it out or give a larger scale"),
    ],
)
def test_prompts_without_effect_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompter(None).choose(**given)


def test_choosing_needs_no_transformers(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for folder in folders.values():
        Prompter.from_prior(folder).choose()
