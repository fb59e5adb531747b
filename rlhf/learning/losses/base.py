"""What every loss shares: what goes in, what comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rlhf.errors import InputError


class PreferenceLoss(NamedTuple):
    """Per-pair results, float [n]; the rewards carry beta and no gradient."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor

    @property
    def accuracies(self) -> torch.Tensor:
        """1 where the chosen response has the larger reward, 1/2 where they are equal; float64 [n].

        A policy that is its reference has ties only, and knows nothing: one half. NaN where the rewards cannot be
        compared, so that what is broken does not count as wrong.
        """
        difference = self.chosen_rewards.double() - self.rejected_rewards.double()
        return torch.where(difference.isnan(), difference, (difference.sign() + 1) / 2)


LossFunction = Callable[..., torch.Tensor]
"""`(inputs: PairInputs, *, its own options) -> losses`, float [n]."""


@dataclass(frozen=True, slots=True)
class PairInputs:
    """n pairs; every tensor is float [n], log-probs are sums over a response's tokens in nats."""

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    beta: float | torch.Tensor
    divergence: Callable[[torch.Tensor], torch.Tensor]
    """f' of the divergence from the reference, as a function of a log-ratio."""
    chosen_lengths: torch.Tensor | None = None
    rejected_lengths: torch.Tensor | None = None
    """Tokens of each response."""
    mean_chosen_length: float | torch.Tensor | None = None
    """Mean over all pairs of the optimizer step; None is the mean over these n."""

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """log (pi / pi_ref) of the chosen response."""
        # Each response against its own reference first: long responses have log-probs near -1e4 and ratios near 0.
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """log (pi / pi_ref) of the rejected response."""
        return self.policy_rejected - self.reference_rejected

    def difference(self, length_normalised: bool = False) -> torch.Tensor:
        """Chosen minus rejected score; h with the reverse KL divergence. Scores per token where `length_normalised`."""
        chosen, rejected = self.divergence(self.chosen_ratio), self.divergence(self.rejected_ratio)
        if length_normalised:
            chosen_lengths, rejected_lengths = self.lengths()
            chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
        return chosen - rejected

    def lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of both responses. Raises `InputError` where they were not given."""
        if self.chosen_lengths is None or self.rejected_lengths is None:
            raise InputError(
                "preference_loss: chosen_lengths and rejected_lengths are missing; this loss divides by the tokens of "
                "each response"
            )
        return self.chosen_lengths, self.rejected_lengths

    def averages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's log-probs per token of both responses."""
        chosen, rejected = self.lengths()
        return self.policy_chosen / chosen, self.policy_rejected / rejected

    def nll(self) -> torch.Tensor:
        """-log pi(y_w) over the mean length of chosen responses, so that the mean over pairs is the mean over tokens.

        Without lengths -log pi(y_w) itself.
        """
        mean = self.mean_chosen_length
        if mean is None:
            mean = 1.0 if self.chosen_lengths is None else self.chosen_lengths.mean()
        return -self.policy_chosen / mean
