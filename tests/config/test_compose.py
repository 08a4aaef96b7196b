"""Composition: one way of applying values, equal to Hydra's own; what is stored is what is read."""

import pickle
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from core.config import _base_object, compose, config_dir, experiments, from_yaml, to_yaml
from core.overrides import fitting, simple_value

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


@pytest.mark.parametrize("name", experiments())
def test_a_remembered_composition_is_the_composed_one(name: str) -> None:
    _base_object.cache_clear()
    composed = _base_object(name, ())
    _base_object.cache_clear()
    assert composed is None or pickle.loads(_base_object(name, ())) == pickle.loads(composed)
    assert (composed is None) == (not list(Path(".cache/composed").glob("*.json")))


def test_a_second_process_needs_no_hydra(tmp_path: Path) -> None:
    words = [
        "seed=1",
        "method.student_lr=1.0e-3",
        "method.dmd_weight=[0,0,0,0]",
        "eval.steps=[1,2]",
        "eval.splits=[train]",
    ]
    code = (
        "import sys; from core.config import compose\n"
        f"config = compose('flash/emoji', {words!r})\n"
        "print(config.method.dmd_weight, config.eval.steps, config.method.student_lr, 'hydra' in sys.modules)"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first.split()[-1] == "True" and second.split()[-1] == "False"
    assert first.split()[:-1] == second.split()[:-1] == ["[0.0,", "0.0,", "0.0,", "0.0]", "[1,", "2]", "0.001"]


@pytest.mark.parametrize("damage", ["{", "{}", "[]"])
def test_what_is_damaged_or_of_other_sources_is_composed_again(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    _base_object.cache_clear()
    composed = _base_object("flash/tiny", ())
    (file,) = Path(".cache/composed").glob("*.json")
    text = file.read_text()
    file.write_text(damage)
    _base_object.cache_clear()
    assert pickle.loads(_base_object("flash/tiny", ())) == pickle.loads(composed) and file.read_text() == text
    monkeypatch.setattr("core.config._sources_hash", lambda files: "other")
    _base_object.cache_clear()
    _base_object("flash/tiny", ())
    assert len(list(Path(".cache/composed").glob("*.json"))) == 2
    _base_object.cache_clear()


@pytest.mark.parametrize(
    ("value", "current", "taken"),
    [
        (3, 1, 3), (0.5, 1.0, 0.5), ("a", "b", "a"), ([0, 1], [0.5], [0.0, 1.0]),
        ([1], [2, 3], [1]), (["x"], ["y"], ["x"]),
        (1, 1.0, None), (float("nan"), 1.0, None), (True, 1, None), ([True], [1], None), ([], ["x"], None),
        ([1], ["x"], None), ([[1]], [[2.0]], None), ([float("inf")], [1.0], None), (None, 1, None),
    ],
)  # fmt: skip
def test_only_what_omegaconf_takes_as_it_is_skips_it(value: object, current: object, taken: object) -> None:
    assert repr(fitting(value, current)) == repr(taken)


@pytest.mark.parametrize(
    "text",
    [
        "3", "-3", "0.5", "1.0e-3", "1e-3", "-2.5e+4", '"a b"', '""', "[1,2]", "[1, 0.5,-3]", "[kd_effnet,fid]",
        '["a",b]', "[0,0,0,.5]", "[true,1]", "[a b]", "[]", "[[1,2],[3,4]]", "word", "null", "true", "[1,]", "007",
        "[nan]", "1.", "1_0",
    ],
)  # fmt: skip
def test_simple_values_are_what_hydras_grammar_makes_of_them(text: str) -> None:
    ours = simple_value(text)
    try:
        theirs = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        assert ours is None
        return
    quoted = isinstance(theirs, list) and [x.text if hasattr(x, "text") else x for x in theirs]
    assert ours is None or repr(ours) == repr(quoted if quoted else theirs)


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
