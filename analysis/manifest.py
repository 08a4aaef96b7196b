"""The committed records' manifest: the SHA-256 of every file that numbers on a page come from.

``records/MANIFEST.sha256`` is in the form of ``sha256sum``, over ``records/`` and ``published.csv``. Whatever reads a
record checks its files first: a number that was changed by hand, or a file that was added or lost, is refused.
``fewstep records`` seals what it writes; ``python -m analysis.manifest`` seals everything as it is now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from core.metrics.protocol import file_sha256
from core.run import atomic_write
from core.schema import UserError

FOLDER = Path(__file__).parent
NAME = "records/MANIFEST.sha256"
COVERED = ("records", "published.csv")


def seal(folder: Path | None = None) -> Path:
    """Write the manifest of the files that are there now."""
    folder = folder or FOLDER
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in _files(folder, COVERED)]
    atomic_write(folder / NAME, "".join(lines))
    load.cache_clear()
    return folder / NAME


@cache
def load(folder: Path) -> Mapping[str, str]:
    """The sealed hashes by the file's place; UserError where the manifest is missing or damaged."""
    try:
        lines = (folder / NAME).read_text().splitlines()
        return {name: digest for digest, name in (line.split("  ") for line in lines)}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / NAME} cannot be read ({error}); take it from the repository") from None


def check(path: Path) -> None:
    """UserError where a file or folder among the covered ones is not what was sealed; others are nobody's concern."""
    folder = FOLDER.resolve()
    if not path.resolve().is_relative_to(folder):
        return
    place = path.resolve().relative_to(folder).as_posix()
    if not any(_is_under(place, covered) for covered in COVERED):
        return
    for problem in problems(folder, place):
        raise UserError(
            f"{problem}: committed records hold what was measured; take the file from the repository, or measure anew"
        )


def problems(folder: Path, place: str = "") -> Iterator[str]:
    """Each file below ``place`` (all of them by default) that was changed, added or lost since the seal."""
    sealed = {name for name in load(folder) if _is_under(name, place)}
    found = set(_files(folder, [place] if place else COVERED))
    yield from (f"{folder / name} is missing" for name in sorted(sealed - found))
    yield from (f"{folder / name} is not in {NAME}" for name in sorted(found - sealed))
    yield from _changed(folder, found & sealed)


def _changed(folder: Path, names: Iterable[str]) -> Iterator[str]:
    for name in sorted(names):
        if file_sha256(folder / name) != load(folder)[name]:
            yield f"{folder / name} was changed"


def _is_under(name: str, place: str) -> bool:
    return not place or name == place or name.startswith(f"{place}/")


def _files(folder: Path, places: Iterable[str]) -> Iterator[str]:
    """Every file below these places, in order, but the manifest itself."""
    for place in places:
        below = [folder / place] if (folder / place).is_file() else sorted((folder / place).rglob("*"))
        names = [path.relative_to(folder).as_posix() for path in below if path.is_file()]
        yield from (name for name in names if name != NAME)


if __name__ == "__main__":
    print(seal())
