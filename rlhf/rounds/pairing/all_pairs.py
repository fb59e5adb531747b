"""Every decisive comparison of a prompt's responses becomes a pair."""

import itertools
from collections.abc import Sequence

import numpy as np

from rlhf.records import Prompt, Rollout
from rlhf.rounds.pairing.strategy import Steps, compare, direct, distinct, identical


def all_pairs(group: Sequence[Rollout], prompt: Prompt, rng: np.random.Generator) -> Steps:
    """Compare each two distinct responses once; each repeated response counts as one tie."""
    firsts = distinct(group)
    repeats = [identical(firsts[0], i) for i in range(len(group)) if i not in firsts]
    matches = list(itertools.combinations(firsts, 2))
    if not matches:
        return repeats
    verdicts = yield [compare(group, prompt, i, j) for i, j in matches]
    return repeats + [direct(i, j, verdict) for (i, j), verdict in zip(matches, verdicts, strict=True)]
