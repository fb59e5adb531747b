"""One pair a prompt: the best response against the worst, by score where the judge scores responses (METHODS §2)."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from rlhf.records import Prompt, Rollout, Verdict, VerdictState
from rlhf.rounds.pairing.round_robin import standings
from rlhf.rounds.pairing.strategy import Candidate, Match, Results, Steps, compare, distinct, identical, match, ranked


def best_vs_worst(group: Sequence[Rollout], prompt: Prompt, rng: np.random.Generator) -> Steps:
    """Look at every distinct response once; rank by score, or finish the round robin for a judge without scores.

    The first batch has ceil(K/2) comparisons. With scores one more follows, of best and worst, unless they have met:
    the pair's p is that of their direct verdict, and a tie, an invalid or a contrary verdict drops it. A response
    without a score is no candidate. Without scores (or with fewer than two) a second batch plays the matches that are
    missing and the pair is that of `round_robin`.
    """
    firsts = distinct(group)
    if len(firsts) < 2:
        return [identical(0, 1)]
    if len(firsts) == 2:
        [verdict] = yield [compare(group, prompt, *firsts)]
        return [of_two(firsts[0], firsts[1], verdict)]
    cover = covering(firsts)
    verdicts = yield [compare(group, prompt, i, j) for i, j in cover]
    results = dict(zip(cover, verdicts, strict=True))
    scores = response_scores(results)
    if len(scores) < 2:
        rest = [pair for pair in itertools.combinations(firsts, 2) if pair not in results]
        if rest:
            verdicts = yield [compare(group, prompt, i, j) for i, j in rest]
            results |= zip(rest, verdicts, strict=True)
        return [standings(results)]
    best = max(scores, key=lambda i: (scores[i], -i))
    worst = min((i for i in scores if i != best), key=lambda i: (scores[i], i))
    final = match(best, worst)
    if final not in results:
        [results[final]] = yield [compare(group, prompt, *final)]
    return [ranked(best, worst, results)]


def of_two(i: int, j: int, verdict: Verdict) -> Candidate:
    """The candidate of i against j where there are no others: what the rules for many come to."""
    results = {(i, j): verdict}
    scores = response_scores(results)
    if len(scores) < 2:
        return standings(results)
    return ranked(j, i, results) if scores[j] > scores[i] else ranked(i, j, results)


def covering(positions: Sequence[int]) -> list[Match]:
    """ceil(n/2) matches in which each of n positions, in ascending order, plays; an odd last one meets the first."""
    pairs = [(positions[n], positions[n + 1]) for n in range(0, len(positions) - 1, 2)]
    if len(positions) % 2:
        pairs.append((positions[0], positions[-1]))
    return pairs


def response_scores(results: Results) -> dict[int, float]:
    """The finite scores by position; empty if a valid verdict lacks one, for then the judge does not score responses.

    An invalid verdict may still carry the score of the side that could be judged.
    """
    scores: dict[int, float] = {}
    for (i, j), verdict in results.items():
        a, b = verdict.score_a, verdict.score_b
        if has_a := a is not None and math.isfinite(a):
            scores[i] = a
        if has_b := b is not None and math.isfinite(b):
            scores[j] = b
        if not (has_a and has_b) and verdict.state is not VerdictState.INVALID:
            return {}
    return scores
