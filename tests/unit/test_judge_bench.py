"""The report of a judge: the sentiment judge on pairs with known scores, and verdicts made by hand."""

import io
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf.config.judge import SentimentJudge as Config
from rlhf.data.preferences import PreferenceExample
from rlhf.evaluation.bench_table import show_bench
from rlhf.evaluation.judge_bench import accuracy, bench, bench_report, is_swapped, mirrored
from rlhf.evaluation.winrate import bootstrap_interval, wilson_interval
from rlhf.judging.sentiment import SentimentJudge
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.records import Comparison, Message, Verdict, VerdictState

JUDGE = SentimentJudge(Config())
TEXTS = ("What a wonderful, happy day!", "This is a terrible, sad failure.", "The table has four legs.", "I love it.")
PROBABILITY = st.floats(0, 1)


def example(number: int, chosen: str, rejected: str, subset: str | None = None) -> PreferenceExample:
    messages = (Message(role="user", content=f"question {number}"),)
    return PreferenceExample(f"{number:016x}", messages, chosen, rejected, subset, number)


def verdict(number: int, p_ab: float, p_ba: float, a: str = "xx", b: str = "y") -> Verdict:
    messages = (Message(role="user", content=f"question {number}"),)
    return make_verdict(Comparison(f"{number:016x}", messages, a, b), p_ab, p_ba)


def report_of(verdicts: Sequence[Verdict], subsets: Sequence[str | None] | None = None, **options: str):
    names = subsets or [None] * len(verdicts)
    examples = [
        example(number, each.comparison.a, each.comparison.b, name)
        for number, (each, name) in enumerate(zip(verdicts, names, strict=True))
    ]
    return bench_report(examples, verdicts, **options)


async def test_sentiment_judge_against_vader_itself() -> None:
    analyzer = SentimentIntensityAnalyzer()
    value = {text: analyzer.polarity_scores(text)["compound"] for text in TEXTS}
    pairs = [(left, right) for left in TEXTS for right in TEXTS if left != right] * 3
    examples = [example(number, *pair) for number, pair in enumerate(pairs)]
    assert {is_swapped(each.uid) for each in examples} == {True, False}
    done: list[int] = []
    report = await bench(JUDGE, examples, done.append)
    right = sum(value[left] > value[right] for left, right in pairs)
    assert sum(done) == len(pairs)
    assert (report.overall.correct, report.overall.n) == (right, len(pairs))
    assert report.overall.accuracy == report.overall.mean_p == 0.5  # each pair is there in both directions
    assert report.health["flip_rate"] == 0.0
    assert report.first_shown == pytest.approx(0.5)
    by_hand = [1 / (1 + 2.718281828459045 ** (-4 * (value[left] - value[right]))) for left, right in pairs]
    assert report.calibration.brier == pytest.approx(sum((1 - p) ** 2 for p in by_hand) / len(by_hand))


class FirstIsBetter:
    """A judge that prefers A whatever it says, as a broken one may."""

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [make_verdict(each, 0.9, 0.9) for each in comparisons]


async def test_a_habit_about_a_does_not_look_like_skill() -> None:
    examples = [example(number, "good", "bad") for number in range(400)]
    report = await bench(FirstIsBetter(), examples, lambda amount: None)
    swapped = sum(is_swapped(each.uid) for each in examples)
    assert report.overall.correct == 400 - swapped
    assert 150 < swapped < 250
    assert report.overall.low < 0.5 < report.overall.high


@given(PROBABILITY, PROBABILITY)
def test_mirrored_is_what_the_turned_comparison_gets(p_ab: float, p_ba: float) -> None:
    there = verdict(0, p_ab, p_ba)
    back = mirrored(there)
    assert (back.comparison.a, back.comparison.b) == (there.comparison.b, there.comparison.a)
    assert back.p == pytest.approx(1 - there.p, abs=1e-15)
    # with the other response first, the new A is shown second
    assert (back.p_ab, back.p_ba) == (1 - p_ba, 1 - p_ab)
    states = {there.state, back.state}
    assert states in ({VerdictState.TIE}, {VerdictState.WIN, VerdictState.LOSE})


def test_ties_half_and_lost_and_invalid() -> None:
    verdicts = [verdict(0, 0.9, 0.8), verdict(1, 0.2, 0.1), verdict(2, 0.5, 0.5), verdict(3, 0.9, 0.4)]
    verdicts.append(invalid_verdict(verdict(4, 1, 1).comparison, "no reply"))
    half, lost = accuracy(verdicts, "half"), accuracy(verdicts, "lost")
    assert (half.n, half.correct, half.wrong, half.ties, half.invalid) == (5, 1, 1, 2, 1)
    assert (half.accuracy, half.ties_half, half.ties_lost) == (0.4, 0.4, 0.2)
    assert (lost.accuracy, lost.ties_half, lost.ties_lost) == (0.2, 0.4, 0.2)
    # by p alone the contradiction (mean 0.65) is right, the exact half is a tie
    assert (half.mean_p, lost.mean_p) == (0.5, 0.4)
    assert (half.low, half.high) == wilson_interval(2.0, 5)
    report = report_of(verdicts)
    assert report.invalid_reasons == {"no reply": 1}
    assert report.health["invalid_rate"] == 0.2
    assert report.health["tie_rate"] == 0.5
    assert report.health["flip_rate"] == 0.25
    assert report.calibration.n == 4
    assert report.first_shown == pytest.approx((0.55 + 0.55 + 0.5 + 0.75) / 4)


def test_several_pairs_of_one_conversation_are_resampled_together() -> None:
    verdicts = [verdict(number // 2, 0.9 if number % 3 else 0.1, 0.9 if number % 3 else 0.1) for number in range(12)]
    points = [float(number % 3 > 0) for number in range(12)]
    clusters = [points[start : start + 2] for start in range(0, 12, 2)]
    found = accuracy(verdicts)
    assert (found.low, found.high) == bootstrap_interval(clusters)


def test_subsets_lengths_and_categories() -> None:
    good, bad = (0.9, 0.9), (0.1, 0.1)
    verdicts = [
        verdict(0, *good, a="long one", b="x"),
        verdict(1, *bad, a="long one", b="x"),
        verdict(2, *good, a="x", b="long one"),
        verdict(3, *good, a="x", b="y"),
        verdict(4, 0.9, 0.3, a="x", b="y"),
    ]
    report = report_of(verdicts, ["math-prm", "math-prm", "hep-go", "hep-go", "hep-go"])
    assert {name: (each.n, each.correct) for name, each in report.subsets.items()} == {
        "math-prm": (2, 1),
        "hep-go": (3, 2),
    }
    lengths = {name: (each.n, each.correct) for name, each in report.by_length.items()}
    assert lengths == {"chosen longer": (2, 1), "rejected longer": (1, 1), "same length": (2, 1)}
    (category,) = report.rewardbench
    assert category.score == pytest.approx(100 * (0.5 * 984 + 1.0 * 164) / (984 + 164))
    assert not report_of(verdicts).rewardbench
    assert not report_of(verdicts, ["math-prm"] * 4 + ["mine"]).rewardbench


def test_json_and_table() -> None:
    invalid = [invalid_verdict(verdict(number, 1, 1).comparison, "[no] reply") for number in range(2)]
    report = report_of(invalid, ["math-prm", "[bold]"])
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["calibration"] == {"n": 0, "ece": None, "brier": None, "bins": []}
    assert json.loads(text)["rewardbench"] is None
    sink = io.StringIO()
    show_bench(report, Console(file=sink, width=100))
    assert "[bold]" in sink.getvalue()
    assert "2 x [no] reply" in sink.getvalue()
    partial = report_of([verdict(0, 0.9, 0.9)], ["math-prm"])
    found = partial.to_json()["rewardbench"]
    assert (found["complete"], found["categories"][0]["published"]) == (False, 94.9)
    show_bench(partial, Console(file=sink, width=100))
    assert "missing: hep-cpp" in sink.getvalue()
    assert "1 of 1431" in sink.getvalue()
