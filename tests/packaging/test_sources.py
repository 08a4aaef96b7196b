"""Rules that every tracked file keeps: size, length, and no trace of the machine it was written on."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_RECORDS_BYTES = 10_000_000
MAX_OTHER_BYTES = 48_000_000  # teachers, judge, pictures and code
MAX_TRAINING_BYTES = 20_000_000  # milestones, which go when what they lead to is an asset
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# An address of a package index, or an absolute path of the machine that the project is developed on.
INDEX_ADDRESS = re.compile(r"\b(?:py(?:pi|thonhosted)|npmjs|debian)\.org\b|--(?:extra-)?index-url")
MACHINE_PATH = re.compile(r"(?<![\w.~$}*-])/(?:work|root|opt/(?:pypi|wheels))/")


def function_lengths(source: str) -> dict[str, int]:
    """Return the number of lines of each function in ``source``, decorators left out."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1 for node in functions}


def test_tracked_files_stay_small(tracked: list[Path]) -> None:
    """Records of all runs fit in 10 MB, trainings under way in 20, everything else with data and weights in 48."""

    def size(folder: str) -> int:
        return sum(path.stat().st_size for path in tracked if path.is_relative_to(ROOT / folder))

    records, training = size("analysis/records"), size("experiments/emoji/training")
    assert 0 < records < MAX_RECORDS_BYTES
    assert training < MAX_TRAINING_BYTES
    assert size("") - records - training < MAX_OTHER_BYTES


def test_files_stay_short(sources: dict[Path, str]) -> None:
    """A file that outgrows the limit is split."""
    lengths = {str(path): len(text.splitlines()) for path, text in sources.items()}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_stay_short(sources: dict[Path, str]) -> None:
    """A function that outgrows the limit is split."""
    lengths = {
        f"{path}:{name}": lines for path, text in sources.items() for name, lines in function_lengths(text).items()
    }
    assert lengths, "no function found"
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def test_function_lengths_count_the_body() -> None:
    """The measure itself: nested functions count for both, decorators for none."""
    source = "@decorate\ndef outer():\n    def inner():\n        return 1\n    return inner\n"
    assert function_lengths(source) == {"outer:2": 4, "inner:3": 2}


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (INDEX_ADDRESS, "from https://files.python" + "hosted.org/packages", True),
        (INDEX_ADDRESS, "--extra-index" + "-url x", True),
        (INDEX_ADDRESS, "an index of pythons", False),
        (MACHINE_PATH, "see /wo" + "rk/main/core", True),
        (MACHINE_PATH, "runs/work/main and ~/work/main", False),
    ],
)
def test_traces_are_recognised(pattern: re.Pattern[str], text: str, found: bool) -> None:
    """The patterns below find what they should and nothing else."""
    assert bool(pattern.search(text)) is found


def test_no_trace_of_an_index_or_a_machine(tracked: list[Path]) -> None:
    """No tracked text names a package index or a path of one machine."""
    found = []
    for path in tracked:
        content = path.read_bytes()
        if b"\0" in content:
            continue
        text = content.decode("utf-8", errors="replace")
        matches = [*INDEX_ADDRESS.finditer(text), *MACHINE_PATH.finditer(text)]
        found += [f"{path}: {match.group()}" for match in matches]
    assert found == []
