"""Judging a stream of comparisons in order, a few chunks at a time."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence

from rlhf.judging.identical import compare_differing
from rlhf.ports import Judge
from rlhf.records import Comparison, Verdict

CHUNK = 256
"""Comparisons of a chunk: a few engine batches, and small enough for progress to be seen."""

UNDER_WAY = 4
"""Chunks given to the judge at once: it always has the next one while a finished one is taken up."""


async def judge_chunks(
    judge: Judge, chunks: Iterable[Sequence[Comparison]], under_way: int = UNDER_WAY
) -> AsyncGenerator[list[Verdict], None]:
    """The verdicts of each chunk, in order; at most `under_way` chunks are held, so the memory taken is constant.

    Identical responses tie without asking the judge. The first error propagates, and closing the generator cancels
    what is under way: use it in `aclosing`.
    """
    tasks: deque[asyncio.Task[list[Verdict]]] = deque()
    try:
        for chunk in chunks:
            tasks.append(asyncio.create_task(compare_differing(judge, chunk)))
            if len(tasks) >= under_way:
                yield await tasks[0]
                tasks.popleft()
        while tasks:
            yield await tasks[0]
            tasks.popleft()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
