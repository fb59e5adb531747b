"""Peak memory of an optimizer step against the length of responses, with SmolLM2-135M's vocabulary of 49,152.

    python bench/head.py [MODEL] [tokens ...]

MODEL is models/smollm2-135m-instruct by default; `tokens` are those of the chosen and the rejected response of a pair
together (256 512 1024 2048). One pair a step, a prompt of 64 tokens, a run's own defaults (bfloat16, ZeRO 2, prefix
sharing, a frozen reference), each figure from the second step of a fresh process: its highest resident memory on a
CPU, its highest allocated memory on a GPU. `plain head` puts all logits through log_softmax at once, as a trainer does
that has no chunked head; everything else is the same.
"""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL = "models/smollm2-135m-instruct"
TOKENS = (256, 512, 1024, 2048)
PROMPT = 64
VARIANTS: dict[str, tuple[bool, bool]] = {
    "chunked head, activation checkpointing": (True, True),
    "chunked head": (True, False),
    "plain head, activation checkpointing": (False, True),
    "plain head": (False, False),
}
"""Name: (chunked head, activation checkpointing)."""


def measure(model: str, tokens: int, chunked: bool, checkpointing: bool) -> dict[str, float]:
    """Bytes in the second step of a learner made here: before it, and at most during it."""
    import torch

    from rlhf.config.run import RunConfig
    from rlhf.learning.rank import RankLearner

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = RunConfig.model_validate(
        {
            "name": "head",
            "policy": {"path": model},
            "prompts": {"path": "unused", "max_tokens": PROMPT},
            "generator": {"sampling": {"max_tokens": tokens // 2}},
            "rounds": {"count": 2},
            "learner": {
                "batch_size": 1,
                "max_length": PROMPT + tokens,
                "activation_checkpointing": checkpointing,
            },
        }
    )
    learner = RankLearner(config, 0, 1, device)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    learner.start("127.0.0.1", port, 60.0)
    if not chunked:
        for module in (learner._engine._engine.module, getattr(learner.reference, "_frozen", None)):
            if module is not None:
                module.head.forward = lambda hidden, targets, head=module.head: plain_head(head, hidden, targets)
    vocabulary = learner._model.config.vocab_size
    learner.train(round_of_one(1, tokens, vocabulary))
    before = reset_peak(device)
    learner.train(round_of_one(2, tokens, vocabulary))
    return {"before": before, "peak": peak(device)}


def plain_head(head: Any, hidden: Any, targets: Any) -> Any:
    """What `ResponseHead` computes, by the logits of all positions at once."""
    return (hidden @ head.weight.t()).float().log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)


def round_of_one(number: int, tokens: int, vocabulary: int) -> Any:
    """A sealed round of one pair of random tokens."""
    from rlhf.records import Pair, SealedRound

    draw = random.Random(number)
    prompt, chosen, rejected = (
        tuple(draw.randrange(vocabulary) for _ in range(count)) for count in (PROMPT, tokens // 2, tokens // 2)
    )
    pair = Pair("p", number, prompt, chosen, rejected, "", "", "", 1.0, 0, 0)
    return SealedRound(number, (pair,), "")


def reset_peak(device: str) -> float:
    """Forget the highest memory so far; returns the present one, in bytes."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: VmHWM starts again from VmRSS
    return peak(device)


def peak(device: str) -> float:
    """The highest memory since `reset_peak`, in bytes."""
    import torch

    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def main() -> None:
    """Run each point in a process of its own and print a table, with the growth from one length to the next."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--one"]:
        model, tokens, chunked, checkpointing = arguments[1:]
        print(json.dumps(measure(model, int(tokens), chunked == "1", checkpointing == "1")))
        return
    model = arguments[0] if arguments and not arguments[0].isdigit() else MODEL
    lengths = [int(value) for value in arguments if value.isdigit()] or list(TOKENS)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    print("highest memory of a step in GB, in brackets what the step itself adds; growth from the length before")
    print(f"{'response tokens':40s}" + "".join(f" | {tokens:16,}" for tokens in lengths), flush=True)
    for name, flags in VARIANTS.items():
        cells, last = [], 0.0
        for tokens in lengths:
            command = [sys.executable, __file__, "--one", model, str(tokens), *(str(int(flag)) for flag in flags)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
            before, highest = (value / 1e9 for value in json.loads(done.stdout.splitlines()[-1]).values())
            growth = f"{highest / last - 1:+.0%}" if last else ""
            cells.append(f" | {highest:.2f} ({highest - before:.2f}) {growth:>4s}")
            last = highest
        print(f"{name:40s}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
