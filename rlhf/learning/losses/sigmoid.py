"""Sigmoid losses: DPO (Rafailov et al. 2023, equation 7), cDPO (Mitchell 2023), robust DPO (Chowdhury et al. 2024)."""

import torch
import torch.nn.functional as F

from rlhf.learning.losses.base import PairInputs


def smoothed(logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigmoid(l) - e log sigmoid(-l), float [n]: a share e of the labels is taken to be flipped.

    `logsigmoid` keeps it finite for any l that is: the loss tends to |l| on the wrong side and to 0 on the right.
    """
    losses = -F.logsigmoid(logits)
    # log sigmoid(l) - log sigmoid(-l) = l, which leaves one logsigmoid.
    return losses + label_smoothing * logits if label_smoothing else losses


def sigmoid(inputs: PairInputs, *, label_smoothing: float = 0.0, length_normalised: bool = False) -> torch.Tensor:
    """-log sigmoid(beta h), smoothed (cDPO), with scores per token where `length_normalised`."""
    return smoothed(inputs.beta * inputs.difference(length_normalised), label_smoothing)


def robust(inputs: PairInputs, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """The unbiased estimate of the sigmoid loss under labels flipped with probability e < 1/2.

    [-(1 - e) log sigmoid(l) + e log sigmoid(-l)] / (1 - 2 e); it falls without bound as l grows.
    """
    logits, e = inputs.beta * inputs.difference(), label_smoothing
    # The same by log sigmoid(-l) = log sigmoid(l) - l, without a difference of large numbers.
    return -F.logsigmoid(logits) - e / (1 - 2 * e) * logits
