"""Processes of their own, for what only a fresh Python can tell: its start, its imports, its peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Runs the command line, and tells when the denoiser was first called and which packages were imported by the end.
FIRST_STEP = """
import json, sys, time, torch
denoiser, packages, first = sys.argv.pop(), sys.argv.pop().split(","), []
torch.nn.modules.module.register_module_forward_pre_hook(
    lambda module, _: first.append(time.time()) if not first and type(module).__name__ == denoiser else None
)
from latentindigo.cli import main
try:
    main()
finally:
    print(json.dumps({"first": first[0], "imported": [name for name in packages if name in sys.modules]}))
"""
# A package that stands in for one that is not installed: whatever is asked of it is an empty class.
_STAND_IN = "__version__ = '99.0'\ndef __getattr__(name):\n    return type(name, (), {})\n"


def run_python(arguments: Sequence[str], *paths: Path) -> str:
    """Run Python in a process of its own, with folders put in front of its path; the last line that it prints."""
    path = os.pathsep.join(filter(None, [*map(str, paths), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"a process of its own failed: {done.stderr.strip()[-500:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def stand_ins(folder: Path, names: Sequence[str]) -> Path:
    """Stand-ins for the packages that are not needed, in a folder for Python's path."""
    for name in names:
        facts = folder / "stand-ins" / f"{name}-99.0.dist-info"
        for place in (folder / "stand-ins" / name, folder / "stand-ins" / name / "utils", facts):
            place.mkdir(parents=True)
            (place / "__init__.py").write_text(_STAND_IN)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    return folder / "stand-ins"
