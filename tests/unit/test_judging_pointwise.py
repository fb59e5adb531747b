"""Judges that score one response alone: what is scored, and how two scores become a verdict."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.judging.pointwise import Answer, Score, bradley_terry, compare_by_score
from rlhf.records import Comparison, Message, VerdictState

RAIN = (Message(role="user", content="Rain?"),)
SNOW = (Message(role="user", content="Snow?"),)
NUMBERS = st.floats(-20, 20)
MIRRORED = {VerdictState.WIN: VerdictState.LOSE, VerdictState.LOSE: VerdictState.WIN}


class Table:
    """A score function that looks scores up by response, and remembers what it was asked."""

    def __init__(self, scores: dict[str, Score]) -> None:
        self.scores = scores
        self.asked: list[list[Answer]] = []

    async def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        self.asked.append(list(answers))
        return [self.scores[answer.response] for answer in answers]


async def test_each_distinct_answer_is_scored_once() -> None:
    table = Table({text: Score(float(number)) for number, text in enumerate("xyz")})
    comparisons = [
        Comparison("r", RAIN, "x", "y"),
        Comparison("r", RAIN, "z", "x"),
        Comparison("s", SNOW, "x", "y"),
        Comparison("r", RAIN, "x", "y", reference="7"),
        Comparison("r2", RAIN, "y", "z"),
    ]
    verdicts = await compare_by_score(comparisons, table, bradley_terry(1.0))
    [asked] = table.asked
    assert [(answer.messages[0]["content"][0], answer.response, answer.reference) for answer in asked] == [
        ("R", "x", None),
        ("R", "y", None),
        ("R", "z", None),
        ("S", "x", None),
        ("S", "y", None),
        ("R", "x", "7"),
        ("R", "y", "7"),
    ]
    assert [(verdict.score_a, verdict.score_b) for verdict in verdicts] == [(0, 1), (2, 0), (0, 1), (0, 1), (1, 2)]
    assert [verdict.comparison for verdict in verdicts] == comparisons


async def test_probability_is_the_logistic_of_the_scaled_difference() -> None:
    table = Table({"x": Score(1.25), "y": Score(0.25)})
    [verdict] = await compare_by_score([Comparison("r", RAIN, "x", "y")], table, bradley_terry(3.0))
    assert verdict.p_ab == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-12)
    assert verdict.p_ba == verdict.p_ab
    assert (verdict.state, verdict.score_a, verdict.score_b) == (VerdictState.WIN, 1.25, 0.25)


@settings(deadline=None)
@given(a=NUMBERS, b=NUMBERS, scale=st.floats(0.01, 10))
async def test_swapping_the_responses_mirrors_the_verdict(a: float, b: float, scale: float) -> None:
    table = Table({"a": Score(a), "b": Score(b)})
    comparisons = [Comparison("r", RAIN, "a", "b"), Comparison("r", RAIN, "b", "a")]
    there, back = await compare_by_score(comparisons, table, bradley_terry(scale))
    assert there.p + back.p == pytest.approx(1.0, abs=1e-12)
    assert (there.score_a, there.score_b) == (back.score_b, back.score_a)
    assert back.state is MIRRORED.get(there.state, there.state)
    assert a != b or there.state is VerdictState.TIE


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (Score(None, "is blank"), "is blank"),
        (Score(math.nan), "has no finite score: nan"),
        (Score(math.inf), "has no finite score: inf"),
        (Score(-math.inf), "has no finite score: -inf"),
    ],
)
async def test_answer_without_a_finite_score_is_invalid(score: Score, reason: str) -> None:
    table = Table({"bad": score, "good": Score(2.0)})
    comparisons = [
        Comparison("r", RAIN, "bad", "good"),
        Comparison("r", RAIN, "good", "bad"),
        Comparison("r", RAIN, "bad", "bad"),
    ]
    verdicts = await compare_by_score(comparisons, table, bradley_terry(1.0))
    assert [verdict.state for verdict in verdicts] == [VerdictState.INVALID] * 3
    assert [verdict.reason for verdict in verdicts] == [f"response {side} {reason}" for side in "ABA"]
    assert [(verdict.score_a, verdict.score_b) for verdict in verdicts] == [(None, 2), (2, None), (None, None)]
    assert all(math.isnan(verdict.p_ab) and math.isnan(verdict.p_ba) for verdict in verdicts)


async def test_truncated_if_either_conversation_was_cut() -> None:
    table = Table({"cut": Score(1.0, truncated=True), "whole": Score(1.0), "none": Score(None, "is odd")})
    pairs = [("cut", "whole"), ("whole", "cut"), ("whole", "whole"), ("none", "cut")]
    verdicts = await compare_by_score([Comparison("r", RAIN, a, b) for a, b in pairs], table, bradley_terry(1.0))
    assert [verdict.truncated for verdict in verdicts] == [True, True, False, True]


async def test_a_score_function_that_leaves_one_out_is_an_error() -> None:
    async def forgetful(answers: Sequence[Answer]) -> list[Score]:
        return [Score(1.0)]

    with pytest.raises(ValueError, match="shorter"):
        await compare_by_score([Comparison("r", RAIN, "a", "b")], forgetful, bradley_terry(1.0))
