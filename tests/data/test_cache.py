"""The latent cache: order, values, null caption, and damage that is noticed."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.data.cache import LatentCache, build_cache, open_cache
from core.data.requests import Item
from core.data.shards import Example, ImageTextDataset, RawExample


def _png(count: int) -> list[bytes]:
    buffers = [io.BytesIO() for _ in range(count)]
    for i, buffer in enumerate(buffers):
        Image.fromarray(np.full((2, 2, 3), 10 * i, dtype=np.uint8)).save(buffer, "PNG")
    return [buffer.getvalue() for buffer in buffers]


def dataset() -> ImageTextDataset:
    pictures = zip("abc", _png(3), strict=True)
    return ImageTextDataset(RawExample(key, png, f"name {key}", {}, "test") for key, png in pictures)


def item_of(example: Example, variant: int) -> Item:
    caption = "shared" if variant == 1 else example.caption
    return Item(example.image + np.uint8(variant), caption, {"number": np.array([variant])})


def build(path: Path, pictures: ImageTextDataset | None = None) -> LatentCache:
    return build_cache(
        path,
        pictures or dataset(),
        item_of,
        num_variants=2,
        encode_image=lambda images: images.transpose(0, 3, 1, 2).astype(np.float32) / 4,
        encode_text=lambda texts: {"embeds": np.array([[len(text), 1.0] for text in texts], dtype=np.float32)},
        encode_inputs=lambda inputs: {"doubled": 2.0 * inputs["number"]},
        batch_size=4,
    )


def test_item_n_is_variant_n_of_a_drawn_example(tmp_path: Path) -> None:
    cache = build(tmp_path / "cache")
    assert cache.latents.shape == (6, 3, 2, 2) and cache.latents.dtype == np.float16
    for n, key in enumerate(cache.keys):
        assert (cache.latents[n] == (10 * "abc".index(key) + n) / 4).all()
        assert cache.captions[cache.caption_index[n]] == ("shared" if n == 1 else f"name {key}")
    assert sorted(cache.keys) == ["a", "a", "b", "b", "c", "c"]
    assert cache.item_cond["doubled"].ravel().tolist() == [0, 2, 4, 6, 8, 10]


def test_kinds_are_balanced(tmp_path: Path) -> None:
    """Two pictures of one kind share that kind's draws, as in the evaluation's prompts."""
    pictures = dataset()
    metas = [{"kind": "heart"}, {"kind": "heart"}, {"kind": "pizza"}]
    raw = [RawExample(e.key, r, e.caption, m, "test") for e, m, r in zip(pictures, metas, _png(3), strict=True)]
    cache = build(tmp_path / "cache", ImageTextDataset(raw))
    assert sorted(cache.keys) == ["a", "a", "b", "c", "c", "c"] or sorted(cache.keys) == ["a", "b", "b", "c", "c", "c"]


def test_captions_are_stored_once_and_the_null_caption_first(tmp_path: Path) -> None:
    cache = build(tmp_path / "cache")
    assert cache.captions[0] == "" and sorted(cache.captions) == ["", "name a", "name b", "name c", "shared"]
    assert cache.cond["embeds"].tolist() == [[len(caption), 1.0] for caption in cache.captions]


def test_the_same_content_has_the_same_hash(tmp_path: Path) -> None:
    assert build(tmp_path / "one").content_hash == build(tmp_path / "two").content_hash
    reopened = open_cache(tmp_path / "one")
    assert reopened is not None and reopened.content_hash == build(tmp_path / "two").content_hash


@pytest.mark.parametrize("damage", ["flip", "truncate", "no marker", "missing"])
def test_a_damaged_cache_is_not_opened(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cache"
    build(path)
    latents = path / "latents.npy"
    content = latents.read_bytes()
    if damage == "flip":
        latents.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        latents.write_bytes(content[:-8])
    elif damage == "no marker":
        (path / "COMPLETE.json").unlink()
    else:
        latents.unlink()
    assert open_cache(path) is None
    assert build(path).latents.shape == (6, 3, 2, 2)


def test_a_build_that_fails_leaves_nothing_to_open(tmp_path: Path) -> None:
    def fail(images: np.ndarray) -> np.ndarray:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        build_cache(tmp_path / "cache", dataset(), item_of, 2, fail, lambda texts: {}, lambda inputs: {})
    assert open_cache(tmp_path / "cache") is None
