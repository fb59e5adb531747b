"""Win rate, its intervals, text statistics and the evaluation of a policy, against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.judge import SentimentJudge as SentimentConfig
from rlhf.errors import RLHFError
from rlhf.evaluation.evaluate import evaluate
from rlhf.evaluation.text import distinct_2, mean_length
from rlhf.evaluation.winrate import bootstrap_interval, wilson_interval, win_rate
from rlhf.judging.sentiment import SentimentJudge
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.records import Comparison, Message, Prompt, Rollout, Verdict, VersionSpan

P = {"w": 0.9, "l": 0.1, "t": 0.5}


def verdicts(outcomes: str, per_prompt: int = 1) -> list[Verdict]:
    """One verdict a letter: w, l, t, or i for invalid; `per_prompt` in a row share a prompt."""
    result = []
    for n, letter in enumerate(outcomes):
        comparison = Comparison(f"p{n // per_prompt}", (), "a", "b")
        result.append(
            invalid_verdict(comparison, "x") if letter == "i" else make_verdict(comparison, P[letter], P[letter])
        )
    return result


def test_ties_count_half_and_invalid_ones_nothing() -> None:
    rate = win_rate(verdicts("wwwltti"))
    assert (rate.wins, rate.losses, rate.ties, rate.invalid, rate.n) == (3, 1, 2, 1, 6)
    assert rate.win_rate == pytest.approx(4 / 6)
    assert 0 <= rate.low < rate.win_rate < rate.high <= 1


@pytest.mark.parametrize("outcomes", ["", "iii"])
def test_nothing_valid_is_nan(outcomes: str) -> None:
    rate = win_rate(verdicts(outcomes))
    assert rate.n == 0
    assert rate.invalid == len(outcomes)
    assert all(math.isnan(x) for x in (rate.win_rate, rate.low, rate.high))


@settings(deadline=None, max_examples=50)
@given(st.text("wlti", max_size=24), st.integers(1, 4))
def test_win_rate_closed_form(outcomes: str, per_prompt: int) -> None:
    rate = win_rate(verdicts(outcomes, per_prompt))
    n = len(outcomes) - outcomes.count("i")
    assert (rate.wins, rate.losses, rate.ties, rate.n) == (*(outcomes.count(x) for x in "wlt"), n)
    if n:
        assert rate.win_rate == pytest.approx((outcomes.count("w") + 0.5 * outcomes.count("t")) / n)
        assert 0 <= rate.low <= rate.win_rate + 1e-9
        assert rate.win_rate - 1e-9 <= rate.high <= 1


def test_wilson_published_values() -> None:
    # Newcombe (1998), table I: 81 of 263 and 0 of 20, score method without continuity correction.
    assert wilson_interval(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson_interval(0, 20) == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.1611, abs=5e-5))
    assert all(math.isnan(x) for x in wilson_interval(0, 0))


def test_bootstrap_agrees_with_wilson_for_independent_comparisons() -> None:
    rate = win_rate(verdicts("w" * 140 + "l" * 60))
    assert (rate.low, rate.high) == (
        pytest.approx(wilson_interval(140, 200)[0], abs=0.015),
        pytest.approx(wilson_interval(140, 200)[1], abs=0.015),
    )


def test_correlated_responses_widen_the_interval() -> None:
    # Four copies of each outcome carry no more than one of them: as wide as 50 independent ones, not as 200.
    copies = win_rate(verdicts("w" * 140 + "l" * 60, per_prompt=4))
    single = win_rate(verdicts("w" * 35 + "l" * 15))
    assert copies.win_rate == single.win_rate
    assert copies.high - copies.low == pytest.approx(single.high - single.low, abs=0.01)
    naive = wilson_interval(140, 200)
    assert copies.high - copies.low > 1.7 * (naive[1] - naive[0])


def test_bootstrap_is_the_percentile_of_plain_resampling() -> None:
    clusters = [[1.0, 1.0, 0.5], [0.0], [1.0, 0.0], [0.5, 0.5], [1.0], [0.0, 0.0, 1.0]]
    rng = np.random.default_rng(7)
    plain = []
    for _ in range(20_000):
        drawn = [clusters[i] for i in rng.integers(len(clusters), size=len(clusters))]
        plain.append(np.mean([x for points in drawn for x in points]))
    low, high = np.quantile(plain, [0.025, 0.975])
    assert bootstrap_interval(clusters, seed=1) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    assert bootstrap_interval(clusters, seed=1) == bootstrap_interval(clusters, seed=1)


@pytest.mark.parametrize(("outcomes", "wins"), [("w" * 8, 8), ("l" * 8, 0), ("t" * 8, 4)])
def test_unanimous_prompts_do_not_claim_certainty(outcomes: str, wins: int) -> None:
    rate = win_rate(verdicts(outcomes, per_prompt=2))
    assert (rate.low, rate.high) == wilson_interval(wins / 2, 4)
    assert rate.high - rate.low > 0.3


def test_large_evaluations_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = [[float(i % 3 == 0)] for i in range(300)]
    whole = bootstrap_interval(clusters, seed=3)
    monkeypatch.setattr("rlhf.evaluation.winrate._BLOCK", 300 * 7)
    assert bootstrap_interval(clusters, seed=3) == whole


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b c"], 1.0),
        (["a b a b"], 2 / 3),
        (["a b", "a b"], 0.5),
        (["a b", "b a", "a"], 1.0),
        (["a", ""], 0.0),
        ([], 0.0),
    ],
)
def test_distinct_2(texts: list[str], expected: float) -> None:
    assert distinct_2(texts) == pytest.approx(expected)


def test_mean_length() -> None:
    assert mean_length([(1, 2, 3), (), (4,)]) == pytest.approx(4 / 3)
    assert mean_length([]) == 0.0


def rollout(uid: str, k: int, text: str) -> Rollout:
    ids = tuple(range(len(text.split())))
    return Rollout(uid, k, ids, (0.0,) * len(ids), text, "stop", (VersionSpan(0, 0, len(ids)),))


PROMPTS = [Prompt(uid, (Message(role="user", content=uid),), uid, (1,)) for uid in ("p", "q")]
POLICY = [
    rollout("p", 0, "good good"),
    rollout("p", 1, "the table"),
    rollout("q", 0, "bad day here"),
    rollout("q", 1, ""),
]
BASELINE = [rollout("q", 0, "great"), rollout("p", 1, "a chair"), rollout("p", 0, "bad"), rollout("q", 1, "good")]


async def test_evaluate_matches_sample_k_with_sample_k() -> None:
    judge = SentimentJudge(SentimentConfig())
    metrics, found = await evaluate(POLICY, BASELINE, PROMPTS, judge)
    assert [(v.comparison.uid, v.comparison.a, v.comparison.b, v.state.value) for v in found] == [
        ("p", "good good", "bad", "win"),
        ("p", "the table", "a chair", "tie"),
        ("q", "bad day here", "great", "lose"),
        ("q", "", "good", "invalid"),
    ]
    assert found[2].comparison.messages == PROMPTS[1].messages
    assert metrics["eval/win_rate"] == pytest.approx(0.5)
    assert 0 <= metrics["eval/win_rate_low"] <= 0.5 <= metrics["eval/win_rate_high"] <= 1
    assert metrics["eval/score"] == pytest.approx(sum(v.score_a for v in found[:3]) / 3)  # type: ignore[misc]
    assert metrics["eval/length_mean"] == pytest.approx(7 / 4)
    assert metrics["eval/distinct_2"] == pytest.approx(1.0)
    assert (metrics["eval/invalid_rate"], metrics["eval/flip_rate"]) == (0.25, 0.0)
    assert len(metrics) == 8


async def test_samples_without_a_counterpart_are_left_out() -> None:
    metrics, found = await evaluate(POLICY, BASELINE[2:3], PROMPTS, SentimentJudge(SentimentConfig()))
    assert [v.comparison.a for v in found] == ["good good"]
    assert metrics["eval/length_mean"] == 2


async def test_no_counterpart_at_all_is_an_error() -> None:
    with pytest.raises(RLHFError, match="no response of the policy has a baseline response"):
        await evaluate(POLICY, [], PROMPTS, SentimentJudge(SentimentConfig()))


async def test_judge_without_scores_gives_no_score_and_no_valid_verdict_no_win_rate() -> None:
    class Silent:
        async def compare(self, comparisons: list[Comparison]) -> list[Verdict]:
            return [invalid_verdict(comparison, "silent") for comparison in comparisons]

    metrics, _ = await evaluate(POLICY, BASELINE, PROMPTS, Silent())  # type: ignore[arg-type]
    assert set(metrics) == {"eval/length_mean", "eval/distinct_2", "eval/invalid_rate", "eval/flip_rate"}
    assert metrics["eval/invalid_rate"] == 1.0
