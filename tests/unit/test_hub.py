"""Models of the hub: what is uploaded, what a cache or a folder is enough for, and what is said when it is not.

The hub itself is out of reach in tests: uploads are caught where they would leave the machine, downloads come from a
cache that is written here as huggingface_hub lays it out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from typer.testing import CliRunner

import tiny
from latentindigo.cli import ExitCode, app
from latentindigo.images import LoadedImage, save_image
from latentindigo.model_card import CardFacts
from latentindigo.model_folder import model_folder
from latentindigo.pipeline import ModelLoadError, RestorationPipeline

SOURCE = Path(__file__).parents[2] / "src"
REVISION = "0123456789abcdef0123456789abcdef01234567"
FACTS = CardFacts("Tiny", "apache-2.0", "Do as you like.", "Random numbers.", base_model="someone/else")


def cached(model: Path, home: Path, repo: str = "someone/tiny") -> None:
    """Put a model into a cache as a download would have left it."""
    place = home / "hub" / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(REVISION)
    shutil.copytree(model, place / "snapshots" / REVISION)


def command(home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process whose cache is `home`."""
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))
    told = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(home), **environment}
    told.pop("HF_HUB_CACHE", None)
    # Without transformers, which diffusers would import in seconds and this model does not need.
    code = "import sys; sys.modules['transformers'] = None; from latentindigo.cli import main; main()"
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, env=told, capture_output=True, text=True, timeout=120)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Return a small photo."""
    path = tmp_path / "photo.png"
    save_image(LoadedImage(torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))), path)
    return path


# ------------------------------------------------------------------------------------------------------------ loading


def test_a_cache_is_enough_offline(tiny_model: Path, photo: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    cached(tiny_model, home)
    quick = ("--steps", 1, "--device", "cpu", "--dtype", "float32")
    told = command(
        home,
        "restore",
        photo,
        "-o",
        tmp_path / "x.png",
        "--json",
        "--model",
        "someone/tiny",
        *quick,
        HF_HUB_OFFLINE="1",
    )
    assert told.returncode == ExitCode.DONE, told.stderr
    assert json.loads(told.stdout)["model_hash"] == tiny.tiny_pipeline().weights_hash()


@pytest.mark.parametrize(("offline", "reason"), [(True, "HF_HUB_OFFLINE is set"), (False, "the hub is out of reach")])
def test_no_cache_no_hub(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, reason: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # Where nobody listens.
    line = ["restore", str(photo), "-o", str(tmp_path / "x.png"), "--model", "someone/tiny", "--device", "cpu"]
    told = CliRunner().invoke(app, line)
    assert told.exit_code == ExitCode.MODEL, told.output
    assert len(told.stderr.strip().splitlines()) == 1
    assert f"neither the cache nor the hub could provide it ({reason}); download it to a folder" in told.stderr


def test_a_plain_folder_needs_no_hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    shutil.copytree(tiny_model, tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    # Spelled like a hub id, and yet a folder: the folder wins.
    pipe = RestorationPipeline.from_pretrained("someone/tiny")
    assert pipe.weights_hash() == tiny.tiny_pipeline().weights_hash()


def test_which_files_of_the_hub(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(repo: str, **keywords: Any) -> str:
        asked.append((repo, keywords))
        return str(tiny_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    RestorationPipeline.from_pretrained("someone/tiny", revision="v2", token="secret")  # noqa: S106
    ((repo, keywords),) = asked
    assert repo == "someone/tiny"
    assert (keywords["revision"], keywords["token"]) == ("v2", "secret")
    wanted = ["vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors", "model_index.json"]
    wanted += ["tokenizer/merges.txt", "README.md", "prompts.safetensors", "unet/model-00001-of-00002.safetensors"]
    # No pickles, no code, no whole models in one file.
    unwanted = ["vae/weights.bin", "pipeline.py", "sd_turbo.safetensors", "unet/model.ckpt"]
    assert list(filter_repo_objects(wanted + unwanted, allow_patterns=keywords["allow_patterns"])) == wanted


@pytest.mark.parametrize("name", ["not a folder", "a/b/c", "./nowhere/x", "user/re po"])
def test_names_that_nothing_can_have(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="folder"):
        model_folder(name)
    with pytest.raises(ModelLoadError, match="could not be loaded"):
        RestorationPipeline.from_pretrained(name)


# ---------------------------------------------------------------------------------------------------------- uploading


class Hub:
    """What would have left the machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.error = error
        self.repos: list[tuple[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", self._create)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self._upload)

    def _create(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> Any:
        if self.error is not None:
            raise self.error
        assert exist_ok
        self.repos.append((repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def _upload(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **keywords: Any) -> None:
        there = files_of(folder_path)
        files = {name: there[name] for name in filter_repo_objects(there, allow_patterns=allow_patterns)}
        self.uploads.append({"repo_id": repo_id, "files": files, **keywords})


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_uploaded_is_what_is_on_disk(
    tiny_pipeline: RestorationPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    (tmp_path / "notes.txt").write_text("private")
    tiny_pipeline.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/tiny", private=True, card=FACTS)
    (tmp_path / "notes.txt").unlink()
    (upload,) = hub.uploads
    assert hub.repos == [("me/tiny", True)]
    assert upload["repo_id"] == "me/tiny"
    assert upload["files"] == files_of(tmp_path)
    endings = {Path(name).suffix for name in upload["files"]}
    assert endings == {".json", ".safetensors", ".md"}


def test_push_to_hub_and_back(
    tiny_pipeline: RestorationPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    tiny_pipeline.push_to_hub("me/tiny", card=FACTS, commit_message="First", create_pr=True)
    (upload,) = hub.uploads
    assert (upload["commit_message"], upload["create_pr"]) == ("First", True)
    for name, content in upload["files"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert RestorationPipeline.from_pretrained(tmp_path).weights_hash() == tiny_pipeline.weights_hash()


def refusal(status: int) -> Exception:
    """What huggingface_hub raises when the hub refuses."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("no", response=response)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("no route"), "HF_HUB_OFFLINE is set"),
        (refusal(403), "status 403"),
    ],
    ids=["offline", "refused"],
)
def test_uploads_that_fail_say_why(
    tiny_pipeline: RestorationPipeline, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    Hub(monkeypatch, error)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not isinstance(error, HfHubHTTPError))
    with pytest.raises(ConnectionError, match=f"could not be uploaded to 'me/tiny'.*{reason}.*hf upload"):
        tiny_pipeline.push_to_hub("me/tiny")


# --------------------------------------------------------------------------------------------------------------- card


def test_the_card_states_facts(tiny_pipeline: RestorationPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path, card=FACTS)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "diffusers"
    assert data["base_model"] == "someone/else"
    assert tiny_pipeline.weights_hash() in card.text
    for name, network in tiny_pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            count = sum(p.numel() for p in network.parameters())
            assert f"| `{name}` | {type(network).__name__} | {count:,} |" in card.text
    for told in ("# Tiny", "Random numbers.", "Do as you like."):
        assert told in card.text


def test_a_card_that_lies_there_is_kept(tiny_pipeline: RestorationPipeline, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("written by hand")
    tiny_pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "written by hand"
    tiny_pipeline.save_pretrained(tmp_path, card=CardFacts())
    assert "Not stated" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="license: expected a text"):
        CardFacts(license=" ")
