"""What a pairing strategy is, and what strategies share."""

from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
from msgspec import Struct

from rlhf.records import Comparison, Prompt, Rollout, Verdict, VerdictState

_FLIP = {VerdictState.WIN: VerdictState.LOSE, VerdictState.LOSE: VerdictState.WIN}


class Candidate(Struct, frozen=True, gc=False):
    """A pair that a strategy proposes; `chosen` and `rejected` are positions in the group.

    `state` is the direct verdict seen from `chosen`: WIN may be kept, TIE and LOSE (the verdict contradicts the
    choice) are dropped as ties, INVALID as invalid. `p_chosen` is p(chosen wins), NaN when invalid.
    """

    chosen: int
    rejected: int
    p_chosen: float
    state: VerdictState


Steps = Generator[list[Comparison], list[Verdict], list[Candidate]]
"""Yields a batch of comparisons, is sent their verdicts in order, returns candidates; may yield any number of times."""

Strategy = Callable[[Sequence[Rollout], Prompt, np.random.Generator], Steps]

Match = tuple[int, int]
"""Two positions in the group, the smaller first."""

Results = Mapping[Match, Verdict]
"""The verdict of each match that was played; its A is the smaller position."""


def compare(group: Sequence[Rollout], prompt: Prompt, i: int, j: int) -> Comparison:
    """Response i (as A) against response j of the group; the record carries their sample numbers k."""
    a, b = group[i], group[j]
    return Comparison(prompt.uid, prompt.messages, a.text, b.text, a.k, b.k, prompt.reference)


def distinct(group: Sequence[Rollout]) -> list[int]:
    """Positions of the first response of each text; the same token ids count as the same text."""
    texts: set[str] = set()
    ids: list[Sequence[int]] = []
    firsts = []
    for position, rollout in enumerate(group):
        if rollout.text not in texts and rollout.token_ids not in ids:
            firsts.append(position)
        texts.add(rollout.text)
        ids.append(rollout.token_ids)
    return firsts


def identical(i: int, j: int) -> Candidate:
    """Two identical responses: a tie without asking the judge."""
    return Candidate(i, j, 0.5, VerdictState.TIE)


def direct(i: int, j: int, verdict: Verdict) -> Candidate:
    """The candidate of a verdict on (i, j) as A and B: the winner is chosen; without a winner, i."""
    if verdict.state is VerdictState.LOSE:
        return Candidate(j, i, 1.0 - verdict.p, VerdictState.WIN)
    return Candidate(i, j, verdict.p, verdict.state)


def match(i: int, j: int) -> Match:
    """The key of i against j in `Results`."""
    return (i, j) if i < j else (j, i)


def ranked(best: int, worst: int, results: Results) -> Candidate:
    """The candidate of a ranking, with the direct verdict of the two, which they must have played."""
    verdict = results[match(best, worst)]
    if best < worst:
        return Candidate(best, worst, verdict.p, verdict.state)
    return Candidate(best, worst, 1.0 - verdict.p, _FLIP.get(verdict.state, verdict.state))
