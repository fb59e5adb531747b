"""Weights over NCCL for real: a learner on one GPU trains, an engine on another takes and proves every version."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.cluster import connect
from actors.launch import Launcher, Parts
from actors.weights.transport import build_plane
from rlhf.config import RunConfig
from rlhf.modelfiles import tensor_shapes
from rlhf.monitor.group import build_monitor
from rlhf.ports import WeightPlane
from rlhf.records import Pair, SealedRound

SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
PROBE = (1, 2683, 253, 1528, 338, 253, 10254, 30, 2)
TOLERANCE = 5e-3
"""fp32, but the two sides' kernels add in another order; a tensor that did not arrive is off by far more."""


def tiny_model(path: Path) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(SMOLLM2).save_pretrained(path)
    return path


def run_config(folder: Path, device: str, transport: str) -> RunConfig:
    return RunConfig(
        name="nccl",
        output_dir=str(folder),
        policy={"path": str(tiny_model(folder / "model")), "dtype": "float32"},
        prompts={"path": "unused.jsonl", "max_tokens": 64},
        rounds={"count": 1},
        generator={"samples": 2, "sampling": {"max_tokens": 8}, "engine": {"enforce_eager": True}},
        judge={"type": "sentiment"},
        learner={"batch_size": 2, "micro_batch_size": 2, "max_length": 128, "optimizer": {"lr": 1e-2}},
        sync={"transport": transport, "bucket_mb": 1},
        cluster={"device": device, "deadlines": {"sync": 120}},
    )


def a_round() -> SealedRound:
    rows = [((5, 6, 7), (8, 9, 2), (10, 11, 2)), ((12, 13), (14, 2), (15, 16, 2))]
    pairs = [
        Pair(f"u{i}", 1, prompt, chosen, rejected, "p", "c", "r", 0.9, 0, 0)
        for i, (prompt, chosen, rejected) in enumerate(rows)
    ]
    return SealedRound(1, tuple(pairs), "digest")


async def publish_and_compare(parts: Parts, plane: WeightPlane, version: int) -> np.ndarray:
    """The learner's log-probs of the probe, which the engine's must equal after the update."""
    manifest = await parts.learner.manifest(version)
    report = await plane.publish(manifest, parts.fleet.members())
    assert report.served == ("generator-0",)
    assert report.nbytes > 0
    assert report.probe_error < TOLERANCE
    expected = np.asarray(manifest.probes[0].logprobs)
    found = await parts.fleet.handle("generator-0").sequence_logprobs.remote(PROBE)
    assert np.abs(expected - found).max() < TOLERANCE
    await parts.fleet.admit("generator-0", version)
    return expected


async def scenario(folder: Path, device: str, transport: str) -> None:
    config = run_config(folder, device, transport)
    shapes = tensor_shapes(Path(config.policy.path), "policy.path")
    with connect(config.name, config.cluster, 256 << 20, folder) as cluster:
        launcher = Launcher(config, cluster, config.policy.path, shapes)
        assert launcher.transport == transport
        parts = await launcher.start([PROBE], build_monitor(config, folder, 1), folder)
        plane = build_plane(transport, config, parts.fleet, parts.learner, shapes, TOLERANCE, print)
        before = await publish_and_compare(parts, plane, 0)
        assert [report.round async for report in parts.learner.train(a_round(), {})] == [1]
        # The same group again, with weights that the engine could not have from anywhere else.
        after = await publish_and_compare(parts, plane, 1)
        assert np.abs(after - before).max() > 10 * TOLERANCE
        # A new engine holds the first weights until a new group brings it these.
        await parts.fleet.replace("generator-0")
        assert np.array_equal(await publish_and_compare(parts, plane, 1), after)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for the learner and one for the engine")
def test_versions_sent_over_nccl_give_the_learners_logprobs(tmp_path: Path) -> None:
    asyncio.run(scenario(tmp_path, "cuda", "nccl"))
