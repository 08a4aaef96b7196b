"""Train the CLIP judge ``emoji-clip-v1`` contrastively on views of the train split.

The frozen image trunk's features of a fixed number of views are computed once; a batch holds pictures of many
kinds and groups of variants of a few kinds (hard negatives), and pairs with equal captions are not negatives of
each other. The learning rate decays with wall-clock time. Writes the folder that
``experiments.emoji.judge.load_emoji_clip`` reads, with ``retrieval.json``, its accuracy on both splits.

``python -m experiments.emoji.recipes.train_clip --data FOLDER --out FOLDER --minutes 5``; with ``--trunk 1`` it is a
reward model, on another image network than the judges'.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from safetensors.torch import save_file

from core.data.shards import Example, ImageTextDataset, open_dataset
from core.randomness import Stream
from experiments.emoji.judge import build_clip, preprocess, tokenizer_function, trained_state
from experiments.emoji.recipes.train_vae import ema_update, learning_rate
from experiments.emoji.tokenizer import train_tokenizer
from experiments.emoji.views import compose, view

BATCH = 256
VARIANTS = 8  # pictures of one kind in a group of hard negatives
Views = tuple[torch.Tensor, list[str], dict[str, list[int]]]


@torch.no_grad()
def cache_views(model: CustomTextCLIP, examples: list[Example], per_example: int) -> Views:
    """Features float16 (n, FEATURE_DIM), captions, and rows by kind, of ``per_example`` views of each example."""
    features, captions, by_kind = [], [], defaultdict(list)
    pairs = [(example, variant) for variant in range(per_example) for example in examples]
    for start in range(0, len(pairs), 128):
        images, words = zip(*(view(*pair, seed=4) for pair in pairs[start : start + 128]), strict=True)
        features.append(model.visual.features(preprocess(np.stack(images))).half())
        captions += words
    for row, (example, _) in enumerate(pairs):
        by_kind[example.meta["kind"]].append(row)
    return torch.cat(features), captions, dict(sorted(by_kind.items()))


def draw_rows(by_kind: dict[str, list[int]], position: int, per_example: int) -> np.ndarray:
    """Keyed rows of a batch, int64 (BATCH,): half of distinct kinds, half in groups of variants of one kind."""
    rng = Stream(0, "clip", "batch").generator(position)
    kinds = list(by_kind.values())
    rich = [rows for rows in kinds if len(rows) >= 6 * per_example]
    rows = [rng.choice(kinds[i]) for i in rng.permutation(len(kinds))[: BATCH // 2]]
    for i in rng.integers(len(rich), size=(BATCH - len(rows)) // VARIANTS):
        rows += list(rng.choice(rich[i], size=VARIANTS))
    return np.array(rows, dtype=np.int64)


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Symmetric InfoNCE (Radford et al. 2021) on unit vectors (N, D); equal captions share the target mass."""
    logits = scale * image @ text.T
    ids = torch.tensor([captions.index(caption) for caption in captions])
    targets = (ids[:, None] == ids[None, :]).float()
    targets = targets / targets.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@torch.no_grad()
def retrieval(
    model: CustomTextCLIP, tokenize: Callable, data: ImageTextDataset, candidates: list[str]
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of the caption of each plain picture among all distinct ``candidates``."""
    texts = F.normalize(torch.cat([model.encode_text(t) for t in tokenize(candidates).split(256)]), dim=-1)
    images = preprocess(np.stack([compose(example.image, "white") for example in data]))
    pictures = F.normalize(torch.cat([model.encode_image(x) for x in images.split(128)]), dim=-1)
    row = {caption: i for i, caption in enumerate(candidates)}
    truth = torch.tensor([row[caption] for caption in data.captions])
    similarity = pictures @ texts.T
    rank = (similarity > similarity.gather(1, truth[:, None])).sum(1)
    return {"top1": float((rank < 1).float().mean()), "top5": float((rank < 5).float().mean()), "n": len(data)}


def train(model: CustomTextCLIP, tokens: torch.Tensor, views: Views, args: argparse.Namespace) -> tuple:
    """Train head and text tower until the minutes are spent; returns the EMA model and the number of steps."""
    features, captions, by_kind = views
    ema = build_clip(args.vocabulary, args.trunk)
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1
    )
    step, began = 0, time.monotonic()
    while (elapsed := time.monotonic() - began) < 60 * args.minutes:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed / (60 * args.minutes), args.lr)
        rows = draw_rows(by_kind, step, args.views)
        image = F.normalize(model.visual.head(features[rows].float()), dim=-1)
        text = model.encode_text(tokens[rows], normalize=True)
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(image, text, scale, [captions[row] for row in rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        ema_update(ema, model, step, decay=0.99)
        if step % 50 == 0:
            print(f"{elapsed:.0f}s step {step} loss {loss.item():.3f} scale {scale.item():.1f}", flush=True)
    return ema.eval(), step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="of training, without the features")
    parser.add_argument("--views", type=int, default=5, help="views of each example")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--trunk", type=int, default=0, choices=(0, 1), help="EfficientNet-Lite: 0 judges, 1 rewards")
    args = parser.parse_args()
    torch.manual_seed(0)
    data, held_out = open_dataset(args.data, "train"), open_dataset(args.data, "heldout")
    tokenizer = train_tokenizer(list(data), args.out)
    tokenize = tokenizer_function(tokenizer)
    args.vocabulary = len(tokenizer) + 1
    model = build_clip(args.vocabulary, args.trunk)
    views = cache_views(model.eval(), list(data), args.views)
    print("views", tuple(views[0].shape), flush=True)
    ema, steps = train(model.train(), tokenize(views[1]), views, args)
    settings = {"vocabulary": args.vocabulary} | ({"trunk": args.trunk} if args.trunk else {})
    (args.out / "config.json").write_text(json.dumps(settings) + "\n")
    save_file(trained_state(ema), args.out / "model.safetensors")
    candidates = sorted({*data.captions, *held_out.captions})
    result = {
        "train": retrieval(ema, tokenize, data, candidates),
        "heldout": retrieval(ema, tokenize, held_out, candidates),
        "candidates": len(candidates),
        "pairs_seen": steps * BATCH,
    }
    (args.out / "retrieval.json").write_text(json.dumps(result, indent=2) + "\n")
    print(result)


if __name__ == "__main__":
    main()
