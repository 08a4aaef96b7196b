"""The commands on a tiny run with a snapshot: sample, evaluate and export through the real ``main``."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import compose, resolve
from core.data.requests import Requests
from core.run import Run
from core.sampler import Sampler, Setting
from core.training.checkpoint import save_snapshot
from experiments.build import build_backbone, build_method
from experiments.cli import main
from experiments.session import load_run

PROMPTS = ["red apple", "blue heart"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An untrained run whose student was moved away from its teacher."""
    root = tmp_path_factory.mktemp("run")
    paths = [f"execution.runs_dir={root}/runs", f"execution.cache_dir={root}/cache"]
    run = Run.create(resolve(compose("flash/tiny", [*paths, "eval.metrics=[kd_effnet]", "eval.steps=[1,4]"])))
    method = build_method(run.config, build_backbone(run.config))
    (student,) = (player for player in method.players() if player.name == "student")
    with torch.no_grad():
        for parameter in student.parameters.values():
            parameter.add_(0.2)
    save_snapshot(run.path / "snapshots", 32, {"student": student.parameters})
    return run


def test_sample_writes_every_image_and_a_sheet(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    options = ["--steps", "1", "2", "--seeds", "0", "3", "--teacher-steps", "2", "3", "--teacher-guidance", "3"]
    assert main(["sample", str(run.path), *PROMPTS, *options, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "sheet.png")
    facts = json.loads((out / "samples.json").read_text())
    assert (facts["run"], facts["images"]) == (run.id, 32)
    entries = facts["files"]
    assert len(entries) == 2 * 2 * 4 and len(list(out.glob("*-seed*.png"))) == 16
    session, _ = load_run(run.path)
    for entry in entries:
        position = PROMPTS.index(entry["prompt"])
        solver = "dpmpp_2m" if entry["weights"] == "teacher" else "lcm"
        setting = Setting(entry["weights"], Sampler(solver, entry["steps"], entry["guidance"]))
        expected = session.sample(Requests(tuple(PROMPTS)), setting, entry["seed"]).images
        np.testing.assert_array_equal(np.asarray(Image.open(out / entry["file"])), expected[position])
    assert {(e["weights"], e["steps"], e["guidance"]) for e in entries} == {
        ("teacher", 2, 3.0), ("teacher", 3, 3.0), ("student", 1, 1.0), ("student", 2, 1.0),
    }  # fmt: skip


def test_sample_shows_a_training_at_several_moments(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """0: the student as it begins, which computes what the teacher computes."""
    out = tmp_path / "out"
    options = ["--steps", "1", "--teacher-steps", "0", "--at", "32", "0", "--out", str(out)]
    assert main(["sample", str(run.path), *PROMPTS, *options]) == 0
    entries = json.loads((out / "samples.json").read_text())["files"]
    assert [entry["setting"] for entry in entries[:2]] == [f"student 1 step after {n} images" for n in (0, 32)]
    begun, ended = (np.asarray(Image.open(out / entry["file"])) for entry in entries[:2])
    session, _ = load_run(run.path)
    setting = Setting("student", Sampler("lcm", 1))
    np.testing.assert_array_equal(ended, session.sample(Requests(tuple(PROMPTS)), setting).images[0])
    for name, parameter in session.backbone.role_parameters("student").items():
        if "lora_B" in name:
            parameter.data.zero_()
    np.testing.assert_array_equal(begun, session.sample(Requests(tuple(PROMPTS)), setting).images[0])
    assert (begun != ended).any()
    capsys.readouterr()
    assert main(["sample", str(run.path), "a", "--at", "16"]) == 2
    assert "has no snapshot of 16 images; allowed: 0 (untrained), 32" in capsys.readouterr().err


def test_evaluate_and_export_commands(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", str(run.path), "eval.splits=[heldout]", "eval.num_images=4"]) == 0
    lines = Run.open(run.path).evals()
    assert [(e["steps"], e["nfe"], e["n"], e["images"], e["split"]) for e in lines] == [
        (1, 1, 4, 32, "heldout"),
        (4, 4, 4, 32, "heldout"),
    ]
    assert f"{lines[0]['value']:.4g}" in capsys.readouterr().out
    assert main(["export", str(run.path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["_class_name"], config["original_inference_steps"]) == ("LCMScheduler", 4)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["sample", "RUN", " "], "no prompt given, or an empty one"),
        (["sample", "RUN", "@missing.txt"], "prompts file missing.txt cannot be read"),
        (["sample", "RUN", "a", "--steps", "0"], "--steps 0 is not a number of steps"),
        (["sample", "RUN", "a", "--weights", "ema"], "weights=ema: this run has none"),
        (["evaluate", "RUN", "train.batch_size=2"], "train.batch_size says what the run is"),
        (["evaluate", "no-such-run"], "'no-such-run' is neither a run folder nor the id of a run"),
        (["export", "RUN", "--out", "x", "--steps", "3"], "steps=3 cannot be exported"),
        (["export", "RUN", "--out", "x", "--weights", "ema"], "weights=ema cannot be exported from this run"),
        (["export", "RUN", "--out", "x", "--set", "eval.weights=ema"], "weights=ema cannot be exported from this run"),
    ],
)
def test_wrong_commands_are_one_line_and_exit_code_2(
    run: Run, words: list[str], line: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(run.path) if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and line in error


def test_a_damaged_snapshot_is_told_in_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(run.path, tmp_path / run.path.name)
    (weights,) = folder.glob("snapshots/*/student.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["sample", str(folder), "red apple", "--out", str(tmp_path / "out")]) == 2
    assert f"{weights}: cannot be read as safetensors (" in capsys.readouterr().err
