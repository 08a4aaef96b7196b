"""Mistakes of a first hour: each is one line that says what is wrong, and exit code 2, before anything is encoded."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from experiments.cli import main
from tests import worlds

FLASH = "train flash/emoji execution.device=cpu"
# Words of a command, in a folder as the fixture makes it, and what the answer names
MISTAKES = {
    # which experiment, which setting
    "trian flash/emoji": "nearest: train",
    "train": "EXPERIMENT",
    "train flash/emojy": "nearest: flash/emoji",
    "train flash/emoji sed=1": "unknown key 'sed'; nearest: seed",
    "train flash/emoji seed=one": "seed=one: Expected int",
    "train flash/emoji method.guidance_max=1": "method.guidance_max=1",
    "train flash/emoji execution.micro_batch=3": "execution.micro_batch=3 does not divide",
    "train flash/emoji execution.device=tpu": "execution.device=tpu",
    "train ./mine.yaml": "mine.yaml: no such file",
    # where the data lie
    f"{FLASH} data.path=nowhere": "data.path=nowhere: no such folder",
    f"{FLASH} data.path=empty": "empty",
    f"{FLASH} data.path=uncaptioned": "uncaptioned",
    f"{FLASH} data.path=broken": "broken",
    f"{FLASH} data.path=pictures/0.png": "data.path=pictures/0.png: no such folder",
    f"{FLASH} data.path=pictures data.split=helduot": "'helduot'",
    f"{FLASH} data.path=pictures data.image_size=512": "data.image_size=512",
    f"{FLASH} data.path=listed": "metadata.jsonl",
    # where the weights lie
    f"{FLASH} backbone.path=nowhere": "backbone.path=nowhere",
    f"{FLASH} backbone.path=some-lab/some-model": "some-lab/some-model",
    f"{FLASH} backbone.path=empty": "backbone.path=empty",
    f"{FLASH} train.init_from=0123456789": "0123456789",
    f"{FLASH} method.distill_loss=lpips": "lpips_path",
    "train flash/emoji eval.metrics=[fid] --evaluate": "inception",
    # where results go
    f"{FLASH} execution.runs_dir=pictures/0.png/runs": "pictures/0.png/runs",
    # runs that are not there, or not yet trained
    "sample 0123456789 apple": "0123456789",
    "evaluate 0123456789": "0123456789",
    "export 0123456789 --out student": "0123456789",
    "evaluate started": "started",
    "sample started @nowhere.txt": "nowhere.txt",
    "sample started apple --steps 0": "0",
    "grid run flash_loses": "nearest: flash_losses",
    "grid submit flash_losses --cluster nowhere": "nowhere",
}


@pytest.fixture
def first_hour(working_directory: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Folders of data and of a run, each with its fault."""
    worlds.pictures(working_directory)
    for name in ("empty", "uncaptioned", "broken", "listed", "started"):
        (working_directory / name).mkdir()
    Image.new("RGB", (64, 64)).save(working_directory / "uncaptioned" / "a.png")
    for name in ("a", "b"):
        (working_directory / "broken" / f"{name}.png").write_bytes(b"\x89PNG\r\n")
        (working_directory / "broken" / f"{name}.txt").write_text("a red apple")
    Image.new("RGB", (64, 64)).save(working_directory / "listed" / "a.png")
    (working_directory / "listed" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ')
    assert main(["config", "flash/emoji"]) == 0
    (working_directory / "started" / "config.yaml").write_text(capsys.readouterr().out)
    return working_directory


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line(first_hour: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert main(text.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert MISTAKES[text] in said, said
    assert "usage" not in said.lower()
    assert not list(first_hour.glob(".cache/latents/*/latents.npy")), "nothing is encoded before"


def test_at_least_twenty_five_are_tried() -> None:
    assert len(MISTAKES) >= 25


@contextmanager
def no_space() -> Iterator[None]:
    """No file can grow, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_before_anything_is_encoded(first_hour: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with no_space():
        code = main([*FLASH.split(), "data.path=pictures", "execution.runs_dir=runs"])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: cannot write runs/flash/emoji/") and said.count("\n") == 1, said
    assert not list(first_hour.glob(".cache/latents/*/latents.npy"))
