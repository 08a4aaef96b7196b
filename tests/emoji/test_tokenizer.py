"""The tokenizer of the embedded teacher: CLIP's format, no information lost, learned on train captions."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from core.data.shards import open_dataset
from experiments.emoji.tokenizer import MAX_TOKENS, train_tokenizer

FOLDER = Path(__file__).parents[2] / "experiments" / "emoji" / "assets" / "emoji-64-v1"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return train_tokenizer(list(open_dataset(FOLDER, "train")), tmp_path_factory.mktemp("tokenizer"))


def test_captions_survive_the_round_trip(tokenizer: CLIPTokenizer) -> None:
    held_out = open_dataset(FOLDER, "heldout")
    for caption in [*(held_out[i].caption for i in range(0, len(held_out), 7)), "zebra crossing", "naïve"]:
        ids = tokenizer(caption).input_ids
        # Like CLIP's, it sets punctuation apart.
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == caption.replace(" ", "")
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id


def test_frequent_words_are_one_token_and_captions_fit(tokenizer: CLIPTokenizer) -> None:
    for word in ("face", "woman", "tone", "background", "yellow"):
        assert len(tokenizer(word).input_ids) == 3, word
    longest = max((e.caption for e in open_dataset(FOLDER, "train")), key=len)
    assert len(tokenizer(f"{longest} on a purple background").input_ids) <= MAX_TOKENS
    padded = tokenizer("red apple", padding="max_length", max_length=MAX_TOKENS).input_ids
    assert len(padded) == MAX_TOKENS and set(padded[4:]) == {tokenizer.pad_token_id}
