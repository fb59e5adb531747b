"""One GPU for generator, judge and learner: who has no turn holds next to nothing of it, and weights go by CUDA IPC.

Small numbers suffice: the cache takes what the config says, and a process that sleeps keeps its context.
"""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.cluster import connect
from actors.launch import Launcher, Parts
from actors.weights.transport import build_plane
from rlhf.config import RunConfig
from rlhf.modelfiles import tensor_shapes
from rlhf.monitor.group import build_monitor
from rlhf.ports import WeightPlane
from rlhf.records import Comparison, Message, WeightManifest
from rlhf.rounds.in_turn import InTurnLearner, InTurnPlane
from rlhf.rounds.turns import GENERATORS, LEARNER, Turns
from tests.gpu.test_nccl_sync import PROBE, TOLERANCE, a_round, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CACHE = 2 << 30
"""Bytes of an engine's cache: what sleep has to give back, far above what a context takes."""


def run_config(folder: Path, transport: str, **learner: Any) -> RunConfig:
    model = str(tiny_model(folder / "model"))
    engine = {"enforce_eager": True, "kv_cache_memory_bytes": CACHE}
    options = {"batch_size": 2, "micro_batch_size": 2, "max_length": 128, "optimizer": {"lr": 1e-2}, "zero_stage": 2}
    return RunConfig(
        name="colocated",
        output_dir=str(folder),
        policy={"path": model, "dtype": "float32"},
        prompts={"path": "unused.jsonl", "max_tokens": 64},
        rounds={"count": 2},
        generator={"samples": 2, "sampling": {"max_tokens": 8}, "engine": engine},
        judge={"type": "pair_model", "path": model, "dtype": "float32", "max_length": 256, "engine": engine},
        learner=options | learner,
        sync={"transport": transport, "bucket_mb": 1},
        cluster={"device": "cuda", "colocate": True, "deadlines": {"sync": 120}},
    )


def used() -> int:
    """Bytes of the GPU that are taken, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free


async def publish_and_compare(
    parts: Parts, learner: InTurnLearner, plane: WeightPlane, version: int
) -> tuple[WeightManifest, np.ndarray]:
    """The learner's log-probs of the probe, which the engine's must equal after the update."""
    manifest = await learner.manifest(version)
    report = await plane.publish(manifest, parts.fleet.members())
    assert report.served == ("generator-0",), report.failed
    assert report.probe_error < TOLERANCE
    expected = np.asarray(manifest.probes[0].logprobs)
    found = await parts.fleet.handle("generator-0").sequence_logprobs.remote(PROBE)
    assert np.abs(expected - found).max() < TOLERANCE
    await parts.fleet.admit("generator-0", version)
    return manifest, expected


async def hold(turns: Turns, name: str) -> int:
    async with turns.take(name):
        return used()


async def scenario(folder: Path, transport: str, **learner_options: Any) -> None:
    config = run_config(folder, transport, **learner_options)
    shapes = tensor_shapes(Path(config.policy.path), "policy.path")
    with connect(config.name, config.cluster, 256 << 20, folder) as cluster:
        launcher = Launcher(config, cluster, config.policy.path, shapes)
        assert launcher.transport == transport
        turns = launcher.turns
        assert turns is not None
        parts = await launcher.start([PROBE], build_monitor(config, folder, 1), folder)
        # All of them landed on one GPU.
        assert ray.cluster_resources()["GPU"] >= 1
        plane = build_plane(transport, config, parts.fleet, parts.learner, shapes, TOLERANCE, print)
        learner, in_turn = InTurnLearner(parts.learner, turns), InTurnPlane(plane, turns)
        _, before = await publish_and_compare(parts, learner, in_turn, 0)

        generators, judge, alone = [await hold(turns, name) for name in (GENERATORS, "judge", LEARNER)]
        # Two engines were started with a cache each; never are both there, and in the learner's turn none.
        assert generators - alone > CACHE // 2
        assert judge - alone > CACHE // 2
        assert abs(generators - judge) < CACHE // 2

        assert [report.round async for report in learner.train(a_round(), {})] == [1]
        await learner.save(folder / "checkpoint")
        _, after = await publish_and_compare(parts, learner, in_turn, 1)
        assert np.abs(after - before).max() > 10 * TOLERANCE
        # After a sleep that keeps the weights, and after a judge's turn, the version is the same.
        verdicts = await parts.judge.compare([Comparison("u", (Message(role="user", content="p"),), "a", "b")])
        assert len(verdicts) == 1
        async with turns.take(GENERATORS):
            found = await parts.fleet.handle("generator-0").sequence_logprobs.remote(PROBE)
        assert np.abs(after - found).max() < TOLERANCE
        # A new engine gets the version that the learner still holds, out of its sleep.
        async with turns.take(GENERATORS):
            await parts.fleet.replace("generator-0")
            assert plane.resends
            assert await plane.catch_up("generator-0") is None
            found = await parts.fleet.handle("generator-0").sequence_logprobs.remote(PROBE)
        assert np.abs(after - found).max() < TOLERANCE
        # What was saved in its sleep brings the learner back to version 1.
        await learner.load(folder / "checkpoint")
        _, again = await publish_and_compare(parts, learner, in_turn, 1)
        assert np.array_equal(again, after)


@pytest.mark.parametrize("transport", ["ipc", "object_store"])
def test_one_gpu_passes_from_one_to_the_next(tmp_path: Path, transport: str) -> None:
    asyncio.run(scenario(tmp_path, transport))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_learner_under_another_zero_stage_shares_its_gpu(tmp_path: Path, stage: int) -> None:
    asyncio.run(scenario(tmp_path, "ipc", zero_stage=stage))
