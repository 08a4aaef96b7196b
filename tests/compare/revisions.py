"""Two checkouts of the project, and the same small commands run in each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config import ExperimentConfig, UserError, compose

REPLAY = Path(__file__).with_name("replay.py")
GOLDEN = "golden curves"
NUM_PICTURES = 12
# Four iterations, so that each of Flash Diffusion's four stages has one, and four pictures for every measurement.
# A checkout runs without a setting that it does not know: after a renaming both names stand here.
SMALL = [
    "seed=0", "train.batch_size=2", "train.precision=fp32", "data.num_variants=1",
    "eval.metrics=[kd_effnet,kd_teacher,diversity]", "eval.steps=[2]", "eval.num_images=4", "eval.num_reference=8",
    "eval.num_diversity_prompts=2", "eval.images_per_prompt=2", "eval.batch_size=4",
    "execution.device=cpu", "execution.num_threads=1", "execution.sharding=none", "execution.log_every_images=1",
    "execution.checkpoint_every_images=1000", "execution.sample_every_images=1000",
]  # fmt: skip
EMBEDDED = ["data.split=heldout", "eval.splits=[heldout]"]  # the smaller split
TRAINED = ["train.budget.amount=4", "train.budget.unit=iterations"]
OF_METHOD = {
    "flash": [*TRAINED, "method.num_timesteps=8"],
    "dmd2": [*TRAINED, "method.ttur=2"],
    "teacher": ["method.steps=4"],
}
# A random pipeline of the same class for each published one
TWINS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tiny-sd",
    "stabilityai/stable-diffusion-xl-base-1.0": "tiny-sdxl",
    "PixArt-alpha/PixArt-XL-2-1024-MS": "tiny-pixart",
    "stabilityai/stable-diffusion-3-medium-diffusers": "tiny-sd3",
    "black-forest-labs/FLUX.2-dev": "tiny-flux2-dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "tiny-flux2",
}
DINO = """
import sys, torch
from transformers import Dinov2Config, Dinov2Model
torch.manual_seed(0)
sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14)).save_pretrained(sys.argv[1])
"""


@dataclass(frozen=True)
class Side:
    """A revision at work: ``code`` is its checkout, ``folder`` holds its caches, runs and logs."""

    code: Path
    folder: Path

    @property
    def experiments(self) -> list[str]:
        """Names of the checkout's experiments."""
        root = self.code / "experiments" / "config" / "experiment"
        return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))

    def log(self, job: str) -> Path:
        """The file that holds all that a job printed."""
        return self.folder / "logs" / f"{job.replace('/', '-').replace(' ', '-')}.txt"

    def results(self) -> dict[str, dict[str, Any]]:
        """The exit code (``code``) of each job, and the settings that it ran without (``dropped``)."""
        return json.loads((self.folder / "results.json").read_text())

    def run_folder(self, experiment: str) -> Path | None:
        """The run that the training of an experiment has left."""
        found = sorted((self.folder / "runs" / experiment).rglob("config.yaml"))
        return found[0].parent if found else None


@contextlib.contextmanager
def checkouts(root: Path, revision: str, folder: Path) -> Iterator[tuple[Side, Side]]:
    """The project at ``revision`` and as it lies in ``root``, uncommitted and new files included.

    Raises: UserError: the revision is unknown.
    """
    before, after = (Side(folder / name / "code", folder / name) for name in ("before", "after"))
    _copy_working_tree(root, after.code)
    added = _git(root, "worktree", "add", "--detach", str(before.code), revision)
    if added.returncode:
        raise UserError(f"revision {revision}: {added.stderr.strip().splitlines()[-1]}")
    try:
        yield before, after
    finally:
        _git(root, "worktree", "remove", "--force", str(before.code))


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)


def _copy_working_tree(root: Path, target: Path) -> None:
    listing = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    for name in listing.split("\0"):
        source = root / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


@dataclass(frozen=True)
class Inputs:
    """Files that a user would bring: ``pictures`` with captions, and a network of DINOv2's class."""

    pictures: Path
    dino: Path

    @classmethod
    def write(cls, folder: Path) -> Inputs:
        """Small random ones below ``folder``, the same at every call."""
        inputs = cls(folder / "pictures", folder / "dino")
        inputs.pictures.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (NUM_PICTURES, 4, 4, 3), np.uint8)
        for number, picture in enumerate(pixels):
            Image.fromarray(picture).resize((64, 64)).save(inputs.pictures / f"{number}.png")
            (inputs.pictures / f"{number}.txt").write_text(f"picture {number}")
        subprocess.run([sys.executable, "-c", DINO, str(inputs.dino)], check=True, capture_output=True)
        return inputs


def replay(side: Side, experiments: Sequence[str], inputs: Inputs) -> None:
    """Run the golden curves and the small training of every experiment with the code of a side."""
    jobs = _jobs(side, experiments, inputs)
    (side.folder / "logs").mkdir(parents=True)
    (side.folder / "jobs.json").write_text(json.dumps(jobs, indent=1))
    settings = {"PYTHONPATH": str(side.code), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [sys.executable, "-P", str(REPLAY), str(side.folder / "jobs.json")]
    subprocess.run(command, env=os.environ | settings | threads, cwd=side.folder, check=True)


def _jobs(side: Side, experiments: Sequence[str], inputs: Inputs) -> dict[str, dict[str, Any]]:
    jobs = {GOLDEN: ("tests.training.golden", [], side.code)}
    for name in experiments:
        if name in side.experiments:
            config = compose(name)
            given = [f"data.path={inputs.pictures}"] if config.scale == "paper" else []
            runs = f"execution.runs_dir={side.folder}/runs/{name}"
            training = [name, "--evaluate", runs, *small(config, inputs)]
            jobs[f"config {name}"] = ("experiments.cli", ["config", name, *given], side.folder)
            jobs[name] = ("experiments.cli", ["train", *training], side.folder)
    return {
        name: {"module": module, "arguments": arguments, "folder": str(folder), "log": str(side.log(name))}
        for name, (module, arguments, folder) in jobs.items()
    }


def small(config: ExperimentConfig, inputs: Inputs) -> list[str]:
    """Settings that make an experiment take seconds; one of paper scale gets a random pipeline of its class.

    Raises: UserError: it has no such pipeline.
    """
    method = config.method
    settings = [*SMALL, *OF_METHOD.get(method.name, TRAINED)]
    if getattr(method, "gan", None) == "dino":
        settings.append(f"method.dino_path={inputs.dino}")
    if getattr(method, "distill_loss", None) == "lpips":
        settings.append("method.distill_loss=effnet_lite1")  # LPIPS needs a file that is not embedded
    if config.scale != "paper":
        return [*settings, *EMBEDDED]
    if config.backbone.path not in TWINS:
        raise UserError(f"backbone.path={config.backbone.path} has no tiny twin in {Path(__file__).name}: TWINS")
    twin = f"backbone.path=random:{TWINS[config.backbone.path]}"
    return [*settings, twin, f"data.path={inputs.pictures}", "data.image_size=64", "eval.splits=[train]"]
