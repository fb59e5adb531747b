"""The generator fleet: hands prompts to whichever replica is free, and lets a replica serve only what it proved."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import ray

from actors.calls import unwrap, within
from rlhf.errors import DeadlineError, RLHFError
from rlhf.records import Rollout, SampleRequest

CHUNK = 4
"""Prompts a stream takes at the end: few, so that the slowest replica does not end the round late."""

LARGEST_CHUNK = 64
"""Prompts a stream takes at most."""


ADMIT_S = 60.0
"""Seconds in which an engine must say which version it has proved."""


class GeneratorFleet:
    """The `Generators` and `Fleet` ports over generator actors.

    A member is STALE (present, not serving) until it is admitted with a version that it has proved.
    """

    def __init__(
        self,
        handles: dict[str, Any],
        sampling: dict[str, Any],
        sequences: int,
        restart: Callable[[str], Awaitable[Any]],
    ):
        self._handles = dict(handles)
        self._sampling = sampling
        self._sequences = sequences
        self._restart = restart
        self._serving: dict[str, int] = {}

    def members(self) -> list[str]:
        """Ids of all members, serving or not."""
        return list(self._handles)

    def handle(self, member: str) -> Any:
        """The member's actor."""
        return self._handles[member]

    async def admit(self, member: str, version: int) -> None:
        """Let a member serve; it is asked which version it has proved, since only the engine can know."""
        proved = await within(self._handles[member].version.remote(), ADMIT_S, f"{member}: version")
        if proved != version:
            raise RLHFError(f"{member} cannot be admitted with version {version}: it has proved {proved}")
        self._serving[member] = version

    async def suspend(self, member: str) -> None:
        """Make a member STALE: it serves nothing until it is admitted again."""
        self._serving.pop(member, None)

    async def replace(self, member: str) -> None:
        """Put a new actor in a member's place; it is STALE until admitted."""
        self._serving.pop(member, None)
        self._handles[member] = await self._restart(member)

    async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
        """Yield responses as they end, from all serving members at once."""
        if not self._serving:
            raise RLHFError("no generator serves a proved version")
        waiting = deque(requests)
        results: asyncio.Queue[list[Rollout] | BaseException] = asyncio.Queue()
        expected = sum(len(request.seeds) for request in requests)
        largest = max((len(request.seeds) for request in requests), default=1)
        streams = max(1, -(-self._sequences // (CHUNK * largest)) + 1)
        # Every member before any gets a second stream, and no stream without a chunk.
        members = [member for _ in range(streams) for member in self._serving][: -(-len(requests) // CHUNK)]
        workers = [asyncio.create_task(self._work(member, waiting, len(members), results)) for member in members]
        try:
            async with asyncio.timeout(deadline):
                received = 0
                while received < expected:
                    item = await results.get()
                    if isinstance(item, BaseException):
                        raise item
                    received += len(item)
                    for rollout in item:
                        yield rollout
        except TimeoutError:
            raise DeadlineError(
                f"generators {', '.join(self._serving)}: not all of {expected} responses came within {deadline:.0f} s"
            ) from None
        finally:
            for worker in workers:
                worker.cancel()

    async def _work(
        self,
        member: str,
        waiting: deque[SampleRequest],
        streams: int,
        results: "asyncio.Queue[list[Rollout] | BaseException]",
    ) -> None:
        """Take chunks until none is left; a failure goes to the reader, which ends the round."""
        try:
            while waiting:
                chunk = [waiting.popleft() for _ in range(chunk_size(len(waiting), streams))]
                stream = self._handles[member].sample.options(num_returns="streaming").remote(chunk, self._sampling)
                async for reference in stream:
                    results.put_nowait(await reference)
        except ray.exceptions.RayTaskError as error:
            results.put_nowait(unwrap(error))
        except ray.exceptions.RayActorError as error:
            results.put_nowait(RLHFError(f"{member} died while sampling: {str(error).splitlines()[0]}"))
        except Exception as error:
            # Whatever it is, the reader must hear of it now and not at the round's deadline.
            results.put_nowait(error)


def chunk_size(waiting: int, streams: int) -> int:
    """Prompts that one of `streams` takes next: an eighth of its share, so that large rounds need fewer calls.

    Shares shrink as the round goes on (guided self-scheduling, Polychronopoulos and Kuck 1987) down to `CHUNK`.
    """
    return min(waiting, max(CHUNK, min(LARGEST_CHUNK, waiting // (8 * streams))))
