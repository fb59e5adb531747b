"""Sparse updates on two nodes with real engines: patches, refusals, lost copies; each version is proved."""

import asyncio
import shutil
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import AutoModelForCausalLM

from actors.calls import within
from actors.engine.llm import EngineSpec, engine_environment
from actors.fleet import GeneratorFleet
from actors.generator import GeneratorActor
from actors.placement import stop
from actors.weights.outgoing import Outgoing, Publishing
from actors.weights.sparse_plane import SparsePlane
from rlhf.health import RestartBudget
from rlhf.modelfiles import tensor_shapes
from rlhf.records import Probe

PROBE = (1, 2683, 253, 1528, 338, 253, 10254, 30, 2)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 4}
CHANGED = 0.02
REFRESH = 4


@pytest.fixture(scope="module")
def nodes():
    """Two nodes of this machine, each with an object store of its own."""
    folder = tempfile.mkdtemp(prefix="rlhf-t-")
    store = 256 << 20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "object_store_memory": store, "temp_dir": folder, "include_dashboard": False},
    )
    second = cluster.add_node(num_cpus=4, object_store_memory=store)
    ray.init(address=cluster.address, namespace="tests", log_to_driver=False)
    yield [cluster.head_node.node_id, second.node_id]
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


class Policy:
    """The learner's side: weights that move a little, and what a plain forward says of the probe."""

    def __init__(self, path, bucket_bytes):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.outgoing = Outgoing(Publishing(bucket_bytes=bucket_bytes, refresh_every=REFRESH))
        self.version = -1
        self.expected_share = 0.0

    @torch.no_grad()
    def step(self):
        """Move every 50th weight of every matrix."""
        moved = 0
        for parameter in self.model.parameters():
            flat = parameter.view(-1)
            flat[:: int(1 / CHANGED)] += 0.05
            moved += len(flat[:: int(1 / CHANGED)])
        self.expected_share = moved / sum(p.numel() for p in self.model.parameters())

    @torch.no_grad()
    def manifest(self):
        self.version += 1
        table = torch.log_softmax(self.model(torch.tensor([PROBE])).logits[0], dim=-1)
        expected = tuple(table[place, token].item() for place, token in enumerate(PROBE[1:]))
        tensors = ((name, tensor) for name, tensor in self.model.state_dict().items() if name != "lm_head.weight")
        return self.outgoing.manifest(self.version, tensors, (Probe(PROBE, expected),))


async def start_fleet(nodes, tiny_model):
    shapes = tensor_shapes(tiny_model, "policy.path")
    spec = EngineSpec(
        str(tiny_model), "float32", 256, 1, "cpu", 0, False, {"kv_cache_memory_bytes": 32 << 20}, "object_store"
    )
    actor = ray.remote(max_concurrency=100)(GeneratorActor)
    places = {f"sparse-{index}": node for index, node in enumerate(nodes)}

    async def launch(name):
        handle = actor.options(
            name=name,
            num_cpus=1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(places[name], soft=False),
            runtime_env={"env_vars": engine_environment("cpu", 1)},
        ).remote(name, spec, shapes)
        await within(handle.start.remote(), 120, name)
        return handle

    async def restart(name):
        await stop(name, orderly=False)
        return await launch(name)

    handles = await asyncio.gather(*map(launch, places))
    return GeneratorFleet(dict(zip(places, handles, strict=True)), SAMPLING, 8, restart, RestartBudget(3, 3600.0))


def damaged(manifest):
    """The manifest with one value of its largest patch wrong."""
    largest = max(manifest.buckets, key=lambda bucket: bucket.patch_bytes)
    data = ray.get(largest.patch).copy()
    data[-1] ^= 1
    return replace(
        manifest,
        buckets=tuple(
            replace(bucket, patch=ray.put(data)) if bucket is largest else bucket for bucket in manifest.buckets
        ),
    )


async def test_changed_words_travel_and_every_version_is_proved(nodes, tiny_model):
    fleet = await start_fleet(nodes, tiny_model)
    alerts = []
    plane = SparsePlane(fleet, True, 1e-4, 60, alerts.append)
    policy = Policy(tiny_model, 1 << 20)

    async def publish(manifest):
        report = await plane.publish(manifest, fleet.members())
        assert (report.version, report.failed) == (manifest.version, {})
        assert set(report.served) == {"sparse-0", "sparse-1"}
        # The engine's log-probs are those of a plain forward of this very version.
        assert report.probe_error < 1e-4
        for name in report.served:
            await fleet.admit(name, manifest.version)
        return report

    assert (await publish(whole := policy.manifest())).nbytes == whole.nbytes
    assert whole.base is None

    # Two patched versions in a row: the second is made of what the first patch gave.
    for _ in range(2):
        policy.step()
        manifest = policy.manifest()
        assert manifest.base is not None
        assert len(manifest.buckets) == 3
        report = await publish(manifest)
        assert report.nbytes == manifest.sent_bytes < manifest.nbytes / 16
        # A float32 weight is two words, of which such a move changes one or both.
        assert policy.expected_share / 2 <= report.changed_fraction <= policy.expected_share
    assert alerts == []

    # A patch that arrives damaged: nobody serves what it gives, the whole version is sent instead.
    policy.step()
    report = await publish(damaged(policy.manifest()))
    assert report.nbytes == whole.nbytes
    assert len(alerts) == 2
    assert all("checksum of" in alert and "sent whole" in alert for alert in alerts)

    # Every so many versions all is sent again.
    policy.step()
    assert (await publish(refresh := policy.manifest())).nbytes == refresh.nbytes
    assert (refresh.base, refresh.version) == (None, REFRESH)

    # The copy of one node is gone: that node gets the whole version, and the next one as a patch again.
    alerts.clear()
    ray.kill(plane._copies._actors[nodes[1]])
    policy.step()
    assert (await publish(policy.manifest())).nbytes == whole.nbytes
    assert len(alerts) == 1
    assert "sent whole" in alerts[0]
    policy.step()
    manifest = policy.manifest()
    assert (await publish(manifest)).nbytes == manifest.sent_bytes < whole.nbytes / 16

    # An engine that is started again takes the whole of the version that is served.
    await fleet.replace("sparse-0", "to be a new one", fleet.handle("sparse-0"))
    assert await plane.catch_up("sparse-0") is None
    assert await fleet.handle("sparse-0").version.remote() == policy.version
    policy.step()
    assert (await publish(policy.manifest())).nbytes < whole.nbytes / 16


def test_no_patch_where_it_would_not_be_smaller_and_none_after_another_layout(nodes):
    outgoing = Outgoing(Publishing(bucket_bytes=1 << 16, refresh_every=REFRESH))

    def tensors(seed, names):
        moved = np.random.default_rng(seed)
        return [
            ("kept", torch.zeros(1 << 15, dtype=torch.bfloat16)),
            *((name, torch.from_numpy(moved.standard_normal(1 << 15)).bfloat16()) for name in names),
        ]

    first = outgoing.manifest(0, tensors(0, ["a", "b"]), ())
    second = outgoing.manifest(1, tensors(1, ["a", "b"]), ())
    assert [bucket.patch is not None for bucket in second.buckets] == [True, False, False]
    assert second.base == first.digest() != second.digest()
    assert second.changed_fraction(first.checksums()) == pytest.approx(2 / 3)
    third = outgoing.manifest(2, tensors(1, ["b", "a"]), ())
    assert [bucket.patch is not None for bucket in third.buckets] == [True, False, False]
    fourth = outgoing.manifest(3, tensors(1, ["b", "a"]), ())
    assert fourth.sent_bytes == sum(bucket.patch_bytes for bucket in fourth.buckets) < 100
