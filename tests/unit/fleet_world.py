"""A fleet over in-process generators that die, hang and come back."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import ray

from actors.fleet import GeneratorFleet
from rlhf.errors import RLHFError
from rlhf.health import RestartBudget
from rlhf.records import Prompt, Rollout, SampleRequest, VersionSpan


def requests(count: int, samples: int = 2) -> list[SampleRequest]:
    return [
        SampleRequest(Prompt(f"u{n}", (), "", (n,)), tuple(100 * n + k for k in range(samples))) for n in range(count)
    ]


def wanted(given: Sequence[SampleRequest]) -> dict[tuple[str, int], int]:
    return {(request.prompt.uid, k): seed for request in given for k, seed in enumerate(request.seeds)}


class Remote:
    """A method of an actor handle."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def options(self, **_: Any) -> "Remote":
        return self

    def remote(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class Generator:
    """Answers each seed with itself as its only token, one response after the other; `dies_after` so many."""

    def __init__(self, name: str, delay: float = 0.0, dies_after: int | None = None, wedged: bool = False) -> None:
        self.name, self.delay, self.dies_after, self.wedged = name, delay, dies_after, wedged
        self.given: list[int] = []
        self.dead = False
        self.counts: bool = False
        self.calls = 0
        self.sample, self.version, self.progress = Remote(self._sample), Remote(self._version), Remote(self._progress)

    async def _sample(self, chunk: list[SampleRequest], sampling: dict[str, Any]) -> AsyncIterator[Awaitable[Any]]:
        for request in chunk:
            for k, seed in enumerate(request.seeds):
                while self.wedged:  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(0.01)
                await asyncio.sleep(self.delay)
                if self.dead or (self.dies_after is not None and len(self.given) >= self.dies_after):
                    self.dead = True
                    raise ray.exceptions.ActorDiedError()
                self.given.append(seed)
                rollout = Rollout(request.prompt.uid, k, (seed,), (-1.0,), "", "stop", (VersionSpan(0, 0, 1),))
                yield _value([rollout])

    async def _version(self) -> int:
        if self.dead:
            raise ray.exceptions.ActorDiedError()
        return 0

    async def _progress(self) -> int:
        self.calls += 1
        return len(self.given) + (self.calls if self.counts else 0)


async def _value(value: Any) -> Any:
    return value


class World:
    """A fleet of generators; `spares` take the places of lost ones, a list of them for each name."""

    def __init__(
        self,
        *generators: Generator,
        spares: Sequence[Generator | Exception] = (),
        budget: int = 5,
        token_s: float = 60.0,
    ) -> None:
        self.spares = list(spares)
        self.alerts: list[str] = []
        self.gate: asyncio.Event | None = None
        self.generators = {generator.name: generator for generator in generators}
        self.fleet = GeneratorFleet(
            dict(self.generators), {}, 4, self._restart, RestartBudget(budget, 3600.0), token_s, self.alerts.append
        )
        self.fleet.catch_up = self._catch_up

    async def _restart(self, name: str) -> Generator:
        if self.gate:
            await self.gate.wait()
        spare = self.spares.pop(0) if self.spares else Generator(name)
        if isinstance(spare, Exception):
            raise spare
        self.generators[name] = spare
        return spare

    async def _catch_up(self, name: str) -> RLHFError | None:
        await self.fleet.admit(name, 0)
        return None

    async def admitted(self) -> "World":
        for name in self.fleet.members():
            await self.fleet.admit(name, 0)
        return self

    async def sample(self, given: Sequence[SampleRequest], deadline: float = 20.0) -> dict[tuple[str, int], int]:
        found = [rollout async for rollout in self.fleet.sample(given, deadline)]
        assert max(Counter((rollout.uid, rollout.k) for rollout in found).values(), default=1) == 1
        return {(rollout.uid, rollout.k): rollout.token_ids[0] for rollout in found}
