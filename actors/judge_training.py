"""`rlhf judge train`: a pair-preference judge from preference pairs, by the learners that train policies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.cluster import connect
from actors.learner_launch import start_learner
from actors.session import export_policy, run_session, stop_on_sigterm
from rlhf.config import JudgeTraining
from rlhf.config.system import Rounds
from rlhf.data.chat import load_tokenizer
from rlhf.data.preferences import PreferenceExample, load_preferences
from rlhf.data.prompts import content_hash
from rlhf.errors import InputError
from rlhf.evaluation.judge_accuracy import JudgeAccuracy
from rlhf.judging.pair_prompt import PairPrompt
from rlhf.judging.training import JudgeRows
from rlhf.modelfiles import local_folder, tensor_shapes
from rlhf.monitor.group import MonitorGroup
from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.controller import System, run_rounds
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.offline import NoFleet, OfflineJob, OfflineSource

if TYPE_CHECKING:
    from rlhf.config.judging import PreferenceData

OBJECT_STORE = 512 << 20


@dataclass(frozen=True)
class TrainingInputs:
    """What is read before anything is written: the model, its prompt format, the rows and the held-out examples."""

    model: Path
    prompt: PairPrompt
    rows: JudgeRows
    held_out: tuple[PreferenceExample, ...]
    notes: tuple[str, ...]


def train_judge(config: JudgeTraining, fresh: bool = False) -> None:
    """Train to the end, or resume; the judge is RUN_DIR/policy, a Hugging Face folder for `judge.path`."""
    inputs = read_training_inputs(config)

    async def main(run_dir: Path, monitor: MonitorGroup) -> None:
        await _train(config, inputs, run_dir, monitor)

    run_session(config, fresh, inputs.rows.segments, inputs.notes, main)


def read_training_inputs(config: JudgeTraining) -> TrainingInputs:
    """Read model headers, tokenizer and pairs; raises `InputError` naming the key of what is missing or unusable."""
    model = local_folder(config.policy.path, "policy.path")
    tensor_shapes(model, "policy.path")
    tokenizer = load_tokenizer(str(model), trust_remote_code=config.policy.trust_remote_code, key="policy.path")
    # One token of the row is the answer.
    prompt = PairPrompt(tokenizer, config.learner.max_length - 1)
    notes: list[str] = []
    examples = _load(config.data, "data", notes)
    if config.data.held_out is not None:
        held_out, known = _load(config.data.held_out, "data.held_out", notes), examples
    else:
        split = max(0, len(examples) - config.data.held_out_count)
        held_out, known = examples[split:], examples[:split]
    train = without_conversations(known, held_out)
    if len(train) < len(known):
        notes.append(f"data: {len(known) - len(train)} pairs left out: their conversations are held out")
    if not train:
        raise InputError(
            f"data.path = {config.data.path!r}: of {len(examples)} usable pairs none is left to train on; hold out "
            f"fewer (data.held_out_count = {config.data.held_out_count}) or others"
        )
    rows = JudgeRows(
        train,
        prompt,
        both_orders=config.orders == "both",
        seed=config.seed,
        epochs=config.epochs,
        batch_size=config.learner.batch_size,
        steps=config.checkpoint_steps,
    )
    return TrainingInputs(model, prompt, rows, held_out, tuple(notes))


def without_conversations(
    examples: Sequence[PreferenceExample], held_out: Sequence[PreferenceExample]
) -> tuple[PreferenceExample, ...]:
    """The examples whose conversation none of `held_out` has: other responses to it would give its answers away."""
    taken = {content_hash(example.messages) for example in held_out}
    return tuple(example for example in examples if content_hash(example.messages) not in taken)


def _load(data: "PreferenceData", key: str, notes: list[str]) -> tuple[PreferenceExample, ...]:
    found = load_preferences(data.path, split=data.split, name=data.name, format=data.format, key=key)
    dropped = [f"{count} {reason.replace('_', ' ')}" for reason, count in found.dropped.items() if count]
    if dropped:
        notes.append(f"{key}: rows left out: {', '.join(dropped)}")
    return found.examples[: data.limit]


async def _train(config: JudgeTraining, inputs: TrainingInputs, run_dir: Path, monitor: MonitorGroup) -> None:
    ledger, rounds = Ledger(run_dir), Rounds(count=inputs.rows.segments)
    if ledger.state(rounds.count) == RoundState.PUBLISHED and (run_dir / "policy").exists():
        monitor.alert(f"{run_dir}: the training is done; --fresh starts over")
        return
    job = OfflineJob(
        config.policy.model_copy(update={"path": str(inputs.model.resolve())}),
        config.warmed_up(rounds.count),
        config.seed,
        rounds,
        config.checkpoint,
    )
    with connect(config.name, config.cluster, OBJECT_STORE, run_dir) as cluster, stop_on_sigterm():
        with monitor.progress("load models", config.learner.world_size) as bar:
            learner = await start_learner(job, cluster, config.cluster.deadlines, monitor, bar.advance)
        nobody = NoFleet()
        evaluator = JudgeAccuracy(inputs.held_out, inputs.prompt, learner, monitor, run_dir / "evaluation")
        if evaluator.left_out:
            monitor.alert(f"{evaluator.left_out} held-out pairs cannot be judged: too long, or with control tokens")
        system = System(
            source=OfflineSource(
                inputs.rows.segment, ledger, f"data.path = {config.data.path!r}", 2 if config.orders == "both" else 1
            ),
            learner=learner,
            plane=nobody,
            fleet=nobody,
            ledger=ledger,
            checkpoints=CheckpointStore(run_dir, config.checkpoint.keep),
            evaluator=evaluator,
            monitor=monitor,
        )
        await run_rounds(system, job)
        await export_policy(learner, run_dir, monitor)
