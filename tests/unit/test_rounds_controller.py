"""The driver loop over in-memory ports: what happens in which order, how far it runs ahead, and how it resumes.

The source, the ledger, the sealed files, the checkpoints and the saver are the real ones; generators, judge, learner
and weight plane are the smallest things that keep their ports' promises. The kill tests run this file's ports too.
"""

import asyncio
import itertools
import json
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import RunConfig
from rlhf.data.prompts import PromptOrder
from rlhf.errors import RLHFError
from rlhf.judging.verdicts import make_verdict
from rlhf.records import (
    Comparison,
    Message,
    Prompt,
    Rollout,
    SampleRequest,
    SealedRound,
    StepReport,
    SyncReport,
    Verdict,
    VersionSpan,
    WeightManifest,
)
from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.controller import System, run_rounds
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.online import OnlineSource
from rlhf.rounds.sealing import read_sealed

PROMPTS = [
    Prompt(f"{number:016x}", (Message(role="user", content=str(number)),), str(number), (number,))
    for number in range(5)
]


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is proved in test_files; here it would only cost time on a busy disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def make_config(**changes: Any) -> RunConfig:
    """Two prompts a round of two responses each; five prompts in all, so that rounds cross epochs."""
    sections: dict[str, Any] = {
        "name": "r",
        "policy": {"path": "m"},
        "prompts": {"path": "p"},
        "rounds": {"count": 3, "prompts": 2},
        "generator": {"samples": 2},
    }
    for (section, key), value in ((path.split("__"), value) for path, value in changes.items()):
        sections.setdefault(section, {})[key] = value
    return RunConfig.model_validate(sections)


class World:
    """In-memory ports that share a trace. `pause` is awaited at every point, `at` is called there: it may raise."""

    def __init__(self, at: Callable[[str], None] = lambda event: None, seed: int | None = None) -> None:
        self.trace: list[str] = []
        self.logged: list[tuple[str, int, dict[str, float]]] = []
        self.alerts: list[str] = []
        self.taken: list[tuple[int, str, tuple[int, ...]]] = []
        self.serving = -1
        self._at = at
        self._random = random.Random(seed) if seed is not None else None
        self._calls = asyncio.Lock()

    async def point(self, event: str) -> None:
        self.trace.append(event)
        self._at(event)
        await asyncio.sleep(self._random.choice((0, 0, 0.001, 0.003)) if self._random else 0)

    # Generators
    async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
        await self.point("sample")
        for request in requests:
            for k, seed in enumerate(request.seeds):
                await self.point("response")
                ids = (seed % 50_000, seed // 50_000 % 50_000)
                span = VersionSpan(self.serving, 0, 2)
                yield Rollout(request.prompt.uid, k, ids, (-1.0, -0.5), str(ids), "stop", (span,))

    # Judge
    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        await self.point("judge")
        return [make_verdict(item, p, p) for item in comparisons for p in [0.9 if item.a > item.b else 0.1]]

    # Learner: takes calls in order, one at a time
    async def train(self, sealed: SealedRound, others: Mapping[str, SealedRound]) -> AsyncIterator[StepReport]:
        async with self._calls:
            await self.point(f"train {sealed.round}")
            if any(round >= sealed.round for round, _, _ in self.taken):
                raise RLHFError(f"round {sealed.round} has been taken already")
            for step, pair in enumerate(sealed.pairs):
                self.taken.append((sealed.round, pair.uid, pair.chosen_ids))
                await self.point(f"step {sealed.round}")
                yield StepReport(sealed.round, step, {"train/pairs": 1.0, "train/loss": 0.5})

    async def restart(self) -> bool:
        return False

    async def statistics(self) -> dict[str, float]:
        return {"timing_s/learn": 1.0, "train/skipped": 0.0}

    async def save(self, path: Path) -> None:
        async with self._calls:
            await self.point(f"save {path.name[:10]}")
            (path / "taken.json").write_text(json.dumps(self.taken))
            await self.point(f"saved {path.name[:10]}")

    async def load(self, path: Path) -> None:
        await self.point(f"load {path.name}")
        rows = json.loads((path / "taken.json").read_text())
        self.taken = [(round, uid, tuple(ids)) for round, uid, ids in rows]

    async def manifest(self, version: int) -> WeightManifest:
        async with self._calls:
            await self.point(f"export {version}")
            return WeightManifest(version, (), ())

    # WeightPlane and Fleet
    async def publish(self, manifest: WeightManifest, targets: Sequence[str]) -> SyncReport:
        await self.point(f"publish {manifest.version}")
        return SyncReport(manifest.version, 0.0, 0, tuple(targets), {}, 0.0)

    def members(self) -> list[str]:
        return ["generator-0"]

    async def admit(self, member: str, version: int) -> None:
        self.serving = version
        await self.point(f"serve {version}")

    # Evaluator
    async def catch_up(self, round: int, last: bool) -> None:
        assert self.serving == round
        await self.point(f"catch-up {round} {last}")

    def due(self, round: int, last: bool) -> bool:
        return last or round % 2 == 0

    async def evaluate(self, round: int) -> None:
        assert self.serving == round, "an evaluation is of the version that serves"
        await self.point(f"evaluate {round}")

    # Monitor
    def log(self, event: str, round: int, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.logged.append((event, round, dict(metrics)))

    def rewind(self, round: int) -> None:
        self.logged = [item for item in self.logged if item[1] <= round]

    def alert(self, message: str) -> None:
        self.alerts.append(message)

    def progress(self, name: str, total: int | None) -> "World":
        return self

    def advance(self, amount: int = 1) -> None:
        assert amount == int(amount)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def make_system(world: Any, config: RunConfig, run_dir: Path, evaluated: bool = False) -> System:
    ledger = Ledger(run_dir)
    source = OnlineSource(config, PromptOrder(PROMPTS, config.seed), world, world, ledger, world)
    store = CheckpointStore(run_dir, config.checkpoint.keep)
    return System(source, world, world, world, ledger, store, world if evaluated else None, world)


async def run(world: World, config: RunConfig, run_dir: Path, evaluated: bool = False) -> None:
    await run_rounds(make_system(world, config, run_dir, evaluated), config)


def check_finished(run_dir: Path, count: int) -> list[tuple[int, str, tuple[int, ...]]]:
    """Every planned uid was trained exactly once, in the state that survives; returns that state."""
    ledger = Ledger(run_dir)
    store = CheckpointStore(run_dir, 2)
    rounds = range(1, count + 1)
    states = [ledger.state(round).name for round in rounds]
    assert states == ["PUBLISHED"] * count, states
    assert ledger.state(count + 1) <= RoundState.PLANNED
    assert store.newest(pytest.fail) == count
    rows = json.loads((store.path(count) / "taken.json").read_text())
    taken = [(round, uid, tuple(ids)) for round, uid, ids in rows]
    assert [(round, uid) for round, uid, _ in taken] == [
        (round, uid) for round in rounds for uid in sorted(ledger.plan(round))
    ]
    order = [prompt.uid for prompt in PromptOrder(PROMPTS, 0).slice(0, 2 * count)]
    assert [uid for round in rounds for uid in ledger.plan(round)] == order
    assert len(set(order)) == 2 * count
    for round in rounds:
        digest = ledger.manifest(round)["pairs"]["sha256"]
        sealed = read_sealed(ledger.folder(round) / "pairs.parquet", round, digest)
        assert [item for item in taken if item[0] == round] == [
            (round, pair.uid, pair.chosen_ids) for pair in sealed.pairs
        ]
    return taken


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


async def test_rounds_that_no_checkpoint_covers_are_replayed_from_disk(tmp_path: Path) -> None:
    def fail(event: str) -> None:
        if event == "train 5":
            raise RuntimeError(event)

    with pytest.raises(ExceptionGroup):
        await run(World(fail), make_config(rounds__count=6, checkpoint__every=3), tmp_path)
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
    def fail(event: str) -> None:
        if event == "train 2":
            raise RuntimeError(event)

    with pytest.raises(ExceptionGroup):
        await run(World(fail), make_config(), tmp_path)
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
