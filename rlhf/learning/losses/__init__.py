"""Preference losses by name. A loss is one file with one function over summed log-probs, entered in `LOSSES`."""

import math
from typing import Any

import torch

from rlhf.errors import InputError
from rlhf.learning.losses.base import LossFunction, PreferenceLoss
from rlhf.learning.losses.choice import choice
from rlhf.learning.losses.sft import sft
from rlhf.learning.losses.sigmoid import sigmoid

__all__ = ["LOSSES", "REFERENCE_FREE", "LossFunction", "PreferenceLoss", "preference_loss"]

LOSSES: dict[str, LossFunction] = {"sigmoid": sigmoid, "sft": sft, "choice": choice}

REFERENCE_FREE = {"sft", "choice"}
"""Losses that no reference policy has a part in: none is loaded for them, its log-probs count as 0."""


def preference_loss(
    name: str,
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float | torch.Tensor,
    **options: Any,
) -> PreferenceLoss:
    """Per-pair losses of the registered loss `name`, with the implicit rewards.

    The four log-probs are float [n], each the sum over a response's tokens in nats. `beta` is one positive number
    or float [n]. `options` go to the loss as they are. Returns `(losses, chosen_rewards, rejected_rewards)`, float
    [n] each; rewards carry beta and no gradient. Raises `InputError` for an unknown name or shapes that differ.
    """
    if name not in LOSSES:
        raise InputError(f"learner.loss.type = {name!r}: no such loss; choose one of {', '.join(sorted(LOSSES))}")
    tensors = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1 or tensors[0].dim() != 1:
        raise InputError(
            f"preference_loss {name}: expected four 1-D tensors of one length, got shapes {sorted(shapes)}"
        )
    if isinstance(beta, torch.Tensor):
        if beta.shape not in (torch.Size([]), tensors[0].shape):
            raise InputError(f"preference_loss {name}: beta has shape {tuple(beta.shape)}, expected one value a pair")
    elif not (math.isfinite(beta) and beta > 0):
        raise InputError(f"preference_loss {name}: beta = {beta}: expected a positive number")
    return LOSSES[name](*tensors, beta=beta, **options)
