"""Calls of many generators in few: a relay makes those of a whole group, and their answers come back together.

Whatever it is for, a call of an actor costs its caller about half a millisecond of processor (`bench/calls.py`), so a
driver that called 256 generators one by one would spend longer on that than on all else of a small round. It hands the
calls of one moment to the relays instead, a post for each. To the fleet, a member behind a relay is a handle as others
are.

A relay holds nothing, and its members do not need it. When one is lost, or says nothing for two minutes, another takes
its place; what it was asked ends in a `RelayLostError`, which is no word about the member: a stream's missing responses
are asked for again, an update is sent again.
"""

import asyncio
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.calls import first_line, unwrap, within
from rlhf.errors import PayloadError, RLHFError

T = TypeVar("T")

DIRECT = 8
"""A fleet of up to so many members is called directly: what a relay saves there is not worth another process."""

MEMBERS = 128
"""Members of one relay at most: it can make about a thousand calls a second (`bench/calls.py`), and an engine takes one
every few seconds."""

LINGER_S, LONGEST_LINGER_S = 0.02, 0.25
"""How long an answer waits for others to travel with, at least and at most: a quarter of what its post has taken.

Nothing waits once all calls of a post have ended."""

BEAT_S = 15.0
"""Between two signs of life of a post that gives nothing else."""

SILENT_S = 120.0
"""A relay that owes a sign of life for so long is wedged."""

PAUSE_S = 2.0
"""Before another relay is started: what ended the last one, such as memory that is not free yet, may pass."""

CONCURRENCY = 10_000


class Call(NamedTuple):
    """A call of a member's method; `streams` says that it gives items until it ends."""

    member: str
    method: str
    arguments: tuple[Any, ...]
    streams: bool


class Part(NamedTuple):
    """Something that call `number` of a post gave: an item of its stream, its end with the result, or its error."""

    number: int
    kind: Literal["item", "end", "error"]
    value: Any


class Relay:
    """The actor. It knows its members' actors by name."""

    def __init__(self, members: dict[str, Any]):
        self._members = members

    def meet(self, member: str, actor: Any) -> None:
        """A new member, or a new actor in a member's place."""
        self._members[member] = actor

    async def carry(self, calls: list[tuple[Any, ...]]) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Make all the calls at once; yields what they give, what comes soon after each other together.

        Calls and parts travel as plain tuples: for each other object Ray's pickler calls back into Python. Yields
        nothing but an empty list every `BEAT_S` seconds while none of them gives anything.
        """
        given: asyncio.Queue[Part] = asyncio.Queue()
        started = time.monotonic()
        tasks = [
            asyncio.create_task(_make(number, call, self._members[call.member], given.put_nowait))
            for number, call in enumerate(map(Call._make, calls))
        ]
        left = len(calls)
        while left:
            try:
                async with asyncio.timeout(BEAT_S):
                    parts = [await given.get()]
            except TimeoutError:
                yield []
                continue
            linger = (time.monotonic() - started) / 4
            await asyncio.wait(tasks, timeout=min(LONGEST_LINGER_S, max(LINGER_S, linger)))
            while not given.empty():
                parts.append(given.get_nowait())
            left -= sum(part.kind != "item" for part in parts)
            yield [tuple(part) for part in parts]
        await asyncio.gather(*tasks)


async def _make(number: int, call: Call, actor: Any, give: Callable[[Part], None]) -> None:
    try:
        method = getattr(actor, call.method)
        if not call.streams:
            give(Part(number, "end", await method.remote(*call.arguments)))
            return
        async for reference in method.options(num_returns="streaming").remote(*call.arguments):
            give(Part(number, "item", await reference))
        give(Part(number, "end", None))
    except ray.exceptions.RayTaskError as error:
        cause = unwrap(error)
        # An unexpected one is of a class that Ray made up for it, which cannot travel; its text has the traceback.
        give(Part(number, "error", cause if isinstance(cause, RLHFError) else UnexpectedError(str(error))))
    except ray.exceptions.RayError as error:
        give(Part(number, "error", ActorGoneError(first_line(error))))
    except Exception:
        # Whoever waits must hear of it, whatever it is.
        give(Part(number, "error", UnexpectedError(traceback.format_exc())))


class UnexpectedError(Exception):
    """A member's method, or the call of it, raised what nobody expects; the message is the traceback."""


class RelayLostError(PayloadError):
    """The relay that a call went through is gone. The member is as it was, or does what it was asked."""


class ActorGoneError(ray.exceptions.RayActorError):
    """A member's actor is gone, or cannot be reached."""

    def __init__(self, message: str):
        super().__init__(error_msg=message)
        self._message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorGoneError, (self._message,)


class Stream:
    """The items of a call as they come, each to be awaited as Ray's references are; for one reader."""

    def __init__(self) -> None:
        self._parts: deque[Part] = deque()
        # Not a queue of asyncio, with which a stream takes the driver a tenth longer.
        self._waits: asyncio.Future[None] | None = None
        self._ended = False

    def done(self) -> bool:
        """Is nothing left to come?"""
        return self._ended

    def give(self, part: Part) -> None:
        """The next part has arrived."""
        self._ended = self._ended or part.kind != "item"
        self._parts.append(part)
        if self._waits and not self._waits.done():
            self._waits.set_result(None)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Awaitable[Any]:
        while not self._parts:
            self._waits = asyncio.get_running_loop().create_future()
            await self._waits
        part = self._parts.popleft()
        if part.kind == "error":
            raise part.value
        if part.kind == "end":
            raise StopAsyncIteration
        return _Arrived(part.value)


Answer = Stream | asyncio.Future[Any]


def give(answer: Answer, part: Part) -> None:
    """The next part of an answer has arrived."""
    if isinstance(answer, Stream):
        answer.give(part)
    elif not answer.done():  # whoever waited may have stopped
        if part.kind == "error":
            answer.set_exception(part.value)
        else:
            answer.set_result(part.value)


class _Arrived(Awaitable[T]):
    def __init__(self, value: T):
        self._value = value

    def __await__(self) -> Generator[Any, None, T]:
        return self._value
        yield


class Line:
    """The driver's side of one relay: calls that are made in the same moment travel as one post."""

    def __init__(self, name: str, node: str, alert: Callable[[str], None]):
        """`node` is where the relay is to be, if there is room."""
        self._name = name
        self._node = node
        self._alert = alert
        self._members: dict[str, Any] = {}
        self._relay: Any = None
        self._lock = asyncio.Lock()
        self._pause = 0.0
        self._waiting: list[tuple[Call, Answer]] = []
        self._posts: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, member: str) -> bool:
        return member in self._members

    async def take(self, member: str, actor: Any) -> "Relayed":
        """A handle of a new member, or of a new actor in a member's place."""
        self._members[member] = actor
        if (relay := self._relay) is not None:
            try:
                await within(relay.meet.remote(member, actor), SILENT_S, f"{self._name}: a new member")
            except (RLHFError, ray.exceptions.RayError) as error:
                # The next one hears of everybody when it is started.
                self._gone(relay, first_line(error))
        return Relayed(self, member)

    def call(self, call: Call) -> Answer:
        """Make a call with the others of this moment."""
        loop = asyncio.get_running_loop()
        answer: Answer = Stream() if call.streams else loop.create_future()
        if not self._waiting:
            loop.call_soon(self._send)
        self._waiting.append((call, answer))
        return answer

    def _send(self) -> None:
        calls, self._waiting = self._waiting, []
        task = asyncio.create_task(self._post(calls))
        self._posts.add(task)
        task.add_done_callback(self._posts.discard)

    async def _post(self, calls: Sequence[tuple[Call, Answer]]) -> None:
        relay = None
        try:
            relay = await self._there()
            parts = aiter(relay.carry.options(num_returns="streaming").remote([tuple(call) for call, _ in calls]))
            while not all(answer.done() for _, answer in calls):  # the stream's end says nothing new
                async with asyncio.timeout(SILENT_S):
                    given = await (await anext(parts))
                for part in map(Part._make, given):
                    give(calls[part.number][1], part)
        except ray.exceptions.RayTaskError as error:
            # A fault in what it was asked, which another relay would have too.
            fail(calls, UnexpectedError(str(error)))
        except (ray.exceptions.RayError, TimeoutError, StopAsyncIteration) as error:
            reason = f"says nothing for {SILENT_S:.0f} s" if isinstance(error, TimeoutError) else first_line(error)
            self._gone(relay, reason)
            fail(calls, RelayLostError(f"{self._name}: {reason}"))
        except Exception as error:
            # Whoever waits must hear of it, whatever it is: arguments that cannot travel, for one.
            fail(calls, error)

    async def _there(self) -> Any:
        async with self._lock:
            if self._relay is None:
                await asyncio.sleep(self._pause)
                actor = ray.remote(Relay)
                place = NodeAffinitySchedulingStrategy(self._node, soft=True)
                options = actor.options(num_cpus=0, max_concurrency=CONCURRENCY, scheduling_strategy=place)
                self._relay, self._pause = options.remote(self._members), PAUSE_S
            return self._relay

    def _gone(self, relay: Any, reason: str) -> None:
        if relay is not None and self._relay is relay:
            self._relay = None
            # It may be alive, and out of reach or wedged.
            ray.kill(relay)
            self._alert(f"{self._name} is started again: {reason}")


def fail(calls: Sequence[tuple[Call, Answer]], error: Exception) -> None:
    """End all that have not ended with an error."""
    for number, (_, answer) in enumerate(calls):
        if not answer.done():
            give(answer, Part(number, "error", error))


class Relays:
    """The lines of a fleet: each new member joins one that has room."""

    def __init__(self, alert: Callable[[str], None]):
        self._alert = alert
        self._lines: list[Line] = []

    async def handle(self, member: str, actor: Any, node: str) -> "Relayed":
        """What stands for `actor`, which runs on `node`, from now on."""
        lines = [line for line in self._lines if member in line] or [
            line for line in self._lines if len(line) < MEMBERS
        ]
        if not lines:
            lines = [Line(f"relay-{len(self._lines)}", node, self._alert)]
            self._lines += lines
        return await lines[0].take(member, actor)


class Relayed:
    """A member's handle: its methods are called as those of Ray's handles are."""

    def __init__(self, line: Line, member: str):
        self._line = line
        self._member = member

    def __getattr__(self, method: str) -> "_Method":
        if method.startswith("__"):
            raise AttributeError(method)
        return _Method(self._line, self._member, method)


class _Method:
    def __init__(self, line: Line, member: str, method: str, streams: bool = False):
        self._line = line
        self._member = member
        self._method = method
        self._streams = streams

    def options(self, num_returns: Literal["streaming"]) -> "_Method":
        """The only option there is."""
        assert num_returns == "streaming"
        return _Method(self._line, self._member, self._method, streams=True)

    def remote(self, *arguments: Any) -> Answer:
        """Make the call."""
        return self._line.call(Call(self._member, self._method, arguments, self._streams))
