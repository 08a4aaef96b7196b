"""A task of a user's own, added by registration: further inputs reach cache, network, judges and samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from core.backbones.base import Backbone, Cond
from core.backbones.tiny import write_tiny_sd
from core.backbones.unet import UNetBackbone
from core.config import ExperimentConfig, compose, from_yaml, resolve, to_yaml
from core.data.requests import Requests
from core.data.shards import Example
from core.identity import run_id
from core.run import Run
from core.sampler import Sampler, Setting
from core.schema import BackboneConfig, TaskConfig, check_range, register_schema
from core.tasks.base import Task
from experiments.build import FAMILIES, TASKS, build_backbone, build_data, build_task
from experiments.cli import main
from experiments.evaluate import Split
from experiments.session import Session, load_run
from experiments.train import train_config
from tests.contracts import toys


@dataclass
class CoarseConfig(TaskConfig):
    """Pictures from a text and a coarse picture."""

    name: str = "toy_coarse"
    factor: int = 8  # pixels of the picture in one of the coarse one

    def validate(self) -> None:
        check_range("task.factor", self.factor, 1)


class Coarse(Task):
    """Super-resolution in miniature: the coarse picture is encoded like a picture, and added to what is denoised."""

    inputs: ClassVar[tuple[str, ...]] = ("coarse",)

    def further_inputs(self, image: np.ndarray, example: Example, variant: int) -> dict[str, np.ndarray]:
        step = self.config.factor
        return {"coarse": np.repeat(np.repeat(image[::step, ::step], step, 0), step, 1)}

    def encode_inputs(self, backbone: Backbone, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {"coarse": backbone.encode(inputs["coarse"])}


class CoarseUNet(UNetBackbone):
    """A family that reads the further input."""

    seen: ClassVar[list[Tensor]] = []

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen.append(cond.tensors["coarse"])
        return super().network(role, x_t + cond.tensors["coarse"], t, cond)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The task and the family, gone after the test."""
    with toys.forgotten_afterwards():
        register_schema("task", "toy_coarse", CoarseConfig)
        register_schema("backbone", "coarse_unet", BackboneConfig)
        TASKS["toy_coarse"] = Coarse
        FAMILIES["coarse_unet"] = CoarseUNet
        yield


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    own = [
        "task=toy_coarse", "backbone=coarse_unet", "backbone.family=coarse_unet",
        f"backbone.path={write_tiny_sd(tmp_path / 'tiny')}", "train.budget.amount=8", "data.num_variants=1",
        f"execution.runs_dir={tmp_path}/runs", f"execution.cache_dir={tmp_path}/cache",
        "execution.sample_every_images=8", "eval.metrics=[kd_effnet]", "eval.num_images=4", "eval.num_reference=8",
        "eval.steps=[1]", "eval.splits=[train]",
    ]  # fmt: skip
    return resolve(compose("flash/tiny", own))


def test_it_trains_is_measured_and_sampled_like_ours(config: ExperimentConfig, tmp_path: Path) -> None:
    assert train_config(config, evaluate=True) == 0
    run = Run.open(run_id(config), tmp_path / "runs")
    assert run.state() == "done" and (run.path / "samples" / "0000000008.png").exists()
    (line,) = run.evals()
    assert line["protocol_fields"]["task"] == "toy_coarse"
    assert line["protocol_fields"]["prompts_hash"] == Split(config, "train").requests.hash
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "list.jsonl").write_text(json.dumps({"text": "apple", "coarse": "red.png"}))
    out = tmp_path / "out"
    assert main(["sample", str(run.path), f"@{tmp_path}/list.jsonl", "--teacher-steps", "2", "--out", str(out)]) == 0
    assert (out / "sheet.png").exists()


def test_a_prompt_alone_is_told_before_anything_is_loaded(
    config: ExperimentConfig, capsys: pytest.CaptureFixture
) -> None:
    run = Run.create(config)
    assert main(["sample", str(run.path), "apple"]) == 2
    assert capsys.readouterr().err == (
        "error: 'apple': this run's task needs more than a prompt (coarse); give @FILE.jsonl\n"
    )


def test_a_pictures_own_input_is_cached_beside_it(config: ExperimentConfig) -> None:
    backbone, task = build_backbone(config), build_task(config)
    data = build_data(config, backbone)
    batch = data.batch(np.arange(3))
    assert batch.cond.tensors["coarse"].shape == batch.x0.shape and "coarse" not in batch.null.tensors
    split = Split(config, "train")
    for row, number in enumerate(data.items(np.arange(3))):
        (example,) = [e for e in split._dataset if e.key == data.cache.keys[number]]
        expected = task.encode_inputs(backbone, {"coarse": task.item(example, int(number)).inputs["coarse"][None]})
        torch.testing.assert_close(batch.cond.tensors["coarse"][row], expected["coarse"][0], atol=2e-3, rtol=1e-3)


def test_guidance_keeps_the_inputs_of_each_picture(config: ExperimentConfig) -> None:
    run = Run.create(config)
    session, _ = load_run(run.path, images=0)
    pictures = np.stack([np.full((64, 64, 3), shade, dtype=np.uint8) for shade in (0, 255)])
    CoarseUNet.seen.clear()
    drawn = _draw(session, Requests(("apple", "apple"), {"coarse": pictures}))
    both = CoarseUNet.seen[0]
    expected = session.backbone.encode(pictures)
    torch.testing.assert_close(both, torch.cat([expected, expected]))
    swapped = _draw(session, Requests(("apple", "apple"), {"coarse": pictures[::-1].copy()}))
    assert (drawn[0] != swapped[0]).any() and (drawn[1] != swapped[1]).any()


def _draw(session: Session, requests: Requests) -> np.ndarray:
    return session.sample(requests, Setting("teacher", Sampler("ddim", 1, guidance=3.0))).images


def test_its_settings_are_a_part_of_the_run_and_of_what_is_cached(config: ExperimentConfig, tmp_path: Path) -> None:
    assert from_yaml(to_yaml(config)) == config and isinstance(config.task, CoarseConfig)
    build_data(config, build_backbone(config))
    before = run_id(config)
    config.task.factor = 4
    assert run_id(config) != before
    build_data(config, build_backbone(config))
    assert len(list((tmp_path / "cache" / "latents").glob("*/latents.npy"))) == 2
