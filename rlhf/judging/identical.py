"""Identical responses tie: there is nothing to ask a judge, except for their score where it gives one."""

from collections.abc import Sequence

from rlhf.config.judge import (
    BaseJudge,
    PythonJudge,
    RewardModelJudge,
    SafetyJudge,
    SentimentJudge,
    VerifierJudge,
)
from rlhf.judging.verdicts import check_complete
from rlhf.ports import Judge
from rlhf.records import Comparison, Verdict, VerdictState

REASON = "the responses are identical"


def differs(comparison: Comparison) -> bool:
    """Are there two responses to tell apart?"""
    return comparison.a != comparison.b


def gives_scores(config: BaseJudge) -> bool:
    """Does the judge of this config score each response alone?"""
    if isinstance(config, PythonJudge):
        return config.kind == "score"
    return isinstance(config, SentimentJudge | RewardModelJudge | SafetyJudge | VerifierJudge)


async def compare_differing(judge: Judge, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """One verdict a comparison, in order; `judge` is asked only about responses that differ, in one call.

    Raises `RLHFError` if the judge does not return one verdict each.
    """
    asked = [comparison for comparison in comparisons if differs(comparison)]
    verdicts = await judge.compare(asked) if asked else []
    check_complete(asked, verdicts)
    found = iter(verdicts)
    return [next(found) if differs(comparison) else _tie(comparison) for comparison in comparisons]


def _tie(comparison: Comparison) -> Verdict:
    return Verdict(comparison, 0.5, 0.5, VerdictState.TIE, reason=REASON)
