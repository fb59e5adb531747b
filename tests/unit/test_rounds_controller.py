"""The driver loop over in-memory ports: what happens in which order, how far it runs ahead, and how it resumes.

See `rounds_world`.
"""

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import RLHFError
from rlhf.judging.verdicts import make_verdict
from rlhf.records import (
    Comparison,
    Verdict,
)
from rlhf.rounds.ledger import Ledger, RoundState
from tests.unit.rounds_world import World, _no_flushes, check_finished, make_config, run

__all__ = ["_no_flushes"]


async def test_synchronous_rounds_in_order(tmp_path: Path) -> None:
    world = World()
    await run(world, make_config(rounds__count=2), tmp_path, evaluated=True)
    saving = ("save", "saved")
    one = [
        "sample",
        "response",
        "response",
        "response",
        "response",
        "train",
        "step",
        "step",
        "export",
        "publish",
        "serve",
    ]
    assert [kind for event in world.trace if (kind := event.split()[0]) not in ("judge", *saving)] == [
        *("export", "publish", "serve", "catch-up"),
        *one,
        *one,
        "evaluate",
    ]
    assert [event for event in world.trace if event.startswith(saving)] == [
        f"{word} round-000{round}" for round in (1, 2) for word in saving
    ]
    # The save begins once the version serves, and the learner cannot get the next round before it has it.
    assert world.trace.index("serve 1") < world.trace.index("save round-0001") < world.trace.index("train 2")
    check_finished(tmp_path, 2)


async def test_one_round_ahead_samples_while_training(tmp_path: Path) -> None:
    world = World()
    await run(world, make_config(rounds__count=4, rounds__lookahead=1), tmp_path)
    samples = [index for index, event in enumerate(world.trace) if event == "sample"]
    assert samples[1] < world.trace.index("serve 1")
    assert world.trace.index("serve 1") < samples[2] < world.trace.index("serve 2")
    staleness = [metrics["pairs/staleness_max"] for event, _, metrics in world.logged if event == "round"]
    assert staleness == [0.0, 1.0, 1.0, 1.0]
    check_finished(tmp_path, 4)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), lookahead=st.integers(0, 1), every=st.integers(1, 3))
def test_never_further_ahead_than_lookahead_under_any_timing(seed: int, lookahead: int, every: int) -> None:
    world = World(seed=seed)
    config = make_config(rounds__count=4, rounds__lookahead=lookahead, checkpoint__every=every)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(world, config, Path(folder)))
        check_finished(Path(folder), 4)
    published, sampled, trained = -1, 0, 0
    for event in world.trace:
        kind, _, number = event.partition(" ")
        if kind == "sample":
            sampled += 1
            assert sampled - 1 - published <= lookahead
        elif kind == "serve":
            assert int(number) == published + 1 == trained
            published += 1
        elif kind == "train":
            assert int(number) == trained + 1 <= sampled
            trained += 1
    assert (sampled, trained, published) == (4, 4, 4)


async def test_steps_and_rounds_are_logged_under_the_contract_s_names(tmp_path: Path) -> None:
    world = World()
    await run(world, make_config(rounds__count=2), tmp_path)
    assert [(event, round) for event, round, _ in world.logged] == [
        ("step", 1), ("step", 1), ("round", 1), ("step", 2), ("step", 2), ("round", 2),
    ]  # fmt: skip
    metrics = world.logged[-1][2]
    names = {
        "rollout": "tokens tokens_per_s length_mean truncated_rate",
        "judge": "comparisons flip_rate tie_rate invalid_rate length_bias",
        "pairs": "kept dropped_tie dropped_invalid staleness_mean staleness_max",
        "sync": "seconds bytes changed_fraction",
        "timing_s": "generate judge learn sync checkpoint idle total",
    }
    assert {f"{group}/{name}" for group, text in names.items() for name in text.split()} <= metrics.keys()
    assert (metrics["rollout/tokens"], metrics["judge/comparisons"], metrics["pairs/kept"]) == (8.0, 2.0, 2.0)
    assert metrics["timing_s/checkpoint"] > 0  # of round 1, which was written while round 2 was sampled


@pytest.mark.parametrize("lookahead", [0, 1])
async def test_more_rounds_go_on_from_the_last_checkpoint(lookahead: int, tmp_path: Path) -> None:
    await run(World(), make_config(rounds__count=2, rounds__lookahead=lookahead), tmp_path, evaluated=True)
    world = World()
    await run(world, make_config(rounds__count=5, rounds__lookahead=lookahead), tmp_path, evaluated=True)
    assert world.trace[:5] == ["load round-0002", "export 2", "publish 2", "serve 2", "catch-up 2 False"]
    assert world.trace.count("sample") == 3
    assert [event for event in world.trace if event.startswith("train")] == ["train 3", "train 4", "train 5"]
    check_finished(tmp_path, 5)


async def test_a_finished_run_trains_nothing_again(tmp_path: Path) -> None:
    await run(World(), make_config(), tmp_path)
    world = World()
    await run(world, make_config(), tmp_path, evaluated=True)
    assert world.trace == ["load round-0003", "export 3", "publish 3", "serve 3", "catch-up 3 True"]


def fails_at(name: str) -> Callable[[str], None]:
    """Raises at one point."""

    def at(event: str) -> None:
        if event == name:
            raise RuntimeError(event)

    return at


async def test_rounds_that_no_checkpoint_covers_are_replayed_from_disk(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup):
        await run(World(fails_at("train 5")), make_config(rounds__count=6, checkpoint__every=3), tmp_path)
    ledger = Ledger(tmp_path)
    assert [ledger.state(round).name for round in (3, 4, 5, 6)] == ["PUBLISHED", "SEALED", "SEALED", "NEW"]
    sealed = [(tmp_path / "rounds" / f"000{round}" / "pairs.parquet").read_bytes() for round in (4, 5)]
    world = World()
    await run(world, make_config(rounds__count=6, checkpoint__every=3), tmp_path)
    assert world.trace[0] == "load round-0003"
    assert world.trace.count("sample") == 1
    assert [(tmp_path / "rounds" / f"000{round}" / "pairs.parquet").read_bytes() for round in (4, 5)] == sealed
    check_finished(tmp_path, 6)


async def test_a_damaged_checkpoint_costs_a_replay_and_a_warning(tmp_path: Path) -> None:
    await run(World(), make_config(), tmp_path)
    (tmp_path / "checkpoints" / "round-0003" / "taken.json").write_text("[]")
    world = World()
    await run(world, make_config(), tmp_path)
    assert [word in world.alerts[0] for word in ("round-0003", "taken.json")] == [True, True]
    assert world.trace.count("sample") == 0
    assert [event for event in world.trace if event.startswith(("load", "train"))] == ["load round-0002", "train 3"]
    check_finished(tmp_path, 3)


async def test_changed_pairs_are_not_trained(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup):
        await run(World(fails_at("train 2")), make_config(), tmp_path)
    # Their responses too: from these the pairs would be made again.
    for name in ("pairs", "rollouts"):
        path = tmp_path / "rounds" / "0002" / f"{name}.parquet"
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    world = World()
    with pytest.raises(ExceptionGroup) as error:
        await run(world, make_config(), tmp_path)
    assert error.group_contains(RLHFError, match=r"0002/pairs\.parquet: the sealed pairs of round 2 have changed")
    assert not any(event.startswith("train") for event in world.trace)
    assert "0002/rollouts.parquet is damaged too" in world.alerts[0]


async def test_a_round_without_pairs_takes_no_step_warns_and_is_done(tmp_path: Path) -> None:
    class Unsure(World):
        async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            return [make_verdict(item, 0.9, 0.1) for item in comparisons]

    world = Unsure()
    await run(world, make_config(), tmp_path)
    assert [Ledger(tmp_path).state(round) for round in (1, 2, 3)] == [RoundState.PUBLISHED] * 3
    assert world.taken == []
    assert sum("kept no pair" in alert for alert in world.alerts) == 3


def fails_after(count: int) -> Callable[[str], None]:
    """Raises at every point after the first `count`."""
    points = itertools.count()

    def at(event: str) -> None:
        if next(points) >= count:
            raise RuntimeError(event)

    return at


@pytest.mark.parametrize(("count", "lookahead", "every"), [(2, 0, 1), (3, 1, 2)])
def test_an_error_at_any_point_and_a_second_try(count: int, lookahead: int, every: int, tmp_path: Path) -> None:
    """An error leaves through the saver, which ends what is under way; the next try must still train all, once."""
    config = make_config(rounds__count=count, rounds__lookahead=lookahead, checkpoint__every=every)
    uninterrupted = World()
    asyncio.run(run(uninterrupted, config, tmp_path / "whole"))
    whole = check_finished(tmp_path / "whole", count)
    for points in range(len(uninterrupted.trace)):
        run_dir = tmp_path / str(points)
        with pytest.raises((RuntimeError, ExceptionGroup)):
            asyncio.run(run(World(fails_after(points)), config, run_dir))
        asyncio.run(run(World(), config, run_dir))
        assert check_finished(run_dir, count) == whole, points
