"""Where the files of a model are: the one embedded in the package, a folder, or a model of the hub."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["EMBEDDED", "model_folder"]

EMBEDDED = Path(__file__).parent / "weights" / "embedded"


def model_folder(name: str | os.PathLike[str]) -> Path:
    """Folder that holds a model.

    Args:
        name: "embedded", a folder, or a hub id "user/repo" (its files are fetched or taken from the cache).

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
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.md", "*merges.txt", "*spiece.model"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(
            f"model {text!r} is no folder, and the hub could not provide it ({type(error).__name__}); "
            "download it to a folder and give that folder"
        ) from error
