"""What may be imported when, and how long the first answer may take."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "diffusers", "accelerate", "numpy", "PIL", "safetensors", "huggingface_hub", "transformers"}
SECONDS = 0.4


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the package where this one does."""
    paths = [str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


REPORT = """
import json, sys
before = set(sys.modules)
try:
    {statement}
except SystemExit as end:
    if end.code:
        raise
tops = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})
print(json.dumps(tops), file=sys.stderr)
"""


def imported_by(statement: str, *arguments: str) -> set[str]:
    """Return the top-level packages that a statement imports."""
    done = run_python(REPORT.format(statement=statement), *arguments)
    return set(json.loads(done.stderr.strip().splitlines()[-1]))


def cpu_seconds_of_help() -> float:
    """CPU time of `latentindigo --help`: wall time on an idle machine, and the same on a busy one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_python("from latentindigo.cli import main; main()", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def check_light(packages: set[str]) -> None:
    assert not packages & HEAVY, f"imported without need: {sorted(packages & HEAVY)}"


def test_importing_the_package_imports_the_standard_library_at_most() -> None:
    packages = imported_by("import latentindigo")
    foreign = packages - set(sys.stdlib_module_names) - {"latentindigo"}
    assert not foreign, f"import latentindigo brings {sorted(foreign)}"


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("restore", "--help"), ("batch", "--help"), ("train", "--help"), ("info", "--help"), ("--version",)],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    check_light(imported_by("from latentindigo.cli import main; main()", *arguments))


def test_the_check_finds_a_heavy_import() -> None:
    with pytest.raises(AssertionError, match="numpy"):
        check_light(imported_by("from latentindigo.cli import main; import numpy"))


def test_help_is_quick() -> None:
    best = min(cpu_seconds_of_help() for _ in range(3))
    assert best < SECONDS, f"--help took {best:.2f} s at best, allowed are {SECONDS} s"


RESTORE = """
import json, sys
sys.path.insert(0, sys.argv.pop())
from latentindigo.cli import main
try:
    main()
except SystemExit as end:
    if end.code:
        raise
modules = sorted(sys.modules)
# The compiler still works when it is asked for.
import torch
doubled = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1))
assert float(doubled) == 2
print(json.dumps(modules), file=sys.stderr)
"""
UNUSED = ("transformers", "scipy", "gradio", "ray", "pillow_heif", "pillow_avif")


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder of packages that can be imported and hold nothing, so that the check does not depend on this machine."""
    for name in UNUSED:
        facts = tmp_path / "packages" / f"{name}-99.0.dist-info"
        for folder in (tmp_path / "packages" / name, facts):
            folder.mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text("def __getattr__(name): return type(name, (), {})\n")
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    return tmp_path / "packages"


def test_a_restoration_imports_neither_the_compiler_nor_text_encoders(stand_ins: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16), "teal").save(tmp_path / "photo.png")
    arguments = ["restore", str(tmp_path / "photo.png"), "-o", str(tmp_path / "out.png"), "--steps", "1"]
    done = run_python(RESTORE, *arguments, str(stand_ins))
    modules = json.loads(done.stderr.strip().splitlines()[-1])
    assert (tmp_path / "out.png").is_file()
    found = {*UNUSED, "torch._dynamo"} & set(modules)
    assert not found, f"imported without need: {sorted(found)}"
    assert {"torch", "diffusers"} <= set(modules)


IMPORT = """
import sys
sys.path.insert(0, sys.argv[1])
try:
    import latentindigo.pipeline
except Exception:
    pass  # The stand-in is no transformers; that it was asked for is what counts.
print("transformers" in sys.modules, "torch._dynamo" in sys.modules)
"""


def test_the_stand_ins_would_be_found(stand_ins: Path) -> None:
    assert run_python(IMPORT, str(stand_ins)).stdout.split() == ["True", "True"]
