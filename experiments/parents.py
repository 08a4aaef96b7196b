"""The run that another starts from: its weights, and the adapters that a chain of rounds has left."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from core.backbones.adapters import in_full, stacked
from core.backbones.base import STUDENT
from core.config import ExperimentConfig, UserError
from core.run import Run
from core.training.checkpoint import MERGED, latest_snapshot


def merges_parent(config: ExperimentConfig) -> bool:
    """Whether the base holds the adapters of earlier rounds: the teacher is the parent, and roles are adapters."""
    return config.method.teacher_is_parent and config.backbone.sharing == "lora"


def parent_weights(config: ExperimentConfig) -> Path:
    """The student file that ``train.init_from`` names: a run (folder or id) or a safetensors file."""
    assert config.train.init_from is not None
    source = Path(config.train.init_from)
    if source.is_file():
        return source
    run = Run.open(config.train.init_from, config.execution.runs_dir)
    snapshot = latest_snapshot(run.path / "snapshots")
    if snapshot is None:
        raise UserError(f"train.init_from={config.train.init_from}: run {run.id} has no snapshot yet; train it first")
    return snapshot / f"{STUDENT}.safetensors"


def parent_adapter(config: ExperimentConfig) -> dict[str, Tensor]:
    """One adapter that makes the parent's student of the base, earlier rounds included."""
    file = parent_weights(config)
    own, earlier = in_full(read_weights(file), _scale(config, file)), merged_before(file)
    return own if earlier is None else stacked(read_weights(earlier), own)


def merged_before(file: Path) -> Path | None:
    """The adapters of rounds before that on which a snapshot's student lies."""
    earlier = file.with_name(f"{MERGED}.safetensors")
    return earlier if earlier.is_file() else None


def _scale(config: ExperimentConfig, file: Path) -> float:
    """alpha / rank of the parent; of a file that lies in no run's folder that of this run."""
    spec = config.backbone
    folder = file.resolve().parents[2] if len(file.resolve().parents) > 2 else file.parent
    if (folder / "config.yaml").is_file():
        spec = Run.open(folder).config.backbone
        if spec.weights_hash != config.backbone.weights_hash:
            raise UserError(
                f"train.init_from={config.train.init_from} is a student of other weights than those of "
                f"backbone.path={config.backbone.path}"
            )
    return spec.lora_alpha / spec.lora_rank


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a snapshot's file; UserError where it cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({error})") from error
