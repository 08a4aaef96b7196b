"""Resume state and snapshots: safetensors and JSON only, so nothing pickled is ever loaded.

A state folder is written under a temporary name, fsynced and renamed; its ``COMPLETE`` marker holds the hashes of its
tensor files. A folder without a valid marker is never loaded: it is set aside and the previous one is used, and the log
says so. Old states go only after the new one is durable. Of sharded networks every process writes its own part
(torch.distributed.checkpoint), and any number of processes reads them again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from core.run import atomic_folder
from core.training.sharding import DTensor, whole
from core.training.world import ALONE, World

log = logging.getLogger("fewstep")

SINGLE = "tensors.safetensors"
MERGED = "merged"  # among the roles of a snapshot: adapters of earlier rounds, which the base holds


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


class Checkpoints:
    """The ``state/`` folder of one run; names are image counts."""

    def __init__(self, root: Path, keep: int = 2, world: World = ALONE) -> None:
        self.root, self.keep, self.world = Path(root), keep, world

    def _folders(self) -> list[Path]:
        """Complete-looking folders, newest first."""
        return sorted((p for p in self.root.glob("[0-9]*") if p.name.isdigit()), reverse=True)

    def save(self, images: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> Path:
        """Write one state durably, then apply retention; a call of all processes.

        What nobody shards is the same in all of them, and the main one writes it.
        """
        target = self.root / f"{images:010d}"
        sharded = any(isinstance(value, DTensor) for value in tensors.values())
        parts = self.root / f".parts-{target.name}"
        if sharded:
            self._write_parts(parts, tensors)
        if not self.world.is_main:
            return target
        with atomic_folder(target) as folder:
            if sharded:
                for file in parts.glob("*.safetensors"):
                    file.rename(folder / file.name)
                shutil.rmtree(parts)
            else:
                save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / SINGLE)
            (folder / "meta.json").write_text(json.dumps(meta))
            hashes = {file.name: _hash(file) for file in sorted(folder.glob("*.safetensors"))}
            (folder / "COMPLETE").write_text(json.dumps(hashes))
        for old in self._folders()[self.keep :]:
            shutil.rmtree(old)
        return target

    def _write_parts(self, parts: Path, tensors: Mapping[str, Tensor]) -> None:
        if self.world.is_main:
            for left in self.root.glob(".parts-*"):  # by processes that died while they wrote
                shutil.rmtree(left)
            parts.mkdir(parents=True)
        self.world.barrier()
        # numbers of updates have no dimension, which the format of parts cannot cut
        flat = {key: value.reshape(1) if value.dim() == 0 else value for key, value in tensors.items()}
        dcp.save(flat, storage_writer=HuggingFaceStorageWriter(str(parts), save_distributed=True))
        self.world.barrier()

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest valid state and its meta, or None; corrupt ones are set aside."""
        for folder in self._folders():
            try:
                return folder, self._check(folder)
            except (OSError, ValueError, SafetensorError) as error:
                aside = folder.with_name(f"corrupt-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                log.warning(
                    "state %s is corrupt (%s): set aside as %s, using the previous one", folder, error, aside.name
                )
        return None

    @staticmethod
    def _check(folder: Path) -> dict[str, Any]:
        marker = folder / "COMPLETE"
        if not marker.exists():
            raise ValueError("no completion marker")
        text = marker.read_text()
        # states of before there were parts have the hash of the one file alone
        hashes = json.loads(text) if text.startswith("{") else {SINGLE: text}
        if any(expected != _hash(folder / name) for name, expected in hashes.items()):
            raise ValueError("hash mismatch")
        return json.loads((folder / "meta.json").read_text())


def names_in(folder: Path) -> set[str]:
    """Names of the tensors that a state folder holds, in one file or in parts."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


def read_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``tensors``, sharded or not, in place from parts that any number of processes wrote."""
    flat = {key: value.view(1) if value.dim() == 0 else value for key, value in tensors.items()}
    dcp.load(flat, storage_reader=HuggingFaceStorageReader(str(folder)))


def save_snapshot(root: Path, images: int, roles: Mapping[str, Mapping[str, Tensor]], world: World = ALONE) -> Path:
    """Weights to use, one file per role, at ``root/<images>/<role>.safetensors``; an existing snapshot is kept.

    A call of all processes where the weights are sharded; the main one writes.
    """
    target = Path(root) / f"{images:010d}"
    if target.exists():
        return target
    full = {
        role: {name: whole(value.detach()).cpu() for name, value in tensors.items()} for role, tensors in roles.items()
    }
    if world.is_main:
        with atomic_folder(target) as folder:
            for role, tensors in full.items():
                save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{role}.safetensors")
    return target


def latest_snapshot(root: Path) -> Path | None:
    """The newest snapshot folder, or None."""
    folders = sorted(p for p in Path(root).glob("[0-9]*") if p.name.isdigit())
    return folders[-1] if folders else None
