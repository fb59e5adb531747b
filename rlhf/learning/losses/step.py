"""The loss of one optimizer step, taken in micro-batches on several ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf.config.loss import Loss
from rlhf.learning.losses.base import PreferenceLoss
from rlhf.learning.losses.preference import preference_loss
from rlhf.learning.losses.registry import MATCHINGS
from rlhf.records import Pair

SHIFT_DECAY = 0.9


@dataclass(slots=True)
class RewardShift:
    """BCO's running mean of rewards, of both responses alike: an average with decay 0.9 a step, bias-corrected.

    A step sees the mean of the steps before it (0 at first), so it does not depend on micro-batches or ranks.
    """

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        """The shift of the next step."""
        return self.total / self.weight if self.weight else 0.0

    def observe(self, chosen: float, rejected: float) -> None:
        """Take the mean rewards of a step, reduced over ranks."""
        self.total = SHIFT_DECAY * self.total + (1 - SHIFT_DECAY) * 0.5 * (chosen + rejected)
        self.weight = SHIFT_DECAY * self.weight + 1 - SHIFT_DECAY

    def state_dict(self) -> dict[str, float]:
        """All that the shift is made of."""
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up `state`."""
        self.total, self.weight = state["total"], state["weight"]


@dataclass(slots=True)
class StepLoss:
    """The loss over the pairs of one optimizer step; what is taken over all of them is known before the first part."""

    config: Loss
    lengths: torch.Tensor
    """Tokens of each response, float [n, 2], chosen then rejected."""
    reward_shift: float = 0.0
    matched: dict[str, torch.Tensor] = field(default_factory=dict)
    explored: torch.Tensor | None = None
    """Which responses the reference wrote, bool [n, 2]; only where the loss explores."""

    @classmethod
    def of(
        cls,
        config: Loss,
        pairs: Sequence[Pair],
        device: str,
        reward_shift: float = 0.0,
        reference_version: int | None = None,
    ) -> "StepLoss":
        """For all pairs of a step, over all ranks; without a `reference_version` none of them explores."""
        lengths = [[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs]
        found = cls(config, torch.tensor(lengths, dtype=torch.float32, device=device), reward_shift)
        if config.exploration is not None and reference_version is not None:
            versions = torch.tensor([[pair.chosen_version, pair.rejected_version] for pair in pairs], device=device)
            found.explored = versions == reference_version
        return found

    @property
    def matches(self) -> bool:
        """Does the loss set pairs against others of the step? Then `match` has to come first."""
        return any(name in MATCHINGS for name in self.config.names)

    def match(self, policy: torch.Tensor, reference: torch.Tensor) -> None:
        """Take the log-probs of all pairs of the step, float [n, 2], from a pass without gradient."""
        self.matched = {name: MATCHINGS[name](policy, reference) for name in self.config.names if name in MATCHINGS}

    def __call__(
        self,
        policy: torch.Tensor,
        reference: torch.Tensor,
        indices: Sequence[int],
        beta: float | torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> PreferenceLoss:
        """Losses of the step's pairs `indices` with log-probs [m, 2] (desensitised if so configured), `weights` [m].

        The losses of all micro-batches add up to n times the loss of the step, however they are cut.
        """
        config, rows = self.config, list(indices)
        terms = [
            (name, getattr(part, "weight", 1.0), self._options(name, part.options(), rows))
            for name, part in zip(config.names, config.parts, strict=True)
        ]
        chosen, rejected = self.lengths[rows].unbind(1)
        explored = None if self.explored is None else self.explored[rows]
        return preference_loss(
            "mix",
            *policy.unbind(1),
            *reference.unbind(1),
            beta=beta,
            terms=terms,
            f_divergence=config.f_divergence,
            f_alpha=0.5 if config.f_alpha is None else config.f_alpha,
            weights=weights,
            chosen_lengths=chosen,
            rejected_lengths=rejected,
            mean_chosen_length=self.lengths[:, 0].mean(),
            exploration=config.exploration.type if config.exploration and explored is not None else None,
            exploration_alpha=config.exploration.alpha if config.exploration else 0.0,
            explored=explored,
        )

    def _options(self, name: str, options: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        """The config's options, with what the step knows in their place."""
        if name == "bco_pair":
            return {**options, "reward_shift": self.reward_shift if options.get("reward_shift") else 0.0}
        if name in self.matched:
            return {**options, "matched": self.matched[name][rows]}
        return options
