"""Experiments from a user's own file: the same form, the same ids, named after the file."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ablations.grid import load
from core.config import UserError, compose, resolve, run_id
from experiments.cli import main

MINE = "# @package _global_\ndefaults: [/experiment/flash/tiny, _self_]\nseed: 5\ndata: {path: 'random:noise'}\n"


def own(text: str, path: str = "mine/my.yaml") -> str:
    """A file of one's own; returns its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


@pytest.mark.parametrize("path", ["my.yaml", "./mine/my.yaml", "a folder, [of] 'mine'=x/my.v2.yaml"])
def test_it_is_called_like_the_file_and_is_the_run_that_its_values_say(path: str) -> None:
    config = compose(own(MINE, path), ["train.batch_size=8"])
    same = compose("flash/tiny", ["seed=5", "data.path=random:noise", "train.batch_size=8"])
    assert config.name == Path(path).stem
    config.name = same.name
    assert config == same and run_id(resolve(config)) == run_id(resolve(same))


def test_it_may_choose_groups_itself_and_start_from_a_file_beside_it() -> None:
    own("train: {batch_size: 12, budget: {amount: 24}, precision: fp32}\n", "mine/base.yaml")
    groups = "/experiment_schema, /method: flash, /backbone: tiny_sd, /data: image_text, /eval: tiny"
    choice = "[" + ", ".join(f"{{{word}}}" if ":" in word else word for word in groups.split(", ")) + ", base, _self_]"
    config = compose(own(f"defaults: {choice}\nscale: tiny\nmethod: {{num_timesteps: 8}}\n"), ["data.image_size=64"])
    assert (config.train.batch_size, config.method.name, config.backbone.path) == (12, "flash", "random:tiny-sd")
    assert compose("mine/my.yaml", ["backbone=tiny_sd3", "data.image_size=64"]).backbone.family == "mmdit"


def test_a_changed_file_is_read_again() -> None:
    own("seed: 7\n", "mine/base.yaml")
    file = own("defaults: [/experiment/flash/tiny, base, _self_]\n")
    assert compose(file).seed == 7
    own("seed: 8\n", "mine/base.yaml")
    assert compose(file).seed == 8
    own("defaults: [/experiment/dmd2/tiny, base, _self_]\n")
    assert compose(file).method.name == "dmd2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\n", ("my.yaml has no backbone, data,", "begin its defaults with /experiment_schema")),
        ("defaults: [/experiment/flash/tiny, _self_]\nsede: 1\n", ("my.yaml", "Key 'sede' not in")),
        ("defaults: [/experiment/flash/tyni]\n", ("my.yaml", "'experiment/flash/tyni'")),
        ("defaults: [my]\n", ("my.yaml", "lead back to itself")),
        ("defaults: [\n", ("my.yaml", "parsing")),
    ],
)
def test_a_mistake_in_it_is_one_line(capsys: pytest.CaptureFixture[str], text: str, words: tuple[str, ...]) -> None:
    assert main(["config", own(text)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said


def test_a_file_that_is_not_there_or_not_read_is_told() -> None:
    with pytest.raises(UserError, match=r"^mine/my.yaml: no such file$"):
        compose("mine/my.yaml")
    with pytest.raises(UserError, match=r"^my.yml: an experiment's file ends in .yaml$"):
        compose(own(MINE, "my.yml"))


def test_it_trains_and_is_found_again() -> None:
    Path("pictures").mkdir()
    for name in ("red", "green", "blue", "yellow"):
        Image.new("RGB", (80, 60), name).save(f"pictures/{name}.png")
        Path(f"pictures/{name}.txt").write_text(f"a {name} wall")
    text = MINE.replace("'random:noise'", "pictures, view: plain")
    own(text + "train: {budget: {amount: 4}}\n")
    assert main(["train", "mine/my.yaml"]) == 0
    (folder,) = Path("runs/my").iterdir()
    assert folder.name == run_id(resolve(compose("mine/my.yaml")))
    assert str(Path.cwd()) not in (folder / "config.yaml").read_text()
    words = ["a dog", "--steps", "1", "--teacher-steps", "0", "--out", "drawn"]
    assert main(["sample", "mine/my.yaml", *words]) == 0
    assert json.loads(Path("drawn/samples.json").read_text())["run"] == folder.name


def test_a_grid_finds_it_beside_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    own(MINE)
    rows = "rows: [{id: a}, {id: b, experiment: {tiny: flash/tiny}, set: {data.path: 'random:noise'}}]\n"
    grid = own(f"title: T\nbase: {{tiny: my.yaml}}\nmetrics: [kd_effnet]\n{rows}", "mine/g.yaml")
    first, second = load(str(Path(grid).resolve())).expand("tiny")
    assert (first.config.name, second.config.name) == ("my", "flash/tiny")
    assert first.id == run_id(resolve(compose("mine/my.yaml", first.overrides)))
    monkeypatch.chdir("/")
    elsewhere = compose(first.experiment, first.overrides)
    assert run_id(resolve(elsewhere)) == first.id, "its job may start in another folder"
