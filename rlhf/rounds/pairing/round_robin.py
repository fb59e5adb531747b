"""One pair a prompt: the first against the last of a full round robin (METHODS §1)."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from rlhf.records import Prompt, Rollout, VerdictState
from rlhf.rounds.pairing.strategy import Candidate, Results, Steps, compare, direct, distinct, identical, ranked


def round_robin(group: Sequence[Rollout], prompt: Prompt, rng: np.random.Generator) -> Steps:
    """Compare each two distinct responses once, K(K - 1)/2 comparisons in one batch; see `standings`."""
    firsts = distinct(group)
    if len(firsts) < 2:
        return [identical(0, 1)]
    matches = list(itertools.combinations(firsts, 2))
    verdicts = yield [compare(group, prompt, i, j) for i, j in matches]
    return [standings(dict(zip(matches, verdicts, strict=True)))]


def standings(results: Results) -> Candidate:
    """Rank by mean win probability over all matches played and pair the first with the last.

    The pair's p is that of the direct verdict; where that is a tie, invalid or against the ranking, the candidate
    says so and is dropped. Equal ranks fall to the earlier response. `results` holds every match of the round robin.
    """
    means = mean_win_probabilities(results)
    if len(means) < 2:  # nothing was judged
        first = min(results)
        return direct(*first, results[first])
    best = max(means, key=lambda i: (means[i], -i))
    worst = min((i for i in means if i != best), key=lambda i: (means[i], i))
    return ranked(best, worst, results)


def mean_win_probabilities(results: Results) -> dict[int, float]:
    """Mean p(i wins) over i's valid verdicts, for each i that has one."""
    wins: dict[int, list[float]] = {}
    for (i, j), verdict in results.items():
        if verdict.state is not VerdictState.INVALID:
            wins.setdefault(i, []).append(verdict.p)
            wins.setdefault(j, []).append(1.0 - verdict.p)
    return {i: math.fsum(values) / len(values) for i, values in wins.items()}
