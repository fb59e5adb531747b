"""CPO: Xu et al. 2024, "Contrastive Preference Optimization", equation 3; its likelihood term is `rpo_alpha`."""

import torch

from rlhf.learning.losses.base import PairInputs
from rlhf.learning.losses.sigmoid import smoothed


def cpo(inputs: PairInputs, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log sigmoid(beta (log pi(y_w) - log pi(y_l))), smoothed, float [n]: DPO under a uniform reference."""
    return smoothed(inputs.beta * (inputs.policy_chosen - inputs.policy_rejected), label_smoothing)
