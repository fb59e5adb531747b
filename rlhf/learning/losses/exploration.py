"""Optimism beside the preference loss, so that an online run samples what its reference does not say already.

SELM: Zhang et al. 2024, "Self-Exploring Language Models" (arXiv 2405.19332), alpha beta log (pi / pi_ref)(y).
XPO: Xie et al. 2024, "Exploratory Preference Optimization" (arXiv 2405.21046), Algorithm 1, alpha log pi(y).
In both y is drawn from pi_ref, and the term is added to what is minimised.
"""

import torch

from rlhf.errors import InputError
from rlhf.learning.losses.base import PairInputs


def optimism(name: str, alpha: float, inputs: PairInputs, written: torch.Tensor | None = None) -> torch.Tensor:
    """The term of each pair, float [n]: the mean over those of its responses that the reference wrote, 0 without any.

    `written` bool [n, 2] says which, chosen then rejected; None is all of them. Raises `InputError` for another name.
    """
    if name == "selm":
        scores = torch.stack([inputs.beta * inputs.chosen_ratio, inputs.beta * inputs.rejected_ratio], 1)
    elif name == "xpo":
        scores = torch.stack([inputs.policy_chosen, inputs.policy_rejected], 1)
    else:
        raise InputError(f"preference_loss: exploration = {name!r}: expected selm or xpo")
    if written is None:
        return alpha * scores.mean(1)
    kept = torch.where(written, scores, torch.zeros_like(scores))
    return alpha * kept.sum(1) / written.sum(1).clamp(min=1)
