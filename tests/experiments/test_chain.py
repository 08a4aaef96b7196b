"""A chain of rounds, each a run of its own that is trained, resumed, sampled and exported by the ordinary commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from core.backbones.adapters import merge_into, stacked
from core.backbones.base import PARENT, STUDENT, TEACHER
from core.config import ExperimentConfig, UserError, compose, resolve
from core.run import Run
from core.sampler import Sampler, Setting
from core.training.checkpoint import latest_snapshot
from experiments.build import build_backbone, build_method
from experiments.export import export
from experiments.needs import missing_needs
from experiments.parents import read_weights
from experiments.session import load_run, sheet_requests
from experiments.train import PREEMPTED, train_config
from tests import worlds

COMMON = [
    "train.budget.amount=8", "method.student_lr=1e-2", "backbone.lora_alpha=8",
    "execution.num_threads=1", "eval.prompts=red apple", "eval.metrics=[]", "execution.sample_every_images=1000",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    worlds.pictures(folder)
    return folder


def configuration(home: Path, sharing: str, *overrides: str) -> ExperimentConfig:
    where = [f"execution.runs_dir={home}/runs", f"execution.cache_dir={home}/cache", f"backbone.sharing={sharing}"]
    return resolve(compose("progressive/tiny", [*COMMON, f"data.path={home}/pictures", *where, *overrides]))


@pytest.fixture(scope="module", params=["lora", "full"])
def chain(request: pytest.FixtureRequest, home: Path) -> list[ExperimentConfig]:
    """Rounds of 8 to 4, 4 to 2 and 2 to 1 steps."""
    configs: list[ExperimentConfig] = []
    for steps in (4, 2, 1):
        counts = [f"method.teacher_steps={2 * steps}", f"method.student_steps={steps}", f"eval.steps=[{steps}]"]
        parent = [f"train.init_from={Run.create(configs[-1]).id}", "method.teacher=parent"] if configs else []
        configs.append(configuration(home, request.param, *counts, *parent))
        assert train_config(configs[-1]) == 0
    return configs


def folder_of(config: ExperimentConfig) -> Path:
    return Run.create(config).path


def snapshot_of(config: ExperimentConfig) -> Path:
    found = latest_snapshot(folder_of(config) / "snapshots")
    assert found is not None
    return found


def draw(config: ExperimentConfig, steps: int, weights: str = "student") -> np.ndarray:
    session, _ = load_run(folder_of(config))
    solver = Sampler("ddim", steps)
    return session.sample(sheet_requests(session.config, session.task), Setting(weights, solver)).images


def test_each_rounds_teacher_draws_what_the_student_before_does(chain: list[ExperimentConfig]) -> None:
    """And that is another picture than the base's and than its own student's."""
    for before, config in zip(chain, chain[1:], strict=False):
        steps = before.method.student_steps
        students, teachers = draw(before, steps), draw(config, steps, "teacher")
        assert (students == teachers).mean() > 0.99, "but for the rounding of merged weights"
        assert (draw(config, steps) != teachers).mean() > 0.05


def test_a_round_begins_as_its_teacher(chain: list[ExperimentConfig]) -> None:
    """A new adapter, zero on what the base holds; a copy of the parent."""
    config = chain[-1]
    backbone = build_backbone(config)
    method = build_method(config, backbone, training=False)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 499])
    cond = backbone.encode_text(["red apple", ""])
    with torch.no_grad():
        ours, theirs = (backbone.predict(role, x_t, t, cond) for role in (STUDENT, method.teacher))
    torch.testing.assert_close(ours, theirs)
    sharing = config.backbone.sharing
    assert method.teacher == (TEACHER if sharing == "lora" else PARENT)
    files = {file.name for file in snapshot_of(config).iterdir()}
    assert files == {"student.safetensors", "merged.safetensors" if sharing == "lora" else "parent.safetensors"}


def test_all_rounds_of_adapters_leave_as_one(chain: list[ExperimentConfig], tmp_path: Path) -> None:
    """In diffusers, on the pipeline as it was published, the exported student is the one that was sampled."""
    session, run = load_run(folder_of(chain[-1]))
    backbone = session.backbone
    out = export(backbone, tmp_path / "out", Sampler("ddim", 1), run=run)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(backbone.source, safety_checker=None)
    if chain[0].backbone.sharing == "lora":
        pipe.load_lora_weights(out)
        factors = read_weights(snapshot_of(chain[-1]) / "merged.safetensors")
        assert {len(value) for name, value in factors.items() if ".lora_A." in name} == {8}, "of two rounds of 4"
    else:
        pipe.unet = diffusers.UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    x_t, t, text = torch.randn(1, 4, 8, 8), torch.tensor([999]), backbone.encode_text(["red apple"])
    with torch.no_grad():
        theirs = pipe.unet(x_t, t, encoder_hidden_states=text.tensors["text"]).sample
        ours = backbone.network(STUDENT, x_t, t, text)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_killed_round_ends_with_the_same_bits(chain: list[ExperimentConfig], home: Path, tmp_path: Path) -> None:
    config = chain[1]
    expected = read_weights(snapshot_of(config) / "student.safetensors")
    shutil.copytree(folder_of(chain[0]), tmp_path / "runs" / folder_of(chain[0]).name)
    counts = ["method.teacher_steps=4", "method.student_steps=2", "method.teacher=parent", "eval.steps=[2]"]
    words = [*counts, f"train.init_from={config.train.init_from}", f"execution.runs_dir={tmp_path}/runs"]
    cut = configuration(home, config.backbone.sharing, *words, "execution.stop_after_images=4")
    assert train_config(cut) == PREEMPTED
    again = configuration(home, config.backbone.sharing, *words)
    assert Run.create(again).id == Run.create(config).id and train_config(again) == 0
    found = read_weights(snapshot_of(again) / "student.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_changed_round_is_another_run_and_so_are_its_descendants(home: Path) -> None:
    def identity(rate: str) -> list[str]:
        first = configuration(home, "lora")
        second = configuration(home, "lora", f"method.student_lr={rate}", "method.teacher=parent",
                               f"train.init_from={'0' * 9}1")  # fmt: skip
        return [Run.create(config).id for config in (first, second)]

    (first, second), (same, other) = identity("1e-2"), identity("2e-2")
    assert first == same and second != other


def test_a_parent_that_diverged_or_is_not_done_is_one_line(home: Path) -> None:
    first = configuration(home, "lora", "seed=7")
    run = Run.create(first)
    child = configuration(home, "lora", "seed=7", "method.teacher=parent", f"train.init_from={run.id}")
    assert [line for line in missing_needs(child, evaluate=False) if "init_from" in line] == [
        f"train.init_from={run.id}: run {run.id} is not trained to its end; train it first"
    ]
    run.begin_attempt()
    run.end_attempt("diverged", "gradients not finite")
    assert [line for line in missing_needs(child, evaluate=False) if "init_from" in line] == [
        f"train.init_from={run.id}: run {run.id} has diverged (gradients not finite): nothing starts from it"
    ]


def test_a_later_round_needs_the_one_before(home: Path) -> None:
    with pytest.raises(UserError, match=r"method\.teacher=parent: train\.init_from is not set"):
        configuration(home, "lora", "method.teacher=parent")


def test_stacked_adapters_add_what_both_add() -> None:
    """Of layers and of convolutions, and of one that only the second has."""
    random = torch.Generator().manual_seed(0)

    def adapter(rank: int, *modules: str) -> dict[str, torch.Tensor]:
        shapes = {"0": ((rank, 3, 3, 3), (4, rank, 1, 1)), "1": ((rank, 5), (6, rank))}
        names = [(f"{name}.lora_{part}.weight", shapes[name]["AB".index(part)]) for name in modules for part in "AB"]
        return {name: torch.randn(shape, generator=random) for name, shape in names}

    first, second = adapter(2, "1"), adapter(3, "0", "1")
    networks = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(5, 6)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    before = networks[0][1].weight.clone()
    merge_into(networks[0], stacked(first, second))
    for factors in (first, second):
        merge_into(networks[1], factors)
    for ours, theirs in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    added = first["1.lora_B.weight"] @ first["1.lora_A.weight"] + second["1.lora_B.weight"] @ second["1.lora_A.weight"]
    torch.testing.assert_close(networks[0][1].weight, before + added)
    with pytest.raises(UserError, match="adapter of 1 does not fit this backbone"):
        merge_into(networks[0][:1], first)
