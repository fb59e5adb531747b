"""Hinge: the calibration loss of SLiC-HF (Zhao et al. 2023) and RSO (Liu et al. 2024), on implicit rewards."""

import torch

from rlhf.learning.losses.base import PairInputs


def hinge(inputs: PairInputs) -> torch.Tensor:
    """max(0, 1 - beta h), float [n]."""
    return torch.relu(1 - inputs.beta * inputs.difference())
