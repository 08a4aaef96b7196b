"""Train the byte-pair tokenizer of ``emoji-sd-v1`` on captions and open it as a CLIPTokenizer."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from core.data.shards import Example
from experiments.emoji.views import BACKGROUNDS

MAX_TOKENS = 24
VOCABULARY = 2500
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's word pattern (Radford et al. 2021), so that CLIPTokenizer applies the merges as they were learned.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train_tokenizer(examples: list[Example], folder: Path) -> CLIPTokenizer:
    """Learn merges on every caption level of the examples; writes vocab.json and merges.txt, opens if written."""
    if not (folder / "merges.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(_train(corpus(examples)), folder)
    return open_tokenizer(folder)


def corpus(examples: list[Example]) -> list[str]:
    """Every caption level of the examples, and the backgrounds."""
    captions = [f"{e.caption} {e.meta['group']} {e.meta['subgroup']}" for e in examples]
    return captions + [f"on a {colour} background" for colour in BACKGROUNDS] * 20


def open_tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIPTokenizer of a folder with vocab.json and merges.txt."""
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=END, model_max_length=MAX_TOKENS
    )


def _train(texts: list[str]) -> dict:
    model = Tokenizer(models.BPE(unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    model.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START, END],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return json.loads(model.to_str())["model"]


def _write(model: dict, folder: Path) -> None:
    vocab = dict(model["vocab"])
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()):  # every byte also at the end of a word
        vocab.setdefault(token + "</w>", len(vocab))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
