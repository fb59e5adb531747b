"""The sentiment judge against VADER itself, and the rules that make verdicts."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from actors.judge import ActorEngines
from rlhf.config.judge import SentimentJudge as Config
from rlhf.errors import RLHFError
from rlhf.judging.build import build_judge
from rlhf.judging.sentiment import SentimentJudge
from rlhf.judging.verdicts import check_complete, make_verdict, sigmoid
from rlhf.records import Comparison, VerdictState

GOOD, BAD, PLAIN = "What a wonderful, happy day!", "This is a terrible, sad failure.", "The table has four legs."
TEXT = st.lists(
    st.sampled_from(["good", "bad", "awful", "great", "not", "table", "VERY", "love", "!", ":("]),
    min_size=1,
    max_size=6,
).map(" ".join)
JUDGE = SentimentJudge(Config())


def comparison(a: str, b: str) -> Comparison:
    return Comparison("p", (), a, b)


async def test_probability_is_the_logistic_of_the_scaled_difference() -> None:
    analyzer = SentimentIntensityAnalyzer()
    good, bad = (analyzer.polarity_scores(text)["compound"] for text in (GOOD, BAD))
    judge = build_judge(Config(scale=1.5), ActorEngines("cpu", seed=0))
    verdicts = await judge.compare([comparison(GOOD, BAD), comparison(BAD, GOOD)])
    expected = 1 / (1 + math.exp(-1.5 * (good - bad)))
    assert good > 0 > bad
    assert verdicts[0].p_ab == pytest.approx(expected, abs=1e-12)
    assert verdicts[0].p_ba == verdicts[0].p_ab
    assert (verdicts[0].score_a, verdicts[0].score_b) == (good, bad)
    assert [verdict.state for verdict in verdicts] == [VerdictState.WIN, VerdictState.LOSE]


@settings(deadline=None, max_examples=50)
@given(a=TEXT, b=TEXT)
async def test_swapping_the_responses_mirrors_the_verdict(a: str, b: str) -> None:
    there, back = await JUDGE.compare([comparison(a, b), comparison(b, a)])
    assert there.p == pytest.approx(1 - back.p, abs=1e-12)
    assert (there.score_a, there.score_b) == (back.score_b, back.score_a)
    mirrored = {VerdictState.WIN: VerdictState.LOSE, VerdictState.LOSE: VerdictState.WIN}
    assert back.state is mirrored.get(there.state, there.state)
    assert (there.state is VerdictState.TIE) == (there.score_a == there.score_b)


async def test_equal_scores_tie() -> None:
    [verdict] = await JUDGE.compare([comparison(PLAIN, "A chair is made of wood.")])
    assert (verdict.p_ab, verdict.state) == (0.5, VerdictState.TIE)


@pytest.mark.parametrize("blank", ["", " \n\t"])
async def test_blank_response_is_invalid_with_a_reason(blank: str) -> None:
    first, second = await JUDGE.compare([comparison(blank, GOOD), comparison(GOOD, blank)])
    assert (first.state, first.reason) == (VerdictState.INVALID, "response A is blank")
    assert (second.state, second.reason) == (VerdictState.INVALID, "response B is blank")
    assert math.isnan(first.p)
    assert first.score_a is None
    assert first.score_b == second.score_a
    assert first.score_b is not None


@pytest.mark.parametrize(
    ("p_ab", "p_ba", "state"),
    [
        (0.9, 0.6, VerdictState.WIN),
        (0.5, 0.6, VerdictState.WIN),
        (0.1, 0.5, VerdictState.LOSE),
        (0.5, 0.5, VerdictState.TIE),
        (0.99, 0.49, VerdictState.TIE),
        (1.0, 0.0, VerdictState.TIE),
        (math.nan, 0.9, VerdictState.INVALID),
        (0.9, math.inf, VerdictState.INVALID),
        (0.9, 1.1, VerdictState.INVALID),
        (-0.1, 0.9, VerdictState.INVALID),
    ],
)
def test_states(p_ab: float, p_ba: float, state: VerdictState) -> None:
    verdict = make_verdict(comparison("x", "y"), p_ab, p_ba)
    assert verdict.state is state
    assert math.isnan(verdict.p) == (state is VerdictState.INVALID)
    assert bool(verdict.reason) == (state is VerdictState.INVALID or verdict.flipped)


@settings(deadline=None, max_examples=50)
@given(st.floats(-30, 30))
def test_sigmoid(x: float) -> None:
    assert sigmoid(x) == pytest.approx(1 / (1 + math.exp(-x)), abs=1e-12)


def test_sigmoid_of_huge_numbers_is_finite() -> None:
    assert (sigmoid(-1e6), sigmoid(1e6)) == (0.0, 1.0)


def test_missing_verdicts_are_an_error() -> None:
    with pytest.raises(RLHFError, match="returned 0 verdicts for 1 comparisons"):
        check_complete([comparison("x", "y")], [])
