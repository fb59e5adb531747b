"""A run whose generators come and go: a node joins, another one is drained and taken away, and the run goes on."""

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.integration.conftest import System

pytestmark = pytest.mark.slow

STORE = 256 << 20
ENGINE = {"engine": 1}
"""What a node announces that may hold one generator."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head for learner and judge, and one node for one generator."""
    folder = tempfile.mkdtemp(prefix="rlhf-t-")
    head = {"num_cpus": 16, "object_store_memory": STORE, "temp_dir": folder, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=4, object_store_memory=STORE, resources=ENGINE)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def members(run_dir: Path) -> list[float]:
    """fleet/members of each round."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event["fleet/members"] for event in map(json.loads, lines) if event["event"] == "round"]


def drain(cluster: Cluster, node: str, seconds: float) -> None:
    """What an autoscaler does before it takes a node away."""
    accepted, reason = GcsClient(address=cluster.address).drain_node(
        node, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "spot", int(1000 * (time.time() + seconds))
    )
    assert accepted, reason


class Changes:
    """What happens to the cluster while the run goes on; each step waits for what the one before leads to."""

    def __init__(self, cluster: Cluster, stderr: Path) -> None:
        self._cluster = cluster
        self._stderr = stderr
        self._steps: list[Callable[[Path], bool]] = [self._join, self._drain, self._take_away, self._end]
        self._first = cluster.list_all_nodes()[-1]
        self._rounds = 0

    def __call__(self, run_dir: Path) -> bool:
        """Is it time to stop the run?"""
        if self._steps[0](run_dir):
            self._steps.pop(0)
        return not self._steps

    def _join(self, run_dir: Path) -> bool:
        if not members(run_dir):
            return False
        self._cluster.add_node(num_cpus=4, object_store_memory=STORE, resources=ENGINE, wait=False)
        return True

    def _drain(self, run_dir: Path) -> bool:
        if members(run_dir)[-1] < 2:
            return False
        drain(self._cluster, self._first.node_id, 60)
        return True

    def _take_away(self, run_dir: Path) -> bool:
        if members(run_dir)[-1] > 1:
            return False
        self._cluster.remove_node(self._first, allow_graceful=False)
        self._rounds = len(members(run_dir))
        return True

    def _end(self, run_dir: Path) -> bool:
        return len(members(run_dir)) >= self._rounds + 2


def test_generators_join_and_leave_with_their_nodes(cluster: Cluster, system: System, tmp_path: Path) -> None:
    changes = Changes(cluster, system.folder / "stderr")
    run = system.train(
        f"cluster.address={cluster.address}",
        "cluster.device=cpu",
        "cluster.placement.generator.resources={engine: 1}",
        "generator.replicas={min: 1, max: 2}",
        "generator.cpus=1",
        "learner.cpus=1",
        "rounds.count=500",
        "evaluation.every=0",
        stop=changes,
        signal_number=signal.SIGTERM,
    )
    assert run.code == 143, run.stderr[-3000:]
    shown = run.stdout + run.stderr
    assert "generator-1 joins on node" in shown
    assert f"generator-0 leaves: node {changes._first.node_id[:8]} is being drained" in shown
    counts = members(run.path)
    assert {1.0, 2.0} == set(counts)
    assert counts[0] == counts[-1] == 1.0
    # Nobody was started again: who leaves in time costs no restart.
    assert sum(event["fleet/restarts"] for event in run.events("round")) == 0
    rounds = [event["round"] for event in run.events("round")]
    assert rounds == list(range(1, len(rounds) + 1))
    for round in rounds[:-1]:
        manifest = run.manifest(round)
        assert manifest["state"] == "PUBLISHED"
        assert len(set(manifest["uids"])) == len(manifest["uids"]) == 4
