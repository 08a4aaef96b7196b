"""Evaluation prompt lists and reference images: keyed, balanced, independent."""

from collections import Counter

import numpy as np
import pytest

from core.data.requests import Item, Requests, dataset_requests, draw_examples, reference_images
from core.data.shards import Example, ImageTextDataset, RawExample
from core.randomness import Stream


def _dataset(size: int = 5) -> ImageTextDataset:
    import io

    from PIL import Image

    def png(value: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((2, 2, 4), value, dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    return ImageTextDataset(RawExample(f"k{i}", png(i), f"thing {i}", {}, "test") for i in range(size))


def _item_of(example: Example, variant: int) -> Item:
    shade = int(Stream(0, "view", example.key).integers([variant], 0, 1000)[0])
    image = np.full((2, 2, 3), shade % 256, dtype=np.uint8)
    return Item(image, f"{example.caption} shade {shade}", {"shade": np.array([shade])})


def test_prompts_are_keyed_and_prefixes_agree() -> None:
    data = _dataset()
    prompts = dataset_requests(data, _item_of, 12)
    assert prompts.hash == dataset_requests(data, _item_of, 12).hash
    assert dataset_requests(data, _item_of, 7).texts == prompts.texts[:7]
    assert dataset_requests(data, _item_of, 12, seed=1).texts != prompts.texts
    assert len(set(prompts.texts)) == 12, "repeated examples get other views"
    assert sorted(p.split(" shade")[0] for p in prompts.texts[:5]) == [f"thing {i}" for i in range(5)]


def test_kinds_occur_equally_often_and_their_examples_take_turns() -> None:
    kinds = ["pilot", "pilot", "pilot", "apple", "pizza"]
    drawn = draw_examples(kinds, 18, 0, "x").tolist()
    assert Counter(drawn) == {0: 2, 1: 2, 2: 2, 3: 6, 4: 6}
    assert [Counter(kinds[i] for i in drawn[s : s + 3]) for s in (0, 3)] == [dict.fromkeys(set(kinds), 1)] * 2
    assert drawn[:7] == draw_examples(kinds, 7, 0, "x").tolist()
    assert drawn != draw_examples(kinds, 18, 0, "y").tolist()


def test_reference_views_are_other_views_than_the_prompts() -> None:
    data = _dataset()
    shades = [int(p.rsplit(" ", 1)[1]) % 256 for p in dataset_requests(data, _item_of, 50).texts]
    images = list(reference_images(data, _item_of, 50))
    assert len(images) == 50
    assert np.mean([image[0, 0, 0] == shade for image, shade in zip(images, shades, strict=True)]) < 0.1


def test_hash_depends_on_order_and_boundaries() -> None:
    hashes = {Requests(p).hash for p in (("a", "b"), ("b", "a"), ("a b",), ("a", "b", "b"))}
    assert len(hashes) == 4
    assert Requests(("a", "b")).hash == Requests(("a", "b")).hash


def test_hash_covers_the_further_inputs_and_is_that_of_the_texts_without_any() -> None:
    texts, zeros = ("a", "b"), np.zeros((2, 3), dtype=np.uint8)
    given = [{}, {"mask": zeros}, {"mask": zeros + 1}, {"edge": zeros}, {"mask": zeros.astype(np.int16)}]
    assert len({Requests(texts, inputs).hash for inputs in given}) == len(given)
    # As in the records that are older than further inputs
    assert Requests(("red apple", "blue heart")).hash == "a2f68b2a506ee349"


def test_further_inputs_go_with_their_texts() -> None:
    requests = dataset_requests(_dataset(), _item_of, 12)
    assert requests.inputs["shade"].shape == (12, 1)
    for part in (requests, requests[3:7], requests.repeated(3), requests.distinct(5)):
        named = [int(text.rsplit(" ", 1)[1]) for text in part.texts]
        assert part.inputs["shade"].ravel().tolist() == named
    with pytest.raises(AssertionError, match="shade"):
        Requests(("a", "b"), {"shade": np.zeros(3)})


def test_distinct_and_repeated() -> None:
    prompts = Requests(("b", "a", "b", "c"))
    assert prompts.distinct(2).texts == ("b", "a")
    assert prompts.distinct(9).texts == ("b", "a", "c")
    assert Requests(("a", "b")).repeated(2).texts == ("a", "a", "b", "b")
