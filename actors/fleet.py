"""The generator fleet: who serves, who is started again, and what is sampled meanwhile.

A member serves only a version that it has proved. One that dies, or has work and gives no token for a while, is
started again in the background, out of a budget that judges share. It comes back STALE, gets the served version from
the weight plane, proves it, and takes part in whatever is being sampled then.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from actors.calls import ActorDiedError, NoAnswerError, within
from actors.dispatch import Dispatch
from actors.member import Member
from actors.relay import RelayLostError
from actors.reviving import revive
from rlhf.errors import DeadlineError, EngineLostError, RLHFError
from rlhf.health import RUNNING, SERVING, Clock, Health, RestartBudget, State
from rlhf.records import Rollout, SampleRequest

ADMIT_S = 60.0
"""Seconds in which an engine must say which version it has proved."""

TOKEN_S = 300.0
"""`cluster.deadlines.token` where nothing else is said."""

LONGEST_POLL_S = 15.0
"""Between two looks at members that have work."""

EXPECT_POLL_S = 0.1
"""Between two looks at whether a leaving member is done, or an expected one is there."""

CatchUp = Callable[[str], Awaitable[RLHFError | None]]
"""Brings a member that was started again to the served version and admits it; returns why it could not."""


class GeneratorFleet:
    """The `Generators` and `Fleet` ports over generator actors."""

    def __init__(
        self,
        handles: dict[str, Any],
        sampling: dict[str, Any],
        sequences: int,
        restart: Callable[[str], Awaitable[Any]],
        budget: RestartBudget | None = None,
        token_s: float = TOKEN_S,
        alert: Callable[[str], None] = lambda message: None,
        publishes_meanwhile: bool = False,
        clock: Clock = time.monotonic,
    ):
        """`restart` puts a new actor in a member's place; each one takes from `budget` and is told to `alert`.

        `publishes_meanwhile` says that a version may be published while a round is sampled.
        """
        self._budget = budget or RestartBudget(5, 3600.0, clock)
        self._members = {
            name: Member(name, handle, Health(self._budget, token_s, clock)) for name, handle in handles.items()
        }
        self._sampling = sampling
        self._sequences = sequences
        self._restart = restart
        self._token_s = token_s
        self._poll_s = min(LONGEST_POLL_S, token_s / 8)
        self._alert = alert
        self._clock = clock
        self._publishes_meanwhile = publishes_meanwhile
        self._dispatches: set[Dispatch] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._recoveries: dict[str, asyncio.Task[None]] = {}
        self._expected: set[str] = set()
        self.expect_s = math.inf
        """How long an update waits when nobody is left; finite where a member may have to wait for a node."""
        self._version: int | None = None
        self._reported = 0
        self.catch_up: CatchUp | None = None
        """Set by the weight plane; without it a member that was started again waits for the next version."""

    def members(self) -> list[str]:
        """Ids of all members, serving or not; of retired ones only when no other is left."""
        left = [name for name, member in self._members.items() if member.health.state != State.RETIRED]
        return left or list(self._members)

    def running(self) -> list[str]:
        """Ids of the members that have a process."""
        return [name for name, member in self._members.items() if member.health.state in RUNNING]

    def state(self, member: str) -> State:
        """The member's health."""
        return self._members[member].health.state

    def handle(self, member: str) -> Any:
        """The member's actor."""
        return self._members[member].handle

    def metrics(self) -> dict[str, float]:
        """fleet/members that serve, fleet/restarts (of judges too) since this was last asked."""
        serving = sum(member.health.state in SERVING for member in self._members.values())
        restarts, self._reported = self._budget.taken - self._reported, self._budget.taken
        return {"fleet/members": float(serving), "fleet/restarts": float(restarts)}

    async def admit(self, member: str, version: int) -> None:
        """Let a member serve a version that it has proved, which only the engine can know: it is asked, unless its
        answer to an update has just said so.

        One that has died meanwhile is started again instead, and gets the version then.
        """
        found = self._members[member]
        handle, proved, found.proof = found.handle, found.proof, None
        if proved != version:
            if handle is None:
                return
            try:
                proved = await within(handle.version.remote(), ADMIT_S, f"{member}: version")
            except (ActorDiedError, NoAnswerError) as error:
                self.lost(member, str(error), handle)
                return
            except RelayLostError:
                # It stays STALE until the next version.
                return
        if proved != version:
            if self._coming(member):
                return
            raise RLHFError(f"{member} cannot be admitted with version {version}: it has proved {proved}")
        if version != self._version:
            self._version = version
            for each in self._members.values():
                each.health.published(version)
        if found.handle is handle and found.health.proved(version):
            self._join(member)

    def proved(self, member: str, version: int, handle: Any) -> bool:
        """The process behind `handle` has taken an update to `version` and proved it; False if it is gone by now."""
        found = self._members[member]
        if found.handle is not handle:
            return False
        found.proof = version
        return True

    def has(self, member: str, version: int) -> bool:
        """Has the member's process proved this version, or does it serve it already?"""
        found = self._members[member]
        return found.proof == version or (self._version == version and found.health.state in SERVING)

    async def suspend(self, member: str) -> None:
        """Make a member STALE: it serves nothing until it is admitted again."""
        self._members[member].proof = None
        self._members[member].health.overtaken()

    async def replace(self, member: str, reason: str, handle: Any) -> None:
        """Wait for a new actor in the place of the process behind `handle`; it is STALE until admitted.

        Whoever calls sends it a version: that it is caught up with is not waited for. Raises `RLHFError` if there will
        be none.
        """
        found = self._members[member]
        self.lost(member, reason, handle)
        while found.handle is None and self._coming(member):
            started = asyncio.ensure_future(found.started.wait())
            await asyncio.wait({self._recoveries[member], started}, return_when=asyncio.FIRST_COMPLETED)
            started.cancel()
        if found.health.state == State.RETIRED:
            raise RLHFError(f"{member}: {found.health.reason}")

    async def recovered(self) -> None:
        """Wait until nobody is being started again; while nobody is left, `expect_s` seconds for those who may come."""
        end = self._clock() + self.expect_s
        while (self._recoveries or (self._expected and not self.running())) and self._clock() < end:
            if self._recoveries:
                await asyncio.wait(list(self._recoveries.values()), timeout=EXPECT_POLL_S)
            else:
                await asyncio.sleep(EXPECT_POLL_S)

    def expect(self, member: str) -> None:
        """A member of this name will be added, sooner or later."""
        self._expected.add(member)

    def add(self, member: str, handle: Any) -> None:
        """A new member, or one in the place of another that has left: STALE until it has proved what is served."""
        self._expected.discard(member)
        if self._coming(member):
            self._recoveries.pop(member).cancel()
        self._members[member] = found = Member(member, handle, Health(self._budget, self._token_s, self._clock))
        if self._version is not None:
            found.health.published(self._version)
        self._recover(found)

    async def drain(self, member: str, reason: str, grace_s: float) -> None:
        """Take a member out: no new work, `grace_s` seconds for what it is sampling, the rest goes to others."""
        found = self._members[member]
        found.health.retire(reason)
        if recovery := self._recoveries.get(member):
            recovery.cancel()
        end = self._clock() + grace_s
        while found.streams and self._clock() < end:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(EXPECT_POLL_S)
        self._drop(found, reason)
        self._tell_if_hopeless()

    async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
        """Yield responses as they end, from all serving members at once.

        While nobody serves but somebody is being started again it waits. Raises `RLHFError` when nobody can serve any
        more, `DeadlineError` after `deadline` seconds.
        """
        dispatch = Dispatch(self, requests, self._sampling, self._sequences)
        self._dispatches.add(dispatch)
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        try:
            self._tell_if_hopeless()
            dispatch.start()
            async with asyncio.timeout(deadline):
                received = 0
                while received < dispatch.expected:
                    item = await dispatch.results.get()
                    if isinstance(item, BaseException):
                        raise item
                    received += len(item)
                    for rollout in item:
                        yield rollout
        except TimeoutError:
            raise DeadlineError(
                f"generators: not all of {dispatch.expected} responses came within {deadline:.0f} s; {self._states()}"
            ) from None
        finally:
            self._dispatches.discard(dispatch)
            dispatch.close()
            if not self._dispatches and self._watcher:
                self._watcher.cancel()
                self._watcher = None

    # What a dispatch asks for.

    def taking(self) -> list[str]:
        """Members that may be given new work."""
        return [name for name, member in self._members.items() if member.health.state == State.HEALTHY]

    def takes(self, member: str) -> bool:
        """May this member be given new work?"""
        return self._members[member].health.state == State.HEALTHY

    def begin(self, member: str) -> Any:
        """A stream to the member begins; returns its handle."""
        found = self._members[member]
        found.streams += 1
        found.health.working()
        return found.handle

    def heard(self, member: str, handle: Any) -> None:
        """The member's process gave responses."""
        found = self._members[member]
        if found.handle is handle:
            self._answered(found)

    def end(self, member: str, handle: Any) -> None:
        """A stream to the member's process ended, however it did."""
        found = self._members[member]
        if found.handle is handle:
            found.streams -= 1
            if not found.streams:
                found.health.idle()

    def lost(self, member: str, reason: str, handle: Any) -> None:
        """The process behind `handle` is gone or useless: another one takes its place, in the background."""
        found = self._members[member]
        if found.handle is handle and found.health.state in RUNNING:
            self._drop(found, reason)
            self._recover(found)

    def _answered(self, member: Member) -> None:
        before = member.health.state
        member.health.answered()
        if before == State.SUSPECT:
            self._join(member.name)

    def _join(self, member: str) -> None:
        for dispatch in self._dispatches:
            dispatch.join(member)

    def _drop(self, member: Member, reason: str) -> None:
        """Count the member's process as dead. News of it can still come, and are told by its handle."""
        member.health.died(reason)
        member.started.clear()
        if member.catching_up:
            member.catching_up.cancel()
        member.handle, member.streams, member.tokens, member.proof = None, 0, None, None
        for dispatch in self._dispatches:
            dispatch.leave(member.name)

    def _coming(self, member: str) -> bool:
        """Is the member being started again, or caught up?"""
        recovery = self._recoveries.get(member)
        return recovery is not None and not recovery.done()

    def _recover(self, member: Member) -> None:
        """Start a member again, or bring a new one to the served version, in the background: once at a time."""
        if self._coming(member.name):
            # It sees that the process is gone.
            return
        task = asyncio.create_task(self._come_back(member))
        self._recoveries[member.name] = task

        def ended(task: "asyncio.Task[None]") -> None:
            if self._recoveries.get(member.name) is task:
                del self._recoveries[member.name]
            if not task.cancelled() and (error := task.exception()):
                self._tell(error)
            self._tell_if_hopeless()

        task.add_done_callback(ended)

    async def _come_back(self, member: Member) -> None:
        """Until it is up, or gone for good. One that is new, not DEAD, has its process already."""

        def start() -> Awaitable[Any]:
            return self._restart(member.name)

        while True:
            if member.health.state == State.DEAD:
                member.handle = await revive(member.name, member.health, self._budget, start, self._alert)
            handle = member.handle
            if handle is None:
                return
            member.started.set()
            if self.catch_up is None:
                return
            member.catching_up = asyncio.ensure_future(self.catch_up(member.name))
            try:
                error = await member.catching_up
            except asyncio.CancelledError:
                if member.handle is handle:
                    raise
            if member.handle is not handle:
                # It died meanwhile, whatever became of the version.
                continue
            if not isinstance(error, EngineLostError):
                if error:
                    self._alert(f"{member.name} waits for the next version: {error}")
                return
            self._drop(member, str(error))

    def _tell_if_hopeless(self) -> None:
        """End what is being sampled when nobody serves and nobody will."""
        states = [member.health.state for member in self._members.values()]
        coming = self._recoveries or self._expected or (self._publishes_meanwhile and State.STALE in states)
        if not coming and not SERVING.intersection(states):
            self._tell(RLHFError(f"no generator serves a proved version: {self._states()}"))

    def _tell(self, error: BaseException) -> None:
        for dispatch in self._dispatches:
            dispatch.results.put_nowait(error)

    def _states(self) -> str:
        healths = {name: member.health for name, member in self._members.items()}
        return "; ".join(
            f"{name} is {health.state}" + (f" ({health.reason})" if health.state != State.HEALTHY else "")
            for name, health in healths.items()
        )

    async def _watch(self) -> None:
        """While something is sampled: ask silent members for tokens, and drop those that give none in time."""
        try:
            while True:
                await asyncio.sleep(self._poll_s)
                silent = [each for each in self._members.values() if each.health.silent_s() > self._token_s / 4]
                await asyncio.gather(*(self._ask(member) for member in silent))
                for member in silent:
                    if member.health.state in SERVING and member.health.check() == State.DEAD:
                        self._drop(member, member.health.reason)
                        self._recover(member)
        except Exception as error:
            self._tell(error)

    async def _ask(self, member: Member) -> None:
        """Its answer alone is no sign of life: it counts when tokens have come since the last time."""
        handle = member.handle
        try:
            tokens = await within(handle.progress.remote(), self._poll_s, f"{member.name}: progress")
        except (NoAnswerError, RelayLostError):
            return
        except ActorDiedError as error:
            self.lost(member.name, str(error), handle)
            return
        if member.handle is handle and tokens != member.tokens:
            member.tokens = tokens
            self._answered(member)
