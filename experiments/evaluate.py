"""Measure a run: every metric on every split and number of steps, each value with its protocol.

What is there already is not measured again.
All rows of a table sample the same prompts from the same noise (sampling seed 0), whatever seed a student was
trained with. Requests and real images come from the split's own views (core/data/requests.py).
"""

from __future__ import annotations

import functools
import hashlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from core.catalogue import METRICS
from core.config import ExperimentConfig, UserError
from core.data.requests import Requests, dataset_requests, reference_images
from core.metrics.cost import SamplingCost
from core.metrics.measure import Judges, Reference, value_of
from core.metrics.protocol import Protocol
from core.run import Run
from core.sampler import Setting
from experiments.build import build_task
from experiments.dataset import open_split
from experiments.judges import make_judges
from experiments.needs import lacking_images
from experiments.session import Session
from experiments.target import load_target, open_target

SAMPLING_SEED = 0
CHUNK = 512  # images sampled and judged at a time
PROBE = 32  # reference images that enter the identity of a reference set


class Split:
    """Requests and real images of one split of the run's data."""

    def __init__(self, config: ExperimentConfig, name: str) -> None:
        self.name, self._config = name, config
        self._dataset = open_split(config, name)
        self._item_of = build_task(config).item

    @cached_property
    def requests(self) -> Requests:
        return dataset_requests(self._dataset, self._item_of, self._config.eval.num_images)

    @cached_property
    def diversity_requests(self) -> Requests:
        return self.requests.distinct(self._config.eval.num_diversity_prompts)

    @cached_property
    def reference(self) -> Reference:
        """Identified by data, view and count, and by its first images: changed view code is another set."""
        data, count = self._config.data, self._config.eval.num_reference
        digest = hashlib.blake2b(f"{data.data_hash} {data.view} {self.name} {count}".encode(), digest_size=8)
        for image in self._images(min(PROBE, count)):
            digest.update(image.tobytes())
        return Reference(digest.hexdigest(), count, lambda: self._images(count))

    def _images(self, count: int) -> Iterator[np.ndarray]:
        return reference_images(self._dataset, self._item_of, count)


@dataclass(frozen=True)
class Measured:
    """A metric's value, and what the pictures that it was taken from cost."""

    value: float
    cost: SamplingCost


def evaluate(session: Session, run: Run, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Measure what is missing at the session's weights; returns all values wanted, old and new."""
    config = session.config
    for line in lacking_images(config):
        raise UserError(line)
    judges = make_judges(config, session.backbone)
    wanted = []
    for name in config.eval.splits:
        split = Split(config, name)
        with session.unchanged():
            for setting in config.settings():
                wanted.extend(_evaluate_setting(session, run, split, setting, judges, say))
    return wanted


def _evaluate_setting(
    session: Session, run: Run, split: Split, setting: Setting, judges: Judges, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure and record what is missing of one setting on one split; returns the records of all wanted metrics."""
    config = session.config
    known = _known(run, split, setting, session.images)
    protocols = {metric: protocol(metric, config, split, setting, judges) for metric in config.eval.metrics}
    missing = [metric for metric, wanted in protocols.items() if wanted.id not in known]
    if missing:
        say(f"{split.name}  {setting.weights}  {setting.sampler.steps} steps: {', '.join(missing)}")
    for metric, measured in measure(session, split, setting, missing, judges).items():
        run.append_eval(record(protocols[metric], setting, session.images, measured))
    known = _known(run, split, setting, session.images)
    return [known[wanted.id] for wanted in protocols.values()]


def measure(
    session: Session, split: Split, setting: Setting, metrics: Sequence[str], judges: Judges
) -> dict[str, Measured]:
    """The values of ``metrics``; pictures are drawn once for all metrics that look at the same requests."""
    single = [metric for metric in metrics if not METRICS[metric].grouped]
    grouped = [metric for metric in metrics if METRICS[metric].grouped]
    out: dict[str, Measured] = {}
    if single:
        out |= _measure_together(session, split, setting, single, judges, images_per_prompt=1)
    if grouped:
        count = session.config.eval.images_per_prompt
        out |= _measure_together(session, split, setting, grouped, judges, images_per_prompt=count)
    return out


def _measure_together(
    session: Session, split: Split, setting: Setting, metrics: Sequence[str], judges: Judges, images_per_prompt: int
) -> dict[str, Measured]:
    """Values of metrics that look at the same pictures: one of each request, or several of each of fewer."""
    is_grouped = images_per_prompt > 1
    requests = split.diversity_requests.repeated(images_per_prompt) if is_grouped else split.requests
    asked = sorted({METRICS[metric].judge.name for metric in metrics})
    said, cost = _judged(session, setting, requests, asked, judges)
    out = {}
    for name in metrics:
        metric = METRICS[name]
        judge = metric.judge.name
        outputs = said[judge]
        if is_grouped:
            outputs = outputs.reshape(-1, images_per_prompt, outputs.shape[-1])
        real = judges.reference_features(judge, split.reference) if metric.needs_reference else None
        out[name] = Measured(value_of(metric, outputs, real), cost)
    return out


def _judged(
    session: Session, setting: Setting, requests: Requests, asked: Sequence[str], judges: Judges
) -> tuple[dict[str, np.ndarray], SamplingCost]:
    """Draw a picture of each request, hold no more than CHUNK; what each judge says of them, and what they cost."""
    said: dict[str, list[np.ndarray]] = {judge: [] for judge in asked}
    cost = SamplingCost(0, {})
    for first in range(0, len(requests), CHUNK):
        part = requests[first : first + CHUNK]
        pictures = session.sample(part, setting, SAMPLING_SEED, first=first)
        cost += pictures.cost
        for judge in asked:
            said[judge].append(judges.network(judge).outputs(pictures.images, part))
    return {judge: np.concatenate(chunks) for judge, chunks in said.items()}, cost


def protocol(metric: str, config: ExperimentConfig, split: Split, setting: Setting, judges: Judges) -> Protocol:
    """The identity of one value of ``metric``."""
    spec = METRICS[metric]
    judge = judges.network(spec.judge.name)
    requests = split.diversity_requests if spec.grouped else split.requests
    k = config.eval.images_per_prompt if spec.grouped else 1
    return Protocol(
        metric=metric,
        scale=config.scale,
        split=split.name,
        data_hash=config.data.data_hash,
        prompts_hash=requests.hash,
        num_images=len(requests) * k,
        images_per_prompt=k,
        judge=judge.name,
        judge_hash=judge.hash,
        resize=judge.resize,
        estimator=spec.estimator,
        reference_hash=split.reference.hash if spec.needs_reference else "",
        num_reference=split.reference.count if spec.needs_reference else 0,
        sampling_seed=SAMPLING_SEED,
        task=config.task.name,
        **setting.sampler.protocol_fields(),
    )


def record(protocol: Protocol, setting: Setting, images: int, measured: Measured) -> dict[str, Any]:
    """A line of evals.jsonl; ``images`` were seen by the student."""
    return {
        "metric": protocol.metric,
        "value": measured.value,
        "n": protocol.num_images,
        "protocol": protocol.id,
        "protocol_fields": protocol.fields(),
        "split": protocol.split,
        "nfe": measured.cost.nfe,
        "steps": setting.sampler.steps,
        "guidance": setting.sampler.guidance,
        "weights": setting.weights,
        "images": images,
        "seed": protocol.sampling_seed,
    }


def _known(run: Run, split: Split, setting: Setting, images: int) -> dict[str, dict[str, Any]]:
    """Recorded values of this split, setting and position, by protocol id."""
    key = (split.name, setting.sampler.steps, setting.weights, images)
    return {
        line["protocol"]: line
        for line in run.evals()
        if (line["split"], line["steps"], line["weights"], line["images"]) == key
    }


def run_command(arguments: Namespace) -> int:
    """``fewstep evaluate RUN``: measure what is missing, print all values."""
    run = open_target(arguments.target, arguments.overrides, arguments.runs_dir)
    if arguments.finished and run.state() != "done":
        raise UserError(f"run {run.id} is {run.state()}, not done: nothing is measured")
    session = load_target(run)
    print(table(evaluate(session, run, functools.partial(print, flush=True))))
    print(f"-> {run.path / 'evals.jsonl'}")
    return 0


def table(records: Sequence[dict[str, Any]]) -> str:
    """Values as text: one row for each way of sampling on each split, one column for each metric."""
    metrics = list(dict.fromkeys(line["metric"] for line in records))
    rows: dict[tuple, dict[str, str]] = {}
    for line in records:
        key = (line["split"], line["weights"], line["steps"], line["nfe"])
        rows.setdefault(key, {})[line["metric"]] = f"{line['value']:.4g}"
    lines = [["split", "weights", "steps", "nfe", *metrics]]
    for key, values in rows.items():
        lines.append([*map(str, key), *(values[metric] for metric in metrics)])
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text)


if __name__ == "__main__":
    from experiments.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
