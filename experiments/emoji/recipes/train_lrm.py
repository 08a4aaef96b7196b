"""Make the embedded preference set, and train the Latent Reward Model of the embedded teacher on it.

A pair is two pictures of one caption, drawn by the teacher in two of four ways: as well as it can, in few steps,
without guidance, or of another caption. Which one is better the embedded reward model of pictures says; no judge is
asked. Every draw is keyed: the same teacher gives the same set. Captions are parted, not pairs: one in eight is held
out.

``python -m experiments.emoji.recipes.train_lrm --reward FOLDER --out FOLDER --pairs 4000``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.backbones.base import Backbone, Cond
from core.backbones.roles import Sharing
from core.backbones.unet import UNetBackbone
from core.data.shards import open_dataset
from core.identity import locate
from core.losses.preference import bradley_terry
from core.methods.teacher import teacher_sample
from core.randomness import Stream
from core.rewards.base import Prompts
from core.rewards.latent import TIMES, LatentHead, latent_features, save_head, text_features
from core.sampler import Sampler
from experiments.emoji.reward import EmojiReward
from experiments.emoji.views import view

TEACHER = "package:experiments/emoji/assets/emoji-sd-v1"
DATA = "package:experiments/emoji/assets/emoji-64-v1"
BATCH = 64
# Solver's steps, guidance, and whether the caption is the picture's own
WAYS = {"best": (20, 3.0, True), "few steps": (4, 3.0, True), "unguided": (20, 1.0, True), "wrong": (20, 3.0, False)}
HELD_OUT_EVERY = 8


def draw_pairs(backbone: Backbone, captions: list[str], reward: EmojiReward) -> tuple[Tensor, Tensor, list[str]]:
    """Latents (N, 2, C, h, w), the better one first, the rewards' gaps (N,), and the ways "better > worse"."""
    names, found, gaps, ways = list(WAYS), [], [], []
    for start in range(0, len(captions), BATCH):
        texts, positions = captions[start : start + BATCH], range(start, min(start + BATCH, len(captions)))
        drawn = {name: _draw(backbone, texts, positions, name) for name in names}
        chosen = [Stream(0, "lrm", "ways").generator(p).choice(len(names), 2, replace=False) for p in positions]
        pairs = torch.stack([torch.stack([drawn[names[i]][n] for i in two]) for n, two in enumerate(chosen)])
        scores = _scores(backbone, pairs, texts, reward)
        order = scores.argsort(1, descending=True)
        found.append(torch.stack([pair[of] for pair, of in zip(pairs, order, strict=True)]))
        gaps.append((scores[:, 0] - scores[:, 1]).abs())
        ways += [f"{names[two[a]]} > {names[two[b]]}" for two, (a, b) in zip(chosen, order.tolist(), strict=True)]
        print(f"{len(ways)} of {len(captions)} pairs", flush=True)
    return torch.cat(found), torch.cat(gaps), ways


@torch.no_grad()
def _draw(backbone: Backbone, texts: list[str], positions: range, way: str) -> Tensor:
    steps, guidance, own = WAYS[way]
    shown = texts if own else [*texts[1:], texts[0]]
    noise = torch.from_numpy(Stream(0, "lrm", f"noise {way}").normal(positions, backbone.latent_shape))
    sampler = Sampler("dpmpp_2m", steps, guidance)
    return teacher_sample(backbone, noise, backbone.encode_text(shown), backbone.encode_text([""]), sampler)


@torch.no_grad()
def _scores(backbone: Backbone, pairs: Tensor, texts: list[str], reward: EmojiReward) -> Tensor:
    cond = Cond({"text": torch.zeros(len(texts), 1)})
    prompts = Prompts(texts, cond, cond[:1])
    each = [reward.score(backbone.pixels(pairs[:, side]), prompts, torch.zeros(len(texts))) for side in (0, 1)]
    return torch.stack(each, dim=1)


@torch.no_grad()
def features_at(backbone: Backbone, latents: Tensor, cond: Cond, time: int) -> Tensor:
    """Features (N, 2, F) of both pictures of each pair, noised alike to one time."""
    null, out = backbone.encode_text([""]), []
    for start in range(0, len(latents), BATCH):
        rows = range(start, min(start + BATCH, len(latents)))
        t = torch.full((len(rows),), time)
        noise = torch.from_numpy(Stream(0, "lrm", f"noise at {time}").normal(rows, backbone.latent_shape))
        sides = []
        for side in (0, 1):
            x_t = backbone.process.add_noise(latents[rows.start : rows.stop, side], noise, t)
            sides.append(latent_features(backbone, x_t, t, cond[slice(rows.start, rows.stop)], null))
        out.append(torch.stack(sides, dim=1))
    return torch.cat(out)


def train_head(features: Tensor, texts: Tensor, iterations: int, lr: float) -> LatentHead:
    """Bradley-Terry on features (T, N, 2, F) of all times, the better side first; texts (N, D)."""
    torch.manual_seed(0)
    head = LatentHead(features.shape[-1], texts.shape[1])
    head.standardise(features.flatten(0, 2), texts)
    optimizer = torch.optim.AdamW(head.parameters(), lr, weight_decay=0.1)
    for iteration in range(iterations):
        rng = Stream(0, "lrm", "batch").generator(iteration)
        times, rows = rng.integers(len(features), size=256), rng.integers(len(texts), size=256)
        picked, said = features[times, rows], texts[rows]
        loss = bradley_terry(head(picked[:, 0], said), head(picked[:, 1], said)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


@torch.no_grad()
def accuracy(head: LatentHead, features: Tensor, texts: Tensor) -> list[float]:
    """The share of pairs ordered rightly, at each time; features (T, N, 2, F)."""
    return [(head(f[:, 0], texts) > head(f[:, 1], texts)).float().mean().item() for f in features]


def captions_of(data: str, count: int) -> list[str]:
    """``count`` captions of keyed views of the train split."""
    examples = list(open_dataset(locate(data), "train"))
    order = Stream(0, "lrm", "captions").generator(0).permutation(count)
    return [view(examples[int(n) % len(examples)], 100 + int(n) // len(examples), seed=5)[1] for n in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--reward", required=True, help="folder of the embedded reward model of pictures")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--min-gap", type=float, default=0.05, help="of the rewards; closer pairs are left out")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    backbone = UNetBackbone.load(str(locate(args.teacher)), Sharing("lora", 4, 4, ("to_q",)))
    captions = captions_of(args.data, args.pairs)
    latents, gaps, ways = draw_pairs(backbone, captions, EmojiReward(locate(args.reward), backbone.device))
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents.half(), "gaps": gaps}, args.out / "pairs.safetensors")
    (args.out / "pairs.json").write_text(json.dumps({"captions": captions, "ways": ways}) + "\n")
    kept = (gaps >= args.min_gap).nonzero()[:, 0]
    words = sorted({captions[int(n)] for n in kept})
    held = {caption for number, caption in enumerate(words) if number % HELD_OUT_EVERY == 0}
    is_held = torch.tensor([captions[int(n)] in held for n in kept])
    cond = backbone.encode_text([captions[int(n)] for n in kept])
    features = torch.stack([features_at(backbone, latents[kept], cond, time) for time in TIMES])
    texts = text_features(cond)
    head = train_head(features[:, ~is_held], texts[~is_held], args.iterations, args.lr)
    save_head(head, args.out)
    found = accuracy(head, features[:, is_held], texts[is_held])
    by_time = {str(time): round(value, 4) for time, value in zip(TIMES, found, strict=True)}
    result = {"pairs": len(kept), "held_out": int(is_held.sum()), "accuracy": by_time}
    (args.out / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
