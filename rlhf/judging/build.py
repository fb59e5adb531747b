"""The judge that a config names."""

from typing import TYPE_CHECKING, assert_never

from rlhf.config.judge import Judge as JudgeConfig
from rlhf.config.judge import PairModelJudge as PairModelConfig
from rlhf.config.judge import SentimentJudge as SentimentConfig
from rlhf.ports import Judge, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_judge(
    config: JudgeConfig, *, scorer: Scorer | None = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> Judge:
    """Build the judge for `config`; `scorer` and `tokenizer` are what an LM judge needs, others ignore them."""
    if isinstance(config, SentimentConfig):
        from rlhf.judging.sentiment import SentimentJudge

        return SentimentJudge(config)
    if isinstance(config, PairModelConfig):
        from rlhf.judging.pair_model import PairModelJudge

        if scorer is None or tokenizer is None:
            raise ValueError("a pair_model judge needs a scorer and its tokenizer")
        return PairModelJudge(config, scorer, tokenizer)
    assert_never(config)
