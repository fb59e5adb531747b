"""IPO: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17."""

import torch

from rlhf.learning.losses.base import PairInputs


def ipo(inputs: PairInputs, *, length_normalised: bool = True) -> torch.Tensor:
    """(h - 1 / (2 beta))^2, float [n]; the scores are per token unless `length_normalised` is false.

    The normalised form is the one of the paper's experiments and of TRL.
    """
    return (inputs.difference(length_normalised) - 1 / (2 * inputs.beta)).square()
