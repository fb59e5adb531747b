"""A response in its conversation as a judge model's token ids; what is too long loses the start of its context."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlhf.data.rows import one_line
from rlhf.errors import RLHFError
from rlhf.judging.pointwise import Answer, Score
from rlhf.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Render = Callable[[Sequence[Message], str], str]
Measure = Callable[[list[list[int]]], Awaitable[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a judge prompt; `truncated` says that the conversation was cut."""

    token_ids: list[int]
    truncated: bool


class ChatPrompt:
    """Encodes answers with `render(conversation, response)`, which returns the judge prompt as text."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", max_length: int, render: Render, special_tokens: bool = False
    ) -> None:
        """`special_tokens` lets the tokenizer add its own: only for text that no chat template has written."""
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._render = render
        self._special_tokens = special_tokens
        control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")

    def encode(self, answer: Answer) -> Encoded | str:
        """At most `max_length` token ids, or why there are none, as `Score.reason` has it.

        The oldest turns are left out first, so that the rest starts with a user's turn; then that turn is cut from
        the left. The response is never cut.
        """
        from jinja2 import TemplateError

        # Control tokens spelled out in a text could forge a turn.
        texts = (answer.response, *(message["content"] for message in answer.messages))
        if found := next((match.group() for text in texts if (match := self._control.search(text))), None):
            return f"or its conversation spells out the judge's control token {found!r}"
        try:
            return self._fit(answer) or f"alone is longer than judge.max_length={self._max_length} tokens"
        except (TemplateError, ValueError) as error:
            return f"or its conversation is refused by the judge's chat template: {one_line(error)}"

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a rendered prompt."""
        return list(self._tokenizer(text, add_special_tokens=self._special_tokens)["input_ids"])

    def _fit(self, answer: Answer) -> Encoded | None:
        messages = answer.messages
        if ids := self._within(messages, answer.response):
            return Encoded(ids, False)
        starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
        for start in starts:
            if start > 0 and (ids := self._within(messages[start:], answer.response)):
                return Encoded(ids, True)
        last = messages[starts[-1] if starts else 0 :]
        ids = self._cut_first(last, answer.response)
        return None if ids is None else Encoded(ids, True)

    def _cut_first(self, messages: Sequence[Message], response: str) -> list[int] | None:
        """The first message cut to as much of its end as fits; None if nothing of it does.

        Bisects over characters, since tokens of a cut text are not the tail of the whole text's tokens.
        """
        if not messages:
            return None
        first, rest = messages[0], messages[1:]

        def without(cut: int) -> list[int] | None:
            message = Message(role=first["role"], content=first["content"][cut:])
            return self._within([message, *rest], response)

        low, high = 0, len(first["content"])  # leaving out `high` characters fits, leaving out `low` does not
        best = without(high)
        while best is not None and high - low > 1:
            middle = (low + high) // 2
            ids = without(middle)
            if ids is None:
                low = middle
            else:
                best, high = ids, middle
        return best

    def _within(self, messages: Sequence[Message], response: str) -> list[int] | None:
        ids = self.token_ids(self._render(messages, response))
        return ids if len(ids) <= self._max_length else None


async def score_prompts(answers: Sequence[Answer], prompt: ChatPrompt, measure: Measure) -> list[Score]:
    """Encode each answer and score those that could be encoded by one call of `measure`: float64 [prompts]."""
    encoded = [prompt.encode(answer) for answer in answers]
    prompts = [item.token_ids for item in encoded if not isinstance(item, str)]
    values = np.asarray(await measure(prompts), dtype=np.float64) if prompts else np.zeros(0)
    if values.shape != (len(prompts),):
        raise RLHFError(f"judge: the engine returned shape {values.shape}, expected {(len(prompts),)}")
    found = iter(values.tolist())
    return [
        Score(None, item) if isinstance(item, str) else Score(next(found), truncated=item.truncated) for item in encoded
    ]


def apply_template(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], add_generation_prompt: bool
) -> str:
    """The conversation through the chat template, as text."""
    turns = [dict(message) for message in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    return str(text)
