"""What the tests of learner ranks share: a tiny model, its configs and rounds, and starting ranks without Ray.

A test file is also the script of one rank: `python test_learner_ranks.py FOLDER RANK WORLD_SIZE PORT` runs all its
cases of this world size, in order, and each leaves `FOLDER/result-CASE-RANK.pt`.
"""

import functools
import gc
import multiprocessing
import os
import random
import runpy
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import torch

LEARNER = {
    "batch_size": 4,
    "micro_batch_size": 4,
    "max_length": 60,
    "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "schedule": "linear", "max_grad_norm": 1.0},
}
ROUNDS = 8
SPLIT = {"zero_stage": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 100}}}
"""By default every parameter of the tiny model counts as small, which ZeRO-3 keeps whole for good."""
SHIFT = 0.01
VOCAB = 97


def zero(stage):
    """Settings of a ZeRO stage; stage 3 has the weights in partitions."""
    return SPLIT if stage == 3 else {"zero_stage": stage}


def run_ranks(script, folder, world_size, timeout=240):
    """Run `script FOLDER RANK WORLD_SIZE PORT` for every rank; fails with the output of a rank that does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, outputs = [], []
    for rank in range(world_size):
        outputs.append(folder / f"output-{world_size}-{rank}.txt")
        arguments = [str(script), str(folder), str(rank), str(world_size), str(port)]
        processes.append(fork_server().Process(target=run_script, args=(arguments, outputs[-1]), daemon=True))
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        process.kill()
    for process, output in zip(processes, outputs, strict=True):
        process.join()
        assert process.exitcode == 0, output.read_text()[-6000:]


@functools.cache
def fork_server():
    """Ranks begin as copies of one process that has imported what takes them seconds to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "transformers", "rlhf.learning.rank"])
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    forkserver.ensure_running()
    os.environ.clear()
    os.environ |= before
    return context


def run_script(arguments, output):
    """In a rank's process: the script as `python SCRIPT ...` would run it, its output in a file."""
    with output.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    # What has been imported is no garbage; collections, of which some tests make many, need not look at it.
    gc.freeze()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def rank_main(cases, run_case):
    """What the script does: `run_case(folder, name, settings, rank, world_size, port)` for each of `cases[world_size]`,
    and its result saved."""
    folder, rank, world_size, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    for name, settings in cases[world_size].items():
        result = run_case(folder, name, dict(settings), rank, world_size, port)
        torch.save(result, folder / f"result-{name}-{rank}.pt")


def run_cases(script, folder, cases):
    """Save the tiny model and run the script on every rank of every world size; returns the folder."""
    save_tiny_model(folder / "model")
    for world_size in cases:
        run_ranks(script, folder, world_size)
    return folder


def load_results(folder, cases, alike):
    """Rank 0's result of each case; the entries `alike` have to be the same on every rank, bit for bit."""
    found = {}
    for world_size, names in cases.items():
        for name in names:
            first, *others = (
                torch.load(folder / f"result-{name}-{rank}.pt", weights_only=False) for rank in range(world_size)
            )
            found[name] = first
            for other in others:
                for key in alike:
                    assert same(first[key], other[key]), f"{name}: {key} differs between ranks"
    return found


def same(one, other):
    """Are both equal, tensors bit for bit?"""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def start_learner(config, rank, world_size, port):
    """A rank's learner that has met the others."""
    from rlhf.learning.rank import RankLearner

    learner = RankLearner(config, rank, world_size, "cpu")
    learner.start("127.0.0.1", port, 60)
    return learner


def models():
    """Policies that this process holds; earlier cases may have left some."""
    from rlhf.learning.policy import PolicyModule

    gc.collect()
    return sum(isinstance(item, PolicyModule) for item in gc.get_objects())


def make_config(model, *, dtype="float32", **learner):
    from rlhf.config import RunConfig

    world_size = learner.pop("world_size", 1)
    return RunConfig.model_validate(
        {
            "name": "ranks",
            "policy": {"path": str(model), "dtype": dtype},
            "prompts": {"path": "unused", "max_tokens": 20},
            "generator": {"sampling": {"max_tokens": 20}},
            "rounds": {"count": ROUNDS},
            "learner": {**LEARNER, **learner, "world_size": world_size},
        }
    )


def make_round(number, count, model=None):
    """`count` pairs of odd lengths and one too long; with `model`, chosen log-probs as an engine off by SHIFT gives."""
    from rlhf.records import Pair, SealedRound

    draw = random.Random(number)

    def ids(n):
        return tuple(draw.randrange(VOCAB) for _ in range(n))

    pairs = []
    for i in range(count):
        prompt, chosen, rejected = (ids(draw.randint(*bounds)) for bounds in ((1, 20), (1, 15), (2, 15)))
        logprobs = ()
        if model is not None:
            with torch.no_grad():
                logprobs = tuple((token_logprobs(model, prompt, chosen) + SHIFT).tolist())
        # Only the chosen response counts for the mismatch: the rejected one claims another version.
        pairs.append(
            Pair(f"p{i}", number, prompt, chosen, rejected, "", "", "", 1.0, 0, 7, logprobs, (9.0,) * len(rejected))
        )
    if count:
        pairs.insert(2, Pair("long", number, ids(30), ids(31), ids(2), "", "", "", 1.0, 0, 0))
    return SealedRound(number, tuple(pairs), "digest")


def token_logprobs(model, prompt, response):
    """Log-probs of a response by the model's own forward, its whole logits, one sequence at a time."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)[torch.arange(len(response)), list(response)]


def save_tiny_model(path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0").save_pretrained(path)
