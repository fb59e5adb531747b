"""A causal LM that answers `A` or `B` (METHODS §1), over any `Scorer`."""

import asyncio
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from rlhf.config.judge import PairModelJudge as PairModelConfig
from rlhf.errors import RLHFError
from rlhf.judging.pair_prompt import PairPrompt, format_context
from rlhf.judging.verdicts import invalid_verdict, make_verdict, sigmoid
from rlhf.ports import Scorer
from rlhf.records import Comparison, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class _Orders:
    """Token ids with A first and with B first."""

    ids: list[list[int]]
    truncated: bool


class PairModelJudge:
    """Both orders of each comparison, one forward pass each; P is a softmax over the tokens `A` and `B` only.

    A verdict is `truncated` where the context was cut from the left to fit `max_length`.
    """

    def __init__(self, config: PairModelConfig, scorer: Scorer, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises `InputError` if the judge cannot carry the format: see `PairPrompt`."""
        self.prompt = PairPrompt(tokenizer, config.max_length)
        self._scorer = scorer
        self._max_length = config.max_length
        self._encoding = threading.Lock()

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order; all prompts (two a comparison) reach the scorer in one call."""
        # In a thread: the loop has the other batch of this judge, and its engine, to look after.
        encoded = await asyncio.to_thread(self._encode, comparisons)
        prompts = [ids for orders in encoded if not isinstance(orders, str) for ids in orders.ids]
        first_wins = iter(await self._first_wins(prompts))
        verdicts = []
        for comparison, orders in zip(comparisons, encoded, strict=True):
            if isinstance(orders, str):
                verdicts.append(invalid_verdict(comparison, orders))
            else:
                p_ab, p_first_is_b = next(first_wins), next(first_wins)
                verdict = make_verdict(comparison, p_ab, 1.0 - p_first_is_b)
                verdicts.append(replace(verdict, truncated=orders.truncated))
        return verdicts

    def _encode(self, comparisons: Sequence[Comparison]) -> "list[_Orders | str]":
        """Token ids of both orders of each, or why it cannot be judged; one call of the tokenizer for all that fit.

        One thread at a time: a tokenizer holds settings of the call that it is in.
        """
        with self._encoding:
            objections = [self.prompt.control_token(comparison) for comparison in comparisons]
            texts: list[str] = []
            rendered = []
            for comparison, objection in zip(comparisons, objections, strict=True):
                context = format_context(comparison.messages)
                rendered.append(not objection and self.prompt.may_fit(comparison, context))
                if rendered[-1]:
                    texts += self.prompt.render_orders(comparison, context)
            ids = iter(self.prompt.encode(texts) if texts else ())
            whole = [[next(ids), next(ids)] if there else None for there in rendered]
            return [
                f"a text spells out the judge's control token {objection!r}" if objection else self._fit(each, orders)
                for each, objection, orders in zip(comparisons, objections, whole, strict=True)
            ]

    def _fit(self, comparison: Comparison, whole: list[list[int]] | None) -> "_Orders | str":
        """`whole` if it fits, else the comparison with as much of its context as does."""
        if whole is not None and self.prompt.fits(whole):
            return _Orders(whole, truncated=False)
        cut = self.prompt.truncate(comparison)
        if cut is None:
            return f"the responses alone are longer than judge.max_length={self._max_length} tokens"
        return _Orders(cut, truncated=True)

    async def _first_wins(self, prompts: list[list[int]]) -> list[float]:
        """p(the response shown first wins) of each prompt; NaN where the scorer has no number."""
        if not prompts:
            return []
        logprobs = np.asarray(await self._scorer.next_logprobs(prompts, self.prompt.answer_ids), dtype=np.float64)
        if logprobs.shape != (len(prompts), 2):
            raise RLHFError(f"judge: the scorer returned shape {logprobs.shape}, expected {(len(prompts), 2)}")
        return [sigmoid(a - b) if np.isfinite([a, b]).all() else math.nan for a, b in logprobs.tolist()]
