"""The reader of image-caption data: shards, image folders, identity, and each mistake as one clear error."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.config import UserError
from core.data.shards import RawExample, open_dataset, write_checksums, write_shards


def png(value: int, mode: str = "RGB") -> bytes:
    channels = len(mode)
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6, channels), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def raw(key: str, value: int, mode: str = "RGB") -> RawExample:
    return RawExample(key, png(value, mode), f"caption {key}", {"number": value}, "test")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    write_shards(folder, "train", [raw("b", 20), raw("a", 10, "RGBA"), raw("c", 30)], examples_per_shard=2)
    write_shards(folder, "heldout", [raw("d", 40)])
    write_checksums(folder)
    return folder


def test_examples_come_back_sorted_by_key(shards: Path) -> None:
    data = open_dataset(shards)
    assert data.keys == ["a", "b", "c"] and len(data) == 3
    assert data[0].image.shape == (4, 6, 4) and data[1].image.shape == (4, 6, 3)
    assert (data[2].image == 30).all() and data[2].caption == "caption c" and data[2].meta == {"number": 30}
    assert open_dataset(shards, "heldout").keys == ["d"]


def test_the_same_examples_give_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "again", "train", [raw("c", 30), raw("b", 20), raw("a", 10, "RGBA")], 2)
    for path in sorted((tmp_path / "again").iterdir()):
        assert path.read_bytes() == (shards / path.name).read_bytes()


def test_content_hash_ignores_packaging_and_sees_content(shards: Path, tmp_path: Path) -> None:
    expected = open_dataset(shards).content_hash
    write_shards(tmp_path / "one", "train", [raw("a", 10, "RGBA"), raw("b", 20), raw("c", 30)], 100)
    assert open_dataset(tmp_path / "one").content_hash == expected
    write_shards(tmp_path / "other", "train", [raw("a", 10, "RGBA"), raw("b", 21), raw("c", 30)], 100)
    assert open_dataset(tmp_path / "other").content_hash != expected


def test_uncompressed_shards_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, content in {"x.png": png(5), "x.txt": b"five\n"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert open_dataset(tmp_path)[0].caption == "five"


@pytest.mark.parametrize("source", ["txt", "jsonl", "csv"])
def test_image_folder_takes_captions_from_each_source(tmp_path: Path, source: str) -> None:
    (tmp_path / "one.png").write_bytes(png(1))
    if source == "txt":
        (tmp_path / "one.txt").write_text("the first\n")
    elif source == "jsonl":
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "one.png", "text": "the first"}) + "\n")
    else:
        (tmp_path / "captions.csv").write_text("file_name,caption\none.png,the first\n")
    assert open_dataset(tmp_path)[0].caption == "the first"


def error_of(folder: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        list(open_dataset(folder, split))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_named(shards: Path, tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "nowhere")
    message = error_of(shards, "validation")
    assert "'validation'" in message and "heldout, train" in message
    (tmp_path / "empty").mkdir()
    assert "neither tar shards nor images" in error_of(tmp_path / "empty")


def test_a_changed_shard_is_caught_by_its_checksum(shards: Path) -> None:
    path = shards / "train-00000.tar.gz"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    message = error_of(shards)
    assert str(path) in message and "SHA256SUMS" in message


def test_a_truncated_shard_is_named(shards: Path) -> None:
    (shards / "SHA256SUMS").unlink()
    path = shards / "train-00000.tar.gz"
    path.write_bytes(path.read_bytes()[:150])
    assert str(path) in error_of(shards)


def test_an_image_without_caption_is_named(tmp_path: Path) -> None:
    (tmp_path / "lonely.png").write_bytes(png(1))
    assert "lonely.png has no caption" in error_of(tmp_path)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "bad.txt").write_text("caption")
    assert "'bad' cannot be read" in error_of(tmp_path)
