"""A scalar reward model: sequence classification with one label; p(A wins) by Bradley-Terry."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.config.judge import RewardModelJudge as RewardModelConfig
from rlhf.data.rows import one_line
from rlhf.errors import InputError
from rlhf.judging.chat_prompt import ChatPrompt, apply_template, score_prompts
from rlhf.judging.pointwise import Answer, Score, bradley_terry, compare_by_score
from rlhf.ports import Rewarder
from rlhf.records import Comparison, Message, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "probe-question", "probe-answer"


class RewardModelJudge:
    """p(A wins) = sigmoid(scale * (reward(A) - reward(B))); the reward is the model's one logit, without activation.

    The model reads the conversation and the response through its own chat template, without a generation prompt.
    """

    def __init__(self, config: RewardModelConfig, rewarder: Rewarder, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises `InputError` if there is no chat template, or if it leaves a question or a response out."""
        self._rewarder = rewarder
        self._tokenizer = tokenizer
        self._probability = bradley_terry(config.scale)
        _check_template(tokenizer, f"judge.path = {config.path}")
        self._prompt = ChatPrompt(tokenizer, config.max_length, self._render)

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order; all distinct responses reach the engine in one call."""
        return await compare_by_score(comparisons, self._scores, self._probability)

    async def _scores(self, answers: Sequence[Answer]) -> list[Score]:
        return await score_prompts(answers, self._prompt, self._rewarder.rewards)

    def _render(self, messages: Sequence[Message], response: str) -> str:
        return _render(self._tokenizer, messages, response)


def check_reward_model(path: str, trust_remote_code: bool = False) -> None:
    """Raise `InputError` unless the model's config describes a sequence classifier with one label.

    Libraries load a language model as a classifier too, with a head of random numbers.
    """
    from transformers import AutoConfig

    where = f"judge.path = {path}"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot read the model's config: {one_line(error)}; give a model folder") from error
    kind = (config.architectures or ["a model of unknown kind"])[0]
    if kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise InputError(f"{where}: it is {kind}, a language model without a reward head; give a reward model")
    if config.num_labels != 1:
        raise InputError(f"{where}: {kind} has {config.num_labels} labels; give a reward model, which has one")


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], response: str) -> str:
    return apply_template(tokenizer, [*messages, Message(role="assistant", content=response)], False)


def _check_template(tokenizer: "PreTrainedTokenizerBase", where: str) -> None:
    if not tokenizer.chat_template:
        raise InputError(f"{where}: the tokenizer has no chat template; use a reward model that has one")
    text = _render(tokenizer, [Message(role="user", content=_QUESTION)], _ANSWER)
    if _QUESTION not in text or _ANSWER not in text.partition(_QUESTION)[2]:
        raise InputError(
            f"{where}: the chat template turns a question and its answer into {text[:80]!r}, which does not hold both; "
            "repair the template"
        )
