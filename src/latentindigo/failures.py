"""What went wrong with one picture: what it was about, and the sentence for the person who wanted it."""

from __future__ import annotations

import errno

from latentindigo.canvas import is_out_of_memory
from latentindigo.safe_files import explain, printable

__all__ = ["FAILURES", "failure_kind", "say_failure"]

# What reading, restoring and writing one picture may raise because of that picture or its place on the disk. Anything
# else is a mistake in this package, and its traceback must reach the user.
FAILURES = (ValueError, OSError, RuntimeError, MemoryError, ImportError)


def failure_kind(error: BaseException) -> str:
    """Say what a failure was about.

    Args:
        error: The exception.

    Returns:
        "memory", "disk", "model" (it cannot be loaded) or, for anything else, "input".
    """
    if is_out_of_memory(error):
        return "memory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk"
    if not isinstance(error, RuntimeError):
        return "input"
    from latentindigo.pipeline import ModelLoadError  # late, for its import costs seconds

    return "model" if isinstance(error, ModelLoadError) else "input"


def say_failure(error: BaseException) -> str:
    """Say in one line why a picture failed, for the person who wanted it.

    Args:
        error: The exception.

    Returns:
        One sentence.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = f"'{error.filename}' {error.strerror}" if error.filename else explain(error)
    if failure_kind(error) == "memory":
        message = f"out of memory; a smaller --tile, --scale or --num-samples needs less ({message})"
    return printable(message).rstrip(".") + "."
