"""Sampling sessions: a backbone with a run's weights, and the pictures that it draws of requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.backbones.answers import Answers, Kept
from core.backbones.base import STUDENT, STUDENT_EMA, Cond
from core.config import ExperimentConfig, UserError, resolve
from core.data.requests import Requests, dataset_requests
from core.methods.base import Method
from core.methods.teacher import teacher_sample
from core.metrics.cost import SamplingCost
from core.randomness import Stream
from core.run import Run
from core.sampler import Setting
from core.tasks.base import Task
from core.tasks.given import given_requests
from core.training.checkpoint import MERGED, latest_snapshot
from experiments.build import build_backbone, build_method, build_task, load_role
from experiments.dataset import open_split
from experiments.parents import merges_parent, read_weights

WEIGHTS = {"student": STUDENT, "ema": STUDENT_EMA}
SHEET_PROMPTS = 8


@dataclass(frozen=True)
class Pictures:
    """The pictures of one call of ``Session.sample``, uint8 (B, H, W, 3), and the network evaluations that it took."""

    images: np.ndarray
    cost: SamplingCost


class Session:
    """A backbone with a run's weights, ready to sample; ``images`` is how many the student was trained on."""

    def __init__(self, config: ExperimentConfig, method: Method, images: int) -> None:
        self.config, self.method, self.images = config, method, images
        self.backbone = method.backbone
        self.task = build_task(config)
        self._encoded: dict[tuple[str, ...], Cond] = {}
        self._kept: Kept[Cond] | None = None
        self.null = self.backbone.encode_text([""])

    def encode_now(self, requests: Requests) -> None:
        """Encode texts now, so that ``sample`` of these requests needs no text encoder later."""
        for part in self._batches(requests):
            self._encoded[part.texts] = self.backbone.encode_text(part.texts)

    def _batches(self, requests: Requests) -> Iterator[Requests]:
        size = self.config.eval.batch_size
        return (requests[start : start + size] for start in range(0, len(requests), size))

    def _cond(self, requests: Requests) -> Cond:
        text = self._encoded.get(requests.texts)
        if text is None and self._kept is not None:
            text = self._kept.get(requests.texts, partial(self._encode, requests.texts))
        return (text or self._encode(requests.texts)).also(self.task.encode_inputs(self.backbone, requests.inputs))

    def _encode(self, texts: tuple[str, ...]) -> Cond:
        """Encode each text once, however often it is asked for."""
        distinct = list(dict.fromkeys(texts))
        rows = torch.tensor([distinct.index(text) for text in texts])
        encoded = self.backbone.encode_text(distinct)
        return encoded if len(distinct) == len(texts) else encoded[rows.to(self.backbone.device)]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """No weight changes inside: texts are encoded once, and samplers that begin alike share their first call."""
        self._kept = Kept(lambda cond: list(cond.tensors.values()))
        self.backbone.answers = Answers()
        try:
            yield
        finally:
            self._kept = self.backbone.answers = None

    def noises(self, count: int, positions: np.ndarray, seed: int) -> list[Tensor]:
        """Keyed noises of one sampling call: ``count`` of (B, C, H, W); position i always gets the same."""
        shape = self.backbone.latent_shape
        draws = [Stream(seed, "sample", f"noise {k}").normal(positions, shape) for k in range(count)]
        return [torch.from_numpy(draw).to(self.backbone.device) for draw in draws]

    @torch.no_grad()
    def sample(self, requests: Requests, setting: Setting, seed: int = 0, *, first: int = 0) -> Pictures:
        """Draw one picture of each request. Request i is at position ``first`` + i, which alone decides its noise."""
        images = []
        self.backbone.merge_again()
        with self.backbone.uncounted() as evaluations:
            for part in self._batches(requests):
                positions = np.arange(first, first + len(part))
                first += len(part)
                images.append(self.backbone.decode(self._latents(setting, part, positions, seed)))
        return Pictures(np.concatenate(images), SamplingCost(len(requests), evaluations))

    def _latents(self, setting: Setting, requests: Requests, positions: np.ndarray, seed: int) -> Tensor:
        sampler, cond = setting.sampler, self._cond(requests)
        if setting.weights == "teacher":
            noise = self.noises(1, positions, seed)[0]
            return teacher_sample(self.backbone, noise, cond, self.null, sampler, self.method.teacher)
        role = WEIGHTS[setting.weights]
        if not self.config.method.trains or role not in self.backbone.roles:
            raise UserError(
                f"weights={setting.weights}: this run has none; allowed: teacher, student, ema (train.ema_decay > 0)"
            )
        noises = self.noises(self.method.num_noises(sampler.steps), positions, seed)
        if self.backbone.answers is not None:
            self.backbone.answers.expect(noises[0], (requests.hash, positions.tobytes(), seed, sampler.guidance))
        return self.method.sample(role, noises, cond, self.null, sampler)


def sheet_requests(config: ExperimentConfig, task: Task) -> Requests:
    """The requests that sheets show: the run's own, or some of the last split (held out where there is one)."""
    own = own_requests(config, task)
    if own is not None:
        return own
    dataset = open_split(config, config.eval.splits[-1])
    return dataset_requests(dataset, task.item, 4 * SHEET_PROMPTS).distinct(SHEET_PROMPTS)


def own_requests(config: ExperimentConfig, task: Task) -> Requests | None:
    """The requests that ``eval.prompts`` names, read as on the command line; UserError for a mistake in them."""
    if config.eval.prompts is None:
        return None
    try:
        return given_requests([config.eval.prompts], task)
    except UserError as error:
        raise UserError(f"eval.prompts: {error}") from None


def load_run(
    path_or_id: Path | str,
    runs_dir: Path | str = "runs",
    overrides: dict[str, Any] | None = None,
    images: int | None = None,
) -> tuple[Session, Run]:
    """Open a run and build its session, at its newest snapshot or at the one after ``images`` training images.

    0 images: as its training began. ``overrides`` are execution fields (device, cache_dir).

    Raises:
        UserError: no such run or snapshot, or other base weights than the run was trained with.
    """
    run = Run.open(path_or_id, runs_dir)
    config = run.config
    for key, value in (overrides or {}).items():
        setattr(config.execution, key, value)
    stored = config.backbone.weights_hash
    resolve(config)
    if config.backbone.weights_hash != stored:
        raise UserError(f"backbone.path={config.backbone.path} holds other weights than run {run.id} was trained with")
    if images != 0:
        config.train.init_from = None  # the snapshot has the weights
    backbone = build_backbone(config)
    if config.train.init_from is None and merges_parent(config):
        backbone.merge_parent(read_weights(_snapshot_of(run, images) / f"{MERGED}.safetensors"))
    session = Session(config, build_method(config, backbone, training=False), 0)
    if session.config.method.trains and images != 0:
        load_snapshot(session, run, images)
    return session, run


def load_snapshot(session: Session, run: Run, images: int | None = None) -> None:
    """Give the session the weights of a run's newest snapshot, or of the one after ``images`` training images."""
    snapshot = _snapshot_of(run, images)
    for file in snapshot.glob("*.safetensors"):
        if file.stem in session.backbone.roles:
            load_role(session.backbone, file.stem, file)
    session.backbone.lay_out_for_sampling()
    session.images = int(snapshot.name)


def _snapshot_of(run: Run, images: int | None) -> Path:
    """The folder of the newest snapshot, or of the one after ``images``; UserError where there is none."""
    root = run.path / "snapshots"
    newest = latest_snapshot(root)
    if newest is None:
        raise UserError(f"run {run.id} has no snapshot yet ({run.state()}); train it first")
    snapshot = newest if images is None else root / f"{images:010d}"
    if not snapshot.is_dir():
        there = ", ".join(str(int(folder.name)) for folder in sorted(root.glob("[0-9]*")))
        raise UserError(f"run {run.id} has no snapshot of {images} images; allowed: 0 (untrained), {there}")
    return snapshot
