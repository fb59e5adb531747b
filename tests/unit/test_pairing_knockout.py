"""Knockout: the true best and worst in a linear number of comparisons, and no guess from any table of verdicts."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.pairing import Pairing
from rlhf.judging.verdicts import make_verdict
from rlhf.records import Comparison, Message, Prompt, Rollout, Verdict, VerdictState, VersionSpan
from rlhf.rounds.pairing import Group, PairingResult, make_pairs

PROMPT = Prompt("p", (Message(role="user", content="Hi"),), "<user>Hi", (7, 8))


class TableJudge:
    """p(A wins) by the two sample numbers, the smaller first; NaN is invalid."""

    def __init__(self, table: dict[tuple[int, int], float]) -> None:
        self.table = table
        self.asked: list[tuple[int, int]] = []
        self.batches = 0

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.batches += 1
        self.asked += [(c.index_a, c.index_b) for c in comparisons]
        return [make_verdict(c, p, p) for c in comparisons for p in [self.table[c.index_a, c.index_b]]]


async def play(judge: TableJudge, count: int) -> PairingResult:
    group = [Rollout("p", k, (k + 1,), (-0.5,), f"r{k}", "stop", (VersionSpan(0, 0, 1),)) for k in range(count)]
    config = Pairing(strategy="knockout", min_margin=0.0)
    [result] = await make_pairs([Group(PROMPT, group, np.random.default_rng(0))], judge, config, 1)
    return result


def by_rank(ranks: Sequence[int]) -> TableJudge:
    """A transitive judge: the higher rank wins, equal ranks tie."""
    n = range(len(ranks))
    return TableJudge({(i, j): 0.5 + 0.4 * float(np.sign(ranks[i] - ranks[j])) for i in n for j in n if i < j})


def bound(count: int) -> int:
    """Matches for best, for worst, and the final."""
    return (count - 1) + (math.ceil(count / 2) - 1) + 1


@pytest.mark.parametrize("count", range(2, 10))
@settings(deadline=None, max_examples=40)
@given(data=st.data())
async def test_transitive_judge_finds_best_and_worst_within_the_bound(count: int, data: st.DataObject) -> None:
    ranks = data.draw(st.permutations(range(count)))
    judge = by_rank(ranks)
    [pair] = (await play(judge, count)).pairs
    assert (pair.chosen, pair.rejected) == (f"r{ranks.index(count - 1)}", f"r{ranks.index(0)}")
    assert pair.p_chosen == pytest.approx(0.9)
    assert len(judge.asked) <= bound(count)
    assert judge.batches <= math.ceil(math.log2(count)) + 1, "a level of both brackets is one batch"


@settings(deadline=None, max_examples=100)
@given(ranks=st.lists(st.integers(0, 2), min_size=2, max_size=9))
async def test_ties_are_no_obstacle_to_a_clear_best_and_worst(ranks: list[int]) -> None:
    judge = by_rank(ranks)
    result = await play(judge, len(ranks))
    assert len(judge.asked) <= bound(len(ranks))
    if len(set(ranks)) == 1:
        assert (result.pairs, result.counts["dropped_tie"]) == ((), 1)
    else:
        [pair] = result.pairs
        assert ranks[int(pair.chosen[1:])] == max(ranks)
        assert ranks[int(pair.rejected[1:])] == min(ranks)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), count=st.integers(2, 9))
async def test_no_guess_from_any_table_of_verdicts(data: st.DataObject, count: int) -> None:
    values = st.sampled_from([0.1, 0.5, 0.9, math.nan])
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    judge = TableJudge({pair: data.draw(values) for pair in pairs})
    result = await play(judge, count)
    assert len(set(judge.asked)) == len(judge.asked) <= min(len(pairs), 4 * count)
    assert sum(result.counts[name] for name in ("kept", "dropped_tie", "dropped_invalid")) == 1
    for pair in result.pairs:
        k = int(pair.chosen[1:]), int(pair.rejected[1:])
        [verdict] = [v for v in result.verdicts if {v.comparison.index_a, v.comparison.index_b} == set(k)]
        won = VerdictState.WIN if verdict.comparison.index_a == k[0] else VerdictState.LOSE
        assert verdict.state is won
        assert pair.p_chosen == pytest.approx(0.9)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), count=st.integers(4, 9))
async def test_one_response_that_cannot_be_judged_is_left_out(data: st.DataObject, count: int) -> None:
    ranks = data.draw(st.permutations(range(count)))
    odd = data.draw(st.integers(0, count - 1))
    judge = by_rank(ranks)
    judge.table = {pair: math.nan if odd in pair else p for pair, p in judge.table.items()}
    [pair] = (await play(judge, count)).pairs
    others = sorted((rank, k) for k, rank in enumerate(ranks) if k != odd)
    assert (pair.chosen, pair.rejected) == (f"r{others[-1][1]}", f"r{others[0][1]}")


async def test_a_circle_of_verdicts_ranks_nothing() -> None:
    # 0 beats 1; 2, which sat out, then beats 0 for best and loses to 1 for worst.
    judge = TableJudge({(0, 1): 0.9, (0, 2): 0.1, (1, 2): 0.9})
    result = await play(judge, 3)
    assert len(judge.asked) == 3
    assert (result.pairs, result.counts["dropped_tie"]) == ((), 1)
