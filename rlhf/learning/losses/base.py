"""What every loss shares: its type, and the implicit reward."""

from typing import NamedTuple, Protocol

import torch


class PreferenceLoss(NamedTuple):
    """Per-pair results, float [n]; the rewards carry beta and no gradient."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


class LossFunction(Protocol):
    """A loss over summed log-probs, float [n] each."""

    def __call__(
        self,
        policy_chosen: torch.Tensor,
        policy_rejected: torch.Tensor,
        reference_chosen: torch.Tensor,
        reference_rejected: torch.Tensor,
        *,
        beta: float | torch.Tensor,
    ) -> PreferenceLoss:
        """Losses and rewards of n pairs."""
        ...


def implicit_reward(policy: torch.Tensor, reference: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
    """beta (log pi - log pi_ref), float [n], without gradient (Rafailov et al. 2023, equation 5 up to a constant)."""
    return beta * (policy - reference).detach()
