"""Submissions in files, and what SLURM's words mean; no cluster is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablations.job import launcher
from core.schema import UserError
from slurm.ledger import Ledger
from slurm.queue import JobStatus, Queue, _of_controller
from slurm.status import decide
from slurm.submit import absolute


def test_an_intent_is_written_before_and_the_ids_after(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs")
    first = ledger.intend("g", "train", [["aaa"], ["bbb", "ccc"]], {"code": "x"})
    assert first.jobs == () and ledger.jobs() == {} and first.jobs_of("12") == ("12_0", "12_1")
    ledger.confirm(first, first.jobs_of("12"))
    second = ledger.intend("g", "train", [["aaa"]], {})
    ledger.confirm(second, second.jobs_of("13"))
    assert {run: [job for _, job in entries] for run, entries in ledger.jobs().items()} == {
        "aaa": ["12_0", "13"], "bbb": ["12_1"], "ccc": ["12_1"]
    }  # fmt: skip
    third = ledger.intend("g", "train", [["ddd"]], {})
    ledger.abandon(third, "never heard of")
    assert [submission.abandoned for submission in ledger.submissions()] == [False, False, True]
    assert len({submission.name for submission in ledger.submissions()}) == 3


def test_one_submitter_at_a_time(tmp_path: Path) -> None:
    with (
        Ledger(tmp_path).lock(),
        pytest.raises(UserError, match="another submission is under way"),
        Ledger(tmp_path).lock(),
    ):
        pass
    with Ledger(tmp_path).lock():
        pass


def test_relative_paths_are_those_of_the_submitting_folder(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()  # tests run in tmp_path
    assert absolute("data.path=shards") == f'data.path="{tmp_path}/shards"'
    for same in ("data.path=random:x", "data.path=/data", "method.name=shards", "data.path=none"):
        assert absolute(same) == same


LINE = (
    "JobId=7 ArrayJobId=6 ArrayTaskId=0 JobName=fewstep-g-1 UserId=root(0) JobState=RUNNING Reason=None "
    "Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 NodeList=n1 BatchHost=n1"
)


def test_lines_of_the_controller() -> None:
    (job,) = _of_controller(LINE)
    assert job == JobStatus("6_0", "fewstep-g-1", "RUNNING", "n1", "", 2) and job.alive
    waiting = _of_controller(
        "JobId=8 ArrayJobId=8 ArrayTaskId=3-5,9%4 JobName=x JobState=PENDING Reason=Resources NodeList=(null)"
    )
    assert [w.task for w in waiting] == ["8_3", "8_4", "8_5", "8_9"] and waiting[0].node == ""
    (single,) = _of_controller("JobId=9 JobName=x JobState=CANCELLED by 0 Reason=None NodeList=(null)")
    assert (single.task, single.state, single.alive) == ("9", "CANCELLED", False)
    (rest,) = _of_controller("JobId=13 ArrayJobId=13 ArrayTaskId=4294967294 JobName=x JobState=CANCELLED Reason=None")
    assert (rest.task, rest.state) == ("13", "CANCELLED")


def test_tasks_that_were_cancelled_together_are_known_each(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"sacct": "13|x|CANCELLED by 0|(null)\n14_[2-3,7%4]|x|CANCELLED|\n15_1|x|FAILED|n1\n", "scontrol": ""}
    monkeypatch.setattr(Queue, "_ask", lambda self, words: said[words[0]])
    states = Queue().statuses(["13_5", "14_3", "14_7", "15_1", "15_2"])
    assert {task: states[task].state for task in ("13_5", "14_3", "14_7")} == dict.fromkeys(
        ("13_5", "14_3", "14_7"), "CANCELLED"
    )
    assert (states["15_1"].state, states["15_1"].node) == ("FAILED", "n1") and "15_2" not in states


def test_only_jobs_that_wait_or_run_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"sacct": "15_1|x|FAILED|n1\n9|x|PENDING|\n", "scontrol": LINE}
    monkeypatch.setattr(Queue, "_ask", lambda self, words: said[words[0]])
    assert Queue().alive(["9", "6_0", "15_1", "99", "9"]) == ["9", "6_0"]
    assert Queue().alive([]) == []


def test_a_controller_that_does_not_answer_loses_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy one is asked again; what runs is never called lost because nobody could be asked."""
    asked: list[str] = []

    def answers_after(times: int) -> None:
        asked.clear()
        monkeypatch.setattr(Queue, "pauses_s", (0.0, 0.0))
        monkeypatch.setattr(
            Queue,
            "_ask",
            lambda self, words: asked.append(words[0]) or (LINE if asked.count("scontrol") > times else None),
        )

    answers_after(2)
    assert Queue().statuses(["6_0"])["6_0"].state == "RUNNING" and asked.count("scontrol") == 3
    answers_after(3)
    with pytest.raises(UserError, match="scontrol show job: the controller does not answer"):
        Queue().statuses(["6_0"])


def test_nothing_but_what_was_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of completed jobs has all jobs, by raw ids: that of an array is the id of its last task."""
    said = {"sacct": "16|x|COMPLETED|n2\n17|x|FAILED|n1\n3|old|COMPLETED|n1\n", "scontrol": ""}
    monkeypatch.setattr(Queue, "_ask", lambda self, words: said[words[0]])
    assert Queue().statuses(["16_0", "16_1"]) == {} and set(Queue().statuses(["17"])) == {"17"}


@pytest.mark.parametrize(
    ("run", "job", "said", "state"),
    [
        ("planned", "", None, "planned"),
        ("done", "6_0", None, "done"),
        ("diverged", "6_0", "FAILED", "diverged"),
        ("planned", "6_0", "PENDING", "queued"),
        ("failed", "6_0", "RUNNING", "running"),  # killed before, and running again
        ("planned", "6_0", "CANCELLED", "cancelled"),
        ("failed", "6_0", "TIMEOUT", "failed"),
        ("planned", "6_0", "PREEMPTED", "preempted"),
        ("failed", "6_0", None, "lost"),
        ("running", "6_0", None, "running"),  # its heartbeat is fresh
        ("failed", "6_0", "COMPLETED", "failed"),
        ("planned", "6_0", "COMPLETED", "failed"),  # it shared a job with cells that ended well
    ],
)
def test_the_state_of_a_cell(run: str, job: str, said: str | None, state: str) -> None:
    known = JobStatus(job, "n", said) if said else None
    assert decide(run, "", job, known)[0] == state


def test_a_requeued_job_waits_as_preempted() -> None:
    assert decide("planned", "", "6_0", JobStatus("6_0", "n", "PENDING", restarts=1))[0] == "preempted"


def test_torch_s_variables_come_from_srun_s() -> None:
    job = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
    assert launcher(job | {"SLURM_JOB_ID": "41234"}) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "21234"
    }  # fmt: skip
    assert launcher({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == {} == launcher({})
