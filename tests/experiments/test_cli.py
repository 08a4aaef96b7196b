"""The command line: mistakes are one line that says what was meant, before anything large is imported; all help."""

import argparse
import importlib.metadata
import json
import subprocess
import sys

import pytest

from ablations import grid
from core.catalogue import METRICS
from core.config import experiments
from core.schema import SCHEMAS
from experiments.cli import build_parser, main
from experiments.parser import commands
from tests.packaging.test_installation import HEAVY

TYPOS = {
    "trian": "unknown COMMAND 'trian'; nearest: train;",
    "train flash/emjoi": "unknown experiment 'flash/emjoi'; nearest: flash/emoji,",
    "train flash/emoji --evalute": "no option --evalute; nearest: --evaluate",
    "train": "required: EXPERIMENT; see: fewstep train --help",
    "config flash/tyni": "nearest: flash/tiny",
    "plan-memory dmd2/flux2_dve": "nearest: dmd2/flux2_dev",
    "plan-memory dmd2/tiny --gpsu 2": "no option --gpsu; nearest: --gpus",
    "plan-memory dmd2/tiny --gpus two": "--gpus: invalid int value: 'two'",
    "bench flash/emjoi": "nearest: flash/emoji",
    "bench --memroy": "no option --memroy; nearest: --memory",
    "sample RUN --stpes 2": "no option --stpes; nearest: --steps",
    "sample RUN --weights studnet": "unknown --weights 'studnet'; nearest: student",
    "sample flash/emjoi": "'flash/emjoi' is neither a run folder nor the id of a run in runs/; nearest: flash/emoji",
    "evaluate flash/emjoi": "nearest: flash/emoji",
    "evaluate RUN --finishde": "nearest: --finished",
    "export flash/emjoi --out x": "nearest: flash/emoji",
    "export RUN --otu x": "required: --out",
    "export RUN --out x --fromat kohya": "no option --fromat; nearest: --format",
    "push RUN": "required: --to",
    "push RUN --to me/apples --pirvate": "no option --pirvate; nearest: --private",
    "push 0123456789 --to apples": "--to apples is no id of the hub; give OWNER/NAME, e.g. your-name/apples",
    "verify 0123456789": "'0123456789' is neither a run folder nor the id of a run in runs/",
    "rerun 0123456789": "'0123456789' is neither a run folder nor the id of a run in runs/",
    "list grid": "unknown KIND 'grid'; nearest: grids",
    "completion zhs": "unknown SHELL 'zhs'; nearest: zsh",
    "grid rnu x": "unknown ACTION 'rnu'; nearest: run",
    "grid list seed=1": "takes no 'seed=1'",
    "grid show flash_loses": "unknown grid 'flash_loses'; nearest: flash_losses",
    "grid plan flash_loses": "nearest: flash_losses",
    "grid run flash_loses": "nearest: flash_losses",
    "grid run flash_losses --solts 2": "nearest: --slots",
    "grid submit flash_losses --clutser x": "nearest: --cluster",
    "grid submit flash_losses --cluster locl": "unknown cluster 'locl'; nearest: local",
    "grid status flash_loses": "nearest: flash_losses",
    "grid retry flash_loses": "nearest: flash_losses",
    "grid cancel flash_loses": "nearest: flash_losses",
    "grid logs flash_loses all-s0": "nearest: flash_losses",
    "doctor --cluster locl": "nearest: local",
    "clean --solution --dryrun": "no option --dryrun; nearest: --dry-run",
    "table nope": "unknown grid 'nope'; all: dmd2_fake_score,",
    "table flash_losses --format txe": "unknown --format 'txe'; nearest: tex",
    "figure flash_loses": "nearest: flash_losses",
    "report flash_loses": "nearest: flash_losses",
    "records flash_loses": "nearest: flash_losses",
    "claims flash_loses": "GRID=flash_loses is unknown",
    "plan-power flash_loses": "nearest: flash_losses",
    "results --pagse": "nearest: --pages",
}
IN_ONE_PROCESS = """
import contextlib, io, json, sys
from experiments.cli import main
for text in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(text.split())
    print(json.dumps([code, said.getvalue(), sorted(set(sys.modules) & set(HEAVY))]))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, stderr and large libraries so far of every typo, in one fresh process."""
    program = f"HEAVY = {HEAVY!r}\n{IN_ONE_PROCESS}"
    given = json.dumps(list(TYPOS))
    done = subprocess.run([sys.executable, "-c", program], input=given, capture_output=True, text=True, check=True)
    return dict(zip(TYPOS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("text", TYPOS)
def test_a_typo_is_one_line_that_names_what_was_meant(
    answers: dict[str, tuple[int, str, list[str]]], text: str
) -> None:
    code, said, loaded = answers[text]
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert TYPOS[text] in said, said
    assert loaded in ([], ["omegaconf"]), "a cluster's profile and a grid may be read before the other's name is found"


def test_every_subcommand_has_a_typo_here() -> None:
    names = {words[0] for words, _ in commands(build_parser()) if words}
    actions = {words[1] for words, _ in commands(build_parser()) if words[:1] == ("grid",) and words[1:]}
    tried = [text.split() for text in TYPOS]
    assert names - {words[0] for words in tried} == set()
    assert actions - {words[1] for words in tried if words[0] == "grid"} == set()


def test_a_wrong_value_is_told_before_torch_is_imported() -> None:
    program = (
        "import sys; from experiments.cli import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    )
    words = ["train", "flash/tiny", "sed=1"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stderr == "error: unknown key 'sed'; nearest: seed, scale\n" and done.stdout == "2 False\n"


def test_everything_has_a_help_text() -> None:
    missing = []
    for words, parser in commands(build_parser()):
        for action in parser._actions:
            if not action.help and not isinstance(action, argparse._SubParsersAction):
                missing.append((*words, action.dest))
            for choice in getattr(action, "_choices_actions", ()):
                if not choice.help:
                    missing.append((*words, choice.dest))
        if not parser.description:
            missing.append(words)
    assert missing == []


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fewstep {importlib.metadata.version('fewstep')}\n"


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["list", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_everything_that_can_be_named_is_listed_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys)
    heads = [line for line in lines if line and not line.startswith(" ")]
    assert heads == ["experiments", "methods", "backbones", "metrics", "grids"]
    rows = dict(line.strip().partition(" ")[::2] for line in lines if line.startswith("  "))
    assert rows.keys() > {*experiments(), *grid.names(), *SCHEMAS["method"], *METRICS, "emoji_sd"}
    assert [name for name, text in rows.items() if len(text) < 10] == []


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("experiments", "dmd2/emoji_flux2 DMD2 on the embedded miniature of FLUX.2, 4 steps"),
        ("grids", "flash_losses Influence of the loss terms (Flash Diffusion, Figure 5, top left)"),
        ("metrics", "kid KID: clean-fid Inception kernel distance"),
        ("backbones", "sdxl Stable Diffusion XL with Flash Diffusion's LoRA of rank 64: 92.9M parameters [P]"),
        ("methods", "teacher No training: the frozen teacher sampled with an ODE solver."),
    ],
)
def test_one_kind_is_listed_alone(capsys: pytest.CaptureFixture[str], kind: str, line: str) -> None:
    assert line.split() in [found.split() for found in listed(capsys, kind)]
