"""Cluster profiles and resources: what a site's YAML becomes in an sbatch file, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablations.grid import load as load_grid
from ablations.work import EVALUATE, TRAIN, Work
from core.schema import UserError
from slurm.profile import Profile, load, names
from slurm.resources import Resources, micro_batch, resources_of
from slurm.submit import slurm_parameters


def test_every_profile_of_the_project_is_valid() -> None:
    assert {"local", "debug", "example", "test"} <= set(names())
    for name in names():
        load(name)


def write(folder: Path, text: str) -> str:
    (folder / "site.yaml").write_text(text)
    return str(folder / "site.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitions: gpu", "partitions"),
        ("time_min: 10", "time_min=10 is out of range"),
        ("time_min: long", "time_min"),
        ("executor: pbs", "executor=pbs is unknown; allowed: slurm, local, debug"),
        ("partition: 'gpu\"; rm'", "has characters that a job file cannot hold"),
        ('setup: ["a\\nb"]', "contains a line break"),
        ("exclude: ['n1 n2']", "exclude='n1 n2' has characters"),
        ("signal_s: 700\ntime_min: 11", "signal_s=700 is not shorter than time_min=11"),
        ("- a", "not a cluster profile"),
        ("a: [", "expected"),
    ],
)
def test_a_wrong_profile_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load(write(tmp_path, text))
    assert str(error.value).startswith("site.yaml: ") and words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_cluster_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown cluster 'exmaple'; nearest: example; all: debug, example"):
        load("exmaple")


def test_a_profile_becomes_sbatch_options(tmp_path: Path) -> None:
    text = (
        "{partition: gpu, account: a1, time_min: 90, exclude: [n3, n4], modules: [cuda/12], setup: [ulimit -n 9000], "
    )
    text += "container: image.sqsh, srun_args: [--mpi=none], sbatch: {reservation: r1}, gpus_per_node: 4, "
    text += "cpus_per_node: 32}"
    values = slurm_parameters(
        load(write(tmp_path, text)), Resources(2, 4, 1, 8, 60, cells_per_job=1), "name", Path("/code")
    )
    assert values | {"setup": None} == {
        "job_name": "name", "partition": "gpu", "account": "a1", "exclude": "n3,n4", "time": 90, "signal_delay_s": 120,
        "nodes": 2, "ntasks_per_node": 4, "cpus_per_task": 8, "gpus_per_node": 4, "mem": "60GB",
        "array_parallelism": 64, "setup": None, "srun_args": ["--container-image=image.sqsh", "--mpi=none"],
        "additional_parameters": {"requeue": True, "reservation": "r1"},
    }  # fmt: skip
    assert values["setup"] == ["module load cuda/12", "ulimit -n 9000", "export PYTHONPATH=/code", "cd /code"]


def test_resources_of_an_experiment_and_what_a_node_does_not_hold() -> None:
    cell = load_grid("flash_losses", ["data.path=random:x"]).expand("paper")[0]
    found = resources_of(Work(TRAIN, cell))
    assert (found.processes, found.gpus_per_node, found.max_micro_batch) == (2, 2, 4)
    measuring = resources_of(Work(EVALUATE, cell))
    assert (measuring.processes, measuring.gpus_per_node, measuring.mem_gb) == (1, 1, 32)
    with pytest.raises(UserError, match="flash/sd15 needs gpus_per_node=2; the cluster's profile has 0"):
        found.check(Profile(cpus_per_node=64, mem_gb_per_node=64), cell.experiment)
    large = Profile(gpus_per_node=8, cpus_per_node=64, mem_gb_per_node=640)
    with pytest.raises(UserError, match="cells_per_job=2 needs runs of one process"):
        resources_of(Work(TRAIN, cell), cells_per_job=2).check(large, "x")


@pytest.mark.parametrize(
    ("batch", "processes", "most", "size"),
    [(8, 2, 4, None), (8, 1, 4, 4), (12, 1, 5, 4), (12, 2, 4, 3), (8, 2, None, None), (7, 1, 4, 1)],
)
def test_micro_batch_divides_the_share(batch: int, processes: int, most: int | None, size: int | None) -> None:
    assert micro_batch(batch, Resources(processes_per_node=processes, max_micro_batch=most)) == size


def test_processes_that_do_not_divide_the_batch() -> None:
    with pytest.raises(UserError, match="3 processes do not divide train.batch_size=8"):
        micro_batch(8, Resources(processes_per_node=3))
