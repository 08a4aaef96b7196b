"""The needs of a run that are not met, told before anything is built: weights, splits, a size that fits. Torch-free."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from core.catalogue import CLIP, INCEPTION, INCEPTION_FILE, METRICS, Judge
from core.config import ExperimentConfig, UserError, locate
from core.run import Run
from core.splits import splits_of
from experiments.architectures import image_sizes
from experiments.emoji.views import SIZE


def check_needs(config: ExperimentConfig, *, evaluate: bool) -> None:
    """UserError, one line with all that is missing to train, and with ``evaluate`` to measure."""
    missing = missing_needs(config, evaluate=evaluate)
    if missing:
        raise UserError("; ".join(missing))


def missing_needs(config: ExperimentConfig, *, evaluate: bool = True) -> list[str]:
    """A line for each thing that is missing to train, and with ``evaluate`` to measure."""
    found = [*_weight_files(config), *_parent(config), *_splits(config, evaluate), *_size(config)]
    found += [*_prompts(config), *_trackers(config)]
    if evaluate:
        found += [*_judges(config), *lacking_images(config)]
    return found


def wrong_size(config: ExperimentConfig, why: str) -> str:
    """The line for pictures that do not fit the backbone."""
    return f"data.image_size={config.data.image_size} does not fit backbone.path={config.backbone.path}: {why}"


def embedded_clip_suits(config: ExperimentConfig) -> bool:
    """Whether pictures are such as the project's own CLIP judges."""
    return config.data.view == "emoji" and config.data.image_size == SIZE


def lacking_images(config: ExperimentConfig) -> Iterator[str]:
    """The metrics that compare images of one prompt, of which there is but one."""
    for name in config.eval.metrics:
        if METRICS[name].grouped and config.eval.images_per_prompt < 2:
            yield f"eval.images_per_prompt={config.eval.images_per_prompt} has no {name}; give at least 2"


def _weight_files(config: ExperimentConfig) -> Iterator[str]:
    """The method's weights beside the backbone's."""
    for wanted in config.method.weight_files:
        path = config.method.path_of(wanted)
        if path is None:
            yield wanted.needed
        elif not _holds(locate(path), wanted.file):
            yield f"method.{wanted.path}={path}: no file {wanted.file} there"
        if wanted.package and not _is_installed(wanted.package):
            yield f"the package {wanted.package} is not installed: pip install 'fewstep[{wanted.package}]'"


def _parent(config: ExperimentConfig) -> Iterator[str]:
    """The run whose student ``train.init_from`` names; a file of weights was read when it was hashed."""
    source = config.train.init_from
    if source is None or Path(source).is_file():
        return
    try:
        run = Run.open(source, config.execution.runs_dir)
    except UserError as error:
        yield f"train.init_from: {error}"
        return
    if run.noted("state") == "diverged":
        yield f"train.init_from={source}: run {run.id} has diverged ({run.reason()}): nothing starts from it"
    elif run.noted("state") != "done":
        yield f"train.init_from={source}: run {run.id} is not trained to its end; train it first"


def _holds(path: Path, name: str) -> bool:
    """Whether ``path`` is a file, or a folder with a file of this name."""
    return (path / name).is_file() if path.is_dir() else path.is_file()


def _splits(config: ExperimentConfig, evaluate: bool) -> Iterator[str]:
    """The splits that are trained on, drawn and measured."""
    data, eval_splits = config.data, config.eval.splits
    folder = locate(data.path)
    if not folder.is_dir():
        return
    wanted = {}
    if evaluate:
        wanted |= dict.fromkeys(eval_splits, "eval.splits")
    if config.method.trains and config.eval.prompts is None:
        wanted[eval_splits[-1]] = "eval.splits"  # its captions are drawn
    if config.method.trains:
        wanted[data.split] = "data.split"
    known = splits_of(folder)
    for split, key in wanted.items():
        if known and split not in known:
            yield f"{key}={split}: data.path={data.path} has no split {split!r}; it has: {', '.join(known)}"


def _size(config: ExperimentConfig) -> Iterator[str]:
    size = config.data.image_size
    side, multiple = image_sizes(config.backbone)
    if side is not None and size != side:
        yield wrong_size(config, f"it draws {side}x{side} pixels; give data.image_size={side}")
    elif size % multiple:
        yield wrong_size(config, f"give a multiple of {multiple}")


def _prompts(config: ExperimentConfig) -> Iterator[str]:
    """The list of prompts that sheets show."""
    prompts = config.eval.prompts or ""
    if prompts.startswith("@") and not Path(prompts[1:]).is_file():
        yield f"eval.prompts={prompts}: no such file"


def _trackers(config: ExperimentConfig) -> Iterator[str]:
    """The libraries of the places where the run is to be shown."""
    for name in config.execution.report_to:
        if not _is_installed(name):
            yield f"execution.report_to={name}: the package {name} is not installed: pip install 'fewstep[{name}]'"


def _is_installed(package: str) -> bool:
    """Whether it can be imported; a folder of that name, as wandb leaves where it was used, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _judges(config: ExperimentConfig) -> Iterator[str]:
    """The weights of the networks that judge."""
    for judge in dict.fromkeys(METRICS[name].judge for name in config.eval.metrics):
        path = getattr(config.eval, judge.path, None)
        if path is not None:
            yield from _wrong_path(judge, path)
        elif not _is_at_hand(judge, config):
            yield judge.needed


def _is_at_hand(judge: Judge, config: ExperimentConfig) -> bool:
    """Whether the project brings the judge's weights."""
    return not judge.needed or (judge == CLIP and embedded_clip_suits(config))


def _wrong_path(judge: Judge, path: str) -> Iterator[str]:
    """The line for a path that names nothing."""
    if judge == INCEPTION:
        if not _holds(Path(path), INCEPTION_FILE):
            yield f"eval.{judge.path}={path}: no file {INCEPTION_FILE} there"
        return
    place = _clip_place(path) if judge == CLIP else Path(path)
    if place is not None and not place.exists():
        yield f"eval.{judge.path}={path}: no such file or folder"


def _clip_place(path: str) -> Path | None:
    """The file or folder that ``eval.clip_path`` names; None for the name of one of open_clip's architectures."""
    if path.startswith("package:") or ":" not in path:
        return locate(path) if "/" in path else None
    return Path(path.partition(":")[2])
