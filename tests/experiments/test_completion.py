"""Completion: what a shell is told at a tab, and that nothing large is needed for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ablations import grid
from core.config import experiments
from experiments.cli import main
from tests.packaging.test_installation import HEAVY


def completed(line: str, *without: str) -> list[str]:
    """The words that a shell is offered at the end of ``line``, by a process that cannot import ``without``."""
    code = f"import sys; sys.modules.update(dict.fromkeys({without!r})); from experiments.cli import main; main()"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": "words", "COMP_LINE": line}
    asked |= {"COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, check=True)
    return [word.strip() for word in Path("words").read_text().split("\n")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fewstep tra", ["train"]),
        ("fewstep grid s", ["show", "submit", "status"]),
        ("fewstep train flash/s", [name for name in experiments() if name.startswith("flash/s")]),
        ("fewstep config ow", ["own.yaml"]),
        ("fewstep grid show flash_t", [name for name in grid.names() if name.startswith("flash_t")]),
        ("fewstep table dmd2_g", ["dmd2_gan"]),
        ("fewstep table ema --format ", ["md", "csv", "tex", "html"]),
        ("fewstep sample 01", ["0123456789"]),
        ("fewstep evaluate dmd2/e", ["dmd2/emoji", "dmd2/emoji_flux2"]),
        ("fewstep sample RUN --st", ["--steps"]),
        ("fewstep list me", ["methods", "metrics"]),
    ],
)
def test_words_and_names_are_completed(line: str, words: list[str]) -> None:
    Path("own.yaml").write_text("")
    folder = Path("runs/flash/tiny/label-0123456789")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    assert completed(line, *HEAVY) == words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_a_shell_needs_is_printed(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert "_ARGCOMPLETE" in printed and "fewstep" in printed
    assert ("complete --command fewstep" in printed) == (shell == "fish")


def test_bash_takes_it() -> None:
    code = "import sys; from experiments.cli import main; sys.exit(main())"
    printed = subprocess.run([sys.executable, "-c", code, "completion", "bash"], capture_output=True, check=True).stdout
    told = subprocess.run(["bash", "-c", printed + b"\ncomplete -p fewstep"], capture_output=True, check=True)
    assert b"fewstep" in told.stdout and b"-F" in told.stdout
