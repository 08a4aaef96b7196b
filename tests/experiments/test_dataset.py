"""How a data set is shown: an emoji's view where there are emoji, else pictures as they are, all in one way."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.config import ExperimentConfig, UserError, compose, resolve
from core.data.shards import Example
from experiments import dataset
from experiments.build import build_backbone, build_data
from experiments.dataset import num_variants, open_split, shown_view, view_of
from experiments.emoji.views import METADATA
from tests import worlds

EMOJI = {name: [] for name in METADATA} | {"kind": "apple", "group": "food", "subgroup": "fruit", "mirror": True}


def config_of(folder: Path, *overrides: str) -> ExperimentConfig:
    return resolve(compose("flash/emoji", [f"data.path={folder}", *overrides]))


def test_own_pictures_are_shown_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fewstep")
    config = config_of(worlds.pictures(tmp_path))
    pixels = np.zeros((40, 80, 4), np.uint8)
    pixels[:, 40:] = (255, 0, 0, 255)  # the right half is red, the left one empty
    image, caption = view_of(config)(Example("x", pixels, "half a red thing", {}), 3)
    assert image.shape == (64, 64, 3) and caption == "half a red thing"
    assert image[32, 5].tolist() == [255, 255, 255] and image[32, 58].tolist() == [255, 0, 0]
    assert shown_view(config) == "plain" and num_variants(config) == 1
    (line,) = [record.message for record in caplog.records if "no example has an emoji's metadata" in record.message]
    assert str(tmp_path) in line and "as by data.view=plain data.num_variants=1" in line


def test_emoji_stay_as_they_were() -> None:
    config = resolve(compose("flash/emoji"))
    assert shown_view(config) == "emoji" and num_variants(config) == 16


def test_how_a_set_is_shown_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all metadata took a second of every training whose latents are cached."""
    config = resolve(compose("flash/emoji"))
    dataset._view_for.cache_clear()
    assert shown_view(config) == "emoji"
    dataset._view_for.cache_clear()  # as in the next process
    monkeypatch.setattr(dataset, "open_dataset", None)
    assert shown_view(config) == "emoji"


def described(folder: Path, lacking: int) -> ExperimentConfig:
    """Pictures of which all but some have an emoji's metadata."""
    rows = []
    for number in range(8):
        Image.new("RGBA", (64, 64), (30 * number, 90, 120, 255)).save(folder / f"{number}.png")
        meta = {"kind": "apple"} if number < lacking else EMOJI
        rows.append(json.dumps({"file_name": f"{number}.png", "caption": "an apple", **meta}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return config_of(folder)


def test_a_set_of_both_kinds_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.view=emoji needs the metadata genders, .* of 7 examples lack, the first"
    ):
        shown_view(described(tmp_path, lacking=4))


def test_the_whole_set_is_shown_in_one_way(tmp_path: Path) -> None:
    config = described(tmp_path, lacking=0)
    view, dataset = view_of(config), open_split(config, "train")
    assert view(dataset[0], 0)[1].split(" on a ")[0] in ("an apple", "apple", "food", "fruit")
    with pytest.raises(UserError, match="'x' is no emoji: it needs 64x64 pixels, transparency and the metadata"):
        view(Example("x", dataset[0].image, "a dog", {}), 0)


def test_own_pictures_share_the_cache_of_the_plain_view_and_train_no_held_out_one(tmp_path: Path) -> None:
    tiny = ["backbone=tiny_sd", f"execution.cache_dir={tmp_path}/cache"]
    folder = worlds.pictures(tmp_path)
    asked, plain = config_of(folder, *tiny), config_of(folder, *tiny, "data.view=plain", "data.num_variants=1")
    backbone = build_backbone(asked)
    keys = build_data(asked, backbone).cache.keys
    assert sorted(keys) == open_split(asked, "train").keys and len(keys) == 7
    assert build_data(plain, backbone).cache.keys == keys
    assert len(list((tmp_path / "cache" / "latents").glob("*/latents.npy"))) == 1


def test_a_size_that_does_not_fit_is_told_before_anything_is_encoded(tmp_path: Path) -> None:
    """A random pipeline's files exist only when it is built."""
    size = ["data.image_size=128", f"execution.cache_dir={tmp_path}/cache"]
    config = config_of(worlds.pictures(tmp_path), "backbone=tiny_sd", *size)
    with pytest.raises(UserError, match="data.image_size=128 does not fit .* give data.image_size=64"):
        build_data(config, build_backbone(config))


def test_how_many_bad_examples_a_run_bears_is_no_part_of_its_identity(tmp_path: Path) -> None:
    folder = worlds.pictures(tmp_path)
    whole = config_of(folder, "execution.max_bad_examples=0")
    assert whole.data.data_hash == config_of(folder).data.data_hash and len(open_split(whole, "train")) == 7
    (folder / "3.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="1 of 8 examples cannot be used, execution.max_bad_examples=0.01"):
        open_split(config_of(folder), "train")
    left = config_of(folder, "execution.max_bad_examples=0.2")
    assert "3" not in open_split(left, "train").keys
