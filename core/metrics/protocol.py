"""The identity of a number: everything that must agree before two values may stand in one table.

Frechet and kernel distances move with the resize filter, the number of images, the extractor's weights, the
reference set and the prompts. So a value is never recorded without its :class:`Protocol`. This module imports
no torch: tables check protocols on any machine.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

SAMPLING_FIELDS = ("solver", "steps", "guidance", "cache", "sampling_seed")
"""How the pictures were made. Rows of one table differ here by design; all other fields must agree."""

SILENT = {"cache": "none", "task": "text_to_image"}


@dataclass(frozen=True)
class Protocol:
    """How one value was measured. Empty strings and zeros mean that a field does not apply to the metric.

    ``prompts_hash`` and ``reference_hash`` cover the requests (texts and further inputs) and the real images themselves
    (data, split, draws), ``judge_hash`` the weights of the judging network, ``resize`` the path from an image to its
    input, ``estimator`` the formula.
    """

    metric: str
    scale: str
    split: str
    data_hash: str
    prompts_hash: str
    num_images: int
    judge: str
    judge_hash: str
    resize: str
    estimator: str
    reference_hash: str = ""
    num_reference: int = 0
    images_per_prompt: int = 1
    solver: str = ""
    steps: int = 0
    guidance: float = 1.0
    sampling_seed: int = 0
    cache: str = "none"
    task: str = "text_to_image"

    def fields(self) -> dict[str, Any]:
        """The fields that are recorded and hashed.

        Those of ``SILENT`` are left out where they say the usual: numbers older than caches and tasks keep their ids.
        """
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if SILENT.get(name) != value}

    @property
    def id(self) -> str:
        """The protocol's identity: 8 hex digits over all fields."""
        return _digest(self.fields())

    @property
    def comparable_id(self) -> str:
        """An id of what rows of one table must share: 8 hex digits over all fields but those of the sampling."""
        return comparable_id(self.fields())


def comparable_id(fields: dict[str, Any]) -> str:
    """The ``Protocol.comparable_id`` of recorded fields (``protocol_fields`` of a line of evals.jsonl)."""
    return _comparable_id(msgspec.json.encode(fields))


@functools.lru_cache(maxsize=4096)
def _comparable_id(recorded: bytes) -> str:
    """``comparable_id`` of fields as JSON: thousands of numbers share a few protocols."""
    fields = msgspec.json.decode(recorded)
    return _digest({key: value for key, value in fields.items() if key not in SAMPLING_FIELDS})


def file_sha256(path: Path) -> str:
    """The identity of a judge's weights file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(fields: dict[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
