"""Composition: one way of applying values, equal to Hydra's own; what is stored is what is read."""

import hydra
import pytest
from omegaconf import OmegaConf

from core.config import compose, config_dir, experiments, from_yaml, to_yaml

OVERRIDES = [
    "method.num_timesteps=16",
    "method.dmd_weight=[0,0,0,0.5]",
    "backbone.lora_targets=[to_q]",
    "execution.micro_batch=2",
    "execution.num_threads=null",
    "train.ema_decay=.95",
    "eval.at=[0.5,1]",
]


@pytest.mark.parametrize("groups", [[], ["backbone=emoji_sd", "eval=emoji"]])
def test_values_are_applied_as_hydra_does(groups: list[str]) -> None:
    ours = compose("flash/tiny", [*groups, *OVERRIDES])
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        tree = hydra.compose("experiment/flash/tiny", overrides=[*groups, *OVERRIDES])
    tree.name = "flash/tiny"
    assert OmegaConf.to_object(tree) == ours


def test_whole_numbers_are_weights_too() -> None:
    text = "method.stage_weights=[[0,0,1,0],[0,0,1,0],[0,.5,.5,0],[1,0,0,0]]"
    assert compose("flash/tiny", [text]).method.stage_weights[2] == [0.0, 0.5, 0.5, 0.0]


def test_composing_again_is_not_affected_by_earlier_values() -> None:
    assert compose("flash/tiny", ["seed=3"]).seed == 3
    assert compose("flash/tiny").seed == 0


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_composes_and_survives_storage(name: str) -> None:
    config = compose(name)
    assert config.name == name
    assert from_yaml(to_yaml(config)) == config


def test_sd15_has_the_paper_s_values() -> None:
    config = compose("flash/sd15")
    assert config.train.budget.amount * config.train.batch_size == 160_000
    assert config.backbone.lora_rank == config.backbone.lora_alpha == 128
    assert config.method.num_timesteps == 32
    assert (config.method.guidance_min, config.method.guidance_max) == (3.0, 13.0)
    assert config.method.adversarial_weight == [0.0, 0.1, 0.2, 0.3]
    assert config.method.dmd_weight == [0.0, 0.3, 0.5, 0.7]
    assert config.method.stage_weights[0] == [0.0, 0.0, 0.5, 0.5]
