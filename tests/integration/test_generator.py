"""The generator actor with a real vLLM engine: sampling, weight updates, refusals and proofs."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.calls import within
from actors.engine.llm import EngineSpec, engine_environment
from actors.fleet import GeneratorFleet
from actors.generator import GeneratorActor
from actors.weights.payload import pack
from actors.weights.plane import ObjectStorePlane
from rlhf.errors import EngineLostError, PayloadError, RLHFError
from rlhf.modelfiles import tensor_shapes
from rlhf.records import Probe, Prompt, Rollout, SampleRequest, WeightManifest
from rlhf.wire import PackedRequests

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 10}
PROBE = (1, 2683, 253, 1528, 338, 253, 10254, 30, 2)


class Learner:
    """Weights in plain transformers: the independent reference for what the engine must compute."""

    def __init__(self, path: Path):
        self.path = path
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def change(self, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))

    def logprobs(self, ids: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            table = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], dim=-1)
        return [table[position, token].item() for position, token in enumerate(ids[1:])]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor) for name, tensor in self.model.state_dict().items() if name != "lm_head.weight")

    def manifest(self, version: int, bucket_bytes: int = 1 << 20) -> WeightManifest:
        buckets = [replace(bucket, handle=ray.put(data)) for bucket, data in pack(self.tensors(), bucket_bytes)]
        return WeightManifest(version, tuple(buckets), (Probe(PROBE, tuple(self.logprobs(PROBE))),))


@pytest.fixture(scope="module")
def launch(cluster: None, tiny_model: Path) -> Any:
    """Starts generator actors as the launcher does."""
    shapes = tensor_shapes(tiny_model, "policy.path")
    actor = ray.remote(max_concurrency=1000)(GeneratorActor)
    spec = EngineSpec(
        str(tiny_model), "float32", 128, 1, "cpu", 0, False, {"kv_cache_memory_bytes": 64 << 20}, "object_store"
    )

    async def start(name: str) -> Any:
        environment = {"env_vars": engine_environment("cpu", 1)}
        handle = actor.options(name=name, num_cpus=1, runtime_env=environment).remote(name, spec, shapes)
        await within(handle.start.remote(), 120, name)
        return handle

    return start


@pytest.fixture(scope="module")
def generator(launch: Any) -> Any:
    return asyncio.run(launch("generator-a"))


def prompt(text: str, path: Path) -> Prompt:
    ids = AutoTokenizer.from_pretrained(path)(text)["input_ids"]
    return Prompt(text, (), text, tuple(ids))


def sample(generator: Any, requests: list[SampleRequest]) -> list[Rollout]:
    stream = generator.sample.options(num_returns="streaming").remote(PackedRequests(requests), SAMPLING)
    found = [rollout for reference in stream for rollout in ray.get(reference).rollouts()]
    return sorted(found, key=lambda rollout: (rollout.uid, rollout.k))


def update(generator: Any, manifest: WeightManifest, tolerance: float = 1e-4) -> float:
    return asyncio.run(within(generator.update.remote(manifest, True, tolerance), 60, "update"))


def test_nothing_is_served_before_a_version_is_proved(generator, tiny_model):
    with pytest.raises(Exception, match="serves no proved version"):
        sample(generator, [SampleRequest(prompt("hello there", tiny_model), (1, 2))])


def test_what_vllm_leaves_behind_lies_in_rays_folder(generator):
    files = Path(ray._private.worker._global_node.get_temp_dir_path(), f"engines-{os.getuid()}")
    assert [path.name for path in files.glob("vllm_dist_*")]
    assert [path for path in files.iterdir() if path.is_socket()]


def test_versions_are_proved_served_and_never_mixed_up(generator, tiny_model):
    learner = Learner(tiny_model)
    request = SampleRequest(
        prompt("The story of the long road begins with a small town by the sea", tiny_model), (7, 8)
    )
    texts = []
    for version in range(3):
        if version:
            learner.change(version)
        assert update(generator, learner.manifest(version)) < 1e-4
        assert ray.get(generator.version.remote()) == version
        # The same prompt again: a prefix cached under the old weights would show in the log-probs.
        for rollout in sample(generator, [request]):
            expected = learner.logprobs((*request.prompt.token_ids, *rollout.token_ids))[-len(rollout.token_ids) :]
            assert rollout.logprobs == pytest.approx(expected, abs=1e-4)
            assert [(span.version, span.start, span.end) for span in rollout.versions] == [
                (version, 0, len(rollout.token_ids))
            ]
            texts.append(tuple(rollout.token_ids))
    assert len(set(texts)) == 6


def test_same_seeds_same_responses(generator, tiny_model):
    first = [SampleRequest(prompt(text, tiny_model), (3, 4)) for text in ("apples and pears", "a quiet evening")]
    again = sample(generator, first[::-1])
    assert [rollout.token_ids for rollout in sample(generator, first)] == [rollout.token_ids for rollout in again]
    assert again[0].token_ids != again[1].token_ids


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing layer", "1 tensors are missing, the first is model.layers.1.self_attn.k_proj.weight"),
        ("flipped byte", "checksum of .* does not match"),
        ("unknown tensor", "not in the checkpoint"),
        ("wrong shape", "has shape"),
    ],
)
def test_a_bad_payload_is_refused_and_the_old_version_serves_on(generator, tiny_model, damage, message):
    learner = Learner(tiny_model)
    assert update(generator, learner.manifest(10)) < 1e-4
    request = SampleRequest(prompt("What was served before", tiny_model), (1,))
    before = sample(generator, [request])
    learner.change(99)
    with pytest.raises(PayloadError, match=message):
        update(generator, damaged(learner, damage))
    assert ray.get(generator.version.remote()) == 10
    assert sample(generator, [request]) == before
    assert update(generator, learner.manifest(11)) < 1e-4


def damaged(learner: Learner, damage: str) -> WeightManifest:
    tensors = dict(learner.tensors())
    if damage == "missing layer":
        del tensors["model.layers.1.self_attn.k_proj.weight"]
    if damage == "unknown tensor":
        tensors["model.layers.2.extra"] = torch.zeros(3)
    if damage == "wrong shape":
        tensors["model.norm.weight"] = torch.zeros(64)
    (bucket, data), *rest = pack(tensors.items(), 1 << 30)
    assert not rest
    if damage == "flipped byte":
        data[len(data) // 2] ^= 1
    return WeightManifest(11, (replace(bucket, handle=ray.put(data)),), ())


def test_an_engine_that_fails_its_proof_is_replaced_and_the_new_one_proves_the_version(launch, tiny_model):
    async def scenario() -> None:
        name = "generator-b"
        first = await launch(name)

        async def restart(member: str) -> Any:
            ray.kill(ray.get_actor(member))
            return await launch(member)

        fleet = GeneratorFleet({name: first}, SAMPLING, 16, restart)
        plane = ObjectStorePlane(fleet, verify=True, tolerance=1e-4, deadline=60)
        learner = Learner(tiny_model)
        good = learner.manifest(1)
        # A proof that the engine cannot give: what a stale packed copy behind right checksums looks like.
        wrong = replace(good, probes=(Probe(PROBE, tuple(value - 1 for value in good.probes[0].logprobs)),))
        with pytest.raises(EngineLostError, match="off the learner's"):
            await within(first.update.remote(wrong, True, 1e-4), 60, "update")
        assert await first.version.remote() is None
        with pytest.raises(RLHFError, match="cannot be admitted"):
            await fleet.admit(name, 1)
        report = await plane.publish(good, fleet.members())
        assert report.served == (name,)
        assert report.probe_error < 1e-4
        assert fleet.handle(name) != first
        await fleet.admit(name, 1)
        request = SampleRequest(prompt("after the replacement", tiny_model), (5, 6))
        assert len([rollout async for rollout in fleet.sample([request], 60)]) == 2

    asyncio.run(scenario())
