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
from core.identity import locate
from core.splits import is_split_by_key


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
    for folder in ("one", "other"):
        write_shards(tmp_path / folder, "heldout", [raw("d", 40)])
    write_shards(tmp_path / "one", "train", [raw("a", 10, "RGBA"), raw("b", 20), raw("c", 30)], 100)
    assert open_dataset(tmp_path / "one").content_hash == expected
    write_shards(tmp_path / "other", "train", [raw("a", 10, "RGBA"), raw("b", 21), raw("c", 30)], 100)
    assert open_dataset(tmp_path / "other").content_hash != expected


def test_uncompressed_shards_are_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", {"x.png": png(5), "x.txt": b"five\n"})
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


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def image_folder(folder: Path, count: int) -> Path:
    """Pictures whose values are their numbers."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


def test_a_tenth_of_an_image_folder_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pictures", 200)
    train, heldout = open_dataset(folder), open_dataset(folder, "heldout")
    assert not set(train.keys) & set(heldout.keys) and len(train) + len(heldout) == 200
    assert 10 <= len(heldout) <= 30 and open_dataset(folder, "val").keys == heldout.keys
    image_folder(folder, 220)
    assert set(heldout.keys) <= set(open_dataset(folder, "heldout").keys), "more pictures move none"
    assert "it has: train, heldout, val" in error_of(folder, "test")


def test_of_few_pictures_one_is_held_out_and_of_one_none(tmp_path: Path) -> None:
    for count in range(2, 8):
        folder = image_folder(tmp_path / str(count), count)
        assert (len(open_dataset(folder)), len(open_dataset(folder, "heldout"))) == (count - 1, 1)
    assert len(open_dataset(image_folder(tmp_path / "1", 1))) == 1
    assert "a single example" in error_of(tmp_path / "1", "heldout")


@pytest.mark.parametrize("name", ["00000.tar", "laion-00000.tar", "train-00000.tar"])
def test_shards_without_a_held_out_part_are_split_by_key(tmp_path: Path, name: str) -> None:
    members = {}
    for number in range(50):
        members |= {f"./deep/{number:03}.png": png(number), f"./deep/{number:03}.txt": b"caption"}
    write_tar(tmp_path / name, members)
    train, heldout = open_dataset(tmp_path), open_dataset(tmp_path, "heldout")
    assert len(train) + len(heldout) == 50 and 1 <= len(heldout) <= 12
    assert sorted([*train.keys, *heldout.keys]) == [f"deep/{number:03}" for number in range(50)]
    write_tar(tmp_path / "heldout-0.tar", {"x.png": png(5), "x.txt": b"five"})
    assert open_dataset(tmp_path, "heldout").keys == ["x"], "named splits are what their names say"


def test_the_embedded_splits_are_whole() -> None:
    folder = locate("package:experiments/emoji/assets/emoji-64-v1")
    sizes = [len(open_dataset(folder, split)) for split in ("train", "heldout")]
    assert sizes == [3285, 290] and not is_split_by_key(folder)


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


def test_a_bad_example_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = image_folder(tmp_path / "pictures", 50)
    broken = {"7.png": png(1)[:50], "8.txt": "Äpfel".encode("latin-1"), "9.txt": b" \n"}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    message = error_of(folder)
    assert "3 of 50 examples cannot be used, execution.max_bad_examples=0.01" in message
    data = [*open_dataset(folder, max_bad=0.06), *open_dataset(folder, "heldout", max_bad=0.06)]
    assert {example.key for example in data} == {str(number) for number in range(50)} - {"7", "8", "9"}
    (line,) = [record.message for record in caplog.records if "left out" in record.message]
    assert all(f"{folder}/{number}.png" in line for number in (7, 8, 9))
    assert "truncated" in line and "8.txt is not UTF-8" in line and "9.txt is empty" in line


def test_what_cannot_be_decoded_is_found_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, memory = image_folder(tmp_path / "pictures", 20), tmp_path / "cache" / "pictures.json"
    (folder / "7.png").write_bytes(b"not a picture")
    first = open_dataset(folder, max_bad=0.1, memory=memory)
    monkeypatch.setattr("core.data.shards.decode", None)
    again = open_dataset(folder, max_bad=0.1, memory=memory)
    assert again.keys == first.keys and "7" not in again.keys
    with pytest.raises(UserError, match=r"7.png: the image of '7' cannot be read \(cannot identify image file\)"):
        open_dataset(folder, memory=memory)


def test_bad_members_of_a_shard_are_left_out(tmp_path: Path) -> None:
    members = {f"{number}.{suffix}": data for number in range(9) for suffix, data in (("png", png(1)), ("txt", b"c"))}
    members |= {"7.json": b"{", "8.json": b"[]", "alone.txt": b"c", "mute.png": png(1), "._0.png": b"of a Mac"}
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "val-0.tar", {"x.png": png(5), "x.txt": b"five"})
    assert open_dataset(tmp_path, max_bad=0.4).keys == [str(number) for number in range(7)]
    message = error_of(tmp_path)
    assert (
        "4 of 11 examples" in message and "7.json is not JSON" in message and "8.json is not a JSON object" in message
    )


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv"])
def test_broken_lines_of_a_table_of_captions(tmp_path: Path, name: str) -> None:
    for folder in ("red", "blue"):
        image_folder(tmp_path / folder, 2)
        for text in (tmp_path / folder).glob("*.txt"):
            text.unlink()
    rows = {"red/0.png": "one\u2028of two".encode(), "red/1.png": b"\xff\xfe", "blue/0.png": b"", "blue/1.png": b"four"}
    line = b'{"file_name": "%b", "caption": "%b"}\n' if name.endswith("jsonl") else b"%b,%b\n"
    table = b"".join(line % (path.encode(), caption) for path, caption in rows.items())
    head = b"\xef\xbb\xbf" + (b"" if name.endswith("jsonl") else b"file_name,caption\n")
    (tmp_path / name).write_bytes((head if name.endswith("csv") else b"") + table + line % (b"gone.png", b"five"))
    data = open_dataset(tmp_path, max_bad=0.9)
    captions = {example.key: example.caption for example in [*data, *open_dataset(tmp_path, "val", max_bad=0.9)]}
    assert captions == {"red/0": "one\u2028of two", "blue/1": "four"}
    message = error_of(tmp_path)
    assert "3 of 5 examples" in message and f"{name}, entry 2: " in message and "gone.png" in message


def test_a_line_that_is_not_json_costs_its_picture_alone(tmp_path: Path) -> None:
    image_folder(tmp_path, 3)
    for text in tmp_path.glob("*.txt"):
        text.unlink()
    lines = ['{"file_name": "./0.png", "text": "a"}', '{"file_name": "1.png",', '{"file_name": "2.png", "text": "c"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    both = [*open_dataset(tmp_path, max_bad=0.5), *open_dataset(tmp_path, "heldout", max_bad=0.5)]
    assert sorted(example.key for example in both) == ["0", "2"]
    assert "entry 2: it is not JSON" in error_of(tmp_path)
