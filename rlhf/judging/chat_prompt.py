"""A response in its conversation as a judge model's token ids; what is too long loses the start of its context."""

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlhf.data.rows import one_line
from rlhf.errors import RLHFError
from rlhf.judging.cutting import CHARS_PER_TOKEN, longest_end, max_chars
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
        self._max_chars = max_chars(tokenizer, max_length)
        self._encoding = threading.Lock()
        self._render = render
        self._special_tokens = special_tokens
        control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")

    def encode(self, answers: Sequence[Answer]) -> list[Encoded | str]:
        """At most `max_length` token ids of each, or why there are none, as `Score.reason` has it.

        The oldest turns are left out first, so that the rest starts with a user's turn; then that turn is cut from
        the left. The response is never cut. All that fit are tokenised in one call.

        One thread at a time: a tokenizer holds settings of the call that it is in.
        """
        with self._encoding:
            texts = [self._whole(answer) for answer in answers]
            short = [item.text for item in texts if isinstance(item, _Text) and len(item.text) <= self._max_chars]
            ids = iter(self._tokenizer(short, add_special_tokens=self._special_tokens)["input_ids"] if short else ())
            encoded: list[Encoded | str] = []
            for answer, item in zip(answers, texts, strict=True):
                if isinstance(item, str):
                    encoded.append(item)
                    continue
                whole = list(next(ids)) if len(item.text) <= self._max_chars else None
                fits = whole is not None and len(whole) <= self._max_length
                encoded.append(Encoded(whole, False) if whole is not None and fits else self._cut(answer))
            return encoded

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a rendered prompt."""
        return list(self._tokenizer(text, add_special_tokens=self._special_tokens)["input_ids"])

    def _whole(self, answer: Answer) -> "_Text | str":
        """The prompt of an answer as text, or why there is none."""
        # Control tokens spelled out in a text could forge a turn.
        texts = (answer.response, *(message["content"] for message in answer.messages))
        if found := next((match.group() for text in texts if (match := self._control.search(text))), None):
            return f"or its conversation spells out the judge's control token {found!r}"
        try:
            return _Text(self._render(answer.messages, answer.response))
        except _template_errors() as error:
            return _refused(error)

    def _cut(self, answer: Answer) -> Encoded | str:
        """The answer with as much of its conversation as fits."""
        try:
            ids = self._without_turns(answer.messages, answer.response)
        except _template_errors() as error:
            return _refused(error)
        return f"alone is longer than judge.max_length={self._max_length} tokens" if ids is None else Encoded(ids, True)

    def _without_turns(self, messages: Sequence[Message], response: str) -> list[int] | None:
        """The most turns, from a user's on, that fit; where not even the last one does, as much of its end as fits."""
        starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
        later = [start for start in starts if start > 0]
        low, high, best = 0, len(later), None  # the turns from later[high] on fit, those before later[low] do not
        while low < high:
            middle = (low + high) // 2
            if (ids := self._within(messages[later[middle] :], response)) is None:
                low = middle + 1
            else:
                best, high = ids, middle
        return best or self._cut_first(messages[starts[-1] if starts else 0 :], response)

    def _cut_first(self, messages: Sequence[Message], response: str) -> list[int] | None:
        """The first message cut to as much of its end as fits; None if nothing of it does."""
        if not messages:
            return None
        first, rest = messages[0], messages[1:]
        content = first["content"]

        def attempt(keep: int) -> list[int] | None:
            message = Message(role=first["role"], content=content[len(content) - keep :])
            return self._within([message, *rest], response)

        return longest_end(len(content), CHARS_PER_TOKEN * self._max_length, attempt)

    def _within(self, messages: Sequence[Message], response: str) -> list[int] | None:
        text = self._render(messages, response)
        if len(text) > self._max_chars:
            return None
        ids = self.token_ids(text)
        return ids if len(ids) <= self._max_length else None


@dataclass(frozen=True, slots=True)
class _Text:
    """A rendered prompt, as opposed to a reason."""

    text: str


def _template_errors() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError

    return TemplateError, ValueError


def _refused(error: Exception) -> str:
    return f"or its conversation is refused by the judge's chat template: {one_line(error)}"


async def score_prompts(answers: Sequence[Answer], prompt: ChatPrompt, measure: Measure) -> list[Score]:
    """Encode each answer and score those that could be encoded by one call of `measure`: float64 [prompts]."""
    # In a thread: the loop has the other batch of this judge, and its engine, to look after.
    encoded = await asyncio.to_thread(prompt.encode, answers)
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
