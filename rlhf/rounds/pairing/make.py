"""From a prompt's responses to its preference pairs: drives a strategy, drops what is unsure, counts everything."""

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
from msgspec import Struct

from rlhf.config.pairing import Pairing
from rlhf.judging.verdicts import check_complete
from rlhf.ports import Judge
from rlhf.records import Comparison, Pair, Prompt, Rollout, Verdict, VerdictState
from rlhf.rounds.pairing.all_pairs import all_pairs
from rlhf.rounds.pairing.best_vs_worst import best_vs_worst
from rlhf.rounds.pairing.knockout import knockout
from rlhf.rounds.pairing.random_pair import random_pair
from rlhf.rounds.pairing.round_robin import round_robin
from rlhf.rounds.pairing.strategy import Candidate, Steps, Strategy

STRATEGIES: dict[str, Strategy] = {
    "best_vs_worst": best_vs_worst,
    "round_robin": round_robin,
    "knockout": knockout,
    "random": random_pair,
    "all_pairs": all_pairs,
}
DRAWING = frozenset({"random"})
"""Strategies that draw from their generator; all others leave it as it is."""

Outcome = tuple[list[Candidate], list[Verdict]]
"""What a strategy proposes in the end, and every verdict that it was sent."""

_number = attrgetter("k")


class PairingResult(Struct, frozen=True, gc=False):
    """A prompt's pairs and all its verdicts.

    `counts`: `kept`, `dropped_tie` and `dropped_invalid` add up to the candidates; `empty_responses` had no tokens;
    `incomplete` is 1 where the group had too few responses to be paired at all.
    """

    pairs: tuple[Pair, ...]
    verdicts: tuple[Verdict, ...]
    counts: dict[str, int]


class Group(Struct, frozen=True, gc=False):
    """The responses to a prompt, in any order, and what its strategy draws from."""

    prompt: Prompt
    rollouts: Sequence[Rollout]
    rng: np.random.Generator


async def make_pairs(
    groups: Sequence[Group], judge: Judge, config: Pairing, round: int, samples: int | None = None
) -> list[PairingResult]:
    """Judge and pair the responses of each prompt, in order of k; what all ask next is one call of the judge.

    `samples` is K: a group with fewer responses, or fewer than two with tokens, gives no pair (METHODS §2).
    Raises `RLHFError` if the judge does not return one verdict a comparison.
    """
    strategy = STRATEGIES[config.strategy]
    usables = [_usable(group) for group in groups]
    playing = [
        number
        for number, usable in enumerate(usables)
        if len(usable) >= 2 and (samples is None or len(groups[number].rollouts) >= samples)
    ]
    played = await _play([strategy(usables[n], groups[n].prompt, groups[n].rng) for n in playing], judge)
    outcomes = dict(zip(playing, played, strict=True))
    return [
        _result(group, usables[number], outcomes.get(number), config.min_margin, round)
        for number, group in enumerate(groups)
    ]


def _usable(group: Group) -> list[Rollout]:
    """The responses that have tokens, in order of k."""
    uid = group.prompt.uid
    for rollout in group.rollouts:
        if rollout.uid != uid:
            raise ValueError(f"responses of other prompts in the group of prompt {uid}")
    return sorted([rollout for rollout in group.rollouts if rollout.token_ids], key=_number)


def _result(
    group: Group, usable: Sequence[Rollout], outcome: Outcome | None, min_margin: float, round: int
) -> PairingResult:
    """What became of a group; `outcome` is None where it could not be paired."""
    counts = {"kept": 0, "dropped_tie": 0, "dropped_invalid": 0, "incomplete": int(outcome is None)}
    counts["empty_responses"] = len(group.rollouts) - len(usable)
    if outcome is None:
        return PairingResult((), (), counts)
    pairs = []
    candidates, verdicts = outcome
    for candidate in candidates:
        fate = _fate(candidate, min_margin)
        counts[fate] += 1
        if fate == "kept":
            pairs.append(_pair(candidate, usable, group.prompt, round))
    return PairingResult(tuple(pairs), tuple(verdicts), counts)


async def _play(strategies: Sequence[Steps], judge: Judge) -> list[Outcome]:
    """Run strategies side by side to their ends; what they ask at the same time is one call of the judge."""
    seen: list[list[Verdict]] = [[] for _ in strategies]
    ends: list[list[Candidate]] = [[] for _ in strategies]
    asking: list[tuple[int, list[Comparison]]] = []
    for number, steps in enumerate(strategies):
        try:
            asking.append((number, next(steps)))
        except StopIteration as stop:
            ends[number] = stop.value
    while asking:
        comparisons = [comparison for _, asked in asking for comparison in asked]
        verdicts = await judge.compare(comparisons)
        check_complete(comparisons, verdicts)
        answered, asking, start = asking, [], 0
        for number, asked in answered:
            answer = verdicts[start : start + len(asked)]
            start += len(asked)
            seen[number] += answer
            try:
                asking.append((number, strategies[number].send(answer)))
            except StopIteration as stop:
                ends[number] = stop.value
    return list(zip(ends, seen, strict=True))


def _fate(candidate: Candidate, min_margin: float) -> str:
    if candidate.state is VerdictState.INVALID:
        return "dropped_invalid"
    if candidate.state is not VerdictState.WIN or 2.0 * candidate.p_chosen - 1.0 < min_margin:
        return "dropped_tie"
    return "kept"


def _pair(candidate: Candidate, group: Sequence[Rollout], prompt: Prompt, round: int) -> Pair:
    chosen, rejected = group[candidate.chosen], group[candidate.rejected]
    return Pair(
        uid=prompt.uid,
        round=round,
        prompt_ids=prompt.token_ids,
        chosen_ids=chosen.token_ids,
        rejected_ids=rejected.token_ids,
        prompt=prompt.text,
        chosen=chosen.text,
        rejected=rejected.text,
        p_chosen=candidate.p_chosen,
        chosen_version=chosen.oldest_version,
        rejected_version=rejected.oldest_version,
        chosen_logprobs=_comparable_logprobs(chosen),
        rejected_logprobs=_comparable_logprobs(rejected),
    )


def _comparable_logprobs(rollout: Rollout) -> Sequence[float]:
    """The engine's log-probs if one version wrote the whole response; a mixture compares with no learner."""
    versions = rollout.versions
    return rollout.logprobs if len(versions) == 1 or len({span.version for span in versions}) == 1 else ()
