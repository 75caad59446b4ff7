"""Text-conditioned priors from folder to picture: prompts, guidance scale, schedulers, saving, and what is refused."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import build
from latentindigo import prompts
from latentindigo.backbones import Backbone
from latentindigo.conditioning import Conditioning, PromptEmbeddings
from latentindigo.pipeline import RestorationPipeline
from text_families import write_text_encoders
from tolerances import assert_close

ENCODERS = {"sd15": "sd", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux"}
FEW: dict[str, Any] = {"output_type": "pt", "steps": 4, "tile": None}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of priors with their text encoders, written once."""
    root, written = tmp_path_factory.mktemp("text-priors"), {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = write_text_encoders(build(name, root / name), ENCODERS[name])
        return written[name]

    return folder


@pytest.fixture(scope="module")
def pipe(folder_of: Callable[[str], Path], tiny_model: Path) -> RestorationPipeline:
    return RestorationPipeline.from_pretrained(tiny_model, prior=folder_of("sd15"))


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    prompts._CACHE.clear()
    yield


def photo() -> Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))


def restored(pipe: RestorationPipeline, **settings: Any) -> Tensor:
    return pipe(photo(), **{**FEW, **settings}).images[0]


@pytest.mark.parametrize("name", ENCODERS)
def test_every_family_restores_with_its_prompts(name: str, folder_of: Callable[[str], Path], tiny_model: Path) -> None:
    pipe = RestorationPipeline.from_pretrained(tiny_model, prior=folder_of(name))
    result = pipe(photo(), **FEW)
    assert result.images[0].isfinite().all()
    assert result.settings["prompt"] == "a sharp, detailed photograph, natural texture"
    assert result.settings["guidance_scale"] == (3.5 if name == "flux" else 4.0)
    assert (result.settings["negative_prompt"] is None) is (name == "flux")
    others = [restored(pipe, prompt="blurry"), restored(pipe, guidance_scale=9.0), restored(pipe, prompt="")]
    assert all(not torch.equal(other, result.images[0]) for other in others)
    settings = {key: value for key, value in result.settings.items() if key not in ("tile", "steps")}
    assert_close(pipe(photo(), **{**FEW, **settings}).images[0], result.images[0])


def test_the_negative_prompt_counts_and_only_with_guidance(pipe: RestorationPipeline) -> None:
    words = {"prompt": "sharp photo"}
    one, other = (restored(pipe, negative_prompt=text, guidance_scale=5.0, **words) for text in ("blurry", "noise"))
    assert not torch.equal(one, other)
    plain = pipe(photo(), guidance_scale=1.0, **words, **FEW)
    assert plain.settings["negative_prompt"] is None
    with pytest.raises(ValueError, match="negative_prompt: expected none with guidance_scale=1"):
        restored(pipe, negative_prompt="blurry", guidance_scale=1.0, **words)


def test_the_empty_prompt_samples_without_guidance_and_without_encoders(
    folder_of: Callable[[str], Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    import transformers

    loaded: list[weakref.ref[Any]] = []
    load = transformers.CLIPTextModel.from_pretrained

    def from_pretrained(*args: Any, **keywords: Any) -> Any:
        encoder = load(*args, **keywords)
        loaded.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", from_pretrained)
    pipe = RestorationPipeline.from_pretrained(tiny_model, prior=folder_of("sd15"))
    assert loaded == []
    batches: list[int] = []
    pipe.denoiser.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    alive: list[bool] = []

    def on_step(*_: Any) -> None:
        alive.append(any(ref() is not None for ref in loaded))

    result = pipe(photo(), prompt="", callback_on_step_end=on_step, **FEW)
    assert (len(loaded), alive) == (1, [False] * 4)
    assert batches == [1] * 4  # One pass per step.
    assert (result.settings["prompt"], result.settings["guidance_scale"]) == ("", 1.0)
    assert not any("text" in name for name in pipe.components)
    batches.clear()
    pipe(photo(), prompt="x", **FEW)
    assert batches == [2] * 4


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "unipc", "euler", "lcm"])
def test_schedulers_by_name_restore_in_few_steps(scheduler: str, pipe: RestorationPipeline) -> None:
    result = pipe(photo(), scheduler=scheduler, **FEW)
    assert result.images[0].isfinite().all()
    assert result.settings["scheduler"] == scheduler
    assert result.settings["guidance_scale"] == (1.0 if scheduler == "lcm" else 4.0)
    assert result.calls["loop"]["denoiser"] == 4
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


def test_what_does_not_fit_flow_matching_is_refused(folder_of: Callable[[str], Path], tiny_model: Path) -> None:
    pipe = RestorationPipeline.from_pretrained(tiny_model, prior=folder_of("sd3"))
    with pytest.raises(ValueError, match="'ddim' has no form for flow matching"):
        restored(pipe, scheduler="ddim")
    assert restored(pipe, scheduler="dpm++").isfinite().all()


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_saved_pipeline_needs_no_text_encoder(
    name: str, folder_of: Callable[[str], Path], tiny_model: Path, tmp_path: Path
) -> None:
    before = RestorationPipeline.from_pretrained(tiny_model, prior=folder_of(name))
    expected = {text: restored(before, prompt=text) for text in (None, "", "sharp photo")}
    before.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("text_encoder*"))
    after = RestorationPipeline.from_pretrained(tmp_path)
    for text, image in expected.items():
        assert_close(restored(after, prompt=text), image)
    with pytest.raises(FileNotFoundError, match="found none beside this model .*'sharp photo'"):
        restored(after, prompt="never seen")


def test_a_saved_pipeline_serves_as_a_prior(
    folder_of: Callable[[str], Path], tiny_model: Path, tmp_path: Path, pipe: RestorationPipeline
) -> None:
    """Its prompts come along; where text encoders lie beside them, any other prompt can be had as well."""
    pipe.save_pretrained(tmp_path / "saved")
    again = RestorationPipeline.from_pretrained(tiny_model, prior=tmp_path / "saved")
    assert_close(restored(again), restored(pipe))
    with pytest.raises(FileNotFoundError, match="found none beside this model"):
        restored(again, prompt="never seen")
    shutil.copytree(folder_of("sd15"), tmp_path / "saved", dirs_exist_ok=True)
    whole = RestorationPipeline.from_pretrained(tiny_model, prior=tmp_path / "saved")
    assert restored(whole, prompt="never seen").isfinite().all()


def test_a_prior_without_encoders_takes_embeddings(
    folder_of: Callable[[str], Path], tiny_model: Path, tmp_path: Path, pipe: RestorationPipeline
) -> None:
    folder = shutil.copytree(folder_of("sd15"), tmp_path / "bare", ignore=shutil.ignore_patterns("text_*", "token*"))
    bare = RestorationPipeline.from_pretrained(tiny_model, prior=folder)
    with pytest.raises(FileNotFoundError, match=r"expected the folders text_encoder and tokenizer in 'bare'"):
        restored(bare)
    assert pipe.prompter is not None
    wanted, unwanted = pipe.prompter.embed(["sharp photo", "blurry"])
    expected = restored(pipe, prompt="sharp photo", negative_prompt="blurry", guidance_scale=3.0)
    assert_close(restored(bare, prompt=wanted, negative_prompt=unwanted, guidance_scale=3.0), expected)
    bare.conditioning = Conditioning(wanted, unwanted, 3.0)
    result = bare(photo(), **FEW)
    assert_close(result.images[0], expected)
    bare.conditioning = None
    told = {key: result.settings[key] for key in ("prompt", "negative_prompt", "guidance_scale")}
    assert isinstance(told["prompt"], PromptEmbeddings)
    assert_close(restored(bare, **told), expected)


@pytest.mark.parametrize("given", [{"prompt": "x"}, {"prompt": ""}, {"negative_prompt": "x"}, {"guidance_scale": 2.0}])
def test_denoisers_without_text_refuse_prompts(given: dict[str, Any], tiny_pipeline: RestorationPipeline) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(given))}: this model's denoiser takes no text; leave it out"):
        tiny_pipeline(photo(), **given)
    assert tiny_pipeline(photo(), steps=1).settings["prompt"] is None


def check_two_threads_are_two_runs(pipe: RestorationPipeline) -> None:
    """Two threads with two prompts on one pipeline give the pictures of two runs in turn."""
    words = ("sharp photo", "blurry noise")
    expected = [restored(pipe, prompt=text) for text in words]
    found: list[Tensor | None] = [None, None]
    # Both have said their prompt before either takes a step.
    gate = threading.Barrier(2)

    def run(k: int) -> None:
        def wait(_: Any, step: int, *__: Any) -> None:
            if step == 0:
                gate.wait(60)

        found[k] = restored(pipe, prompt=words[k], callback_on_step_end=wait)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine is not None and torch.equal(mine, yours) for mine, yours in zip(found, expected, strict=True))


def test_two_threads_with_two_prompts_are_two_runs(pipe: RestorationPipeline) -> None:
    check_two_threads_are_two_runs(pipe)


def test_a_prompt_kept_on_the_pipeline_would_be_seen(
    pipe: RestorationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[Any] = []
    evaluate = Backbone.evaluate

    def latest(self: Any, network: Any, z: Tensor, t: Tensor, conditioning: Any, canvas: Any) -> Tensor:
        return evaluate(self, network, z, t, shared[-1], canvas)

    tell = RestorationPipeline._tell

    def keeps(self: Any, *args: Any, **keywords: Any) -> Any:
        told = tell(self, *args, **keywords)
        shared.append(told[0])
        return told

    monkeypatch.setattr(Backbone, "evaluate", latest)
    monkeypatch.setattr(RestorationPipeline, "_tell", keeps)
    with pytest.raises(AssertionError):
        check_two_threads_are_two_runs(pipe)
