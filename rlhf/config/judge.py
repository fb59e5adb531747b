"""Judges, a discriminated union by `type`, and how verdicts become pairs."""

from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf.config.base import DType, Section


class JudgePool(Section):
    """What every judge has: a pool of Ray actors shared by all generators."""

    replicas: int = Field(1, ge=1, description="Judge actors in the pool.")
    batch_size: int = Field(64, ge=1, description="Comparisons sent to one actor at a time.")
    cpus: int | None = Field(None, ge=1, description="CPU threads of one judge actor; null picks by judge and machine.")


class SentimentJudge(JudgePool):
    """Prefers the response with the more positive VADER sentiment."""

    type: Literal["sentiment"] = "sentiment"
    scale: float = Field(
        4.0, gt=0, description="p(A wins) = sigmoid(scale * (score(A) - score(B))), scores in [-1, 1]."
    )


class PairModelJudge(JudgePool):
    """A causal LM that answers `A` or `B` (pair-preference format), served by vLLM."""

    type: Literal["pair_model"]
    path: str | None = Field(
        None, description="Hugging Face id or local folder of the judge; null takes the initial policy."
    )
    dtype: DType = Field("bfloat16", description="Dtype the judge is served in.")
    max_length: int = Field(
        2048, ge=16, description="Longest judge prompt in tokens; a longer context is cut from the left."
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs (or CPU workers) of one judge engine.")
    engine: dict[str, Any] = Field(default_factory=dict, description="Passed to vLLM's engine arguments as they are.")
    trust_remote_code: bool = Field(False, description="Allow model code from the checkpoint's folder to run.")


Judge = Annotated[SentimentJudge | PairModelJudge, Field(discriminator="type")]


class Pairing(Section):
    """Which comparisons a prompt's K responses go through and which pairs come out."""

    strategy: Literal["best_vs_worst", "random", "all_pairs"] = Field(
        "best_vs_worst",
        description="best_vs_worst: one pair a prompt; random: two responses drawn from the seed; all_pairs: every "
        "decisive comparison.",
    )
    min_margin: float = Field(0.1, ge=0, lt=1, description="Pairs with |2p - 1| below this are ties and dropped.")
