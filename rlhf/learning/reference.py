"""Reference policies: the log-probs that the implicit reward is measured against."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from rlhf.config.learner import Learner
from rlhf.errors import RLHFError
from rlhf.learning.batch import Batch
from rlhf.learning.engine import TrainEngine, frozen_engine
from rlhf.learning.policy import PolicyModule
from rlhf.learning.setup import Setup
from rlhf.records import Pair

EMA_DECAY = 0.99

Weights = Callable[[], AbstractContextManager[None]]
"""Puts the reference's weights in place of the policy's inside the context."""


class ReferencePolicy(Protocol):
    """Scores a round's pairs once, before its first step.

    The scores are not written down: a round is replayed from a checkpoint, which brings back the policy and all state
    of the reference bit for bit, so that scoring again gives the same numbers.
    """

    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Summed log-probs, float32 [n, 2] on the learner's device, chosen then rejected; equal on every rank."""
        ...

    def stepped(self) -> None:
        """The optimizer has changed the policy."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of what cannot be had from the policy; with ZeRO 0 to 2 the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state`."""
        ...


class _Stateless:
    """A reference that stays, or is had from the policy."""

    def stepped(self) -> None:
        """Nothing moves with the policy."""

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


class InitialReference(_Stateless):
    """The policy that the run started from, frozen; sharded over the ranks under ZeRO-3."""

    def __init__(self, module: PolicyModule, setup: Setup) -> None:
        """`module` is the starting policy before DeepSpeed has it; a copy is taken."""
        self._setup = setup
        self._frozen = copy.deepcopy(module)
        self._forward = frozen_engine(self._frozen, setup.learner, module.dtype, setup.device)
        # With ZeRO-3 DeepSpeed moves what is offloaded.
        self._moves = setup.learner.reference.offload and setup.learner.zero_stage < 3

    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Summed log-probs, float32 [n, 2]; every rank calls with the same pairs."""
        if self._moves:
            self._frozen.to(self._setup.device)
        scores = score_pairs(self._forward, pairs, self._setup, self._setup.learner.loss.ld_alpha)
        if self._moves:
            self._frozen.to("cpu")
        return scores


class PolicyReference(_Stateless):
    """The policy itself as it is when it scores, or with other weights in its own's place: no second model."""

    def __init__(self, engine: TrainEngine, setup: Setup, weights: Weights = nullcontext) -> None:
        self._engine = engine
        self._setup = setup
        self._weights = weights

    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Summed log-probs, float32 [n, 2]; every rank calls with the same pairs."""
        with self._weights(), self._engine.evaluating():
            return score_pairs(self._engine, pairs, self._setup, self._setup.learner.loss.ld_alpha)


class EmaReference(PolicyReference):
    """Moving average of the policy's weights: a <- d a + (1 - d) w after each optimizer step, a_0 = w_0.

    Kept in fp32, since steps of 1 - d are lost in bf16, and of trained weights only; the others do not move. With
    ZeRO-3 each rank moves its own partitions, and the model gathers them when it scores. In bf16 w is the rounded
    weight, which is what serves. Scoring puts the average in the policy's place and keeps a copy of the policy's own
    weights meanwhile.
    """

    def __init__(self, engine: TrainEngine, setup: Setup, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """`parameters` are the trained ones, by name."""
        super().__init__(engine, setup, self._in_place)
        self._decay = setup.learner.reference.ema_decay or EMA_DECAY
        self._parameters = dict(parameters)
        self._device = "cpu" if setup.learner.reference.offload else None
        self._average = {name: self._copy(shard).float() for name, shard in self._shards()}

    @torch.no_grad()
    def stepped(self) -> None:
        """Move the average towards the policy."""
        for name, shard in self._shards():
            average = self._average[name]
            average.mul_(self._decay).add_(shard.to(average.device), alpha=1 - self._decay)

    def state_dict(self) -> dict[str, Any]:
        """`average`: float32 tensors by parameter name, of this rank's shards."""
        return {"average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state`."""
        for name, average in self._average.items():
            average.copy_(state["average"][name])

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        kept = {name: self._copy(shard) for name, shard in self._shards()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(kept)

    def _shards(self) -> Iterator[tuple[str, torch.Tensor]]:
        # Taken anew each time: DeepSpeed may put other tensors behind a parameter.
        for name, parameter in self._parameters.items():
            yield name, self._engine.shard(parameter)

    def _write(self, values: dict[str, torch.Tensor]) -> None:
        with self._engine.writing_shards():
            for name, shard in self._shards():
                shard.copy_(values[name])

    def _copy(self, shard: torch.Tensor) -> torch.Tensor:
        return shard.to(self._device or shard.device, copy=True)


class NoReference(_Stateless):
    """For losses without a reference: log-probs of 0."""

    def __init__(self, device: str) -> None:
        self._device = device

    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """float32 [n, 2] of zeros."""
        return torch.zeros(len(pairs), 2, device=self._device)


def needs_copy(learner: Learner) -> bool:
    """Is the reference a frozen copy of the starting policy? It has to be taken before DeepSpeed has the policy."""
    return learner.loss.needs_reference and learner.reference.policy == "initial" and learner.lora is None


def policy_reference(
    engine: TrainEngine, setup: Setup, initial: Weights | None, parameters: Sequence[tuple[str, nn.Parameter]]
) -> ReferencePolicy:
    """A reference without a copy of the model; `initial` turns adapters off, `parameters` are the trained ones."""
    learner = setup.learner
    if not learner.loss.needs_reference:
        return NoReference(setup.device)
    if learner.reference.policy == "ema":
        return EmaReference(engine, setup, parameters)
    if learner.reference.policy == "round_start":
        return PolicyReference(engine, setup)
    if initial is None:
        raise RLHFError("learner.reference.policy initial without adapters needs a copy of the starting policy")
    return PolicyReference(engine, setup, initial)


@torch.no_grad()
def score_pairs(
    forward: Callable[[Batch], torch.Tensor], pairs: Sequence[Pair], setup: Setup, tail: float | None = None
) -> torch.Tensor:
    """Summed log-probs of `pairs` under `forward`, float32 [n, 2]: each rank scores its share, then they are joined.

    `tail` is the weight of tokens past the pair's shorter response, see `Batch.sums`.
    """
    scores = torch.zeros(len(pairs), 2, device=setup.device)
    for micro in setup.micro_batches([setup.cost(pair) for pair in pairs]):
        chosen = [pairs[index] for index in micro] or [setup.filler(pairs)]
        batch = setup.batch(chosen)
        sums = batch.sums(forward(batch), tail)
        if micro:
            scores[micro] = sums
    dist.all_reduce(scores)
    return scores
