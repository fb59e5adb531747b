"""Several judges on every comparison: the weighted mean of their probabilities, or a vote."""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Literal

from msgspec.structs import replace

from rlhf.judging.verdicts import check_complete, invalid_verdict, make_verdict
from rlhf.ports import Judge
from rlhf.records import Comparison, Verdict, VerdictState

_VOTES = {VerdictState.WIN: 1.0, VerdictState.TIE: 0.5, VerdictState.LOSE: 0.0}
_ROUNDING = 1e-12

Opinion = tuple[Verdict, float]


class EnsembleJudge:
    """Asks all members at once and combines what is valid.

    "weights": p_ab and p_ba are the members' weighted means. "vote": both are the weighted share of the votes, a win
    1, a tie 0.5, a loss 0. A verdict is INVALID where the valid members hold less than `quorum` of the weight. It has
    no scores: the members' have no common unit, so their mean would rank by whichever numbers are larger.
    """

    def __init__(
        self, members: Sequence[tuple[Judge, float]], method: Literal["weights", "vote"], quorum: float
    ) -> None:
        """`members` are judges and their weights (> 0); `quorum` is a share of the weight in (0, 1]."""
        self._judges = [judge for judge, _ in members]
        self._weights = [weight for _, weight in members]
        self._method = method
        self._quorum = quorum

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order; raises what a member raises, and asks the others no more."""
        tasks = [asyncio.create_task(_ask(judge, comparisons)) for judge in self._judges]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return [
            self._combine(comparison, verdicts)
            for comparison, verdicts in zip(comparisons, zip(*answers, strict=True), strict=True)
        ]

    def _combine(self, comparison: Comparison, verdicts: Sequence[Verdict]) -> Verdict:
        opinions = list(zip(verdicts, self._weights, strict=True))
        valid = [opinion for opinion in opinions if opinion[0].state is not VerdictState.INVALID]
        share = math.fsum(weight for _, weight in valid) / math.fsum(self._weights)
        if share < self._quorum - _ROUNDING:
            reasons = "; ".join(
                f"members.{index}: {verdict.reason}"
                for index, verdict in enumerate(verdicts)
                if verdict.state is VerdictState.INVALID
            )
            return invalid_verdict(comparison, f"valid members hold {share:.2f} of the weight: {reasons}")
        if self._method == "vote":
            p_ab = p_ba = _mean(valid, lambda verdict: _VOTES[verdict.state])
        else:
            p_ab = _mean(valid, lambda verdict: verdict.p_ab)
            p_ba = _mean(valid, lambda verdict: verdict.p_ba)
        verdict = make_verdict(comparison, p_ab, p_ba)
        return replace(verdict, truncated=any(opinion.truncated for opinion, _ in valid))


async def _ask(judge: Judge, comparisons: Sequence[Comparison]) -> list[Verdict]:
    verdicts = await judge.compare(comparisons)
    check_complete(comparisons, verdicts)
    return verdicts


def _mean(opinions: Sequence[Opinion], value: Callable[[Verdict], float]) -> float:
    """The weighted mean; one half where only rounding keeps it from that, for a tie is a state of its own."""
    total = math.fsum(weight for _, weight in opinions)
    mean = math.fsum(weight * value(verdict) for verdict, weight in opinions) / total
    return 0.5 if abs(mean - 0.5) < _ROUNDING else min(1.0, max(0.0, mean))
