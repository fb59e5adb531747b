"""`sync.lora: adapters` on a real vLLM engine: base weights stay, each version is an adapter beside them."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import ray
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from actors.calls import within
from actors.engine.adapters import SLOTS, AdapterSpec
from actors.engine.llm import EngineSpec, engine_environment
from actors.fleet import GeneratorFleet
from actors.generator import GeneratorActor
from actors.weights.payload import ALIGNMENT, pack
from actors.weights.plane import ObjectStorePlane
from rlhf.config.adapters import SERVED_RANKS
from rlhf.config.data import Policy
from rlhf.config.lora import Lora
from rlhf.errors import EngineLostError, InputError, PayloadError
from rlhf.learning.lora import adapter_shapes
from rlhf.records import Probe, SampleRequest, VersionSpan, WeightManifest
from tests.integration.test_generator import PROBE, SAMPLING, prompt, sample, update

pytestmark = pytest.mark.slow

# A rank that vLLM has no room of for its own, and a scale that is no power of two.
LORA = Lora(rank=3, alpha=7, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))


class Learner:
    """Adapters in plain peft: the independent reference for what the engine must compute."""

    def __init__(self, path: Path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        options = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(LORA.target_modules))
        self.model: Any = get_peft_model(model, options).eval()

    def change(self, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)

    def logprobs(self, ids: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            table = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], dim=-1)
        return [table[position, token].item() for position, token in enumerate(ids[1:])]

    def tensors(self) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.model)

    def manifest(self, version: int) -> WeightManifest:
        buckets = [replace(bucket, handle=ray.put(data)) for bucket, data in pack(self.tensors().items(), 1 << 14)]
        return WeightManifest(version, tuple(buckets), (Probe(PROBE, tuple(self.logprobs(PROBE))),))


class Inspected(GeneratorActor):
    """The actor, with a look at which adapters its engine holds."""

    async def held(self) -> list[int]:
        adapters = self._engine._adapters
        assert adapters
        return await adapters.held()

    async def connect(self, expected: dict[str, tuple[int, ...]]) -> None:
        context = ray.get_runtime_context()
        await self._engine.connect(context.gcs_address, context.namespace, self._name, expected)


@pytest.fixture(scope="module")
def launch(cluster: None, tiny_model: Path) -> Any:
    """Starts generator actors as the launcher does."""
    actor = ray.remote(max_concurrency=1000)(Inspected)

    async def start(name: str, options: Lora = LORA) -> Any:
        shapes = adapter_shapes(Policy(path=str(tiny_model)), options)
        spec = EngineSpec(
            model=str(tiny_model),
            dtype="float32",
            max_length=1024,
            tensor_parallel=1,
            device="cpu",
            seed=0,
            trust_remote_code=False,
            arguments={"kv_cache_memory_bytes": 64 << 20},
            transport="object_store",
            adapters=AdapterSpec.of(options.rank, options.alpha, shapes),
        )
        environment = {"env_vars": engine_environment("cpu", 1)}
        handle = actor.options(name=name, num_cpus=1, runtime_env=environment).remote(name, spec, shapes)
        await within(handle.start.remote(), 120, name)
        return handle

    return start


@pytest.fixture(scope="module")
def generator(launch: Any) -> Any:
    return asyncio.run(launch("adapters-a"))


def assert_under(learner: Learner, request: SampleRequest, rollouts: list[Any], version: int) -> None:
    for rollout in rollouts:
        expected = learner.logprobs((*request.prompt.token_ids, *rollout.token_ids))[-len(rollout.token_ids) :]
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)
        assert rollout.versions == (VersionSpan(version, 0, len(rollout.token_ids)),)


def test_the_ranks_are_vllms() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == SERVED_RANKS


def test_nothing_is_served_before_a_version_is_proved(generator, tiny_model):
    with pytest.raises(Exception, match="serves no proved version"):
        sample(generator, [SampleRequest(prompt("hello there", tiny_model), (1, 2))])


def test_versions_are_proved_served_and_never_mixed_up(generator, tiny_model):
    learner = Learner(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    weights = sum(parameter.numel() for parameter in base.parameters()) * 4
    # Longer than a block of the cache (128 tokens on a CPU): shorter prefixes are not cached.
    request = SampleRequest(prompt("The long road begins with a small town by the sea. " * 15, tiny_model), (7, 8))
    assert 128 < len(request.prompt.token_ids) < 240
    texts = []
    # The last payload once more under its own number, as after a resume: it is an adapter of its own too.
    for step, version in enumerate((0, 1, 2, 2)):
        if version and step < 3:
            learner.change(version)
        manifest = learner.manifest(version)
        sizes = [tensor.numel() * 4 for tensor in learner.tensors().values()]
        assert sum(sizes) <= manifest.nbytes < sum(sizes) + ALIGNMENT * len(sizes) < weights / 100
        assert update(generator, manifest) < 1e-4
        assert ray.get(generator.version.remote()) == version
        assert len(ray.get(generator.held.remote())) == 1
        # The same prompt again: a prefix cached under the old adapter would show in the log-probs.
        rollouts = sample(generator, [request])
        assert_under(learner, request, rollouts, version)
        texts += [tuple(rollout.token_ids) for rollout in rollouts]
    assert len(set(texts)) == 6


def test_a_request_ends_under_the_version_it_began_with(generator, tiny_model):
    before = Learner(tiny_model)
    before.change(20)
    update(generator, before.manifest(20))
    after = Learner(tiny_model)
    after.change(21)
    long, short = (
        SampleRequest(prompt("Once upon", tiny_model), (1, 2)),
        SampleRequest(prompt("A cat", tiny_model), (3,)),
    )
    limits = SAMPLING | {"max_tokens": 600, "ignore_eos": True}
    stream = generator.sample.options(num_returns="streaming").remote([long], limits)
    # Calls start in their order: once the second has ended, the first has its requests in the engine.
    first = sample(generator, [short])
    assert update(generator, after.manifest(21)) < 1e-4
    assert len(ray.get(generator.held.remote())) == SLOTS
    rollouts = [rollout for reference in stream for rollout in ray.get(reference, timeout=60).rollouts()]
    assert {len(rollout.token_ids) for rollout in rollouts} == {600}
    assert_under(before, long, rollouts, 20)
    assert_under(before, short, first, 20)
    assert_under(after, short, sample(generator, [short]), 21)
    # Nobody uses version 20 any more: it makes room for the next one.
    assert update(generator, before.manifest(22)) < 1e-4
    assert len(ray.get(generator.held.remote())) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing tensor", "1 tensors are missing, the first is base_model.model.model.layers.1.self_attn.q_proj"),
        ("flipped byte", "checksum of .* does not match"),
        ("unknown tensor", "not in the checkpoint"),
        ("wrong shape", "has shape"),
        ("base weights", "are missing"),
    ],
)
def test_a_bad_payload_is_refused_and_the_old_version_serves_on(generator, tiny_model, damage, message):
    learner = Learner(tiny_model)
    learner.change(30)
    assert update(generator, learner.manifest(30)) < 1e-4
    request = SampleRequest(prompt("What was served before", tiny_model), (1,))
    served = sample(generator, [request])
    learner.change(99)
    with pytest.raises(PayloadError, match=message):
        update(generator, damaged(learner, damage))
    assert ray.get(generator.version.remote()) == 30
    assert sample(generator, [request]) == served
    assert len(ray.get(generator.held.remote())) == 1
    assert update(generator, learner.manifest(31)) < 1e-4


def damaged(learner: Learner, damage: str) -> WeightManifest:
    tensors = dict(learner.tensors())
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    if damage == "missing tensor":
        del tensors[name]
    if damage == "unknown tensor":
        tensors[name.replace("layers.1", "layers.2")] = tensors[name]
    if damage == "wrong shape":
        tensors[name] = tensors[name].t()
    if damage == "base weights":
        tensors = {"model.embed_tokens.weight": torch.zeros(4, 4)}
    (bucket, data), *rest = pack(tensors.items(), 1 << 30)
    assert not rest
    if damage == "flipped byte":
        data[len(data) // 2] ^= 1
    return WeightManifest(31, (replace(bucket, handle=ray.put(data)),), ())


@pytest.mark.slow
def test_an_engine_that_fails_its_proof_is_replaced_and_the_new_one_has_base_and_adapter(launch, tiny_model):
    async def scenario() -> None:
        name = "adapters-b"
        first = await launch(name)

        async def restart(member: str) -> Any:
            ray.kill(ray.get_actor(member))
            return await launch(member)

        fleet = GeneratorFleet({name: first}, SAMPLING, 16, restart)
        plane = ObjectStorePlane(fleet, verify=True, tolerance=1e-4, deadline=60)
        learner = Learner(tiny_model)
        learner.change(40)
        good = learner.manifest(1)
        # Another adapter's payload whose checksums are right.
        learner.change(41)
        wrong = replace(learner.manifest(1), probes=good.probes)
        with pytest.raises(EngineLostError, match="off the learner's"):
            await within(first.update.remote(wrong, True, 1e-4), 60, "update")
        assert await first.version.remote() is None
        report = await plane.publish(good, fleet.members())
        assert report.served == (name,)
        assert report.probe_error < 1e-4
        assert report.nbytes == good.nbytes
        assert fleet.handle(name) != first
        await fleet.admit(name, 1)

    asyncio.run(scenario())


def test_layers_that_vllm_serves_no_adapter_on_are_refused_at_the_start(generator):
    strange = {"base_model.model.model.layers.0.mlp.gate.lora_A.weight": (3, 128)}
    with pytest.raises(InputError, match=r"^learner\.lora\.target_modules: vLLM serves no adapter on gate of this"):
        asyncio.run(within(generator.connect.remote(strange), 60, "connect"))
