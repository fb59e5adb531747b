"""ORPO: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", equations 4, 6 and 7.

The likelihood term of equation 6 is `rpo_alpha`, 1 by default.
"""

import math

import torch
import torch.nn.functional as F

from rlhf.learning.losses.base import PairInputs

SUREST = -1e-6
"""Log-probs per token above it count as it: the odds of a probability of 1 are infinite."""


def log_odds(logprobs: torch.Tensor) -> torch.Tensor:
    """log (p / (1 - p)) of log p, float [n]."""
    logprobs = logprobs.clamp(max=SUREST)
    # Two ways to log(1 - p), each where it is exact. The one not taken gets a harmless argument: 0 x inf is NaN.
    near = logprobs > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near, logprobs, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, logprobs)))
    return logprobs - torch.where(near, small, large)


def orpo(inputs: PairInputs) -> torch.Tensor:
    """-beta log sigmoid(log odds(y_w) - log odds(y_l)), float [n]; beta is the paper's lambda, p is per token."""
    chosen, rejected = inputs.averages()
    return -inputs.beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
