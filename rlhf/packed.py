"""Numbers end to end: how token ids and log-probs are held, travel between processes and are written.

As a tuple, a response of a thousand tokens is a thousand objects, several times over by the time it is trained: 36
bytes a token id, and as much work as all else that the driver does for it. As an array it is four bytes a token, and
lists of arrays are joined, cut, sent and written by copying memory.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

IDS, LOGPROBS, SEEDS = "i", "f", "q"
"""Kinds of arrays: int32, float32 (what engines compute), int64."""

Numbers: TypeAlias = "array[Any]"


def token_ids(ids: Iterable[int]) -> "array[int]":
    """Token ids as int32; raises `OverflowError` for larger ones."""
    return array(IDS, ids)


def logprobs(values: Iterable[float]) -> "array[float]":
    """Log-probs as float32."""
    return array(LOGPROBS, values)


class Lists(NamedTuple):
    """Lists of numbers of one kind: their bytes end to end, and after how many numbers each ends."""

    kind: str
    values: bytes | memoryview
    ends: "array[int]"


def join(kind: str, lists: Sequence[Sequence[Any]]) -> Lists:
    """The lists end to end, arrays of this kind or any other sequences; raises `OverflowError` as `token_ids` does."""
    values = [each if type(each) is array and each.typecode == kind else array(kind, each) for each in lists]
    return Lists(kind, b"".join(values), array("q", accumulate(map(len, lists))))


def cut(lists: Lists) -> list[Numbers]:
    """The lists again, each an array of its own."""
    values = array(lists.kind)
    values.frombytes(lists.values)
    start, found = 0, []
    for end in lists.ends:
        found.append(values[start:end])
        start = end
    return found
