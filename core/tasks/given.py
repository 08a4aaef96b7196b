"""Requests that a user gives on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.config import UserError
from core.data.requests import Requests, stacked
from core.tasks.base import Task


def given_requests(items: Sequence[str], task: Task) -> Requests:
    """Requests from the command line: each item is a prompt or ``@FILE``, a text file with one prompt a line.

    A task with further inputs needs ``@FILE.jsonl`` with an object a line: ``text``, and a file's path for each input,
    relative to the list's folder.

    Raises:
        UserError: missing or empty file, empty prompt, no prompt at all, a missing or unreadable input.
    """
    texts: list[str] = []
    inputs: list[dict[str, np.ndarray]] = []
    for item in items:
        for text, of_one in _read(item, task):
            texts.append(text)
            inputs.append(of_one)
    if not texts or not all(texts):
        raise UserError("no prompt given, or an empty one; give prompts or @FILE with one prompt a line")
    return Requests(tuple(texts), stacked(inputs))


def _read(item: str, task: Task) -> list[tuple[str, dict[str, np.ndarray]]]:
    """The text and the further inputs of each request that an item of the command line stands for."""
    if not item.startswith("@"):
        _check_prompts_suffice(item, task)
        return [(item.strip(), {})]
    path = Path(item[1:])
    lines = _lines(path)
    if path.suffix == ".jsonl":
        return [_of_object(line, number, path, task) for number, line in enumerate(lines, 1)]
    _check_prompts_suffice(item, task)
    return [(line, {}) for line in lines]


def _check_prompts_suffice(item: str, task: Task) -> None:
    if task.inputs:
        needed = ", ".join(task.inputs)
        raise UserError(f"'{item}': this run's task needs more than a prompt ({needed}); give @FILE.jsonl")


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts file {path} cannot be read as UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts file {path} has no prompt; write one a line")
    return prompts


def _of_object(line: str, number: int, path: Path, task: Task) -> tuple[str, dict[str, np.ndarray]]:
    """The request of one line of a JSON list."""
    allowed = {"text", *task.inputs}
    try:
        given: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not JSON: {error}") from error
    if not isinstance(given, dict) or given.keys() != allowed:
        raise UserError(f"{path}, line {number}: not an object with the keys {', '.join(sorted(allowed))}")
    read = {}
    for name in task.inputs:
        file = path.parent / str(given[name])
        try:
            read[name] = task.read_input(name, file)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}, line {number}: {name}={file} cannot be read: {error}") from error
    return str(given["text"]), read
