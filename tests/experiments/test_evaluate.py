"""Evaluation: each value under its protocol, measured once; images made once for all metrics that share
them."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from core.config import UserError, compose, resolve
from core.data.requests import Requests, dataset_requests, reference_images
from core.data.shards import open_dataset
from core.identity import locate
from core.metrics.cost import SamplingCost
from core.metrics.diversity import prompt_diversity
from core.metrics.fid import kernel_distance, load_extractor
from core.run import Run
from core.sampler import Sampler, Setting
from experiments.build import build_task
from experiments.evaluate import evaluate, table
from experiments.session import Pictures

COST_OF_A_STEP = 3  # network evaluations: no formula of steps and guidance knows it


class Recorder:
    """A session whose image i is a flat colour of its position, steps and guidance; it remembers every
    call."""

    def __init__(self, run: Run, images: int = 32) -> None:
        self.config, self.images, self.calls = run.config, images, []
        self.backbone = SimpleNamespace(device="cpu")

    def unchanged(self) -> AbstractContextManager:
        return nullcontext()

    def sample(self, requests: Requests, setting: Setting, seed: int, *, first: int) -> Pictures:
        self.calls.append((len(requests), setting, seed, first))
        steps = setting.sampler.steps
        cost = SamplingCost(len(requests), {setting.weights: COST_OF_A_STEP * steps * len(requests)})
        return Pictures(pictures(len(requests), steps, first), cost)


def pictures(count: int, steps: int, first: int = 0) -> np.ndarray:
    shades = (37 * np.arange(first, first + count) + 50 * steps) % 256
    images = np.broadcast_to(shades.astype(np.uint8)[:, None, None, None], (count, 64, 64, 3)).copy()
    images[:, :32, :, 0] = 255 - images[:, :32, :, 0]
    return images


@pytest.fixture
def make_run(tmp_path: Path):  # noqa: ANN201  (experiment, overrides) -> Run
    def make(experiment: str = "flash/tiny", *overrides: str) -> Run:
        paths = [f"execution.runs_dir={tmp_path}/runs", f"execution.cache_dir={tmp_path}/cache"]
        small = ["eval.metrics=[kd_effnet,diversity]", "eval.steps=[1,4]", "eval.splits=[heldout]"]
        return Run.create(resolve(compose(experiment, [*paths, *small, *overrides])))

    return make


def test_values_are_those_of_the_metrics_on_the_splits_own_prompts(make_run) -> None:  # noqa: ANN001
    run = make_run()
    lines = evaluate(Recorder(run), run, say=lambda text: None)
    data = run.config.data
    dataset, item_of = open_dataset(locate(data.path), "heldout"), build_task(run.config).item
    extractor = load_extractor("effnet")
    real = extractor(np.stack(list(reference_images(dataset, item_of, run.config.eval.num_reference))))
    values = {(line["metric"], line["steps"]): line["value"] for line in lines}
    for steps in (1, 4):
        expected = kernel_distance(extractor(pictures(8, steps)), real)
        assert values["kd_effnet", steps] == pytest.approx(expected, rel=1e-4)
        grouped = extractor(pictures(4, steps)).reshape(2, 2, -1)
        assert values["diversity", steps] == pytest.approx(prompt_diversity(grouped).mean(), rel=1e-4)
    fields = {line["metric"]: line["protocol_fields"] for line in lines}
    assert fields["kd_effnet"]["prompts_hash"] == dataset_requests(dataset, item_of, 8).hash
    assert (fields["diversity"]["num_images"], fields["diversity"]["images_per_prompt"]) == (4, 2)
    costs = [(line["metric"], line["nfe"]) for line in lines]
    assert costs == [("kd_effnet", 3), ("diversity", 3), ("kd_effnet", 12), ("diversity", 12)], "as counted"


def test_nothing_is_measured_twice_and_new_metrics_join(make_run) -> None:  # noqa: ANN001
    run = make_run()
    first = evaluate(Recorder(run), run, say=lambda text: None)
    again = Recorder(run)
    assert evaluate(again, run, say=lambda text: None) == first
    assert again.calls == []
    run.config.eval.metrics.append("fd_effnet")
    run.config.eval.steps.append(2)
    more = Recorder(run)
    lines = evaluate(more, run, say=lambda text: None)
    assert [setting.sampler.steps for _, setting, _, _ in more.calls] == [1, 4, 2, 2], (
        "one pass per missing metric's images"
    )
    assert len(lines) == 9 and len(run.evals()) == 9
    evaluate(Recorder(run, images=64), run, say=lambda text: None)
    assert len(run.evals()) == 18, "another position of the training is another value"


def test_rows_of_a_table_are_comparable_and_changed_counts_are_not(make_run) -> None:  # noqa: ANN001
    from core.metrics.protocol import comparable_id

    def ids(run: Run, session: Recorder) -> dict[str, set[str]]:
        lines = evaluate(session, run, say=lambda text: None)
        out: dict[str, set[str]] = {}
        for line in lines:
            out.setdefault(line["metric"], set()).add(comparable_id(line["protocol_fields"]))
        return out

    student, teacher = make_run(), make_run("flash/tiny", "seed=1")
    of_student = ids(student, Recorder(student))
    assert all(len(values) == 1 for values in of_student.values())
    assert ids(teacher, Recorder(teacher)) == of_student, "the training seed is no part of the protocol"
    student.config.eval.num_reference = 12
    changed = ids(student, Recorder(student))
    assert changed["kd_effnet"].isdisjoint(of_student["kd_effnet"])
    assert changed["diversity"] == of_student["diversity"]


def test_the_teacher_is_sampled_as_its_configuration_says() -> None:
    config = compose("teacher/emoji", ["method.steps=5", "method.guidance=3", "method.solver=ddim"])
    assert config.settings() == [Setting("teacher", Sampler("ddim", 5, 3.0))]


def test_students_are_sampled_without_guidance_at_every_number_of_steps(make_run) -> None:  # noqa: ANN001
    run = make_run("flash/tiny", "eval.metrics=[kd_effnet]", "eval.weights=ema")
    session = Recorder(run)
    evaluate(session, run, say=lambda text: None)
    assert session.calls == [(8, Setting("ema", Sampler("lcm", steps)), 0, 0) for steps in (1, 4)]


def test_wrong_requests_are_one_clear_line(make_run) -> None:  # noqa: ANN001
    run = make_run("flash/tiny", "eval.images_per_prompt=1")
    with pytest.raises(UserError, match="eval.images_per_prompt=1 has no diversity; give at least 2"):
        evaluate(Recorder(run), run)
    run.config.eval.metrics = ["fid"]
    with pytest.raises(UserError, match="fid and kid need eval.inception_path"):
        evaluate(Recorder(run), run)
    run.config.eval.metrics, run.config.eval.clip_path = ["clip_score"], "nowhere"
    with pytest.raises(UserError, match="clip model 'nowhere' is neither a folder nor an open_clip"):
        evaluate(Recorder(run), run)


def test_table_has_one_row_per_way_of_sampling() -> None:
    base = {"split": "train", "weights": "student", "nfe": 4, "steps": 4}
    text = table(
        [
            base | {"metric": "kd_effnet", "value": 1.23456},
            base | {"metric": "diversity", "value": 0.5},
            base | {"metric": "kd_effnet", "value": 12.0, "steps": 1, "nfe": 1},
            base | {"metric": "diversity", "value": 0.25, "steps": 1, "nfe": 1},
        ]
    )
    assert [line.split() for line in text.splitlines()] == [
        ["split", "weights", "steps", "nfe", "kd_effnet", "diversity"],
        ["train", "student", "4", "4", "1.235", "0.5"],
        ["train", "student", "1", "1", "12", "0.25"],
    ]
