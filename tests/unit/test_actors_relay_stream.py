"""A stream that goes through a relay, part by part, without Ray."""

import asyncio

import pytest

from actors.relay import Part, Stream

ITEM, OTHER, END = Part(0, "item", "a"), Part(0, "item", "b"), Part(0, "end", None)


async def read(stream: Stream) -> list[str]:
    return [await reference async for reference in stream]


@pytest.mark.parametrize("early", range(4), ids="{} parts are there before the reader".format)
async def test_items_come_in_order_however_early_they_are_there(early: int) -> None:
    stream, parts = Stream(), [ITEM, OTHER, END]
    for part in parts[:early]:
        stream.give(part)
    reader = asyncio.create_task(read(stream))
    for part in parts[early:]:
        await asyncio.sleep(0)
        assert not stream.done()
        stream.give(part)
    assert await reader == ["a", "b"]
    assert stream.done()


async def test_parts_of_one_moment_wake_the_reader_once_and_are_all_read() -> None:
    stream = Stream()
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    for part in (ITEM, OTHER, END):
        stream.give(part)
    assert await reader == ["a", "b"]


async def test_an_error_comes_after_what_was_given_before_it() -> None:
    stream = Stream()
    stream.give(ITEM)
    stream.give(Part(0, "error", ValueError("broken")))
    assert await (await anext(stream)) == "a"
    with pytest.raises(ValueError, match="broken"):
        await anext(stream)


async def test_a_reader_that_was_stopped_is_given_nothing_and_costs_no_part() -> None:
    stream = Stream()
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.sleep(0)
    # Whoever gives knows nothing of it, and has other streams to see to.
    stream.give(ITEM)
    stream.give(END)
    assert await read(stream) == ["a"]


async def test_a_reader_that_is_stopped_just_when_a_part_has_come_leaves_it_there() -> None:
    stream = Stream()
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    stream.give(ITEM)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    stream.give(END)
    assert await read(stream) == ["a"]
