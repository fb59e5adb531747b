"""Losses that take each response's reward on its own, and not the difference of the two."""

import torch
import torch.nn.functional as F

from rlhf.learning.losses.base import PairInputs


def nca_pair(inputs: PairInputs) -> torch.Tensor:
    """NCA with two responses (Chen et al. 2024, "Noise Contrastive Alignment"): float [n].

    -log s(r_w) - 1/2 log s(-r_w) - 1/2 log s(-r_l), s the logistic function.
    """
    chosen, rejected = inputs.beta * inputs.chosen_ratio, inputs.beta * inputs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(inputs: PairInputs, *, reward_shift: float | torch.Tensor = 0.0) -> torch.Tensor:
    """BCO (Jung et al. 2024, "Binary Classifier Optimization"): float [n].

    -log s(r_w - d) - log s(d - r_l). `reward_shift` d is the paper's running mean of the rewards; see `RewardShift`.
    """
    chosen, rejected = inputs.beta * inputs.chosen_ratio, inputs.beta * inputs.rejected_ratio
    return -F.logsigmoid(chosen - reward_shift) - F.logsigmoid(reward_shift - rejected)


def sppo_hard(inputs: PairInputs) -> torch.Tensor:
    """SPPO with hard labels (Wu et al. 2024, "Self-Play Preference Optimization", equation 4.7, P in {0, 1}).

    (log-ratio of y_w - 1 / (2 beta))^2 + (log-ratio of y_l + 1 / (2 beta))^2, float [n].
    """
    target = 0.5 / inputs.beta
    return (inputs.chosen_ratio - target).square() + (inputs.rejected_ratio + target).square()


def apo_zero(inputs: PairInputs) -> torch.Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, equation 7): 1 - s(r_w) + s(r_l), float [n].

    For chosen responses that are better than what the policy writes.
    """
    return torch.sigmoid(-inputs.beta * inputs.chosen_ratio) + torch.sigmoid(inputs.beta * inputs.rejected_ratio)


def apo_down(inputs: PairInputs) -> torch.Tensor:
    """APO-down (D'Oosterlinck et al. 2024, equation 8): s(r_w) + 1 - s(r_w - r_l), float [n].

    For chosen responses that are worse than what the policy writes.
    """
    chosen = torch.sigmoid(inputs.beta * inputs.chosen_ratio)
    return chosen + torch.sigmoid(-inputs.beta * inputs.difference())
