"""An engine's sleep and how a generator wakes for an update: the calls that vLLM gets, and their order."""

import inspect
from typing import Any

import pytest

from actors.engine.llm import EngineSpec, engine_arguments
from actors.engine.sleeping import DROP_WEIGHTS, KEEP_WEIGHTS, KV_CACHE, PARTS, WEIGHTS, Sleeper
from actors.generator import GeneratorActor
from actors.judge import ActorEngines, JudgeActor
from rlhf.config.judge import PairModelJudge, SentimentJudge
from rlhf.errors import EngineLostError, PayloadError
from rlhf.records import Bucket, Comparison, Message, Probe, Prompt, SampleRequest, TensorSpec, WeightManifest


class Recorded:
    """vLLM's AsyncLLM as far as sleep goes."""

    def __init__(self, log: list[Any] | None = None) -> None:
        self.log: list[Any] = [] if log is None else log

    async def sleep(self, level: int = 1) -> None:
        self.log.append(("sleep", level))

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        self.log.append(("wake", tags))
        return True


async def test_the_weights_wake_before_the_cache_and_nothing_is_asked_twice() -> None:
    llm = Recorded()
    sleeper = Sleeper(llm, gpu=True)
    await sleeper.wake()
    await sleeper.sleep(DROP_WEIGHTS)
    await sleeper.sleep(KEEP_WEIGHTS)
    assert not sleeper.awake
    await sleeper.wake((WEIGHTS,))
    assert not sleeper.awake
    await sleeper.wake()
    assert sleeper.awake
    assert llm.log == [("sleep", 2), ("wake", [WEIGHTS]), ("wake", [KV_CACHE])]


async def test_what_woke_in_part_goes_to_sleep_again_and_wakes_whole() -> None:
    llm = Recorded()
    sleeper = Sleeper(llm, gpu=True)
    await sleeper.sleep(KEEP_WEIGHTS)
    await sleeper.wake((WEIGHTS,))
    await sleeper.sleep(KEEP_WEIGHTS)
    await sleeper.wake()
    assert llm.log == [("sleep", 1), ("wake", [WEIGHTS]), ("sleep", 1), ("wake", [WEIGHTS, KV_CACHE])]


async def test_on_a_cpu_the_state_is_kept_and_vllm_is_left_alone() -> None:
    llm = Recorded()
    sleeper = Sleeper(llm, gpu=False)
    await sleeper.sleep(KEEP_WEIGHTS)
    assert not sleeper.awake
    await sleeper.wake()
    assert sleeper.awake
    assert llm.log == []


async def test_a_sleep_that_failed_is_not_taken_for_one() -> None:
    class Stuck(Recorded):
        async def sleep(self, level: int = 1) -> None:
            raise RuntimeError("memory usage increased")

    sleeper = Sleeper(Stuck(), gpu=True)
    with pytest.raises(RuntimeError):
        await sleeper.sleep(KEEP_WEIGHTS)
    assert sleeper.awake


def test_vllm_has_these_calls_and_parts() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.abstract import SLEEP_TAGS

    assert set(PARTS) == SLEEP_TAGS
    # What runs is stopped: nobody waits for it, or the turn would not have passed on.
    assert inspect.signature(AsyncLLM.sleep).parameters["mode"].default == "abort"
    assert list(inspect.signature(AsyncLLM.wake_up).parameters) == ["self", "tags"]


@pytest.mark.parametrize(
    ("device", "sleeps", "given", "expected"),
    [
        ("cuda", True, {}, {"enable_sleep_mode": True, "gpu_memory_utilization": 0.85}),
        ("cuda", True, {"gpu_memory_utilization": 0.4}, {"enable_sleep_mode": True, "gpu_memory_utilization": 0.4}),
        ("cuda", False, {}, {}),
        ("cpu", True, {}, {}),
    ],
)
def test_an_engine_that_shares_a_gpu_is_started_so(
    device: str, sleeps: bool, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    spec = EngineSpec("m", "bfloat16", 64, 1, device, 0, False, given, "object_store", sleeps=sleeps)
    keys = ("enable_sleep_mode", "gpu_memory_utilization")
    assert {key: value for key, value in engine_arguments(spec).items() if key in keys} == expected


# --- a generator -----------------------------------------------------------------------------------------------------


class RecordedEngine:
    """An engine as a generator sees it, with the sleep of a real one."""

    def __init__(self, spec: EngineSpec) -> None:
        self.log: list[Any] = []
        self.broken: set[str] = set()
        self._sleeper = Sleeper(Recorded(self.log), gpu=spec.device == "cuda")
        self.sleep, self.wake = self._sleeper.sleep, self._sleeper.wake

    @property
    def awake(self) -> bool:
        return self._sleeper.awake

    async def _note(self, what: str) -> None:
        self.log.append(what)
        if what in self.broken:
            raise RuntimeError(f"{what} failed")

    async def stage(self, buckets: Any, verify: bool) -> None:
        await self._note("stage")

    async def load(self, version: int) -> None:
        await self._note("load")

    async def resume(self) -> None:
        await self._note("resume")

    async def serve(self) -> None:
        await self._note("serve")

    async def sequence_logprobs(self, token_ids: Any, name: str) -> tuple[float, ...]:
        await self._note("probe")
        return (-1.0,)


def recorded(generator: GeneratorActor) -> RecordedEngine:
    engine: Any = generator._engine
    assert isinstance(engine, RecordedEngine)
    return engine


MANIFEST = WeightManifest(1, (Bucket((TensorSpec("a", "float32", (1,), 0, 4, ""),), 4),), (Probe((1, 2), (-1.0,)),))
REQUEST = SampleRequest(Prompt("u", (Message(role="user", content="p"),), "p", (1,)), (7,))


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> GeneratorActor:
    monkeypatch.setattr("actors.generator.Engine", RecordedEngine)
    return GeneratorActor("g", EngineSpec("m", "bfloat16", 64, 1, "cuda", 0, False, {}, "object_store", None), {})


async def test_an_update_of_a_sleeping_generator_wakes_it_in_two_steps(generator: GeneratorActor) -> None:
    await generator.sleep(DROP_WEIGHTS)
    await generator.update(MANIFEST, True, 0.1)
    assert recorded(generator).log == [
        ("sleep", 2),
        "stage",  # into CPU memory
        ("wake", [WEIGHTS]),
        "load",
        ("wake", [KV_CACHE]),
        "resume",
        "probe",
        "serve",
    ]
    assert generator.version() == 1


async def test_a_generator_without_its_weights_serves_no_version(generator: GeneratorActor) -> None:
    await generator.update(MANIFEST, True, 0.1)
    await generator.sleep(KEEP_WEIGHTS)
    assert generator.version() == 1
    await generator.wake()
    await generator.sleep(DROP_WEIGHTS)
    assert generator.version() is None
    recorded(generator).broken = {"stage"}
    with pytest.raises(PayloadError):
        await generator.update(MANIFEST, True, 0.1)
    await generator.wake()
    with pytest.raises(EngineLostError, match="serves no proved version"):
        await anext(generator.sample([REQUEST], {}))


async def test_a_sleeping_generator_samples_nothing(generator: GeneratorActor) -> None:
    await generator.update(MANIFEST, True, 0.1)
    await generator.sleep(KEEP_WEIGHTS)
    with pytest.raises(RuntimeError, match="g is asleep"):
        await anext(generator.sample([REQUEST], {}))


async def test_a_generator_that_cannot_wake_is_lost(generator: GeneratorActor) -> None:
    async def fail(parts: Any = PARTS) -> None:
        raise RuntimeError("CUDA out of memory")

    generator._engine.wake = fail  # type: ignore[method-assign]
    with pytest.raises(EngineLostError, match="CUDA out of memory"):
        await generator.update(MANIFEST, True, 0.1)
    assert generator.version() is None


# --- a judge ---------------------------------------------------------------------------------------------------------


async def test_a_judge_sleeps_once_its_last_comparison_has_ended() -> None:
    import asyncio

    judge = JudgeActor(SentimentJudge(), "cpu", 0, sleeps=True)
    log: list[Any] = []
    judge._engines.held.append(Sleeper(Recorded(log), gpu=True))
    go_on = asyncio.Event()

    class Slow:
        async def compare(self, comparisons: list[Comparison]) -> list[Any]:
            await go_on.wait()
            log.append("judged")
            return []

    judge._judge = Slow()  # type: ignore[assignment]
    running = asyncio.create_task(judge.compare([]))
    await asyncio.sleep(0)
    sleeping = asyncio.create_task(judge.sleep())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="the judge is asleep"):
        await judge.compare([])
    assert log == []
    go_on.set()
    await asyncio.gather(running, sleeping)
    await judge.wake()
    await judge.compare([])
    assert log == ["judged", ("sleep", 1), ("wake", [WEIGHTS, KV_CACHE]), "judged"]


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_judges_engine_is_started_as_one_that_sleeps(sleeps: bool) -> None:
    config = PairModelJudge(type="pair_model", path="m")
    assert ActorEngines("cuda", 0, sleeps)._spec(config, 64).sleeps == sleeps
