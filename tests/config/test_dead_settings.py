"""No setting is dead: each is read by the code that it should steer, and each decides the run's id or is execution.

Small trainings, measurements and a verification run while every read of a configuration is noted, but for the reads
of those that treat all fields alike: checks, composition, storage, and the hash.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from core.config import compose, resolve, run_id
from core.run import Run
from core.schema import SCHEMAS, ExperimentConfig, UserError, discover_schemas
from experiments.expected import outcomes
from experiments.train import train_config
from tests import toy_rewards, worlds

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "analysis" / "records" / "runs" / "157e67d615"  # of an experiment that states what it should reach
READ_ALIKE_IN = ("core/config.py", "core/typed.py")
READ_ALIKE_BY = ("identity_dict", "_canonical", "_canonical_part", "validate", "_validate_stages")
# Filled in by resolve, for the id alone
CONTENT = {f"{schema}.{name}_hash" for schema in ("Dmd2Config", "FlashDmdConfig") for name in ("dino", "sam")}
CONTENT |= {"RlConfig.reward_hash"}
# Read by nobody, but a part of the ids of all committed runs
KEPT_FOR_IDS = {"DataConfig.name"}

SMALL = ["eval.metrics=[diversity]", "eval.splits=[train]", "eval.steps=[1]", "execution.num_threads=1"]
FOUR = ["train.budget.amount=4", "train.budget.unit=iterations", "train.ema_decay=0.5"]
METRICS = "eval.metrics=[kd_effnet,clip_score,kd_teacher,diversity]"
PAIRS = [
    "method.regression_init=0.5",
    "method.regression_weight=0.5",
    "method.regression_steps=4",
    "method.gan=effnet_lite1",
]
ON_IMAGES = ["method.critic_heads=pooled", "method.critic_crop=32", "method.adversarial_ratio=0.5"]
RL = ["method.rl.reward=level", "method.rl.ratio=1", "train.budget.amount=6"]  # turns of either kind after the pairs
RUNS = {
    "flash/tiny": [*FOUR, METRICS], "dmd2/tiny": [*FOUR, *PAIRS, *ON_IMAGES, *RL],
    # Other problems than those of dmd2/tiny, whose solutions it would read
    "flash_dmd/tiny": [*FOUR, *PAIRS, *ON_IMAGES, "method.regression_steps=3"], "lcm/tiny": FOUR, "teacher/tiny": [],
    "progressive/tiny": [*FOUR, "method.adversarial_weight=0.1"], "guidance/tiny": [*FOUR, "method.null_prob=0.5"],
}  # fmt: skip
# The path of a network that is not embedded is read, and then told to be missing
REFUSED = {
    "flash/tiny": "method.distill_loss=lpips", "dmd2/tiny": "method.gan=dino", "flash_dmd/tiny": "method.gan=dino",
    "teacher/tiny": "eval.metrics=[fid]",
}  # fmt: skip


def schemas() -> list[type]:
    """The schemas of the root, of its parts and theirs, and of all methods."""
    discover_schemas()
    found: list[type] = []
    waiting = [ExperimentConfig, *SCHEMAS["method"].values()]
    while waiting:
        schema = waiting.pop()
        found.append(schema)
        parts = [item.metadata.get("rows", item.default_factory) for item in fields(schema)]
        waiting += [part for part in parts if is_dataclass(part)]
    return found


def settings() -> set[str]:
    """Every setting as ``FlashConfig.solver``."""
    return {f"{schema.__name__}.{item.name}" for schema in schemas() for item in fields(schema)}


@contextlib.contextmanager
def noted() -> Iterator[set[str]]:
    """The settings that the project's code reads inside, filled as it does."""
    read: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for schema in schemas():
            patch.setattr(schema, "__getattribute__", _noting(schema, read), raising=False)
        yield read


def _noting(schema: type, read: set[str]) -> Callable[[Any, str], Any]:
    names = {item.name for item in fields(schema)}

    def get(self: Any, name: str) -> Any:
        if name in names and _is_steered(sys._getframe(1)):
            read.add(f"{schema.__name__}.{name}")
        return object.__getattribute__(self, name)

    return get


def _is_steered(reader: FrameType) -> bool:
    """The reader is code of the project that does not treat all fields alike."""
    file = Path(reader.f_code.co_filename)
    if not file.is_relative_to(ROOT) or file.is_relative_to(ROOT / "tests") or "site-packages" in file.parts:
        return False
    return file.relative_to(ROOT).as_posix() not in READ_ALIKE_IN and reader.f_code.co_name not in READ_ALIKE_BY


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The settings that trainings and measurements of every method read."""
    folder = tmp_path_factory.mktemp("noted")
    paths = [f"execution.runs_dir={folder}/runs", f"execution.cache_dir={folder}/cache", *SMALL]
    with noted() as found, toy_rewards.registered():
        for name, more in RUNS.items():
            assert train_config(resolve(compose(name, [*paths, *more])), evaluate=True) == 0
        sam = worlds.vision(folder / "sam", "sam")
        for name in ("dmd2/tiny", "flash_dmd/tiny"):
            short = ["train.budget.amount=1", "method.gan=sam", f"method.sam_path={sam}", "method.sam_layers=[2,4]"]
            assert train_config(resolve(compose(name, [*paths, *short]))) == 0
        for name, override in REFUSED.items():
            with pytest.raises(UserError, match="_path"):
                train_config(resolve(compose(name, [*paths, override])), evaluate=True)
        assert outcomes(Run.open(RECORD))
    return found


def test_every_setting_is_read(read: set[str]) -> None:
    assert settings() - read == CONTENT | KEPT_FOR_IDS


def test_a_setting_that_nobody_reads_is_found() -> None:
    """Here only checks and the hash read it, which are not counted."""
    with noted() as found:
        run_id(resolve(compose("flash/tiny")))
    assert "DataConfig.path" in found and "FlashConfig.solver" not in found


def another(value: Any) -> Any:
    """A value of the same type that differs."""
    if value is None:
        return "another"
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, another(value[0])] if value else ["another"]
    return f"{value}x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("name", list(RUNS))
def test_a_setting_decides_the_id_or_is_execution(name: str) -> None:
    config = resolve(compose(name))
    identity = run_id(config)
    for path, execution in _leaves(config, False):
        changed = copy.deepcopy(config)
        owner = changed
        for part in path[:-1]:
            owner = getattr(owner, part)
        if path == ["method", "name"]:  # the revisions know those that exist
            continue
        setattr(owner, path[-1], another(getattr(owner, path[-1])))
        assert (run_id(changed) == identity) == execution, ".".join(path)


def _leaves(part: Any, execution: bool, path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], bool]]:
    """Paths of all values, and if they or a group that they lie in are execution."""
    for item in fields(part):
        value, here = getattr(part, item.name), (*path, item.name)
        marked = execution or item.metadata.get("execution", False)
        if is_dataclass(value):
            yield from _leaves(value, marked, here)
        else:
            yield list(here), marked
