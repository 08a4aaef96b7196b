"""``train.init_from``: a student starts with the weights of another, or one line says why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.backbones.base import STUDENT, STUDENT_EMA, TEACHER
from core.backbones.pipeline import PipelineBackbone
from core.config import UserError, compose, resolve
from core.sampler import Sampler
from core.training.checkpoint import save_snapshot
from experiments.build import build_backbone, build_method
from experiments.cli import main
from experiments.export import export


def student(*overrides: str, to_be_sharded: bool = False) -> PipelineBackbone:
    """The tiny pipeline with its student and the student's average, as a training begins with them."""
    config = resolve(compose("flash/tiny", ["train.ema_decay=0.9", *overrides]))
    backbone = build_backbone(config, to_be_sharded=to_be_sharded)
    build_method(config, backbone, training=False)
    return backbone


def snapshot(backbone: PipelineBackbone) -> Path:
    """The student's file, with numbers that tell one from another."""
    parameters = backbone.role_parameters(STUDENT)
    with torch.no_grad():
        for number, parameter in enumerate(parameters.values()):
            parameter.fill_(0.01 * number)
    return save_snapshot(Path("snapshots"), 8, {STUDENT: parameters}) / "student.safetensors"


@pytest.mark.parametrize(("sharing", "to_be_sharded"), [("lora", False), ("full", False), ("full", True)])
def test_a_student_and_its_average_start_as_the_snapshot(sharing: str, to_be_sharded: bool) -> None:
    """And the teacher is who it was, also where its copies have no memory of their own yet."""
    file = snapshot(student(f"backbone.sharing={sharing}"))
    expected, teacher = load_file(file), student(f"backbone.sharing={sharing}").role_parameters(TEACHER)
    backbone = student(f"backbone.sharing={sharing}", f"train.init_from={file}", to_be_sharded=to_be_sharded)
    assert all(torch.equal(p, teacher[name]) for name, p in backbone.role_parameters(TEACHER).items())
    for role in (STUDENT, STUDENT_EMA):
        found = backbone.role_parameters(role)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].float(), value.float()) for name, value in expected.items()), role


def test_adapters_of_another_rank_are_one_line() -> None:
    file = snapshot(student("backbone.lora_rank=8"))
    with pytest.raises(UserError, match="student.safetensors: not weights of this student .*LoRA rank"):
        student("backbone.lora_rank=4", f"train.init_from={file}")


def test_an_exported_lora_is_one_line() -> None:
    """Its names are diffusers', and its factors hold alpha / rank."""
    file = export(student(), Path("exported"), Sampler("lcm", 4)) / "pytorch_lora_weights.safetensors"
    with pytest.raises(UserError, match="pytorch_lora_weights.safetensors: not weights of this student"):
        student(f"train.init_from={file}")


@pytest.mark.parametrize("content", [b"hello", b"", b"\x08" + bytes(7) + b"no json!"])
def test_what_is_no_safetensors_file_is_one_line_before_anything_is_made(
    capsys: pytest.CaptureFixture, content: bytes
) -> None:
    Path("weights.bin").write_bytes(content)
    assert main(["train", "flash/tiny", "train.init_from=weights.bin"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: train.init_from=weights.bin: cannot be read as safetensors (")
    assert line.endswith("allowed: the id or folder of a run, or a student.safetensors of its snapshots")
    assert not Path("runs").exists()
