"""The quick reader of evals.jsonl: the values of ``Run.evals``, also of lines that were torn or edited by hand."""

import math
from pathlib import Path

import pytest

from core.config import UserError
from core.measured import protocol_fields, read_numbers
from core.run import Run

RECORD = Path(__file__).resolve().parents[2] / "analysis" / "records" / "runs" / "157e67d615"
LINE = '{"metric":"kid","split":"train","steps":4,"weights":"student","images":8,"protocol":"p","value":%s,"n":10%s}\n'


def test_numbers_are_the_measured_values_of_a_record() -> None:
    run = Run.open(RECORD)
    names = ("metric", "split", "steps", "nfe", "guidance", "weights", "images", "value", "n", "protocol", "time")
    expected = [[line[name] for name in names] + [line["protocol_fields"]] for line in run.evals()]
    numbers = run.numbers()
    assert len(numbers) > 20
    found = [[getattr(n, name) for name in names] + [protocol_fields(bytes(n.protocol_fields))] for n in numbers]
    assert found == expected


def test_the_newest_counts_and_a_torn_line_is_lost_alone(tmp_path: Path) -> None:
    file = tmp_path / "evals.jsonl"
    assert read_numbers(file) == []
    file.write_text(LINE % ("1.0", "") + LINE % ("NaN", ',"split":"heldout"') + LINE[:40] + "\n" + LINE % ("2.0", ""))
    newest, diverged = read_numbers(file)
    assert newest.value == 2.0 and math.isnan(diverged.value) and diverged.split == "heldout"


@pytest.mark.parametrize("edited", ["5", '{"metric":"kid"}', LINE.replace('"steps":4', '"steps":"four"') % ("1", "")])
def test_a_line_that_is_no_number_is_named(tmp_path: Path, edited: str) -> None:
    file = tmp_path / "evals.jsonl"
    file.write_text(LINE % ("1.0", "") + edited)
    with pytest.raises(UserError, match=f"{file}: a line is no number"):
        read_numbers(file)
