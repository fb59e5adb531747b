"""Best against worst by the judge's scores, and where it has none."""

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from rlhf.judging.verdicts import make_verdict, sigmoid
from rlhf.records import Comparison, Verdict
from tests.unit.pairing_world import ScoreJudge, group, pairs_of


@settings(deadline=None, max_examples=60)
@given(scores=st.lists(st.one_of(st.none(), st.integers(-4, 4)), min_size=2, max_size=9))
async def test_scores_need_one_look_at_each_response_and_the_final(scores: list[int | None]) -> None:
    known = {f"r{n}": float(score) for n, score in enumerate(scores) if score is not None}
    judge = ScoreJudge(known)
    result = await pairs_of(group(*(f"r{n}" for n in range(len(scores)))), judge, margin=0.0)
    assert len(judge.batches[0]) == math.ceil(len(scores) / 2)
    assert {text for c in judge.batches[0] for text in (c.a, c.b)} == {f"r{n}" for n in range(len(scores))}
    if len(known) >= 2:
        assert [len(batch) for batch in judge.batches[1:]] in ([], [1])
    if len(set(known.values())) > 1:
        [pair] = result.pairs
        assert (known[pair.chosen], known[pair.rejected]) == (max(known.values()), min(known.values()))
        assert pair.p_chosen == pytest.approx(sigmoid(max(known.values()) - min(known.values())))
    else:
        assert result.pairs == ()
    asked = [frozenset((c.a, c.b)) for batch in judge.batches for c in batch]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, math.nan])
@pytest.mark.parametrize("scores", itertools.product([None, math.nan, -math.inf, 0.0, 1.0], repeat=2))
async def test_of_two_responses_the_scores_rank_and_the_verdict_decides(
    scores: tuple[float | None, float | None], p: float
) -> None:
    class Judge:
        async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            return [make_verdict(comparison, p, p, *scores) for comparison in comparisons]

    result = await pairs_of(group("x", "y"), Judge(), margin=0.0)
    a, b = scores
    scored = a is not None and b is not None and math.isfinite(a) and math.isfinite(b)
    best = ("y" if b > a else "x") if scored else ("y" if p < 0.5 else "x")  # type: ignore[operator]
    p_best = p if best == "x" else 1.0 - p
    fate = "dropped_invalid" if math.isnan(p) else "kept" if p_best > 0.5 else "dropped_tie"
    assert {
        name: result.counts[name] for name in ("kept", "dropped_tie", "dropped_invalid") if result.counts[name]
    } == {fate: 1}
    assert [(pair.chosen, pair.p_chosen) for pair in result.pairs] == ([(best, p_best)] if fate == "kept" else [])


async def test_one_verdict_without_scores_is_enough_for_a_round_robin() -> None:
    class Half(ScoreJudge):
        def _verdict(self, comparison: Comparison, a: float | None, b: float | None) -> Verdict:
            verdict = super()._verdict(comparison, a, b)
            return replace(verdict, score_a=None) if comparison.a == "y" else verdict

    judge = Half({"x": 0.0, "w": 1.0, "y": 2.0, "z": 3.0})
    result = await pairs_of(group("x", "w", "y", "z"), judge)
    assert [len(batch) for batch in judge.batches] == [2, 4]
    assert [(pair.chosen, pair.rejected) for pair in result.pairs] == [("z", "x")]
