"""Supervised fine-tuning on the chosen response: the negative log-likelihood, no reference."""

import torch

from rlhf.learning.losses.base import PairInputs


def sft(inputs: PairInputs) -> torch.Tensor:
    """-log pi(y_w), float [n]; with lengths, the mean over pairs is the mean over tokens (see `PairInputs.nll`).

    The rejected response has no part in it.
    """
    # Times zero, so that a graph that was built for both responses gets a gradient for both.
    return inputs.nll() + 0.0 * inputs.policy_rejected
