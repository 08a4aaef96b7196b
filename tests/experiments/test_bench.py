"""The benchmark: what it counts, and the memory that one shared backbone saves."""

import json
from pathlib import Path

import pytest

from core.config import UserError, compose, resolve
from experiments.bench import alone, peaks, sampling
from experiments.bench.recorder import Recorder
from experiments.build import build_backbone
from experiments.cli import main
from tests import worlds


def test_replayed_are_the_evaluations_of_one_period(tmp_path: Path) -> None:
    trained = worlds.trainer(tmp_path, ["method.ttur=2", "method.gan=off"], experiment="dmd2/tiny")
    recorder = Recorder(trained.method.backbone)
    recorder.on = True
    trained._iteration()
    trained._iteration()
    recorder.on = False
    counted = {role: 0 for role in trained.clock.evaluations}
    for call in recorder.calls:
        counted[call.role] += len(call.x_t)
    assert counted == dict(trained.clock.evaluations)
    graphs = [call.role for call in recorder.calls if call.grad]
    assert graphs == ["student", "fake_score", "fake_score"], "one turn of the student in two iterations"
    before = worlds.parameters(trained)
    recorder.replay()
    assert worlds.equal(before, worlds.parameters(trained))
    assert all(p.grad is None for p in trained.players["fake_score"].trained)


def test_a_judging_networks_gradient_goes_to_its_input(tmp_path: Path) -> None:
    trained = worlds.trainer(tmp_path, experiment="dmd2/tiny")
    recorder = Recorder(trained.method.backbone)
    recorder.on = True
    trained._iteration()
    through = [(call.role, call.function.__name__) for call in recorder.calls if call.through]
    assert through == [("fake_score", "network_features")]


@pytest.mark.parametrize("experiment", ["flash/tiny", "dmd2/tiny"])
def test_numbers_of_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture, experiment: str) -> None:
    words = [experiment, f"execution.cache_dir={tmp_path}/cache"]
    assert main(["bench", *words, "--repeats", "1", "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["efficiency"] > 0 and found["images_per_s"] > 0 and found["peak_gb"] > 0.1
    counts = found["evaluations_per_image"]
    assert (
        (counts["teacher"], counts["fake_score"]) == (1.0, 1.5) if experiment == "dmd2/tiny" else counts["student"] >= 1
    )
    assert "efficiency" in capsys.readouterr().out


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "flash/nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown experiment 'flash/nothing'")


def test_pictures_are_timed_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, sample = [], sampling.Session.sample

    def noting(self: sampling.Session, prompts: list[str], setting: sampling.Setting) -> object:
        drawn.append((setting.weights, setting.sampler.steps, len(prompts)))
        return sample(self, prompts, setting)

    monkeypatch.setattr(sampling.Session, "sample", noting)
    words = ["dmd2/tiny", f"execution.cache_dir={tmp_path}/cache", "eval.batch_size=3", "--sampling", "1", "4"]
    assert main(["bench", *words, "--teacher-steps", "8", "--repeats", "2", "--out", str(tmp_path / "out.json")]) == 0
    assert drawn == [("teacher", 8, 3), ("student", 1, 3), ("student", 4, 3)] * 3, "the first round warms up"
    found = json.loads((tmp_path / "out.json").read_text())
    teacher, one, four = (found[name] for name in ("teacher, 8 steps", "student, 1 steps", "student, 4 steps"))
    assert (teacher["nfe"], one["nfe"], four["nfe"]) == (16, 1, 4) and teacher["speedup"] == 1
    assert one["speedup"] == pytest.approx(teacher["seconds"] / one["seconds"])
    assert main(["bench", *words[:-1], "0"]) == 2 and "steps=0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -9 $$", "dmd2/tiny --peak: ended by SIGKILL"),
        ("exit 3", "dmd2/tiny --peak: exit code 3"),
        ("echo one >&2; echo error: two >&2; exit 2", "dmd2/tiny --peak: exit code 2: error: two"),
    ],
)
def test_a_process_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    """Also one that was killed for its memory before it could say anything."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(alone.sys, "executable", str(python))
    with pytest.raises(UserError) as found:
        alone.alone(["dmd2/tiny", "--peak"])
    assert str(found.value) == words


@pytest.mark.slow
def test_two_settings_are_compared_in_one_run(tmp_path: Path) -> None:
    """Each in processes of its own; the ratio is of their medians."""
    words = ["dmd2/tiny", f"execution.cache_dir={tmp_path}/cache", "train.batch_size=64", "method.gan=off"]
    found = alone.versus(words, ["execution.activation_checkpointing=true"], 2, 0.9)
    assert found["versus"] == "execution.activation_checkpointing=true" and found["experiment"] == "dmd2/tiny"
    for key in ("images_per_s", "peak_gb"):
        assert found["ratio"][key] == pytest.approx(found["second"][key] / found["first"][key])


@pytest.mark.slow
def test_one_shared_backbone_needs_at_most_45_percent_of_three_copies(tmp_path: Path) -> None:
    """DMD2 on a UNet of 50M parameters, 16x16 latents, batch 2, activations checkpointed; peaks in one run."""
    words = [*peaks.MEMORY, f"execution.cache_dir={tmp_path}/cache"]
    backbone = build_backbone(resolve(compose(words[0], words[1:])))
    assert 45e6 < sum(p.numel() for p in backbone.role_parameters("teacher").values()) < 55e6
    assert backbone.latent_shape == (4, 16, 16)
    found = peaks.compare_memory(words)
    assert found["ratio"]["measured_gb"] < 0.45 and found["lora"]["measured_gb"] > 0.2, found
    for sharing in ("lora", "full"):  # beside the plan a process holds its libraries, whatever the network's size
        assert found[sharing]["planned_gb"] < found[sharing]["measured_gb"] < 0.4 + found[sharing]["planned_gb"], found
