"""Records the golden loss curves: ``python -m tests.training.golden`` (only when a change of results is meant)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests import worlds

FOLDER = Path(__file__).parents[1] / "golden"
# Experiment and overrides for 50 updates with all terms, and the terms, by method
CURVES: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "flash": (
        "flash/tiny",
        ["train.budget.amount=200", "method.adversarial_weight=[.1,.1,.2,.3]", "method.dmd_weight=[.1,.3,.5,.7]"],
        ("student/distill", "student/dmd", "student/adversarial", "critic/critic", "student/latent_std"),
    ),
    "lcm": (
        "lcm/tiny",
        ["train.budget.amount=200", "method.guidance_max=9"],
        ("student/consistency", "student/latent_std"),
    ),
    "progressive": (
        "progressive/tiny",
        ["train.budget.amount=200", "method.guidance_max=9", "method.weighting=v"],
        ("student/distill", "student/latent_std"),
    ),
    "guidance": ("guidance/tiny", ["train.budget.amount=200"], ("student/distill", "student/latent_std")),
    "flash_dmd": (
        "flash_dmd/tiny",
        ["train.budget.amount=51", "method.adversarial_ratio=0.1"],
        ("student/dmd", "student/adversarial", "fake_score/denoise", "critic/critic", "gradient/adversarial"),
    ),
    "dmd2": (
        "dmd2/tiny",
        ["train.budget.amount=51", "method.ttur=5"],
        ("student/dmd", "student/adversarial", "fake_score/denoise", "fake_score/critic", "student/latent_std"),
    ),
}


def curve(method: str, folder: Path) -> dict[str, list[float]]:
    """Every tenth of 50 iterations of a method, by term."""
    experiment, overrides, terms = CURVES[method]
    trained = worlds.trainer(folder, overrides, experiment=experiment)
    trained.train()
    lines = trained.run.metrics()
    lines = lines[9::10] if all(terms[0] in line for line in lines) else lines[10::10]  # where the student has a turn
    return {term: [float(f"{line[term]:.6g}") for line in lines] for term in terms}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in CURVES:
        with tempfile.TemporaryDirectory() as folder:
            (FOLDER / f"{name}.json").write_text(json.dumps(curve(name, Path(folder)), indent=1) + "\n")
