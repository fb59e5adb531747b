"""A choice between two responses: cross-entropy of a softmax over the two of them alone, no reference.

With answers of one token, `A` and `B`, this trains what a pair-preference judge reads (METHODS §1: the softmax over
the two answers only) and nothing else of the vocabulary.
"""

import torch
import torch.nn.functional as F

from rlhf.learning.losses.base import PairInputs


def choice(inputs: PairInputs) -> torch.Tensor:
    """-log [pi(y_w)^beta / (pi(y_w)^beta + pi(y_l)^beta)]; float [n]."""
    return -F.logsigmoid(inputs.beta * (inputs.policy_chosen - inputs.policy_rejected))
