"""Identity: what is computed decides the id; where, how fast and under which name does not."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.config import added, compose, from_yaml, resolve, run_id, to_yaml
from core.identity import folder_hash, identity_dict, teacher_problem
from core.methods.clock import Clock
from core.methods.flash_config import FlashConfig
from core.schema import REVISIONS, SCHEMAS

NO_DATA = "data.path=random:noise"


def identity(*overrides: str, experiment: str = "flash/tiny") -> str:
    return run_id(resolve(compose(experiment, [NO_DATA, *overrides])))


@pytest.mark.parametrize(
    "override",
    ["execution.label=x", "execution.micro_batch=2", "execution.device=cpu", "eval.steps=[8]"],
)
def test_execution_does_not_change_the_id(override: str) -> None:
    assert identity(override) == identity()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "train.batch_size=8",
        "train.precision=bf16",
        "method.num_timesteps=16",
        "method.dmd_weight=[0,0,0,0]",
        "backbone.lora_rank=8",
        "backbone.path=random:other",
        "data.path=random:other",
        "train.init_from=0123456789",
    ],
)
def test_what_is_computed_changes_the_id(override: str) -> None:
    assert identity(override) != identity()


@pytest.mark.parametrize(("unit", "amount"), [("images", 128), ("images", 100), ("iterations", 16), ("iterations", 10)])
def test_the_teachers_problems_say_where_the_clock_changes_stages(unit: str, amount: int) -> None:
    settings = [f"train.budget.unit={unit}", f"train.budget.amount={amount}", "train.batch_size=8"]
    problem, clock = teacher_problem(compose("flash/tiny", settings)), Clock(amount, unit, 8)
    stages = {}
    while not clock.done:
        stages.setdefault(clock.stage(4), clock.images)
        clock.advance()
    assert problem["stages"] == list(stages.values()) and problem["samples"] == clock.images


def test_batch_sizes_that_pose_the_same_problems_share_them() -> None:
    def problem(batch: int, amount: int) -> dict:
        settings = ["train.budget.unit=images", f"train.budget.amount={amount}", f"train.batch_size={batch}"]
        return teacher_problem(compose("flash/tiny", settings))

    assert problem(8, 128) == problem(32, 128)
    assert problem(8, 112) != problem(16, 112), "the third stage begins at 56 images, or with the batch at 64"


def test_a_default_written_out_is_the_same_run() -> None:
    assert identity("method.mixture_variance=0.5", "seed=0", "method.guidance_min=3") == identity()


def test_a_revision_of_the_method_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity()
    monkeypatch.setitem(REVISIONS, "flash", REVISIONS["flash"] + 1)
    assert identity() != before


def test_hub_weights_are_known_by_name_and_revision() -> None:
    config = resolve(compose("flash/sd15", [NO_DATA, "backbone.revision=abc"]))
    assert config.backbone.weights_hash == "hub:stable-diffusion-v1-5/stable-diffusion-v1-5@abc"


def test_weights_are_known_by_content_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "weights.safetensors").write_bytes(b"1234")
    (tmp_path / "b" / "README.md").write_text("a card may be edited")
    a, b = (identity(f"backbone.path={tmp_path / name}") for name in ("a", "b"))
    assert a == b
    (tmp_path / "b" / "unet" / "weights.safetensors").write_bytes(b"1235")
    assert identity(f"backbone.path={tmp_path / 'b'}") != a


def test_what_is_held_out_by_key_is_a_part_of_the_data(tmp_path: Path) -> None:
    """Runs on a folder that was not split yet are other runs; those on shards that are named after splits are not."""

    def data_hash() -> str:
        return resolve(compose("flash/tiny", [f"data.path={tmp_path}"])).data.data_hash

    (tmp_path / "train-0.tar").write_bytes(b"1")
    assert data_hash() != folder_hash(tmp_path, tmp_path / ".cache")
    (tmp_path / "heldout-0.tar").write_bytes(b"2")
    assert data_hash() == folder_hash(tmp_path, tmp_path / ".cache")


def test_hash_is_remembered_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    (folder / "x").write_bytes(b"1")
    first = folder_hash(folder, cache)
    monkeypatch.setattr("core.identity._file_hash", lambda path: pytest.fail("hashed again"))
    assert folder_hash(folder, cache) == first


def test_a_younger_field_keeps_old_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Younger(FlashConfig):
        huber_delta: float = added(2.0, old=1.0)

    old = resolve(compose("flash/tiny", [NO_DATA]))
    text, old_id = to_yaml(old), run_id(old)
    monkeypatch.setitem(SCHEMAS["method"], "flash", Younger)
    read = from_yaml(text)
    assert read.method.huber_delta == 1.0
    assert run_id(read) == old_id
    read.method.huber_delta = 2.0
    assert run_id(read) != old_id


@pytest.mark.parametrize("changed", [{}, {"student_lr": 1}, {"dmd_weight": [0, 1e-7, 2.0, 3]}])
def test_the_id_is_the_hash_of_the_identity_as_json(changed: dict[str, object]) -> None:
    """Parts that many runs share are written once; the text is that of the whole."""
    config = resolve(compose("flash/tiny", [NO_DATA]))
    for name, value in changed.items():
        setattr(config.method, name, value)
    payload = {"schema_version": 1, "method_revision": REVISIONS["flash"], "config": identity_dict(config)}
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    assert run_id(config) == hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
