"""Items that are there together are worked on together, alone ones at once, and none twice."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rounds.gathered import TOGETHER, Gathered


class Work:
    """Doubles numbers and keeps what it was given at a time."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []

    async def __call__(self, items: list[int]) -> list[int]:
        self.given.append(items)
        await asyncio.sleep(0)
        return [2 * item for item in items]


@given(bursts=st.lists(st.integers(0, 2 * TOGETHER + 3), max_size=5))
def test_a_burst_is_worked_on_together_and_every_item_once(bursts: list[int]) -> None:
    async def run() -> None:
        work, results = Work(), []
        ends = [sum(bursts[:n]) for n in range(len(bursts) + 1)]
        async with asyncio.TaskGroup() as tasks, Gathered(tasks, work) as gathered:
            for start, end in pairwise(ends):
                for item in range(start, end):
                    gathered.add(item)
                await asyncio.sleep(0)
            async for part in gathered.results():
                results += part
        assert results == [2 * item for item in range(sum(bursts))]
        assert gathered.count == sum(bursts)
        assert max(map(len, work.given), default=0) <= TOGETHER
        assert len(work.given) == sum(-(-burst // TOGETHER) for burst in bursts)

    asyncio.run(run())


async def test_an_item_does_not_wait_for_others() -> None:
    work = Work()
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks, Gathered(tasks, work) as gathered:
        gathered.add(7)
        while not work.given:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0)
        gathered.add(8)
        assert [part async for part in gathered.results()] == [[14], [16]]


async def test_a_failure_ends_the_group_and_what_waits_for_it() -> None:
    async def fail(items: list[int]) -> list[int]:
        raise ValueError("no verdict")

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks, Gathered(tasks, fail) as gathered:
            gathered.add(1)
            assert [part async for part in gathered.results()] == []

    with pytest.raises(ExceptionGroup) as error:
        await run()
    assert error.group_contains(ValueError, match="no verdict")


async def test_what_was_added_last_is_dropped_with_the_round() -> None:
    """A round that fails while an item waits for the loop's next turn: its task could not belong to anybody."""
    work = Work()
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks, Gathered(tasks, work) as gathered:
            gathered.add(1)
            raise ValueError("the generators are gone")

    with pytest.raises(ExceptionGroup):
        await run()
    await asyncio.sleep(0)
    assert (work.given, errors) == ([], [])
