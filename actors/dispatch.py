"""One call of the fleet's `sample`: prompts go to members, what a lost member leaves behind goes to others."""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from msgspec.structs import replace

from actors.calls import first_line, unwrap
from actors.relay import RelayLostError
from rlhf.errors import EngineLostError
from rlhf.records import Rollout, SampleRequest
from rlhf.wire import PackedRequests, Responses

CHUNK = 4
"""Prompts a stream takes at least: few, so that the slowest replica does not end the round late."""

PARTS = 16
"""A stream takes at least its even share of the round cut in so many: in a large round calls cost more than waiting
for the last of them."""

LARGEST_CHUNK = 256
"""Prompts a stream takes at most."""


class Streams(Protocol):
    """What the fleet does for a dispatch. A member is given by its id, a process of it by its actor's handle."""

    def taking(self) -> list[str]:
        """Members that may be given new work."""
        ...

    def takes(self, member: str) -> bool:
        """May this member be given new work?"""
        ...

    def begin(self, member: str) -> Any:
        """A stream to the member begins; returns its handle."""
        ...

    def heard(self, member: str, handle: Any) -> None:
        """The process gave responses."""
        ...

    def end(self, member: str, handle: Any) -> None:
        """The stream ended, however it did."""
        ...

    def lost(self, member: str, reason: str, handle: Any) -> None:
        """The process is gone or useless."""
        ...


@dataclass(slots=True)
class Share:
    """What a stream was given of one request: the responses of the numbers `ks`; `missing` have not arrived."""

    request: SampleRequest
    ks: tuple[int, ...]
    missing: set[int]

    @classmethod
    def whole(cls, request: SampleRequest) -> "Share":
        """All responses of a request."""
        ks = tuple(range(len(request.seeds)))
        return cls(request, ks, set(ks))

    def sent(self) -> SampleRequest:
        """The request as a generator gets it: the seeds of `ks` alone, which the generator numbers from 0."""
        if len(self.ks) == len(self.request.seeds):
            return self.request
        return SampleRequest(self.request.prompt, tuple(self.request.seeds[k] for k in self.ks))

    def take(self, rollout: Rollout) -> Rollout | None:
        """The response under its own number; None if it was there already."""
        k = self.ks[rollout.k]
        if k not in self.missing:
            return None
        self.missing.remove(k)
        return rollout if k == rollout.k else replace(rollout, k=k)

    def rest(self) -> "Share":
        """What another stream has to give: what had arrived is not sampled again."""
        return Share(self.request, tuple(sorted(self.missing)), set(self.missing))


class Dispatch:
    """The requests of one call, and the streams that work on them.

    Every response arrives exactly once: one that is missing when its stream breaks goes back to the front of the
    queue with its own seed, one that arrived is never asked for again.
    """

    def __init__(self, fleet: Streams, requests: Sequence[SampleRequest], sampling: dict[str, Any], sequences: int):
        """`sequences` is how many one member samples at once."""
        if len({request.prompt.uid for request in requests}) < len(requests):
            raise ValueError("two requests for one prompt: responses are told apart by uid and k")
        self._fleet = fleet
        self._sampling = sampling
        self._waiting = deque(Share.whole(request) for request in requests)
        largest = max((len(request.seeds) for request in requests), default=1)
        self._streams = max(1, -(-sequences // (CHUNK * largest)) + 1)
        self._prompts = len(self._waiting)
        self._closed = False
        self._running: dict[str, set[asyncio.Task[None]]] = {}
        self._at_work = 0
        self._least = CHUNK
        self.expected = sum(len(request.seeds) for request in requests)
        self.results: asyncio.Queue[list[Rollout] | BaseException] = asyncio.Queue()

    def start(self) -> None:
        """Begin streams: every member before any gets a second one, and no stream without a chunk."""
        members = self._fleet.taking()
        chunks = -(-len(self._waiting) // CHUNK)
        self._least = least_chunk(self._prompts, min(chunks, self._streams * len(members)))
        for member in [member for _ in range(self._streams) for member in members][:chunks]:
            self._spawn(member)

    def join(self, member: str) -> None:
        """A member may be given work, from now on or again."""
        for _ in range(min(self._streams - len(self._running.get(member, ())), -(-len(self._waiting) // CHUNK))):
            self._spawn(member)

    def leave(self, member: str) -> None:
        """A member's process is gone: what its streams have not given goes to others."""
        for task in list(self._running.get(member, ())):
            task.cancel()

    def close(self) -> None:
        """Stop everything."""
        self._closed = True
        for member in self._running:
            self.leave(member)

    def _spawn(self, member: str) -> None:
        tasks = self._running.setdefault(member, set())
        task = asyncio.create_task(self._work(member))
        tasks.add(task)
        self._at_work += 1

        def ended(task: "asyncio.Task[None]") -> None:
            tasks.discard(task)
            self._at_work -= 1

        task.add_done_callback(ended)

    async def _work(self, member: str) -> None:
        """Take chunks until none is left or the member takes no more; an unexpected error goes to the reader."""
        try:
            while self._waiting and self._fleet.takes(member):
                await self._stream(member, list(self._chunk()))
        except Exception as error:
            # Whatever it is, the reader must hear of it now and not at the round's deadline.
            self.results.put_nowait(error)

    async def _stream(self, member: str, chunk: Sequence[Share]) -> None:
        shares = {share.request.prompt.uid: share for share in chunk}
        handle = self._fleet.begin(member)
        lost = ""
        try:
            missing = sum(len(share.missing) for share in chunk)
            sent = PackedRequests(share.sent() for share in chunk)
            async for reference in handle.sample.options(num_returns="streaming").remote(sent, self._sampling):
                missing -= self._accept(shares, await reference)
                self._fleet.heard(member, handle)
                if not missing:
                    # The stream's end says nothing new, and costs as much as a response.
                    break
            if missing:
                lost = "ended its stream before all responses were there"
        except ray.exceptions.RayTaskError as error:
            cause = unwrap(error)
            if not isinstance(cause, EngineLostError):
                raise cause from error
            lost = str(cause)
        except EngineLostError as error:
            lost = str(error)
        except RelayLostError:
            # What is missing is asked for again, of whoever takes it; nothing is wrong with the member.
            pass
        except ray.exceptions.RayError as error:
            # The actor is gone, or the node that held what it gave.
            lost = f"died while sampling: {first_line(error)}"
        finally:
            self._fleet.end(member, handle)
            if lost:
                self._fleet.lost(member, lost, handle)
            self._put_back(chunk)

    def _accept(self, shares: dict[str, Share], given: Responses | Iterable[Rollout]) -> int:
        """Give what is new to the reader; returns how many."""
        rollouts = given.rollouts() if isinstance(given, Responses) else given
        taken = [shares[rollout.uid].take(rollout) for rollout in rollouts]
        if fresh := [rollout for rollout in taken if rollout is not None]:
            self.results.put_nowait(fresh)
        return len(fresh)

    def _put_back(self, chunk: Sequence[Share]) -> None:
        rest = [share.rest() for share in chunk if share.missing]
        if rest and not self._closed:
            self._waiting.extendleft(reversed(rest))
            for member in self._fleet.taking():
                self.join(member)

    def _chunk(self) -> Iterator[Share]:
        for _ in range(chunk_size(len(self._waiting), self._at_work, self._least)):
            yield self._waiting.popleft()


def least_chunk(prompts: int, streams: int) -> int:
    """The smallest chunk of a round of `prompts` for `streams`, but for its last."""
    return max(CHUNK, prompts // (PARTS * max(1, streams)))


def chunk_size(waiting: int, streams: int, least: int = CHUNK) -> int:
    """Prompts that one of `streams` takes next: half its share of those that wait, so that large rounds need few calls.

    Shares shrink as the round goes on (guided self-scheduling, Polychronopoulos and Kuck 1987) down to `least`.
    """
    return min(waiting, max(least, min(LARGEST_CHUNK, waiting // (2 * streams))))
