"""Evaluation prompt lists and reference images: keyed, balanced, independent."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from core.config import UserError
from core.data.prompts import (
    PromptList,
    dataset_prompts,
    draw_examples,
    parse_prompts,
    reference_images,
)
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


def _view(example: Example, variant: int) -> tuple[np.ndarray, str]:
    shade = int(Stream(0, "view", example.key).integers([variant], 0, 1000)[0])
    return np.full((2, 2, 3), shade % 256, dtype=np.uint8), f"{example.caption} shade {shade}"


def test_prompts_are_keyed_and_prefixes_agree() -> None:
    data = _dataset()
    prompts = dataset_prompts(data, _view, 12)
    assert prompts == dataset_prompts(data, _view, 12)
    assert dataset_prompts(data, _view, 7).prompts == prompts.prompts[:7]
    assert dataset_prompts(data, _view, 12, seed=1).prompts != prompts.prompts
    assert len(set(prompts.prompts)) == 12, "repeated examples get other views"
    assert sorted(p.split(" shade")[0] for p in prompts.prompts[:5]) == [f"thing {i}" for i in range(5)]


def test_kinds_occur_equally_often_and_their_examples_take_turns() -> None:
    kinds = ["pilot", "pilot", "pilot", "apple", "pizza"]
    drawn = draw_examples(kinds, 18, 0, "x").tolist()
    assert Counter(drawn) == {0: 2, 1: 2, 2: 2, 3: 6, 4: 6}
    assert [Counter(kinds[i] for i in drawn[s : s + 3]) for s in (0, 3)] == [dict.fromkeys(set(kinds), 1)] * 2
    assert drawn[:7] == draw_examples(kinds, 7, 0, "x").tolist()
    assert drawn != draw_examples(kinds, 18, 0, "y").tolist()


def test_reference_views_are_other_views_than_the_prompts() -> None:
    data = _dataset()
    shades = [int(p.rsplit(" ", 1)[1]) % 256 for p in dataset_prompts(data, _view, 50).prompts]
    images = list(reference_images(data, _view, 50))
    assert len(images) == 50
    assert np.mean([image[0, 0, 0] == shade for image, shade in zip(images, shades, strict=True)]) < 0.1


def test_hash_depends_on_order_and_boundaries() -> None:
    hashes = {PromptList(p).hash for p in (("a", "b"), ("b", "a"), ("a b",), ("a", "b", "b"))}
    assert len(hashes) == 4
    assert PromptList(("a", "b")).hash == PromptList(("a", "b")).hash


def test_distinct_and_repeated() -> None:
    prompts = PromptList(("b", "a", "b", "c"))
    assert prompts.distinct(2).prompts == ("b", "a")
    assert prompts.distinct(9).prompts == ("b", "a", "c")
    assert PromptList(("a", "b")).repeated(2).prompts == ("a", "a", "b", "b")


def test_prompts_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("red apple\n\n  blue heart \n", encoding="utf-8")
    prompts = parse_prompts(["a dog", f"@{tmp_path / 'list.txt'}"])
    assert prompts.prompts == ("a dog", "red apple", "blue heart")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for items, words in (
        ([], "no prompt given"),
        (["a", " "], "an empty one"),
        ([f"@{tmp_path}/missing.txt"], "missing.txt cannot be read"),
        ([f"@{tmp_path}/binary.txt"], "cannot be read as UTF-8"),
        ([f"@{tmp_path}/empty.txt"], "has no prompt"),
    ):
        with pytest.raises(UserError, match=words):
            parse_prompts(items)
