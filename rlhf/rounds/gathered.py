"""Work on what is finished at the same time, as one task: a task for each prompt costs more than what it does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

TOGETHER = 64
"""Items of one task at most: those that end a task together are waited for together."""


class Gathered(Generic[Item, Result]):
    """Items that are added without a pause of the event loop are worked on by one task, up to `TOGETHER`.

    What arrives in one message, or while the loop is busy, stays together; a single item does not wait for another.
    """

    def __init__(self, tasks: asyncio.TaskGroup, work: Callable[[list[Item]], Awaitable[list[Result]]]):
        """`work` gives one result an item; its tasks belong to `tasks`, which a failure ends."""
        self._group = tasks
        self._work = work
        self._waiting: list[Item] = []
        self._tasks: list[asyncio.Task[list[Result]]] = []
        self._open = True
        self.count = 0
        """Items that were added."""

    async def __aenter__(self) -> Self:
        """Nothing to prepare."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Begin nothing any more."""
        self._open = False

    def add(self, item: Item) -> None:
        """Work on an item, from the next turn of the event loop on."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._begin)
        self._waiting.append(item)
        self.count += 1
        if len(self._waiting) == TOGETHER:
            self._begin()

    async def results(self) -> AsyncIterator[list[Result]]:
        """The results of each task, in the order in which they began; nothing may be added meanwhile."""
        self._begin()
        for task in self._tasks:
            yield await task

    def _begin(self) -> None:
        if self._waiting and self._open:
            items, self._waiting = self._waiting, []
            self._tasks.append(self._group.create_task(self._run(items)))

    async def _run(self, items: list[Item]) -> list[Result]:
        return await self._work(items)
