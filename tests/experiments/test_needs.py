"""What a run lacks is told in one line before anything is built, and shown beside its configuration."""

import importlib
import sys
from pathlib import Path

import pytest
import tensorboard

from core.config import UserError, compose
from experiments.cli import main
from experiments.needs import missing_needs
from tests import worlds

EMOJI = "package:experiments/emoji/assets/emoji-64-v1"
PAPER = ["eval.metrics=[kd_effnet]", "eval.splits=[heldout]", f"data.path={EMOJI}"]


def missing(experiment: str, *overrides: str, evaluate: bool = True) -> list[str]:
    return missing_needs(compose(experiment, overrides), evaluate=evaluate)


@pytest.mark.parametrize(
    "experiment", ["flash/emoji", "dmd2/emoji", "dmd2/emoji_flux2", "lcm/emoji", "teacher/emoji", "flash/tiny"]
)
def test_embedded_experiments_lack_nothing(experiment: str) -> None:
    assert missing(experiment) == []


@pytest.mark.parametrize(
    ("experiment", "overrides", "words"),
    [
        ("flash/sdxl", PAPER, "method.distill_loss=lpips needs method.lpips_path: the file vgg16-397923af.pth"),
        ("flash/sdxl", [*PAPER, "method.lpips_path=gone"], "method.lpips_path=gone: no file vgg16-397923af.pth there"),
        ("dmd2/flux2_dev", PAPER, "method.gan=dino needs method.dino_path: a folder of DINO or DINOv2"),
        ("flash/emoji", ["eval.metrics=[fid,kid]"], "fid and kid need eval.inception_path: the file inception-2015"),
        ("flash/emoji", ["eval.metrics=[kid]", "eval.inception_path=gone"], "eval.inception_path=gone: no file"),
        ("flash/emoji", ["data.view=plain"], "clip_score needs eval.clip_path"),
        ("flash/emoji", ["eval.clip_path=gone/clip"], "eval.clip_path=gone/clip: no such file or folder"),
        ("flash/emoji", ["eval.clip_path=ViT-B-16:gone"], "eval.clip_path=ViT-B-16:gone: no such file or folder"),
        ("flash/emoji", ["eval.extractor_path=gone"], "eval.extractor_path=gone: no such file or folder"),
        ("flash/emoji", ["eval.images_per_prompt=1"], "eval.images_per_prompt=1 has no diversity; give at least 2"),
        ("flash/emoji", ["eval.splits=[test]"], "eval.splits=test: data.path="),
        ("flash/emoji", ["eval.prompts=@gone.txt"], "eval.prompts=@gone.txt: no such file"),
        ("flash/emoji", ["data.split=val"], "has no split 'val'; it has: heldout, train"),
        ("flash/emoji", ["data.image_size=512"], "it draws 64x64 pixels; give data.image_size=64"),
        ("dmd2/emoji_flux2", ["data.image_size=50"], "give a multiple of "),
        ("flash/sdxl", [*PAPER, "data.image_size=512", "method.distill_loss=mse"], "give data.image_size=1024"),
    ],
)
def test_what_is_missing_has_a_line(experiment: str, overrides: list[str], words: str) -> None:
    lines = missing(experiment, *overrides)
    assert any(words in line for line in lines) and not any("\n" in line for line in lines), lines


def test_published_sizes_fit_their_pipelines() -> None:
    for experiment in ("flash/sd15", "flash/sdxl", "flash/sd3", "flash/pixart", "dmd2/flux2_dev", "dmd2/flux2_klein"):
        assert not [line for line in missing(experiment, f"data.path={EMOJI}") if "image_size" in line], experiment


def test_a_training_that_is_not_measured_needs_no_judge() -> None:
    assert missing("flash/emoji", "eval.metrics=[fid]", evaluate=False) == []
    assert missing("flash/emoji", "eval.splits=[test]", evaluate=False), "its prompts are drawn"
    assert missing("teacher/emoji", "eval.splits=[test]", evaluate=False) == []


def test_a_tracker_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name, as wandb leaves in the working directory, is no library."""
    Path("wandb").mkdir()
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [".", str(Path(tensorboard.__file__).parents[1] / "nowhere")])
    importlib.invalidate_caches()
    (line,) = missing("flash/emoji", "execution.report_to=[wandb]", evaluate=False)
    assert line == "execution.report_to=wandb: the package wandb is not installed: pip install 'fewstep[wandb]'"
    monkeypatch.undo()
    assert missing("flash/emoji", "execution.report_to=[tensorboard]") == []
    with pytest.raises(UserError, match="report_to=wanbd is unknown; allowed: tensorboard, wandb, trackio; nearest"):
        compose("flash/emoji", ["execution.report_to=[wanbd]"])


def test_own_prompts_need_no_split_to_draw_captions_of() -> None:
    Path("mine.txt").write_text("a boat\n")
    assert missing("flash/emoji", "eval.splits=[test]", "eval.prompts=@mine.txt", evaluate=False) == []


def test_a_training_is_refused_before_it_has_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"data.path={worlds.pictures(tmp_path)}"
    assert main(["train", "flash/emoji", own, "data=image_text", "method.distill_loss=lpips"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs method.lpips_path" in line and "data.image_size=512 does not fit" in line
    assert not (tmp_path / "runs").exists() and not (tmp_path / ".cache" / "latents").exists()


def test_the_configuration_is_shown_with_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "flash/emoji", "eval.metrics=[fid]"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("# missing: fid and kid need eval.inception_path")
    assert main(["config", "flash/emoji"]) == 0
    assert "missing" not in capsys.readouterr().out
