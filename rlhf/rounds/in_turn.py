"""The parts of a run on shared devices: every call takes the turn that it needs, see `rlhf.rounds.turns`.

What the learner does from its sleep takes no turn: a checkpoint is written, and weights are exported, from wherever
they lie, while the next round is sampled.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf.ports import Generators, Judge, Learner, WeightPlane
from rlhf.records import (
    Comparison,
    Pair,
    Rollout,
    SampleRequest,
    SealedRound,
    StepReport,
    SyncReport,
    Verdict,
    WeightManifest,
)
from rlhf.rounds.controller import System
from rlhf.rounds.turns import GENERATORS, LEARNER, Turns


class InTurnGenerators:
    """The `Generators` port: the turn lasts from the first request to the last response."""

    def __init__(self, generators: Generators, turns: Turns):
        self._generators = generators
        self._turns = turns

    async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
        """See the port; the deadline begins with the turn."""
        async with self._turns.take(GENERATORS):
            async for rollout in self._generators.sample(requests, deadline):
                yield rollout


class InTurnJudge:
    """The `Judge` port: comparisons asked for while responses are sampled wait for the last of these."""

    def __init__(self, judge: Judge, turns: Turns, name: str):
        """`name` is the pool's party."""
        self._judge = judge
        self._turns = turns
        self._name = name

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """See the port."""
        async with self._turns.take(self._name):
            return await self._judge.compare(comparisons)


class InTurnPlane:
    """The `WeightPlane` port. The generators are left asleep: each wakes for the update, a part at a time."""

    def __init__(self, plane: WeightPlane, turns: Turns):
        self._plane = plane
        self._turns = turns

    async def publish(self, manifest: WeightManifest, targets: Sequence[str]) -> SyncReport:
        """See the port."""
        async with self._turns.take(GENERATORS, wake=False):
            return await self._plane.publish(manifest, targets)


class InTurnLearner:
    """The `Learner` port."""

    def __init__(self, learner: Learner, turns: Turns):
        self._learner = learner
        self._turns = turns

    async def restart(self) -> bool:
        """See the port; ranks that are new are awake."""
        async with self._turns.take(LEARNER, wake=False):
            return await self._learner.restart()

    async def train(self, sealed: SealedRound, others: Mapping[str, SealedRound]) -> AsyncIterator[StepReport]:
        """See the port; the turn lasts for the whole round."""
        async with self._turns.take(LEARNER):
            async for report in self._learner.train(sealed, others):
                yield report

    async def statistics(self) -> dict[str, float]:
        """See the port."""
        return await self._learner.statistics()

    async def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """See the port."""
        async with self._turns.take(LEARNER):
            return await self._learner.score(pairs)

    async def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """See the port."""
        async with self._turns.take(LEARNER):
            return await self._learner.evaluate(pairs)

    async def save(self, path: Path) -> None:
        """See the port."""
        await self._learner.save(path)

    async def load(self, path: Path) -> None:
        """See the port."""
        async with self._turns.take(LEARNER):
            await self._learner.load(path)

    async def manifest(self, version: int) -> WeightManifest:
        """See the port; the probe is a forward pass."""
        async with self._turns.take(LEARNER):
            return await self._learner.manifest(version)

    async def export(self, path: Path) -> None:
        """See the port."""
        await self._learner.export(path)


def take_turns(system: System, turns: Turns) -> System:
    """The system with a learner and a weight plane that take turns; source and evaluator have parts that do."""
    return replace(
        system, learner=InTurnLearner(system.learner, turns), plane=InTurnPlane(system.plane, turns), turns=turns
    )
