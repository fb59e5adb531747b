"""Training on a preference set: the loop of a run without generators and judge."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from actors.cluster import connect
from actors.learner import LearnerGroup
from actors.learner_launch import start_learner
from actors.node_needs import training_checks
from actors.session import export_policy, run_session, stop_on_sigterm
from rlhf.config.offline import OfflineConfig, OfflineTraining
from rlhf.config.system import Rounds
from rlhf.data.anchor import read_anchor
from rlhf.data.chat import load_tokenizer
from rlhf.data.preference_pairs import PreferencePairs, encode_pair
from rlhf.data.training_sets import read_training_set
from rlhf.evaluation.preference import ROWS, PreferenceEvaluator
from rlhf.evaluation.summary import Rows, show_summary
from rlhf.health import RestartBudget
from rlhf.modelfiles import local_folder, tensor_shapes
from rlhf.monitor.group import MonitorGroup
from rlhf.planning import OFFLINE_STORE, measure_examples
from rlhf.ports import RoundEvaluator, SecondStream
from rlhf.records import Pair
from rlhf.rounds.anchor import AnchorStream
from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.controller import System, run_rounds
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.offline import NoFleet, OfflineJob, OfflineSource
from rlhf.rounds.segments import Segments
from rlhf.rounds.streams import with_streams


@dataclass(frozen=True)
class OfflineWork:
    """What one kind of offline training brings: its data by segment, how they are grouped, and what measures it."""

    model: Path
    data: str
    segments: Segments
    segment: Callable[[int], tuple[list[Pair], int]]
    group: int
    evaluator: Callable[[LearnerGroup, MonitorGroup, Path], RoundEvaluator | None]
    table: Rows
    notes: tuple[str, ...]
    others: Callable[[Ledger], Mapping[str, SecondStream]] = lambda ledger: {}
    """Second streams by name."""


def train_preferences(config: OfflineConfig, fresh: bool = False) -> None:
    """Offline DPO or supervised fine-tuning to the end, or resume; the model is RUN_DIR/policy."""
    model = local_folder(config.policy.path, "policy.path")
    tensor_shapes(model, "policy.path")
    tokenizer = load_tokenizer(str(model), trust_remote_code=config.policy.trust_remote_code, key="policy.path")
    data = read_training_set(config.preferences, "preferences")
    segments = cut(config, len(data.train), config.learner.batch_size)
    held_out = [encode_pair(example, tokenizer, example.uid, 0) for example in data.held_out]
    options, anchor, named = config.anchor, None, f"preferences.path = {config.preferences.path!r}"
    long = measure_examples(config.learner, data.train, tokenizer).check(config.learner, named, "pairs to train on")
    notes = (*data.notes, *long)
    if options:
        unseen = [example.messages for example in data.held_out]
        anchor, more = read_anchor(options, tokenizer, config.seed, unseen)
        notes += more

    def others(ledger: Ledger) -> dict[str, SecondStream]:
        return {"anchor": AnchorStream(options, anchor.between, ledger)} if options and anchor else {}

    def evaluator(learner: LearnerGroup, monitor: MonitorGroup, folder: Path) -> RoundEvaluator:
        found = PreferenceEvaluator(held_out, config.learner.max_length, learner, monitor, folder)
        if found.left_out:
            monitor.alert(
                f"{found.left_out} of {len(held_out)} held-out pairs are longer than learner.max_length = "
                f"{config.learner.max_length} tokens and left out"
            )
        return found

    work = OfflineWork(
        model=model,
        data=named,
        segments=segments,
        segment=PreferencePairs(data.train, tokenizer, segments).segment,
        group=1,
        evaluator=evaluator,
        table=ROWS,
        notes=notes,
        others=others,
    )
    run_offline(config, work, fresh)


def cut(config: OfflineTraining, examples: int, per_step: int) -> Segments:
    """Segments of `checkpoint_steps` steps of `per_step` examples each."""
    return Segments(examples, config.epochs, config.checkpoint_steps * per_step, config.seed)


def run_offline(config: OfflineTraining, work: OfflineWork, fresh: bool) -> None:
    """Train to the end, or resume a run directory that is not finished; see `run_session` for errors."""

    async def main(run_dir: Path, monitor: MonitorGroup) -> None:
        await _train(config, work, run_dir, monitor)

    run_session(config, fresh, work.segments.count, work.notes, main)


async def _train(config: OfflineTraining, work: OfflineWork, run_dir: Path, monitor: MonitorGroup) -> None:
    ledger, rounds = Ledger(run_dir), Rounds(count=work.segments.count)
    if ledger.state(rounds.count) == RoundState.PUBLISHED and (run_dir / "policy").exists():
        monitor.alert(f"{run_dir}: the training is done; --fresh starts over")
        return
    policy = config.policy.model_copy(update={"path": str(work.model.resolve())})
    job = OfflineJob(policy, config.warmed_up(work.segments.length), config.seed, rounds, config.checkpoint)
    deadlines, restarts = config.cluster.deadlines, config.cluster.restarts
    budget = RestartBudget(restarts.budget, restarts.window_s)
    with connect(config.name, config.cluster, OFFLINE_STORE, run_dir) as cluster, stop_on_sigterm():
        if not cluster.private:
            await training_checks(config, cluster, work.model, run_dir, monitor.alert).check_nodes()
        with monitor.progress("load models", config.learner.world_size) as bar:
            learner = await start_learner(
                job, cluster, deadlines, budget, monitor, bar.advance,
                placement=config.cluster.placement.learner, grows=config.cluster.grows,
            )  # fmt: skip
        nobody = NoFleet()
        system = System(
            source=with_streams(
                OfflineSource(work.segment, ledger, work.data, work.group, monitor.alert, work.segments.span),
                work.others(ledger),
            ),
            learner=learner,
            plane=nobody,
            fleet=nobody,
            ledger=ledger,
            checkpoints=CheckpointStore(run_dir, config.checkpoint.keep),
            evaluator=work.evaluator(learner, monitor, run_dir / "evaluation"),
            monitor=monitor,
        )
        await run_rounds(system, job, partial(export_policy, learner, run_dir, monitor))
    show_summary(run_dir, monitor, work.table, "held-out pairs")
