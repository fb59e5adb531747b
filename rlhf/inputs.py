"""What a run reads before anything is written or started: a bad input leaves no trace."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import psutil

from rlhf.config import RunConfig
from rlhf.config.judge import EngineJudge, Judge, PooledJudge, RewardModelJudge, single_judges, with_path
from rlhf.data.anchor import AnchorPairs, read_anchor
from rlhf.data.chat import load_tokenizer
from rlhf.data.prompts import PromptSet, load_eval_prompts, load_prompts
from rlhf.errors import InputError, RLHFError
from rlhf.judging.build import build_judge
from rlhf.modelfiles import local_folder, tensor_shapes
from rlhf.ports import Rewarder, Scorer

CONTEXT_KEYS = "prompts.max_tokens + generator.sampling.max_tokens"


@dataclass(frozen=True)
class Inputs:
    """The model's folder, names and shapes of its tensors, the prompts, the held-out prompts, the anchor's pairs."""

    model: Path
    shapes: dict[str, tuple[int, ...]]
    prompts: PromptSet
    held_out: PromptSet
    anchor: AnchorPairs | None = None
    anchor_notes: tuple[str, ...] = ()

    @property
    def model_bytes(self) -> int:
        """Size of the checkpoint's weights."""
        return sum(file.stat().st_size for file in self.model.glob("*.safetensors"))

    def notes(self) -> list[str]:
        """What was left out, for the user."""
        dropped = [f"{count} {reason.replace('_', ' ')}" for reason, count in self.prompts.dropped.items() if count]
        return [*(["prompts left out: " + ", ".join(dropped)] if dropped else []), *self.anchor_notes]


def read_inputs(config: RunConfig) -> Inputs:
    """Read model headers, tokenizer and prompts; raises `InputError` naming the key of what is missing or unusable."""
    model = local_folder(config.policy.path, "policy.path")
    shapes = tensor_shapes(model, "policy.path")
    tokenizer = load_tokenizer(str(model), trust_remote_code=config.policy.trust_remote_code, key="policy.path")
    _check_context(model, config.prompts.max_tokens + config.generator.sampling.max_tokens, CONTEXT_KEYS)
    judges = {"judge": config.judge} | ({"eval_judge": config.eval_judge} if config.eval_judge else {})
    check_judges({key: with_path(judge, str(model)) for key, judge in judges.items()})
    inputs = Inputs(
        model=model,
        shapes=shapes,
        prompts=load_prompts(config.prompts, tokenizer),
        held_out=load_eval_prompts(config.prompts, tokenizer),
    )
    if config.anchor is None:
        return inputs
    unseen = [prompt.messages for prompt in inputs.held_out.prompts]
    anchor, notes = read_anchor(config.anchor, tokenizer, config.seed, unseen)
    return replace(inputs, anchor=anchor, anchor_notes=notes)


def check_judges(judges: Mapping[str, Judge]) -> None:
    """Check the judges by config key, whose paths are set: models, tokenizers, answer tokens, keys, functions.

    Raises `InputError` for the first thing that is missing or unusable.
    """
    for top, judge in judges.items():
        for key, single in single_judges(judge, top):
            with _under(key, single):
                _check_judge(single)


def judge_folder(judge: EngineJudge, key: str) -> Path:
    """The local folder of a judge's model; raises `InputError` if `path` is not set or cannot be read."""
    if judge.path is None:
        raise InputError(f"{key}.path: required here; give the judge's local folder or Hugging Face id")
    return local_folder(judge.path, f"{key}.path")


def _check_judge(judge: PooledJudge) -> None:
    if isinstance(judge, EngineJudge):
        folder = judge_folder(judge, "judge")
        tensor_shapes(folder, "judge.path")
        if isinstance(judge, RewardModelJudge):
            _check_context(folder, judge.max_length, "judge.max_length")
        else:
            _check_context(folder, judge.max_length + 1, "judge.max_length + 1")
        judge = judge.model_copy(update={"path": str(folder)})
    # Judges check themselves when they are built; the engines behind them are not needed for that.
    build_judge(judge, _NoEngines())


class _NoEngines:
    """Stands where engines will be; nothing may be asked of it."""

    def scorer(self, config: EngineJudge) -> Scorer:
        return cast(Scorer, self)

    def rewarder(self, config: EngineJudge) -> Rewarder:
        return cast(Rewarder, self)


@contextmanager
def _under(key: str, judge: PooledJudge) -> Iterator[None]:
    """Judges call their own keys `judge.*`; a complaint gets the key under which the config has them."""
    try:
        yield
    except InputError as error:
        if key == "judge":
            raise
        raise InputError(_renamed(str(error), key, judge)) from error


def _renamed(text: str, key: str, judge: PooledJudge) -> str:
    """`text` with its `judge.<field>` keys under `key`; values such as `/models/judge.v2` stay as they are."""
    fields = "|".join(type(judge).model_fields)
    return re.sub(rf"(?<![\w./'\"\\-])(?<!= )judge\.(?=(?:{fields})\b)", lambda _: f"{key}.", text)


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
