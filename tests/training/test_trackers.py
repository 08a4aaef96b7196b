"""Trackers show what the run's log says, go on where it goes on, and never change or stop a training."""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from core.config import compose, resolve
from core.run import Run
from core.training.loop import Trainer
from core.training.preemption import Preempted
from core.training.world import World
from experiments.train import train_config
from tests import worlds

ASKED = "execution.report_to=[tensorboard]"
EMA = "train.ema_decay=0.9"


def shown(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Iterations and values of every scalar in a run's event files."""
    events = EventAccumulator(str(run.path / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def logged(run: Run) -> dict[str, list[tuple[int, float]]]:
    """The same of the run's own log."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in run.metrics():
        for key, value in line.items():
            if isinstance(value, int | float) and key not in ("iteration", "attempt"):
                found.setdefault(key, []).append((line["iteration"], value))
    return found


def trained(folder: Path, *overrides: str) -> Trainer:
    trainer = worlds.trainer(folder, [EMA, *overrides])
    trainer.train()
    trainer.monitor.close()
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return worlds.parameters(trainer)


def agree(a: dict[str, list[tuple[int, float]]], b: dict[str, list[tuple[int, float]]]) -> bool:
    """Whether both hold the same values, one of them as fp32."""
    at = {name: [step for step, _ in points] for name, points in a.items()}
    if at != {name: [step for step, _ in points] for name, points in b.items()}:
        return False
    pairs = [(x, y) for name in a for (_, x), (_, y) in zip(a[name], b[name], strict=True)]
    return all(np.float32(x) == np.float32(y) for x, y in pairs)


def test_tensorboard_shows_the_runs_own_log(tmp_path: Path) -> None:
    run = trained(tmp_path, ASKED).run
    assert agree(shown(run), logged(run))
    assert [at for at, _ in shown(run)["student/distill"]] == list(range(1, 9))
    assert {"images", "student_images", "device_hours", "images_per_s"} < shown(run).keys()


def test_a_tracker_changes_no_bit_and_none_is_the_default(tmp_path: Path) -> None:
    alone, beside = trained(tmp_path / "alone"), trained(tmp_path / "beside", ASKED)
    assert worlds.equal(weights(alone), weights(beside)) and alone.run.id == beside.run.id
    assert not (alone.run.path / "tensorboard").exists()


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path: Path) -> None:
    """Cut off at 20 images, four iterations of it after its last state: those are drawn once."""
    cut = worlds.trainer(tmp_path, [ASKED, EMA, "execution.checkpoint_every_images=8"])
    cut.train(until=0.6)
    cut.monitor.close()
    assert cut.clock.images == 20 and [at for at, _ in shown(cut.run)["student/distill"]] == [1, 2, 3, 4, 5]
    run = trained(tmp_path, ASKED, "execution.checkpoint_every_images=8").run
    assert len(list((run.path / "tensorboard").iterdir())) == 2
    assert [at for at, _ in shown(run)["student/distill"]] == list(range(1, 9))
    assert agree(shown(run), logged(run))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_told_once_and_changes_no_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the third iteration on, what TensorBoard writes goes to a device without space."""
    alone = trained(tmp_path / "alone")
    other = worlds.trainer(tmp_path / "full", [EMA, ASKED])
    other.train(until=0.25)
    (events,) = (other.run.path / "tensorboard").iterdir()
    events.unlink()
    events.symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING, "fewstep"):
        logging.getLogger("fewstep").propagate = True
        other.train()
        other.monitor.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("execution.report_to: tensorboard failed and is off: OSError: ") and "No space left" in line
    assert worlds.equal(weights(alone), weights(other)) and len(other.run.metrics()) == 8


def test_a_tracker_that_cannot_begin_is_told_and_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run.create(worlds.config(tmp_path, EMA))
    (run.path / "tensorboard").write_text("a file")
    with caplog.at_level(logging.WARNING, "fewstep"):
        logging.getLogger("fewstep").propagate = True
        trained(tmp_path, ASKED)
    assert [record.getMessage().partition(" failed")[0] for record in caplog.records] == [
        "execution.report_to: tensorboard"
    ]


def test_the_main_process_alone_writes(tmp_path: Path) -> None:
    def work(world: World) -> None:
        trainer = worlds.trainer(tmp_path, [ASKED], world=world)
        trainer.train()
        trainer.monitor.close()

    worlds.together(tmp_path, work)
    (run,) = (Run.open(path.parent) for path in tmp_path.glob("runs/*/*/*/config.yaml"))
    assert len(list((run.path / "tensorboard").iterdir())) == 1
    assert agree(shown(run), logged(run))


def small(folder: Path, *overrides: str) -> Any:
    fast = ["eval.metrics=[diversity]", "eval.splits=[train]", "eval.steps=[1,2]", "execution.num_threads=1"]
    return resolve(compose("flash/tiny", [f"execution.runs_dir={folder}/runs", ASKED, *fast, *overrides]))


def test_sheets_and_measures_are_shown_where_they_were_made(tmp_path: Path) -> None:
    config = small(tmp_path, "eval.at=[0.5,1.0]", "execution.sample_every_images=16", EMA)
    assert train_config(config, evaluate=True) == 0
    run = Run.create(config)
    events = EventAccumulator(str(run.path / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    sheets = sorted((run.path / "samples").iterdir())
    assert [file.name for file in sheets] == ["0000000016.png", "0000000032.png"]
    pictures = events.Images("sheet")
    size = config.train.batch_size
    assert [picture.step for picture in pictures] == [16 // size, 32 // size]
    for picture, file in zip(pictures, sheets, strict=True):
        (tmp_path / "shown.png").write_bytes(picture.encoded_image_string)
        np.testing.assert_array_equal(Image.open(tmp_path / "shown.png"), Image.open(file).convert("RGB"))
    for line in run.evals():
        name = f"train/student {line['steps']} steps/diversity"
        assert (line["images"] // size, np.float32(line["value"])) in shown(run)[name]


def test_what_is_measured_after_a_training_is_shown_in_its_curves(tmp_path: Path) -> None:
    assert train_config(small(tmp_path)) == 0
    before = shown(Run.create(small(tmp_path)))
    assert train_config(small(tmp_path), evaluate=True) == 0
    after = shown(Run.create(small(tmp_path)))
    assert {name: after[name] for name in before} == before
    assert sorted(after.keys() - before.keys()) == [f"train/student {steps} steps/diversity" for steps in (1, 2)]
    assert [at for at, _ in after["train/student 1 steps/diversity"]] == [before["images"][-1][0]]


def test_a_stopped_training_has_written_what_it_showed(tmp_path: Path) -> None:
    trainer = worlds.trainer(tmp_path, [ASKED, "execution.stop_after_images=12"])
    with pytest.raises(Preempted):
        trainer.train()
    assert agree(shown(trainer.run), logged(trainer.run))


def test_a_loss_that_is_not_finite_is_shown_as_such(tmp_path: Path) -> None:
    trainer = worlds.trainer(tmp_path, [ASKED])
    trainer.monitor.add("student/distill", torch.tensor(float("nan")))
    trainer.monitor.flush()
    trainer.monitor.close()
    assert [math.isnan(value) for _, value in shown(trainer.run)["student/distill"]] == [True]


ATTEMPT = """
import contextlib, sys
from pathlib import Path
sys.path[:0], sys.path[len(sys.path):] = [{root!r}], [{packages!r}]
from PIL import Image
from core.training.preemption import Preempted
from tests import worlds

trainer = worlds.trainer(Path("."), ["execution.report_to=[wandb,trackio]", *{overrides!r}])
with contextlib.suppress(Preempted):
    trainer.train()
Image.new("RGB", (8, 8), "red").save("sheet.png")
trainer.monitor.sheet(Path("sheet.png"))
trainer.monitor.close()
"""
READ = """
import json, sys
sys.path[:0], sys.path[len(sys.path):] = [{root!r}], [{packages!r}]
from wandb.proto.wandb_internal_pb2 import Record
from tests.training.test_trackers import wandb_records
for file in {files!r}:
    for record in map(Record.FromString, wandb_records(open(file, "rb").read())):
        if record.HasField("history"):
            items = record.history.item
            print(json.dumps({{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}}))
"""


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log, blocks of 32 KiB after a header of 7 bytes."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_weights_and_biases_and_trackio_show_the_runs_own_log(tmp_path: Path, root: Path) -> None:
    """Installed for this test alone: they are no part of the locked requirements."""
    packages = tmp_path / "packages"
    install = ["uv", "pip", "install", "--quiet", "--target", str(packages), "wandb>=0.31", "trackio>=0.43"]
    subprocess.run([sys.executable, "-m", *install], check=True)
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    places: dict[str, Any] = {"root": str(root), "packages": str(packages)}

    def said(code: str, **more: Any) -> str:
        words = [sys.executable, "-c", code.format(**places, **more)]
        return subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    for overrides in (["execution.stop_after_images=12"], []):
        said(ATTEMPT, overrides=overrides)
    (run,) = (Run.open(path.parent) for path in tmp_path.glob("runs/*/*/*/config.yaml"))
    files = sorted(run.path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run.id}.wandb"] * 2
    lines = [json.loads(line) for line in said(READ, files=list(map(str, files))).splitlines()]
    assert agree(by_name((line["iteration"], line) for line in lines), logged(run))
    assert [line["iteration"] for line in lines if "sheet.path" in line] == [3, 8]
    with sqlite3.connect(tmp_path / "trackio" / "fewstep.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    assert len({row[0] for row in rows}) == 1 and {row[1] for row in rows} == {run.id}
    found = [(step, json.loads(metrics)) for _, _, step, metrics in rows]
    assert agree(by_name(found), logged(run))
    assert [step for step, metrics in found if "sheet" in metrics] == [3, 8]


def by_name(lines: Any) -> dict[str, list[tuple[int, float]]]:
    """Iterations and values of every scalar among (iteration, values by name)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for iteration, values in lines:
        for key, value in values.items():
            if isinstance(value, int | float) and key != "iteration" and not key.startswith(("_", "sheet")):
                found.setdefault(key, []).append((iteration, value))
    return found
