"""Python's collector of cycles, told that a round's records have none."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from rlhf.heap import trim_seldom

ALL_EVERY = 10
"""Rounds between two looks at everything."""

YOUNG = 1_000_000
"""Objects that are made, and not freed again, between two looks at the youngest of them (Python's default is 700)."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for cycles seldom: a large round makes millions of records, all of them trees that free themselves, and
    looking at them over and over takes as long as making them (`bench/overlap.py`).

    What is there at the start, imported modules above all, is not looked at again before the end.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(YOUNG, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def collect(round: int) -> None:
    """At the end of a round: what its tasks and errors left in cycles is freed.

    Old objects are looked at with every tenth round, new ones are few by then; and what the C library has kept of freed
    memory goes back to the system as often.
    """
    gc.collect(2 if round % ALL_EVERY == 0 else 1)
    pa.default_memory_pool().release_unused()
    trim_seldom()
