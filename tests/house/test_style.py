"""Limits of style, for lines and functions and for all code together; CONTRIBUTING.md states them.

python tests/house/test_style.py [FILE...]     lists what is above the limits, in all files or in some
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = 110
PARAMETERS = 8
COMPLEXITY = 12
LINES = 50
# Per 1000 lines that are not empty.
CONDITIONAL_EXPRESSIONS = 12
PARALLEL_ASSIGNMENTS = 5
COMMENTS = 60
DECISIONS = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.IfExp,
    ast.comprehension,
    ast.Assert,
)

# Functions that are above a limit, and why.
EXCEPTIONS: dict[str, str] = {}


def sources() -> list[Path]:
    skipped = {"tests", "docs", "data", "runs", "output_dir", "jobs"}
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0] not in skipped
        and not path.relative_to(ROOT).parts[0].startswith(".")
    ]


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def parameters(function: ast.FunctionDef) -> int:
    a = function.args
    names = [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs] + [x.arg for x in (a.vararg, a.kwarg) if x]
    return len([name for name in names if name not in ("self", "cls")])


def complexity(function: ast.AST) -> int:
    """McCabe's number: 1, plus 1 for each decision and each further operand of `and` and `or`."""
    total = 1
    for node in ast.walk(function):
        total += isinstance(node, DECISIONS)
        if isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
    return total


def conditional_expressions(tree: ast.AST) -> list[ast.IfExp]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.IfExp)]


def parallel_assignments(tree: ast.AST) -> list[ast.Assign]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and isinstance(node.targets[0], ast.Tuple)
    ]


def comments(text: str) -> int:
    return sum(
        token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )


def faults(path: Path) -> list[str]:
    """What a file has above the limits of a line or of a function."""
    text = path.read_text()
    tree = ast.parse(text)
    name = path.relative_to(ROOT)
    found = [
        f"{name}:{n}: {len(line)} columns"
        for n, line in enumerate(text.splitlines(), 1)
        if len(line) > COLUMNS
    ]
    for function in functions(tree):
        place = f"{name}:{function.lineno} {function.name}"
        if f"{name} {function.name}" in EXCEPTIONS:
            continue
        if parameters(function) > PARAMETERS:
            found.append(f"{place}: {parameters(function)} parameters")
        if complexity(function) > COMPLEXITY:
            found.append(f"{place}: complexity {complexity(function)}")
        length = function.end_lineno - function.lineno + 1
        if length > LINES:
            found.append(f"{place}: {length} lines")
    for node in conditional_expressions(tree):
        if any(isinstance(inner, ast.IfExp) for inner in ast.walk(node) if inner is not node):
            found.append(f"{name}:{node.lineno}: a conditional expression within another")
    return found


def rates(paths: list[Path]) -> dict[str, float]:
    """Figures of all files together, per 1000 lines that are not empty."""
    texts = [path.read_text() for path in paths]
    trees = [ast.parse(text) for text in texts]
    per = 1000 / max(1, sum(bool(line.strip()) for text in texts for line in text.splitlines()))
    return {
        "conditional expressions": per * sum(len(conditional_expressions(tree)) for tree in trees),
        "parallel assignments": per * sum(len(parallel_assignments(tree)) for tree in trees),
        "comments": per * sum(map(comments, texts)),
    }


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_functions_are_within_the_limits(path):
    assert not faults(path)


def test_rates_are_within_the_limits():
    found = rates(sources())
    assert found["conditional expressions"] <= CONDITIONAL_EXPRESSIONS, found
    assert found["parallel assignments"] <= PARALLEL_ASSIGNMENTS, found
    assert found["comments"] >= COMMENTS, found


def test_exceptions_are_few_and_needed():
    assert len(EXCEPTIONS) <= 5
    names = set()
    for path in sources():
        names |= {
            f"{path.relative_to(ROOT)} {function.name}" for function in functions(ast.parse(path.read_text()))
        }
    assert set(EXCEPTIONS) <= names


def main() -> None:
    paths = [Path(word).resolve() for word in sys.argv[1:]] or sources()
    for path in paths:
        print(*faults(path), sep="\n", end="\n" if faults(path) else "")
        tree = ast.parse(path.read_text())
        for kind, nodes in (
            ("conditional", conditional_expressions(tree)),
            ("parallel", parallel_assignments(tree)),
        ):
            if nodes and len(sys.argv) > 1:
                print(f"{path.relative_to(ROOT)}: {kind} at lines {sorted(node.lineno for node in nodes)}")
    print("per 1000 lines:", {kind: round(value, 1) for kind, value in rates(paths).items()})


if __name__ == "__main__":
    main()
