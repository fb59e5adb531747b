"""Supervised fine-tuning on the chosen response: the negative log-likelihood, no reference."""

import torch

from rlhf.learning.losses.base import PreferenceLoss, implicit_reward


def sft(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float | torch.Tensor,
) -> PreferenceLoss:
    """-log pi(y_w), summed over its tokens; float [n] in and out. The rejected response has no part in it."""
    # Times zero, so that a graph that was built for both responses gets a gradient for both.
    return PreferenceLoss(
        -policy_chosen + 0.0 * policy_rejected,
        implicit_reward(policy_chosen, reference_chosen, beta),
        implicit_reward(policy_rejected, reference_rejected, beta),
    )
