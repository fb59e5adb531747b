"""Checkpoints written in the background, while the next round is sampled."""

import asyncio
import time
from types import TracebackType
from typing import Self

from rlhf.ports import Learner
from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.ledger import Ledger, RoundState


class Saver:
    """Saves the learner and then moves the rounds that the checkpoint covers to TRAINED and PUBLISHED.

    The learner's ranks take calls in order, so a save that is under way when the next round's pairs arrive delays
    them and never sees half a step. One save runs at a time. Leaving the context waits for it, also on an error or a
    stop: what has been trained is kept.
    """

    def __init__(self, learner: Learner, checkpoints: CheckpointStore, ledger: Ledger, every: int):
        self._learner = learner
        self._checkpoints = checkpoints
        self._ledger = ledger
        self._every = every
        self._running: asyncio.Task[float] | None = None
        self._covered: list[int] = []

    async def save(self, round: int, last: bool) -> None:
        """Start a save if one is due, once the one before it has ended."""
        await self.wait()
        self._covered.append(round)
        if last or round % self._every == 0:
            covered, self._covered = self._covered, []
            self._running = asyncio.create_task(self._write(round, covered))
            # The learner gets the call before it can get the next round's pairs.
            await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        """Nothing to prepare."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the save under way; after a failure its own error must not hide the first one."""
        try:
            if kind is None:
                await self.wait()
        finally:
            if self._running is not None:
                await asyncio.wait([self._running])
                # Looked at, since an error that nobody takes would be shown with its traceback.
                self._running.exception()

    async def wait(self) -> float:
        """Wait for the save under way; returns the seconds it took, 0.0 if there was none."""
        if self._running is None:
            return 0.0
        # Shielded: a stop that arrives during this wait must not reach the save itself.
        seconds = await asyncio.shield(self._running)
        self._running = None
        return seconds

    async def _write(self, round: int, covered: list[int]) -> float:
        started = time.monotonic()
        await self._learner.save(self._checkpoints.stage(round))
        await asyncio.to_thread(self._checkpoints.commit, round)
        name = self._checkpoints.path(round).name
        for done in covered:
            commit_trained(self._ledger, done, name)
        return time.monotonic() - started


def commit_trained(ledger: Ledger, round: int, checkpoint: str) -> None:
    """Move a round that `checkpoint` covers to TRAINED and PUBLISHED.

    Its weights were published before they were saved: a round is only called trained once it cannot be lost.
    """
    ledger.commit(round, RoundState.TRAINED, {"checkpoint": checkpoint})
    ledger.commit(round, RoundState.PUBLISHED, {"version": round})
