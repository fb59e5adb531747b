"""From two probabilities to a verdict: the rules that every judge shares."""

import math
from collections.abc import Sequence

from rlhf.errors import RLHFError
from rlhf.records import Comparison, Verdict, VerdictState


def sigmoid(x: float) -> float:
    """The logistic function; written with tanh, so it never overflows and sigmoid(x) + sigmoid(-x) is 1."""
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def make_verdict(
    comparison: Comparison,
    p_ab: float,
    p_ba: float,
    score_a: float | None = None,
    score_b: float | None = None,
) -> Verdict:
    """The verdict for p(A wins) with A shown first (`p_ab`) and with B shown first (`p_ba`).

    A number outside [0, 1] or not finite makes it INVALID; orders that contradict each other, or an average of
    exactly one half, make it a TIE; otherwise the average decides (METHODS §1).
    """
    if not all(math.isfinite(p) and 0.0 <= p <= 1.0 for p in (p_ab, p_ba)):
        reason = f"the judge's probabilities are not numbers in [0, 1]: {p_ab}, {p_ba}"
        return invalid_verdict(comparison, reason, score_a, score_b)
    verdict = Verdict(comparison, p_ab, p_ba, VerdictState.TIE, score_a, score_b)
    if verdict.flipped:
        return Verdict(comparison, p_ab, p_ba, VerdictState.TIE, score_a, score_b, "the two orders contradict")
    if verdict.p == 0.5:
        return verdict
    state = VerdictState.WIN if verdict.p > 0.5 else VerdictState.LOSE
    return Verdict(comparison, p_ab, p_ba, state, score_a, score_b)


def invalid_verdict(
    comparison: Comparison, reason: str, score_a: float | None = None, score_b: float | None = None
) -> Verdict:
    """A comparison that could not be judged, and why. Scores of a side that has one are kept."""
    return Verdict(comparison, math.nan, math.nan, VerdictState.INVALID, score_a, score_b, reason)


def check_complete(comparisons: Sequence[Comparison], verdicts: Sequence[object]) -> None:
    """Raise `RLHFError` unless there is one verdict for each comparison: a judge that returns nothing is no judge."""
    if len(verdicts) != len(comparisons):
        raise RLHFError(f"judge: returned {len(verdicts)} verdicts for {len(comparisons)} comparisons; one each is due")
