"""One pair a prompt: the best response against the worst, ranked by a round robin (METHODS §1 and §2)."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from rlhf.records import Prompt, Rollout, Verdict, VerdictState
from rlhf.rounds.pairing.strategy import Candidate, Steps, compare, direct, distinct, identical

_FLIP = {VerdictState.WIN: VerdictState.LOSE, VerdictState.LOSE: VerdictState.WIN}


def best_vs_worst(group: Sequence[Rollout], prompt: Prompt, rng: np.random.Generator) -> Steps:
    """Compare each two distinct responses once, rank by mean win probability, pair the first with the last.

    The pair's p is that of the direct verdict; where that is a tie, invalid or against the ranking, the candidate
    says so and is dropped. Equal ranks fall to the earlier response.
    """
    firsts = distinct(group)
    if len(firsts) < 2:
        return [identical(0, 1)]
    matches = list(itertools.combinations(firsts, 2))
    verdicts = yield [compare(group, prompt, i, j) for i, j in matches]
    results = dict(zip(matches, verdicts, strict=True))
    means = mean_win_probabilities(results)
    if len(means) < 2:  # nothing was judged
        return [direct(*matches[0], results[matches[0]])]
    best = max(means, key=lambda i: (means[i], -i))
    worst = min((i for i in means if i != best), key=lambda i: (means[i], i))
    return [_ranked(best, worst, results)]


def mean_win_probabilities(results: dict[tuple[int, int], Verdict]) -> dict[int, float]:
    """Mean p(i wins) over i's valid verdicts, for each i that has one."""
    wins: dict[int, list[float]] = {}
    for (i, j), verdict in results.items():
        if verdict.state is not VerdictState.INVALID:
            wins.setdefault(i, []).append(verdict.p)
            wins.setdefault(j, []).append(1.0 - verdict.p)
    return {i: math.fsum(values) / len(values) for i, values in wins.items()}


def _ranked(best: int, worst: int, results: dict[tuple[int, int], Verdict]) -> Candidate:
    if best < worst:
        verdict = results[best, worst]
        return Candidate(best, worst, verdict.p, verdict.state)
    verdict = results[worst, best]
    return Candidate(best, worst, 1.0 - verdict.p, _FLIP.get(verdict.state, verdict.state))
