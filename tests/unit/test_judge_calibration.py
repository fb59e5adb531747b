"""ECE and Brier against independent sums, and RewardBench's categories against the formula written out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.evaluation.calibration import BINS, calibration
from rlhf.evaluation.rewardbench import PUBLISHED, ROWS, WEIGHTS, category_scores, is_rewardbench
from rlhf.evaluation.winrate import wilson_interval

P = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def plain_ece(values: list[float]) -> float:
    """Bin by bin with plain loops; a bin is found by counting the edges at or below the confidence."""
    edges = [0.5 + 0.5 * number / BINS for number in range(1, BINS)]
    bins: dict[int, list[tuple[float, float]]] = {}
    for p in values:
        confidence = max(p, 1 - p)
        right = 0.5 if p == 0.5 else float(p > 0.5)
        bins.setdefault(sum(edge <= confidence for edge in edges), []).append((confidence, right))
    return sum(abs(sum(c for c, _ in held) - sum(r for _, r in held)) for held in bins.values()) / len(values)


@given(st.lists(P, min_size=1, max_size=40))
def test_against_plain_loops(values: list[float]) -> None:
    found = calibration(values)
    # an edge that float rounding puts a bit elsewhere may move a value by one bin
    edges = [0.5 + 0.5 * number / BINS for number in range(1, BINS)]
    if all(abs(max(p, 1 - p) - edge) > 1e-12 for p in values for edge in edges):
        assert found.ece == pytest.approx(plain_ece(values), abs=1e-12)
    assert found.brier == pytest.approx(sum((1 - p) ** 2 for p in values) / len(values), abs=1e-12)
    assert sum(each.n for each in found.bins) == found.n == len(values)
    assert all(each.low - 1e-12 <= each.confidence <= each.high + 1e-12 for each in found.bins)
    assert 0 <= found.ece <= 1


def test_known_numbers() -> None:
    found = calibration([0.9, 0.9, 0.9, 0.1])  # always 0.9 sure, right in three of four
    assert (found.ece, found.brier) == (pytest.approx(0.15), pytest.approx((3 * 0.01 + 0.81) / 4))
    (only,) = found.bins
    assert (only.n, only.accuracy, only.confidence) == (4, 0.75, pytest.approx(0.9))
    coin = calibration([0.5, 0.5])
    assert (coin.ece, coin.brier) == (0.0, 0.25)
    assert calibration([1.0]).ece == 0.0
    assert calibration([0.0]).ece == 1.0


def test_nothing_to_calibrate() -> None:
    found = calibration([])
    assert (found.n, found.bins) == (0, ())
    assert math.isnan(found.ece)
    assert math.isnan(found.brier)


def test_the_table() -> None:
    assert {name: sum(weights.values()) for name, weights in WEIGHTS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1968,
    }
    assert sum(ROWS.values()) == 2985  # rows of the published set
    assert len(ROWS) == 23
    assert list(PUBLISHED.values()) == [98.6, 65.8, 89.6, 94.9]


def test_a_whole_category_is_weighted_by_the_table_not_by_rows() -> None:
    accuracies = dict.fromkeys(WEIGHTS["Reasoning"], (0.9, 164)) | {"math-prm": (0.5, 447)}
    (found,) = category_scores(accuracies)
    assert found.score == pytest.approx(100 * (0.9 * 6 * 164 + 0.5 * 984) / 1968)
    assert (found.rows, found.expected, found.missing, found.published) == (1431, 1431, (), 94.9)
    assert found.low < found.score < found.high


def test_a_part_of_a_category_says_what_is_missing() -> None:
    (found,) = category_scores({"donotanswer": (0.25, 8), "refusals-offensive": (1.0, 4)})
    assert found.score == pytest.approx(100 * (0.25 * 136 + 1.0 * 100) / 236)
    assert found.missing == ("refusals-dangerous", "xstest-should-refuse", "xstest-should-respond")
    assert (found.rows, found.expected) == (12, 740)


def test_one_subset_has_the_plain_wilson_interval() -> None:
    (found,) = category_scores({"math-prm": (0.75, 40)})
    assert (found.low / 100, found.high / 100) == pytest.approx(wilson_interval(30, 40))


def test_is_rewardbench() -> None:
    assert is_rewardbench(["math-prm", "hep-go"])
    assert not is_rewardbench(["math-prm", "mine"])
    assert not is_rewardbench([])
