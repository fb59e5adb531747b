"""Lists of numbers end to end: exact, whatever sequences they come as, and small."""

import pickle
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.packed import IDS, LOGPROBS, Lists, cut, join, logprobs, token_ids

NUMBERS = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), max_size=6)


@given(
    lists=NUMBERS, kinds=st.lists(st.sampled_from([list, tuple, token_ids, lambda ids: array("q", ids)]), min_size=6)
)
def test_lists_come_back_as_arrays_whatever_they_were(lists: list[list[int]], kinds: list[Any]) -> None:
    given = [kind(ids) for ids, kind in zip(lists, kinds, strict=False)]
    assert cut(pickle.loads(pickle.dumps(join(IDS, given)))) == [token_ids(ids) for ids in lists]


@given(values=st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=5), max_size=6))
def test_log_probs_of_an_engine_lose_nothing(values: list[list[float]]) -> None:
    assert [each.tolist() for each in cut(join(LOGPROBS, values))] == values


def test_a_list_of_its_own_is_cut_out_of_any_buffer() -> None:
    values = memoryview(token_ids([1, 2, 3])).cast("B")
    assert cut(Lists(IDS, values, array("q", [1, 1, 3]))) == [token_ids([1]), token_ids([]), token_ids([2, 3])]


def test_a_token_is_four_bytes() -> None:
    joined = join(IDS, [token_ids(range(1000))] * 10)
    assert len(joined.values) == 40_000
    assert len(pickle.dumps(joined)) < 40_500
    assert logprobs([0.0] * 1000).buffer_info()[1] * logprobs([]).itemsize == 4000


def test_an_id_that_does_not_fit_is_no_other_id() -> None:
    with pytest.raises(OverflowError):
        join(IDS, [(2**31,)])
