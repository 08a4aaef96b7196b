"""The lock file: every requirement pinned with hashes, for Linux and macOS, and enough for the project."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOT_LOCKED = {"wandb", "trackio"}  # extras that a user installs, if at all, beside the locked requirements
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}$")
SYSTEMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
]


def parse_lock(text: str) -> list[tuple[Requirement, int]]:
    """Return each locked requirement and its number of hashes; anything else in the file is an error."""
    entries = []
    for entry in re.sub(r"\\\n\s*", " ", text).strip().splitlines():
        requirement, *hashes = re.split(r"\s+(?=--hash=)", entry.strip())
        assert all(HASH.match(item) for item in hashes), entry
        entries.append((Requirement(requirement), len(hashes)))
    return entries


@pytest.fixture
def lock(root: Path) -> list[tuple[Requirement, int]]:
    """Return the locked requirements."""
    return parse_lock((root / "requirements.lock").read_text(encoding="utf-8"))


@pytest.fixture
def declared(root: Path) -> list[Requirement]:
    """Return what pyproject.toml asks for, locked extras and build back end included."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["project"]["dependencies"], project["build-system"]["requires"]]
    extras = project["project"]["optional-dependencies"]
    groups += [lines for extra, lines in extras.items() if extra not in NOT_LOCKED]
    return [Requirement(line) for group in groups for line in group]


def test_every_requirement_is_pinned_with_hashes(lock: list[tuple[Requirement, int]]) -> None:
    """One exact version and at least one hash per entry, and no direct address."""
    assert len(lock) > 50
    for requirement, num_hashes in lock:
        assert num_hashes > 0, requirement
        assert [item.operator for item in requirement.specifier] == ["=="], requirement
        assert requirement.url is None


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system["sys_platform"])
def test_lock_satisfies_the_project(
    lock: list[tuple[Requirement, int]], declared: list[Requirement], system: dict[str, str], python: str
) -> None:
    """On each system, each declared requirement has exactly one locked version, which satisfies it."""
    environment = {**system, "python_version": python, "python_full_version": f"{python}.0"}
    versions: dict[str, list[str]] = {}
    for requirement, _ in lock:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            versions.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    for requirement in declared:
        locked = versions[canonicalize_name(requirement.name)]
        assert [requirement.specifier.contains(version) for version in locked] == [True]


def test_lock_is_for_linux_and_macos_only(lock: list[tuple[Requirement, int]]) -> None:
    """No entry applies on Windows: every marker names a system."""
    windows = {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64"}
    assert not [r.name for r, _ in lock if r.marker is None or r.marker.evaluate(windows)]


def test_torch_is_the_ordinary_wheel(lock: list[tuple[Requirement, int]]) -> None:
    """A CPU-only build (local version) beside the ordinary torchvision does not import."""
    pins = [pin.version for r, _ in lock for pin in r.specifier if r.name in ("torch", "torchvision")]
    assert len(pins) == 2 and not [pin for pin in pins if "+" in pin]
