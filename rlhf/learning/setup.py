"""What the parts of one rank share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf.config.learner import Learner
from rlhf.records import Pair


@dataclass(frozen=True, slots=True)
class Setup:
    """A rank's place and layout."""

    learner: Learner
    rank: int
    world_size: int
    device: str
    dtype: torch.dtype
    prefix_sharing: bool

    def cost(self, pair: Pair) -> int:
        """Tokens that a pair puts through the model in this layout."""
        prompts = 1 if self.prefix_sharing else 2
        return prompts * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)

    def filler(self, pairs: Sequence[Pair]) -> Pair:
        """The cheapest pair, for a rank that has to run a micro-batch without having one."""
        return min(pairs, key=self.cost)
