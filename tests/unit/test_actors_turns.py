"""The parties over in-process handles: who is told what, and what becomes of who does not go to sleep."""

import asyncio
from typing import Any

import pytest

from actors.fleet import GeneratorFleet
from actors.judge import JudgePool
from actors.placement import share
from actors.preflight import Role, shortages
from actors.turns import FleetParty, PoolParty, in_turn
from rlhf.errors import EngineLostError, RLHFError
from rlhf.rounds.turns import GENERATORS, LEARNER, Turns


class Method:
    def __init__(self, handle: "Handle", name: str) -> None:
        self.handle, self.name = handle, name

    def remote(self, *arguments: Any) -> Any:
        return asyncio.ensure_future(self._call(arguments))

    async def _call(self, arguments: tuple[Any, ...]) -> None:
        self.handle.calls.append((self.name, *arguments))
        if self.name in self.handle.stuck:
            await asyncio.sleep(60)
        if self.name in self.handle.broken:
            raise EngineLostError("vLLM's engine process died")


class Handle:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.broken: set[str] = set()
        self.stuck: set[str] = set()

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)


class Fleet:
    """Two generators; a restart puts an untouched one in a lost one's place."""

    def __init__(self, keep_weights: bool = False) -> None:
        self.handles = {"g0": Handle(), "g1": Handle()}
        self.stopped: list[str] = []

        async def restart(name: str) -> Handle:
            self.handles[name] = Handle()
            return self.handles[name]

        async def stop(name: str) -> None:
            self.stopped.append(name)

        self.fleet = GeneratorFleet(dict(self.handles), {}, 4, restart)
        self.party = FleetParty(self.fleet, stop, 0.2, keep_weights)


@pytest.mark.parametrize(
    ("before", "keep_weights", "level"), [(LEARNER, False, 2), (LEARNER, True, 1), ("judge", False, 1)]
)
async def test_weights_are_dropped_only_when_a_whole_update_follows(
    before: str, keep_weights: bool, level: int
) -> None:
    found = Fleet(keep_weights)
    await found.party.sleep(before)
    await found.party.wake()
    assert all(handle.calls == [("sleep", level), ("wake",)] for handle in found.handles.values())


@pytest.mark.parametrize("how", ["broken", "stuck"])
@pytest.mark.parametrize("call", ["sleep", "wake"])
async def test_a_generator_that_fails_at_it_is_stopped_at_once_and_started_again(call: str, how: str) -> None:
    found = Fleet()
    first = found.handles["g1"]
    getattr(first, how).add(call)
    await (found.party.sleep(LEARNER) if call == "sleep" else found.party.wake())
    # Before the call is over: the memory has to be free.
    assert found.stopped == ["g1"]
    await found.fleet.recovered()
    assert found.handles["g1"] is not first
    assert len(found.handles["g0"].calls) == 1


async def test_a_judge_that_does_not_sleep_is_stopped_and_its_pool_told() -> None:
    handles = [Handle(), Handle()]
    handles[1].broken.add("sleep")
    stopped: list[str] = []
    started: list[int] = []

    async def stop(name: str) -> None:
        stopped.append(name)

    async def restart(index: int) -> Handle:
        started.append(index)
        return Handle()

    pool = JudgePool(handles, 4, 10.0, "judge", restart)
    party = PoolParty(pool, "judge", stop, 0.2)
    await party.sleep(LEARNER)
    assert (handles[0].calls, stopped) == ([("sleep",)], ["judge-1"])
    while not started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    assert started == [1]
    assert pool.running()[1] is not handles[1]
    await party.wake()
    assert handles[0].calls[-1] == ("wake",)


async def test_a_new_generator_gets_its_version_in_a_turn_of_the_generators() -> None:
    turns, log = Turns(), []

    async def catch_up(target: str) -> RLHFError | None:
        log.append(target)
        return None

    waiting = in_turn(catch_up, turns)
    async with turns.take(LEARNER):
        task = asyncio.ensure_future(waiting("g0"))
        await asyncio.sleep(0.05)
        assert log == []
    await task
    async with turns.take(GENERATORS):
        await waiting("g1")
    assert log == ["g0", "g1"]


def test_roles_on_one_device_need_it_once() -> None:
    roles = [Role("generator", 2, 4, 1, "PACK"), Role("learner", 2, 4, 1, "PACK"), Role("judge", 1, 2, 1, "SPREAD")]
    together = share(roles)
    assert together == Role("generator + learner + judge", 2, 10, 1, "PACK")
    assert shortages([together], [{"CPU": 20, "GPU": 2}]) == []
    assert "2 generator + learner + judge actors" in shortages([together], [{"CPU": 20, "GPU": 1}])[0]
