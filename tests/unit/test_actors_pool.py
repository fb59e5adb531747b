"""The judge pool's batching over in-process handles, and whether a role's actors fit the nodes."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.judge import JudgePool
from rlhf.errors import DeadlineError, RLHFError
from rlhf.health import RestartBudget
from rlhf.judging.verdicts import make_verdict
from rlhf.records import Comparison, Verdict

pytestmark = pytest.mark.timeout(30)


def comparison(number: int) -> Comparison:
    return Comparison(f"u{number}", (), f"a{number}", f"b{number}")


def comparisons(*numbers: int) -> list[Comparison]:
    return [comparison(number) for number in numbers]


def numbers(verdicts: list[Verdict]) -> list[int]:
    return [int(verdict.comparison.uid[1:]) for verdict in verdicts]


class Handle:
    """Has `compare.remote(batch)` as an actor handle has; judges after `delay` seconds and keeps what it was sent."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.batches: list[list[int]] = []
        self.running = self.most_running = 0
        self.hold: asyncio.Event | None = None
        self.answer: Callable[[list[Comparison]], Any] = lambda batch: [make_verdict(item, 0.9, 0.9) for item in batch]
        self.compare = self

    def remote(self, batch: list[Comparison]) -> Awaitable[Any]:
        return asyncio.ensure_future(self._judge(list(batch)))

    async def _judge(self, batch: list[Comparison]) -> Any:
        self.batches.append([int(item.uid[1:]) for item in batch])
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay)
            if self.hold:
                await self.hold.wait()
            return self.answer(batch)
        finally:
            self.running -= 1


async def test_one_call_keeps_its_order_over_several_batches() -> None:
    handle = Handle()
    pool = JudgePool([handle], batch_size=3, deadline=5)
    verdicts = await pool.compare(comparisons(*range(8)))
    assert numbers(verdicts) == list(range(8))
    assert handle.batches == [[0, 1, 2], [3, 4, 5], [6, 7]]


async def test_calls_that_come_together_share_a_batch() -> None:
    handle = Handle()
    pool = JudgePool([handle], batch_size=64, deadline=5)
    answers = await asyncio.gather(*(pool.compare(comparisons(2 * call, 2 * call + 1)) for call in range(5)))
    assert handle.batches == [list(range(10))]
    assert [numbers(answer) for answer in answers] == [[2 * call, 2 * call + 1] for call in range(5)]


async def test_a_batch_that_is_full_does_not_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JudgePool, "LINGER_S", 60.0)
    pool = JudgePool([Handle()], batch_size=2, deadline=5)
    async with asyncio.timeout(5):
        assert numbers(await pool.compare(comparisons(1, 2))) == [1, 2]


async def test_a_late_timer_does_not_close_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linger of a batch that filled up early must not cut short a younger one."""
    monkeypatch.setattr(JudgePool, "LINGER_S", 0.05)
    handle = Handle()
    pool = JudgePool([handle], batch_size=2, deadline=5)
    await pool.compare(comparisons(0, 1))
    await asyncio.sleep(0.03)
    young = asyncio.create_task(pool.compare(comparisons(2)))
    await asyncio.sleep(0.035)  # the first timer has fired, the second has not
    assert handle.batches == [[0, 1]]
    assert numbers(await young) == [2]


async def test_nothing_to_compare_asks_nobody() -> None:
    handle = Handle()
    assert await JudgePool([handle], batch_size=2, deadline=5).compare([]) == []
    await asyncio.sleep(2 * JudgePool.LINGER_S)
    assert handle.batches == []


async def test_an_actor_holds_at_most_two_batches_and_all_are_used() -> None:
    handles = [Handle(0.01) for _ in range(3)]
    pool = JudgePool(handles, batch_size=1, deadline=5)
    assert numbers(await pool.compare(comparisons(*range(24)))) == list(range(24))
    assert [handle.most_running for handle in handles] == [2, 2, 2]
    assert sorted(number for handle in handles for [number] in handle.batches) == list(range(24))


async def test_work_goes_to_whoever_is_free() -> None:
    slow, fast = Handle(0.2), Handle(0.001)
    pool = JudgePool([slow, fast], batch_size=1, deadline=5)
    await pool.compare(comparisons(*range(20)))
    assert len(slow.batches) == 2
    assert len(fast.batches) == 18


async def until(ready: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not ready():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("batch_size", "later"),
    [(64, [list(range(4, 32))]), (12, [list(range(4, 16)), list(range(16, 28)), [28, 29, 30, 31]])],
)
async def test_a_batch_grows_while_the_pool_is_busy(batch_size: int, later: list[list[int]]) -> None:
    """Prompts that trickle in behind a busy judge share batches: each waits for a slot, and no batch has to."""
    handle = Handle()
    pool = JudgePool([handle], batch_size, deadline=5)
    gate = asyncio.Event()
    handle.hold = gate
    calls = []
    for prompt in range(16):
        calls.append(asyncio.create_task(pool.compare(comparisons(2 * prompt, 2 * prompt + 1))))
        if prompt < 2:  # a free slot each
            await until(lambda sent=prompt + 1: len(handle.batches) == sent)  # type: ignore[misc]
        else:
            await asyncio.sleep(JudgePool.LINGER_S * 1.5)
    assert handle.batches == [[0, 1], [2, 3]], "both slots are taken"
    gate.set()
    answers = await asyncio.gather(*calls)
    assert handle.batches == [[0, 1], [2, 3], *later]
    assert [numbers(answer) for answer in answers] == [[2 * prompt, 2 * prompt + 1] for prompt in range(16)]


async def test_a_batch_that_waited_for_a_slot_does_not_linger_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle()
    pool = JudgePool([handle], batch_size=2, deadline=5)
    handle.hold = asyncio.Event()
    busy = asyncio.create_task(pool.compare(comparisons(0, 1, 2, 3)))
    await until(lambda: len(handle.batches) == 2)
    monkeypatch.setattr(JudgePool, "LINGER_S", 60.0)
    waits = asyncio.create_task(pool.compare(comparisons(4)))
    await asyncio.sleep(0.01)
    handle.hold.set()
    async with asyncio.timeout(5):
        assert numbers(await waits) == [4]
    await busy


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=8),
    batch_size=st.integers(1, 5),
    delays=st.lists(st.sampled_from([0.0, 0.001, 0.004]), min_size=1, max_size=3),
    pauses=st.lists(st.sampled_from([0.0, 0.001, 0.007]), min_size=8, max_size=8),
)
def test_each_call_gets_its_own_verdicts_in_order(
    sizes: list[int], batch_size: int, delays: list[float], pauses: list[float]
) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    wanted = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    handles = [Handle(delay) for delay in delays]

    async def run() -> list[list[Verdict]]:
        pool = JudgePool(handles, batch_size, deadline=5)

        async def call(own: list[int], pause: float) -> list[Verdict]:
            await asyncio.sleep(pause)
            return await pool.compare(comparisons(*own))

        return await asyncio.gather(*(call(own, pause) for own, pause in zip(wanted, pauses, strict=False)))

    assert [numbers(answer) for answer in asyncio.run(run())] == wanted
    batches = [batch for handle in handles for batch in handle.batches]
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert sorted(number for batch in batches for number in batch) == list(range(sum(sizes)))


async def test_an_error_reaches_every_caller_of_the_batch_and_frees_the_slot() -> None:
    handle = Handle()

    def broken(batch: list[Comparison]) -> list[Verdict]:
        raise RLHFError("the judge's model gave nothing")

    handle.answer, good = broken, handle.answer
    pool = JudgePool([handle], batch_size=64, deadline=5)
    calls = (pool.compare(comparisons(1)), pool.compare(comparisons(2, 3)))
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(answer) for answer in answers] == ["the judge's model gave nothing"] * 2
    assert len(handle.batches) == 1
    for _ in range(3):  # more errors than the pool has slots
        with pytest.raises(RLHFError):
            await pool.compare(comparisons(1))
    handle.answer = good
    async with asyncio.timeout(5):
        assert numbers(await pool.compare(comparisons(*range(5)))) == list(range(5))


async def test_a_judge_that_does_not_answer_is_named_and_its_slot_freed() -> None:
    handle = Handle(60.0)
    pool = JudgePool([handle], batch_size=2, deadline=0.05, name="eval-judge")
    with pytest.raises(DeadlineError, match="eval-judge-0: 2 comparisons did not end within"):
        await pool.compare(comparisons(1, 2))
    handle.delay = 0.0
    async with asyncio.timeout(5):
        assert numbers(await pool.compare(comparisons(*range(6)))) == list(range(6))


@pytest.mark.parametrize("given", [[], None, "one too few", "one too many"])
async def test_a_judge_that_does_not_give_one_verdict_each_is_an_error(given: Any) -> None:
    """Nothing back, or verdicts that would slip to another caller's comparisons."""
    handle = Handle()
    good = handle.answer

    def answer(batch: list[Comparison]) -> Any:
        if given == "one too few":
            return good(batch)[1:]
        return good(batch) * 2 if given == "one too many" else given

    handle.answer = answer
    pool = JudgePool([handle], batch_size=64, deadline=5)
    answers = await asyncio.gather(*(pool.compare(comparisons(n)) for n in range(2)), return_exceptions=True)
    for error in answers:
        assert isinstance(error, RLHFError), error
        assert "verdicts for 2 comparisons" in str(error)


class Pool:
    """A pool of handles of which those in `dying` are dead; new ones take their places."""

    def __init__(self, handles: list[Handle], budget: int = 5, deadline: float = 5.0, batch_size: int = 2) -> None:
        self.alerts: list[str] = []
        self.spares: list[Handle | Exception] = []
        self.started: list[int] = []
        self.pool = JudgePool(
            handles, batch_size, deadline, "judge", self._restart, RestartBudget(budget, 3600.0), self.alerts.append
        )

    async def _restart(self, index: int) -> Handle:
        self.started.append(index)
        await asyncio.sleep(0.01)
        spare = self.spares.pop(0) if self.spares else Handle()
        if isinstance(spare, Exception):
            raise spare
        return spare


def dead(batch: list[Comparison]) -> list[Verdict]:
    raise ray.exceptions.ActorDiedError()


async def test_the_batches_of_a_dead_judge_go_to_others_and_it_comes_back() -> None:
    dying, other = Handle(0.005), Handle(0.005)
    dying.answer = dead
    world = Pool([dying, other])
    async with asyncio.timeout(5):
        assert numbers(await world.pool.compare(comparisons(*range(12)))) == list(range(12))
        assert world.started == [0]
        assert numbers(await world.pool.compare(comparisons(*range(12)))) == list(range(12))
    # Two batches were with it; they were not lost, and nothing was judged twice.
    assert len(dying.batches) == 2
    [alert] = world.alerts
    assert alert.startswith("judge-0 is started again: judge-0: 2 comparisons: the actor died")


async def test_a_wedged_judges_batch_goes_to_another_at_the_deadline() -> None:
    wedged, other = Handle(60.0), Handle()
    world = Pool([wedged, other], deadline=0.1)
    async with asyncio.timeout(5):
        assert numbers(await world.pool.compare(comparisons(*range(8)))) == list(range(8))
    assert "did not end within" in world.alerts[0]


async def test_the_only_judge_is_waited_for() -> None:
    dying = Handle()
    dying.answer = dead
    world = Pool([dying])
    async with asyncio.timeout(5):
        assert numbers(await world.pool.compare(comparisons(1, 2, 3))) == [1, 2, 3]


async def test_no_judge_left_is_one_clear_error_for_all_callers() -> None:
    dying = [Handle(), Handle()]
    for handle in dying:
        handle.answer = dead
    world = Pool(dying, budget=0)
    async with asyncio.timeout(5):
        calls = [world.pool.compare(comparisons(n, n + 1)) for n in range(0, 20, 2)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        again = await asyncio.gather(world.pool.compare(comparisons(1)), return_exceptions=True)
    for error in answers + again:
        assert isinstance(error, RLHFError)
        assert str(error).startswith("no judge is left: judge-")
        assert "restarts are spent (cluster.restarts: 0 in 3600 s)" in str(error)
    assert len(world.alerts) == 2


async def test_comparisons_that_kill_every_judge_are_not_tried_for_ever() -> None:
    handle = Handle()
    handle.answer = dead
    world = Pool([handle])
    world.spares = [Handle(), Handle()]
    for spare in world.spares:
        spare.answer = dead  # type: ignore[union-attr]
    async with asyncio.timeout(5):
        with pytest.raises(RLHFError, match="3 actors were lost over the same comparisons"):
            await world.pool.compare(comparisons(1, 2))
        assert numbers(await world.pool.compare(comparisons(3))) == [3]


async def test_a_judge_whose_start_fails_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.reviving.FIRST_PAUSE_S", 0.01)
    dying = Handle()
    dying.answer = dead
    world = Pool([dying])
    world.spares = [RLHFError("no memory"), Handle()]
    async with asyncio.timeout(5):
        assert numbers(await world.pool.compare(comparisons(1))) == [1]
    assert [("could not be started: no memory" in alert) for alert in world.alerts] == [False, True]


async def test_a_cancelled_caller_takes_nobody_with_it() -> None:
    """Callers share a batch; one that is stopped must not stop the others."""
    pool = JudgePool([Handle(0.02)], batch_size=64, deadline=5)
    leaves = asyncio.create_task(pool.compare(comparisons(1)))
    stays = asyncio.create_task(pool.compare(comparisons(2)))
    await asyncio.sleep(JudgePool.LINGER_S + 0.01)
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    assert numbers(await stays) == [2]


async def test_an_error_nobody_waits_for_any_more_is_not_reported_by_the_loop() -> None:
    """A call over several broken batches raises the first error; the others must not litter the console."""
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    handle = Handle()

    def broken(batch: list[Comparison]) -> list[Verdict]:
        raise RLHFError("broken")

    handle.answer = broken
    pool = JudgePool([handle], batch_size=1, deadline=5)
    with pytest.raises(RLHFError, match="broken"):
        await pool.compare(comparisons(1, 2, 3))
    await asyncio.sleep(0.01)
    del pool
    gc.collect()
    assert [report["message"] for report in reports] == []
