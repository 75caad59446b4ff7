"""A test on the tests: tolerances that let everything pass are banned, and every law must be seen to fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
LOOSEST = 5e-2
TOLERANCE_KEYWORDS = {"atol", "rtol", "abs", "rel", "abs_tol", "rel_tol"}
FILES = sorted(TESTS.rglob("*.py"))
LAWS = sorted((TESTS / "laws").glob("test_*.py"))


def value_of(node: ast.expr) -> float | None:
    """Return the value of a literal number or of one of the spellings of infinity; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = value_of(node.operand)
        return None if inner is None else -inner
    if isinstance(node, ast.Attribute) and node.attr == "inf":
        return float("inf")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "float" and node.args:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and str(argument.value).lower().lstrip("+") in ("inf", "infinity"):
            return float("inf")
    return None


def tolerances(tree: ast.AST) -> Iterator[tuple[int, float]]:
    """Yield line and value of every tolerance that is written as a number."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        named = [keyword.value for keyword in node.keywords if keyword.arg in TOLERANCE_KEYWORDS]
        is_table_entry = isinstance(node.func, ast.Name) and node.func.id == "Tol"
        for argument in [*named, *(node.args if is_table_entry else [])]:
            value = value_of(argument)
            if value is not None:
                yield argument.lineno, value


def check_tolerances(source: str) -> None:
    """Raise AssertionError if a tolerance is looser than the loosest one allowed, or infinite."""
    loose = [(line, value) for line, value in tolerances(ast.parse(source)) if not 0 <= value <= LOOSEST]
    assert not loose, f"tolerances above {LOOSEST} (line, value): {loose}"


def names_in(nodes: list[ast.AST]) -> set[str]:
    return {child.id for node in nodes for child in ast.walk(node) if isinstance(child, ast.Name)}


def is_planted(block: ast.With) -> bool:
    """Whether a block is `with pytest.raises(AssertionError...)`."""
    return any(
        isinstance(item.context_expr, ast.Call)
        and isinstance(item.context_expr.func, ast.Attribute)
        and item.context_expr.func.attr == "raises"
        and "AssertionError" in names_in(list(item.context_expr.args))
        for item in block.items
    )


def check_planted_defects(source: str) -> None:
    """Raise AssertionError unless every `check_...` is run on the real thing and seen to fail on a planted defect."""
    tree = ast.parse(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    laws = {node.name for node in functions if node.name.startswith("check_")}
    assert laws, "no law: name them check_<law>"
    helpers = {node.name: names_in([node]) for node in functions if not node.name.startswith(("check_", "test_"))}

    def with_helpers(names: set[str]) -> set[str]:
        """Add what the helpers among the names call, and what those call."""
        while not (called := set().union(*(helpers.get(name, set()) for name in names))) <= names:
            names = names | called
        return names

    seen_to_fail: set[str] = set()
    run_for_real: set[str] = set()
    for test in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"):
        blocks = [node for node in ast.walk(test) if isinstance(node, ast.With) and is_planted(node)]
        planted = [statement for block in blocks for statement in block.body]
        inside = names_in(list(planted))
        decorators = names_in(list(test.decorator_list))
        # A check handed over by a decorator (parametrize) counts where the test calls that parameter.
        given = decorators if inside & {argument.arg for argument in test.args.args} else set()
        hidden = {id(child) for statement in planted for child in ast.walk(statement)}
        outside = {node.id for node in ast.walk(test) if isinstance(node, ast.Name) and id(node) not in hidden}
        seen_to_fail |= with_helpers(inside | given)
        run_for_real |= with_helpers(outside - given)
    assert not laws - seen_to_fail, f"laws without a planted defect: {sorted(laws - seen_to_fail)}"
    assert not laws - run_for_real, f"laws never run on the real thing: {sorted(laws - run_for_real)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_tolerance_lets_everything_pass(path: Path) -> None:
    check_tolerances(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", LAWS, ids=lambda path: path.stem)
def test_every_law_is_seen_to_fail(path: Path) -> None:
    check_planted_defects(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "assert torch.allclose(a, b, atol=0.1)",
        "torch.testing.assert_close(a, b, atol=1e-5, rtol=1)",
        "assert a == pytest.approx(b, abs=float('inf'))",
        "assert a == pytest.approx(b, rel=math.inf)",
        "assert np.allclose(a, b, atol=np.inf)",
        "TOL = {x: Tol(0.2, 1e-3)}",
        "assert torch.allclose(a, b, atol=-1.0)",
    ],
)
def test_loose_tolerances_are_found(source: str) -> None:
    with pytest.raises(AssertionError, match="tolerances above"):
        check_tolerances(source)


def test_usual_tolerances_are_allowed() -> None:
    check_tolerances("torch.testing.assert_close(a, b, atol=5e-2, rtol=tol.rtol); x = Tol(1e-5, 1e-5)")


GOOD_LAW = """
def check_law(thing): ...
def test_law(): check_law(real)
def test_defect():
    with pytest.raises(AssertionError):
        check_law(broken)
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def test_law(): assert real", "no law"),
        ("def check_law(t): ...\ndef test_law(): check_law(real)", "without a planted defect"),
        (GOOD_LAW.replace("AssertionError", "ValueError"), "without a planted defect"),
        (GOOD_LAW.replace("check_law(broken)", "other(broken)"), "without a planted defect"),
        (GOOD_LAW.replace("check_law(real)", "..."), "never run on the real thing"),
    ],
    ids=["no law", "no defect", "wrong exception", "another function", "never real"],
)
def test_laws_that_cannot_fail_are_found(source: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_planted_defects(source)


def test_planted_defects_are_recognised() -> None:
    check_planted_defects(GOOD_LAW)
    check_planted_defects(
        GOOD_LAW.replace("check_law(real)", "case(real)").replace("check_law(broken)", "case(broken)")
        + "def case(t): check_law(t)\n"
    )
    check_planted_defects(
        "def check_law(t): ...\n"
        "def test_real(): check_law(1)\n"
        "@pytest.mark.parametrize('law', [check_law])\n"
        "def test_defect(law):\n"
        "    with pytest.raises(AssertionError):\n"
        "        law(broken)\n"
    )
