"""Peak memory of a learner's process against the estimate of `rlhf validate`, one fresh process a case.

    python bench/memory.py [MODEL] [CASE ...]

MODEL is a folder, models/smollm2-135m-instruct by default. A case takes two rounds of one step on random pairs of the
longest lengths and exports the weights; without Ray, whose part in an actor is about 0.1 GB.
"""

import os
import random
import resource
import socket
import subprocess
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from rlhf.config import RunConfig
from rlhf.config.load import validate

MODEL = "models/smollm2-135m-instruct"
SHORT, LONG = {"prompts": 128, "responses": 32}, {"prompts": 320, "responses": 64}
CASES: dict[str, dict[str, Any]] = {
    "short pairs": {**SHORT},
    "long pairs": {**LONG},
    "accumulated": {**LONG, "batch_size": 8, "micro_batch_size": 2},
    "float32": {**SHORT, "dtype": "float32"},
    "ZeRO 1": {**SHORT, "zero_stage": 1},
    "ZeRO 3": {**SHORT, "zero_stage": 3},
    "LoRA": {**LONG, "lora": {"rank": 16}},
    "subset": {**SHORT, "trainable": {"include": ["*.mlp.*"]}},
    "ema": {**SHORT, "reference": {"policy": "ema"}},
    "no reference": {**SHORT, "loss": {"type": "sft"}},
    "recomputed": {**LONG, "activation_checkpointing": True},
    "offloaded": {**SHORT, "offload": {"optimizer": True}},
}


def main() -> None:
    """Measure each case in a process of its own and print both figures."""
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3])
        return
    model = sys.argv[1] if len(sys.argv) > 1 else MODEL
    print(f"{'case':14s} {'measured':>9s} {'estimate':>9s}  ratio")
    for name in sys.argv[2:] or CASES:
        done = subprocess.run(
            [sys.executable, __file__, "--one", model, name], check=True, stdout=subprocess.PIPE, text=True
        )
        measured = float(done.stdout.split()[-1])
        estimate = estimated(config_of(model, name))
        print(f"{name:14s} {measured:6.2f} GB {estimate:6.2f} GB  {estimate / measured:5.2f}", flush=True)


def config_of(model: str, name: str) -> RunConfig:
    """The config of a case."""
    case = dict(CASES[name])
    prompts, responses = case.pop("prompts"), case.pop("responses")
    policy = {"path": model, "dtype": case.pop("dtype", "bfloat16")}
    document = {
        "name": "memory",
        "policy": policy,
        "prompts": {"path": "unused", "max_tokens": prompts},
        "generator": {"sampling": {"max_tokens": responses}},
        "rounds": {"count": 2},
        "learner": {"batch_size": 4, "micro_batch_size": 4, **case},
        "cluster": {"device": "cpu"},
    }
    return validate(document, name)


def estimated(config: RunConfig) -> float:
    """What `rlhf validate` shows for the learner, in GB."""
    from rlhf.planning import make_plan

    return next(role.total for role in make_plan(config).roles if role.name == "learner") / 1e9


def one(model: str, name: str) -> None:
    """Train the case here and print this process's peak resident size in GB."""
    from rlhf.learning.rank import RankLearner
    from rlhf.records import Pair, SealedRound

    config, draw = config_of(model, name), random.Random(0)
    learner = RankLearner(config, 0, 1, "cpu")
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    learner.start("127.0.0.1", port, 60.0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 1000) for _ in range(count))

    prompt, response = config.prompts.max_tokens, config.generator.sampling.max_tokens
    for number in range(1, config.rounds.count + 1):
        pairs = tuple(
            Pair(f"{i}", number, ids(prompt), ids(response), ids(response), "", "", "", 1.0, number - 1, number - 1)
            for i in range(config.learner.batch_size)
        )
        learner.train(SealedRound(number, pairs, ""))
        kept = dict(learner.export_tensors())
    print(f"{len(kept)} tensors, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}")


if __name__ == "__main__":
    main()
