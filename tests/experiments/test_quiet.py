"""What commands say is their own: no bars of libraries on stderr, unless the environment asks for them."""

import re
from collections.abc import Iterator
from pathlib import Path

import diffusers.utils.logging
import huggingface_hub.utils
import pytest
import transformers.utils.logging
from PIL import Image

from experiments.cli import main
from experiments.quiet import quieten

LIBRARIES = (transformers.utils.logging, diffusers.utils.logging)


@pytest.fixture(autouse=True)
def noisy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Libraries as a fresh process has them, before the test and after it."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    for library in LIBRARIES:
        library.enable_progress_bar()
    yield
    for library in LIBRARIES:
        library.enable_progress_bar()


def bars() -> list[bool]:
    """Whether transformers, diffusers and the hub show bars."""
    shown = [library.is_progress_bar_enabled() for library in LIBRARIES]
    return [*shown, not huggingface_hub.utils.are_progress_bars_disabled()]


def test_bars_of_loading_are_off_and_those_of_downloads_are_on() -> None:
    assert bars() == [True, True, True]
    quieten()
    assert bars() == [False, False, True]


def test_a_library_whose_verbosity_is_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    quieten()
    assert bars() == [True, False, True]


def test_commands_say_nothing_but_their_own_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Path("pictures").mkdir()
    for name in ("red", "green", "blue", "yellow"):
        Image.new("RGB", (80, 60), name).save(f"pictures/{name}.png")
        Path(f"pictures/{name}.txt").write_text(f"a {name} wall")
    words = ["data.path=pictures", "data.view=plain", "train.budget.amount=4", "backbone.sharing=full"]
    assert main(["train", "flash/tiny", *words]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d  ", line)] == []
    assert "device-hours" in lines[-1] and len(lines) in (4, 5), "the split of own data is told once in a process"
    (run,) = map(str, Path("runs/flash/tiny").iterdir())
    measured = ["eval.metrics=[diversity]", "eval.splits=[train]", "eval.steps=[1]", "eval.images_per_prompt=2"]
    assert main(["sample", run, "a dog", "--steps", "1", "--teacher-steps", "1"]) == 0
    assert main(["evaluate", run, *measured]) == 0
    assert main(["export", run, "--out", "exported"]) == 0
    assert capsys.readouterr().err == ""
