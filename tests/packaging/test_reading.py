"""Rules that keep the code readable: few decisions a line, and docstrings that are sentences."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_DECISIONS_PER_LINE = 0.6
MIN_LINES = 8  # shorter functions are seen at one glance
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.BoolOp, ast.ExceptHandler)
FRAGMENT = re.compile(r"(Of|Those|That|Who|Whose|Where|What|Like|As|With|Without|For|From|Into|Also|One of)\b")


def decisions(function: ast.FunctionDef) -> int:
    """Return the number of branches, loops, boolean operators, comprehensions (and their conditions) and handlers."""
    count = 0
    for node in ast.walk(function):
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def dense_functions(tree: ast.AST) -> Iterator[str]:
    """Yield name, decisions and lines of each function that decides too often; decorators are left out."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if lines >= MIN_LINES and decisions(node) > MAX_DECISIONS_PER_LINE * lines:
            yield f"{node.name}: {decisions(node)} decisions in {lines} lines"


def fragments(tree: ast.AST) -> Iterator[str]:
    """Yield the first line of each public docstring that opens as a fragment."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node) or ""
        is_public = not getattr(node, "name", "").startswith("_")
        if is_public and FRAGMENT.match(text):
            yield f"docstring: {text.splitlines()[0]}"


def test_code_outside_the_tests_is_written_out(sources: dict[Path, str]) -> None:
    """Every file keeps both rules."""
    broken = {}
    for path, text in sources.items():
        tree = ast.parse(text)
        found = [*dense_functions(tree), *fragments(tree)]
        name = path.relative_to(ROOT).as_posix()
        if found and not name.startswith("tests/"):
            broken[name] = found
    assert broken == {}


def test_decisions_are_counted() -> None:
    """Each kind counts once, a comprehension once more for each of its conditions."""
    source = """
def outer(values):
    if values and all(values):
        return 1 if len(values) > 1 else 0
    for value in values:
        while value:
            value -= 1
    try:
        return [x for x in values if x if x > 1]
    except ValueError:
        return None
"""
    function = ast.parse(source).body[0]
    assert decisions(function) == 9
    assert list(dense_functions(ast.parse(source))) == ["outer: 9 decisions in 10 lines"]
    assert list(dense_functions(ast.parse("def short():\n    return [x for y in z for x in y if x if x if x]"))) == []


def test_fragments_are_recognised() -> None:
    """Public names only; a word that merely starts like one of the list is none of it."""
    source = '"""Of old."""\nclass A:\n    """Office hours."""\n    def _f(self):\n        """Of f."""\n'
    source += '    def g(self):\n        """One of g."""\n'
    assert list(fragments(ast.parse(source))) == ["docstring: Of old.", "docstring: One of g."]
