"""Turns on shared devices: who sleeps when, and what the loop's parts do in whose turn."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest

from rlhf.records import Comparison, Rollout, SampleRequest, SealedRound, StepReport, SyncReport, WeightManifest
from rlhf.rounds.in_turn import InTurnGenerators, InTurnJudge, InTurnLearner, InTurnPlane
from rlhf.rounds.turns import GENERATORS, LEARNER, Turns, turn_of

MANIFEST = WeightManifest(1, (), ())


class Recorder:
    """A party that writes down what it is told, and whether it is awake."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.awake = name, log, True

    async def sleep(self, before: str) -> None:
        await asyncio.sleep(0.01)
        self.awake = False
        self.log.append(f"{self.name} sleeps before {before}")

    async def wake(self) -> None:
        await asyncio.sleep(0.01)
        self.awake = True
        self.log.append(f"{self.name} wakes")


async def three() -> tuple[Turns, list[str], dict[str, Recorder]]:
    """Three parties that were started one after the other."""
    log: list[str] = []
    turns = Turns()
    parties = {name: Recorder(name, log) for name in (GENERATORS, "judge", LEARNER)}
    for name, party in parties.items():
        async with turns.take(name, wake=False):
            turns.join(name, party)
    return turns, log, parties


async def test_parties_are_started_with_all_others_asleep() -> None:
    _, log, parties = await three()
    assert log == ["generators sleeps before judge", "judge sleeps before learner"]
    assert [party.awake for party in parties.values()] == [False, False, True]


async def test_the_turn_passes_when_its_last_user_is_gone_and_not_before() -> None:
    turns, log, parties = await three()
    log.clear()

    async def work(name: str, seconds: float) -> None:
        async with turns.take(name):
            log.append(f"{name} begins")
            assert [each.name for each in parties.values() if each.awake] == [name]
            await asyncio.sleep(seconds)
            log.append(f"{name} ends")

    await asyncio.gather(work(GENERATORS, 0.1), work(GENERATORS, 0.2), work("judge", 0.01), work("judge", 0.01))
    assert log == [
        "learner sleeps before generators",
        "generators wakes",
        "generators begins",
        "generators begins",
        "generators ends",
        "generators ends",
        "generators sleeps before judge",
        "judge wakes",
        "judge begins",
        "judge begins",
        "judge ends",
        "judge ends",
    ]


async def test_a_party_that_is_asked_for_again_stays_awake() -> None:
    turns, log, _ = await three()
    log.clear()
    for _ in range(3):
        async with turns.take(LEARNER):
            pass
    # Started awake: told once, since nobody knows.
    assert log == ["learner wakes"]


async def test_without_waking_a_party_gets_the_devices_as_it_is() -> None:
    turns, log, parties = await three()
    log.clear()
    async with turns.take(GENERATORS, wake=False):
        assert not parties[GENERATORS].awake
    async with turns.take(GENERATORS):
        assert parties[GENERATORS].awake
    assert log == ["learner sleeps before generators", "generators wakes"]


async def test_work_that_fails_or_is_stopped_gives_its_turn_back() -> None:
    turns, _, _ = await three()
    with pytest.raises(RuntimeError, match="broken"):
        async with turns.take(GENERATORS):
            raise RuntimeError("broken")

    async def endless() -> None:
        async with turns.take(GENERATORS):
            await asyncio.sleep(60)

    task = asyncio.create_task(endless())
    waiting = asyncio.create_task(_take(turns, LEARNER))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    task.cancel()
    await asyncio.wait_for(waiting, 1)


async def test_who_stops_waiting_for_a_turn_leaves_no_trace() -> None:
    turns, log, _ = await three()
    async with turns.take(GENERATORS):
        waiting = asyncio.create_task(_take(turns, LEARNER))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert "generators sleeps before learner" not in log
    await asyncio.wait_for(_take(turns, "judge"), 1)


async def test_an_owner_that_does_not_sleep_keeps_the_next_one_out() -> None:
    turns, _, parties = await three()

    async def stuck(before: str) -> None:
        raise RuntimeError("still holds its memory")

    parties[LEARNER].sleep = stuck  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="still holds"):
        async with turns.take(GENERATORS):
            pytest.fail("the turn was taken")
    assert not parties[GENERATORS].awake


async def test_seconds_are_counted_until_they_are_asked_for() -> None:
    turns, _, _ = await three()
    turns.metrics()
    await _take(turns, GENERATORS)
    found = turns.metrics()
    assert found.keys() == {"timing_s/sleep", "timing_s/wake"}
    assert all(0.009 < seconds < 1 for seconds in found.values())
    assert set(turns.metrics().values()) == {0.0}


async def test_devices_of_their_own_need_no_turn() -> None:
    async with turn_of(None, LEARNER), turn_of(None, GENERATORS):
        pass


async def _take(turns: Turns, name: str) -> None:
    async with turns.take(name):
        pass


# --- the parts of the loop -------------------------------------------------------------------------------------------


class Parts:
    """Generators, judge, learner and plane that write down what they do; each asserts that it alone is awake."""

    def __init__(self, log: list[str], parties: Mapping[str, Recorder]) -> None:
        self.log, self.parties = log, parties

    def alone(self, name: str, what: str) -> None:
        assert [each.name for each in self.parties.values() if each.awake] == [name], what
        self.log.append(what)

    async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
        for index in range(2):
            await asyncio.sleep(0.01)
            self.alone(GENERATORS, f"sample {index}")
            yield Rollout("u", index, (1,), (-1.0,), "t", "stop", ())

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Any]:
        self.alone("judge", "compare")
        return []

    async def train(self, sealed: SealedRound, others: Mapping[str, SealedRound]) -> AsyncIterator[StepReport]:
        self.alone(LEARNER, "step 1")
        yield StepReport(1, 1, {})
        self.alone(LEARNER, "step 2")
        yield StepReport(1, 2, {})

    async def manifest(self, version: int) -> WeightManifest:
        self.alone(LEARNER, "manifest")
        return MANIFEST

    async def publish(self, manifest: WeightManifest, targets: Sequence[str]) -> SyncReport:
        # The generators wake for it themselves.
        assert not any(party.awake for party in self.parties.values())
        self.log.append("publish")
        await self.parties[GENERATORS].wake()
        return SyncReport(1, 0.0, 0, (), {}, 0.0)

    async def save(self, path: Any) -> None:
        self.log.append("save")


async def test_a_round_passes_from_generators_to_judge_to_learner_and_back() -> None:
    turns, log, parties = await three()
    parts: Any = Parts(log, parties)
    generators, judge = InTurnGenerators(parts, turns), InTurnJudge(parts, turns, "judge")
    learner, plane = InTurnLearner(parts, turns), InTurnPlane(parts, turns)
    async with asyncio.TaskGroup() as tasks:
        # As the source does: judging is asked for with the first responses, while others are sampled.
        async for _ in generators.sample([], 10):
            tasks.create_task(judge.compare([]))
    log.append("sealed")
    async for _ in learner.train(SealedRound(1, (), ""), {}):
        pass
    await plane.publish(await learner.manifest(1), [])
    saving = asyncio.create_task(learner.save(None))  # type: ignore[arg-type]
    async for _ in generators.sample([], 10):
        await saving
    assert log[2:] == [
        "learner sleeps before generators",
        "generators wakes",
        "sample 0",
        "sample 1",
        "generators sleeps before judge",
        "judge wakes",
        "compare",
        "compare",
        "sealed",
        "judge sleeps before learner",
        "learner wakes",
        "step 1",
        "step 2",
        "manifest",
        "learner sleeps before generators",
        "publish",
        "generators wakes",
        "save",  # from wherever the learner's state lies, beside the next round
        "generators wakes",  # asked again, which costs nothing: an update may have failed
        "sample 0",
        "sample 1",
    ]


async def test_a_training_that_fails_frees_the_devices() -> None:
    turns, log, parties = await three()
    parts: Any = Parts(log, parties)

    async def broken(sealed: SealedRound, others: Mapping[str, SealedRound]) -> AsyncIterator[StepReport]:
        yield StepReport(1, 1, {})
        raise RuntimeError("rank 0 died")

    parts.train = broken
    with pytest.raises(RuntimeError, match="rank 0 died"):
        async for _ in InTurnLearner(parts, turns).train(SealedRound(1, (), ""), {}):
            pass
    await asyncio.wait_for(_take(turns, GENERATORS), 1)
