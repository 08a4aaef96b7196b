"""Each mistake is one line that names what, where and what is allowed, and exit code 2."""

from pathlib import Path

import pytest

from experiments.cli import build_parser, main
from experiments.parser import parse

TINY = "data.path=random:noise"


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr; asserts the exit code and that nothing else is said."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.adversarial_weigth=[0]", ("'method.adversarial_weigth'", "method.adversarial_weight,")),
        ("trian.batch_size=3", ("'trian.batch_size'", "nearest: train.batch_size")),
        ("method.num_timesteps=abc", ("method.num_timesteps=abc", "Expected int, got str")),
        ("train.batch_size=1.5", ("train.batch_size=1.5", "Expected int, got float")),
        ("method.num_timesteps=30", ("method.num_timesteps=30", "multiple of 4")),
        ("method.dmd_weight=[0.5]", ("method.dmd_weight has 1 values", "4 stages")),
        ("method.stage_weights=[[1,0,0]]", ("method.stage_weights row [1.0, 0.0, 0.0]", "4 weights")),
        ("method.guidance_max=1", ("method.guidance_max=1", "at least 3")),
        ("method.solver=eulr", ("method.solver=eulr", "dpmpp_2m, ddim")),
        ("method=flsh", ("method/flsh",)),
        ("eval.metrics=[kd_efnet]", ("eval.metrics=kd_efnet", "nearest: kd_effnet")),
        ("execution.micro_batch=3", ("execution.micro_batch=3", "does not divide", "4")),
        ("train.budget.unit=epochs", ("train.budget.unit=epochs", "images, iterations, evaluations")),
        ("train.budget.amount=0", ("train.budget.amount=0",)),
        ("train.state_dtype=bf17", ("train.state_dtype=bf17", "allowed: fp32, bf16, bf16_stochastic")),
        ("backbone.path=/nowhere/teacher", ("backbone.path=/nowhere/teacher", "no such folder")),
        ("data.path=", ("data.path is not set",)),
        ("backbone.sharing=half", ("backbone.sharing=half", "lora, full")),
        ("seed=1,2", ("'seed=1,2'", "several belong in a grid")),
        ("seed", ("'seed'", "key=value")),
        ("+seeds=1", ("'+seeds=1'", "key=value")),
    ],
)
def test_override(capsys: pytest.CaptureFixture[str], override: str, words: tuple[str, ...]) -> None:
    line = complaint(capsys, "config", "flash/tiny", TINY, override)
    assert all(word in line for word in words), line


def test_unknown_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "config", "flsh/tiny")
    assert "unknown experiment 'flsh/tiny'" in line and "flash/tiny" in line and "teacher/emoji" in line


BASE = """
title: T
base: {tiny: flash/tiny}
metrics: [kd_effnet]
"""
ROWS = "rows: [{id: a, set: {data.path: 'random:x'}}]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows: [{id: a, set: {method.num_timestep: 4}}]", ("g.yaml: row a", "method.num_timesteps")),
        ("rows: [{id: a, set: {method.num_timesteps: 6}}]", ("g.yaml: row a", "multiple of 4")),
        ("rows: [{id: off}]", ("g.yaml", "rows[0].id=False", "YAML reads on, off, yes and no")),
        ("rows: [{id: a}]\nevaluate: {at: [0.5]}", ("g.yaml", "evaluate.at lacks 1.0")),
        ("rows: [{id: a}, {id: a}]", ("g.yaml", "row id 'a' is used 2 times")),
        ("rows: [{id: a, curve: b}]", ("g.yaml: row a: curve=b", "joins references")),
        ("rows: [{id: a, parent: b}]", ("g.yaml: row a: parent=b", "allowed: a")),
        ("rows: [{id: a, parent: b}, {id: b, parent: a}]", ("g.yaml", "a -> b -> a")),
        ("rows: [{id: a, experiment: {tiny: flash/big}}]", ("row a", "unknown experiment 'flash/big'")),
        ("rows: []", ("g.yaml", "rows and axes are both empty")),
        ("rows: [{id: a, sets: {}}]", ("g.yaml", "sets")),
        (ROWS + "layout: {best: [kd_efnet]}", ("g.yaml", "metrics=kd_efnet", "nearest: kd_effnet")),
        (ROWS + "layout: {nfe: [two]}", ("g.yaml", "layout.nfe", "two")),
        (ROWS + "metricz: [kid]", ("g.yaml", "metricz")),
        ("axes: {K: {method.num_timesteps: 8}}", ("g.yaml", "axes.K", "list")),
        ("combine: zip\naxes: {K: {seed: [1, 2]}, B: {train.batch_size: [4]}}", ("g.yaml", "K 2, B 1")),
        ("axes: {K: {seed: [1]}}\nexclude: [{method.solver: ddim}]", ("g.yaml", "exclude=method.solver")),
        ("rows: [", ("g.yaml", "parsing")),
    ],
)
def test_grid(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    (tmp_path / "g.yaml").write_text(BASE + text)
    line = complaint(capsys, "grid", "show", str(tmp_path / "g.yaml"), "--scale", "tiny")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "flash_loses"], ("unknown grid 'flash_loses'", "nearest: flash_losses")),
        (["show", "g.yaml", "--scale", "papr"], ("base has no scale 'papr'", "allowed: tiny")),
        (["plan", "g.yaml", "--scale", "tiny", "--budget", "dem"], ("budget=dem", "allowed: full")),
        (["run", "g.yaml", "--scale", "tiny", "--slots", "0"], ("--slots=0", "at least 1")),
        (["run", "g.yaml", "--scale", "tiny", "--runs-dir", "g.yaml/runs"], ("cannot write", "g.yaml/runs")),
    ],
)
def test_grid_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    (tmp_path / "g.yaml").write_text(BASE + ROWS)
    line = complaint(capsys, "grid", *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [("method: [", ("parsing",)), ("a", ("config.yaml",)), ("method: {name: flsh}", ("name=flsh", "flash"))],
)
def test_damaged_run_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    folder = tmp_path / "a-0123456789"
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    for command in ("evaluate", "verify"):
        line = complaint(capsys, command, str(folder))
        assert str(folder) in line and all(word in line for word in words), line


def test_values_may_follow_an_option_but_unknown_words_may_not(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = parse(build_parser(), ["train", "flash/tiny", "seed=1", "--evaluate", "train.batch_size=8"])
    assert parsed.overrides == ["seed=1", "train.batch_size=8"] and parsed.evaluate
    said = complaint(capsys, "train", "flash/tiny", "--evaluat_", "seed=1")
    assert "no option --evaluat_; nearest: --evaluate" in said
    assert "grid list takes no 'seed=1'" in complaint(capsys, "grid", "list", "seed=1")
