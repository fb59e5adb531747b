"""Health of one fleet member as a pure state machine, and the budget that restarts are taken from.

Nothing here calls anything: whoever watches a member reports events, and reads from the state what may be done.

| state | meaning | new work | next |
| --- | --- | --- | --- |
| STALE | runs, but has not proved the version that is served | no | HEALTHY by a proof |
| HEALTHY | serves a version that it has proved | yes | SUSPECT, STALE, DEAD |
| SUSPECT | has work and has been silent for half the deadline | no | HEALTHY by an answer, DEAD |
| DEAD | its process is gone, or was silent for the whole deadline | no | RESTARTING |
| RESTARTING | a new process is being started, out of the budget | no | STALE, DEAD |
| RETIRED | gone for good | no | none |

From DEAD and RESTARTING the only way to HEALTHY is through STALE and a proof.
"""

import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum

Clock = Callable[[], float]
"""Seconds on a clock that only runs forward; a jump of the wall clock must not kill anybody."""


class State(StrEnum):
    """What a member is; see the module's table."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"
    RETIRED = "retired"


class Event(StrEnum):
    """What can happen to a member."""

    ANSWERED = "answered"
    MISSED = "missed a deadline"
    DIED = "died"
    RESTART_BEGUN = "restart begun"
    RESTARTED = "restarted"
    PROVED = "version proved"
    OVERTAKEN = "version published elsewhere"
    RETIRED = "retired"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.SUSPECT, Event.ANSWERED): State.HEALTHY,
    (State.HEALTHY, Event.MISSED): State.SUSPECT,
    (State.SUSPECT, Event.MISSED): State.DEAD,
    (State.HEALTHY, Event.DIED): State.DEAD,
    (State.SUSPECT, Event.DIED): State.DEAD,
    (State.STALE, Event.DIED): State.DEAD,
    (State.RESTARTING, Event.DIED): State.DEAD,
    (State.DEAD, Event.RESTART_BEGUN): State.RESTARTING,
    (State.RESTARTING, Event.RESTARTED): State.STALE,
    (State.STALE, Event.PROVED): State.HEALTHY,
    (State.SUSPECT, Event.PROVED): State.HEALTHY,
    (State.HEALTHY, Event.OVERTAKEN): State.STALE,
    (State.SUSPECT, Event.OVERTAKEN): State.STALE,
    **{(state, Event.RETIRED): State.RETIRED for state in State},
}
"""All changes of state. Any other event leaves the state as it is: news of a process can come after its end."""

RUNNING = frozenset({State.HEALTHY, State.SUSPECT, State.STALE})
"""States of a member whose process is there, as far as anybody knows."""

SERVING = frozenset({State.HEALTHY, State.SUSPECT})
"""States of a member that has proved the version being served; only HEALTHY ones get new work."""


def after(state: State, event: Event) -> State:
    """The state after an event."""
    return TRANSITIONS.get((state, event), state)


class RestartBudget:
    """At most `budget` restarts in any window of `window_s` seconds, shared by all who draw from it."""

    def __init__(self, budget: int, window_s: float, clock: Clock = time.monotonic):
        self.budget = budget
        self.window_s = window_s
        self.taken = 0
        """Restarts taken in all."""
        self._clock = clock
        self._times: deque[float] = deque()

    def left(self) -> int:
        """Restarts that could begin now."""
        oldest = self._clock() - self.window_s
        while self._times and self._times[0] <= oldest:
            self._times.popleft()
        return self.budget - len(self._times)

    def take(self) -> bool:
        """Take one restart; False, and nothing taken, if none is left."""
        if self.left() <= 0:
            return False
        self._times.append(self._clock())
        self.taken += 1
        return True

    def __str__(self) -> str:
        return f"{self.budget} in {self.window_s:.0f} s"


class ProgressBudget(RestartBudget):
    """A share in another budget for one whose every restart repeats work: no more than that budget between two steps
    forward, however long each try takes."""

    def __init__(self, shared: RestartBudget):
        super().__init__(shared.budget, shared.window_s)
        self._shared = shared

    def progressed(self) -> None:
        """Something was gained that no restart repeats."""
        self.taken = 0

    def left(self) -> int:
        """Restarts that could begin now."""
        return min(self._shared.left(), self.budget - self.taken)

    def take(self) -> bool:
        """Take one restart, of the shared budget too; False, and nothing taken, if none is left."""
        if self.left() <= 0:
            return False
        self.taken += 1
        return self._shared.take()

    def __str__(self) -> str:
        return f"{self._shared}, or without progress"


class Health:
    """The state of one member, which starts STALE.

    `deadline_s` is how long it may have work and give nothing. Without work nothing is expected of it.
    """

    def __init__(self, budget: RestartBudget, deadline_s: float, clock: Clock = time.monotonic):
        self.state = State.STALE
        self.version: int | None = None
        """The version that it proved last; None in a process that has proved none."""
        self.reason = ""
        """Why it is not HEALTHY, where that is known."""
        self._budget = budget
        self._deadline_s = deadline_s
        self._clock = clock
        self._wanted: int | None = None
        self._heard: float | None = None

    def working(self) -> None:
        """It has work from now on, unless it had some already."""
        if self._heard is None:
            self._heard = self._clock()

    def idle(self) -> None:
        """It has no work left; nothing is expected of it."""
        self._heard = None
        self._happen(Event.ANSWERED)

    def answered(self) -> None:
        """It gave something: a response, or a token of one."""
        if self._heard is not None:
            self._heard = self._clock()
        self._happen(Event.ANSWERED)

    def silent_s(self) -> float:
        """Seconds since it gave something, or since it was given work; 0.0 without work."""
        return 0.0 if self._heard is None else self._clock() - self._heard

    def check(self) -> State:
        """Look at the clock: silent for half the deadline is SUSPECT, for all of it DEAD; returns the state.

        Nobody dies of one look: the silence may be that of a watcher who was stopped himself.
        """
        silent = self.silent_s()
        if self.state == State.HEALTHY and silent >= self._deadline_s / 2:
            self._happen(Event.MISSED, f"gave nothing for {silent:.0f} s")
        elif self.state == State.SUSPECT and silent >= self._deadline_s:
            self._happen(Event.MISSED, f"had work and gave nothing for {silent:.0f} s")
        return self.state

    def died(self, reason: str) -> None:
        """Its process is gone, or has to be counted as gone."""
        self._happen(Event.DIED, reason)

    def begin_restart(self) -> bool:
        """A new process is about to be started; False if it is not DEAD or the budget is spent."""
        if self.state != State.DEAD or not self._budget.take():
            return False
        self._happen(Event.RESTART_BEGUN)
        return True

    def restarted(self) -> None:
        """The new process is there; it has proved nothing yet."""
        self._happen(Event.RESTARTED)

    def proved(self, version: int) -> bool:
        """It has proved `version`; returns whether it serves it: not if another one is served by now."""
        if self.state not in RUNNING or self._wanted not in (None, version):
            return False
        self.version = version
        self._happen(Event.PROVED)
        return True

    def published(self, version: int) -> None:
        """`version` is served from now on: whoever has proved another one is STALE.

        It may have a smaller number, after a learner went back to a checkpoint.
        """
        self._wanted = version
        if self.version != version:
            self.overtaken()

    def overtaken(self) -> None:
        """Others serve a version that it has not proved."""
        self._happen(Event.OVERTAKEN, "has not proved the version that is served")

    def retire(self, reason: str) -> None:
        """It is gone for good."""
        self._happen(Event.RETIRED, reason)

    def _happen(self, event: Event, reason: str = "") -> None:
        before, self.state = self.state, after(self.state, event)
        if self.state == before:
            return
        self.reason = reason
        if self.state not in RUNNING:
            self._heard = self.version = None
