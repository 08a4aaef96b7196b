"""Composition: one way of applying values, equal to Hydra's own; what is stored is what is read."""

import marshal
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from core.config import (
    UserError,
    _compose_groups,
    _composed,
    _store_schemas,
    compose,
    config_dir,
    experiments,
    from_yaml,
    to_yaml,
)
from core.overrides import _parse, parse
from core.typed import _loader, load_yaml

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
    _store_schemas()  # not told to Hydra by a composition that is remembered
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        tree = hydra.compose("experiment/flash/tiny", overrides=[*groups, *OVERRIDES])
    tree.name = "flash/tiny"
    assert OmegaConf.to_object(tree) == ours


@pytest.mark.parametrize("name", experiments())
def test_a_remembered_composition_is_the_composed_one(name: str) -> None:
    _composed.cache_clear()
    composed = _composed(name, ())
    _composed.cache_clear()
    assert marshal.loads(composed) == _compose_groups(name, ()) == marshal.loads(_composed(name, ()))
    assert list(Path(".cache/composed").glob("*-*.json"))


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
    _composed.cache_clear()
    composed = _composed("flash/tiny", ())
    (file,) = Path(".cache/composed").glob("*-*.json")
    text = file.read_text()
    file.write_text(damage)
    _composed.cache_clear()
    assert _composed("flash/tiny", ()) == composed and file.read_text() == text
    monkeypatch.setattr("core.config._sources_hash", lambda files: "other")
    _composed.cache_clear()
    _composed("flash/tiny", ())
    assert len(list(Path(".cache/composed").glob("*-*.json"))) == 2
    _composed.cache_clear()


@pytest.mark.parametrize(
    "override",
    [
        "seed=7", "method.guidance_min=2", "method.guidance_min=1e1", "train.ema_decay=.5",
        "eval.steps=[3]", "eval.metrics=[]",
        'execution.label="a b"', "execution.label='1e3'", "execution.label=12",
        "execution.report_to=[tensorboard]", "eval.prompts=@a/b.txt",
        "backbone.lora_targets=[a,b.c]", "train.budget={amount: 64, unit: images}",
        "execution.micro_batch=2", "execution.micro_batch=null", 'method.distill_loss="l1"', "train.max_grad_norm=5",
        "backbone.revision=null-1", "backbone.path=4", "backbone.revision=7", "execution.label=",
    ],
)  # fmt: skip
def test_one_value_is_what_hydra_makes_of_it(override: str) -> None:
    _store_schemas()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        tree = hydra.compose("experiment/flash/tiny", overrides=[override])
    theirs = OmegaConf.to_object(tree)
    theirs.name = "flash/tiny"
    assert compose("flash/tiny", [override]) == theirs


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=x", "seed=x: Expected int, got str"),
        ("seed=1.5", "seed=1.5: Expected int, got float"),
        ("seed=true", "seed=True: Expected int, got bool"),
        ("train=4", "train=4: Expected mapping, got int"),
        ("train.budget.amount.x=4", "unknown key 'train.budget.amount.x'; nearest: train.budget.amount"),
        ("eval.steps=[1,a]", "eval.steps[1]=a: Expected int, got str"),
        ("method.stage_weights=[[1,x]]", "method.stage_weights[0][1]=x: Expected float, got str"),
        ("backbone.lora_targets=3", "backbone.lora_targets=3: Expected list, got int"),
        ("seeed=1", "unknown key 'seeed'; nearest: seed"),
        ("train.budget={amont: 5}", "unknown key 'train.budget.amont'; nearest: train.budget.amount"),
        ("data.path='${oc.env:HOME}'", "data.path=${oc.env:HOME}: values are taken as they are written"),
        ("seed=1,2", "'seed=1,2' gives several values; one is allowed"),
        ("+seed=1", "'+seed=1': keys are neither added nor deleted; write key=value"),
        ("seed", "'seed' is not an override; write key=value, e.g. seed=1"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        compose("flash/tiny", [override])
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


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


@pytest.mark.parametrize(
    "value",
    [
        "1", "-1", "-0", "1.5", "1e-5", "1.0e+05", "1e400", "12345678901234567890123", "true", "false", "null", " 1 ",
        '"x y"', '""', '"1"', '"null"', '" a=b, c "', '"é"', "[]", "[1,2]", "[1.0, 2]", '["a" , ""]', "[true,null]",
        "/tmp/a-1/b_2.c/d", "/1/null", "/a/../b",
        # read by Hydra alone
        "00", "1.", ".5", "1-2", "-", "1e", "[ ]", "a", "[a, 1]", '"a\\tb"', "'a'", "{a: 1}",
        "/", "/a/", "/a b", "/a:b",
    ],
)  # fmt: skip
def test_what_is_read_as_json_is_what_hydra_reads(value: str) -> None:
    text = f"eval.anything={value}"
    assert repr(parse(text)) == repr(_parse(text))


def test_yaml_is_read_by_omegaconf_s_rules() -> None:
    text = "rate: 1e-5\nday: 2026-01-01\nno: off\npath: ~\nlist: [1, 1_000, .inf]\n'a b': ${x}\n5: 1:30\n"
    assert repr(load_yaml(text, "a mapping")) == repr(OmegaConf.to_container(OmegaConf.create(text)))
    assert load_yaml("# nothing\n", "a mapping") == {}
    with pytest.raises(UserError, match='found duplicate key a in "<unicode string>", line 3, column 1$'):
        load_yaml("a: 1\nb: 2\na: 1\n", "a mapping")
    with pytest.raises(UserError, match=r"^not a grid \(a mapping is expected\)$"):
        load_yaml("- a\n", "a grid")


def test_yaml_is_read_by_omegaconfs_rules() -> None:
    """They stand in core/typed.py, because OmegaConf is slow to import."""

    def rules(loader: type) -> dict[str, list[tuple[str, str]]]:
        found = loader.yaml_implicit_resolvers.items()
        return {first: [(tag, "".join(form.pattern.split())) for tag, form in kept] for first, kept in found}

    assert rules(_loader()) == rules(get_yaml_loader())


def test_what_is_written_into_one_configuration_is_in_no_other() -> None:
    """Equal parts are checked once and remembered, and each configuration has its own copies."""
    first = compose("flash/tiny", ["method.dmd_weight=[0, 0, 0, 1]"])
    first.method.dmd_weight.append(2.0)
    first.execution.label, first.eval.steps[0] = "mine", 8
    second = compose("flash/tiny", ["method.dmd_weight=[0, 0, 0, 1]"])
    assert second.method.dmd_weight == [0.0, 0.0, 0.0, 1.0]
    assert second.execution.label == "" and second.eval == compose("flash/tiny").eval != first.eval
