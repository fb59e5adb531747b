"""Is the judge to be trusted this round? Rates, bias and warnings from its verdicts."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.records import Verdict, VerdictState

MAX_FLIP_RATE = 0.5
MAX_TIE_RATE = 0.8
MAX_INVALID_RATE = 0.1
MAX_LENGTH_BIAS = 0.5
MIN_LENGTH_BIAS_COMPARISONS = 20  # below this a correlation of one half is chance


def judge_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """`judge/*` of a round.

    `invalid_rate` is a share of all comparisons, `flip_rate` and `tie_rate` are shares of the valid ones.
    `length_bias` is the Pearson correlation of 2p - 1 with the characters of A minus those of B over the valid ones,
    0.0 where undefined. `score_mean` is over distinct (prompt, response), absent if the judge gives no scores.
    """
    valid = [verdict for verdict in verdicts if verdict.state is not VerdictState.INVALID]
    ties = sum(verdict.state is VerdictState.TIE for verdict in valid)
    metrics = {
        "judge/comparisons": float(len(verdicts)),
        "judge/flip_rate": _share(sum(verdict.flipped for verdict in valid), len(valid)),
        "judge/tie_rate": _share(ties, len(valid)),
        "judge/invalid_rate": _share(len(verdicts) - len(valid), len(verdicts)),
        "judge/length_bias": _length_bias(valid),
    }
    scores = _distinct_scores(verdicts)
    if scores:
        metrics["judge/score_mean"] = math.fsum(scores) / len(scores)
    return metrics


def health_warnings(metrics: Mapping[str, float]) -> list[str]:
    """One sentence for each of `judge_metrics` that passed its threshold."""
    warnings = []
    flips, ties = metrics["judge/flip_rate"], metrics["judge/tie_rate"]
    if flips > MAX_FLIP_RATE:
        warnings.append(f"judge: {flips:.0%} of verdicts flip when the responses change places; they are dropped")
    elif ties > MAX_TIE_RATE:
        warnings.append(f"judge: {ties:.0%} of verdicts are ties; those pairs are dropped")
    if (invalid := metrics["judge/invalid_rate"]) > MAX_INVALID_RATE:
        warnings.append(f"judge: {invalid:.0%} of comparisons could not be judged; see the reasons in verdicts.parquet")
    bias = metrics["judge/length_bias"]
    if abs(bias) > MAX_LENGTH_BIAS and metrics["judge/comparisons"] >= MIN_LENGTH_BIAS_COMPARISONS:
        kind = "longer" if bias > 0 else "shorter"
        warnings.append(f"judge: it prefers {kind} responses (correlation {bias:+.2f} with the length difference)")
    return warnings


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0


def _length_bias(valid: Sequence[Verdict]) -> float:
    preference = np.array([2.0 * verdict.p - 1.0 for verdict in valid])
    difference = np.array([float(len(verdict.comparison.a) - len(verdict.comparison.b)) for verdict in valid])
    # Constant input has no correlation; np.ptp sees it exactly, a variance may not.
    if len(valid) < 2 or np.ptp(preference) == 0.0 or np.ptp(difference) == 0.0:
        return 0.0
    bias = float(np.corrcoef(preference, difference)[0, 1])
    return bias if math.isfinite(bias) else 0.0


def _distinct_scores(verdicts: Sequence[Verdict]) -> list[float]:
    scores: dict[tuple[str, str], float] = {}
    for verdict in verdicts:
        comparison = verdict.comparison
        for text, score in ((comparison.a, verdict.score_a), (comparison.b, verdict.score_b)):
            if score is not None:
                scores[comparison.uid, text] = score
    return list(scores.values())
