"""The command around a training: what was left unfinished is begun again, what is done is left alone."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.backbones.base import Backbone
from core.config import ExperimentConfig, compose, resolve
from core.run import Run
from core.training.loop import Trainer
from core.training.player import TrainedPlayer
from core.training.world import World
from experiments import train
from experiments.build import build_backbone, build_method
from experiments.cli import main
from experiments.sheet import contact_sheet
from experiments.train import train_config
from tests import worlds


@pytest.mark.parametrize("experiment", ["teacher/tiny", "flash/tiny"])
def test_a_killed_run_is_begun_again_and_a_finished_one_is_not(experiment: str) -> None:
    config = resolve(compose(experiment, ["execution.num_threads=1"]))
    run = Run.create(config)
    with run.lock():
        run.begin_attempt()  # and nobody ends it: the process was killed
    assert run.state() == "failed"
    assert train_config(config) == 0
    assert run.state() == "done" and len(list((run.path / "attempts").iterdir())) == 2
    assert train_config(config) == 0
    assert len(list((run.path / "attempts").iterdir())) == 2


def test_a_finished_run_without_its_last_sheet_gets_the_one_that_training_had_drawn() -> None:
    small = ["eval.metrics=[diversity]", "eval.splits=[train]", "eval.steps=[1]", "execution.sample_every_images=1000"]
    config = resolve(compose("flash/tiny", [*small, "execution.num_threads=1"]))
    assert train_config(config) == 0
    (sheet,) = (Run.create(config).path / "samples").iterdir()
    drawn = sheet.read_bytes()
    sheet.unlink()
    assert train_config(config) == 0 and not sheet.exists()
    assert train_config(config, evaluate=True) == 0
    assert sheet.read_bytes() == drawn


@pytest.mark.slow
def test_a_sharded_training_is_released_before_its_run_is_measured(tmp_path: Path) -> None:
    """What is measured is held whole: beside the training's parts it would not fit on a device."""

    def work(world: World) -> None:
        launched = {"RANK": world.rank, "WORLD_SIZE": 2, "LOCAL_RANK": world.rank, "MASTER_ADDR": "-", "MASTER_PORT": 0}
        os.environ |= {name: str(value) for name, value in launched.items()}
        measured, kinds = [], (Backbone, Trainer, TrainedPlayer)

        def evaluate(config: ExperimentConfig, run: Run) -> int:
            measured.append([found for found in gc.get_objects() if issubclass(type(found), kinds)])
            return 0

        train._evaluate = evaluate
        small = ["execution.sharding=fsdp", f"execution.runs_dir={tmp_path}/runs", f"execution.cache_dir={tmp_path}"]
        config = resolve(compose("flash/tiny", [*small, "train.budget.amount=8", "eval.at=[1.0]"]))
        assert train.train_config(config, evaluate=True) == 0
        assert measured == [[]] * world.is_main

    worlds.together(tmp_path, work)


def test_the_sheet_shows_the_steps_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def sheet(prompts: list[str], labels: list[str], images: np.ndarray) -> Image.Image:
        shown.append(labels)
        return contact_sheet(prompts, labels, images)

    monkeypatch.setattr("experiments.train.contact_sheet", sheet)
    for steps in ("[8]", "[1,2,4]"):
        assert train_config(resolve(compose("flash/tiny", [f"eval.steps={steps}", f"seed={len(shown) + 7}"]))) == 0
    assert len(shown) == 4  # each training draws two
    own = [[label.partition(" steps")[0] for label in labels if label.startswith("student")] for labels in shown[::2]]
    assert own == [["student 8"], ["student 4", "student 1 step"]]


def test_own_prompts_are_what_sheets_show_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = []

    def sheet(prompts: list[str], labels: list[str], images: np.ndarray) -> Image.Image:
        shown.append(list(prompts))
        return contact_sheet(prompts, labels, images)

    monkeypatch.setattr("experiments.train.contact_sheet", sheet)
    Path("mine.txt").write_text("a red apple\n\na boat\n")
    small = ["eval.metrics=[diversity]", "eval.splits=[train]", "eval.steps=[1]", "execution.sample_every_images=16"]
    own = resolve(compose("flash/tiny", [*small, "eval.prompts=@mine.txt"]))
    assert train_config(own, evaluate=True) == 0
    assert shown == [["a red apple", "a boat"]] * 2
    run, protocols = Run.create(own), {line["protocol"] for line in Run.create(own).evals()}
    told = [line for line in (run.path / "log.txt").read_text().splitlines() if "  sheet after " in line]
    assert [line.partition("sheet ")[2] for line in told] == [
        f"after {images} images: {run.path / 'samples' / f'{images:010d}.png'}" for images in (16, 32)
    ]
    assert main(["sample", str(run.path), "--steps", "1", "--teacher-steps", "0", "--out", "drawn"]) == 0
    assert {entry["prompt"] for entry in json.loads(Path("drawn/samples.json").read_text())["files"]} == set(shown[0])
    other = resolve(compose("flash/tiny", small))
    assert Run.create(other).id == run.id, "what sheets show is no part of a run"
    assert train_config(other, evaluate=True) == 0
    assert {line["protocol"] for line in run.evals()} == protocols, "nor of a number"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("@gone.txt", "eval.prompts=@gone.txt: no such file"),
        ("@empty.txt", "eval.prompts: prompts file empty.txt has no prompt; write one a line"),
        ("@list.jsonl", "eval.prompts: list.jsonl, line 1: not an object with the keys text"),
    ],
)
def test_wrong_prompts_are_told_before_a_run_has_a_folder(
    given: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("\n")
    Path("list.jsonl").write_text('{"prompt": "x"}\n')
    assert main(["train", "flash/tiny", f"eval.prompts={given}"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n" and not Path("runs").exists()


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd3", "tiny_flux2"])
def test_training_holds_no_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    held, iterations = [], Trainer.iterations

    def watched(self: Trainer, until: float) -> Iterator[None]:
        held.append([name for name in self.method.backbone.text_encoders if name in vars(self.method.backbone)])
        yield from iterations(self, until)
        held.append([name for name in self.method.backbone.text_encoders if name in vars(self.method.backbone)])

    monkeypatch.setattr(Trainer, "iterations", watched)
    short = ["data.view=plain", "data.split=train", "train.budget.amount=2", "train.budget.unit=iterations"]
    worlds.trained_on_pictures(tmp_path, "flash/tiny", f"backbone={family}", *short)  # draws a sheet, too
    assert held == [[], []]


@pytest.mark.parametrize("sharing", ["lora", "full"])
def test_a_network_to_be_sharded_waits_on_the_host(monkeypatch: pytest.MonkeyPatch, sharing: str) -> None:
    """Elsewhere than on the device ("meta" stands for a GPU), and so does what trains in it; copies take no memory."""
    monkeypatch.setattr("experiments.build.device_of", lambda config: torch.device("meta"))
    config = resolve(compose("dmd2/tiny", [f"backbone.sharing={sharing}", "train.state_dtype=bf16", "method.gan=off"]))
    backbone = build_backbone(config, to_be_sharded=True)
    method = build_method(config, backbone)
    parameters = [p for network in backbone.networks() for p in network.parameters()]
    assert {p.device.type for p in parameters} == {"cpu"} and backbone.device.type == "meta"
    trained = {id(p) for player in method.players() for p in player.parameters.values()}
    assert trained <= {id(p) for p in parameters} and all(
        p.dtype == torch.bfloat16 for p in parameters if p.requires_grad
    )
    own = backbone.role_parameters("teacher") if sharing == "full" else parameters
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(own)
