"""Timed waits in place of generation, judging and learning; everything else of a run is the real thing.

The stand-ins are Ray actors behind the real fleet, judge pool, weight plane and learner group, so that what is left of
a round, once the waits are taken off, is the loop's own cost: planning, dispatch, pairing, ledger, sealing, sync calls.
Several simulated generators share an actor: a call to one sleeps and answers, whoever else is asleep in it.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from rich.console import Console

from actors.fleet import GeneratorFleet
from actors.judge import JudgePool
from actors.learner import LearnerGroup
from actors.relay import DIRECT, Relays
from actors.weights.plane import ObjectStorePlane
from rlhf.config import RunConfig
from rlhf.data.prompts import PromptOrder
from rlhf.judging.verdicts import make_verdict
from rlhf.monitor.console import ConsoleSink
from rlhf.monitor.group import MonitorGroup
from rlhf.monitor.jsonl import JsonlSink
from rlhf.packed import logprobs, token_ids
from rlhf.records import (
    Comparison,
    Message,
    Prompt,
    Rollout,
    SampleRequest,
    SealedRound,
    StepReport,
    Verdict,
    VersionSpan,
    WeightManifest,
)
from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.controller import System
from rlhf.rounds.ledger import Ledger
from rlhf.rounds.online import OnlineSource
from rlhf.wire import PackedRollouts, PackedVerdicts

MAX_ACTORS = 16
SEQUENCES = 8
"""Responses that a simulated generator works on at once: two chunks of prompts with two responses each."""

CHUNK = 4
"""Prompts that a generator's stream takes at a time in a small round."""

STEPS = 4


@dataclass(frozen=True)
class Waits:
    """Seconds of a round: all its responses, one batch of comparisons, all its optimizer steps."""

    generate: float = 0.0
    judge: float = 0.0
    learn: float = 0.0


@dataclass(frozen=True)
class Shape:
    """How large a round is."""

    generators: int = 4
    prompts: int = 64
    samples: int = 2
    tokens: int = 16
    rounds: int = 4
    lookahead: int = 0

    @property
    def in_a_row(self) -> int:
        """Prompts that a simulated generator's stream works through, if all are equally fast."""
        streams = math.ceil(SEQUENCES / (CHUNK * self.samples)) + 1
        return math.ceil(self.prompts / CHUNK / (self.generators * streams)) * CHUNK


def make_response(request: SampleRequest, k: int, version: int, tokens: int) -> Rollout:
    """A response whose tokens and text come from its seed: four characters a token."""
    seed = request.seeds[k]
    draw = np.random.default_rng(seed)
    ids = token_ids(draw.integers(0, 40_000, tokens).tolist())
    scores = logprobs((-draw.random(tokens)).tolist())
    text = (f"{seed:020d} and words " * (tokens // 8))[: 4 * tokens]
    return Rollout(request.prompt.uid, k, ids, scores, text, "stop", (VersionSpan(version, 0, tokens),))


def make_verdicts(comparisons: Sequence[Comparison]) -> list[Verdict]:
    """The larger text wins; scored, as most judges do."""
    return [make_verdict(item, p, p, p, 1.0 - p) for item in comparisons for p in [0.9 if item.a > item.b else 0.1]]


def make_prompts(count: int) -> list[Prompt]:
    """Prompts of eight tokens."""
    return [
        Prompt(f"{n:016x}", (Message(role="user", content=f"Question {n}"),), f"Question {n}", tuple(range(n, n + 8)))
        for n in range(count)
    ]


class TimedGenerator:
    """Simulated generators: each call is another one's."""

    def __init__(self) -> None:
        self._version = 0
        self._asked = 0

    async def sample(self, requests: list[SampleRequest], sampling: dict[str, Any]) -> AsyncIterator[Any]:
        """Sleep for each prompt's share of the round, then give every response."""
        await asyncio.sleep(sampling["prompt_s"] * len(requests))
        version = self._version
        yield PackedRollouts(
            make_response(request, k, version, sampling["tokens"])
            for request in requests
            for k in range(len(request.seeds))
        )

    async def update(self, manifest: WeightManifest, verify: bool, tolerance: float) -> float:
        """Take a version that has no bytes."""
        self._version = manifest.version
        return 0.0

    async def version(self) -> int:
        """The newest version."""
        return self._version

    async def progress(self) -> int:
        """More than when it was last asked: a sleeper is not stuck."""
        self._asked += 1
        return self._asked


class TimedJudge:
    """Sleeps for each batch."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def compare(self, comparisons: list[Comparison]) -> PackedVerdicts:
        """One verdict a comparison."""
        await asyncio.sleep(self._seconds)
        return PackedVerdicts(make_verdicts(comparisons))


class TimedLearner:
    """Sleeps for each step and remembers when it was at work. Calls run one after the other, as a learner's do."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._spans: list[tuple[float, float]] = []
        self._step = 0

    def train(self, sealed: SealedRound, others: Mapping[str, SealedRound]) -> Iterator[StepReport]:
        """Equal steps over the round's pairs."""
        started = time.monotonic()
        for number in range(STEPS):
            self._step += 1
            # Until a set moment: what a sleep and a report take over their time must not add up.
            time.sleep(max(0.0, started + self._seconds * (number + 1) / STEPS - time.monotonic()))
            yield StepReport(sealed.round, self._step, {"train/pairs": len(sealed.pairs) / STEPS, "train/loss": 0.5})
        self._spans.append((started, time.monotonic()))

    def spans(self) -> list[tuple[float, float]]:
        """Start and end of each round's training, on the machine's monotonic clock."""
        return self._spans

    def statistics(self) -> dict[str, float]:
        """What the loop logs of a round."""
        return {"timing_s/learn": self._seconds, "train/skipped": 0.0}

    def save(self, path: Path) -> None:
        """A checkpoint of a few bytes."""
        (path / "step").write_text(str(self._step))

    def manifest(self, version: int, probes: Sequence[Sequence[int]]) -> WeightManifest:
        """A version without tensors."""
        return WeightManifest(version, (), ())


class Mark(NamedTuple):
    """Clocks at one moment, in seconds: the machine's, the driver's processor's for all threads and for the loop's own,
    and what files took of each."""

    at: float
    processor: float
    thread: float
    files: float
    files_processor: float
    files_thread: float


class ClockedGroup(LearnerGroup):
    """Reads the clocks when the loop calls for a training; the actor says when it began."""

    def __init__(self, handle: Any, config: RunConfig) -> None:
        super().__init__([handle], config.cluster.deadlines, ())
        self.handle = handle
        self.files: Callable[[], tuple[float, float, float]] = lambda: (0.0, 0.0, 0.0)
        """What files have taken so far: seconds, seconds of processor, and those of this thread."""
        self.marks: list[Mark] = []

    async def train(self, sealed: SealedRound, others: Mapping[str, SealedRound]) -> AsyncIterator[StepReport]:
        """As the real group does."""
        self.marks.append(Mark(time.monotonic(), time.process_time(), time.thread_time(), *self.files()))
        async for report in super().train(sealed, others):
            yield report


class StandIns:
    """The started actors; `system` puts the real parts of a run around them."""

    def __init__(self, actors: int = MAX_ACTORS - 2, judges: int = 1) -> None:
        generator = ray.remote(TimedGenerator)
        self._generators = [generator.options(max_concurrency=10_000, num_cpus=0).remote() for _ in range(actors)]
        self._judges = judges
        self._node = ray.get_runtime_context().get_node_id()

    async def _handles(self, count: int) -> dict[str, Any]:
        """As a launcher gives them out: a large fleet's are behind relays."""
        actors = {f"generator-{n}": self._generators[n % len(self._generators)] for n in range(count)}
        if count <= DIRECT:
            return actors
        relays = Relays(print)
        return {name: await relays.handle(name, actor, self._node) for name, actor in actors.items()}

    def system(self, shape: Shape, waits: Waits, run_dir: Path) -> tuple[System, RunConfig, ClockedGroup]:
        """A new run of `shape`: the parts, the config, and the learner."""
        config = run_config(shape)
        judge = ray.remote(TimedJudge).options(max_concurrency=10_000, num_cpus=0)
        learner = ray.remote(TimedLearner).options(num_cpus=0).remote(waits.learn)
        pool = JudgePool([judge.remote(waits.judge) for _ in range(self._judges)], config.judge.batch_size, 600.0)
        handles = asyncio.run(self._handles(shape.generators))
        sampling = {"prompt_s": waits.generate / shape.in_a_row, "tokens": shape.tokens}
        fleet = GeneratorFleet(handles, sampling, SEQUENCES, _never)
        plane = ObjectStorePlane(fleet, verify=True, tolerance=1.0, deadline=600.0)
        group = ClockedGroup(learner, config)
        return assemble(config, shape, run_dir, (fleet, pool, group, plane, fleet)), config, group


def run_config(shape: Shape) -> RunConfig:
    """The config of a run of this shape."""
    sections: dict[str, Any] = {
        "name": "overlap",
        "policy": {"path": "none"},
        "prompts": {"path": "none"},
        "rounds": {"count": shape.rounds, "prompts": shape.prompts, "lookahead": shape.lookahead},
        "generator": {"samples": shape.samples, "replicas": shape.generators},
    }
    return RunConfig.model_validate(sections)


def assemble(config: RunConfig, shape: Shape, run_dir: Path, ports: tuple[Any, Any, Any, Any, Any]) -> System:
    """The real source, ledger, checkpoints and monitor around (generators, judge, learner, plane, fleet)."""
    generators, judge, learner, plane, fleet = ports
    run_dir.mkdir(parents=True)
    order = PromptOrder(make_prompts(shape.prompts), config.seed)
    ledger = Ledger(run_dir)
    console = ConsoleSink(Console(file=(run_dir / "console.txt").open("w")), shape.rounds)
    monitor = MonitorGroup(JsonlSink(run_dir), console)
    source = OnlineSource(config, order, generators, judge, ledger, monitor)
    store = CheckpointStore(run_dir, config.checkpoint.keep)
    return System(source, learner, plane, fleet, ledger, store, None, monitor)


async def _never(name: str) -> Mapping[str, Any]:
    raise AssertionError(f"{name} has no reason to be replaced")
