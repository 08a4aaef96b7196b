"""Names to judging networks: from which weights a run's evaluation loads each judge of the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from core.backbones.base import Backbone
from core.catalogue import CLIP, EFFNET, INCEPTION, TEACHER_FEATURES
from core.config import ExperimentConfig, UserError
from core.identity import locate
from core.metrics.clip import ClipJudge, load_clip
from core.metrics.fid import Extractor, load_extractor, teacher_extractor
from core.metrics.measure import Judges, JudgingNetwork
from core.metrics.protocol import file_sha256
from experiments.needs import embedded_clip_suits

EMOJI_CLIP = "package:experiments/emoji/assets/emoji-clip-v1"


def make_judges(config: ExperimentConfig, backbone: Backbone) -> Judges:
    """The judging networks for a run's evaluation, on the backbone's device; each is loaded when a metric asks it."""
    loaders = {name: partial(load, config, backbone) for name, load in JUDGES.items()}
    return Judges(loaders, Path(config.execution.cache_dir))


def _effnet(config: ExperimentConfig, backbone: Backbone) -> Extractor:
    return load_extractor("effnet", config.eval.extractor_path, str(backbone.device))


def _inception(config: ExperimentConfig, backbone: Backbone) -> Extractor:
    return load_extractor("inception", config.eval.inception_path, str(backbone.device))


def _teacher(config: ExperimentConfig, backbone: Backbone) -> Extractor:
    return teacher_extractor(backbone, config.backbone.weights_hash)


def _clip(config: ExperimentConfig, backbone: Backbone) -> ClipJudge:
    """The model of ``eval.clip_path``; at emoji scale, without a path, the one that the project brings."""
    device = str(backbone.device)
    if config.eval.clip_path is not None:
        return load_clip(str(locate(config.eval.clip_path)), device)
    if not embedded_clip_suits(config):
        raise UserError(CLIP.needed)
    return _emoji_clip(device)


def _emoji_clip(device: str) -> ClipJudge:
    from experiments.emoji.judge import load_emoji_clip

    folder = locate(EMOJI_CLIP)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"clip_score needs eval.clip_path or the in-domain judge in {folder}")
    model, preprocess, tokenize = load_emoji_clip(folder)
    digest = "+".join(file_sha256(file) for file in weights)
    model = model.to(device, memory_format=torch.channels_last).eval()
    return ClipJudge(folder.name, digest, "native", model, preprocess, tokenize, torch.device(device))


JUDGES: dict[str, Callable[[ExperimentConfig, Backbone], JudgingNetwork]] = {
    EFFNET.name: _effnet,
    TEACHER_FEATURES.name: _teacher,
    INCEPTION.name: _inception,
    CLIP.name: _clip,
}
