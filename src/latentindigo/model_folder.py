"""Where the files of a model are: the one embedded in the package, a folder, or a model of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["EMBEDDED", "model_folder", "upload_folder"]

EMBEDDED = Path(__file__).parent / "weights" / "embedded"
# Parts in folders, an autoencoder alone, prompts of a saved pipeline. Other weights beside the folders are whole models
# in one file, which many repositories hold as well: gigabytes that nobody here reads.
_FILES = ["*.json", "*.md", "*/*.safetensors", "diffusion_pytorch_model*.safetensors", "prompts.safetensors"]
_FILES += ["*merges.txt", "*spiece.model"]


def model_folder(name: str | os.PathLike[str], **download: Any) -> Path:
    """Folder that holds a model.

    Args:
        name: "embedded", a folder, or a hub id "user/repo" (its files are fetched or taken from the cache).
        **download: `revision`, `token` and `cache_dir` of huggingface_hub, for a hub id.

    Returns:
        A folder in the layout of a saved `RestorationPipeline`.

    Raises:
        FileNotFoundError: If there is no such folder and it cannot be had from the hub.
    """
    if name == "embedded":
        return EMBEDDED
    path = Path(name)
    if path.is_dir():
        return path
    text = str(name)
    if text.count("/") != 1 or text.startswith((".", "/")):
        raise FileNotFoundError(
            f"expected 'embedded', a model folder or a hub id 'user/repo', got {text!r}, which is no folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(text, allow_patterns=_FILES, **download))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"model {text!r} is no folder, and neither the cache nor the hub could provide it ({_reason(error)}); "
            "download it to a folder and give that folder"
        ) from error


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> None:
    """Upload a saved model to the hub: its JSON files, its safetensors and its card, and nothing else.

    Args:
        folder: The folder.
        repo_id: Name on the hub, "user/repo"; made if missing.
        message: Title of the upload.
        private: Whether only the owner sees it; None = as the account is set.
        token: Access token; None = the one that `hf auth login` stored.
        create_pr: Propose the files instead of putting them there.

    Raises:
        ConnectionError: If the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=_FILES,
            commit_message=message or "Upload a LatentINDIGO model",
            create_pr=create_pr,
        )
    except Exception as error:  # Transport errors are those of whichever HTTP library the hub's client uses.
        known = isinstance(error, (HfHubHTTPError, HFValidationError, OSError))
        if not known and not type(error).__module__.startswith("httpx"):
            raise
        raise ConnectionError(
            f"the model could not be uploaded to {repo_id!r} ({_reason(error)}); save it to a folder with "
            "save_pretrained, which 'hf upload' takes later"
        ) from error


def _reason(error: Exception) -> str:
    """Why the hub did not serve, in a few words."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HFValidationError):
        return "the hub has no such names"
    if isinstance(error, GatedRepoError):
        return "its terms must be accepted on the hub first, then 'hf auth login'"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub does not know it, or it is private: 'hf auth login' first"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"{type(error).__name__}, status {status}" if status else "the hub is out of reach"
