"""Reference policies: the log-probs that the implicit reward is measured against."""

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from rlhf.learning.batch import Batch, build_batch
from rlhf.learning.engine import frozen_engine
from rlhf.learning.plan import plan_micro_batches
from rlhf.learning.policy import PolicyModule
from rlhf.learning.setup import Setup
from rlhf.records import Pair


class ReferencePolicy(Protocol):
    """Scores a round's pairs once, before its first step."""

    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Summed log-probs, float32 [n, 2] on the learner's device, chosen then rejected; equal on every rank."""
        ...


class InitialReference:
    """The policy that the run started from, frozen; sharded over the ranks under ZeRO-3."""

    def __init__(self, module: PolicyModule, setup: Setup) -> None:
        """`module` is the starting policy before DeepSpeed has it; a copy is taken."""
        self._setup = setup
        self._forward = frozen_engine(copy.deepcopy(module), setup.learner, module.dtype, setup.device)

    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Summed log-probs, float32 [n, 2]; every rank calls with the same pairs."""
        return score_pairs(self._forward, pairs, self._setup, self._setup.learner.loss.ld_alpha)


class NoReference:
    """For losses without a reference: log-probs of 0."""

    def __init__(self, device: str) -> None:
        self._device = device

    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """float32 [n, 2] of zeros."""
        return torch.zeros(len(pairs), 2, device=self._device)


@torch.no_grad()
def score_pairs(
    forward: Callable[[Batch], torch.Tensor], pairs: Sequence[Pair], setup: Setup, tail: float | None = None
) -> torch.Tensor:
    """Summed log-probs of `pairs` under `forward`, float32 [n, 2]: each rank scores its share, then they are joined.

    `tail` is the weight of tokens past the pair's shorter response, see `Batch.sums`.
    """
    scores = torch.zeros(len(pairs), 2, device=setup.device)
    for micro in plan_micro_batches(
        [setup.cost(pair) for pair in pairs], setup.world_size, setup.rank, setup.learner.micro_batch_size
    ):
        chosen = [pairs[index] for index in micro] or [setup.filler(pairs)]
        batch = build_batch(chosen, prefix_sharing=setup.prefix_sharing, dtype=setup.dtype).to(setup.device)
        sums = batch.sums(forward(batch), tail)
        if micro:
            scores[micro] = sums
    dist.all_reduce(scores)
    return scores
