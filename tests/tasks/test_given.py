"""Requests of the command line: prompts, files of prompts, and lists with further inputs."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from core.config import UserError
from core.data.shards import Example
from core.tasks.base import Task
from core.tasks.given import given_requests
from core.tasks.text_to_image import TextToImage


class Edges(Task):
    """A task with one further input."""

    inputs: ClassVar[tuple[str, ...]] = ("edges",)


def _view(example: Example, variant: int) -> tuple[np.ndarray, str]:
    raise AssertionError("what a user gives is no example")


TEXT, EDGES = TextToImage(None, _view, 8), Edges(None, _view, 8)


def test_prompts_and_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("red apple\n\n  blue heart \n", encoding="utf-8")
    requests = given_requests(["a dog", f"@{tmp_path / 'list.txt'}"], TEXT)
    assert requests.texts == ("a dog", "red apple", "blue heart") and not requests.inputs


def test_a_list_names_the_file_of_each_further_input_from_its_own_folder(tmp_path: Path) -> None:
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGBA", (20, 10), colour).save(tmp_path / f"{number}.png")
    lines = [{"text": "red apple", "edges": "0.png"}, {"text": "blue heart", "edges": str(tmp_path / "1.png")}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    requests = given_requests([f"@{tmp_path / 'list.jsonl'}"], EDGES)
    assert requests.texts == ("red apple", "blue heart")
    assert requests.inputs["edges"].shape == (2, 8, 8, 3)
    assert requests.inputs["edges"][:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "missing.txt cannot be read"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("empty.txt", b"\n", "has no prompt"),
        ("list.jsonl", b"red apple", "list.jsonl, line 1: not JSON"),
        ("list.jsonl", b'{"text": "a"}\n{"prompt": "a"}', "line 2: not an object with the keys text$"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        given_requests([f"@{tmp_path / name}"], TEXT)


def test_wrong_requests_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"text": "a", "edges": "none.png"}')
    for items, task, words in (
        ([], TEXT, "no prompt given"),
        (["a", " "], TEXT, "an empty one"),
        (["a"], EDGES, r"'a': this run's task needs more than a prompt \(edges\); give @FILE.jsonl"),
        ([f"@{tmp_path}/list.jsonl"], EDGES, "line 1: edges=.*none.png cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            given_requests(items, task)
