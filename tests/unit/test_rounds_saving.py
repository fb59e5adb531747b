"""The background saver: in order, one at a time, and what is under way ends whatever happens around it."""

import asyncio
from pathlib import Path

import pytest

from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.saving import Saver

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is proved in test_files; here it would only cost time on a busy disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class SlowLearner:
    """Writes its folder in two halves; `gate` holds it between them. Records what it is doing."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.events: list[str] = []
        self.fail: Exception | None = None

    async def save(self, path: Path) -> None:
        self.events.append(f"begin {path.name}")
        (path / "first").write_text("1")
        await self.gate.wait()
        if self.fail:
            raise self.fail
        (path / "second").write_text("2")
        self.events.append(f"end {path.name}")


class Case:
    """A run directory whose rounds are sealed, and a saver on it."""

    def __init__(self, run_dir: Path, every: int, rounds: int = 7) -> None:
        self.learner = SlowLearner()
        self.ledger = Ledger(run_dir)
        self.store = CheckpointStore(run_dir, keep=2)
        self.saver = Saver(self.learner, self.store, self.ledger, every)  # type: ignore[arg-type]
        for round in range(1, rounds + 1):
            self.ledger.commit(round, RoundState.PLANNED, {"uids": [], "cursor": 0})
            self.ledger.commit(round, RoundState.SEALED, {})

    def states(self, count: int) -> list[str]:
        return [self.ledger.state(round).name for round in range(1, count + 1)]


async def test_a_save_runs_while_the_caller_goes_on(tmp_path: Path) -> None:
    case = Case(tmp_path, every=1)
    async with case.saver as saver:
        case.learner.gate.clear()
        assert await saver.wait() == 0.0
        await saver.save(1, last=False)
        # The learner has the call already: whatever is sent to it next comes after.
        assert case.learner.events == ["begin round-0001.tmp"]
        assert case.states(1) == ["SEALED"]
        case.learner.gate.set()
    assert case.states(1) == ["PUBLISHED"]
    assert case.store.rounds() == [1]


async def test_saves_run_one_at_a_time_in_order_and_report_their_seconds(tmp_path: Path) -> None:
    case = Case(tmp_path, every=1)
    async with case.saver as saver:
        case.learner.gate.clear()
        await saver.save(1, last=False)
        second = asyncio.create_task(saver.save(2, last=False))
        await asyncio.sleep(0.02)
        assert case.learner.events == ["begin round-0001.tmp"]
        case.learner.gate.set()
        await second
        assert 0.0 < await saver.wait() < 5
        assert await saver.wait() == 0.0
        await saver.save(3, last=True)
        await asyncio.sleep(0.02)
        assert 0.0 < await saver.wait() < 5
    names = [f"{word} round-000{round}.tmp" for round in (1, 2, 3) for word in ("begin", "end")]
    assert case.learner.events == names
    assert case.states(3) == ["PUBLISHED"] * 3
    assert case.store.rounds() == [2, 3]


async def test_a_checkpoint_covers_the_rounds_since_the_one_before(tmp_path: Path) -> None:
    case = Case(tmp_path, every=3)
    async with case.saver as saver:
        for round in (1, 2):
            await saver.save(round, last=False)
            assert case.states(2) == ["SEALED", "SEALED"]
        await saver.save(3, last=False)
        await saver.save(4, last=False)  # ends the save of round 3
        assert case.states(5) == ["PUBLISHED"] * 3 + ["SEALED"] * 2
        await saver.save(5, last=True)
    assert case.states(6) == ["PUBLISHED"] * 5 + ["SEALED"]
    assert case.store.rounds() == [3, 5]
    assert [case.ledger.manifest(round)["checkpoint"] for round in (1, 2, 3, 4, 5)] == ["round-0003"] * 3 + [
        "round-0005"
    ] * 2
    assert [case.ledger.manifest(round)["version"] for round in (1, 2, 3, 4, 5)] == [1, 2, 3, 4, 5]


async def test_the_rhythm_is_that_of_the_round_numbers_also_after_a_resume(tmp_path: Path) -> None:
    case = Case(tmp_path, every=3)
    async with case.saver as saver:
        for round in (5, 6, 7):
            await saver.save(round, last=False)
    assert case.store.rounds() == [6]


@pytest.mark.parametrize("where", ["next save", "leaving"])
async def test_an_error_of_a_save_surfaces_and_nothing_is_called_trained(where: str, tmp_path: Path) -> None:
    case = Case(tmp_path, every=1)
    case.learner.fail = OSError("disk full")

    async def body() -> None:
        async with case.saver as saver:
            await saver.save(1, last=False)
            if where == "next save":
                await asyncio.sleep(0.01)
                await saver.save(2, last=False)
                pytest.fail("the error came too late")

    with pytest.raises(OSError, match="disk full"):
        await body()
    assert case.states(2) == ["SEALED"] * 2
    assert case.store.rounds() == []


async def test_an_error_in_the_body_is_the_one_that_comes_out_after_the_save(tmp_path: Path) -> None:
    case = Case(tmp_path, every=1)

    async def body() -> None:
        async with case.saver as saver:
            case.learner.gate.clear()
            await saver.save(1, last=False)
            asyncio.get_running_loop().call_later(0.02, case.learner.gate.set)
            raise RuntimeError("the judge died")

    with pytest.raises(RuntimeError, match="the judge died"):
        await body()
    assert case.states(1) == ["PUBLISHED"]
    assert case.store.rounds() == [1]


async def test_a_failing_save_does_not_hide_the_first_error(tmp_path: Path) -> None:
    case = Case(tmp_path, every=1)
    case.learner.fail = OSError("disk full")

    async def body() -> None:
        async with case.saver as saver:
            await saver.save(1, last=False)
            raise RuntimeError("the judge died")

    with pytest.raises(RuntimeError, match="the judge died"):
        await body()
    assert case.states(1) == ["SEALED"]


@pytest.mark.parametrize("waits_in", ["body", "next save", "wait", "leaving"])
async def test_a_stop_waits_for_the_save_under_way(waits_in: str, tmp_path: Path) -> None:
    """SIGTERM cancels the run wherever it waits, the wait for the save itself included; the save still ends."""
    case = Case(tmp_path, every=1)
    reached = asyncio.Event()

    async def body() -> None:
        async with case.saver as saver:
            case.learner.gate.clear()
            await saver.save(1, last=False)
            reached.set()
            if waits_in == "body":
                await asyncio.sleep(60)
            elif waits_in == "next save":
                await saver.save(2, last=False)
            elif waits_in == "wait":
                await saver.wait()

    task = asyncio.create_task(body())
    await reached.wait()
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    case.learner.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert case.learner.events == ["begin round-0001.tmp", "end round-0001.tmp"]
    assert case.states(2) == ["PUBLISHED", "SEALED"]
    assert case.store.rounds() == [1]
