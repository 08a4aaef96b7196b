"""Records the golden loss curves: ``python -m tests.training.golden`` (only when a change of results is meant)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests import worlds

GOLDEN = Path(__file__).parents[1] / "golden" / "flash.json"
TERMS = ("student/distill", "student/dmd", "student/adversarial", "critic/critic", "student/latent_std")


def curve(folder: Path) -> dict[str, list[float]]:
    """Every tenth of 50 updates of Flash Diffusion with all terms, by term."""
    overrides = [
        "train.budget.amount=200", "method.adversarial_weight=[.1,.1,.2,.3]", "method.dmd_weight=[.1,.3,.5,.7]"
    ]  # fmt: skip
    trained = worlds.trainer(folder, overrides)
    trained.train()
    lines = trained.run.metrics()[9::10]
    return {term: [float(f"{line[term]:.6g}") for line in lines] for term in TERMS}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(curve(Path(folder)), indent=1) + "\n")
        print(GOLDEN.read_text())
