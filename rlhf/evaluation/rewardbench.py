"""Category scores of RewardBench v1 (Lambert et al., 2024; weights and published figures in METHODS §1)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rlhf.evaluation.winrate import wilson_interval

WEIGHTS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""The weight n_s of each subset in its category."""

ROWS: dict[str, int] = {subset: n for weights in WEIGHTS.values() for subset, n in weights.items()} | {"math-prm": 447}
"""Rows of each subset in the published set: the weights, except for math-prm."""

PUBLISHED_MODEL = "RLHFlow/pair-preference-model-LLaMA3-8B"
PUBLISHED: dict[str, float] = {"Chat": 98.6, "Chat Hard": 65.8, "Safety": 89.6, "Reasoning": 94.9}


@dataclass(frozen=True, slots=True)
class Category:
    """A category's score in [0, 100] with a 95 % interval.

    `missing` names its subsets without a row, which the score leaves out; `rows` of `expected` rows were judged.
    `published` is the figure of `PUBLISHED_MODEL`.
    """

    name: str
    score: float
    low: float
    high: float
    rows: int
    expected: int
    missing: tuple[str, ...]
    published: float


def is_rewardbench(subsets: Collection[str]) -> bool:
    """All subset names (at least one) are RewardBench's."""
    return bool(subsets) and all(subset in ROWS for subset in subsets)


def category_scores(accuracies: Mapping[str, tuple[float, int]]) -> tuple[Category, ...]:
    """Scores of the categories that have a subset in `accuracies`, which maps a subset to (accuracy, rows).

    score = 100 * sum of acc_s * n_s / sum of n_s over the subsets present, n_s the weight of the table. The interval
    is Wilson's for the trials that unweighted data would need for the same spread, 1 / sum of w_s^2 / rows_s with
    w_s = n_s / sum of n_s (Kish, 1965).
    """
    return tuple(
        _category(name, weights, accuracies)
        for name, weights in WEIGHTS.items()
        if any(subset in accuracies for subset in weights)
    )


def _category(name: str, weights: Mapping[str, int], accuracies: Mapping[str, tuple[float, int]]) -> Category:
    present = [subset for subset in weights if subset in accuracies]
    total = sum(weights[subset] for subset in present)
    score = sum(accuracies[subset][0] * weights[subset] for subset in present) / total
    spread = sum((weights[subset] / total) ** 2 / accuracies[subset][1] for subset in present)
    trials = max(1, int(1.0 / spread + 1e-9))  # rounded down: an interval too wide rather than too narrow
    low, high = wilson_interval(score * trials, trials)
    return Category(
        name=name,
        score=100.0 * score,
        low=100.0 * low,
        high=100.0 * high,
        rows=sum(accuracies[subset][1] for subset in present),
        expected=sum(ROWS[subset] for subset in weights),
        missing=tuple(subset for subset in weights if subset not in accuracies),
        published=PUBLISHED[name],
    )
