"""Loss and rewards of pairs without a step: what held-out pairs are measured by."""

import math
from collections.abc import Sequence

import torch

from rlhf.learning.losses.step import StepLoss
from rlhf.learning.reference import score_pairs
from rlhf.learning.steps import StepRunner
from rlhf.records import Pair


def measure(steps: StepRunner, pairs: Sequence[Pair], reference: torch.Tensor) -> dict[str, float]:
    """Means over `pairs` as a step on all of them would report: loss, rewards/*, logps/* and kl/mean.

    `reference` is float32 [n, 2]. Nothing moves, the beta controller sees nothing. Every rank calls with the same
    arguments and gets the same numbers; what is not finite is left out. WPO's weights are left out: they need the
    whole distribution at each token.
    """
    options = steps.setup.learner.loss
    with steps.engine.evaluating():
        policy = score_pairs(steps.engine, pairs, steps.setup, options.ld_alpha)
        loss = StepLoss.of(options, pairs, steps.setup.device, steps.shift.value)
        if loss.matches:
            loss.match(policy, reference)
        found = loss(policy, reference, list(range(len(pairs))), steps.betas(pairs), None)
    means = {
        "loss": found.losses,
        "rewards/chosen": found.chosen_rewards,
        "rewards/rejected": found.rejected_rewards,
        "rewards/margins": found.chosen_rewards - found.rejected_rewards,
        "rewards/accuracies": found.accuracies,
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
    }
    if options.needs_reference:
        means["kl/mean"] = (policy - reference).mean(1)
    numbers = {name: float(values.double().mean()) for name, values in means.items()}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
