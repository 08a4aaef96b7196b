"""emoji-64-v1 as committed: size, checksums, the split, names and kinds."""

from pathlib import Path

import numpy as np
import pytest

from core.data.shards import ImageTextDataset, open_dataset
from experiments.emoji.recipes.build_dataset import EmojiName, held_out_keys, with_palette
from experiments.emoji.recipes.names import attributes, caption, kind, parse_emoji_test

FOLDER = Path(__file__).parents[2] / "experiments" / "emoji" / "assets" / "emoji-64-v1"


@pytest.fixture(scope="module")
def train() -> ImageTextDataset:
    return open_dataset(FOLDER, "train")


@pytest.fixture(scope="module")
def held_out() -> ImageTextDataset:
    return open_dataset(FOLDER, "heldout")


def test_size_and_checksums(train: ImageTextDataset, held_out: ImageTextDataset) -> None:
    assert (len(train), len(held_out)) == (3285, 290)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6
    assert train[0].image.shape == (64, 64, 4)


def test_splits_share_no_picture_and_no_caption(train: ImageTextDataset, held_out: ImageTextDataset) -> None:
    assert not set(train.keys) & set(held_out.keys)
    assert not set(train.captions) & set(held_out.captions)


def test_held_out_captions_are_unseen_combinations_of_seen_words(
    train: ImageTextDataset, held_out: ImageTextDataset
) -> None:
    seen = {word for text in train.captions for word in text.split()}
    assert {word for text in held_out.captions for word in text.split()} <= seen
    assert {meta["kind"] for meta in held_out.metas} <= {meta["kind"] for meta in train.metas}
    assert all(meta["tones"] or meta["hair"] for meta in held_out.metas)


def test_a_word_that_would_vanish_keeps_its_picture_in_train() -> None:
    tones = ["light", "medium-light", "medium", "medium-dark", "dark"]
    emoji = [EmojiName("w", "waving hand", "g", "s")]
    emoji += [EmojiName(str(i), f"waving hand: {tone} skin tone", "g", "s") for i, tone in enumerate(tones)]
    assert held_out_keys(emoji) == set()  # each tone occurs once


def test_attributes_and_kinds() -> None:
    name = "woman pilot: medium-dark skin tone"
    assert attributes(name) == {"tones": ["medium-dark skin tone"], "hair": [], "genders": ["woman"]}
    assert kind(name) == kind("pilot") == "pilot"
    assert kind("man: light skin tone, red hair") == "man"
    assert kind("flag: Japan") == "flag Japan" and caption("flag: Côte d’Ivoire") == "flag côte divoire"
    assert kind("kiss: woman, man, light skin tone, dark skin tone") == "kiss"


def test_only_fully_qualified_lines_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text(
        "# group: Food & Drink\n# subgroup: food-fruit\n"
        "1F34E ; fully-qualified # \U0001f34e E0.6 red apple\n"
        "263A ; unqualified # x E0.6 smiling face\n"
    )
    assert parse_emoji_test(path) == [EmojiName("\U0001f34e", "red apple", "Food & Drink", "food-fruit")]


def test_the_palette_keeps_the_picture() -> None:
    ramp = np.arange(64, dtype=np.uint8)
    image = np.stack([np.broadcast_to(c, (64, 64)) for c in (4 * ramp, ramp[:, None], ramp * 0 + 90)], axis=-1)
    image = np.concatenate([image, np.full((64, 64, 1), 255, dtype=np.uint8)], axis=-1)
    error = np.asarray(with_palette(image).convert("RGBA")).astype(float) - image
    assert 10 * np.log10(255**2 / (error**2).mean()) > 33
