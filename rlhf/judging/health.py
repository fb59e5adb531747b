"""Is the judge to be trusted this round? Rates, bias and warnings from its verdicts."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.config.judge import JudgeHealth
from rlhf.errors import RLHFError
from rlhf.records import Comparison, Verdict, VerdictState

DEFAULTS = JudgeHealth()
MIN_LENGTH_BIAS_COMPARISONS = 20  # below this a correlation of one half is chance
_REASON_CHARS = 200


def judge_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """`judge/*` of a round.

    `invalid_rate` and `truncated_rate` are shares of all comparisons, `flip_rate` and `tie_rate` of the valid ones,
    `confidence` is the mean |2p - 1| of the valid ones (0.0 without any). `length_bias` is the Pearson correlation of
    2p - 1 with the characters of A minus those of B over the valid ones, 0.0 where undefined. `score_mean` is over
    distinct (prompt, response); `score_spread` is the mean over prompts with two scored responses or more of the
    population standard deviation of their scores; both are absent if there are no such scores.
    """
    # Columns: a property or a call for each verdict would cost the loop more than judging does.
    valid = [verdict for verdict in verdicts if verdict.state is not VerdictState.INVALID]
    ties = [verdict.state for verdict in valid].count(VerdictState.TIE)
    p_ab = np.array([verdict.p_ab for verdict in valid])
    p_ba = np.array([verdict.p_ba for verdict in valid])
    flips = int(np.count_nonzero((p_ab - 0.5) * (p_ba - 0.5) < 0))
    preference = p_ab + p_ba - 1.0
    metrics = {
        "judge/comparisons": float(len(verdicts)),
        "judge/flip_rate": _share(flips, len(valid)),
        "judge/tie_rate": _share(ties, len(valid)),
        "judge/invalid_rate": _share(len(verdicts) - len(valid), len(verdicts)),
        "judge/truncated_rate": _share([verdict.truncated for verdict in verdicts].count(True), len(verdicts)),
        "judge/confidence": _mean(np.abs(preference)),
        "judge/length_bias": _length_bias(preference, [verdict.comparison for verdict in valid]),
    }
    return metrics | _score_metrics(verdicts)


def health_warnings(
    metrics: Mapping[str, float],
    thresholds: JudgeHealth = DEFAULTS,
    *,
    judge: str = "judge",
    reasons: str = "verdicts.parquet",
) -> list[str]:
    """One sentence for each of `judge_metrics` that passed its threshold.

    `judge` is the judge's config key, `reasons` the file that keeps the verdicts.
    """
    warnings = []
    flips, ties = metrics["judge/flip_rate"], metrics["judge/tie_rate"]
    if flips > thresholds.max_flip_rate:
        warnings.append(f"{judge}: {flips:.0%} of verdicts flip when the responses change places, and count as ties")
    elif ties > thresholds.max_tie_rate:
        warnings.append(f"{judge}: {ties:.0%} of verdicts are ties: it hardly tells these responses apart")
    if (invalid := metrics["judge/invalid_rate"]) > thresholds.max_invalid_rate:
        warnings.append(f"{judge}: {invalid:.0%} of comparisons could not be judged; see the reasons in {reasons}")
    if (cut := metrics["judge/truncated_rate"]) > thresholds.max_truncated_rate:
        warnings.append(f"{judge}: {cut:.0%} of contexts were cut from the left to fit the judge's longest prompt")
    bias, valid = metrics["judge/length_bias"], round(metrics["judge/comparisons"] * (1.0 - invalid))
    if abs(bias) > thresholds.max_length_bias and valid >= MIN_LENGTH_BIAS_COMPARISONS:
        kind = "longer" if bias > 0 else "shorter"
        warnings.append(f"{judge}: it prefers {kind} responses (correlation {bias:+.2f} with the length difference)")
    spread = metrics.get("judge/score_spread")
    if spread is not None and spread < thresholds.min_score_spread:
        warnings.append(
            f"{judge}: scores of one prompt's responses differ by {spread:.2g} only ({judge}.health.min_score_spread = "
            f"{thresholds.min_score_spread:g}); the judge or the samples have grown alike"
        )
    return warnings


def check_valid_share(verdicts: Sequence[Verdict], min_valid: float, where: str, *, judge: str = "judge") -> None:
    """Raise `RLHFError` if less than `min_valid` of the comparisons have a verdict; none at all are no failure.

    `where` opens the message: the round, say. `judge` is the judge's config key.
    """
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.state is VerdictState.INVALID)
    if not reasons or (share := (len(verdicts) - reasons.total()) / len(verdicts)) >= min_valid:
        return
    reason, count = reasons.most_common(1)[0]
    shown = " ".join(reason.split())[:_REASON_CHARS] or "none given"
    raise RLHFError(
        f"{where}: only {share:.1%} of {len(verdicts)} comparisons could be judged, {judge}.health.min_valid = "
        f"{min_valid:g}; most frequent reason ({count} times): {shown}; mend the judge and run the same command again"
    )


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0


def _mean(values: np.ndarray) -> float:
    return math.fsum(values.tolist()) / len(values) if len(values) else 0.0


def _length_bias(preference: np.ndarray, comparisons: Sequence[Comparison]) -> float:
    difference = np.array([len(comparison.a) - len(comparison.b) for comparison in comparisons], dtype=float)
    # Constant input has no correlation; np.ptp sees it exactly, a variance may not.
    if len(comparisons) < 2 or np.ptp(preference) == 0.0 or np.ptp(difference) == 0.0:
        return 0.0
    bias = float(np.corrcoef(preference, difference)[0, 1])
    return bias if math.isfinite(bias) else 0.0


def _score_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """judge/score_mean and judge/score_spread, where there are finite scores for them."""
    scores: dict[tuple[str, str], float] = {}
    for verdict in verdicts:
        comparison = verdict.comparison
        if (score := verdict.score_a) is not None and math.isfinite(score):
            scores[comparison.uid, comparison.a] = score
        if (score := verdict.score_b) is not None and math.isfinite(score):
            scores[comparison.uid, comparison.b] = score
    if not scores:
        return {}
    numbers: dict[str, int] = {}
    prompts = np.array([numbers.setdefault(uid, len(numbers)) for uid, _ in scores])
    values = np.array(list(scores.values()))
    counts = np.bincount(prompts)
    # From each prompt's first score on, so that equal ones differ by nothing at all.
    steps = values - values[np.unique(prompts, return_index=True)[1]][prompts]
    means = np.bincount(prompts, steps) / counts
    spreads = np.sqrt(np.bincount(prompts, (steps - means[prompts]) ** 2) / counts)
    metrics = {"judge/score_mean": _mean(values)}
    if (several := counts > 1).any():
        metrics["judge/score_spread"] = _mean(spreads[several])
    return metrics
