"""The package as a user gets it: what wheel and sdist hold, and that both install and restore in a clean environment.

    python tools/check_package.py dist            # contents only
    python tools/check_package.py dist --install  # also install each into a new environment, and restore a picture

Nothing of the checkout is seen by the new environment: it lies in a temporary folder, and so does the working folder.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "latentindigo"
LIMIT_MB = 60
# Folders that lie elsewhere in a checkout and move into the package.
MOVED = {"latentindigo/recipes": "recipes", "latentindigo/photos": "examples/photos"}

# Draws a picture, and reads the result that the command line made of it.
_DRAW = """
from PIL import Image
Image.linear_gradient("L").resize((48, 48)).convert("RGB").save("drawn.png")
"""
_READ = """
from PIL import Image
import latentindigo
from latentindigo.images import read_metadata
stored = read_metadata("restored.png")
with Image.open("restored.png") as image:
    assert image.size == (96, 96), image.size
assert stored["version"] == latentindigo.__version__ and len(stored["model_hash"]) == 64, stored
print(latentindigo.__file__)
"""


def wheel_files(wheel: Path) -> set[str]:
    """Files of a wheel, by path."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def sdist_files(sdist: Path) -> set[str]:
    """Files of an sdist, by their path in its one folder."""
    with tarfile.open(sdist) as archive:
        members = [PurePosixPath(member.name) for member in archive.getmembers() if member.isfile()]
    return {PurePosixPath(*path.parts[1:]).as_posix() for path in members}


def expected_package() -> set[str]:
    """Files that an installed package must hold: modules, weights, and what is read beside them."""
    inside = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    moved = {f"{new}/{path.name}" for new, old in MOVED.items() for path in (ROOT / old).iterdir() if path.is_file()}
    return moved | {f"latentindigo/{path.relative_to(PACKAGE).as_posix()}" for path in inside}


def wrong_with_wheel(files: set[str], expected: set[str]) -> Iterator[str]:
    """What a wheel lacks, and what does not belong into it.

    Args:
        files: Its files.
        expected: Those of the package.

    Yields:
        One line for each.
    """
    for name in sorted(expected - files):
        yield f"the wheel lacks {name}"
    for name in sorted(files - expected):
        if not PurePosixPath(name).parts[0].endswith(".dist-info"):
            yield f"the wheel holds {name}, which is no part of the package"
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in files):
        yield "the wheel lacks the licence"


def wrong_with_sdist(files: set[str], expected: set[str]) -> Iterator[str]:
    """What an sdist lacks, and what does not belong into it.

    Args:
        files: Its files.
        expected: Those of the package, as the wheel has them.

    Yields:
        One line for each.
    """
    homes = ((name, MOVED.get(PurePosixPath(name).parent.as_posix())) for name in expected)
    needed = {f"src/{name}" if home is None else f"{home}/{PurePosixPath(name).name}" for name, home in homes}
    needed |= {"CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md", "constraints.txt", "pyproject.toml"}
    for name in sorted(needed - files):
        yield f"the sdist lacks {name}"
    for name in sorted(files - needed - {".gitignore"}):  # hatchling always adds that one
        yield f"the sdist holds {name}, which it does not need"


def try_out(archive: Path, venv: Path, pip_options: Sequence[str]) -> None:
    """Install an archive into an environment, and use it from a folder of its own.

    Args:
        archive: Wheel or sdist.
        venv: The environment.
        pip_options: More options for pip.

    Raises:
        subprocess.CalledProcessError: A step failed; what it said is on stderr.
    """
    python = venv / "bin" / "python"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)

        def step(*command: str | Path) -> str:
            # Without the caller's paths and switches: they are what could make a broken package work.
            kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LATENTINDIGO", "VIRTUAL_ENV"))}
            environment = {**kept, "HF_HUB_OFFLINE": "1"}
            return subprocess.run(
                command, cwd=work, env=environment, check=True, text=True, stdout=subprocess.PIPE
            ).stdout.strip()

        # Compiling every module of PyTorch and diffusers would take longer than all the rest.
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-compile")
        step(*pip, "--force-reinstall", *pip_options, archive)
        command = venv / "bin" / "latentindigo"
        said = step(command, "--version")
        step(command, "info")
        step(python, "-c", _DRAW)
        step(command, "restore", "drawn.png", "-o", "restored.png", "--scale", "2", "--threads", "1")
        where = step(python, "-c", _READ)
    if not Path(where).is_relative_to(venv):
        raise SystemExit(f"expected the package of the new environment, got '{where}'; unset what points to a checkout")
    sys.stdout.write(f"{archive.name}: {said}, installed, info, restored a drawn picture\n")


def only(folder: Path, pattern: str) -> Path:
    """The one file of a pattern in a folder."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"expected one {pattern} in '{folder}', got {len(found)}; empty the folder and build again")
    return found[0]


def main() -> None:
    """Check what was built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dist", type=Path, metavar="FOLDER")
    parser.add_argument("--install", action="store_true", help="also install both, and restore a picture")
    parser.add_argument("--pip", default="", metavar="OPTIONS", help="more options for pip, in one argument")
    args = parser.parse_args()
    wheel, sdist = only(args.dist.resolve(), "*.whl"), only(args.dist.resolve(), "*.tar.gz")
    expected = expected_package()
    wrong = [
        *wrong_with_wheel(wheel_files(wheel), expected),
        *wrong_with_sdist(sdist_files(sdist), expected),
        *(
            f"{path.name} is larger than {LIMIT_MB} MB"
            for path in (wheel, sdist)
            if path.stat().st_size > LIMIT_MB * 1e6
        ),
    ]
    if wrong:
        sys.exit("\n".join(wrong))
    for path in (wheel, sdist):
        sys.stdout.write(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, contents as expected\n")
    if args.install:
        options = [*shlex.split(args.pip), "--constraint", str(ROOT / "constraints.txt")]
        with tempfile.TemporaryDirectory() as name:
            started = time.perf_counter()
            venv = Path(name).resolve() / "venv"
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            try_out(wheel, venv, options)
            # The libraries are there now; what the sdist has to show is that it builds and works.
            try_out(sdist, venv, [*options, "--no-deps"])
            sys.stdout.write(f"clean environment: {time.perf_counter() - started:.0f} s\n")


if __name__ == "__main__":
    main()
