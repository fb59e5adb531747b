"""The schedule is a pure function of its seed and holds everything."""

import itertools
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.schedule import DELAY_S, UNRELAYED, Kind, Moment, schedule

SEEDS = st.integers(0, 2**63)


@given(seed=SEEDS, count=st.integers(0, 80))
def test_a_schedule_is_a_pure_function_of_its_seed(seed: int, count: int) -> None:
    found = schedule(seed, count)
    random.seed(count)
    random.random()
    assert schedule(seed, count) == found
    assert [fault.round for fault in found] == list(range(1, count + 1))
    assert all(0 <= fault.delay_s <= DELAY_S[fault.moment] and 0 <= fault.choice < 1 for fault in found)


@given(seed=SEEDS, decks=st.integers(1, 5))
def test_it_covers_every_kind_and_every_moment_evenly(seed: int, decks: int) -> None:
    found = schedule(seed, decks * len(UNRELAYED))
    assert Counter(fault.kind for fault in found) == dict.fromkeys(UNRELAYED, decks)
    moments = Counter(fault.moment for fault in found)
    assert moments.keys() == set(Moment)
    assert max(moments.values()) - min(moments.values()) <= 1


@given(seed=SEEDS, kinds=st.sets(st.sampled_from(list(Kind)), min_size=1))
def test_only_kinds_that_were_asked_for_come(seed: int, kinds: set[Kind]) -> None:
    assert {fault.kind for fault in schedule(seed, len(kinds), sorted(kinds))} == kinds


def test_other_seeds_give_other_schedules() -> None:
    found = [schedule(seed, len(UNRELAYED)) for seed in range(20)]
    assert all(one != other for one, other in itertools.combinations(found, 2))
    # Not always the same fault in the same state.
    assert len({(fault.kind, fault.moment) for faults in found for fault in faults}) > 80
