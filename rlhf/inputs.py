"""What a run reads before anything is written or started: a bad input leaves no trace."""

import json
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf.config import RunConfig
from rlhf.config.judge import PairModelJudge
from rlhf.data.chat import load_tokenizer
from rlhf.data.prompts import PromptSet, load_eval_prompts, load_prompts
from rlhf.errors import InputError, RLHFError
from rlhf.judging.pair_prompt import PairPrompt
from rlhf.modelfiles import local_folder, tensor_shapes

CONTEXT_KEYS = "prompts.max_tokens + generator.sampling.max_tokens"


@dataclass(frozen=True)
class Inputs:
    """The model's folder, names and shapes of its tensors, the prompts and the held-out prompts."""

    model: Path
    shapes: dict[str, tuple[int, ...]]
    prompts: PromptSet
    held_out: PromptSet

    @property
    def model_bytes(self) -> int:
        """Size of the checkpoint's weights."""
        return sum(file.stat().st_size for file in self.model.glob("*.safetensors"))

    def notes(self) -> list[str]:
        """What was left out, for the user."""
        dropped = [f"{count} {reason.replace('_', ' ')}" for reason, count in self.prompts.dropped.items() if count]
        return ["prompts left out: " + ", ".join(dropped)] if dropped else []


def read_inputs(config: RunConfig) -> Inputs:
    """Read model headers, tokenizer and prompts; raises `InputError` naming the key of what is missing or unusable."""
    model = local_folder(config.policy.path, "policy.path")
    shapes = tensor_shapes(model, "policy.path")
    tokenizer = load_tokenizer(str(model), trust_remote_code=config.policy.trust_remote_code, key="policy.path")
    _check_context(model, config.prompts.max_tokens + config.generator.sampling.max_tokens, CONTEXT_KEYS)
    for key, judge in (("judge", config.judge), ("eval_judge", config.eval_judge)):
        if isinstance(judge, PairModelJudge):
            _check_pair_model(judge, model, key)
    return Inputs(
        model=model,
        shapes=shapes,
        prompts=load_prompts(config.prompts, tokenizer),
        held_out=load_eval_prompts(config.prompts, tokenizer),
    )


def _check_pair_model(judge: PairModelJudge, policy: Path, key: str) -> None:
    """The judge's files, its two answer tokens, its template and its context; raises `InputError`."""
    folder = local_folder(judge.path, f"{key}.path") if judge.path else policy
    tensor_shapes(folder, f"{key}.path")
    PairPrompt(
        load_tokenizer(str(folder), trust_remote_code=judge.trust_remote_code, key=f"{key}.path"), judge.max_length
    )
    _check_context(folder, judge.max_length + 1, f"{key}.max_length + 1")


def _check_context(folder: Path, tokens: int, keys: str) -> None:
    limit = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    if isinstance(limit, int) and tokens > limit:
        raise InputError(f"{keys} = {tokens}: {folder} takes {limit} tokens at most; lower it")


def check_memory(needed: int) -> None:
    """Raise `RLHFError` if this machine's free memory cannot hold `needed` bytes."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise RLHFError(
            f"this run needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free; lower "
            "learner.micro_batch_size or generator.replicas, take a smaller policy.path, or free memory "
            "(`rlhf validate` shows the estimate of each actor)"
        )
