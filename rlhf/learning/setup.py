"""What the parts of one rank share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from msgspec.structs import replace

from rlhf.config.learner import Learner
from rlhf.learning.batch import Batch, build_batch
from rlhf.learning.mask_probe import Layout
from rlhf.learning.plan import plan_micro_batches, plan_packed
from rlhf.records import Pair


@dataclass(frozen=True, slots=True)
class Setup:
    """A rank's place and layout."""

    learner: Learner
    rank: int
    world_size: int
    device: str
    dtype: torch.dtype
    layout: Layout

    @property
    def chosen_only(self) -> bool:
        """Has the rejected response no part in the loss? Then no training step computes it."""
        return set(self.learner.loss.names) == {"sft"}

    def trained(self, pair: Pair) -> Pair:
        """What of a pair a training step computes."""
        return replace(pair, rejected_ids=(), rejected_logprobs=()) if self.chosen_only else pair

    def cost(self, pair: Pair) -> int:
        """Tokens that a pair puts through the model in this layout."""
        repeated = 0 if self.layout.prefix_sharing or not pair.rejected_ids else len(pair.prompt_ids)
        return repeated + unique_tokens(pair)

    def micro_batches(self, costs: Sequence[int], size: int = 1) -> list[list[int]]:
        """This rank's micro-batches, as indices into `costs`, the tokens of units of `size` pairs."""
        if self.layout.pack_tokens is not None:
            return plan_packed(costs, self.world_size, self.rank, self.layout.pack_tokens)
        return plan_micro_batches(costs, self.world_size, self.rank, self.learner.micro_batch_size // size)

    def batch(self, pairs: Sequence[Pair]) -> Batch:
        """`pairs` laid out on this rank's device."""
        packed = self.layout.pack_tokens is not None
        return build_batch(pairs, prefix_sharing=self.layout.prefix_sharing, packed=packed).to(self.device)

    def filler(self, pairs: Sequence[Pair]) -> Pair:
        """The cheapest pair, for a rank that has to run a micro-batch without having one."""
        return min(pairs, key=self.cost)


def unique_tokens(pair: Pair) -> int:
    """Tokens of a pair with its prompt once: what throughput counts, whatever the layout."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
