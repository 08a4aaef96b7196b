"""Resume state and snapshots: safetensors and JSON only, so nothing pickled is ever loaded.

A state folder is written under a temporary name, fsynced and renamed; its ``COMPLETE`` marker holds the hash of the
tensors. A folder without a valid marker is never loaded: it is set aside and the previous one is used, and the log
says so. Old states go only after the new one is durable.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.run import atomic_folder

log = logging.getLogger("fewstep")


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


class Checkpoints:
    """The ``state/`` folder of one run; names are image counts."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root, self.keep = Path(root), keep

    def _folders(self) -> list[Path]:
        """Complete-looking folders, newest first."""
        return sorted((p for p in self.root.glob("[0-9]*") if p.name.isdigit()), reverse=True)

    def save(self, images: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> Path:
        """Write one state durably, then apply retention."""
        target = self.root / f"{images:010d}"
        if target.exists():
            shutil.rmtree(target)
        with atomic_folder(target) as folder:
            save_file(dict(tensors), folder / "tensors.safetensors")
            (folder / "meta.json").write_text(json.dumps(meta))
            (folder / "COMPLETE").write_text(_hash(folder / "tensors.safetensors"))
        for old in self._folders()[self.keep :]:
            shutil.rmtree(old)
        return target

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest valid state, or None; corrupt ones are set aside."""
        for folder in self._folders():
            try:
                return self._read(folder)
            except (OSError, ValueError, SafetensorError) as error:
                aside = folder.with_name(f"corrupt-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                log.warning(
                    "state %s is corrupt (%s): set aside as %s, using the previous one", folder, error, aside.name
                )
        return None

    @staticmethod
    def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        marker = folder / "COMPLETE"
        if not marker.exists():
            raise ValueError("no completion marker")
        if marker.read_text() != _hash(folder / "tensors.safetensors"):
            raise ValueError("hash mismatch")
        return load_file(folder / "tensors.safetensors"), json.loads((folder / "meta.json").read_text())


def save_snapshot(root: Path, images: int, roles: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Weights to use, one file per role, at ``root/<images>/<role>.safetensors``; an existing snapshot is kept."""
    target = Path(root) / f"{images:010d}"
    if not target.exists():
        with atomic_folder(target) as folder:
            for role, tensors in roles.items():
                data = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
                save_file(data, folder / f"{role}.safetensors")
    return target


def latest_snapshot(root: Path) -> Path | None:
    """The newest snapshot folder, or None."""
    folders = sorted(p for p in Path(root).glob("[0-9]*") if p.name.isdigit())
    return folders[-1] if folders else None
