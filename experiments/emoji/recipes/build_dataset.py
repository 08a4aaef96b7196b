"""Render the Noto colour emoji into ``emoji-64-v1``: tar shards, split, checksums.

``python -m experiments.emoji.recipes.build_dataset --out FOLDER`` needs the font NotoColorEmoji.ttf (Debian package
fonts-noto-color-emoji) and Unicode's emoji-test.txt (Debian package unicode-data). The same two files give
the same bytes. Images are stored as RGBA 64x64, so that views can put any background behind them.
"""

import argparse
import hashlib
import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.data.shards import RawExample, write_checksums, write_shards
from experiments.emoji.recipes.names import EmojiName, attributes, caption, kind, parse_emoji_test

SIZE = 64
BITMAP_SIZE = 109  # the only size of the font's embedded bitmaps
CANVAS = 136
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
HELD_OUT_FRACTION = 0.15  # of the kinds that have at least MIN_VARIANTS pictures
MIN_VARIANTS = 6
NEAR_DUPLICATE = 0.004  # mean absolute difference of premultiplied RGBA, in units of full scale
MIRRORED_GROUPS = ("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink")
MIRRORED_SUBGROUPS = ("transport-air", "transport-water", "clothing", "musical-instrument", "tool", "place-geographic")
UNMIRRORED_SUBGROUPS = ("emotion", "monkey-face")
DIRECTION_WORDS = frozenset(["left", "right", "rightwards", "leftwards", "clockwise", "z"])


@dataclass(frozen=True)
class Rendered:
    """One emoji with its RGBA uint8 (64, 64, 4) picture."""

    emoji: EmojiName
    image: np.ndarray


def render(text: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """Draw one emoji centred on a square and shrink it to 64x64; None if the font has no single glyph for it."""
    box = font.getbbox(text)
    if box[2] - box[0] > CANVAS + 4 or font.getlength(text) > 1.2 * font.getlength("😀"):
        return None
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    offset = ((CANVAS - box[0] - box[2]) / 2, (CANVAS - box[1] - box[3]) / 2)
    ImageDraw.Draw(canvas).text(offset, text, font=font, embedded_color=True)
    image = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    return image if (image[..., 3] > 128).mean() > 0.02 else None


def without_duplicates(rendered: list[Rendered]) -> list[Rendered]:
    """Keep the first of every set of (nearly) equal pictures, e.g. flags that share one design."""
    kept: list[Rendered] = []
    stack = np.empty((len(rendered), SIZE * SIZE * 4), dtype=np.float32)
    coarse = np.empty((len(rendered), 64), dtype=np.float32)
    for item in rendered:
        image = item.image.astype(np.float32) / 255
        image[..., :3] *= image[..., 3:]
        small = image.mean(-1).reshape(8, 8, 8, 8).mean((1, 3)).ravel()
        near = np.flatnonzero(np.abs(coarse[: len(kept)] - small).mean(1) < NEAR_DUPLICATE)
        if not len(near) or np.abs(stack[near] - image.ravel()).mean(1).min() > NEAR_DUPLICATE:
            stack[len(kept)], coarse[len(kept)] = image.ravel(), small
            kept.append(item)
    return kept


def held_out_keys(emoji: list[EmojiName]) -> set[str]:
    """Combinations to hold out: per kind with many variants a keyed part of those with a skin tone or hair.

    A candidate is taken only while each of its words still occurs twice among the captions that stay, so the
    held-out captions are unseen combinations of seen words.
    """
    by_kind: dict[str, list[EmojiName]] = defaultdict(list)
    for item in emoji:
        by_kind[kind(item.name)].append(item)
    word_counts: dict[str, int] = defaultdict(int)
    for item in emoji:
        for word in set(caption(item.name).split()):
            word_counts[word] += 1
    held: set[str] = set()
    for name, variants in sorted(by_kind.items()):
        if len(variants) < MIN_VARIANTS:
            continue
        candidates = [v for v in variants if attributes(v.name)["tones"] or attributes(v.name)["hair"]]
        candidates.sort(key=lambda v: _draw(v.key))
        count = int(HELD_OUT_FRACTION * len(variants) + _draw(name))
        for item in candidates[:count]:
            words = set(caption(item.name).split())
            if all(word_counts[word] > 2 for word in words):
                held.add(item.key)
                for word in words:
                    word_counts[word] -= 1
    return held


def _draw(text: str) -> float:
    """A uniform number in [0, 1) that depends on ``text`` alone."""
    return int.from_bytes(hashlib.sha256(f"emoji-64-v1/{text}".encode()).digest()[:6]) / 2**48


def may_mirror(emoji: EmojiName) -> bool:
    """Whether the mirror image still fits the name: nothing written on it and no direction in the name."""
    place = emoji.group in MIRRORED_GROUPS or emoji.subgroup in MIRRORED_SUBGROUPS
    words = set(caption(emoji.name).replace("-", " ").split())
    return place and emoji.subgroup not in UNMIRRORED_SUBGROUPS and not words & DIRECTION_WORDS


def with_palette(image: np.ndarray, rounds: int = 3) -> Image.Image:
    """The RGBA picture with at most 256 colours, k-means on premultiplied RGBA (a third of the size, 42 dB)."""
    pixels = image.reshape(-1, 4).astype(np.float64)
    pixels[:, :3] *= pixels[:, 3:] / 255
    octree = np.asarray(Image.fromarray(image).quantize(256, Image.Quantize.FASTOCTREE))
    labels = np.unique(octree, return_inverse=True)[1].ravel()
    for _ in range(rounds):
        counts = np.maximum(np.bincount(labels), 1)[:, None]
        centres = np.stack([np.bincount(labels, pixels[:, i]) for i in range(4)], axis=1) / counts
        labels = ((centres**2).sum(1) - 2 * pixels @ centres.T).argmin(1)
    alpha = centres[:, 3:]
    colours = np.concatenate([centres[:, :3] * 255 / np.maximum(alpha, 1), alpha], axis=1)
    result = Image.fromarray(labels.astype(np.uint8).reshape(image.shape[:2]))
    result.putpalette(colours.round().clip(0, 255).astype(np.uint8).tobytes(), "RGBA")
    return result


def to_raw(item: Rendered) -> RawExample:
    buffer = io.BytesIO()
    with_palette(item.image).save(buffer, "PNG", optimize=True)
    emoji = item.emoji
    meta = {
        "name": emoji.name,
        "emoji": emoji.text,
        "group": caption(emoji.group),
        "subgroup": caption(emoji.subgroup).replace("-", " "),
        "kind": caption(kind(emoji.name)),
        "mirror": may_mirror(emoji),
        **attributes(emoji.name),
    }
    return RawExample(emoji.key, buffer.getvalue(), caption(emoji.name), meta, "rendered")


def build(out: Path, font_path: Path = FONT, names_path: Path = NAMES) -> dict[str, int]:
    """Write the shards and SHA256SUMS into ``out``; returns the number of examples by split."""
    font = ImageFont.truetype(str(font_path), BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
    drawn = []
    for emoji in parse_emoji_test(names_path):
        image = render(emoji.text, font)
        if image is not None:
            drawn.append(Rendered(emoji, image))
    kept = without_duplicates(drawn)
    held = held_out_keys([item.emoji for item in kept])
    splits: dict[str, list[Rendered]] = {"train": [], "heldout": []}
    for item in kept:
        splits["heldout" if item.emoji.key in held else "train"].append(item)
    for split, items in splits.items():
        write_shards(out, split, map(to_raw, items))
    write_checksums(out)
    return {split: len(items) for split, items in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--names", type=Path, default=NAMES)
    args = parser.parse_args()
    print(build(args.out, args.font, args.names))


if __name__ == "__main__":
    main()
