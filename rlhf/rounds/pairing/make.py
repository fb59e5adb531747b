"""From a prompt's responses to its preference pairs: drives a strategy, drops what is unsure, counts everything."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.config.pairing import Pairing
from rlhf.judging.verdicts import check_complete
from rlhf.ports import Judge
from rlhf.records import Pair, Prompt, Rollout, Verdict, VerdictState
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


@dataclass(frozen=True, slots=True)
class PairingResult:
    """A prompt's pairs and all its verdicts.

    `counts`: `kept`, `dropped_tie` and `dropped_invalid` add up to the candidates; `empty_responses` had no tokens;
    `incomplete` is 1 where the group had too few responses to be paired at all.
    """

    pairs: tuple[Pair, ...]
    verdicts: tuple[Verdict, ...]
    counts: dict[str, int]


async def make_pairs(
    group: Sequence[Rollout],
    prompt: Prompt,
    judge: Judge,
    config: Pairing,
    rng: np.random.Generator,
    round: int,
    samples: int | None = None,
) -> PairingResult:
    """Judge and pair the responses of one prompt, in order of k whatever order they came in.

    `samples` is K: a group with fewer responses, or fewer than two with tokens, gives no pair (METHODS §2).
    Raises `RLHFError` if the judge does not return one verdict a comparison.
    """
    if any(rollout.uid != prompt.uid for rollout in group):
        raise ValueError(f"responses of other prompts in the group of prompt {prompt.uid}")
    usable = sorted((rollout for rollout in group if rollout.token_ids), key=lambda rollout: rollout.k)
    counts = {"kept": 0, "dropped_tie": 0, "dropped_invalid": 0, "incomplete": 0}
    counts["empty_responses"] = len(group) - len(usable)
    if len(usable) < 2 or (samples is not None and len(group) < samples):
        counts["incomplete"] = 1
        return PairingResult((), (), counts)
    candidates, verdicts = await _drive(STRATEGIES[config.strategy](usable, prompt, rng), judge)
    pairs = []
    for candidate in candidates:
        fate = _fate(candidate, config.min_margin)
        counts[fate] += 1
        if fate == "kept":
            pairs.append(_pair(candidate, usable, prompt, round))
    return PairingResult(tuple(pairs), tuple(verdicts), counts)


async def _drive(steps: Steps, judge: Judge) -> tuple[list[Candidate], list[Verdict]]:
    """Run a strategy to its end; each batch it yields is one call of the judge."""
    seen: list[Verdict] = []
    try:
        comparisons = next(steps)
        while True:
            verdicts = await judge.compare(comparisons)
            check_complete(comparisons, verdicts)
            seen += verdicts
            comparisons = steps.send(verdicts)
    except StopIteration as stop:
        return stop.value, seen


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


def _comparable_logprobs(rollout: Rollout) -> tuple[float, ...]:
    """The engine's log-probs if one version wrote the whole response; a mixture compares with no learner."""
    return rollout.logprobs if len({span.version for span in rollout.versions}) == 1 else ()
