"""Sheets and measurements for the card of an embedded teacher.

``python -m experiments.emoji.card --teacher FOLDER --data FOLDER --out FOLDER`` writes samples.png (prompts, held-out
combinations last), guidance.png (one prompt a row, guidance 1 to 6), memorisation.png (samples beside their
nearest training pictures) and measured.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.backbones.roles import Sharing
from core.data.shards import ImageTextDataset, open_dataset
from core.methods.teacher import teacher_sample
from core.metrics.fid import Extractor, kernel_distance, load_extractor
from core.randomness import Stream
from core.sampler import teacher_setting
from experiments.build import FAMILIES
from experiments.emoji.recipes.train_vae import psnr, validation_images
from experiments.emoji.sheets import save_sheet
from experiments.emoji.views import view

PROMPTS = (
    "red apple",
    "pizza on a white background",
    "blue heart on a yellow background",
    "cat face",
    "flag japan",
    "red car",
    "face smiling",
    "animal mammal",
    "food fruit on a green background",
    "woman pilot dark skin tone",
    "person role",
)
GUIDANCES = (1.0, 2.0, 3.0, 4.0, 6.0)
STEPS = (1, 2, 4, 8, 25)


class DrawingTeacher:
    """DPM-Solver++ samples of the teacher in a pipeline folder, with keyed noise."""

    def __init__(self, folder: Path, family: str) -> None:
        self.backbone = FAMILIES[family].load(str(folder), Sharing("full"), image_size=64)
        self.null = self.backbone.encode_text([""])

    def __call__(self, prompts: list[str], steps: int, guidance: float, seed: int = 0) -> np.ndarray:
        """uint8 (n, 64, 64, 3); the noise is a function of (seed, position in the list)."""
        shape = self.backbone.latent_shape
        noise = torch.from_numpy(Stream(seed, "card", "noise").normal(range(len(prompts)), shape)).float()
        parts = (slice(i, i + 64) for i in range(0, len(prompts), 64))
        return np.concatenate([self._pictures(prompts[part], noise[part], steps, guidance) for part in parts])

    def _pictures(self, prompts: list[str], noise: torch.Tensor, steps: int, guidance: float) -> np.ndarray:
        cond = self.backbone.encode_text(prompts)
        return self.backbone.decode(
            teacher_sample(self.backbone, noise, cond, self.null, teacher_setting(steps, guidance).sampler)
        )


def held_out_prompts(data: ImageTextDataset, count: int) -> list[str]:
    """Full names of ``count`` held-out pictures, evenly spread."""
    return [data[i].caption for i in np.linspace(0, len(data) - 1, count).astype(int)]


def guidance_sheet(teacher: DrawingTeacher, prompts: list[str], path: Path) -> None:
    """A row per prompt and guidance, the same four noises."""
    rows, labels = [], []
    for prompt in prompts:
        for guidance in GUIDANCES:
            rows.append(teacher([prompt] * 4, 25, guidance))
            labels.append(f"{prompt}, w = {guidance:g}")
    save_sheet(path, rows, labels)


def memorisation_sheet(
    teacher: DrawingTeacher, extractor: Extractor, data: ImageTextDataset, guidance: float, path: Path
) -> None:
    """Twelve samples, each with its three nearest among 3 views of every training picture, in feature space."""
    views = [view(data[i], variant, seed=5)[0] for variant in range(3) for i in range(len(data))]
    bank = np.stack(views)
    prompts = [view(data[(i * 271) % len(data)], i, seed=6)[1] for i in range(12)]
    samples = teacher(prompts, 50, guidance, seed=6)
    bank_features, features = (extractor(x) for x in (bank, samples))
    bank_features /= np.linalg.norm(bank_features, axis=1, keepdims=True)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    nearest = np.argsort(-features @ bank_features.T, axis=1)[:, :3]
    rows = [np.concatenate([sample[None], bank[found]]) for sample, found in zip(samples, nearest, strict=True)]
    save_sheet(path, rows, prompts)


def kernel_distances(
    teacher: DrawingTeacher, extractor: Extractor, data: ImageTextDataset, count: int
) -> dict[str, Any]:
    """``kd_effnet`` against real views by steps and guidance; then by steps at each one's best, over noise seeds."""
    drawn = [view(data[(i * 7919) % len(data)], i, seed=7) for i in range(count)]
    reference = extractor(np.stack([view(data[(i * 6101) % len(data)], i, seed=8)[0] for i in range(2 * count)]))
    real, prompts = extractor(np.stack([image for image, _ in drawn])), [caption for _, caption in drawn]

    def distance(steps: int, guidance: float, seed: int = 0) -> float:
        return float(kernel_distance(extractor(teacher(prompts, steps, guidance, seed)), reference))

    sweep = {steps: {w: distance(steps, w) for w in GUIDANCES} for steps in STEPS}
    best = {steps: min(values, key=values.get) for steps, values in sweep.items()}
    seeds = {steps: [sweep[steps][w], *(distance(steps, w, seed) for seed in (1, 2))] for steps, w in best.items()}
    return {
        "num_images": count,
        "num_reference": 2 * count,
        "real": float(kernel_distance(real, reference)),
        "by_steps_and_guidance": sweep,
        "best_guidance": best,
        "at_best_guidance": {n: {"mean": np.mean(v), "sd": np.std(v, ddof=1)} for n, v in seeds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--family", choices=["unet", "flux2"], default="unet")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=4.0, help="for the sheets")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--sheets-only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, held_out = open_dataset(args.data, "train"), open_dataset(args.data, "heldout")
    teacher = DrawingTeacher(args.teacher, args.family)
    prompts = [*PROMPTS, *held_out_prompts(held_out, 6)]
    samples = teacher([p for p in prompts for _ in range(6)], 25, args.guidance)
    save_sheet(args.out / "samples.png", np.split(samples, len(prompts)), prompts)
    guidance_sheet(teacher, [PROMPTS[0], PROMPTS[3], PROMPTS[6], prompts[-1]], args.out / "guidance.png")
    if args.sheets_only:
        return
    extractor = load_extractor("effnet")
    memorisation_sheet(teacher, extractor, train, args.guidance, args.out / "memorisation.png")
    measured = kernel_distances(teacher, extractor, train, args.num_images)
    measured["vae_psnr_heldout_db"] = psnr(teacher.backbone.vae, validation_images(held_out, 290))
    (args.out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
