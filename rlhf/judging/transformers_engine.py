"""The `Scorer` and `Rewarder` ports on plain transformers models, for judges that vLLM does not serve."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from rlhf.config.judge import EngineJudge
from rlhf.data.rows import one_line
from rlhf.errors import InputError
from rlhf.judging.reward_model import check_reward_model

BATCH_TOKENS = 8192
"""Tokens of one forward pass, padding included."""


class _OnDevice:
    """A model that can leave its device and come back."""

    _model: Any
    _thread: ThreadPoolExecutor
    _device: str

    async def sleep(self, level: int) -> None:
        """Give the device's memory back; the weights are kept in CPU memory at any `level`."""
        await self._move("cpu")

    async def wake(self) -> None:
        """Take the device's memory again."""
        await self._move(self._device)

    async def _move(self, device: str) -> None:
        def move() -> None:
            self._model.to(device)
            if self._device != "cpu":
                torch.cuda.empty_cache()

        await asyncio.get_running_loop().run_in_executor(self._thread, move)


class TransformersScorer(_OnDevice):
    """Next-token log-probs of a causal LM."""

    def __init__(self, config: EngineJudge, device: str) -> None:
        """Loads `config.path` onto `device` ("cpu" or "cuda"); raises `InputError` if it is no such model."""
        from transformers import AutoModelForCausalLM

        self._device = device
        self._model = _load(AutoModelForCausalLM, config, device)
        self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._thread = _one_thread()

    async def next_logprobs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> np.ndarray:
        """Log-probs of `token_ids` as the next token of each prompt: float64 [len(prompts), len(token_ids)]."""
        wanted = list(token_ids)
        return await _in_thread(
            self._thread, lambda: _by_length(prompts, (len(wanted),), lambda rows: self._forward(rows, wanted))
        )

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]], token_ids: list[int]) -> torch.Tensor:
        """float32 [len(rows), len(token_ids)]. Only the positions that end a row go through the LM head."""
        ids, mask = _padded(rows, 0, self._model.device)
        last = mask.sum(dim=1) - 1
        keep, place = torch.unique(last, return_inverse=True)
        if not self._keeps:
            logits = self._model(input_ids=ids, attention_mask=mask).logits[:, keep]
        else:
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        ends = logits[torch.arange(len(rows), device=place.device), place]
        return torch.log_softmax(ends.float(), dim=-1)[:, token_ids]


class TransformersRewarder(_OnDevice):
    """Rewards of a sequence classifier with one label."""

    def __init__(self, config: EngineJudge, device: str) -> None:
        """Loads `config.path` onto `device` ("cpu" or "cuda"); raises `InputError` if it is no reward model."""
        from transformers import AutoModelForSequenceClassification

        assert config.path is not None
        check_reward_model(config.path, config.trust_remote_code)
        self._device = device
        self._model = _load(AutoModelForSequenceClassification, config, device)
        self._text_config = self._model.config.get_text_config()
        self._pad = self._text_config.pad_token_id
        self._thread = _one_thread()

    async def rewards(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The model's one logit for each tokenized conversation, before any activation: float64 [len(prompts)]."""
        return await _in_thread(self._thread, lambda: _by_length(prompts, (), self._forward))

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """float32 [len(rows)]."""
        pad = self._pad
        if pad is None:
            # Decoders read the reward at the last token that is not the padding token, and take one row only where
            # their config names none. Any token that ends no row serves as well.
            ends = {row[-1] for row in rows}
            pad = self._text_config.pad_token_id = next(token for token in range(len(ends) + 1) if token not in ends)
        ids, mask = _padded(rows, pad, self._model.device)
        rewards: torch.Tensor = self._model(input_ids=ids, attention_mask=mask).logits
        return rewards[:, 0].float()


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths`, the longest first, in batches of at most `budget` tokens once padded (one row at least)."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches = []
    while order:
        rows = max(1, budget // max(1, lengths[order[0]]))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def _by_length(
    prompts: Sequence[Sequence[int]], shape: tuple[int, ...], forward: Callable[[list[Sequence[int]]], torch.Tensor]
) -> np.ndarray:
    """`forward` over batches of prompts of like length: float64 [len(prompts), *shape], in the order of `prompts`."""
    result = np.full((len(prompts), *shape), np.nan)
    for batch in length_batches([len(prompt) for prompt in prompts], BATCH_TOKENS):
        result[batch] = forward([prompts[index] for index in batch]).double().cpu().numpy()
    return result


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, padded on the right: int64 [len(rows), longest] each."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _load(kind: Any, config: EngineJudge, device: str) -> Any:
    where = f"judge.path = {config.path}"
    if config.engine or config.tensor_parallel > 1:
        key = "judge.engine" if config.engine else "judge.tensor_parallel"
        raise InputError(f"{key}: has no meaning for judge.backend = transformers; leave it out, or take vllm")
    try:
        model, report = kind.from_pretrained(
            config.path,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be loaded: {one_line(error)}; give a folder with a model") from error
    if missing := sorted(report["missing_keys"]):
        # They would be random numbers.
        raise InputError(
            f"{where}: the checkpoint lacks {len(missing)} weights of {type(model).__name__} ({missing[0]}); give a "
            "whole model of that kind"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise InputError(f"judge.max_length = {config.max_length}: {where} takes {limit} tokens; set {limit} or less")
    return model.to(device).eval()


def _one_thread() -> ThreadPoolExecutor:
    """Forward passes run one after the other, beside the event loop."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge-model")


async def _in_thread(thread: ThreadPoolExecutor, work: Callable[[], np.ndarray]) -> np.ndarray:
    return await asyncio.get_running_loop().run_in_executor(thread, work)
