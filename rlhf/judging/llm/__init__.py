"""The `llm` judge: any OpenAI-compatible endpoint."""

from rlhf.judging.llm.judge import LLMJudge

__all__ = ["LLMJudge"]
