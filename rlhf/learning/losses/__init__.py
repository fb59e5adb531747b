"""Preference losses by name. A loss is one function over summed log-probs, entered in `registry.LOSSES`."""

from rlhf.learning.losses.base import LossFunction, PairInputs, PreferenceLoss
from rlhf.learning.losses.preference import preference_loss
from rlhf.learning.losses.registry import LOSSES, REFERENCE_FREE
from rlhf.learning.losses.step import RewardShift, StepLoss

__all__ = [
    "LOSSES",
    "REFERENCE_FREE",
    "LossFunction",
    "PairInputs",
    "PreferenceLoss",
    "RewardShift",
    "StepLoss",
    "preference_loss",
]
