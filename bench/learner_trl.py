"""Pairs a second of the learner against TRL's DPOTrainer: the same model, pairs, batch and precision, in one process.

    python bench/learner_trl.py [PAIRS] [--steps 3] [--batch 16] [--micro 4] [--max-length 512]

PAIRS is any preference set; by default hh-rlhf's harmless-base-a.jsonl.gz in ../shared/data where it is there, else
runs/judge-pairs/train.jsonl (bench/judge_pairs.py makes it). Both take `--steps` optimizer steps of sigmoid DPO (beta
0.1, AdamW, bfloat16 weights) on the same pairs in the same order, with the reference policy included. The ratios are of
the seconds of all steps; the medians leave out each one's first step, which warms up. The learner runs twice,
prefix-shared and padded.
"""

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from rlhf.config.data import Policy
from rlhf.config.learner import Learner
from rlhf.config.system import Checkpoint, Rounds
from rlhf.data.chat import load_tokenizer
from rlhf.data.preference_pairs import encode_pair
from rlhf.data.preferences import PreferenceExample, load_preferences
from rlhf.learning.rank import RankLearner
from rlhf.records import SealedRound
from rlhf.rounds.offline import OfflineJob

MODEL = "models/smollm2-135m-instruct"
HH_RLHF = Path("../shared/data/hh-rlhf/harmless-base-a.jsonl.gz")
SAMPLED = Path("runs/judge-pairs/train.jsonl")


def ours(examples: list[PreferenceExample], options: argparse.Namespace, shared: bool) -> list[float]:
    """Seconds of each step: reference, forward, backward, update."""
    tokenizer = load_tokenizer(MODEL)
    learner = Learner(
        batch_size=options.batch,
        micro_batch_size=options.micro,
        max_length=options.max_length,
        prefix_sharing=shared,
    )
    job = OfflineJob(Policy(path=MODEL), learner, 0, Rounds(count=options.steps), Checkpoint())
    rank = RankLearner(job, 0, 1, "cpu")
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    rank.start("127.0.0.1", port, 60.0)
    seconds = []
    for step in range(options.steps):
        part = examples[step * options.batch : (step + 1) * options.batch]
        pairs = tuple(encode_pair(example, tokenizer, example.uid, step + 1) for example in part)
        started = time.perf_counter()
        rank.train(SealedRound(step + 1, pairs, "", ordered=True))
        seconds.append(time.perf_counter() - started)
    return seconds


def theirs(examples: list[PreferenceExample], options: argparse.Namespace) -> list[float]:
    """Seconds of each step of TRL's trainer, which computes the reference beside the policy."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # the learner's; the trainer would take them for a launcher's

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            self.times.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            self.times.append(time.perf_counter())

    rows = [
        {
            "prompt": [dict(message) for message in example.messages],
            "chosen": [{"role": "assistant", "content": example.chosen}],
            "rejected": [{"role": "assistant", "content": example.rejected}],
        }
        for example in examples[: options.steps * options.batch]
    ]
    clock = Clock()
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="rlhf-trl-"),
        per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=options.batch // options.micro,
        max_steps=options.steps,
        max_length=options.max_length,
        train_sampling_strategy="sequential",
        beta=0.1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(MODEL),
        callbacks=[clock],
    )
    trainer.train()
    return [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]


def main() -> None:
    """Print seconds a step, pairs a second and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="?", default=str(HH_RLHF if HH_RLHF.exists() else SAMPLED))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    options = parser.parse_args()
    tokenizer = load_tokenizer(MODEL)

    def fits(example: PreferenceExample) -> bool:
        pair = encode_pair(example, tokenizer, "", 1)
        return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= options.max_length

    examples = [example for example in load_preferences(options.pairs).examples if fits(example)]
    found = {
        "prefix-shared": ours(examples, options, shared=True),
        "TRL": theirs(examples, options),
        "padded": ours(examples, options, shared=False),
    }
    medians = {name: statistics.median(seconds[1:]) for name, seconds in found.items()}
    for name, seconds in found.items():
        rate = options.batch / medians[name]
        print(
            f"{name:14s} {medians[name]:7.2f} s a step  {rate:5.2f} pairs/s  ({', '.join(f'{s:.1f}' for s in seconds)})"
        )
    totals = {name: sum(seconds) for name, seconds in found.items()}
    print("all steps: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in totals.items()))
    for name in ("prefix-shared", "padded"):
        print(f"TRL / {name:13s} {totals['TRL'] / totals[name]:5.2f}  (medians {medians['TRL'] / medians[name]:.2f})")
    ratio = totals["padded"] / totals["prefix-shared"]
    print(f"padded / prefix-shared {ratio:5.2f}  (medians {medians['padded'] / medians['prefix-shared']:.2f})")


if __name__ == "__main__":
    main()
