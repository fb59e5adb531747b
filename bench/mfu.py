"""Model FLOPs utilisation of preference steps on a random model: what a GPU makes of the learner.

    python bench/mfu.py [--size 1b|tiny] [--length 1024] [--pairs 16] [--steps 4] [--dtype bfloat16] [KEY=VALUE ...]

Each pair has two responses of `--length` / 4 tokens behind a prompt of half of `--length`, so that a prefix-shared row
is of `--length` tokens. The weights are random, of a Llama with the shapes of the 1B class: no model is fetched.
KEY=VALUE are options of `learner`, such as `compile=true`, `pack_tokens=8192`, `attention=flex` or
`activation_checkpointing=true`. One rank, the reference included; the first round warms up and does not count.
"""

import argparse
import json
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import yaml

from rlhf.config.data import Policy
from rlhf.config.learner import Learner
from rlhf.config.load import validate
from rlhf.config.system import Checkpoint, Rounds
from rlhf.records import Pair, SealedRound

SIZES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Llama shapes by name: `1b` has 1.24e9 numbers."""


def save_model(folder: Path, size: str, length: int, dtype: str) -> int:
    """Write a random model of `size` for rows of `length` tokens into `folder`; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES[size], max_position_embeddings=length)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def sealed(number: int, count: int, length: int, vocabulary: int) -> SealedRound:
    """A round of `count` pairs of random tokens, `length` tokens each with the prompt counted once."""
    draw = random.Random(number)

    def ids(tokens: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(tokens))

    def pair(index: int) -> Pair:
        prompt, chosen, rejected = (ids(tokens) for tokens in (length - 2 * (length // 4), length // 4, length // 4))
        return Pair(f"{index}", number, prompt, chosen, rejected, "", "", "", 1.0, number - 1, number - 1)

    return SealedRound(number, tuple(map(pair, range(count))), "")


def measure(size: str, length: int, pairs: int, steps: int, dtype: str, options: dict[str, Any]) -> dict[str, float]:
    """Train `steps` steps of `pairs` pairs: `mfu` (0 to 1), `tokens_per_s`, `pairs_per_s`, `peak_memory_gb`, `loss`.

    `options` are those of `learner`; raises `InputError` for one that it does not have.
    """
    import torch

    from rlhf.learning.rank import RankLearner
    from rlhf.rounds.offline import OfflineJob

    device = "cuda" if torch.cuda.is_available() else "cpu"
    learner = validate({"batch_size": pairs, "max_length": length, **options}, "bench/mfu.py", Learner)
    with tempfile.TemporaryDirectory(prefix="rlhf-mfu-") as folder:
        save_model(Path(folder), size, length, dtype)
        job = OfflineJob(Policy(path=folder, dtype=dtype), learner, 0, Rounds(count=2), Checkpoint())
        rank = RankLearner(job, 0, 1, device)
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        rank.start("127.0.0.1", port, 60.0)
    for note in rank.notes:
        print(f"note: {note}")
    vocabulary = SIZES[size]["vocab_size"]
    rank.train(sealed(1, pairs, length, vocabulary))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    reports = rank.train(sealed(2, steps * pairs, length, vocabulary))
    found = rank.statistics()
    seconds = found["timing_s/reference"] + found["timing_s/learn"]
    return {
        "mfu": found["perf/mfu"],
        "tokens_per_s": found["perf/learner_tokens_per_s"],
        "pairs_per_s": steps * pairs / seconds,
        "peak_memory_gb": found["perf/peak_memory_gb"],
        "loss": reports[-1].metrics["train/loss"],
    }


def main() -> None:
    """Print the figures as one line and as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    given = parser.parse_args()
    options = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in given.options)}
    found = measure(given.size, given.length, given.pairs, given.steps, given.dtype, options)
    print(
        f"{found['mfu']:.1%} MFU, {found['tokens_per_s']:,.0f} tokens/s, {found['pairs_per_s']:.2f} pairs/s, "
        f"peak {found['peak_memory_gb']:.2f} GB"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
