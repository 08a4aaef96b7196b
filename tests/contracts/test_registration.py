"""What a user adds from outside of the packages, by registration alone: methods, and a backbone family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.backbones.tiny import write_tiny_sd
from core.backbones.unet import UNetBackbone
from core.config import UserError, compose, from_yaml, resolve, to_yaml
from core.identity import run_id
from core.run import Run
from core.schema import BackboneConfig, register_schema
from experiments.build import FAMILIES, build_backbone
from experiments.train import train_config
from tests.contracts import toys


class OtherUNet(UNetBackbone):
    """A family of a user's own."""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    with toys.forgotten_afterwards():
        yield


def test_a_method_and_a_family_of_a_users_own_train_like_ours(tmp_path: Path) -> None:
    """Composed after others were, identified, trained, and read back from the run's folder."""
    compose("flash/tiny", ["seed=5"])
    toys.register()
    register_schema("backbone", "other_unet", BackboneConfig)
    FAMILIES["other_unet"] = OtherUNet
    own = [
        "method=toy_two_turns", "backbone=other_unet", "backbone.family=other_unet",
        f"backbone.path={write_tiny_sd(tmp_path / 'tiny')}", "train.budget.amount=8", "data.num_variants=1",
        f"execution.runs_dir={tmp_path}/runs", "execution.sample_every_images=8",
    ]  # fmt: skip
    config = resolve(compose("flash/tiny", own))
    assert train_config(config) == 0
    run = Run.open(run_id(config), tmp_path / "runs")
    assert run.state() == "done" and run.metrics()[-1]["towards/distance"] > 0
    assert run_id(from_yaml(to_yaml(config))) == run.id
    assert (run.path / "samples" / "0000000008.png").exists()


def test_the_line_for_an_unknown_family_names_those_that_are_registered() -> None:
    register_schema("backbone", "nobody", BackboneConfig)
    config = resolve(
        compose("flash/tiny", ["backbone=nobody", "backbone.family=nobody", "backbone.path=random:tiny-sd"])
    )
    with pytest.raises(UserError, match="backbone.family=nobody is unknown; allowed: unet, unet_sdxl"):
        build_backbone(config)
