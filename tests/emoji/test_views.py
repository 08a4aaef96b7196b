"""Views of emoji: pure functions of their key, captions that are true, and many pictures for one prompt."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from core.data.shards import Example, open_dataset
from experiments.emoji.views import BACKGROUNDS, compose, view

FOLDER = Path(__file__).parents[2] / "experiments" / "emoji" / "assets" / "emoji-64-v1"


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    data = open_dataset(FOLDER, "heldout")
    return [data[i] for i in range(0, len(data), 10)]


def square(mirror: bool = True) -> Example:
    image = np.zeros((64, 64, 4), dtype=np.uint8)
    image[:, :32] = (255, 0, 0, 255)  # the left half is red, the right half empty
    meta = {"group": "g", "subgroup": "s", "kind": "thing", "mirror": mirror}
    meta |= {"tones": ["dark skin tone"], "hair": [], "genders": ["woman"]}
    return Example("thing", image, "woman thing dark skin tone", meta)


def test_a_view_is_a_function_of_example_variant_and_seed(examples: list[Example]) -> None:
    for example in examples[:5]:
        first, second = view(example, 3), view(example, 3)
        assert first[1] == second[1] and (first[0] == second[0]).all()
    images = [view(examples[0], variant)[0].tobytes() for variant in range(20)]
    assert len(set(images)) == 20
    assert view(examples[0], 0, seed=1)[0].tobytes() != images[0]


def test_a_named_background_is_the_one_shown() -> None:
    named = 0
    for variant in range(200):
        image, text = view(square(), variant)
        if text.endswith(" background"):
            named += 1
            corners = {tuple(image[row, column]) for row in (0, 63) for column in (0, 63)}
            assert BACKGROUNDS[text.split()[-2]] in corners
    assert 50 < named < 110


def test_white_is_the_most_frequent_background_and_all_occur() -> None:
    empty = Example("empty", np.zeros((64, 64, 4), dtype=np.uint8), "nothing", square().meta)
    colours = Counter(tuple(int(v) for v in view(empty, i)[0][0, 0]) for i in range(500))
    assert set(colours) == set(BACKGROUNDS.values())
    assert 0.33 < colours[(255, 255, 255)] / 500 < 0.47


def test_caption_levels_drop_words_but_never_invent_them() -> None:
    words = Counter(view(square(), variant)[1].split(" on a ")[0] for variant in range(600))
    assert set(words) == {
        "woman thing dark skin tone",
        "thing dark skin tone",
        "woman thing",
        "thing",
        "s",
        "g",
    }
    assert words["woman thing dark skin tone"] > 300


def test_writing_is_never_mirrored() -> None:
    def red_on_the_right(example: Example, variant: int) -> bool:
        image = compose(example.image, "white")
        seen = view(example, variant)[0]
        red = (seen == (255, 0, 0)).all(-1)
        assert red.sum() > 500 and (image[:, :32] == (255, 0, 0)).all()
        columns = np.flatnonzero(red.any(0))
        return bool(columns.mean() > 31.5)

    assert not any(red_on_the_right(square(mirror=False), variant) for variant in range(40))
    assert sum(red_on_the_right(square(mirror=True), variant) for variant in range(40)) > 8


def test_shift_never_moves_the_picture_past_the_border() -> None:
    full = Example("full", np.full((64, 64, 4), 255, dtype=np.uint8), "x", square().meta)
    for scale in (0.75, 0.9, 1.0):
        image = compose(full.image, "black", scale, (40, -40))
        assert (image == 255).all(-1).sum() == round(64 * scale) ** 2
