"""A choice between two responses: cross-entropy of a softmax over the two of them alone, no reference.

With answers of one token, `A` and `B`, this trains what a pair-preference judge reads (METHODS §1: the softmax over
the two answers only) and nothing else of the vocabulary.
"""

import torch
import torch.nn.functional as F

from rlhf.learning.losses.base import PreferenceLoss, implicit_reward


def choice(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float | torch.Tensor,
) -> PreferenceLoss:
    """-log [pi(y_w)^beta / (pi(y_w)^beta + pi(y_l)^beta)]; float [n] in and out."""
    return PreferenceLoss(
        -F.logsigmoid(beta * (policy_chosen - policy_rejected)),
        implicit_reward(policy_chosen, reference_chosen, beta),
        implicit_reward(policy_rejected, reference_rejected, beta),
    )
