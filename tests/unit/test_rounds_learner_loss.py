"""The loop when its learner dies, at every point of a run, over the in-memory ports of the loop's own tests."""

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import RunConfig
from rlhf.errors import InputError, LearnerLostError, RLHFError
from rlhf.records import Rollout, SampleRequest, StepReport
from rlhf.rounds.controller import run_rounds
from rlhf.rounds.ledger import Ledger, RoundState
from tests.unit.rounds_world import (
    World,
    _no_flushes,
    check_finished,
    make_config,
    make_system,
    run,
)

__all__ = ["_no_flushes"]

OF_LEARNER = ("train", "step", "save", "saved", "load", "export")
"""Points that lie inside of a call to the learner."""


class Mortal(World):
    """The learner dies at points given by number; from there every call to it fails until it is started again.

    With `infectious`, publishing and sampling fail too while it is dead. Nothing it knew survives a restart.
    """

    def __init__(
        self,
        dies: Collection[int],
        run_dir: Path,
        seed: int | None = None,
        infectious: bool = False,
        restarts: int = 1000,
    ) -> None:
        super().__init__(seed=seed)
        self.dead = False
        self.left = restarts
        self._dies = dies
        self._infectious = infectious
        self._ledger = Ledger(run_dir)
        self._reached: dict[int, RoundState] = {}

    async def point(self, event: str) -> None:
        number = len(self.trace)
        await super().point(event)
        self.dead = self.dead or number in self._dies
        kind = event.split()[0]
        if kind in OF_LEARNER:
            self.check_ledger()
        if self.dead and kind in OF_LEARNER:
            raise LearnerLostError(f"dead at {event}")
        if self.dead and self._infectious and kind in ("publish", "response"):
            raise RLHFError(f"weights cannot be fetched at {event}")

    def check_ledger(self) -> None:
        for round in range(1, 4):
            state = self._ledger.state(round)
            assert state >= self._reached.get(round, RoundState.NEW), "the ledger went backwards"
            self._reached[round] = state

    async def statistics(self) -> dict[str, float]:
        if self.dead:
            raise LearnerLostError("dead at statistics")
        return await super().statistics()

    async def restart(self) -> bool:
        if not self.dead:
            return False
        assert not self._calls.locked(), "a call of the lost learner is still awaited"
        self.left -= 1
        if self.left < 0:
            raise RLHFError("the restarts are spent")
        self.dead = False
        self.taken = []
        await self.point("restart")
        return True


def whole_run(config: RunConfig) -> tuple[list[tuple[int, str, tuple[int, ...]]], World]:
    """What an undisturbed run takes, and its world."""
    world = World()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(world, config, Path(folder), evaluated=True))
        return check_finished(Path(folder), config.rounds.count), world


def check_disturbed(world: Mortal, undisturbed: World, config: RunConfig) -> None:
    """Metrics, permits and staleness are those of a run in which nobody died."""
    assert [item[:2] for item in world.logged] == [item[:2] for item in undisturbed.logged], "logged twice, or never"
    for event, _, metrics in world.logged:
        if event == "round":
            assert 0 <= metrics["pairs/staleness_max"] <= config.rounds.lookahead
    assert world.serving == config.rounds.count


@pytest.mark.parametrize(("lookahead", "every"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("infectious", [False, True])
def test_a_death_at_any_point_changes_nothing_in_the_end(
    lookahead: int, every: int, infectious: bool, tmp_path: Path
) -> None:
    count = 2 + lookahead
    config = make_config(rounds__count=count, rounds__lookahead=lookahead, checkpoint__every=every)
    whole, undisturbed = whole_run(config)
    for number in range(len(undisturbed.trace)):
        run_dir = tmp_path / str(number)
        world = Mortal({number}, run_dir, infectious=infectious)
        asyncio.run(run(world, config, run_dir, evaluated=True))
        assert check_finished(run_dir, count) == whole, number
        check_disturbed(world, undisturbed, config)
        # One that dies when nothing is asked of it any more is not missed.
        assert world.trace.count("restart") == (not world.dead), number


@settings(max_examples=25, deadline=None)
@given(
    dies=st.sets(st.integers(0, 120), max_size=5),
    seed=st.integers(0, 2**32),
    lookahead=st.integers(0, 1),
    every=st.integers(1, 3),
    infectious=st.booleans(),
)
def test_deaths_one_after_the_other_under_any_timing(
    dies: set[int], seed: int, lookahead: int, every: int, infectious: bool
) -> None:
    config = make_config(rounds__lookahead=lookahead, checkpoint__every=every)
    whole, undisturbed = whole_run(config)
    with tempfile.TemporaryDirectory() as folder:
        world = Mortal(dies, Path(folder), seed, infectious)
        asyncio.run(run(world, config, Path(folder), evaluated=True))
        assert check_finished(Path(folder), 3) == whole
        check_disturbed(world, undisturbed, config)


async def test_what_is_repeated_comes_from_the_checkpoint_and_the_sealed_pairs(tmp_path: Path) -> None:
    config = make_config(rounds__count=4, checkpoint__every=2)
    undisturbed = World()
    await run(undisturbed, config, tmp_path / "whole")
    number = undisturbed.trace.index("export 4")
    world = Mortal({number}, tmp_path)
    await run(world, config, tmp_path)
    assert world.trace.count("sample") == 4
    after = world.trace[world.trace.index("restart") :]
    assert [event for event in after if not event.startswith(("step", "save"))] == [
        *("restart", "load round-0002", "export 2", "publish 2", "serve 2"),
        *("train 3", "export 3", "publish 3", "serve 3"),
        *("train 4", "export 4", "publish 4", "serve 4"),
    ]


async def test_a_death_before_the_first_checkpoint_goes_back_to_the_initial_policy(tmp_path: Path) -> None:
    world = Mortal({5}, tmp_path)
    await run(world, make_config(), tmp_path)
    assert world.trace[5] == "response"
    after = world.trace[world.trace.index("restart") :]
    assert after[:4] == ["restart", "export 0", "publish 0", "serve 0"]
    check_finished(tmp_path, 3)


async def test_when_the_restarts_are_spent_the_run_ends_and_a_new_one_goes_on(tmp_path: Path) -> None:
    config = make_config()
    undisturbed = World()
    await run(undisturbed, config, tmp_path / "whole")
    number = undisturbed.trace.index("train 3")
    world = Mortal(range(number, 1000), tmp_path, restarts=1)
    with pytest.raises(RLHFError, match="the restarts are spent"):
        await run(world, config, tmp_path)
    assert Ledger(tmp_path).state(3) == RoundState.SEALED
    again = World()
    await run(again, config, tmp_path)
    assert again.trace[0] == "load round-0002"
    assert check_finished(tmp_path, 3) == check_finished(tmp_path / "whole", 3)


async def test_an_error_that_no_lost_learner_explains_ends_the_run(tmp_path: Path) -> None:
    """Nor is the learner started again for a mistake of ours beside its death."""

    class Broken(Mortal):
        error: Exception

        async def compare(self, comparisons: Sequence[Any]) -> Any:
            self.dead = isinstance(self.error, KeyError)
            raise self.error

    for error in (InputError("prompts.path: not what it was"), KeyError("a mistake of ours")):
        world = Broken((), tmp_path / type(error).__name__)
        world.error = error
        with pytest.raises(ExceptionGroup) as caught:
            await run(world, make_config(), tmp_path / type(error).__name__)
        assert caught.group_contains(type(error))
        assert "restart" not in world.trace


async def test_what_comes_last_is_done_once_more_when_the_learner_dies_in_it(tmp_path: Path) -> None:
    config = make_config(rounds__count=1)
    world = Mortal((), tmp_path)
    tries = itertools.count()

    async def export() -> None:
        if next(tries) == 0:
            world.dead = True
            raise LearnerLostError("dead at the last export")
        assert {round for round, *_ in world.taken} == {1}, "not the trained policy"

    await run_rounds(make_system(world, config, tmp_path), config, export)
    assert next(tries) == 2
    assert world.trace.count("train 1") == 1
    assert world.trace[-5:] == ["restart", "load round-0001", "export 1", "publish 1", "serve 1"]


async def test_a_stop_is_not_forgotten_when_the_learner_dies_meanwhile(tmp_path: Path) -> None:
    task: asyncio.Task[None]

    class Slow(Mortal):
        """Its sampling takes a moment to be stopped; the stop arrives then."""

        async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
            try:
                async for rollout in super().sample(requests, deadline):
                    yield rollout
                    if self.taken:
                        await asyncio.sleep(60)
            except asyncio.CancelledError:
                task.cancel()
                await asyncio.sleep(0)
                raise

        async def train(self, sealed: Any, others: Any) -> AsyncIterator[StepReport]:
            async for report in super().train(sealed, others):
                await asyncio.sleep(0.01)
                self.dead = True
                yield report

    world = Slow((), tmp_path)
    task = asyncio.create_task(run(world, make_config(rounds__lookahead=1), tmp_path))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.dead
    assert "restart" not in world.trace
