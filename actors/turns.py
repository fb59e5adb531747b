"""The parties that take turns on shared devices, over their actors; see `rlhf.rounds.turns`.

An engine that does not go to sleep, or does not wake, is killed and started again in a turn of its own: what it held
has to be free before anybody else works.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import ray

from actors.calls import first_line, within
from actors.engine.sleeping import DROP_WEIGHTS, KEEP_WEIGHTS
from actors.fleet import CatchUp, GeneratorFleet
from actors.judge import JudgePool
from actors.learner import LearnerGroup
from rlhf.errors import RLHFError
from rlhf.rounds.turns import GENERATORS, LEARNER, Turns

Stop = Callable[[str], Awaitable[None]]
"""Ends the actor of a name, and its engine."""


class FleetParty:
    """The generators. `keep_weights` says that an update does not bring all of an engine's weights."""

    def __init__(self, fleet: GeneratorFleet, stop: Stop, deadline: float, keep_weights: bool):
        self._fleet = fleet
        self._stop = stop
        self._deadline = deadline
        self._keep_weights = keep_weights

    async def sleep(self, before: str) -> None:
        """Every running member; who is lost over it is started again in the next turn.

        What the learner does ends in an update, which brings the weights anew; judges give the turn back as it was.
        """
        level = DROP_WEIGHTS if before == LEARNER and not self._keep_weights else KEEP_WEIGHTS
        await self._each(lambda handle: handle.sleep.remote(level), "going to sleep")

    async def wake(self) -> None:
        """Every running member."""
        await self._each(lambda handle: handle.wake.remote(), "waking")

    async def _each(self, call: Callable[[Any], Awaitable[None]], what: str) -> None:
        handles = {name: self._fleet.handle(name) for name in self._fleet.running()}
        failed = await _all(handles, call, self._deadline, what)
        await asyncio.gather(*(self._stop(name) for name in failed))
        for name, reason in failed.items():
            self._fleet.lost(name, reason, handles[name])


class PoolParty:
    """One pool of judges with engines."""

    def __init__(self, pool: JudgePool, name: str, stop: Stop, deadline: float):
        self._pool = pool
        self._name = name
        self._stop = stop
        self._deadline = deadline

    async def sleep(self, before: str) -> None:
        """Every actor that is there, once it has judged what nobody waits for any more."""
        await self._each(lambda handle: handle.sleep.remote(), "going to sleep")

    async def wake(self) -> None:
        """Every actor that is there."""
        await self._each(lambda handle: handle.wake.remote(), "waking")

    async def _each(self, call: Callable[[Any], Awaitable[None]], what: str) -> None:
        running = self._pool.running()
        handles = {f"{self._name}-{index}": handle for index, handle in running.items()}
        failed = await _all(handles, call, self._deadline, what)
        await asyncio.gather(*(self._stop(name) for name in failed))
        for index, handle in running.items():
            if reason := failed.get(f"{self._name}-{index}"):
                self._pool.lost(index, handle, reason)


class LearnerParty:
    """The learner's ranks, which are lost together: whatever fails comes out as an error of the learner."""

    def __init__(self, learner: LearnerGroup):
        self._learner = learner

    async def sleep(self, before: str) -> None:
        """All ranks."""
        await self._learner.sleep()

    async def wake(self) -> None:
        """All ranks."""
        await self._learner.wake()


def in_turn(catch_up: CatchUp, turns: Turns) -> CatchUp:
    """A new generator gets its version in a turn of the generators."""

    async def waiting(target: str) -> RLHFError | None:
        async with turns.take(GENERATORS, wake=False):
            return await catch_up(target)

    return waiting


async def _all(
    handles: Mapping[str, Any], call: Callable[[Any], Awaitable[None]], deadline: float, what: str
) -> dict[str, str]:
    """Call all at once; returns why the call failed, by name."""

    async def one(name: str, handle: Any) -> str | None:
        try:
            await within(call(handle), deadline, f"{name}: {what}")
        except RLHFError as error:
            return str(error)
        except ray.exceptions.RayError as error:
            return f"{name}: {what}: {first_line(error)}"
        return None

    calls: list[Coroutine[Any, Any, str | None]] = [one(name, handle) for name, handle in handles.items()]
    found = dict(zip(handles, await asyncio.gather(*calls), strict=True))
    return {name: reason for name, reason in found.items() if reason}
