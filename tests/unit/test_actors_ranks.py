"""The learner group over in-process ranks that die, hang and fail: what ends a call, and what a restart does."""

import asyncio
import gc
import re
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch.distributed as dist

from actors import ranks as ranks_module
from actors import reviving
from actors.learner import LearnerGroup
from rlhf.config.system import Deadlines
from rlhf.errors import DeadlineError, LearnerLostError, RLHFError
from rlhf.health import RestartBudget
from rlhf.records import Pair, SealedRound, StepReport

pytestmark = pytest.mark.timeout(30)

ROUND = SealedRound(1, (), "digest")
PAIR = Pair("u", 1, (1,), (2,), (3,), "", "", "", 0.9, 0, 0)


def in_task(cause: BaseException) -> ray.exceptions.RayTaskError:
    """What the driver gets when an actor's method raises."""
    text = f"Traceback\n{type(cause).__name__}: {cause}"
    return ray.exceptions.RayTaskError("method", text, cause)


@dataclass(frozen=True)
class Shared:
    """What stands for a value in the calls of several ranks."""

    value: Any


class Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def options(self, num_returns: str) -> "Method":
        assert num_returns == "streaming"
        return self

    def remote(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class Rank:
    """Has the methods of a rank's handle. `meet` is awaited in each call, as a collective is."""

    def __init__(self, number: int, meet: Callable[[], Awaitable[None]] | None = None) -> None:
        self.number = number
        self.called: list[str] = []
        self.given: dict[str, tuple[Any, ...]] = {}
        self.dead = asyncio.Event()
        self._meet = meet
        self.news_s = 0.0

    def die(self) -> None:
        self.dead.set()

    def __getattr__(self, name: str) -> Method:
        def call(*arguments: Any) -> Any:
            self.given[name] = arguments
            # As Ray does with its references.
            values = [each.value if isinstance(each, Shared) else each for each in arguments]
            return self._stream(*values) if name == "train" else self._answer(name)

        return Method(call)

    async def _alive(self) -> None:
        await self.dead.wait()
        await asyncio.sleep(self.news_s)
        raise ray.exceptions.RayActorError(error_msg="The actor died.\nThe process was killed.")

    async def _until_dead(self, work: Awaitable[Any]) -> Any:
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self._alive())]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return (tasks[1] if tasks[1] in ended else tasks[0]).result()
        finally:
            for task in tasks:
                task.cancel()

    def _answer(self, name: str) -> Awaitable[Any]:
        async def work() -> Any:
            await asyncio.sleep(0)
            if self.dead.is_set():
                await forever()
            if name == "__ray_ready__":
                return True
            self.called.append(name)
            if self._meet and name not in ("start", "meeting_point"):
                await self._meet()
            return ("10.0.0.1", 1234) if name == "meeting_point" else [f"{name} of rank {self.number}"]

        return self._until_dead(work())

    def _stream(self, sealed: SealedRound, others: Any) -> AsyncIterator[Awaitable[StepReport]]:
        async def references() -> AsyncIterator[Awaitable[StepReport]]:
            self.called.append("train")
            for step in range(2):
                if self.number == 0:
                    report: asyncio.Future[StepReport] = asyncio.get_running_loop().create_future()
                    report.set_result(StepReport(sealed.round, step, {}))
                    yield report
                await self._until_dead(self._meet() if self._meet else asyncio.sleep(0))

        return references()


async def forever() -> None:
    await asyncio.sleep(60)


class Setup:
    """Two ranks to a generation; `later` makes those of the later ones."""

    def __init__(
        self,
        *meet: Callable[[], Awaitable[None]] | None,
        budget: int = 3,
        window_s: float = 3600.0,
        deadline: float = 20.0,
    ) -> None:
        self.generations = [[Rank(0, meet[0] if meet else None), Rank(1, meet[1] if len(meet) > 1 else None)]]
        self.alerts: list[str] = []
        self.shared: list[Any] = []
        self.later: Callable[[], list[Rank]] = lambda: [Rank(0), Rank(1)]
        self.budget = RestartBudget(budget, window_s)
        deadlines = Deadlines(learn=deadline, sync=deadline, checkpoint=deadline, start=deadline)
        self.group = LearnerGroup(self.ranks, deadlines, (), self._launch, self.budget, self.alerts.append, self._share)

    def _share(self, value: Any) -> Shared:
        self.shared.append(value)
        return Shared(value)

    @property
    def ranks(self) -> list[Rank]:
        return self.generations[-1]

    async def _launch(self) -> list[Rank]:
        self.generations.append(self.later())
        return self.ranks

    async def train(self) -> list[int]:
        return [report.step async for report in self.group.train(ROUND, {})]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "NEWS_S", 0.3)
    monkeypatch.setattr(reviving, "FIRST_PAUSE_S", 0.01)


async def test_every_rank_is_called_and_the_first_answers() -> None:
    setup = Setup()
    assert await setup.group.start() == ["start of rank 0"]
    assert await setup.train() == [0, 1]
    assert await setup.group.statistics() == ["statistics of rank 0"]
    await setup.group.save(Path("round-0001"))
    assert setup.ranks[0].called == ["meeting_point", "start", "train", "statistics", "save"]
    assert setup.ranks[1].called == ["start", "train", "save"]
    assert not await setup.group.restart()


@pytest.mark.parametrize("rank", [0, 1])
async def test_the_death_of_a_rank_ends_a_training_at_once_while_the_other_hangs(rank: int) -> None:
    setup = Setup(forever, forever)
    asyncio.get_running_loop().call_later(0.1, setup.ranks[rank].die)
    training = setup.group.train(ROUND, {})
    assert (await anext(training)).step == 0
    async with asyncio.timeout(5):
        with pytest.raises(LearnerLostError, match=rf"rank {rank} died \(round 1\): The process was killed\."):
            await anext(training)


@pytest.mark.parametrize("method", ["statistics", "score", "evaluate", "save", "load", "export", "manifest"])
async def test_the_death_of_a_rank_ends_every_other_call(method: str) -> None:
    setup = Setup(forever, forever)
    arguments = {"statistics": (), "score": ([],), "evaluate": ([],), "manifest": (1,)}.get(method, (Path("x"),))
    asyncio.get_running_loop().call_later(0.05, setup.ranks[0 if method == "statistics" else 1].die)
    async with asyncio.timeout(5):
        with pytest.raises(LearnerLostError):
            await getattr(setup.group, method)(*arguments)


async def test_an_error_that_is_the_echo_of_a_death_is_told_as_the_death() -> None:
    """A neighbour's connection breaks before the cluster knows that the process is gone."""

    async def breaks() -> None:
        await setup.ranks[1].dead.wait()
        raise in_task(ValueError("something that follows"))

    setup = Setup(breaks, forever)
    setup.ranks[1].news_s = 0.1
    asyncio.get_running_loop().call_later(0.05, setup.ranks[1].die)
    with pytest.raises(LearnerLostError, match="rank 1 died"):
        await setup.train()


@pytest.mark.parametrize(
    "cause",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1"),
        dist.DistBackendError("NCCL communicator was aborted on rank 0."),
    ],
)
async def test_a_collective_that_fails_is_a_loss_although_nobody_seems_dead(cause: Exception) -> None:
    async def fails() -> None:
        raise in_task(cause)

    setup = Setup(fails, forever)
    with pytest.raises(LearnerLostError, match="rank 0 waited for others in vain"):
        await setup.train()
    assert await setup.group.restart()


@pytest.mark.parametrize("error", [ValueError("a mistake"), RLHFError("out of GPU memory"), DeadlineError("late")])
async def test_what_a_rank_raises_itself_is_no_loss(error: Exception) -> None:
    async def fails() -> None:
        raise in_task(error)

    setup = Setup(forever, fails)
    with pytest.raises(type(error) if isinstance(error, RLHFError) else ray.exceptions.RayTaskError, match=str(error)):
        await setup.train()
    assert not await setup.group.restart()
    assert len(setup.generations) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ray.exceptions.RayActorError(error_msg="The process was killed."), r"rank 0 died \(save\): .* lower learner"),
        (
            ray.exceptions.RayActorError(error_msg="The actor died because its node has died. Node Id: f3"),
            r"rank 0 died \(save\): The actor died because its node has died\. Node Id: f3$",
        ),
        (
            ray.exceptions.RaySystemError(AttributeError("no such class")),
            r"rank 0 gave no answer that can be read \(save\): .*no such class$",
        ),
    ],
    ids=["killed", "its node is gone", "cannot be read"],
)
async def test_a_loss_says_what_was_lost(error: Exception, message: str) -> None:
    async def failing() -> None:
        raise error

    ranks = ranks_module.Ranks([Rank(0)])
    with pytest.raises(LearnerLostError):
        await ranks.together([failing()], 5, "save")
    assert re.match(message, ranks.loss)
    assert "\n" not in ranks.loss


async def test_a_call_past_its_deadline_is_a_hang_and_takes_the_others_with_it() -> None:
    setup = Setup(None, forever, deadline=0.2)
    setup.group._deadlines = Deadlines(learn=60, checkpoint=0.2)
    saving = asyncio.create_task(setup.group.save(Path("round-0001.tmp")))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        with pytest.raises(LearnerLostError, match=r"save round-0001\.tmp did not end within 0 s: a rank hangs"):
            await setup.train()
    with pytest.raises(LearnerLostError):
        await saving
    setup.ranks[0].called.clear()
    for call in (setup.group.manifest(1), setup.group.statistics(), setup.train()):
        with pytest.raises(LearnerLostError, match="a rank hangs"):
            await call
    assert setup.ranks[0].called == [], "a lost rank was called"


@pytest.mark.filterwarnings("error")
async def test_a_call_that_is_made_while_the_ranks_are_lost_is_not_waited_for() -> None:
    # What other tests have left unclosed is none of this one's.
    with warnings.catch_warnings(action="ignore"):
        gc.collect()
    setup = Setup(forever, forever)
    training = asyncio.create_task(setup.train())
    # The calls are made, and nothing has waited for them yet.
    await asyncio.sleep(0)
    setup.group._ranks._lose("rank 1 died")
    with pytest.raises(LearnerLostError, match="rank 1 died"):
        await training
    gc.collect()


async def test_a_restart_makes_new_ranks_out_of_the_budget() -> None:
    setup = Setup()
    setup.ranks[1].die()
    with pytest.raises(LearnerLostError):
        await setup.train()
    assert await setup.group.restart()
    assert setup.generations[1][0].called == ["meeting_point", "start"]
    assert setup.generations[1][1].called == ["start"]
    assert (setup.group.generation, setup.budget.taken) == (1, 1)
    assert len(setup.alerts) == 1
    assert "learner is started again: rank 1 died (round 1)" in setup.alerts[0]
    assert await setup.train() == [0, 1]
    assert not await setup.group.restart()


async def test_a_rank_that_died_when_nothing_was_asked_of_it_is_found() -> None:
    setup = Setup()
    setup.ranks[1].die()
    assert await setup.group.restart()
    assert "rank 1 died" in setup.alerts[0]


async def test_what_several_ranks_get_is_packed_once_for_all_of_them() -> None:
    setup, others = Setup(), {"anchor": SealedRound(1, (), "other")}
    reports = [report async for report in setup.group.train(ROUND, others)]
    assert [report.step for report in reports] == [0, 1]
    await setup.group.score([PAIR])
    await setup.group.evaluate([PAIR, PAIR])
    assert setup.shared == [ROUND, others, (PAIR,), (PAIR, PAIR)]
    for rank in setup.ranks:
        assert rank.given["train"] == (Shared(ROUND), Shared(others))
        assert rank.given["score"] == (Shared((PAIR,)),)
        assert rank.given["evaluate"] == (Shared((PAIR, PAIR)),)


async def test_one_rank_is_given_its_arguments_as_they_are() -> None:
    setup, rank = Setup(), Rank(0)
    group = LearnerGroup([rank], Deadlines(), (), None, setup.budget, setup.alerts.append, setup._share)
    assert len([report async for report in group.train(ROUND, {})]) == 2
    await group.score([PAIR])
    assert (rank.given["train"], rank.given["score"], setup.shared) == ((ROUND, {}), ((PAIR,),), [])


async def test_ranks_at_work_are_there() -> None:
    class Busy(Rank):
        def _answer(self, name: str) -> Awaitable[Any]:
            return forever()

    setup = Setup()
    group = LearnerGroup([Busy(0), Busy(1)], Deadlines(), (), setup._launch, setup.budget)
    async with asyncio.timeout(5):
        assert not await group.restart()


async def test_new_ranks_that_die_too_are_replaced_until_the_budget_is_spent() -> None:
    def stillborn() -> list[Rank]:
        ranks = [Rank(0), Rank(1)]
        if len(setup.generations) < 3:
            ranks[1].die()
        return ranks

    setup = Setup(budget=3)
    setup.later = stillborn
    setup.ranks[0].die()
    assert await setup.group.restart()
    assert setup.budget.taken == 3
    setup.ranks[0].die()
    with pytest.raises(RLHFError) as caught:
        await setup.group.restart()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("learner: rank 0 died")
    assert "the restarts are spent (cluster.restarts: 3 in 3600 s" in text
    assert text.endswith("the same command goes on from the last checkpoint")
    with pytest.raises(RLHFError, match="the restarts are spent"):
        await setup.group.restart()


async def test_what_dies_over_the_same_rounds_is_not_started_again_for_ever() -> None:
    """Each try may take longer than the budget's window."""
    setup = Setup(budget=2, window_s=0.01)
    for _ in range(2):
        setup.ranks[0].die()
        assert await setup.group.restart()
        await asyncio.sleep(0.02)
    # A checkpoint is what counts.
    await setup.group.save(Path("round-0001.tmp"))
    for _ in range(2):
        setup.ranks[0].die()
        assert await setup.group.restart()
        await asyncio.sleep(0.02)
    await setup.train()
    setup.ranks[0].die()
    with pytest.raises(RLHFError, match="2 in 0 s, or without progress"):
        await setup.group.restart()


async def test_stopping_a_training_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup(forever, forever)
    task = asyncio.create_task(setup.train())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not caplog.records
