"""Win rate of a policy with an interval that respects responses of one prompt being correlated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.records import Verdict, VerdictState

RESAMPLES = 2000
_BLOCK = 4_000_000  # resampled counts held at a time: 32 MB
_POINTS = {VerdictState.WIN: 1.0, VerdictState.TIE: 0.5, VerdictState.LOSE: 0.0}


@dataclass(frozen=True, slots=True)
class WinRate:
    """Share of valid comparisons that A wins, ties half, with a 95 % interval; all three NaN if `n` is 0.

    `n` counts the valid comparisons (wins + losses + ties); `invalid` ones are left out.
    """

    win_rate: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    invalid: int
    n: int


def win_rate(verdicts: Sequence[Verdict], seed: int = 0) -> WinRate:
    """A's win rate and its bootstrap interval over prompts (clusters are `comparison.uid`)."""
    count = {state: sum(verdict.state is state for verdict in verdicts) for state in VerdictState}
    clusters: dict[str, list[float]] = {}
    for verdict in verdicts:
        if verdict.state is not VerdictState.INVALID:
            clusters.setdefault(verdict.comparison.uid, []).append(_POINTS[verdict.state])
    n = sum(map(len, clusters.values()))
    rate = math.fsum(sum(points) for points in clusters.values()) / n if n else math.nan
    low, high = bootstrap_interval(list(clusters.values()), seed) if n else (math.nan, math.nan)
    return WinRate(
        win_rate=rate,
        low=low,
        high=high,
        wins=count[VerdictState.WIN],
        losses=count[VerdictState.LOSE],
        ties=count[VerdictState.TIE],
        invalid=count[VerdictState.INVALID],
        n=n,
    )


def bootstrap_interval(clusters: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over all points, resampling whole clusters (Efron and Tibshirani, 1993).

    Where every cluster has the same mean, resampling shows no spread and would claim certainty: there it is the
    Wilson interval with as many trials as clusters.
    """
    totals = np.array([math.fsum(points) for points in clusters])
    sizes = np.array([float(len(points)) for points in clusters])
    means = totals / sizes
    n = len(clusters)
    if np.ptp(means) == 0.0:
        return wilson_interval(float(means[0]) * n, n)
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // n)
    rates = []
    for start in range(0, RESAMPLES, rows):
        drawn = rng.multinomial(n, np.full(n, 1.0 / n), size=min(rows, RESAMPLES - start))
        rates.append((drawn @ totals) / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(rates), [0.025, 0.975])
    return float(low), float(high)


def wilson_interval(wins: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Closed-form score interval of a proportion from `n` independent trials (Wilson, 1927); a tie is half a win."""
    if n <= 0:
        return math.nan, math.nan
    share, z2 = wins / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
