"""Calls to the ranks of a learner, which are lost together.

Ranks meet in collectives: one that is gone or hangs holds up all others for as long as a collective may take. So the
first bad news of any rank ends every call that is under way.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import ray
import torch.distributed as dist

from actors.calls import first_line, unwrap
from rlhf.errors import LearnerLostError

T = TypeVar("T")

NEWS_S = 5.0
"""How long to wait for the news that a rank died: its neighbours notice at once, the cluster a little later."""


DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
)


class Ranks:
    """One generation of ranks: a lost one is never called again."""

    def __init__(self, handles: Sequence[Any]):
        self.handles = list(handles)
        self.loss = ""
        """Why they are lost; empty while they are not."""
        self._waiting: set[asyncio.Future[None]] = set()

    def check(self) -> None:
        """Raise `LearnerLostError` if they are lost."""
        if self.loss:
            raise LearnerLostError(f"learner: {self.loss}")

    async def all(self, method: str, deadline: float, what: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank; see `together`."""
        self.check()
        calls = [getattr(handle, method).remote(*arguments) for handle in self.handles]
        return await self.together(calls, deadline, what)

    async def together(self, calls: Sequence[Awaitable[T]], deadline: float, what: str) -> list[T]:
        """The results of one call to each of the first ranks.

        Raises `LearnerLostError` naming `what` as soon as a rank is gone, a collective fails, or `deadline` seconds
        have passed, and with every other call that learns of it. What a rank raises itself comes out as `unwrap`
        gives it.
        """
        told = asyncio.get_running_loop().create_future()
        self._waiting.add(told)
        if self.loss:
            told.set_result(None)
        tasks = [asyncio.ensure_future(call) for call in calls]
        work = asyncio.create_task(_results(tasks))
        try:
            await asyncio.wait({work, told}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                if error := work.exception():
                    await self._explain(error, tasks, what)
                return work.result()
            if not self.loss:
                self._lose(f"{what} did not end within {deadline:.0f} s: a rank hangs")
            raise LearnerLostError(f"learner: {self.loss}")
        finally:
            self._waiting.discard(told)
            for task in (work, *tasks):
                task.cancel()

    async def look(self, what: str = "") -> bool:
        """Whether a rank is gone, during `what`. One that is at work counts as being there."""
        if not self.loss:
            pings = [asyncio.ensure_future(_there(handle)) for handle in self.handles]
            ended, waiting = await asyncio.wait(pings, timeout=NEWS_S, return_when=asyncio.FIRST_EXCEPTION)
            for ping in waiting:
                ping.cancel()
            for rank, ping in enumerate(pings):
                if ping in ended and (error := ping.exception()):
                    self._died(rank, error, what)
        return bool(self.loss)

    async def _explain(self, error: BaseException, tasks: "Sequence[asyncio.Future[T]]", what: str) -> None:
        """Raise what a failed call means if that is another error: the loss of the ranks, or what a rank raised."""
        rank = next((n for n, task in enumerate(tasks) if task.done() and _failure(task) is error), 0)
        if isinstance(error, ray.exceptions.RayTaskError):
            if (cause := unwrap(error)) is not error:
                raise cause from error
            if not await self.look(what) and broken_collective(error):
                self._lose(f"{what}: rank {rank} waited for others in vain: {first_line(error)}")
        elif isinstance(error, ray.exceptions.RayError):
            self._died(rank, error, what)
        if self.loss:
            raise LearnerLostError(f"learner: {self.loss}") from error

    def _died(self, rank: int, error: BaseException, what: str) -> None:
        during = f" ({what})" if what else ""
        if not isinstance(error, DEATHS):
            # Of its answer nothing is known, and neither is where it stands: it counts as lost.
            self._lose(f"rank {rank} gave no answer that can be read{during}: {first_line(error)}")
            return
        killed = "its node has died" not in str(error)
        hint = " (without memory left the system kills the largest process: lower learner.micro_batch_size, or see "
        self._lose(f"rank {rank} died{during}: {first_line(error)}" + (hint + "`rlhf validate`)" if killed else ""))

    def _lose(self, reason: str) -> None:
        self.loss = self.loss or reason
        for told in self._waiting:
            if not told.done():
                told.set_result(None)


def broken_collective(error: ray.exceptions.RayTaskError) -> bool:
    """Did a rank fail because the others were not there? Gloo has no exception of its own, NCCL has."""
    cause = getattr(error, "cause", None)
    return isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and "gloo" in str(cause))


async def _results(tasks: "Sequence[asyncio.Future[T]]") -> list[T]:
    return list(await asyncio.gather(*tasks))


async def _there(handle: Any) -> None:
    await handle.__ray_ready__.remote()


def _failure(task: "asyncio.Future[Any]") -> BaseException | None:
    return None if task.cancelled() else task.exception()
