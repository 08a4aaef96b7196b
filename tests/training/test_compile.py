"""Compiled blocks compute and train as plain ones do."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import worlds

ROLES = ("teacher", "student", "fake_score")


@pytest.fixture(autouse=True)
def no_block_is_left_uncompiled() -> Iterator[None]:
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def test_a_compiled_network_computes_the_role_that_is_asked_for(tmp_path: Path) -> None:
    """A role is an attribute of modules, which no graph may freeze."""
    backbone = worlds.backbone(tmp_path, family="flux2")
    for role in ROLES[1:]:
        backbone.add_role(role, trainable=True)
    worlds.move_apart(backbone)
    batch = worlds.data(family="flux2").batch([0, 1])
    t = torch.tensor([900.0, 300.0])
    with torch.no_grad():
        plain = {role: backbone.predict(role, batch.x0, t, batch.cond) for role in ROLES}
        backbone.compile_blocks("aot_eager")
        for role in (*ROLES, *ROLES):
            torch.testing.assert_close(backbone.predict(role, batch.x0, t, batch.cond), plain[role])
    for one, other in itertools.combinations(plain.values(), 2):
        assert (one - other).abs().max() > 1e-3, "what is alike would hide a frozen role"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "backend"), [("unet", "aot_eager"), ("flux2", "inductor")])
def test_compiled_blocks_give_the_same_curve(tmp_path: Path, family: str, backend: str) -> None:
    curves = []
    for compiled in ("off", backend):
        settings = ["train.budget.amount=2", "method.ttur=1", f"execution.compile={compiled}"]
        trained = worlds.trainer(tmp_path / compiled, settings, experiment="dmd2/tiny", family=family)
        worlds.move_apart(trained.method.backbone)
        trained.train()
        curves.append([{key: value for key, value in line.items() if "/" in key} for line in trained.run.metrics()])
    plain, ours = curves
    assert len(plain) == len(ours) == 2 and len(plain[0]) >= 8
    for one, other in zip(plain, ours, strict=True):
        for key, value in one.items():  # a gradient adds up the rounding of a whole network twice
            assert other[key] == pytest.approx(value, rel=1e-4 if "grad_norm" in key else 1e-5), key
