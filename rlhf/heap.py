"""Memory that has been freed, given back to the system."""

import ctypes
import sys


def trim() -> None:
    """Give back what the C library keeps of freed memory, between blocks that are still used and behind them.

    Large buffers of each round come and go beside small ones that stay; without this the gaps between them grow for
    hundreds of rounds. Takes milliseconds; nothing where the library is not glibc.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)
