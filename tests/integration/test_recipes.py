"""Each recipe started for real on nodes of its shape, which announce a resource of their own in place of GPUs.

What is small here: models, tokens, prompts, rounds, threads. One engine in place of a tensor-parallel group still takes
the group's GPUs of a node. Actors, ranks, strategies, ZeRO stages, offloading, turns, reference and loss are the
recipe's.
"""

import os
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from ray._raylet import GcsClientOptions, GlobalStateAccessor
from ray.cluster_utils import Cluster
from ray.core.generated.gcs_pb2 import ActorTableData

from tests import recipes
from tests.integration.conftest import System

pytestmark = pytest.mark.slow

SIMULATED = "sim_gpu"
"""The resource that stands for GPUs."""

PRESTART = "RAY_enable_worker_prestart"
STORE = 128 << 20
LOOK_S = 1.0


@contextmanager
def simulated(header: recipes.Header) -> Iterator[Cluster]:
    """The recipe's nodes on this machine."""
    # Ray starts workers before anybody asks for them otherwise, one for each CPU that a node announces.
    os.environ[PRESTART] = "false"
    folder = tempfile.mkdtemp(prefix="rlhf-r-", dir="/tmp")
    nodes = [
        {"num_cpus": header.cpus, "resources": {SIMULATED: gpus}, "object_store_memory": STORE}
        for gpus in header.gpus()
    ]
    cluster = Cluster(initialize_head=True, head_node_args=nodes[0] | {"temp_dir": folder, "include_dashboard": False})
    try:
        for node in nodes[1:]:
            cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ[PRESTART]


class Watch:
    """Asks the cluster, every second of a run, which node each named actor is on."""

    def __init__(self, address: str):
        self._accessor = GlobalStateAccessor(GcsClientOptions.create(address, None, True, True))
        assert self._accessor.connect()
        self._next = 0.0
        self.places: dict[str, set[str]] = defaultdict(set)

    def __call__(self, run: Path) -> bool:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LOOK_S
            for row in self._accessor.get_actor_table(None, None):
                actor = ActorTableData.FromString(row)
                if actor.name and actor.state == ActorTableData.ALIVE:
                    self.places[actor.name].add(actor.address.node_id.hex())
        return False  # The run goes on.

    def nodes(self) -> list[Counter[str]]:
        """Actors of each node by role; fails if one of them moved."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for name, nodes in self.places.items():
            (node,) = nodes
            found[node][name.rsplit("-", 1)[0]] += 1
        return list(found.values())


def small(name: str, system: System) -> list[str]:
    """Overrides with which a recipe runs on a CPU in minutes."""
    model, prompts = system.config["policy"]["path"], system.config["prompts"]["path"]
    gpus = {role: figures.gpus for role, figures in recipes.header(name).memory.items()}
    engine = "{kv_cache_memory_bytes: 33554432, max_num_batched_tokens: 1024, max_num_seqs: 8}"
    return [
        f"policy.path={model}",
        f"judge.path={model}",
        f"prompts.path={prompts}",
        "prompts.column=prompt",
        "prompts.max_tokens=64",
        f"prompts.eval={{path: {prompts}, count: 2}}",
        "rounds.count=1",
        "rounds.prompts=8",
        "generator.tensor_parallel=1",
        "generator.sampling.max_tokens=8",
        f"generator.engine={engine}",
        f"judge.engine={engine}",
        "judge.max_length=256",
        "learner.max_length=128",
        *(f"{role}.cpus=1" for role in gpus),
        *(f"cluster.placement.{role}.resources={{{SIMULATED}: {count}}}" for role, count in gpus.items()),
        "cluster.device=cpu",
        "cluster.deadlines.start=1500",
    ]


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_starts_where_its_drawing_says_and_trains_a_round(name: str, system: System) -> None:
    header = recipes.header(name)
    overrides = small(name, system)
    system.config = yaml.safe_load(Path(recipes.path(name)).read_text()) | {"output_dir": str(system.folder / "runs")}
    with simulated(header) as cluster:
        watch = Watch(cluster.address)
        run = system.train(*overrides, f"cluster.address={cluster.address}", stop=watch, timeout=2100)
    assert run.code == 0, run.stderr[-3000:]

    drawn = [{role: count // header.memory[role].gpus for role, count in node.items()} for node in header.roles()]
    # Which of equal nodes is which is Ray's choice.
    assert sorted(sorted(node.items()) for node in watch.nodes()) == sorted(sorted(node.items()) for node in drawn)
    (round_,) = run.events("round")
    assert round_["pairs/kept"] > 0
    assert run.manifest(1)["state"] == "PUBLISHED"
    assert len(run.events("step")) == system.config["learner"]["epochs"]
    assert (run.path / "policy" / "model.safetensors").is_file()
