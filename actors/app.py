"""Builds the system from a config and runs it: the only place where all parts meet."""

from functools import partial
from pathlib import Path

from actors.cluster import connect
from actors.launch import Launcher, Parts
from actors.node_needs import run_checks
from actors.session import export_policy, run_session, stop_on_sigterm
from actors.turns import in_turn
from actors.weights.transport import build_plane
from rlhf.config import RunConfig
from rlhf.data.prompts import PromptOrder
from rlhf.evaluation.loop import Evaluator
from rlhf.evaluation.summary import show_summary
from rlhf.inputs import Inputs, check_memory, read_inputs
from rlhf.monitor.group import MonitorGroup
from rlhf.planning import make_plan
from rlhf.ports import Generators, SecondStream
from rlhf.rounds.anchor import AnchorStream
from rlhf.rounds.buffer import ReplayBuffer
from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.controller import System, run_rounds
from rlhf.rounds.in_turn import InTurnGenerators, take_turns
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.online import OnlineSource
from rlhf.rounds.streams import with_streams

PROBES = 2
PROBE_TOKENS = 64
"""Length of a probe: long enough to pass every layer and the head many times, short enough to cost milliseconds."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest relative log-prob difference of a probe (`actors.weights.probe`): several times what rounding gives."""


def train(config: RunConfig, fresh: bool = False) -> None:
    """Run to the end, or resume a run directory that is not finished; see `run_session` for errors."""
    inputs = read_inputs(config)

    async def main(run_dir: Path, monitor: MonitorGroup) -> None:
        await _train(config, inputs, run_dir, monitor)

    run_session(config, fresh, config.rounds.count, inputs.notes(), main)


async def _train(config: RunConfig, inputs: Inputs, run_dir: Path, monitor: MonitorGroup) -> None:
    ledger = Ledger(run_dir)
    if ledger.state(config.rounds.count) == RoundState.PUBLISHED and (run_dir / "policy").exists():
        monitor.alert(f"{run_dir}: all {config.rounds.count} rounds are done; --fresh starts over")
        return
    # A version on its way and the one before; with sparse updates the nodes' copies of both and the patches too.
    store = (6 if config.sync.sparse else 4) * inputs.model_bytes + (256 << 20)
    with connect(config.name, config.cluster, store, run_dir) as cluster, stop_on_sigterm():
        if cluster.private and cluster.device == "cpu":
            check_memory(make_plan(config).total)
        checks = run_checks(config, cluster, inputs.model, run_dir, monitor.alert)
        if not cluster.private:
            await checks.check_nodes()
        launcher = Launcher(config, cluster, str(inputs.model.resolve()), inputs.shapes)
        probes = [prompt.token_ids[:PROBE_TOKENS] for prompt in inputs.prompts.prompts[:PROBES]]
        parts = await launcher.start(probes, monitor, run_dir)
        system = _assemble(config, run_dir, monitor, ledger, parts, launcher, inputs)
        if launcher.turns:
            system = take_turns(system, launcher.turns)
        async with launcher.elastic(parts.fleet, checks.check_node, monitor):
            await run_rounds(system, config, partial(export_policy, parts.learner, run_dir, monitor))
    if system.evaluator:
        show_summary(run_dir, monitor)


def _assemble(
    config: RunConfig,
    run_dir: Path,
    monitor: MonitorGroup,
    ledger: Ledger,
    parts: Parts,
    launcher: Launcher,
    inputs: Inputs,
) -> System:
    generators: Generators = InTurnGenerators(parts.fleet, launcher.turns) if launcher.turns else parts.fleet
    plane = build_plane(
        launcher.transport,
        config,
        parts.fleet,
        parts.learner,
        inputs.shapes,
        config.sync.probe_tolerance or TOLERANCE[config.policy.dtype],
        monitor.alert,
    )
    if launcher.turns and parts.fleet.catch_up:
        parts.fleet.catch_up = in_turn(parts.fleet.catch_up, launcher.turns)
    order = PromptOrder(inputs.prompts.prompts, config.seed)
    evaluator = None
    if inputs.held_out.prompts and config.evaluation.every:
        evaluator = Evaluator(
            config,
            inputs.held_out.prompts,
            generators,
            parts.eval_judge,
            monitor,
            run_dir,
            training_judge=parts.judge if config.eval_judge else None,
        )
    source = OnlineSource(config, order, generators, parts.judge, ledger, monitor, parts.fleet.metrics)
    others: dict[str, SecondStream] = {}
    if config.buffer:
        others["replay"] = ReplayBuffer(config.buffer, ledger, config.seed)
    if config.anchor and inputs.anchor:
        others["anchor"] = AnchorStream(config.anchor, inputs.anchor.between, ledger)
    return System(
        source=with_streams(source, others),
        learner=parts.learner,
        plane=plane,
        fleet=parts.fleet,
        ledger=ledger,
        checkpoints=CheckpointStore(run_dir, config.checkpoint.keep),
        evaluator=evaluator,
        monitor=monitor,
    )
