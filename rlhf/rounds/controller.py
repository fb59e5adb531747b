"""The driver loop: sample, judge, seal; train, publish, save. Synchronous rounds are `lookahead: 0`, not another loop.

Two coroutines share a queue. The first turns planned prompts into sealed pairs; the second trains them and publishes
the new weights. A permit is spent on each round that is sampled and comes back when a round is published, so sampling
runs at most `lookahead` rounds ahead of training.

A learner that is lost is started again, and the loop goes on as it does in a process that was started again: from the
newest whole checkpoint, with what has been sealed since. What was being sampled is sampled again, beside the training
that is repeated.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from rlhf.config.learner import Learner as LearnerConfig
from rlhf.config.system import Checkpoint, Rounds
from rlhf.errors import RLHFError
from rlhf.ports import Fleet, Learner, Monitor, PairSource, RoundEvaluator, WeightPlane
from rlhf.records import SealedRound, SyncReport
from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.garbage import collect, seldom_collected
from rlhf.rounds.ledger import Ledger
from rlhf.rounds.metrics import RoundClock, round_metrics
from rlhf.rounds.saving import Saver, commit_trained
from rlhf.rounds.turns import Turns

Streams = Mapping[str, SealedRound]
"""A round's pairs by stream, its own first."""


class LoopConfig(Protocol):
    """What the loop reads of a config."""

    @property
    def rounds(self) -> Rounds:
        """Their number and the lookahead."""
        ...

    @property
    def checkpoint(self) -> Checkpoint:
        """How often one is written."""
        ...

    @property
    def learner(self) -> LearnerConfig:
        """Its epochs, for the progress bar."""
        ...


@dataclass(frozen=True)
class System:
    """The parts of a run, behind their ports."""

    source: PairSource
    learner: Learner
    plane: WeightPlane
    fleet: Fleet
    ledger: Ledger
    checkpoints: CheckpointStore
    evaluator: RoundEvaluator | None
    monitor: Monitor
    turns: Turns | None = None
    """Who may use the devices, where they are shared."""


async def run_rounds(system: System, config: LoopConfig, finish: Callable[[], Awaitable[None]] | None = None) -> None:
    """Run every round that is not done yet, then `finish`; once more for each time that the learner is lost in it."""
    with seldom_collected():
        await _until_done(system, config, finish)


async def _until_done(system: System, config: LoopConfig, finish: Callable[[], Awaitable[None]] | None) -> None:
    task = asyncio.current_task()
    assert task is not None
    while True:
        try:
            # In a task of its own: a group of tasks that fails leaves the mark of a stop on the one it is in.
            await asyncio.create_task(go_on(system, config))
            if finish:
                await finish()
            return
        except (RLHFError, ExceptionGroup) as error:
            if task.cancelling():
                # The run is being stopped, which such a group forgets.
                raise asyncio.CancelledError from error
            if not (expected(error) and await system.learner.restart()):
                raise


def expected(error: Exception) -> bool:
    """Could a lost learner be behind it? Whatever fails may: generators, for one, cannot fetch weights any more."""
    return isinstance(error, RLHFError) or (isinstance(error, ExceptionGroup) and error.split(RLHFError)[1] is None)


async def go_on(system: System, config: LoopConfig) -> None:
    """Run the rounds that are left from the newest whole checkpoint on."""
    done = await resume(system)
    await publish(system, done)
    settle(system, done)
    if system.evaluator:
        await system.evaluator.catch_up(done, last=done == config.rounds.count)
    queue: asyncio.Queue[Streams] = asyncio.Queue(maxsize=1)
    permits = asyncio.Semaphore(1 + config.rounds.lookahead)
    rounds = range(done + 1, config.rounds.count + 1)
    saver = Saver(system.learner, system.checkpoints, system.ledger, config.checkpoint.every)
    async with saver, asyncio.TaskGroup() as tasks:
        tasks.create_task(sample_rounds(system, rounds, queue, permits))
        tasks.create_task(train_rounds(system, config, rounds, queue, permits, saver))


async def sample_rounds(
    system: System, rounds: range, queue: "asyncio.Queue[Streams]", permits: asyncio.Semaphore
) -> None:
    """Turn planned prompts into sealed pairs, a permit a round."""
    for round in rounds:
        await permits.acquire()
        await queue.put(await system.source.streams(round))


async def train_rounds(
    system: System,
    config: LoopConfig,
    rounds: range,
    queue: "asyncio.Queue[Streams]",
    permits: asyncio.Semaphore,
    saver: Saver,
) -> None:
    """Train each sealed round, publish the new version, save it while the next round is sampled."""
    for round in rounds:
        clock = RoundClock()
        streams = await queue.get()
        own, *others = streams
        sealed = streams[own]
        clock.lap("idle")
        with system.monitor.progress("learn", len(sealed.pairs) * config.learner.epochs) as bar:
            async for report in system.learner.train(sealed, {name: streams[name] for name in others}):
                system.monitor.log("step", round, report.metrics, step=report.step)
                bar.advance(int(report.metrics["train/pairs"]))
        statistics = await system.learner.statistics()
        clock.lap("learn")
        synced = await publish(system, round)
        clock.lap("sync")
        checkpoint_s = await saver.wait()
        metrics, warnings = round_metrics(system.source, statistics, sealed, synced, clock, checkpoint_s)
        metrics |= system.turns.metrics() if system.turns else {}
        # Before the checkpoint: a kill in between trains, and logs, the round again.
        system.monitor.log("round", round, metrics)
        for warning in warnings:
            system.monitor.alert(warning)
        last = round == config.rounds.count
        await saver.save(round, last=last)
        if system.evaluator and system.evaluator.due(round, last):
            await system.evaluator.evaluate(round)
        collect(round)
        permits.release()


async def publish(system: System, version: int) -> SyncReport:
    """Bring the learner's weights to every generator as `version` and admit those that proved it."""
    started = time.monotonic()
    if not system.fleet.members():  # an offline run has none
        return SyncReport(version, 0.0, 0, (), {}, 0.0)
    manifest = await system.learner.manifest(version)
    report = await system.plane.publish(manifest, system.fleet.members())
    for member in report.served:
        # Their answers to the update have said what they proved: nobody has to be asked.
        await system.fleet.admit(member, version)
    for member, reason in report.failed.items():
        await system.fleet.suspend(member)
        system.monitor.alert(f"{member} does not serve version {version}: {reason}")
    return report.timed(time.monotonic() - started)


def settle(system: System, done: int) -> None:
    """Catch up with a process that was killed between putting a checkpoint in place and saying so in the ledger."""
    for round in range(1, done + 1):
        commit_trained(system.ledger, round, system.checkpoints.path(done).name)


async def resume(system: System) -> int:
    """Load the newest whole checkpoint; returns the rounds it covers. Sealed rounds after it are trained again."""
    done = system.checkpoints.newest(system.monitor.alert)
    system.monitor.rewind(done)
    if done:
        with system.monitor.progress("load checkpoint", None):
            await system.learner.load(system.checkpoints.path(done))
    return done
