"""What a call of an actor costs Ray's driver, whatever it is for: nothing is computed, on either side.

    python bench/calls.py [--calls 1024]

Actors answer with what they were given: eight rows, as of four prompts' responses. So many calls at a time are made
from one event loop, as the loop's are. Processor time is the driver's, of all its threads: a controller cannot go below
it, however little it does itself. Less than a minute.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray

from actors.cluster import connect
from rlhf.config.system import Cluster

ACTORS = 14
ROWS = [(f"{n:016x}", tuple(range(16)), (-0.5,) * 16, "some words") for n in range(8)]
WIDTHS = (8, 256)


class Echo:
    """Gives back what it gets."""

    async def once(self, rows: Any) -> Any:
        """As an answer."""
        return rows

    async def streamed(self, rows: Any) -> Any:
        """As the only item of a stream."""
        yield rows


async def answered(handle: Any) -> None:
    """A call and its answer."""
    await handle.once.remote(ROWS)


async def to_the_end(handle: Any) -> None:
    """A stream, until it says that it has ended."""
    async for reference in handle.streamed.options(num_returns="streaming").remote(ROWS):
        await reference


async def to_the_item(handle: Any) -> None:
    """A stream, until its item is there."""
    async for reference in handle.streamed.options(num_returns="streaming").remote(ROWS):
        await reference
        break


KINDS: dict[str, Callable[[Any], Awaitable[None]]] = {
    "a call and its answer": answered,
    "a stream of one item, up to that": to_the_item,
    "a stream of one item, to its end": to_the_end,
}


async def together(call: Callable[[Any], Awaitable[None]], handles: list[Any], calls: int, width: int) -> None:
    """Make `calls` calls, `width` of them under way."""
    numbers = iter(range(calls))

    async def work() -> None:
        for number in numbers:
            await call(handles[number % len(handles)])

    await asyncio.gather(*(work() for _ in range(width)))


def main() -> None:
    """Print a row for each kind of call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1024)
    options = parser.parse_args()
    with connect("bench-calls", Cluster(), 256 << 20):
        actor = ray.remote(Echo).options(max_concurrency=10_000, num_cpus=0)
        handles = [actor.remote() for _ in range(ACTORS)]
        ray.get([handle.once.remote(ROWS) for handle in handles])
        print("| what | at a time | driver's processor, µs a call | clock, µs a call |\n| --- | --- | --- | --- |")
        for what, call in KINDS.items():
            for width in WIDTHS:
                asyncio.run(together(call, handles, options.calls // 4, width))
                clock, processor = time.perf_counter(), time.process_time()
                asyncio.run(together(call, handles, options.calls, width))
                took = [(end - start) / options.calls * 1e6 for end, start in
                        ((time.process_time(), processor), (time.perf_counter(), clock))]  # fmt: skip
                print(f"| {what} | {width} | {took[0]:.0f} | {took[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
