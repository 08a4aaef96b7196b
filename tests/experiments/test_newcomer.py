"""The newcomer's path, as the README tells it: own pictures, the embedded teacher, and at the end diffusers alone."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from core.config import locate
from core.randomness import Stream
from core.run import find_runs
from experiments.cli import main

COLOURS, SHAPES, STEPS, PROMPT = ("red", "green", "blue", "orange"), ("ellipse", "rectangle"), 2, "red ellipse"
SMALL = [
    "train.budget.amount=8", "train.batch_size=4", "train.precision=fp32", "execution.num_threads=1",
    "method.num_timesteps=4", "execution.solve_batch=4", f"eval.steps=[{STEPS}]", "eval.num_images=8",
    "eval.num_reference=16", "eval.num_diversity_prompts=2", "eval.images_per_prompt=2", "eval.weights=student",
]  # fmt: skip
# The exported README's code, with our noises in the place of those that the pipeline would draw; then the teacher
ALONE = """
import sys
import numpy as np, torch
from unittest.mock import patch
first, second = torch.from_numpy(np.load("noises.npy"))
noises = lambda *args, rest=[second, torch.zeros_like(first)] * 2, **options: rest.pop(0)
patch("diffusers.schedulers.scheduling_lcm.randn_tensor", noises).start()
{code}
pipe.unload_lora_weights()
{drawing}
image.save("teacher.png")
assert not {{name.split(".")[0] for name in sys.modules}} & {{"core", "experiments"}}
"""


def own_pictures(folder: Path) -> Path:
    """A hundred pictures of several sizes and kinds with captions, some in a folder of their own."""
    draw = random.Random(0)
    for number in range(100):
        colour, shape = draw.choice(COLOURS), draw.choice(SHAPES)
        picture = Image.new("RGBA", (draw.randint(50, 120), draw.randint(50, 120)), (0, 0, 0, 0))
        getattr(ImageDraw.Draw(picture), shape)((10, 10, 40, 40), fill=colour)
        file = folder / ("more" if number % 10 == 0 else ".") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number % 3 == 0:
            picture.convert("RGB").save(file.with_suffix(".jpg"))
        else:
            picture.save(file)
        file.with_suffix(".txt").write_text(f"{colour} {shape}")
    return folder


def test_from_own_pictures_to_diffusers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_pictures(tmp_path / "my-pictures")
    assert main(["train", "flash/emoji", "data.path=my-pictures", *SMALL]) == 0
    (run,) = find_runs("runs")
    log = (run / "log.txt").read_text()
    assert "of 100 examples are held out" in log and "no example has an emoji's metadata" in log
    assert main(["sample", str(run), PROMPT, "--teacher-steps", "0", "--out", "drawn"]) == 0
    assert main(["evaluate", str(run)]) == 0
    values = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    measured = {(line["metric"], line["split"]) for line in values}
    assert measured == {
        (metric, split)
        for metric in ("kd_effnet", "fd_effnet", "clip_score", "diversity")
        for split in ("train", "heldout")
    }
    assert main(["export", str(run), "--out", "student", "--steps", str(STEPS)]) == 0
    ours = np.asarray(Image.open(next(Path("drawn").glob("*student*.png"))).convert("RGB")).astype(int)
    theirs, teacher = diffusers_alone(PROMPT)
    assert np.abs(ours - theirs).max() <= 1 and np.abs(ours - teacher).max() > 10


def diffusers_alone(prompt: str) -> list[np.ndarray]:
    """The pictures of the student and of its teacher, by the exported README's own code in a process of its own."""
    noises = [Stream(0, "sample", f"noise {k}").normal(np.arange(1), (8, 8, 8)) for k in range(STEPS)]
    np.save("noises.npy", np.stack(noises))
    code = Path("student/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    import_line, _, code = code.partition("\n")
    assert import_line.startswith("from core.config import locate"), "the base model comes with fewstep"
    code = re.sub(r'locate\("([^"]*)"\)', lambda found: repr(str(locate(found[1]))), code)
    code = re.sub(r'prompt="[^"]*"', f'prompt="{prompt}", latents=first', code)
    (drawing,) = re.findall(r"^image = .*$", code, re.MULTILINE)
    script = ALONE.format(code=code, drawing=drawing)
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=200)
    return [np.asarray(Image.open(name)).astype(int) for name in ("image.png", "teacher.png")]
