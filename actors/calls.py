"""Waiting for Ray calls: always with a deadline that names what it waited for."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

import ray

from rlhf.errors import DeadlineError, RLHFError

T = TypeVar("T")


class ActorDiedError(RLHFError):
    """The actor that was called is gone, or cannot be reached."""


class NoAnswerError(DeadlineError):
    """The actor that was called did not answer in time."""


async def within(call: Awaitable[T], deadline: float, what: str) -> T:
    """The call's result; raises `NoAnswerError` naming `what` after `deadline` seconds.

    An `RLHFError` raised in an actor comes out as itself; a dead actor as an `ActorDiedError` that names it.
    """
    try:
        async with asyncio.timeout(deadline):
            return await call
    except TimeoutError:
        raise NoAnswerError(f"{what} did not end within {deadline:.0f} s") from None
    except ray.exceptions.RayTaskError as error:
        raise unwrap(error) from error
    except ray.exceptions.RayActorError as error:
        raise ActorDiedError(f"{what}: the actor died: {first_line(error)}") from error


async def all_within(calls: Sequence[Awaitable[T]], deadline: float, what: str) -> list[T]:
    """`within` for several calls at once; the first failure is raised as soon as it happens."""
    return list(await asyncio.gather(*(within(call, deadline, what) for call in calls)))


async def in_batches(tasks: Sequence["asyncio.Task[T]"], linger: float) -> AsyncIterator[list[T]]:
    """Results as tasks end, those that end within `linger` seconds of the first in one list; raises a task's error."""
    ended: asyncio.Queue[asyncio.Task[T]] = asyncio.Queue()
    for task in tasks:
        task.add_done_callback(ended.put_nowait)
    left = len(tasks)
    while left:
        batch = [await ended.get()]
        await asyncio.sleep(linger if len(batch) < left else 0)
        while not ended.empty():
            batch.append(ended.get_nowait())
        left -= len(batch)
        yield [task.result() for task in batch]


def unwrap(error: ray.exceptions.RayTaskError) -> BaseException:
    """The exception that was raised inside the actor, if it is one of ours; else the Ray error with its traceback."""
    cause: Any = getattr(error, "cause", None)
    return cause if isinstance(cause, RLHFError) else error


def first_line(error: BaseException) -> str:
    """The line of a Ray error that says what happened: the last one that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
