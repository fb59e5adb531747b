"""I(response) of METHODS §4 from a guard model: P(safe) by the first token of its answer; the safe one of two wins."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf.config.judge import SafetyJudge as SafetyConfig
from rlhf.errors import InputError
from rlhf.judging.chat_prompt import ChatPrompt, apply_template, score_prompts
from rlhf.judging.pointwise import Answer, Score, compare_by_score
from rlhf.judging.verdicts import sigmoid
from rlhf.ports import Scorer
from rlhf.records import Comparison, Message, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "probe-question", "probe-answer"
_FIELD = re.compile(r"\{(conversation|response)\}")


class SafetyJudge:
    """A response's score is P(safe), a softmax over the first tokens of the guard's two answers at the prompt's end.

    I = 1 where the score reaches the threshold. Responses of the same I tie with p = 0.5 exactly; otherwise
    p(A wins) = sigmoid(logit P(A safe) - logit P(B safe)).
    """

    def __init__(self, config: SafetyConfig, scorer: Scorer, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises `InputError` if the template lacks a field, the guard has no chat template and none is configured,
        or the two answers do not start with different tokens where an answer starts."""
        self._config = config
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._where = f"judge.path = {tokenizer.name_or_path}"
        _check_fields(config.template)
        if config.template is None and not tokenizer.chat_template:
            raise InputError(f"{self._where}: the tokenizer has no chat template; set judge.template")
        plain = not tokenizer.chat_template
        self._prompt = ChatPrompt(tokenizer, config.max_length, self._render, special_tokens=plain)
        self._answer_ids = self._find_answer_ids()

    def safe(self, score: float) -> bool:
        """I(response): does P(safe) reach the threshold?"""
        return score >= self._config.threshold

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order; all distinct responses reach the engine in one call."""
        return await compare_by_score(comparisons, self._scores, self._probability)

    async def _scores(self, answers: Sequence[Answer]) -> list[Score]:
        return await score_prompts(answers, self._prompt, self._safe_probabilities)

    async def _safe_probabilities(self, prompts: list[list[int]]) -> np.ndarray:
        """float64 [prompts]; NaN where the engine has no number."""
        logprobs = np.asarray(await self._scorer.next_logprobs(prompts, self._answer_ids), dtype=np.float64)
        return np.array([sigmoid(safe - unsafe) for safe, unsafe in logprobs.tolist()])

    def _probability(self, score_a: float, score_b: float) -> float:
        if self.safe(score_a) == self.safe(score_b):
            return 0.5
        return sigmoid(_logit(score_a) - _logit(score_b))

    def _render(self, messages: Sequence[Message], response: str) -> str:
        if self._config.template is None:
            turns = [*messages, Message(role="assistant", content=response)]
            return apply_template(self._tokenizer, turns, add_generation_prompt=True)
        text = self._fill(messages, response)
        if not self._tokenizer.chat_template:
            return text
        return apply_template(self._tokenizer, [Message(role="user", content=text)], add_generation_prompt=True)

    def _fill(self, messages: Sequence[Message], response: str) -> str:
        """The configured template with its fields; in one pass, so that a field spelled out in a text stays."""
        fields = {"conversation": plain_conversation(messages), "response": response}
        return _FIELD.sub(lambda match: fields[match.group(1)], self._config.template or "")

    def _check_end(self, prompt: str) -> None:
        """A template of the user's own reaches the guard as a chat turn: the guard's turn has to follow it."""
        if self._config.template is None or not self._tokenizer.chat_template:
            return
        text = self._fill([Message(role="user", content=_QUESTION)], _ANSWER)
        user = Message(role="user", content=text)
        if prompt != apply_template(self._tokenizer, [user], add_generation_prompt=False):
            return
        # Older templates always write the guard's header; then it stands in front of a real answer too.
        answered = apply_template(self._tokenizer, [user, Message(role="assistant", content="probe-reply")], False)
        if answered.partition("probe-reply")[0].rstrip() != prompt.rstrip():
            raise InputError(
                f"{self._where}: the prompt ends with {prompt[-40:]!r}, which is not where an answer starts; use a "
                "guard whose chat template honours add_generation_prompt"
            )

    def _find_answer_ids(self) -> list[int]:
        """The first token of each answer where an answer starts."""
        prompt = self._render([Message(role="user", content=_QUESTION)], _ANSWER)
        if _QUESTION not in prompt or _ANSWER not in prompt:
            raise InputError(
                f"{self._where}: the chat template turns a question and its answer into {prompt[:80]!r}, which does "
                "not hold both; set judge.template"
            )
        self._check_end(prompt)
        start = self._prompt.token_ids(prompt)
        first = []
        for key, word in (("safe", self._config.safe), ("unsafe", self._config.unsafe)):
            ids = self._prompt.token_ids(prompt + word)
            if len(ids) <= len(start) or ids[: len(start)] != start or ids[len(start)] == self._tokenizer.unk_token_id:
                raise InputError(
                    f"judge.{key} = {word!r}: not a text of its own after {prompt[-40:]!r}; change the word, or the "
                    "end of judge.template"
                )
            first.append(int(ids[len(start)]))
        if first[0] == first[1]:
            raise InputError(
                f"judge.safe = {self._config.safe!r}, judge.unsafe = {self._config.unsafe!r}: both start with the "
                f"token {self._tokenizer.decode(first[:1])!r}; choose words with different first tokens"
            )
        return first


def plain_conversation(messages: Sequence[Message]) -> str:
    """`User: ...\\n\\nAssistant: ...\\n\\nUser: ...`: what stands for {conversation} in a template."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _check_fields(template: str | None) -> None:
    if template is None:
        return
    found = set(_FIELD.findall(template))
    for name in ("conversation", "response"):
        if name not in found:
            raise InputError(f"judge.template = {template[:60]!r}: it lacks {{{name}}}; put it where the text belongs")


def _logit(p: float) -> float:
    """log(p / (1 - p)); infinite at 0 and 1."""
    if p in (0.0, 1.0):
        return math.inf if p else -math.inf
    return math.log(p) - math.log1p(-p)
