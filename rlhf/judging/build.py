"""The judge that a config names."""

from typing import TYPE_CHECKING

from rlhf.config import judge as configs
from rlhf.ports import Judge, JudgeEngines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_judge(config: configs.PooledJudge, engines: JudgeEngines) -> Judge:
    """Build one judge; `engines` starts the engine of a judge that needs one, `config.path` is a folder by then.

    An ensemble is not built here: its members are judges in pools of their own (`rlhf.judging.ensemble`).
    """
    match config:
        case configs.SentimentJudge():
            from rlhf.judging.sentiment import SentimentJudge

            return SentimentJudge(config)
        case configs.PairModelJudge():
            from rlhf.judging.pair_model import PairModelJudge

            return PairModelJudge(config, engines.scorer(config), judge_tokenizer(config))
        case configs.RewardModelJudge():
            from rlhf.judging.reward_model import RewardModelJudge

            return RewardModelJudge(config, engines.rewarder(config), judge_tokenizer(config))
        case configs.SafetyJudge():
            from rlhf.judging.safety import SafetyJudge

            return SafetyJudge(config, engines.scorer(config), judge_tokenizer(config))
        case configs.LLMJudge():
            from rlhf.judging.llm import LLMJudge

            return LLMJudge(config)
        case configs.VerifierJudge():
            from rlhf.judging.verifier import VerifierJudge

            return VerifierJudge(config)
        case configs.PythonJudge():
            from rlhf.judging.python_judge import PythonJudge

            return PythonJudge(config)
        case _:
            raise TypeError(f"no judge for {type(config).__name__}")


def judge_tokenizer(config: configs.EngineJudge) -> "PreTrainedTokenizerBase":
    """The tokenizer beside a judge's model."""
    from rlhf.data.chat import load_tokenizer

    assert config.path is not None
    return load_tokenizer(config.path, trust_remote_code=config.trust_remote_code, key="judge.path")
