"""One pair a prompt from a knockout: a linear number of comparisons for any judge (METHODS §1)."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from rlhf.records import Prompt, Rollout, Verdict, VerdictState
from rlhf.rounds.pairing.strategy import (
    Candidate,
    Match,
    Results,
    Steps,
    compare,
    distinct,
    identical,
    match,
    ranked,
)

_OUT = 2
"""Matches without a verdict that put a response out: one may be the opponent's fault."""


def knockout(group: Sequence[Rollout], prompt: Prompt, rng: np.random.Generator) -> Steps:
    """Winners of the first level play on for best, its losers for worst; each level of both is one batch.

    K - 1 matches for best and ceil(K/2) - 1 for worst, then one between the two unless they have met. Under a
    transitive judge this finds the true best and worst. An odd response out plays on in both brackets. A tie tells
    nothing: the earlier response goes on. An invalid match tells nothing about either, so both stay, never to meet
    again; a response with two such matches is out. The pair's p is the direct verdict's: where that is a tie, invalid
    or contrary, or one response came out both best and worst, the candidate is dropped.
    """
    firsts = distinct(group)
    if len(firsts) < 2:
        return [identical(0, 1)]
    results: dict[Match, Verdict] = {}
    best, worst = firsts, firsts
    while True:
        for_best = _pair_up(best, results)
        # At the first level both brackets are the same matches.
        for_worst = _pair_up(worst, results)
        if not for_best and not for_worst:
            break
        new = [pair for pair in dict.fromkeys(for_best + for_worst) if pair not in results]
        if new:
            verdicts = yield [compare(group, prompt, i, j) for i, j in new]
            results |= zip(new, verdicts, strict=True)
        best = _advance(best, for_best, results, VerdictState.WIN)
        worst = _advance(worst, for_worst, results, VerdictState.LOSE)
    if not best or not worst:
        return [Candidate(firsts[0], firsts[1], math.nan, VerdictState.INVALID)]
    return (yield from _final(group, prompt, best, worst, results))


def _final(
    group: Sequence[Rollout], prompt: Prompt, best: list[int], worst: list[int], results: dict[Match, Verdict]
) -> Steps:
    first = _strongest_record(best, results)
    others = [i for i in worst if i != first]
    if not others:
        # Best and worst at once: the verdicts go round in a circle and rank nothing.
        opponent = next(i if j == first else j for i, j in results if first in (i, j))
        return [Candidate(first, opponent, 0.5, VerdictState.TIE)]
    last = _strongest_record(others, results)
    pair = match(first, last)
    if pair not in results:
        [results[pair]] = yield [compare(group, prompt, *pair)]
    return [ranked(first, last, results)]


def _pair_up(players: Sequence[int], results: Results) -> list[Match]:
    """Neighbours meet, except where their match was played without a verdict; who finds no opponent sits out."""
    waiting = list(players)
    matches = []
    while waiting:
        player = waiting.pop(0)
        for opponent in waiting:
            played = results.get(match(player, opponent))
            if played is None or played.state is not VerdictState.INVALID:
                waiting.remove(opponent)
                matches.append(match(player, opponent))
                break
    return matches


def _advance(players: Sequence[int], matches: Iterable[Match], results: Results, goes_on: VerdictState) -> list[int]:
    """Who plays the next level; those who sat this one out come first, so that they play it."""
    strikes = _count(results, valid=False)
    played: list[int] = []
    going: list[int] = []
    for i, j in matches:
        played += (i, j)
        state = results[i, j].state
        if state is VerdictState.INVALID:
            going += (i, j)
        else:
            going.append(i if state in (goes_on, VerdictState.TIE) else j)
    idle = [player for player in players if player not in played]
    return [player for player in idle + going if strikes[player] < _OUT]


def _strongest_record(players: Sequence[int], results: Results) -> int:
    """The one player left; of several that could not be compared the one with the most verdicts, then the earlier."""
    verdicts = _count(results, valid=True)
    return max(players, key=lambda player: (verdicts[player], -player))


def _count(results: Results, valid: bool) -> Counter[int]:
    """Matches with a verdict, or without one, by player."""
    return Counter(
        player
        for pair, verdict in results.items()
        if (verdict.state is not VerdictState.INVALID) is valid
        for player in pair
    )
