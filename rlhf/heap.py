"""Memory that has been freed, given back to the system."""

import ctypes
import itertools
import sys

EVERY = 10
"""Calls of `trim_seldom` for one that trims: memory that was given back costs page faults when it is used again.
Trimming at every call made an update of a 135M model 0.1 s longer."""

_calls = itertools.count(1)


def trim() -> None:
    """Give back what the C library keeps of freed memory, between blocks that are still used and behind them.

    Large buffers of each round come and go beside small ones that stay; without this the gaps between them grow for
    hundreds of rounds. Takes milliseconds; nothing where the library is not glibc.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def trim_seldom() -> None:
    """`trim` at every tenth call in this process, for what happens once a round."""
    if next(_calls) % EVERY == 0:
        trim()
