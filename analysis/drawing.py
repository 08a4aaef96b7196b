"""Figures that are still to be drawn: several at a time in processes, and none twice from the same numbers.

What was drawn is kept in ``.cache/figures`` under a hash of everything that it depends on: the function and what it is
given, the files that it reads, the project's code and style, and the versions of the libraries. Results are written
anew each time, from there or from a new drawing, so that no file of an earlier time or of a hand stays.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import PIL
from matplotlib.figure import Figure

from analysis.looks import STYLE, encode

KEPT = Path(".cache") / "figures"
FORGOTTEN_AFTER_S = 30 * 24 * 3600.0
FORMATS = ("png", "pdf")
OURS = {"ablations", "analysis", "core", "experiments"}  # packages whose code may change a figure
DIGEST_BYTES = 16

Content = tuple[bytes, ...]  # of a figure in each of FORMATS


@dataclass(frozen=True)
class Drawing:
    """A figure still to be drawn: ``draw``, a function of a module, of ``arguments``.

    ``reads`` are files that it reads meanwhile.
    """

    name: str
    draw: Callable[..., Figure]
    arguments: tuple[Any, ...]
    reads: tuple[Path, ...] = ()

    @cached_property
    def packed(self) -> bytes:
        """All that a process needs to draw it."""
        return pickle.dumps((self.draw, self.arguments))

    @cached_property
    def key(self) -> str:
        """A hash of everything that the figure depends on."""
        digest = hashlib.blake2b(_code_hash(_sources(self.draw.__module__)), digest_size=DIGEST_BYTES)
        digest.update(self.packed)
        for file in self.reads:
            digest.update(hashlib.blake2b(file.read_bytes()).digest() if file.is_file() else b"absent")
        return digest.hexdigest()


def draw_all(drawings: Sequence[Drawing]) -> Iterator[Content]:
    """The files of each of ``drawings``, in their order."""
    kept = {drawing.key: _kept(drawing) for drawing in drawings}
    waiting = {drawing.key: drawing for drawing in drawings if kept[drawing.key] is None}
    with _drawn_aside([*waiting.values()]) as futures:
        for drawing in drawings:
            content = kept[drawing.key]
            if content is None:
                content = futures[drawing.key].result() if futures else _draw(drawing.packed)
                _keep(drawing, content)
            yield content
    _forget_old()


@contextlib.contextmanager
def _drawn_aside(waiting: Sequence[Drawing]) -> Iterator[dict[str, Future[Content]]]:
    """Have several drawn at a time by other processes: futures by key, none where there is nothing to share."""
    workers = min(len(waiting), _processors())
    if workers < 2:
        yield {}
        return
    pool = ProcessPoolExecutor(workers)
    try:
        yield {drawing.key: pool.submit(_draw, drawing.packed) for drawing in waiting}
    finally:
        pool.shutdown(cancel_futures=True)


def _processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _draw(packed: bytes) -> Content:
    draw, arguments = pickle.loads(packed)  # noqa: S301  of this very program
    figure = draw(*arguments)
    return tuple(encode(figure, format) for format in FORMATS)


def _sources(module: str) -> tuple[Path, ...]:
    """The style and the project's own code, as far as it is imported, and that of ``module``."""
    files = {STYLE}
    for name, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None)
        if file is not None and (name == module or name.partition(".")[0] in OURS):
            files.add(Path(file))
    return tuple(sorted(files))


@functools.cache
def _code_hash(files: tuple[Path, ...]) -> bytes:
    versions = (platform.python_version(), matplotlib.__version__, np.__version__, pd.__version__, PIL.__version__)
    digest = hashlib.blake2b(repr(versions).encode())
    for file in files:
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.digest()


def _kept(drawing: Drawing) -> Content | None:
    """The files as they were drawn before; None if one is absent or damaged."""
    found = []
    for format in FORMATS:
        file = KEPT / f"{drawing.key}.{format}"
        try:
            stored = file.read_bytes()
            os.utime(file)  # it is in use
        except OSError:
            return None
        digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
        if digest != _digest(content):
            return None
        found.append(content)
    return tuple(found)


def _keep(drawing: Drawing, content: Content) -> None:
    """Keep what was drawn; a disk that refuses costs only time."""
    with contextlib.suppress(OSError):
        KEPT.mkdir(parents=True, exist_ok=True)
        for format, data in zip(FORMATS, content, strict=True):
            file = KEPT / f"{drawing.key}.{format}"
            temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
            temporary.write_bytes(_digest(data) + data)
            temporary.replace(file)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _forget_old() -> None:
    """Remove what nobody has asked for in a month."""
    for file in KEPT.glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > FORGOTTEN_AFTER_S:
                file.unlink()
