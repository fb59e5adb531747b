"""Judge metrics against hand counts, and correlations worked out by hand."""

import itertools
import math
import re
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from rlhf.config.judge import JudgeHealth
from rlhf.errors import RLHFError
from rlhf.judging.health import check_valid_share, health_warnings, judge_metrics
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.records import Comparison, Verdict, VerdictState


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
        "judge/truncated_rate": 0.0,
        "judge/confidence": pytest.approx((0.8 + 0.0 + 0.1 + 0.8) / 4),
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
        verdict("w", "x", 0.7, score_a=2.0, score_b=1.0),
        verdict("x", "y", 0.7, uid="q", score_a=0.5, score_b=0.4),
    ]
    assert judge_metrics(verdicts)["judge/score_mean"] == pytest.approx((1.0 + 0.0 - 0.4 + 2.0 + 0.5 + 0.4) / 6)


def test_healthy_judge_gives_no_warning() -> None:
    verdicts = [verdict("a", "bb", 0.9), verdict("aa", "b", 0.8), verdict("aa", "b", 0.1), verdict("a", "bb", 0.2)]
    assert health_warnings(judge_metrics(verdicts * 10)) == []


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ([verdict("a", "b", 0.8, 0.2)] * 3 + [verdict("a", "b", 0.8)], "75% of verdicts flip"),
        ([verdict("a", "b", 0.5)] * 9 + [verdict("a", "b", 0.8)], "90% of verdicts are ties"),
        ([invalid_verdict(Comparison("p", (), "a", "b"), "x"), verdict("a", "b", 0.8)], "50% of comparisons"),
        ([replace(verdict("a", "b", 0.9), truncated=True)] + [verdict("a", "b", 0.9)] * 4, "20% of contexts were cut"),
        ([verdict("aa", "b", 0.9), verdict("a", "bb", 0.1)] * 10, r"prefers longer responses \(correlation \+1.00"),
        ([verdict("aa", "b", 0.1), verdict("a", "bb", 0.9)] * 10, r"prefers shorter responses \(correlation -1.00"),
    ],
)
def test_each_warning(verdicts: list[Verdict], words: str) -> None:
    [warning] = health_warnings(judge_metrics(verdicts))
    assert re.search(words, warning)


def test_length_bias_of_few_comparisons_is_no_warning() -> None:
    assert health_warnings(judge_metrics([verdict("aa", "b", 0.9), verdict("a", "bb", 0.1)])) == []


def test_comparisons_without_a_verdict_do_not_count_for_the_length_bias() -> None:
    biased = [verdict("aa", "b", 0.9), verdict("a", "bb", 0.1)] * 9
    failed = [invalid_verdict(Comparison("p", (), "a", "b"), "x")]
    lax = JudgeHealth(max_invalid_rate=1)
    assert health_warnings(judge_metrics([*biased, *failed * 2]), lax) == []
    assert health_warnings(judge_metrics([*biased, verdict("aa", "b", 0.9), *failed * 40]), lax) == []
    for invalid in (0, 1, 7, 41, 999):
        [warning] = health_warnings(judge_metrics([*biased, *biased[:2], *failed * invalid]), lax)
        assert "prefers longer responses" in warning


def test_a_small_score_spread_is_a_warning_where_one_is_asked_for() -> None:
    alike = [verdict("x", "y", 0.7, score_a=0.5, score_b=0.4), verdict("x", "y", 0.7, uid="q", score_a=1, score_b=0.9)]
    metrics = judge_metrics(alike)
    assert metrics["judge/score_spread"] == pytest.approx(0.05)
    assert health_warnings(metrics) == []
    assert health_warnings(metrics, JudgeHealth(min_score_spread=0.049)) == []
    [warning] = health_warnings(metrics, JudgeHealth(min_score_spread=0.051))
    assert [word for word in ("0.05 ", "judge.health.min_score_spread = 0.051") if word not in warning] == []
    assert health_warnings(judge_metrics([verdict("x", "y", 0.7)]), JudgeHealth(min_score_spread=9)) == []


def test_the_messages_name_the_judge_and_where_its_reasons_are() -> None:
    bad = [invalid_verdict(Comparison("p", (), "a", "b"), "blank"), verdict("a", "b", 0.8, 0.1)]
    warnings = health_warnings(judge_metrics(bad), judge="eval_judge", reasons="evaluation/round-0004-verdicts.parquet")
    assert [warning.startswith("eval_judge: ") for warning in warnings] == [True, True]
    assert "see the reasons in evaluation/round-0004-verdicts.parquet" in warnings[1]
    with pytest.raises(RLHFError, match=r"^evaluation of round 4: only 50.0% .* eval_judge\.health\.min_valid = 0.6"):
        check_valid_share(bad, 0.6, "evaluation of round 4", judge="eval_judge")


def test_score_spread_is_the_mean_over_prompts_of_what_their_responses_differ() -> None:
    verdicts = [
        verdict("x", "y", 0.7, score_a=1.0, score_b=0.0),
        verdict("x", "z", 0.7, score_a=1.0, score_b=-0.4),
        verdict("x", "y", 0.7, uid="q", score_a=0.5, score_b=0.1),
        invalid_verdict(Comparison("lonely", (), "x", "y"), "half of it", 9.0, math.nan),
    ]
    expected = (statistics.pstdev([1.0, 0.0, -0.4]) + statistics.pstdev([0.5, 0.1])) / 2
    metrics = judge_metrics(verdicts)
    assert metrics["judge/score_spread"] == pytest.approx(expected, abs=1e-12)
    assert metrics["judge/score_mean"] == pytest.approx((1.0 + 0.0 - 0.4 + 0.5 + 0.1 + 9.0) / 6)
    assert "judge/score_spread" not in judge_metrics([verdict("x", "y", 0.7)])


@pytest.mark.parametrize("score", [0.1, 0.7, -1e9])
def test_equal_scores_have_no_spread_at_all(score: float) -> None:
    names = itertools.combinations(["x", "yy", "zzz"], 2)
    verdicts = [verdict(a, b, 0.5, score_a=score, score_b=score) for a, b in names]
    assert judge_metrics(verdicts)["judge/score_spread"] == 0.0


P = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0, math.nan])
TEXT = st.text("ab", min_size=1, max_size=3)
SCORE = st.one_of(st.none(), st.floats(-10, 10), st.just(math.nan))
VERDICTS = st.lists(
    st.builds(
        lambda uid, a, b, p_ab, p_ba, scores, cut: replace(verdict(a, b, p_ab, p_ba, uid), truncated=cut)
        if scores is None
        else make_verdict(Comparison(uid, (), a, b), p_ab, p_ba, *scores),
        st.sampled_from("pq"), TEXT, TEXT, P, P, st.one_of(st.none(), st.tuples(SCORE, SCORE)), st.booleans(),
    ),
    max_size=12,
)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(verdicts=VERDICTS)
def test_metrics_are_finite_shares_whatever_the_judge_says(verdicts: list[Verdict]) -> None:
    metrics = judge_metrics(verdicts)
    valid = [each for each in verdicts if each.state is not VerdictState.INVALID]
    assert metrics["judge/flip_rate"] == sum(each.flipped for each in valid) / max(1, len(valid))
    assert metrics["judge/confidence"] == pytest.approx(sum(abs(2 * each.p - 1) for each in valid) / max(1, len(valid)))
    assert all(math.isfinite(value) for value in metrics.values())
    shares = ("flip_rate", "tie_rate", "invalid_rate", "truncated_rate", "confidence")
    assert all(0.0 <= metrics[f"judge/{name}"] <= 1.0 for name in shares)
    assert -1.0 - 1e-12 <= metrics["judge/length_bias"] <= 1.0 + 1e-12
    assert metrics.get("judge/score_spread", 0.0) >= 0.0
    assert judge_metrics(verdicts[::-1])["judge/tie_rate"] == metrics["judge/tie_rate"]
    lax = JudgeHealth(
        max_flip_rate=1, max_tie_rate=1, max_invalid_rate=1, max_truncated_rate=1, max_length_bias=1
    )  # fmt: skip
    assert health_warnings(metrics | {"judge/length_bias": 0.0}, lax) == []
    strict = JudgeHealth(max_flip_rate=0, max_tie_rate=0, max_invalid_rate=0, max_truncated_rate=0)
    found = " ".join(health_warnings(metrics, strict))
    assert ("could not be judged" in found) == (metrics["judge/invalid_rate"] > 0)
    assert ("were cut" in found) == (metrics["judge/truncated_rate"] > 0)
    assert (" flip " in found) == (metrics["judge/flip_rate"] > 0)


@settings(deadline=None, max_examples=100)
@given(verdicts=VERDICTS, min_valid=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_too_few_valid_verdicts_stop_the_run(verdicts: list[Verdict], min_valid: float) -> None:
    valid = sum(item.state is not VerdictState.INVALID for item in verdicts)
    if not verdicts or valid / len(verdicts) >= min_valid:
        check_valid_share(verdicts, min_valid, "round 3")
    else:
        with pytest.raises(RLHFError, match=r"^round 3: .*judge\.health\.min_valid") as error:
            check_valid_share(verdicts, min_valid, "round 3")
        assert "\n" not in str(error.value)


def test_the_message_names_share_threshold_and_the_commonest_reason() -> None:
    bad = [invalid_verdict(Comparison("p", (), "a", "b"), reason) for reason in ("HTTP\n503", "HTTP\n503", "refusal")]
    with pytest.raises(RLHFError) as error:
        check_valid_share([*bad, verdict("a", "b", 0.8)], 0.5, "round 7")
    words = ["round 7", "25.0% of 4", "judge.health.min_valid = 0.5", "(2 times): HTTP 503;"]
    assert [word for word in words if word not in str(error.value)] == []
    check_valid_share([*bad, verdict("a", "b", 0.8)], 0.25, "round 7")
    check_valid_share(bad, 0.0, "round 7")
    check_valid_share([], 1.0, "round 7")


def test_thresholds_come_from_the_config() -> None:
    metrics = judge_metrics([verdict("a", "b", 0.5), verdict("a", "b", 0.8), verdict("a", "b", 0.8)])
    assert health_warnings(metrics) == []
    [warning] = health_warnings(metrics, JudgeHealth(max_tie_rate=0.3))
    assert "33% of verdicts are ties" in warning
