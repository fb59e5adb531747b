"""Judge metrics against hand counts, and correlations worked out by hand."""

import re

import pytest

from rlhf.judging.health import health_warnings, judge_metrics
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.records import Comparison, Verdict


def verdict(a: str, b: str, p_ab: float, p_ba: float | None = None, uid: str = "p", **scores: float) -> Verdict:
    return make_verdict(Comparison(uid, (), a, b), p_ab, p_ab if p_ba is None else p_ba, **scores)


def test_rates() -> None:
    verdicts = [
        verdict("a", "b", 0.9),
        verdict("a", "b", 0.5),
        verdict("a", "b", 0.9, 0.2),
        verdict("a", "b", 0.1),
        invalid_verdict(Comparison("p", (), "a", "b"), "blank"),
    ]
    metrics = judge_metrics(verdicts)
    assert metrics == {
        "judge/comparisons": 5.0,
        "judge/flip_rate": 0.25,
        "judge/tie_rate": 0.5,
        "judge/invalid_rate": 0.2,
        "judge/length_bias": 0.0,
    }


def test_length_bias_is_the_pearson_correlation() -> None:
    # Preferences 2p-1: .8, -.4, .2; length differences: 3, -1, 0. By hand: means .2 and 2/3.
    verdicts = [verdict("aaaa", "b", 0.9), verdict("a", "bb", 0.3), verdict("a", "b", 0.6)]
    verdicts.append(invalid_verdict(Comparison("p", (), "a" * 99, "b"), "left out"))
    covariance = 0.6 * (7 / 3) + (-0.6) * (-5 / 3) + 0.0 * (-2 / 3)
    spread = (0.72 * ((7 / 3) ** 2 + (5 / 3) ** 2 + (2 / 3) ** 2)) ** 0.5
    assert judge_metrics(verdicts)["judge/length_bias"] == pytest.approx(covariance / spread, abs=1e-12)


@pytest.mark.parametrize(
    "verdicts",
    [
        [],
        [verdict("aa", "b", 0.9)],
        [verdict("aa", "b", 0.9), verdict("a", "bb", 0.9)],
        [verdict("a", "b", 0.9), verdict("a", "b", 0.1)],
    ],
    ids=["none", "one", "constant preference", "constant length"],
)
def test_length_bias_is_zero_where_undefined(verdicts: list[Verdict]) -> None:
    assert judge_metrics(verdicts)["judge/length_bias"] == 0.0


def test_score_mean_counts_each_response_once() -> None:
    verdicts = [
        verdict("x", "y", 0.7, score_a=1.0, score_b=0.0),
        verdict("x", "z", 0.7, score_a=1.0, score_b=-0.4),
        verdict("x", "y", 0.7, uid="q", score_a=0.5, score_b=0.4),
    ]
    assert judge_metrics(verdicts)["judge/score_mean"] == pytest.approx((1.0 + 0.0 - 0.4 + 0.5 + 0.4) / 5)


def test_healthy_judge_gives_no_warning() -> None:
    verdicts = [verdict("a", "bb", 0.9), verdict("aa", "b", 0.8), verdict("aa", "b", 0.1), verdict("a", "bb", 0.2)]
    assert health_warnings(judge_metrics(verdicts * 10)) == []


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ([verdict("a", "b", 0.8, 0.2)] * 3 + [verdict("a", "b", 0.8)], "75% of verdicts flip"),
        ([verdict("a", "b", 0.5)] * 9 + [verdict("a", "b", 0.8)], "90% of verdicts are ties"),
        ([invalid_verdict(Comparison("p", (), "a", "b"), "x"), verdict("a", "b", 0.8)], "50% of comparisons"),
        ([verdict("aa", "b", 0.9), verdict("a", "bb", 0.1)] * 10, r"prefers longer responses \(correlation \+1.00"),
        ([verdict("aa", "b", 0.1), verdict("a", "bb", 0.9)] * 10, r"prefers shorter responses \(correlation -1.00"),
    ],
)
def test_each_warning(verdicts: list[Verdict], words: str) -> None:
    [warning] = health_warnings(judge_metrics(verdicts))
    assert re.search(words, warning)


def test_length_bias_of_few_comparisons_is_no_warning() -> None:
    assert health_warnings(judge_metrics([verdict("aa", "b", 0.9), verdict("a", "bb", 0.1)])) == []
