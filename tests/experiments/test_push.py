"""``fewstep push`` against a stand-in of the hub: what arrives there, and every refusal in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir

import pytest
from safetensors.torch import load

from core.config import compose, resolve
from core.run import Run
from experiments.train import train_config
from tests import worlds
from tests.hub import Hub, serving

# The token of each command, and its words
PUSHES = """
import json, os, sys
from experiments.cli import main
for token, words in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    print(main(["push", *words]), "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A student of two iterations."""
    folder = tmp_path_factory.mktemp("trained")
    paths = [f"data.path={worlds.pictures(folder)}", f"execution.runs_dir={folder}/runs"]
    config = resolve(compose("flash/tiny", [*worlds.MINIATURE, *paths, "eval.steps=[2]"]))
    assert train_config(config) == 0
    return Run.create(config)


def _push(hub: Hub, *pushes: tuple[str, list[str]], **variables: str) -> tuple[list[str], list[str]]:
    """The lines of several pushes on stdout, each ending in exit code and whether torch was imported, and on stderr."""
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": "hub", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    program = [sys.executable, "-W", "ignore", "-c", PUSHES, json.dumps(pushes)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, env=os.environ | own | variables)
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_the_exported_files_arrive_at_the_hub(run: Run, tmp_path: Path) -> None:
    with serving(Hub()) as hub:
        said, errors = _push(hub, ("writer", [str(run.path), "--to", "me/apples", "--out", "kept"]))
    assert said == [f"{hub.endpoint}/me/apples", "0 True"], errors
    arrived = hub.files["me/apples", "main"]
    kept = {
        file.relative_to("kept").as_posix(): file.read_bytes() for file in Path("kept").rglob("*") if file.is_file()
    }
    assert arrived == kept and not hub.private["me/apples"]
    assert {"README.md", "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"} <= arrived.keys()
    assert b'"me/apples"\n' in arrived["README.md"], "the snippet loads it from the hub"
    _check_no_paths(arrived, run, tmp_path)


def test_a_private_branch_of_a_whole_pipeline_in_large_files(run: Run, tmp_path: Path) -> None:
    place = ["--to", "me/apples", "--private", "--revision", "two-steps"]
    with serving(Hub(large=(".safetensors",))) as hub:
        push = ("writer", [str(run.path), *place, "--merge", "--dtype", "bf16"])
        said, errors = _push(hub, push, HF_HUB_DISABLE_XET="1")
    assert said == [f"{hub.endpoint}/me/apples/tree/two-steps", "0 True"], errors
    arrived = hub.files["me/apples", "two-steps"]
    assert hub.private["me/apples"] and ("me/apples", "main") not in hub.files
    large = {name: load(content) for name, content in arrived.items() if name.endswith(".safetensors")}
    assert len(large) == len(hub.stored) == 3, "unet, vae and text encoder"
    assert {str(value.dtype) for state in large.values() for value in state.values()} == {"torch.bfloat16"}
    assert b'from_pretrained(student, revision="two-steps", torch_dtype=' in arrived["README.md"]
    assert list(Path.cwd().rglob("README.md")) == [], "what was exported is gone"
    _check_no_paths(arrived, run, tmp_path)


def _check_no_paths(arrived: dict[str, bytes], run: Run, tmp_path: Path) -> None:
    """Where the run lies, where it was exported, and where the code and the user live are told nowhere."""
    trained = str(run.path.parents[2])
    places = [trained, str(tmp_path), str(Path.home()), str(Path(__file__).parents[2]), sys.prefix, gettempdir()]
    for name, content in arrived.items():
        wanted = places[:1] if name.endswith(".safetensors") else places  # chance may write "/tmp" into weights
        assert not [place for place in wanted if place.encode() in content], name


def test_what_the_hub_would_refuse_is_told_before_anything_is_exported(run: Run) -> None:
    at_once = {
        ("writer", "apples"): "--to apples is no id of the hub; give OWNER/NAME, e.g. your-name/apples",
        ("writer", "me/red-apples.git"): "--to me/red-apples.git is no id of the hub: ",
        ("", "me/apples"): "pushing to me/apples needs a token of the hub that may write; set HF_TOKEN, or log in",
        ("writer", "me/apples", "--dtype", "fp8"): "--dtype fp8 stores whole layers",
    }
    by_the_hub = {
        ("nobody", "me/apples"): "the hub does not accept the token for me/apples; set HF_TOKEN, or log in",
        ("reader", "me/apples"): "the token may not write to me/apples; give an id of your own",
        ("writer", "you/apples"): "the token may not write to you/apples; give an id of your own",
        ("writer", "me/public", "--private"): "--private: me/public exists and is public; make it private",
    }
    with serving(Hub(private={"me/public": False}, branches={"me/public": {"main"}})) as hub:
        _check_refused(hub, run, at_once)
        assert hub.asked == []
        _check_refused(hub, run, by_the_hub)
        assert hub.files == {} and not any("preupload" in line for line in hub.asked)


def _check_refused(hub: Hub, run: Run, refusals: dict[tuple[str, ...], str], **variables: str) -> None:
    """Each push, of a token, an id and options, is refused in the line that begins so, before torch is imported."""
    pushes = [(token, [str(run.path), "--to", *words]) for token, *words in refusals]
    said, errors = _push(hub, *pushes, **variables)
    assert said == ["2 False"] * len(refusals)
    for line, wanted in zip(errors, refusals.values(), strict=True):
        assert line.startswith(f"error: {wanted}"), line


def test_without_a_network_it_is_one_clear_line(run: Run) -> None:
    with serving(Hub()) as hub:
        pass
    _check_refused(hub, run, {("writer", "me/apples"): f"{hub.endpoint} cannot be reached: "})
    offline = {("writer", "me/apples"): "HF_HUB_OFFLINE=1: the hub must not be asked"}
    _check_refused(hub, run, offline, HF_HUB_OFFLINE="1")
