"""Taking turns on one set of devices: whoever has the turn is awake, everybody else sleeps.

A turn belongs to a party (the generators, the learner, one pool of judges) and may have many users at a time. It passes
on only when somebody asks for another party and the last user is gone: those who had it go to sleep, which gives their
memory back, and only then does the next party wake. The loop knows nothing of it: the parts it talks to are wrapped so
that each call takes the turn that it needs.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Protocol

GENERATORS = "generators"
LEARNER = "learner"

logger = logging.getLogger(__name__)


class Party(Protocol):
    """Actors that share devices with others. Both calls may come twice."""

    async def sleep(self, before: str) -> None:
        """Give the devices' memory back; `before` is the party that gets them."""
        ...

    async def wake(self) -> None:
        """Be ready to work."""
        ...


class Turns:
    """Who may use the devices now."""

    def __init__(self) -> None:
        self._parties: dict[str, Party] = {}
        self._owner: str | None = None
        self._awake = False
        self._users = 0
        self._passing = asyncio.Lock()
        self._idle = asyncio.Event()
        self._seconds = {"sleep": 0.0, "wake": 0.0}

    def join(self, name: str, party: Party) -> None:
        """Make a party known, awake; it has to be started inside a turn of its own."""
        self._parties[name] = party

    @asynccontextmanager
    async def take(self, name: str, wake: bool = True) -> AsyncIterator[None]:
        """The party's turn, shared with its other users; waits until the users of another party's are done.

        Without `wake` the party is left as it is, asleep perhaps. Raises what putting the others to sleep raises.
        """
        await self._enter(name, wake)
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()
                self._idle = asyncio.Event()

    def metrics(self) -> dict[str, float]:
        """timing_s/{sleep,wake}: seconds that passing the turn took since this was last asked."""
        found = {f"timing_s/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return found

    async def _enter(self, name: str, wake: bool) -> None:
        while True:
            async with self._passing:
                if name == self._owner or not self._users:
                    await self._pass_to(name, wake)
                    self._users += 1
                    return
                idle = self._idle
            await idle.wait()

    async def _pass_to(self, name: str, wake: bool) -> None:
        if name != self._owner:
            if self._owner in self._parties:
                logger.info("%s: sleep before %s", self._owner, name)
                await self._timed("sleep", self._parties[self._owner].sleep(name))
            self._owner, self._awake = name, False
            logger.info("%s: turn", name)
        if wake and not self._awake and name in self._parties:
            logger.info("%s: wake", name)
            await self._timed("wake", self._parties[name].wake())
            self._awake = True

    async def _timed(self, what: str, call: Awaitable[None]) -> None:
        started = time.monotonic()
        await call
        self._seconds[what] += time.monotonic() - started


def turn_of(turns: Turns | None, name: str) -> AbstractAsyncContextManager[None]:
    """A turn in which actors of a party may be started; none is needed where no device is shared."""
    return turns.take(name, wake=False) if turns else nullcontext()
