"""Measure a run: every metric on every split and number of steps, each value with its protocol; skip what is
there.

All rows of a table sample the same prompts from the same noise (sampling seed 0), whatever seed a student was
trained with. Prompts and real images come from the split's own views (core/data/prompts.py).
"""

from __future__ import annotations

import functools
import hashlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.backbones.base import Backbone
from core.config import ExperimentConfig, UserError
from core.data.prompts import PromptList, dataset_prompts, reference_images
from core.data.shards import open_dataset
from core.identity import locate
from core.metrics.clip import ClipJudge, load_clip
from core.metrics.fid import teacher_extractor
from core.metrics.measure import METRICS, Judges, Reference
from core.metrics.protocol import Protocol, file_sha256, sampler_name
from core.run import Run
from experiments.build import view_function
from experiments.session import Session, Setting
from experiments.target import load_target, open_target

SAMPLING_SEED = 0
CHUNK = 512  # images sampled and judged at a time
PROBE = 32  # reference images that enter the identity of a reference set

EMOJI_CLIP = "package:experiments/emoji/assets/emoji-clip-v1"


def settings(config: ExperimentConfig) -> list[Setting]:
    """The student at each of eval.steps; a method that trains nothing is the teacher as its config says."""
    method = config.method
    if not method.trains:
        return [Setting("teacher", method.solver, method.steps, float(method.guidance))]
    sampler, eta = config.eval.sampler, config.eval.eta
    return [Setting(config.eval.weights, sampler, steps, 1.0, eta) for steps in config.eval.steps]


class Split:
    """Prompts and real images of one split of the run's data."""

    def __init__(self, config: ExperimentConfig, name: str) -> None:
        self.name, self._config = name, config
        self._dataset = open_dataset(locate(config.data.path), name)
        self._view = view_function(config.data)

    @cached_property
    def prompts(self) -> PromptList:
        return dataset_prompts(self._dataset, self._view, self._config.eval.num_images)

    @cached_property
    def diversity_prompts(self) -> PromptList:
        return self.prompts.distinct(self._config.eval.num_diversity_prompts)

    @cached_property
    def reference(self) -> Reference:
        """Identified by data, view and count, and by its first images: changed view code is another set."""
        data, count = self._config.data, self._config.eval.num_reference
        digest = hashlib.blake2b(f"{data.data_hash} {data.view} {self.name} {count}".encode(), digest_size=8)
        for image in self._images(min(PROBE, count)):
            digest.update(image.tobytes())
        return Reference(digest.hexdigest(), count, lambda: self._images(count))

    def _images(self, count: int) -> Iterator[np.ndarray]:
        return reference_images(self._dataset, self._view, count)


def evaluate(session: Session, run: Run, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Measure what is missing at the session's weights; returns all values wanted, old and new."""
    config = session.config
    if "diversity" in config.eval.metrics and config.eval.images_per_prompt < 2:
        raise UserError("eval.images_per_prompt=1 has no diversity; give at least 2")
    judges = make_judges(config, session.backbone)
    wanted = []
    for split in (Split(config, name) for name in config.eval.splits):
        for setting in settings(config):
            known = _known(run, split, setting, session.images)
            protocols = {m: protocol(m, config, split, setting, judges) for m in config.eval.metrics}
            missing = [m for m, p in protocols.items() if p.id not in known]
            if missing:
                say(f"{split.name}  {setting.weights}  {setting.steps} steps: {', '.join(missing)}")
            values = measure(session, split, setting, missing, judges)
            for metric, value in values.items():
                run.append_eval(record(protocols[metric], setting, session, value))
            known = _known(run, split, setting, session.images)
            wanted.extend(known[p.id] for p in protocols.values())
    return wanted


def measure(
    session: Session, split: Split, setting: Setting, metrics: Sequence[str], judges: Judges
) -> dict[str, float]:
    """The values of ``metrics``; images are made once for all metrics that look at the same prompts."""
    out: dict[str, float] = {}
    for grouped in (False, True):
        names = [m for m in metrics if METRICS[m].grouped == grouped]
        if not names:
            continue
        k = session.config.eval.images_per_prompt if grouped else 1
        prompts = split.diversity_prompts.repeated(k) if grouped else split.prompts
        asked = sorted({METRICS[m].judge for m in names})
        chunks = [
            {judge: judges.outputs(judge, images, texts) for judge in asked}
            for images, texts in _sampled(session, setting, prompts)
        ]
        for name in names:
            metric = METRICS[name]
            outputs = np.concatenate([chunk[metric.judge] for chunk in chunks])
            outputs = outputs.reshape(-1, k, outputs.shape[-1]) if grouped else outputs
            needs = metric.needs_reference
            reference = judges.reference_features(metric.judge, split.reference) if needs else None
            out[name] = metric.value(outputs, reference)
    return out


def _sampled(session: Session, setting: Setting, prompts: PromptList) -> Iterator[tuple[np.ndarray, tuple[str, ...]]]:
    for first in range(0, len(prompts), CHUNK):
        texts = prompts.prompts[first : first + CHUNK]
        yield session.sample(texts, setting, SAMPLING_SEED, first=first), texts


def protocol(metric: str, config: ExperimentConfig, split: Split, setting: Setting, judges: Judges) -> Protocol:
    """The identity of one value of ``metric``."""
    spec, judge = METRICS[metric], judges.identity(METRICS[metric].judge)
    prompts = split.diversity_prompts if spec.grouped else split.prompts
    k = config.eval.images_per_prompt if spec.grouped else 1
    return Protocol(
        metric=metric,
        scale=config.scale,
        split=split.name,
        data_hash=config.data.data_hash,
        prompts_hash=prompts.hash,
        num_images=len(prompts) * k,
        images_per_prompt=k,
        judge=judge.name,
        judge_hash=judge.hash,
        resize=judge.resize,
        estimator=spec.estimator,
        reference_hash=split.reference.hash if spec.needs_reference else "",
        num_reference=split.reference.count if spec.needs_reference else 0,
        solver=sampler_name(setting.solver, setting.eta),
        steps=setting.steps,
        guidance=setting.guidance,
        sampling_seed=SAMPLING_SEED,
    )


def record(protocol: Protocol, setting: Setting, session: Session, value: float) -> dict[str, Any]:
    """A line of evals.jsonl; its ``images`` were seen by the student."""
    return {
        "metric": protocol.metric,
        "value": value,
        "n": protocol.num_images,
        "protocol": protocol.id,
        "protocol_fields": protocol.fields(),
        "split": protocol.split,
        "nfe": session.nfe(setting),
        "steps": setting.steps,
        "guidance": setting.guidance,
        "weights": setting.weights,
        "images": session.images,
        "seed": protocol.sampling_seed,
    }


def _known(run: Run, split: Split, setting: Setting, images: int) -> dict[str, dict[str, Any]]:
    """Recorded values of this split, setting and position, by protocol id."""
    key = (split.name, setting.steps, setting.weights, images)
    return {
        line["protocol"]: line
        for line in run.evals()
        if (line["split"], line["steps"], line["weights"], line["images"]) == key
    }


def make_judges(config: ExperimentConfig, backbone: Backbone) -> Judges:
    """The judging networks of this run's eval group; CLIP in-domain at emoji scale, else eval.clip_path."""
    device = str(backbone.device)
    return Judges(
        lambda: _load_clip(config, device),
        lambda: teacher_extractor(backbone, config.backbone.weights_hash),
        Path(config.execution.cache_dir),
        device,
        config.eval.extractor_path,
        config.eval.inception_path,
    )


def _load_clip(config: ExperimentConfig, device: str) -> ClipJudge:
    if config.eval.clip_path is not None:
        return load_clip(str(locate(config.eval.clip_path)), device)
    if config.data.view != "emoji":
        raise UserError("clip_score needs eval.clip_path: an open_clip folder, NAME:FILE, or ViT-bigG-14")
    from experiments.emoji.judge import load_emoji_clip

    folder = locate(EMOJI_CLIP)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"clip_score needs eval.clip_path or the in-domain judge in {folder}")
    model, preprocess, tokenize = load_emoji_clip(folder)
    digest = "+".join(file_sha256(file) for file in weights)
    model = model.to(device).eval()
    return ClipJudge(folder.name, digest, "native", model, preprocess, tokenize, torch.device(device))


def run_command(arguments: Namespace) -> int:
    """``fewstep evaluate RUN``: measure what is missing, print all values."""
    if arguments.finished:
        run = open_target(arguments.target, arguments.overrides, arguments.runs_dir)
        if run.state() != "done":
            raise UserError(f"run {run.id} is {run.state()}, not done: nothing is measured")
    session, run = load_target(arguments.target, arguments.overrides, arguments.runs_dir)
    print(table(evaluate(session, run, functools.partial(print, flush=True))))
    print(f"-> {run.path / 'evals.jsonl'}")
    return 0


def table(records: Sequence[dict[str, Any]]) -> str:
    """Values as text: one row per split and number of steps, one column per metric."""
    metrics = list(dict.fromkeys(line["metric"] for line in records))
    rows: dict[tuple, dict[str, float]] = {}
    for line in records:
        key = (line["split"], line["weights"], line["steps"], line["nfe"])
        rows.setdefault(key, {})[line["metric"]] = line["value"]
    header = ["split", "weights", "steps", "nfe", *metrics]
    cells = [[*map(str, key), *(f"{row[m]:.4g}" for m in metrics)] for key, row in rows.items()]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in [header, *cells]]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    from experiments.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
