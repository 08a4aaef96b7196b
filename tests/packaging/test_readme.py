"""The READMEs: short, their links lead somewhere, their commands work, their values are the configurations'.

A command in a ``bash`` block is run as it stands, in a folder with a few pictures. One that ends in a comment of MARKS
cannot be run here: it must parse, and its experiment or grid must compose.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from PIL import Image

from ablations.grid import load
from core.config import compose, experiments, run_id
from experiments import python
from experiments.cli import build_parser, main
from experiments.parser import parse

ROOT = Path(__file__).resolve().parents[2]
READMES = (
    "README.md",
    "CONTRIBUTING.md",
    "ablations/README.md",
    "analysis/README.md",
    "core/methods/README.md",
    "experiments/README.md",
    "experiments/emoji/README.md",
    "slurm/README.md",
)
PAGES = ("analysis/RESULTS.md", "analysis/papers/flash_diffusion.md", "analysis/papers/dmd2.md")
MAX_LINES = 150
MARKS = re.compile(r"# (needs (weights|a cluster|a run|a file of your own)|takes minutes)$")


class Command(NamedTuple):
    """One line of a code block; ``marked``: it cannot be run in a test."""

    text: str
    marked: bool


def commands(text: str) -> Iterator[Command]:
    """The lines of all ``bash`` blocks, without their comments."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in filter(str.strip, block.splitlines()):
            marked = bool(MARKS.search(line.rstrip()))
            yield Command(line.partition(" #")[0].strip(), marked)


def all_commands() -> list[Command]:
    """Every command of the READMEs once; one that is run somewhere is run."""
    found: dict[str, Command] = {}
    for name in READMES:
        for command in commands((ROOT / name).read_text(encoding="utf-8")):
            if command.text not in found or not command.marked:
                found[command.text] = command
    return list(found.values())


def compose_words(words: list[str]) -> None:
    """Compose the experiment among the words of a command with its overrides, if there is one."""
    names = [word for word in words if word in experiments()]
    overrides = [word for word in words if re.match(r"[\w.]+=", word)]
    for name in names:
        compose(name, overrides)


def check_fewstep(words: list[str]) -> None:
    """The arguments parse, and the experiment or the grid that they name composes."""
    arguments = parse(build_parser(), words)
    compose_words(words)
    grid = getattr(arguments, "name", "")
    if grid and grid != "RUN" and not grid.endswith(".yaml"):
        load(grid, getattr(arguments, "local", ())).expand(arguments.scale, arguments.budget, strict=False)


def check(text: str) -> None:
    """A command that is not run: the program exists and its arguments make sense to it."""
    program, *words = shlex.split(text)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "fewstep":
        check_fewstep(words)
    else:
        assert program in ("python", "torchrun") and "-m" in words, text
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None
        compose_words(words)


def run(text: str) -> None:
    """Run a command that needs nothing special."""
    program, *words = shlex.split(text)
    if program == "fewstep":
        assert main(words) == 0, text
    else:
        assert program == "python", f"{text}: mark it with what it needs"
        subprocess.run([sys.executable, *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60)


@pytest.fixture
def pictures() -> Path:
    """``my-pictures`` in the working directory, as the README describes it."""
    folder = Path("my-pictures")
    folder.mkdir()
    for name, colour in (("apple", "red"), ("pear", "green"), ("plum", "blue"), ("lemon", "yellow")):
        Image.new("RGB", (80, 60), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {colour} {name}")
    return folder


RUNNABLE = [c.text for c in all_commands() if not c.marked and not c.text.startswith("make")]
CHECKED = [c.text for c in all_commands() if c.marked or c.text.startswith("make")]


@pytest.mark.parametrize("text", RUNNABLE)
def test_a_command_runs(text: str, pictures: Path) -> None:
    run(text)


@pytest.mark.parametrize("text", CHECKED)
def test_a_command_that_needs_more_makes_sense(text: str) -> None:
    check(text)


def test_commands_are_found_with_their_marks() -> None:
    text = "```bash\nmake demo    # minutes\nfewstep train x  # needs weights\n\n```\n```\nnot this\n```\n"
    assert list(commands(text)) == [Command("make demo", False), Command("fewstep train x", True)]
    assert len(RUNNABLE) > 8 and len(CHECKED) > 8


@pytest.mark.parametrize(
    "text", ["make nothing", "fewstep train flash/sd15 data.nothing=1", "fewstep grid show nothing"]
)
def test_a_wrong_command_is_noticed(text: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(text)


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", [*READMES, *PAGES])
def test_links_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (ROOT / name).parent.joinpath(target).exists()] == []


def method_rows() -> Iterator[tuple[str, str, str]]:
    """(experiment, key, value as written) of every cell of the tables in core/methods/README.md."""
    for block in (ROOT / "core/methods/README.md").read_text(encoding="utf-8").split("\n\n"):
        if not block.startswith("| setting |"):
            continue
        head, _, *rows = map(cells_of, block.strip().splitlines())
        for row in rows:
            yield head[2], row[0], row[2]
            yield head[3], row[0], row[3]


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table, without the marks of code."""
    return [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def test_our_hyper_parameters_are_the_configurations() -> None:
    rows = list(method_rows())
    assert {experiment for experiment, _, _ in rows} >= {"flash/sd15", "flash/emoji", "dmd2/sdxl", "dmd2/flux2_dev"}
    wrong = []
    for experiment, key, cell in rows:
        value = attrgetter(key)(compose(experiment, ["data.path=none"]))
        if yaml.safe_load(cell) != value and cell != value:
            wrong.append(f"{experiment} {key}: {cell}, configured {value}")
    assert wrong == []


def test_the_python_of_the_readme_runs(pictures: Path, capsys: pytest.CaptureFixture) -> None:
    """Word for word, from composing to the measured numbers."""
    text = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(block, "experiments/README.md", "exec"), names)
    assert names["images"].shape == (2, 64, 64, 3) and names["run"].state() == "done"
    steps = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("diversity train ")]
    assert steps == [str(count) for count in names["config"].eval.steps]


def test_a_training_that_stops_is_told(pictures: Path) -> None:
    config = python.compose("flash/tiny", "data.path=my-pictures", "data.view=plain", "execution.stop_after_images=8")
    with pytest.raises(RuntimeError, match=f"run {run_id(config)} is not done: .*log.txt says why"):
        python.train(config)
