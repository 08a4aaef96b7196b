"""The table of ``fewstep bench``: run folders, rows, what is printed and kept, and blocks of FLUX.2's sizes."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.backbones.tiny import write_tiny_sd
from core.config import UserError, compose, resolve, run_id, to_yaml
from core.run import Run
from experiments.bench import folders
from experiments.bench.blocks import HUB_IDS, Size, call_of, counted_flops, measure_block, size_of
from experiments.bench.contest import Duel, Side, contest, shares
from experiments.bench.duels import DUELS, step_duel
from experiments.bench.gpu import beside_on_gpu, tflops_of
from experiments.bench.machine import machine
from experiments.bench.printed import lines_of, parts, with_spread
from experiments.bench.processes import COMMANDS, Places, seconds_of
from experiments.bench.profile import package_of
from experiments.bench.rows import ROWS, Row
from experiments.bench.step import Period
from experiments.bench.table import keep
from experiments.bench.timing import peak_tflops
from experiments.cli import main

SIDE = {"images_per_s": 2.5, "evaluations_per_image": {"student": 2.0, "teacher": 46.0}}
SPREAD = {"median": 3.21, "low": 3.0, "high": 3.4}
MEASURED = {
    "name": "flash_fp32", "work": "a step", "wanted": 3.0, "kind": "ratio", "ratio": SPREAD,
    "efficiency": {"median": 0.95, "low": 0.94, "high": 0.96}, "time": {"teacher": 0.9, "beside the networks": 0.05},
    "ours": SIDE, "reference": SIDE,
}  # fmt: skip


def test_generated_folders_are_read_as_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By status, plan and table, with the numbers of the record that they were made from."""
    file, runs = folders.write_grid(tmp_path, 2, 2), folders.write_runs(tmp_path, 2, 2)
    words = [str(file), "--runs-dir", str(runs)]
    assert main(["grid", "status", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 done"
    assert main(["grid", "plan", *words]) == 0
    assert capsys.readouterr().out == "0 runs to do\n"
    config = resolve(compose(folders.EXPERIMENT))
    config.method.student_lr, config.seed, config.execution.label = 2e-4, 1, "rate-0.0002-s1"
    run = Run.open(run_id(config), runs)
    assert (run.path / "config.yaml").read_text() == to_yaml(config)
    record = Run.open(folders.RECORDS / folders.RECORD)
    assert run.metrics() == record.metrics() and run.state() == "done" and run.last_heartbeat()["images"] == 8960
    assert [line["value"] for line in run.evals()] == [line["value"] for line in record.evals()]
    assert {line["run"] for line in run.evals()} == {run.id} and run.provenance() == record.provenance()


def test_a_contest_counts_both_and_changes_who_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    began, ours, theirs = [], Counter(), Counter()

    def work(name: str, counter: Counter[str], evaluations: int, repeat: int) -> None:
        began.append((repeat, name))
        counter["student"] += evaluations

    def second_an_evaluation(call: Callable[[], object], device: torch.device) -> float:
        before = ours.total() + theirs.total()
        call()
        return float(ours.total() + theirs.total() - before)

    monkeypatch.setattr("experiments.bench.contest.timed", second_an_evaluation)

    sides = [Side(lambda r: work("ours", ours, 20, r), ours), Side(lambda r: work("theirs", theirs, 60, r), theirs)]
    found = contest(Duel(*sides, 4, torch.device("cpu")), 3)
    assert began[:4] == [(0, "ours"), (0, "theirs"), (1, "theirs"), (1, "ours")]
    assert found["ours"]["evaluations_per_image"] == {"student": 5.0}
    assert found["reference"]["evaluations_per_image"] == {"student": 15.0}
    assert found["ratio"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert "efficiency" not in found


def test_a_period_comes_again_and_is_chosen_for_its_work(tmp_path: Path) -> None:
    source = write_tiny_sd(tmp_path / "tiny")
    words = [f"backbone.path={source}", "train.batch_size=2", f"execution.runs_dir={tmp_path}/runs", "method.gan=off"]
    period = Period(resolve(compose("dmd2/tiny", words)), tmp_path / "runs", 0.9)
    method = period.trainer.method
    period.choose(method._steps, 1.5)
    steps = [int(method._steps(positions).sum()) for positions in period.positions()]
    assert sum(steps) == 6, "four samples of 1.5 steps on average"
    for _ in range(2):
        period.run()
        assert period.evaluations == {"student": 6 + 4, "teacher": 4, "fake_score": 2 + 4}
    kinds = set(period.recorder.seconds())
    assert kinds == {"student", "student, with gradient", "teacher", "fake_score", "fake_score, with gradient"}
    assert shares(Counter(a=3.0, b=1.0), 0.8) == pytest.approx({"a": 0.6, "b": 0.2, "beside the networks": 0.2})
    duel = step_duel(period, lambda: None, Counter())
    found = contest(duel, 1)
    assert found["ours"]["evaluations_per_image"] == {"student": 2.5, "teacher": 1.0, "fake_score": 1.5}
    assert set(found["time"]) == kinds | {"beside the networks"} and found["efficiency"]["median"] > 0
    assert sum(found["time"].values()) == pytest.approx(max(1, found["efficiency"]["median"]))
    assert beside_on_gpu(duel, found) == {}, "no GPU here"
    assert tflops_of(duel, 8.0) * 1e12 == 2 * counted_flops(duel.recorder.replay), "four images in half a second"


def test_a_row_is_printed_with_its_spread_and_its_work() -> None:
    text = "\n".join(lines_of(MEASURED))
    assert "3.21 (3-3.4)" in text and "wanted >= 3    a step" in text and "not reached" not in text
    assert "efficiency 0.95 (0.94-0.96)" in text and "teacher 90%; beside the networks 5%" in text
    assert text.count("2.5 images/s; evaluations an image: student 2, teacher 46") == 2
    slow = {"name": "table", "work": "a command", "wanted": 1.5, "kind": "seconds", "seconds": SPREAD}
    assert list(lines_of(slow)) == ["table           3.21 s (3-3.4)          wanted < 1.5 s  not reached    a command"]
    assert Row("x", "", 1.5, "seconds").reached(1.4) and not Row("x", "", 1.5).reached(1.4)
    assert with_spread({"median": 1234.5, "low": 0.001, "high": 1e4}) == "1.23e+03 (0.001-1e+04)"
    assert parts({"a": 0.004, "b": 0.2, "c": 0.7}) == "c 70%; b 20%"


def test_a_file_keeps_the_table_of_each_kind_of_device(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    here = {"machine": machine(torch.device("cpu")), "repeats": 5, "rows": [MEASURED]}
    there: dict[str, Any] = copy.deepcopy(here)
    there["machine"]["device"] = "NVIDIA H200"
    keep(there, file)
    keep(here | {"repeats": 3}, file)
    keep(here, file)
    assert json.loads(file.read_text()) == {"cuda": there, "cpu": here}
    assert here["machine"]["cores"] >= 1 and here["machine"]["packages"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--only", "flash_fp16"],
            "--only flash_fp16: no such row; nearest: flash_bf16, flash_fp32; allowed here",
        ),
        (["--repeats", "0"], "--repeats=0"),
    ],
)
def test_a_mistake_costs_no_measurement(capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_command_that_fails_is_one_line() -> None:
    with pytest.raises(UserError, match="fewstep grid status nothing: error: unknown grid 'nothing'"):
        seconds_of(["grid", "status", "nothing"])


def test_places_are_fresh(tmp_path: Path) -> None:
    places = Places(tmp_path)
    assert places.fresh() != places.fresh() and not places.fresh().exists()


@pytest.mark.parametrize(
    ("path", "name", "package"),
    [
        ("/venv/lib/python3.11/site-packages/yaml/scanner.py", "scan", "yaml"),
        ("/venv/lib/python3.11/site-packages/typing_extensions.py", "f", "typing_extensions"),
        (str(folders.ROOT / "core" / "config.py"), "compose", "core"),
        ("~", "<built-in method marshal.loads>", "reading modules"),
        ("~", "<method 'append' of 'list' objects>", "built-in functions"),
        ("<frozen importlib._bootstrap>", "_find_spec", "reading modules"),
        ("/usr/lib/python3.11/json/decoder.py", "decode", "Python's library"),
    ],
)
def test_time_is_told_by_package(path: str, name: str, package: str) -> None:
    assert package_of(path, name) == package


@pytest.mark.parametrize("name", HUB_IDS)
@pytest.mark.parametrize("kind", ["double", "single"])
def test_operations_of_flux2s_blocks_follow_from_their_shapes(name: str, kind: str) -> None:
    """As torch counts them, on no device; a backward pass is two forwards."""
    size = size_of(name)
    assert size.width == {"flux2_klein": 3072, "flux2_dev": 6144}[name]
    call = call_of(kind, size, torch.device("meta"), torch.bfloat16)
    assert counted_flops(torch.no_grad()(call)) == size.forward_flops(kind)
    assert counted_flops(lambda: call().mean().backward()) == 3 * size.forward_flops(kind)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_small_block_is_measured_on_any_device(kind: str) -> None:
    size = Size(2, 16, 3.0, image=16, text=4)
    found = measure_block(kind, size, 1, torch.device("cpu"))
    for name, passes in (("forward", 1), ("training", 3)):
        one = found[name]
        assert one["tflops"] * 1e12 * one["seconds"]["median"] == pytest.approx(passes * size.forward_flops(kind))
        assert one["images_per_s"] == pytest.approx(1 / one["seconds"]["median"])


def test_the_peak_of_a_gpu_is_looked_up_by_its_name() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == peak_tflops("NVIDIA H200", "bf16") == 989
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756 and peak_tflops("Somebody's GPU", "bf16") is None


def test_every_row_is_measured_by_something() -> None:
    ratios, seconds = ([row.name for row in ROWS if row.kind == kind] for kind in ("ratio", "seconds"))
    assert list(DUELS) == ratios and list(COMMANDS) == seconds


@pytest.mark.slow
def test_a_whole_duel_on_the_embedded_teacher(tmp_path: Path) -> None:
    """The steps do the same work but for what the release makes twice."""
    words = ["--only", "flash_fp32", "dmd2_attention", "--repeats", "1", "--out", str(tmp_path / "out.json")]
    assert main(["bench", *words]) == 0
    flash, dmd2 = json.loads((tmp_path / "out.json").read_text())["cpu"]["rows"]
    twice = {role: 2 * count for role, count in flash["ours"]["evaluations_per_image"].items()}
    assert flash["reference"]["evaluations_per_image"] == pytest.approx(twice, rel=0.05)
    assert dmd2["reference"]["evaluations_per_image"] == pytest.approx(dmd2["ours"]["evaluations_per_image"], rel=0.05)
