"""Real engines and judges that are killed in the middle of their work, and updates under running sequences."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from actors.calls import within
from actors.cluster import ClusterInfo
from actors.engine.llm import EngineSpec, engine_environment
from actors.fleet import GeneratorFleet
from actors.generator import GeneratorActor
from actors.judge_launch import JudgeLauncher
from actors.placement import stop
from actors.relay import Relays
from actors.weights.payload import pack
from actors.weights.plane import ObjectStorePlane
from rlhf.config.judge import PythonJudge
from rlhf.config.system import Cluster
from rlhf.errors import EngineLostError
from rlhf.health import RestartBudget, State
from rlhf.modelfiles import tensor_shapes
from rlhf.records import Comparison, Message, Probe, Prompt, Rollout, SampleRequest, WeightManifest

LENGTH = 400
"""Tokens of every response: long enough to be in the middle of it for a while."""
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": LENGTH, "ignore_eos": True}
PROBE = (1, 2683, 253, 1528, 338, 253, 10254, 30, 2)


class WatchedGenerator(GeneratorActor):
    """Says which process it is, and can be told to keep the result of a proof to itself for a while."""

    _gate: asyncio.Event | None = None

    def pid(self) -> int:
        return os.getpid()

    def tokens(self) -> int:
        return self._engine.tokens()

    async def hold(self) -> None:
        self._gate = asyncio.Event()

    async def release(self) -> None:
        assert self._gate is not None
        self._gate.set()

    async def _probe(self, probes: tuple[Probe, ...], version: int) -> Any:
        errors = await super()._probe(probes, version)
        if self._gate:
            await self._gate.wait()
        return errors


@pytest.fixture(scope="module")
def launch(cluster: None, tiny_model: Path) -> Callable[[str], Awaitable[Any]]:
    shapes = tensor_shapes(tiny_model, "policy.path")
    arguments = {"kv_cache_memory_bytes": 64 << 20}
    spec = EngineSpec(str(tiny_model), "float32", 512, 1, "cpu", 0, False, arguments, "object_store")
    actor = ray.remote(max_concurrency=1000)(WatchedGenerator)

    async def start(name: str) -> Any:
        environment = {"env_vars": engine_environment("cpu", 1)}
        handle = actor.options(name=name, num_cpus=1, runtime_env=environment).remote(name, spec, shapes)
        await within(handle.start.remote(), 120, name)
        return handle

    return start


class Weights:
    """The policy in plain transformers at several versions."""

    def __init__(self, path: Path):
        self.models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2)]
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.models[1].parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))

    def manifest(self, version: int) -> WeightManifest:
        model = self.models[version]
        tensors = ((name, tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight")
        buckets = [replace(bucket, handle=ray.put(data)) for bucket, data in pack(tensors, 1 << 20)]
        with torch.no_grad():
            table = torch.log_softmax(model(torch.tensor([PROBE])).logits[0], dim=-1)
        expected = tuple(table[position, token].item() for position, token in enumerate(PROBE[1:]))
        return WeightManifest(version, tuple(buckets), (Probe(PROBE, expected),))

    def logprobs(self, prompt: tuple[int, ...], rollout: Rollout) -> list[float]:
        """Each span under its own weights: as in the engine, what was read before stays as the old weights saw it."""
        cache, tokens = DynamicCache(), (*prompt, *rollout.token_ids)
        read, found = 0, []
        for span in rollout.versions:
            until = len(prompt) + span.end - 1
            with torch.no_grad():
                output = self.models[span.version](torch.tensor([tokens[read:until]]), past_key_values=cache)
            table = torch.log_softmax(output.logits[0, -(span.end - span.start) :], dim=-1)
            found += [table[n, token].item() for n, token in enumerate(rollout.token_ids[span.start : span.end])]
            read = until
        return found


def requests(count: int, seed: int = 0) -> list[SampleRequest]:
    ids = [(1, 2683, 253, 1000 + seed + number) for number in range(count)]
    return [SampleRequest(Prompt(f"u{n}", (), "", prompt), (2 * n + seed, 2 * n + 1)) for n, prompt in enumerate(ids)]


Responses = dict[tuple[str, int], Rollout]


async def collect(stream: AsyncIterator[Rollout], seen: Responses | None = None) -> Responses:
    found: Responses = {} if seen is None else seen
    async for rollout in stream:
        assert (rollout.uid, rollout.k) not in found
        found[rollout.uid, rollout.k] = rollout
    return found


async def until(ready: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not await ready():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.01)


async def further(handle: Any, tokens: int) -> None:
    """Wait until a generator has sampled so many tokens more."""
    before = await handle.tokens.remote()

    async def there() -> bool:
        return await handle.tokens.remote() >= before + tokens

    await until(there)


def same(found: Responses, expected: Responses) -> None:
    assert found.keys() == expected.keys()
    for key, rollout in expected.items():
        assert found[key].token_ids == rollout.token_ids
        assert found[key].logprobs == pytest.approx(rollout.logprobs, abs=1e-4)


@pytest.mark.slow
async def test_generators_killed_in_mid_sampling_cost_nothing_and_come_back(launch, tiny_model):
    """First an actor, then the engine's own process below the other one, while the first is being started."""
    names = ("fleet-0", "fleet-1")
    handles = dict(zip(names, await asyncio.gather(*(launch(name) for name in names)), strict=True))
    alerts: list[str] = []

    async def restart(name: str) -> Any:
        await stop(name, orderly=False)
        return await launch(name)

    fleet = GeneratorFleet(handles, SAMPLING, 8, restart, RestartBudget(3, 3600.0), 60.0, alerts.append)
    plane = ObjectStorePlane(fleet, verify=True, tolerance=1e-4, deadline=60)
    report = await plane.publish(Weights(tiny_model).manifest(0), fleet.members())
    for name in report.served:
        await fleet.admit(name, 0)
    given = requests(16)
    undisturbed = await collect(fleet.sample(given, 120))
    assert len(undisturbed) == 32

    pids = {name: await fleet.handle(name).pid.remote() for name in names}
    engines = psutil.Process(pids["fleet-1"]).children(recursive=True)
    assert engines
    seen: Responses = {}
    task = asyncio.create_task(collect(fleet.sample(given, 200), seen))
    await further(fleet.handle("fleet-0"), 200)
    os.kill(pids["fleet-0"], signal.SIGKILL)
    await further(fleet.handle("fleet-1"), 200)
    for process in engines:
        process.kill()
    # Nobody is left: the round ends with those that come back.
    assert len(seen) < 32
    same(await task, undisturbed)
    await fleet.recovered()
    for name in names:
        assert fleet.state(name) == State.HEALTHY
        assert await fleet.handle(name).version.remote() == 0
        assert await fleet.handle(name).pid.remote() != pids[name]
    assert [alert.split(":")[0] for alert in alerts] == ["fleet-0 is started again", "fleet-1 is started again"]
    assert "engine process died" in alerts[1]
    assert fleet.metrics() == {"fleet/members": 2.0, "fleet/restarts": 2.0}
    # Both that serve now came back from the dead.
    same(await collect(fleet.sample(given, 120)), undisturbed)


def stream(handle: Any, given: Sequence[SampleRequest]) -> AsyncIterator[Rollout]:
    async def rollouts() -> AsyncIterator[Rollout]:
        async for reference in handle.sample.options(num_returns="streaming").remote(list(given), SAMPLING):
            for rollout in (await reference).rollouts():
                yield rollout

    return rollouts()


async def test_sequences_run_through_an_update_and_are_given_out_once_it_is_proved(launch, tiny_model):
    generator = await launch("through-0")
    weights = Weights(tiny_model)
    await within(generator.update.remote(weights.manifest(0), True, 1e-4), 60, "update")
    given = requests(2, seed=50)
    seen: Responses = {}

    # The second update fails its proof: nothing that it wrote may ever be seen.
    wrong = weights.manifest(0)
    wrong = replace(
        wrong, version=2, probes=tuple(replace(p, logprobs=tuple(v - 1 for v in p.logprobs)) for p in wrong.probes)
    )
    for version, manifest in ((1, weights.manifest(1)), (2, wrong)):
        seen.clear()
        await generator.hold.remote()
        start = await generator.tokens.remote()
        sampling = asyncio.create_task(collect(stream(generator, given), seen))
        await further(generator, 100)
        updating = asyncio.ensure_future(generator.update.remote(manifest, True, 1e-4))

        async def all_sampled(start: int = start) -> bool:
            return await generator.tokens.remote() >= start + 4 * LENGTH

        await until(all_sampled)
        await asyncio.sleep(0.3)
        assert (seen, updating.done(), await generator.version.remote()) == ({}, False, version - 1)
        await generator.release.remote()
        if version == 2:
            with pytest.raises(EngineLostError, match="off the learner's"):
                await within(updating, 60, "update")
            with pytest.raises(ray.exceptions.RayTaskError, match="off the learner's"):
                await sampling
            assert seen == {}
            return
        await updating
        await sampling
        assert len(seen) == 4
        for rollout in seen.values():
            first, second = rollout.versions
            assert (first.version, first.start, second.version, second.end) == (0, 0, 1, LENGTH)
            assert 0 < first.end == second.start < LENGTH
            assert rollout.oldest_version == 0
            prompt = given[int(rollout.uid[1:])].prompt.token_ids
            assert rollout.logprobs == pytest.approx(weights.logprobs(prompt, rollout), abs=1e-4)


@pytest.mark.slow
async def test_a_relay_killed_in_mid_sampling_and_in_mid_update_costs_no_generator(launch, tiny_model):
    alerts: list[str] = []
    relays = Relays(alerts.append)
    actor = await launch("relayed-0")
    handle = await relays.handle("relayed-0", actor, ray.get_runtime_context().get_node_id())

    async def never(name: str) -> Any:
        raise AssertionError(f"{name} was started again")

    fleet = GeneratorFleet({"relayed-0": handle}, SAMPLING, 8, never, RestartBudget(3, 3600.0), 60.0, alerts.append)
    plane = ObjectStorePlane(fleet, verify=True, tolerance=1e-4, deadline=60)
    weights = Weights(tiny_model)
    await plane.publish(weights.manifest(0), fleet.members())
    await fleet.admit("relayed-0", 0)
    given = requests(3)
    undisturbed = await collect(fleet.sample(given, 120))
    assert len(undisturbed) == 6

    async def kill_relay() -> None:
        [line] = relays._lines
        os.kill(await line._relay.__ray_call__.remote(lambda self: os.getpid()), signal.SIGKILL)

    task = asyncio.create_task(collect(fleet.sample(given, 120)))
    await further(actor, 200)
    await kill_relay()
    same(await task, undisturbed)

    async def at_work() -> bool:
        return await actor.__ray_call__.remote(lambda self: self._updates) > 0

    await actor.hold.remote()
    publishing = asyncio.create_task(plane.publish(weights.manifest(1), fleet.members()))
    await until(at_work)
    await kill_relay()
    await actor.release.remote()
    report = await publishing
    assert (report.served, report.failed) == (("relayed-0",), {})
    await fleet.admit("relayed-0", 1)
    assert await actor.version.remote() == 1
    fresh = await collect(fleet.sample(given, 120))
    rollout = fresh["u0", 0]
    assert [span.version for span in rollout.versions] == [1]
    assert rollout.logprobs == pytest.approx(weights.logprobs(given[0].prompt.token_ids, rollout), abs=1e-4)
    assert [alert.split(":")[0] for alert in alerts] == ["relay-0 is started again"] * 2
    assert fleet.metrics() == {"fleet/members": 1.0, "fleet/restarts": 0.0}


def slow_judge(messages: list[Message], a: str, b: str, reference: str | None, folder: str) -> float:
    """Likes the larger text; leaves a note of its process."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(0.02)
    return 0.9 if a > b else 0.1


async def test_a_judge_killed_in_mid_batch_costs_nothing_and_comes_back(cluster, tmp_path):
    config = PythonJudge(
        type="python",
        function="tests.integration.test_fleet:slow_judge",
        kind="compare",
        options={"folder": str(tmp_path)},
        replicas=2,
        batch_size=16,
    )
    alerts: list[str] = []
    info = ClusterInfo("tests", "cpu", private=True)
    launcher = JudgeLauncher(info, Cluster(device="cpu"), 0, None, alerts.append, RestartBudget(1, 3600.0))
    judge = await launcher.start(config, "killed-judge", lambda: None)
    given = [Comparison(f"u{n}", (), f"{n % 7} a", f"{n % 5} b") for n in range(160)]
    task = asyncio.create_task(judge.compare(given))

    async def judging() -> bool:
        return len(list(tmp_path.iterdir())) == 2

    await until(judging)
    os.kill(int(next(tmp_path.iterdir()).name), signal.SIGKILL)
    verdicts = await task
    assert [verdict.comparison for verdict in verdicts] == given
    assert [verdict.p > 0.5 for verdict in verdicts] == [item.a > item.b for item in given]
    again = asyncio.create_task(judge.compare(given))

    async def back() -> bool:
        if again.done():
            await judge.compare(given[:32])
        return len(list(tmp_path.iterdir())) == 3

    await until(back)
    assert [verdict.p for verdict in await again] == [verdict.p for verdict in verdicts]
    [alert] = alerts
    assert alert.startswith("killed-judge-")
    assert "the actor died" in alert
