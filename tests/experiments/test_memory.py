"""The plan against what is there: bytes of a real training, and what checkpointing and sharing save."""

from pathlib import Path

import pytest
import torch

from core.backbones.tiny import write_tiny_flux2, write_tiny_sd
from core.config import UserError, compose
from experiments.memory import LiveBytes, Row, plan_memory
from tests import worlds


def plan(experiment: str, *overrides: str, gpus: int = 1) -> dict[tuple[str, str], Row]:
    rows = plan_memory(compose(experiment, ["data.path=x", *overrides]), gpus)
    return {(row.role, row.what): row for row in rows}


@pytest.fixture
def states_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations need half a minute."""
    monkeypatch.setattr("experiments.memory._activations", lambda *given: 0)


@pytest.mark.usefixtures("states_only")
@pytest.mark.parametrize(("sharing", "state_dtype"), [("lora", "fp32"), ("full", "bf16")])
def test_parameters_gradients_and_moments_are_those_of_a_training(
    tmp_path: Path, sharing: str, state_dtype: str
) -> None:
    folder = write_tiny_sd(tmp_path / "tiny-sd")
    options = [f"train.state_dtype={state_dtype}", "train.ema_decay=0.9"]
    rows = plan("dmd2/tiny", f"backbone.path={folder}", f"backbone.sharing={sharing}", *options)
    trained = worlds.trainer(tmp_path, options, sharing, experiment="dmd2/tiny")
    trained._iteration()
    for name, player in trained.players.items():
        moments = [player.optimizer.state[part][key] for part in player.parts for key in ("exp_avg", "exp_avg_sq")]
        assert rows[name, "AdamW's two moments"].all == sum(moment.nbytes for moment in moments)
        assert rows[name, "gradients"].all == sum(p.grad.nbytes for p in player.trained)
    backbone = trained.method.backbone
    roles = {"student": "parameters", "fake_score": "parameters", "student_ema": "parameters (fp32 average)"}
    for role, what in roles.items():
        held = sum(p.nbytes for p in backbone.role_parameters(role).values())
        assert rows[role, what].all == rows[role, what].each == held, role


@pytest.mark.usefixtures("states_only")
def test_a_device_of_several_holds_its_part(tmp_path: Path) -> None:
    folder = write_tiny_flux2(tmp_path / "tiny-flux2")
    options = ["backbone=tiny_flux2", f"backbone.path={folder}", "train.batch_size=8", "method.gan=off"]
    alone, sharded = plan("dmd2/tiny", *options), plan("dmd2/tiny", *options, "execution.sharding=fsdp", gpus=4)
    held = {"all": 0, "each": 0}
    for key, row in alone.items():
        if "activations" in key[1]:
            continue
        assert sharded[key].each >= row.all / 4 and sharded[key].all == row.all
        held = {"all": held["all"] + row.all, "each": held["each"] + sharded[key].each}
    assert held["each"] < 0.35 * held["all"], "first dimensions that four does not divide are rounded up"
    replicated = plan("dmd2/tiny", *options, gpus=4)
    assert replicated["teacher", "parameters"].all == 4 * alone["teacher", "parameters"].all


def test_what_lives_is_counted_once_and_no_longer() -> None:
    weight = torch.ones(10, 10)
    with LiveBytes([weight]) as live:
        first = weight.t() @ weight  # a view of what is known costs nothing
        second = first.view(100)
        assert live.now == live.peak == 400
        third = torch.zeros(25)
        del first, second
        assert live.now == 100 and live.peak == 500
        live.forget(third)
        del third
    assert live.now == 0


@pytest.mark.slow
def test_checkpointing_saves_activations(tmp_path: Path) -> None:
    rows = plan("dmd2/tiny", f"backbone.path={write_tiny_sd(tmp_path / 'tiny-sd')}", "train.batch_size=8")
    kept, checkpointed = (rows["all", f"activations, {how}"].each for how in ("all kept", "checkpointed"))
    assert 0 < checkpointed < 0.8 * kept


@pytest.mark.usefixtures("states_only")
def test_the_flux2_recipe_needs_more_than_500_gb() -> None:
    """Three networks of 32B in bf16, gradients and moments of two; moments are "about half" of it."""
    rows = plan("dmd2/flux2_dev", gpus=8)
    network = 2 * 32_223_281_152
    assert rows["teacher", "parameters"].all == rows["student", "gradients"].all == network
    states = {key: row for key, row in rows.items() if "activ" not in key[1] and "gathered" not in key[1]}
    whole = sum(row.all for row in states.values())
    moments = sum(row.all for (_, what), row in states.items() if "moments" in what)
    assert whole == 9 * network and 500e9 < whole < 600e9 and moments / whole == pytest.approx(4 / 9)


def test_an_unknown_architecture_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="neither a folder with unet/config.json nor one of stable-diffusion-v1-5/"):
        plan("dmd2/tiny", "backbone.path=somebody/else")


def test_flash_diffusion_is_planned_without_solving_the_teachers_ode(tmp_path: Path) -> None:
    """Nor does the plan ask for the files of a perceptual loss."""
    folder = write_tiny_sd(tmp_path / "tiny-sd")
    rows = plan("flash/tiny", f"backbone.path={folder}", "method.distill_loss=effnet_lite1")
    kept, checkpointed = (rows["all", f"activations, {how}"].each for how in ("all kept", "checkpointed"))
    assert kept > checkpointed > 0 and rows["critic", "parameters"].each > 0
