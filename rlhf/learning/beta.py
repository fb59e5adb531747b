"""Beta controllers: how strongly the policy is held to the reference."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config.learner import Loss
from rlhf.records import Pair


class FixedBeta:
    """The same beta for every step."""

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def beta(self, pairs: Sequence[Pair] = ()) -> float:
        """The beta of the next step, for all of its pairs."""
        return self._beta

    def observe(self, statistics: Mapping[str, float]) -> None:
        """Nothing to learn from the step's sums."""

    def state_dict(self) -> dict[str, Any]:
        """No state: beta is the config's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


def build_beta(loss: Loss) -> FixedBeta:
    """The controller that the config asks for."""
    return FixedBeta(loss.beta)
