"""Sigmoid DPO: Rafailov et al. 2023, "Direct Preference Optimization", equation 7."""

import torch
import torch.nn.functional as F

from rlhf.learning.losses.base import PreferenceLoss, implicit_reward


def sigmoid(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float | torch.Tensor,
) -> PreferenceLoss:
    """-log sigmoid(beta h), h the difference of the two log-ratios; float [n] in and out.

    `logsigmoid` keeps it finite for any h that is: the loss tends to beta |h| on the wrong side and to 0 on the right.
    """
    # Each response against its own reference first: long responses have log-probs near -1e4 and ratios near 0.
    difference = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return PreferenceLoss(
        -F.logsigmoid(beta * difference),
        implicit_reward(policy_chosen, reference_chosen, beta),
        implicit_reward(policy_rejected, reference_rejected, beta),
    )
