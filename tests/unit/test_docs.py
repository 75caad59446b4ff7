"""The documentation is true: links, commands, examples, the table of presets and the list of modules."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from PIL import Image

import latentindigo
import tiny
from latentindigo.cli import app
from latentindigo.jobs import MAP_GAIN
from latentindigo.model_folder import EMBEDDED
from latentindigo.pipeline import RestorationPipeline
from latentindigo.presets import load_presets
from latentindigo.roster import load_method

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CARD = EMBEDDED / "README.md"
PAGES = [README, CARD, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
PAGES += [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
METHOD_BLOCK = re.compile(r"^ *```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
WIDTH, HEIGHT = 20, 16  # of the photo in the examples
COMMAND = re.compile(r"(?:^|\s|-m )latentindigo (?!&)(.*)$")


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of one language."""
    return [code for found, code in BLOCK.findall(text) if found == language]


# ----------------------------------------------------------------------------------------------------------- the checks


def check_links(text: str, page: Path) -> None:
    """Raise AssertionError if a relative link leads nowhere."""
    targets = [link.split("#")[0] for link in LINK.findall(BLOCK.sub("", text)) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in targets if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to files that do not exist: {missing}"


def check_commands(text: str) -> int:
    """Raise AssertionError if a `latentindigo ...` line would be refused; return the number of lines checked.

    Every line is parsed by the command line itself, in the current folder, and not run.
    """
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    found = [match.group(1) for line in lines if (match := COMMAND.search(line.split(" #")[0]))]
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    for command in found:
        name, *arguments = shlex.split(command)
        assert name in commands, f"there is no command {name!r}: latentindigo {command}"
        try:
            commands[name].make_context(name, arguments).close()
        except Exception as error:
            # Typer's own usage errors; their class has moved between Typer's versions.
            if not hasattr(error, "format_message"):
                raise
            raise AssertionError(f"latentindigo {command}: {error}") from error
    return len(found)


def check_presets(text: str, folder: Path) -> None:
    """Raise AssertionError unless the README's table of presets shows the values of a model."""
    for name, preset in load_presets(folder).items():
        numbers = (
            *(preset.steps, preset.strength, preset.spread, preset.texture),
            *(preset.chroma, preset.coarse, preset.same_size, preset.ensemble),
        )
        values = (preset.method, preset.update, preset.init, *(f"{number:g}" for number in numbers))
        expected = f"| `{name}` | {' | '.join(values)} |"
        assert expected in text, f"README.md, table of presets: expected the row {expected!r}"


def check_modules(text: str, source: Path) -> None:
    """Raise AssertionError unless a page names every module of the package."""
    modules = {path.name for path in source.glob("*.py") if not path.name.startswith("__")}
    missing = sorted(name for name in modules if f"`{name}`" not in text)
    assert not missing, f"docs/architecture.md does not say what these modules are for: {missing}"


# ---------------------------------------------------------------------------------------------------- on the real thing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    check_links(page.read_text(encoding="utf-8"), page)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the files that the examples name, as the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((WIDTH, HEIGHT), 60).convert("RGB").save("photo.jpg")
    (tmp_path / "photos").mkdir()
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    return tmp_path


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    "page",
    [README, ROOT / "docs" / "quick-start.md", ROOT / "docs" / "training.md", ROOT / "docs" / "batch.md"],
    ids=lambda page: page.name,
)
def test_commands_are_accepted(page: Path) -> None:
    assert check_commands(page.read_text(encoding="utf-8")) >= 5


def test_presets_are_those_of_the_embedded_model() -> None:
    check_presets(README.read_text(encoding="utf-8"), EMBEDDED)


def test_every_module_has_its_place_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    check_modules(text, Path(latentindigo.__path__[0]))


def test_the_gain_of_written_maps_is_the_documented_one() -> None:
    words = {2: "two", 4: "four", 8: "eight"}
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"{words[int(MAP_GAIN)]} times brighter" in text
    assert f"divide by {MAP_GAIN:g}" in text


def test_python_examples_of_the_readme_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in order, as one program, on a model of tiny random networks in place of the embedded one."""
    monkeypatch.setattr(RestorationPipeline, "from_pretrained", lambda *args, **kwargs: tiny.tiny_pipeline())
    first, samples, *rest = blocks(README.read_text(encoding="utf-8"), "python")
    program = workplace / "readme.py"
    program.write_text("\n".join([first, samples, "several = result", *rest]), encoding="utf-8")
    names = runpy.run_path(str(program))
    with Image.open("photo-large.png") as large:
        assert large.size == (4 * WIDTH, 4 * HEIGHT)
    several, again = names["several"], names["again"]
    assert [len(several.images), len(several.detail_maps), len(several.uncertainty)] == [4, 4, 1]
    assert all(tuple(detail.shape) == (1, 2 * HEIGHT, 2 * WIDTH) for detail in several.detail_maps)
    assert [image.tobytes() for image in several.images] == [image.tobytes() for image in again.images]
    assert len({image.tobytes() for image in several.images}) == 4
    assert names["large"].images[0].size == (2 * WIDTH, 2 * HEIGHT)


def test_the_first_program_of_the_quick_start_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RestorationPipeline, "from_pretrained", lambda *args, **kwargs: tiny.tiny_pipeline())
    page = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    (program,) = blocks(page, "python")
    (workplace / "first.py").write_text(program, encoding="utf-8")
    runpy.run_path(str(workplace / "first.py"))
    with Image.open("before.png") as before, Image.open("after.png") as after:
        assert after.size == (2 * before.width, 2 * before.height)


def test_the_training_page_puts_a_model_together(workplace: Path) -> None:
    pipe = tiny.tiny_pipeline()
    for run, parts in {
        "autoencoder": ["vae"],
        "denoiser": ["denoiser", "scheduler"],
        "estimator": ["estimator", "degradation_encoder"],
        "pixel-inn": ["pixel_inn"],
        "latent-inn": ["latent_inn"],
    }.items():
        for part in parts:
            getattr(pipe, part).save_pretrained(workplace / "runs" / run / "final" / part)
    program = workplace / "assemble.py"
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    program.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    runpy.run_path(str(program))
    result = RestorationPipeline.from_pretrained("my-model")(Image.open("photo.jpg"), scale=2)
    assert result.images[0].size == (2 * WIDTH, 2 * HEIGHT)


def test_the_page_on_methods_can_be_followed(workplace: Path) -> None:
    """Every Python block of it is a file that `--add` takes, and what it makes keeps the contract."""
    page = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    files = [textwrap.dedent(code) for code in METHOD_BLOCK.findall(page)]
    assert len(files) == 2
    y = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    for code in files:
        (workplace / "my_method.py").write_text(code, encoding="utf-8")
        restorer = load_method(workplace / "my_method.py", tiny.tiny_pipeline()).restorer
        both, again = restorer(y, 2, [0, 1]), restorer(y, 2, [0, 1])
        assert both.shape == (2, 3, 32, 48)
        assert torch.equal(both, again)
        assert float(both.min()) >= 0
        assert float(both.max()) <= 1
        torch.testing.assert_close(restorer(y[1:], 2, [1]), both[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_are_python(page: Path) -> None:
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        compile(code, str(page), "exec")


# ------------------------------------------------------------------------------------------------ targets and extras


def check_targets(text: str, makefile: str) -> int:
    """Raise AssertionError if a page names a target that make does not know; return the number of targets it names."""
    known = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", "\n".join(line.split(" #")[0] for line in text.splitlines()), re.M))
    assert named <= known, f"make does not know {sorted(named - known)}"
    return len(named)


def test_make_knows_the_targets_of_the_pages() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {page: check_targets(page.read_text(encoding="utf-8"), makefile) for page in PAGES}
    assert named[README] >= 3
    assert named[ROOT / "CONTRIBUTING.md"] >= 3
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (targets,) = re.findall(r"for target in (.+); do", script)
    assert check_targets("".join(f"make {target}\n" for target in targets.split()), makefile) >= 6
    with pytest.raises(AssertionError, match="tset"):
        check_targets("`make tset`", makefile)


def test_the_quick_start_names_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+`) \|", page, re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall("`([^`]+)`", row)) == sorted(extras)


# ------------------------------------------------------------------------------------------- citation and changelog


CFF_KEYS = {"cff-version", "message", "title", "abstract", "type", "version", "license", "authors", "keywords"}
REFERENCE_KEYS = {"type", "title", "authors", "journal", "volume", "year", "doi", "url", "notes"}


def check_citation(citation: dict[str, Any], credits: str) -> None:
    """Raise AssertionError unless a CITATION.cff has the shape of version 1.2.0, and names only what credits name."""
    assert citation["cff-version"] == "1.2.0"
    assert set(citation) <= CFF_KEYS | {"references"}, f"unknown keys: {sorted(set(citation) - CFF_KEYS)}"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["type"] in ("software", "dataset")
    assert citation["version"] == latentindigo.__version__, "CITATION.cff is of another version"
    for work in (citation, *citation["references"]):
        assert work["authors"], f"no authors: {work['title']}"
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"}), f"no name of an author: {author}"
    for reference in citation["references"]:
        assert set(reference) <= REFERENCE_KEYS, f"unknown keys: {sorted(set(reference) - REFERENCE_KEYS)}"
        assert isinstance(reference["year"], int)
        words = " ".join(credits.split())
        known = [reference["title"], reference.get("doi"), reference.get("url")]
        missing = [fact for fact in known if fact is not None and fact not in words]
        assert not missing, f"docs/credits.md does not know {missing}"


def check_changelog(text: str) -> None:
    """Raise AssertionError unless a changelog has the headings of Keep a Changelog, and something unreleased."""
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]", f"the first heading is {versions[0]!r}"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", version) for version in versions[1:]), versions
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}, kinds


def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_citation_is_valid_and_true() -> None:
    check_citation(citation(), (ROOT / "docs" / "credits.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "change",
    [
        {"version": "0.0.1"},
        {"cff-version": "1.1.0"},
        {"author": []},
        {"authors": [{"family-name": "You"}]},
        {"references": [{"title": "Another paper", "authors": [{"name": "N. N."}], "year": 2020, "type": "article"}]},
    ],
    ids=["version", "format", "key", "author", "paper"],
)
def test_a_wrong_citation_is_found(change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_citation({**citation(), **change}, (ROOT / "docs" / "credits.md").read_text(encoding="utf-8"))


def test_the_changelog_has_its_headings() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    check_changelog(text)
    for stale in (text.replace("## [Unreleased]", "## 0.1"), text.replace("### Added", "### News")):
        with pytest.raises(AssertionError):
            check_changelog(stale)


# ------------------------------------------------------------------------------------------------------ planted defects


def test_a_broken_link_is_found() -> None:
    check_links("[a](LICENSE) [b](#limits) [c](https://example.org/x) ![d](docs/notation.md#guidance)", README)
    for broken in ("[a](LICENCE)", "![picture](docs/images/no-such-picture.png)", "[a](docs/none.md#part)"):
        with pytest.raises(AssertionError, match="do not exist"):
            check_links(broken, README)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("latentindigo repair photo.jpg -o out/", "no command"),
        ("latentindigo restore photo.jpg -o out/ --sharpen", "--sharpen"),
        ("latentindigo restore photo.jpg", "out"),
        ("latentindigo restore photo.jpg -o out/ --preset bold", "bold"),
        ("latentindigo restore photo.jpg -o out/ --size 100", "WIDTHxHEIGHT"),
        ("latentindigo train encoder photos/ --out runs/x", "encoder"),
        ("accelerate launch -m latentindigo train encoder photos/ --out runs/x", "encoder"),
    ],
)
def test_a_wrong_command_is_found(command: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_commands(f"```sh\n{command}\n```\n")


def test_a_stale_table_of_presets_is_found() -> None:
    text = README.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `vivid` |"))
    steps = row.split(" | ")[4]
    stale = text.replace(row, row.replace(f"| {steps} |", f"| {steps}0 |"))
    assert stale != text
    with pytest.raises(AssertionError, match="table of presets"):
        check_presets(stale, EMBEDDED)


def test_a_module_without_a_place_is_found(tmp_path: Path) -> None:
    (tmp_path / "novel.py").touch()
    with pytest.raises(AssertionError, match="novel"):
        check_modules("`prior.py`", tmp_path)
