"""On a real SLURM of two nodes: requeueing, node failure, cancelling, exactly-once submission. ``make test-slurm``.

The trainings are replaced by a small program that counts to a number, saves at every step, and leaves when it is told
to, as a training does; what is tested is what lies between a grid's cells and the cluster.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ablations.grid import Cell, load
from ablations.logs import log_of
from ablations.work import EVALUATE, TRAIN, Work
from core.run import atomic_write
from slurm.doctor import examine
from slurm.local_cluster import Cluster, running
from slurm.profile import load as load_profile
from slurm.queue import Queue
from slurm.status import BROKEN, CellStatus, grid_status
from slurm.submit import Submitter
from tests.slurm.waiting import wait

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(280)]

COUNTER = """
import pathlib, signal, sys, time
file, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
leave = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda n, f: leave.append(n))
done = int(file.read_text()) if file.exists() else 0
with file.with_suffix(".starts").open("a") as starts:
    starts.write(f"{done}\\n")
while done < last:
    time.sleep(0.5)
    done += 1
    file.write_text(str(done))
    if leave and done < last:
        sys.exit(75)
"""

GRID = """
title: Cells
base: {tiny: flash/tiny}
seeds: [0]
axes: {lr: {method.student_lr: [1.0e-3, 2.0e-3, 3.0e-3, 4.0e-3]}}
metrics: [kd_effnet]
"""


class Counters(Submitter):
    """Submits programs that count to ``last`` instead of trainings, and notes of what would be measured when."""

    last = 6

    def missing(self, cells: list[Cell], retry: tuple[str, ...] = (), *, measure: bool = False) -> list[Work]:
        return [work for work in super().missing(cells, retry) if measure or work.kind == TRAIN]

    def command(self, work: Work, resources: object, *, whole: bool = False) -> list[str]:
        if work.kind == EVALUATE:
            return ["cp", str(self.file_of(work.cell)), str(self.measured(work.cell))]
        program = self.runs_dir / "counter.py"
        if not program.exists():  # jobs that have started read it while others are being submitted
            atomic_write(program, COUNTER)
        return [sys.executable, str(program), str(self.file_of(work.cell)), str(self.last)]

    def measured(self, cell: Cell) -> Path:
        """A copy of what the cell's program had counted to when the job that measures it ran."""
        return self.file_of(cell).with_suffix(".measured")

    def file_of(self, cell: Cell) -> Path:
        return self.runs_dir / f"{cell.id}.txt"

    def starts(self, cell: Cell) -> list[int]:
        """Where the cell's program stood each time that it was started."""
        return [int(line) for line in self.file_of(cell).with_suffix(".starts").read_text().split()]

    def count(self, cell: Cell) -> int:
        file = self.file_of(cell)
        return int(file.read_text() or 0) if file.exists() else 0


@pytest.fixture
def submitter(use: Cluster, tmp_path: Path) -> Counters:
    code = Path(__file__).parents[2]
    return Counters("cells", load_profile("test"), tmp_path / "runs", code, print)


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    (tmp_path / "cells.yaml").write_text(GRID)
    return load(str(tmp_path / "cells.yaml")).expand("tiny")


def submit(submitter: Counters, cells: list[Cell], *, measure: bool = False, **changes: int) -> list[str]:
    """Ids of the tasks, in the order of the cells."""
    missing = submitter.missing(cells, measure=measure)
    arrays = submitter.arrays(missing, **{"cpus_per_process": 1, "mem_gb": 1, **changes})
    return [job for array in arrays for job in submitter.submit(array).jobs]


def state(submitter: Counters, cell: Cell) -> CellStatus:
    (found,) = grid_status([cell], submitter.runs_dir, Queue())
    return found


def test_cells_run_on_both_nodes_and_are_not_submitted_twice(submitter: Counters, cells: list[Cell]) -> None:
    submitter.last = 20
    jobs = submit(submitter, cells)
    assert len(jobs) == 4 and submitter.missing(cells) == []
    wait(lambda: all(submitter.count(cell) > 1 for cell in cells))
    found = grid_status(cells, submitter.runs_dir, Queue())
    assert [one.state for one in found] == ["running"] * 4 and {one.node for one in found} == {"n1", "n2"}
    wait(lambda: all(submitter.count(cell) == 20 for cell in cells))
    assert all(submitter.starts(cell) == [0] for cell in cells)


def test_a_time_limit_requeues_and_the_cell_goes_on(use: Cluster, submitter: Counters, cells: list[Cell]) -> None:
    submitter.last = 600
    (job,) = submit(submitter, cells[:1])
    wait(lambda: submitter.count(cells[0]) > 2)
    use.command(["scontrol", "update", f"JobId={job}", "TimeLimit=1"])
    wait(lambda: len(submitter.starts(cells[0])) == 2)
    before, after = submitter.starts(cells[0])
    assert before == 0 and 2 < after < 600
    assert state(submitter, cells[0]).restarts == 1


def test_preemption_requeues_once_and_loses_nothing(use: Cluster, submitter: Counters, cells: list[Cell]) -> None:
    submitter.last = 60
    submit(submitter, cells[:1])
    wait(lambda: submitter.count(cells[0]) > 2)
    node = state(submitter, cells[0]).node
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 8"]
    use.command(urgent)
    wait(lambda: len(submitter.starts(cells[0])) == 2)
    wait(lambda: submitter.count(cells[0]) == 60)
    assert len(submitter.starts(cells[0])) == 2 and submitter.starts(cells[0])[1] > 2
    assert state(submitter, cells[0]).restarts == 1, "one owner of requeueing"


def test_requeue_by_hand_goes_on(use: Cluster, submitter: Counters, cells: list[Cell]) -> None:
    submitter.last = 40
    (job,) = submit(submitter, cells[:1])
    wait(lambda: submitter.count(cells[0]) > 2)
    use.command(["scontrol", "requeue", job])
    wait(lambda: submitter.count(cells[0]) == 40)
    assert len(submitter.starts(cells[0])) == 2 and submitter.starts(cells[0])[1] > 2


def test_a_dead_node_loses_no_cell(use: Cluster, submitter: Counters, cells: list[Cell]) -> None:
    submitter.last = 40
    submit(submitter, cells[:1])
    wait(lambda: submitter.count(cells[0]) > 2)
    node = state(submitter, cells[0]).node
    use.stop_node(node)
    use.command(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"])
    wait(lambda: submitter.count(cells[0]) == 40)
    found = state(submitter, cells[0])
    assert found.node not in ("", node) and submitter.starts(cells[0])[1] > 2


def test_a_cancelled_cell_shows_so_and_may_be_submitted_again(
    use: Cluster, submitter: Counters, cells: list[Cell]
) -> None:
    submitter.last = 200
    (job,) = submit(submitter, cells[:1])
    wait(lambda: submitter.count(cells[0]) > 2)
    use.command(["scancel", job])
    wait(lambda: state(submitter, cells[0]).state == "cancelled")
    assert [work.cell for work in submitter.missing(cells[:1], BROKEN)] == cells[:1]
    assert submitter.missing(cells[:1]) == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the database's own user can enter, which tmp_path is not."""
    with tempfile.TemporaryDirectory(prefix="fewstep-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_accounting_tells_of_a_cancelled_cell_too(
    open_folder: Path, tmp_path: Path, cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(Cluster(open_folder, accounting=True)) as accounted:
        monkeypatch.setenv("SLURM_CONF", str(accounted.conf))
        submitter = Counters("cells", load_profile("test"), tmp_path / "runs", Path(__file__).parents[2], print)
        submitter.last = 200
        (job,) = submit(submitter, cells[:1])
        wait(lambda: submitter.count(cells[0]) > 2)
        accounted.command(["scancel", job])
        wait(lambda: state(submitter, cells[0]).state == "cancelled")
        wait(lambda: "CANCELLED" in accounted.command(["sacct", "-X", "-n", "-P", "-o", "State", "-j", job]))
        assert Queue()._accounting(["-j", job])[job].state == "CANCELLED"


def test_a_submitter_that_dies_before_it_hears_the_id_submits_nothing_twice(
    submitter: Counters, cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitter.last = 20

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(submitter.ledger, "confirm", die)
        with pytest.raises(KeyboardInterrupt):
            submit(submitter, cells)
    assert submitter.ledger.jobs() == {}
    assert submitter.missing(cells) == [] and len(submitter.ledger.jobs()) == 4
    wait(lambda: all(submitter.count(cell) == 20 for cell in cells))
    assert all(submitter.starts(cell) == [0] for cell in cells)


FAMILY = """
title: A family
base: {tiny: flash/tiny}
seeds: [0]
rows: [{id: child, label: C, parent: elder}, {id: elder, label: E, set: {method.student_lr: 1.0e-3}}]
metrics: [kd_effnet]
"""


@pytest.fixture
def family(tmp_path: Path) -> list[Cell]:
    (tmp_path / "family.yaml").write_text(FAMILY)
    return load(str(tmp_path / "family.yaml")).expand("tiny")


def test_a_child_starts_when_its_parent_has_ended_well(submitter: Counters, family: list[Cell]) -> None:
    elder, child = family
    submitter.last = 8
    submit(submitter, family)
    assert [found.state for found in grid_status(family, submitter.runs_dir, Queue())][1] == "queued"
    wait(lambda: submitter.count(child) > 0)
    assert submitter.count(elder) == 8


def test_the_child_of_a_failed_parent_is_taken_out_and_both_can_be_tried_again(
    submitter: Counters, family: list[Cell]
) -> None:
    elder, child = family
    submitter.file_of(elder).parent.mkdir(parents=True)
    submitter.file_of(elder).write_text("not a number")
    submit(submitter, family)
    wait(lambda: state(submitter, elder).state == "failed")
    wait(lambda: state(submitter, child).state in BROKEN)
    assert submitter.missing(family) == [] and not submitter.file_of(child).exists()
    assert "ValueError" in state(submitter, elder).reason
    submitter.file_of(elder).unlink()
    submitter.last = 3
    assert [work.cell for work in submitter.missing(family, BROKEN)] == family
    for array in submitter.arrays(submitter.missing(family, BROKEN), cpus_per_process=1, mem_gb=1):
        submitter.submit(array)
    wait(lambda: submitter.count(child) == 3)


def test_a_refused_submission_is_one_line_and_leaves_nothing(submitter: Counters, cells: list[Cell]) -> None:
    submitter.profile.partition = "nowhere"
    with pytest.raises(Exception, match="invalid partition specified: nowhere") as error:
        submit(submitter, cells)
    assert "\\n" not in str(error.value) and submitter.ledger.jobs() == {}
    submitter.profile.partition = "main"
    assert [work.cell for work in submitter.missing(cells)] == cells


def test_each_run_is_measured_when_it_is_trained_by_a_job_of_its_own(submitter: Counters, cells: list[Cell]) -> None:
    submitter.last = 8
    broken = submitter.file_of(cells[1])
    broken.parent.mkdir(parents=True)
    broken.write_text("not a number")
    jobs = submit(submitter, cells, measure=True)
    assert len(jobs) == 8 and len({job.partition("_")[0] for job in jobs}) == 2, "one array for each kind"
    good = [cell for cell in cells if cell is not cells[1]]
    wait(lambda: all(submitter.measured(cell).exists() for cell in good))
    assert {submitter.measured(cell).read_text() for cell in good} == {"8"}
    wait(lambda: not Queue().statuses(jobs)[jobs[5]].alive)
    assert not submitter.measured(cells[1]).exists(), "what has failed is not measured"
    assert state(submitter, cells[1]).state == "failed"


def test_cells_that_share_a_job_fail_alone(submitter: Counters, cells: list[Cell]) -> None:
    submitter.last = 8
    submitter.file_of(cells[1]).parent.mkdir(parents=True)
    submitter.file_of(cells[1]).write_text("not a number")
    jobs = submit(submitter, cells, cells_per_job=2)
    assert len(jobs) == 2
    wait(lambda: all(submitter.count(cell) == 8 for cell in cells if cell is not cells[1]))
    wait(lambda: not any(found.alive for found in Queue().statuses(jobs).values()))
    found = state(submitter, cells[1])
    assert found.state == "failed" and "ValueError" in found.reason
    assert "ValueError" not in log_of(submitter.runs_dir, cells[0].id).read_text()


def test_a_node_on_which_cells_only_fail_is_left_out(
    use: Cluster, submitter: Counters, cells: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    program = 'sleep 5; [ "$SLURMD_NODENAME" = n1 ] && exit 1; echo 1 > '  # all four wait side by side first
    submitter.profile.failures_per_node = 1
    submitter.command = lambda work, _: ["sh", "-c", f"{program} {submitter.file_of(work.cell)}"]
    submitter.runs_dir.mkdir(parents=True)
    jobs = submit(submitter, cells)
    wait(lambda: not any(found.alive for found in Queue().statuses(jobs).values()))
    del submitter.bad_nodes  # found once for each submission
    assert submitter.bad_nodes == ["n1"] and "left out" in capsys.readouterr().out
    for array in submitter.arrays(submitter.missing(cells, BROKEN), cpus_per_process=1, mem_gb=1):
        submitter.submit(array)
    wait(lambda: all(submitter.file_of(cell).exists() for cell in cells))


MANY = """
title: Many cells
base: {tiny: flash/tiny}
seeds: [%s]
axes: {lr: {method.student_lr: [%s]}}
metrics: [kd_effnet]
"""


def test_many_cells_are_few_arrays(use: Cluster, submitter: Counters, tmp_path: Path) -> None:
    seeds, rates = ", ".join(map(str, range(30))), ", ".join(f"{i}.0e-5" for i in range(1, 41))
    (tmp_path / "many.yaml").write_text(MANY % (seeds, rates))
    many = load(str(tmp_path / "many.yaml")).expand("tiny")
    submitter.profile.max_parallel = 1
    submitter.last = 600
    jobs = submit(submitter, many)
    assert len(jobs) == 1200 and len({job.partition("_")[0] for job in jobs}) == 2
    assert [len(submission.tasks) for submission in submitter.ledger.submissions()] == [1000, 200]
    assert submitter.missing(many) == []
    states = [found.state for found in grid_status(many, submitter.runs_dir, Queue())]
    assert len(states) == 1200 and set(states) <= {"queued", "running"} and states.count("queued") >= 1198
    use.command(["scancel", *jobs])

    def cancelled() -> bool:
        return {found.state for found in grid_status(many, submitter.runs_dir, Queue())} == {"cancelled"}

    wait(cancelled)


def test_a_job_file_without_submitit_runs_and_goes_on(use: Cluster, submitter: Counters, cells: list[Cell]) -> None:
    submitter.last = 40
    (file,) = submitter.write_job_files(cells[:1], submitter.runs_dir / "jobs", cpus_per_process=1, mem_gb=1)
    assert "submitit" not in file.read_text().replace(str(submitter.runs_dir), "")
    job = use.command(["sbatch", "--parsable", str(file)]).strip()
    wait(lambda: submitter.count(cells[0]) > 2)
    use.command(["scontrol", "requeue", job])
    wait(lambda: submitter.count(cells[0]) == 40)
    assert len(submitter.starts(cells[0])) == 2 and submitter.starts(cells[0])[1] > 2


def test_the_doctor_finds_a_good_cluster_good_and_names_what_is_wrong(use: Cluster, tmp_path: Path) -> None:
    code = Path(__file__).parents[2]

    def findings(**changes: object) -> dict[bool | None, str]:
        found = list(examine(replace(load_profile("test"), **changes), tmp_path / "runs", code))
        return {ok: "\n".join(finding.text for finding in found if finding.ok is ok) for ok in (True, None, False)}

    good = findings()
    assert good[False] == "" and "2 nodes with 2 CPUs, 6 GB, 0 GPUs" in good[True]
    assert "gloo between 2 processes: 3 of 3" in good[True] and "n2: sees" in good[True]
    assert "no accounting" in good[None] and "signal_s=10" in good[None]
    assert findings(partition="nowhere")[False] == "partition nowhere does not exist; there are: main urgent"
    assert "no node of the partition has the profile's 2 CPUs, 6 GB, 8 GPUs" in findings(gpus_per_node=8)[False]
    assert "cannot be written here (Not a directory)" in findings(shared_dir="/dev/null/x")[False]
    broken = findings(python="/nowhere/python")[False]
    assert broken.endswith("execve(): /nowhere/python: No such file or directory") and "\n" not in broken
