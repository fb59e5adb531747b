"""DiscoPOP: Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for LLMs", equation 5."""

import torch
import torch.nn.functional as F

from rlhf.learning.losses.base import PairInputs


def discopop(inputs: PairInputs, *, tau: float = 0.05) -> torch.Tensor:
    """(1 - m) (-log sigmoid(l)) + m exp(-l) with l = beta h and m = sigmoid(l / tau); float [n], 0 < tau <= 1."""
    logits = inputs.beta * inputs.difference()
    # In one exponent, because on the wrong side exp(-l) overflows where m is 0.
    exponential = torch.exp(F.logsigmoid(logits / tau) - logits)
    return -F.logsigmoid(logits) * torch.sigmoid(-logits / tau) + exponential
