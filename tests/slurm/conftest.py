"""One real cluster of two nodes for all tests that need it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slurm.local_cluster import Cluster, running
from tests.slurm.waiting import wait


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(Cluster(tmp_path_factory.mktemp("slurm"))) as started:
        yield started


@pytest.fixture
def use(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, and this process talking to it; afterwards it is idle again."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    yield cluster
    cluster.command(["scancel", "--user=root"], check=False)
    for node in cluster.nodes:
        cluster.start_node(node)
        cluster.command(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)
    wait(lambda: not cluster.command(["squeue", "-h"]).strip())
