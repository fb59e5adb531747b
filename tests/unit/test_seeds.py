"""Derived seeds: the same in every process and on every machine, and distinct wherever the parts are."""

import subprocess
import sys

from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf.seeds import derive_seed, derive_seeds

PARTS = st.lists(st.integers(-(2**70), 2**70) | st.text("0123456789ab-/ é", max_size=6), max_size=5)


def test_pinned_values() -> None:
    """These may never change: a resumed run would sample other responses than the run it continues."""
    assert derive_seed(1, "23") == 2286299062006556078
    assert derive_seed(0, "uid", 3, 1) == 3203019410083991124


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = "from rlhf.seeds import derive_seed; print(derive_seed(7, '0badcafe-0', 'evaluation', 2))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {str(derive_seed(7, "0badcafe-0", "evaluation", 2))}


def test_the_cut_between_parts_counts() -> None:
    assert derive_seed(1, "23") != derive_seed(12, "3")
    assert derive_seed("ab", "c") != derive_seed("a", "bc") != derive_seed("abc")
    assert derive_seed(1) != derive_seed("1")
    assert derive_seed(1, 2) != derive_seed(2, 1)


@given(
    seed=st.integers(-(2**70), 2**70),
    uids=st.lists(st.text("0123456789ab-/ é", max_size=6), max_size=4),
    scope=st.integers(0, 2**70) | st.text(max_size=6),
    count=st.integers(1, 12),
)
def test_seeds_of_many_prompts_are_those_of_their_numbers(
    seed: int, uids: list[str], scope: int | str, count: int
) -> None:
    found = derive_seeds(seed, uids, scope, count)
    assert found == [tuple(derive_seed(seed, uid, scope, k) for k in range(count)) for uid in uids]
    assert all(type(each) is int for seeds in found for each in seeds)


@given(first=PARTS, second=PARTS)
def test_distinct_parts_give_distinct_seeds(first: list[int | str], second: list[int | str]) -> None:
    assume(first != second)
    assert derive_seed(*first) != derive_seed(*second)


@given(parts=PARTS)
def test_fits_a_signed_64_bit_field(parts: list[int | str]) -> None:
    assert 0 <= derive_seed(*parts) < 2**63


def test_seeds_spread_over_the_whole_range() -> None:
    """Each of the 63 bits is one in about half of 2,000 seeds (5 standard deviations: 112)."""
    seeds = [derive_seed(0, "uid", 1, k) for k in range(2000)]
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - 1000) < 112, bit
