"""`rlhf judge train`: a pair-preference judge from preference pairs, by the learners that train policies."""

from pathlib import Path

from actors.learner import LearnerGroup
from actors.offline import OfflineWork, cut, run_offline
from rlhf.config import JudgeTraining
from rlhf.data.chat import load_tokenizer
from rlhf.data.training_sets import read_training_set
from rlhf.evaluation.judge_accuracy import ROWS, JudgeAccuracy
from rlhf.judging.pair_prompt import PairPrompt
from rlhf.judging.training import JudgeRows
from rlhf.modelfiles import local_folder, tensor_shapes
from rlhf.monitor.group import MonitorGroup
from rlhf.ports import RoundEvaluator


def train_judge(config: JudgeTraining, fresh: bool = False) -> None:
    """Train to the end, or resume; the judge is RUN_DIR/policy, a Hugging Face folder for `judge.path`.

    Raises `InputError`, before anything is written, naming the key of what is missing or unusable.
    """
    model = local_folder(config.policy.path, "policy.path")
    tensor_shapes(model, "policy.path")
    tokenizer = load_tokenizer(str(model), trust_remote_code=config.policy.trust_remote_code, key="policy.path")
    # One token of the row is the answer.
    prompt = PairPrompt(tokenizer, config.learner.max_length - 1)
    data, both = read_training_set(config.data, "data"), config.orders == "both"
    segments = cut(config, len(data.train), config.learner.batch_size // 2 if both else config.learner.batch_size)

    def evaluator(learner: LearnerGroup, monitor: MonitorGroup, folder: Path) -> RoundEvaluator:
        found = JudgeAccuracy(data.held_out, prompt, learner, monitor, folder)
        if found.left_out:
            monitor.alert(f"{found.left_out} held-out pairs cannot be judged: too long, or with control tokens")
        return found

    work = OfflineWork(
        model=model,
        data=f"data.path = {config.data.path!r}",
        segments=segments,
        segment=JudgeRows(data.train, prompt, segments, both_orders=both).segment,
        group=2 if both else 1,
        evaluator=evaluator,
        table=ROWS,
        notes=data.notes,
    )
    run_offline(config, work, fresh)
