"""One pair a prompt: two distinct responses drawn at random, as plain online DPO does."""

from collections.abc import Sequence

import numpy as np

from rlhf.records import Prompt, Rollout
from rlhf.rounds.pairing.strategy import Steps, compare, direct, distinct, identical


def random_pair(group: Sequence[Rollout], prompt: Prompt, rng: np.random.Generator) -> Steps:
    """Draw two distinct responses from `rng` and let the judge choose."""
    firsts = distinct(group)
    if len(firsts) < 2:
        return [identical(0, 1)]
    i, j = (int(position) for position in rng.choice(firsts, size=2, replace=False))
    verdicts = yield [compare(group, prompt, i, j)]
    return [direct(i, j, verdicts[0])]
