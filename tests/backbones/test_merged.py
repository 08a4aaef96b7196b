"""Weights that hold an adapter compute what base and adapter compute, and follow the adapter."""

from pathlib import Path

import pytest
import torch

from core.backbones.base import FAKE_SCORE, STUDENT, STUDENT_EMA
from core.backbones.merged import merged_bytes
from core.backbones.pipeline import PipelineBackbone
from tests import worlds

TIMES = {"flux2": torch.tensor([900.0, 300.0])}
ADAPTED = {"unet": ("to_q", "to_out.0", "conv1", "conv_shortcut", "proj_in", "time_emb_proj"), "flux2": worlds.TARGETS}


def backbone_of(folder: Path, family: str) -> PipelineBackbone:
    backbone = worlds.backbone(folder, family=family, targets=ADAPTED.get(family, worlds.TARGETS))
    for role in (STUDENT, FAKE_SCORE):
        backbone.add_role(role, trainable=True)
    worlds.move_apart(backbone)
    return backbone


def both_ways(backbone: PipelineBackbone, role: str, family: str, kind: str = "predict") -> tuple[torch.Tensor, ...]:
    """What a role computes by merged weights, and by adapters."""
    batch = worlds.data(family=family).batch([0, 1])
    found = []
    for merging in (True, False):
        backbone.roles.merging = merging
        t = TIMES.get(family, torch.tensor([900, 300]))
        with torch.no_grad():
            found.append(getattr(backbone, kind)(role, batch.x0, t, batch.cond))
    backbone.roles.merging = True
    return tuple(found)


@pytest.mark.parametrize("family", [*worlds.WRITERS])
def test_a_merged_role_computes_what_its_adapter_does(tmp_path: Path, family: str) -> None:
    backbone = backbone_of(tmp_path, family)
    for kind in ("predict", "features"):
        merged, adapted = both_ways(backbone, STUDENT, family, kind)
        torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
        assert not torch.equal(merged, adapted), "the same path twice compares nothing"
    other, _ = both_ways(backbone, FAKE_SCORE, family)
    assert (other - both_ways(backbone, STUDENT, family)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("write", ["in place", "new memory"])
def test_merged_weights_follow_the_adapter_without_drift(tmp_path: Path, write: str) -> None:
    backbone = backbone_of(tmp_path, "unet")
    first, _ = both_ways(backbone, STUDENT, "unet")
    parameters = backbone.role_parameters(STUDENT)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for number in range(5):
        for name, parameter in parameters.items():
            value = before[name] * (1 + number)
            if write == "in place":
                parameter.detach().copy_(value)
            else:
                parameter.data = value
        torch.testing.assert_close(*both_ways(backbone, STUDENT, "unet"), rtol=1e-4, atol=1e-4)
    for name, parameter in parameters.items():
        parameter.data = before[name]
    assert torch.equal(both_ways(backbone, STUDENT, "unet")[0], first), "made anew from the base each time"


def test_a_write_that_torch_does_not_count_is_seen_when_training_goes_on(tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, "unet")
    both_ways(backbone, STUDENT, "unet")
    for parameter in backbone.role_parameters(STUDENT).values():
        parameter.data.mul_(2.0)
    backbone.merge_again()
    torch.testing.assert_close(*both_ways(backbone, STUDENT, "unet"), rtol=1e-4, atol=1e-4)


def test_merged_weights_follow_every_update_of_a_training(tmp_path: Path) -> None:
    """Steps of fused optimizers are not counted by a parameter's version."""
    trained = worlds.trainer(tmp_path, ["train.ema_decay=0.5", "method.ttur=1"], experiment="dmd2/tiny")
    for _ in range(3):
        trained._iteration()
        for role in (STUDENT, FAKE_SCORE, STUDENT_EMA):
            merged, adapted = both_ways(trained.method.backbone, role, "unet")
            torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert set(trained.method.backbone.roles._merged) == {STUDENT, FAKE_SCORE, STUDENT_EMA}


def test_only_forwards_without_gradients_of_the_adapter_are_merged(tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, "unet")
    roles, base = backbone.roles, backbone.roles.base

    def network(role: str) -> torch.nn.Module:
        with roles.use(role) as found:
            return found

    assert network(STUDENT) is base and network("teacher") is base
    with backbone.stepping(STUDENT):
        assert network(STUDENT) is base and network(FAKE_SCORE) is not base
    with backbone.stepping(None):
        assert network(STUDENT) is not base
    with torch.no_grad():
        assert network(STUDENT) is network(STUDENT) is not base and network("teacher") is base


def test_a_judge_that_does_not_step_gives_the_gradient_of_its_input(tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, "unet")
    batch, t = worlds.data().batch([0, 1]), torch.tensor([900, 300])
    gradients = []
    for role in (STUDENT, FAKE_SCORE):
        x_t = batch.x0.clone().requires_grad_(True)
        with backbone.stepping(role):
            backbone.features(FAKE_SCORE, x_t, t, batch.cond).square().sum().backward()
        gradients.append(x_t.grad)
        reached = any(parameter.grad is not None for parameter in backbone.role_parameters(FAKE_SCORE).values())
        assert reached == (role == FAKE_SCORE)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_only_adapted_weights_take_memory(tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, "unet")
    with torch.no_grad(), backbone.roles.use(STUDENT) as network:
        own = {id(parameter) for parameter in backbone.roles.base.parameters()}
        extra = [parameter for parameter in network.parameters() if id(parameter) not in own]
    assert sum(parameter.numel() * 4 for parameter in extra) == merged_bytes(backbone.roles.base)
    assert not any("lora" in name for name, _ in network.named_parameters())


@torch.no_grad()
def test_in_bf16_merged_weights_lose_nothing_of_a_small_difference_to_the_teacher(tmp_path: Path) -> None:
    """A change below half a unit of a weight's last bit is rounded away, but activations are rounded by far more."""
    backbone = worlds.backbone(tmp_path, targets=ADAPTED["unet"])
    backbone.add_role(FAKE_SCORE, trainable=True)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in backbone.role_parameters(FAKE_SCORE).items():
        if ".lora_B" in name:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=rng))
    batch, t = worlds.data(items=64).batch(range(64)), torch.full((64,), 500)

    def difference(dtype: torch.dtype, merging: bool) -> torch.Tensor:
        for name, parameter in backbone.roles.base.named_parameters():
            if ".lora_" not in name:
                parameter.data = parameter.data.to(dtype)
        backbone.compute_dtype = None if dtype == torch.float32 else dtype
        backbone.roles.merging = merging
        backbone.roles._merged.clear()
        return backbone.predict(FAKE_SCORE, batch.x0, t, batch.cond) - backbone.predict(
            "teacher", batch.x0, t, batch.cond
        )

    def slope_and_error(found: torch.Tensor) -> tuple[float, float]:
        return float((found * exact).sum() / exact.square().sum()), float((found - exact).norm() / exact.norm())

    backbone.roles.base.to(torch.bfloat16).to(torch.float32)  # the same numbers in both
    exact = difference(torch.float32, merging=False)
    slope, error = slope_and_error(difference(torch.bfloat16, merging=True))
    adapters_slope, adapters_error = slope_and_error(difference(torch.bfloat16, merging=False))
    assert error > 0.05, "of what rounding does"
    assert error < 1.2 * adapters_error
    assert abs(slope - 1) < max(0.05, 2 * abs(adapters_slope - 1))
