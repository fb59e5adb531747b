"""SimPO: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", equation 6."""

import torch

from rlhf.learning.losses.base import PairInputs
from rlhf.learning.losses.sigmoid import smoothed


def simpo(inputs: PairInputs, *, gamma: float = 0.5, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma), float [n]."""
    chosen, rejected = inputs.averages()
    return smoothed(inputs.beta * (chosen - rejected) - gamma, label_smoothing)
