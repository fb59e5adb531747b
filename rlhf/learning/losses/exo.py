"""EXO for pairs: Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", equation 16."""

import math

import torch
import torch.nn.functional as F

from rlhf.learning.losses.base import PairInputs


def exo_pair(inputs: PairInputs, *, label_smoothing: float = 1e-3) -> torch.Tensor:
    """KL(p || (1 - e, e)), p the softmax of the two rewards, float [n]; e has to be above 0."""
    logits = inputs.beta * inputs.difference()
    won = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    lost = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return won + lost
