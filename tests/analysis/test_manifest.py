"""Records that defend themselves: whatever is changed is refused, and contradictions are found without a seal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import collect, manifest
from core.run import Run
from experiments.cli import main
from experiments.verify import FAILED, verify

RECORD = "3d361d8a1a"
Tamper = Callable[[Path], None]


def edit(file: str, **changes: object) -> Tamper:
    """Change fields of the first line of a file, or of a file that is one object."""

    def tamper(record: Path) -> None:
        path = record / file
        first, *rest = path.read_text().splitlines() if file.endswith("l") else [path.read_text()]
        line = json.loads(first)
        for key, value in changes.items():
            line[key] = value(line[key]) if callable(value) else value
        path.write_text("\n".join([json.dumps(line), *rest]) + "\n")

    return tamper


def relabel(**changes: object) -> Tamper:
    """Change a number's protocol, and its id so that it fits again."""

    def tamper(record: Path) -> None:
        from core.metrics.protocol import Protocol

        edit("evals.jsonl", protocol_fields=lambda fields: fields | changes)(record)
        fields = json.loads((record / "evals.jsonl").read_text().splitlines()[0])["protocol_fields"]
        edit("evals.jsonl", protocol=Protocol(**fields).id)(record)

    return tamper


def text(file: str, change: Callable[[str], str]) -> Tamper:
    return lambda record: (record / file).write_text(change((record / file).read_text())) and None


def config(before: str, after: str) -> Tamper:
    def tamper(record: Path) -> None:
        assert before in (record / "config.yaml").read_text()
        text("config.yaml", lambda yaml: yaml.replace(before, after))(record)

    return tamper


def lines(change: Callable[[list[str]], list[str]], file: str = "evals.jsonl") -> Tamper:
    return text(file, lambda whole: "".join(f"{line}\n" for line in change(whole.splitlines())))


# Kinds of tampering; those in the first table contradict something inside the record.
CONTRADICTIONS: dict[str, Tamper] = {
    "a value that is none": edit("evals.jsonl", value=float("nan")),
    "another metric": edit("evals.jsonl", metric="clip_score"),
    "another split": edit("evals.jsonl", split="heldout"),
    "fewer steps": edit("evals.jsonl", steps=1),
    "other guidance": edit("evals.jsonl", guidance=2.0),
    "more images": edit("evals.jsonl", n=50_000),
    "of another run": edit("evals.jsonl", run="0123456789"),
    "a protocol without its hash": edit("evals.jsonl", protocol_fields=lambda fields: fields | {"resize": "none"}),
    "measured on other data": relabel(data_hash="0" * 16),
    "a missing number": lines(lambda found: found[:-1]),
    "a number twice": lines(lambda found: [*found, found[0]]),
    "a torn line": lines(lambda found: [found[0][:40], *found]),
    "another learning rate": config("student_lr: ", "student_lr: 1"),
    "another number of images": config("num_images: 1000", "num_images: 50000"),
    "a shorter training": lines(lambda found: found[:-5], "metrics.jsonl"),
    "a log that falls": lines(lambda found: [found[-1], *found], "metrics.jsonl"),
    "a torn log": lines(lambda found: ["{", *found], "metrics.jsonl"),
    "other weights": edit("provenance.json", weights_hash="0" * 16),
    "other data in the provenance": edit("provenance.json", data_hash="0" * 16),
    "uncommitted changes": edit("provenance.json", dirty_patch="diff"),
}
SEAL_ALONE: dict[str, Tamper] = {
    "a better value": edit("evals.jsonl", value=lambda value: 0.9 * value),
    "another number of evaluations": edit("evals.jsonl", nfe=1),
    "a cheaper training": text("metrics.jsonl", lambda log: log.replace('"device_hours":0', '"device_hours":0.0')),
    "another loss": text("metrics.jsonl", lambda log: log.replace('"student/dmd":0', '"student/dmd":1')),
    "another commit": edit("provenance.json", commit="0" * 40),
    "a lost file": lambda record: (record / "provenance.json").unlink(),
    "a sheet of somebody else": lambda record: (record / "samples" / "0000000001.webp").write_bytes(b"RIFF"),
}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one committed record, in a folder of records that is sealed."""
    folder = tmp_path / "analysis"
    copy = shutil.copytree(collect.RECORDS / RECORD, folder / "records" / "runs" / RECORD)
    (copy / "samples").mkdir(exist_ok=True)
    shutil.copyfile(manifest.FOLDER / "published.csv", folder / "published.csv")
    manifest.seal(folder)
    monkeypatch.setattr(manifest, "FOLDER", folder)
    return copy


def failed(record: Path) -> list[str]:
    return [check.name for check in verify(Run.open(record)) if check.outcome == FAILED]


def test_a_sound_record_is_read(record: Path) -> None:
    manifest.check(record)
    manifest.check(record.parent)
    assert failed(record) == []


@pytest.mark.parametrize("kind", [*CONTRADICTIONS, *SEAL_ALONE])
def test_whatever_is_changed_breaks_the_seal(record: Path, kind: str) -> None:
    {**CONTRADICTIONS, **SEAL_ALONE}[kind](record)
    with pytest.raises(collect.UserError, match=r"(was changed|is missing|is not in)") as error:
        manifest.check(record)
    assert "\n" not in str(error.value) and RECORD in str(error.value)


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_contradiction_fails_whoever_seals_it(record: Path, kind: str) -> None:
    CONTRADICTIONS[kind](record)
    assert failed(record) != []


def test_tables_claims_and_results_refuse_a_changed_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "analysis"
    shutil.copytree(manifest.FOLDER / "records", folder / "records")
    shutil.copyfile(manifest.FOLDER / "published.csv", folder / "published.csv")
    monkeypatch.setattr(manifest, "FOLDER", folder)
    runs = folder / "records" / "runs"
    for module in ("analysis.collect", "analysis.results"):
        monkeypatch.setattr(f"{module}.RECORDS", runs)
    assert main(["table", "dmd2_gan"]) == 0
    SEAL_ALONE["a better value"](runs / RECORD)
    published = text("published.csv", lambda table: table.replace("30", "29"))
    for words in (["table", "dmd2_gan"], ["claims", "dmd2_gan"], ["figure", "dmd2_gan"], ["results", "--pages"]):
        capsys.readouterr()
        assert main(words) == 2, words
        assert f"{RECORD}/evals.jsonl was changed" in capsys.readouterr().err
    published(folder)
    assert [line.split()[0] for line in manifest.problems(folder, "published.csv")] == [str(folder / "published.csv")]


def test_the_committed_manifest_is_that_of_the_committed_files() -> None:
    assert list(manifest.problems(manifest.FOLDER)) == [], "seal them again with `python -m analysis.manifest`"
