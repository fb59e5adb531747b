"""A world for the driver loop: in-memory ports around its real source, ledger, sealed files, checkpoints and saver.

Generators, judge, learner and weight plane are the smallest things that keep their ports' promises.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

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
                self.taken.append((sealed.round, pair.uid, tuple(pair.chosen_ids)))
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
            (round, pair.uid, tuple(pair.chosen_ids)) for pair in sealed.pairs
        ]
    return taken
