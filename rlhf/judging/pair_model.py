"""A causal LM that answers `A` or `B` (METHODS §1), over any `Scorer`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

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

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order; all prompts (two a comparison) reach the scorer in one call."""
        encoded = [self._encode(comparison) for comparison in comparisons]
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

    def _encode(self, comparison: Comparison) -> "_Orders | str":
        """Token ids of both orders, or why the comparison cannot be judged."""
        if token := self.prompt.control_token(comparison):
            return f"a text spells out the judge's control token {token!r}"
        orders = self.prompt.encode_orders(comparison, format_context(comparison.messages))
        if self.prompt.fits(orders):
            return _Orders(orders, truncated=False)
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
