"""How work is cut for generators, and how what they give is put together: no Ray."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.calls import in_batches
from actors.dispatch import CHUNK, LARGEST_CHUNK, PARTS, chunk_size, least_chunk


@settings(deadline=None)
@given(prompts=st.integers(0, 50_000), streams=st.integers(1, 50))
def test_chunks_cover_a_round_and_shrink_towards_its_end(prompts: int, streams: int) -> None:
    sizes: list[int] = []
    least = least_chunk(prompts, streams)
    while (left := prompts - sum(sizes)) > 0:
        sizes.append(chunk_size(left, streams, least))
    assert sum(sizes) == prompts
    assert sizes == sorted(sizes, reverse=True)
    assert all(CHUNK <= size <= max(least, LARGEST_CHUNK) for size in sizes[:-1])
    # No stream takes more than half an even share, nor leaves more than a part of one for last.
    assert all(size <= max(CHUNK, prompts / (2 * streams)) for size in sizes)
    assert all(size <= max(CHUNK, prompts / (PARTS * streams)) for size in sizes[-streams:] if len(sizes) > streams)
    # The streams bound the calls, however large the round: PARTS each, or five quarters of it for whole prompts.
    assert len(sizes) <= 1.25 * PARTS * streams + prompts / LARGEST_CHUNK + 1


def test_small_rounds_go_out_in_the_smallest_chunks() -> None:
    assert [chunk_size(left, 34) for left in (32, 5, 4, 1)] == [CHUNK, CHUNK, CHUNK, 1]
    assert chunk_size(100_000, 1) == LARGEST_CHUNK
    # 100,000 prompts for 512 streams: 195 each on average, of which a sixteenth is 12.
    assert (least_chunk(100_000, 512), least_chunk(1_000, 250)) == (12, CHUNK)


async def ends_after(value: int, gate: asyncio.Event) -> int:
    await gate.wait()
    return value


async def test_results_that_end_together_come_together() -> None:
    early, late = asyncio.Event(), asyncio.Event()
    tasks = [asyncio.create_task(ends_after(n, late if n > 6 else early)) for n in range(10)]
    early.set()
    batches = []
    async with asyncio.timeout(20):
        async for batch in in_batches(tasks, 0.1):
            batches.append(sorted(batch))
            late.set()
    assert batches == [list(range(7)), [7, 8, 9]]


async def test_without_lingering_a_result_does_not_wait() -> None:
    gates = [asyncio.Event() for _ in range(4)]
    tasks = [asyncio.create_task(ends_after(n, gates[n])) for n in range(3)]
    gates[0].set()
    batches = []
    async with asyncio.timeout(20):
        async for batch in in_batches(tasks, 0.0):
            batches.append(batch)
            gates[len(batches)].set()  # the next one ends only once this one has come
    assert batches == [[0], [1], [2]]
    assert [batch async for batch in in_batches([], 1.0)] == []


async def test_a_failed_task_raises() -> None:
    async def fails() -> int:
        raise ValueError("no such token")

    tasks = [asyncio.create_task(ends_after(1, asyncio.Event())), asyncio.create_task(fails())]
    with pytest.raises(ValueError, match="no such token"):
        await anext(in_batches(tasks, 0.0))
    tasks[0].cancel()
