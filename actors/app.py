"""Builds the system from a config and runs it: the only place where all parts meet."""

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.cluster import connect
from actors.launch import Launcher, Parts
from actors.weights.transport import build_plane
from rlhf.config import RunConfig
from rlhf.data.prompts import PromptOrder
from rlhf.errors import RLHFError
from rlhf.evaluation.loop import Evaluator
from rlhf.evaluation.summary import show_summary
from rlhf.files import rename_durable
from rlhf.inputs import Inputs, check_memory, read_inputs
from rlhf.monitor.group import MonitorGroup, build_monitor
from rlhf.monitor.report import write_report
from rlhf.planning import make_plan
from rlhf.ports import Learner
from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.controller import System, run_rounds
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.online import OnlineSource
from rlhf.rounds.run_directory import open_run_directory

PROBES = 2
PROBE_TOKENS = 64
"""Length of a probe: long enough to pass every layer and the head many times, short enough to cost milliseconds."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest relative log-prob difference of a probe (`actors.weights.probe`): several times what rounding gives."""


class Stopped(RLHFError):
    """The run was stopped by SIGTERM after a clean save."""

    exit_code = 143


def train(config: RunConfig, fresh: bool = False) -> None:
    """Run to the end, or resume a run directory that is not finished.

    Raises `RLHFError` (its `exit_code` is the command's), `KeyboardInterrupt` on SIGINT; both after a clean save.
    """
    inputs = read_inputs(config)
    with open_run_directory(config, fresh) as run_dir:
        monitor = build_monitor(config, run_dir)
        code = 1
        try:
            for note in inputs.notes():
                monitor.alert(note)
            with _one_error():
                asyncio.run(_train(config, inputs, run_dir, monitor))
            code = 0
        finally:
            monitor.close(code)
        print(f"report: {write_report(run_dir)}")


async def _train(config: RunConfig, inputs: Inputs, run_dir: Path, monitor: MonitorGroup) -> None:
    ledger = Ledger(run_dir)
    if ledger.state(config.rounds.count) == RoundState.PUBLISHED and (run_dir / "policy").exists():
        monitor.alert(f"{run_dir}: all {config.rounds.count} rounds are done; --fresh starts over")
        return
    store = 4 * inputs.model_bytes + (256 << 20)
    with connect(config.name, config.cluster, store, run_dir) as cluster, _stop_on_sigterm():
        if cluster.private and cluster.device == "cpu":
            check_memory(make_plan(config).total)
        launcher = Launcher(config, cluster, str(inputs.model.resolve()), inputs.shapes)
        probes = [prompt.token_ids[:PROBE_TOKENS] for prompt in inputs.prompts.prompts[:PROBES]]
        parts = await launcher.start(probes, monitor, run_dir)
        system = _assemble(config, run_dir, monitor, ledger, parts, launcher.transport, inputs)
        await run_rounds(system, config)
        await _export(parts.learner, run_dir, monitor)
    if system.evaluator:
        show_summary(run_dir, monitor)


def _assemble(
    config: RunConfig,
    run_dir: Path,
    monitor: MonitorGroup,
    ledger: Ledger,
    parts: Parts,
    transport: str,
    inputs: Inputs,
) -> System:
    tolerance = config.sync.probe_tolerance or TOLERANCE[config.policy.dtype]
    order = PromptOrder(inputs.prompts.prompts, config.seed)
    evaluator = None
    if inputs.held_out.prompts and config.evaluation.every:
        evaluator = Evaluator(config, inputs.held_out.prompts, parts.fleet, parts.eval_judge, monitor, run_dir)
    return System(
        source=OnlineSource(config, order, parts.fleet, parts.judge, ledger, monitor),
        learner=parts.learner,
        plane=build_plane(transport, config, parts.fleet, parts.learner, inputs.shapes, tolerance),
        fleet=parts.fleet,
        ledger=ledger,
        checkpoints=CheckpointStore(run_dir, config.checkpoint.keep),
        evaluator=evaluator,
        monitor=monitor,
    )


async def _export(learner: Learner, run_dir: Path, monitor: MonitorGroup) -> None:
    """The final policy as a Hugging Face checkpoint, whole or not at all."""
    staging = run_dir / "policy.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    with monitor.progress("save policy", None):
        await learner.export(staging)
    shutil.rmtree(run_dir / "policy", ignore_errors=True)
    rename_durable(staging, run_dir / "policy")


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM cancels the run, which ends after the save under way; a second one ends the process at once."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if stopped:
            os._exit(Stopped.exit_code)
        stopped = True
        assert task is not None
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        yield
    except asyncio.CancelledError:
        if not stopped:
            raise
        raise Stopped("stopped by SIGTERM; the same command goes on from the last saved round") from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@contextmanager
def _one_error() -> Iterator[None]:
    """Tasks fail in groups; a user gets the one error that is ours, anything else with its traceback."""
    try:
        yield
    except BaseExceptionGroup as group:
        ours = group.subgroup(RLHFError)
        if ours is None:
            raise
        error: BaseException = ours
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from group
