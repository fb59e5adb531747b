"""Is a judge as sure as it is right? Expected calibration error and Brier score of p(chosen wins)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 15


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions with a confidence in [low, high): how many, their mean confidence and their share of right ones."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """`ece` and `brier` of `n` predictions, and the bins that hold any; both NaN for no prediction."""

    n: int
    ece: float
    brier: float
    bins: tuple[Bin, ...]


def calibration(p_chosen: Sequence[float]) -> Calibration:
    """Calibration of the probabilities, each in [0, 1], that the response known to be better wins.

    Confidence is max(p, 1 - p); a prediction is right where p > 0.5 and half right where p is exactly 0.5. The
    confidences, all in [0.5, 1], fall into 15 equal bins of that range, the last one closed, and
    ECE = sum over bins of n_b / n * |accuracy_b - confidence_b| (Guo et al., 2017). The Brier score is the mean of
    (1 - p)^2 (Brier, 1950): 0.25 for a judge that always says one half.
    """
    p = np.asarray(p_chosen, dtype=np.float64)
    if p.size == 0:
        return Calibration(0, float("nan"), float("nan"), ())
    confidence = np.maximum(p, 1.0 - p)
    right = np.where(p == 0.5, 0.5, p > 0.5)
    edges = np.linspace(0.5, 1.0, BINS + 1)
    index = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, BINS - 1)
    bins = []
    for number in np.unique(index).tolist():
        held = index == number
        bins.append(
            Bin(
                low=float(edges[number]),
                high=float(edges[number + 1]),
                n=int(held.sum()),
                confidence=float(confidence[held].mean()),
                accuracy=float(right[held].mean()),
            )
        )
    ece = sum(each.n * abs(each.accuracy - each.confidence) for each in bins) / p.size
    return Calibration(n=p.size, ece=float(ece), brier=float(np.mean((1.0 - p) ** 2)), bins=tuple(bins))
