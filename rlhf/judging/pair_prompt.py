"""The pair-preference prompt (METHODS §1; RLHFlow/pair-preference-model-LLaMA3-8B, "RLHF Workflow", TMLR 2024)."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.errors import InputError, RLHFError
from rlhf.judging.cutting import CHARS_PER_TOKEN, longest_end, max_chars
from rlhf.records import Comparison, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE, _ANSWER = "probe-question", "probe-answer"


def format_context(messages: Sequence[Message]) -> str:
    """The conversation as the judge reads it; U1 A1 U2 gives
    `"\\n\\n<turn> user\\n U1\\n<turn> assistant\\n A1\\n<turn> user\\n U2\\n"`.
    """
    turns = "".join(f"\n<turn> {message['role']}\n {message['content']}" for message in messages)
    return f"\n{turns}\n"


def format_question(context: str, a: str, b: str) -> str:
    """The text of the one user message."""
    return f"[CONTEXT] {context} [RESPONSE A] {a} [RESPONSE B] {b} \n"


class PairPrompt:
    """Turns a comparison into judge token ids; a judge whose template or vocabulary cannot carry it is refused.

    Raises `InputError` at construction when the tokenizer has no chat template, when `A` or `B` is not one token of
    its own, or when the rendered prompt does not end where an answer starts.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._max_chars = max_chars(tokenizer, max_length)
        self._name = f"judge.path={tokenizer.name_or_path!r}"
        if not tokenizer.chat_template:
            raise InputError(f"{self._name}: the tokenizer has no chat template; use a judge that has one")
        self.answer_ids = self._find_answer_ids()
        self._bos = self._leading_bos()
        self._tail = self._find_tail()
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def control_token(self, comparison: Comparison) -> str | None:
        """A control token of the judge spelled out in the texts, which could forge a turn; None if there is none."""
        texts = (comparison.a, comparison.b, *(message["content"] for message in comparison.messages))
        return next((match.group() for text in texts if (match := self._control.search(text))), None)

    def render(self, context: str, a: str, b: str) -> str:
        """The judge prompt as text, without BOS, ending where the answer starts."""
        text = self._apply([{"role": "user", "content": format_question(context, a, b)}])
        if not text.endswith(self._tail):
            raise RLHFError(f"{self._name}: the chat template ends this prompt with {text[-40:]!r}, not {self._tail!r}")
        return text.removeprefix(self._bos)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts, no special tokens added."""
        return [list(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def render_orders(self, comparison: Comparison, context: str) -> list[str]:
        """The prompts with A first, then with B first."""
        orders = ((comparison.a, comparison.b), (comparison.b, comparison.a))
        return [self.render(context, first, second) for first, second in orders]

    def encode_orders(self, comparison: Comparison, context: str) -> list[list[int]]:
        """Token ids with A first, then with B first."""
        return self.encode(self.render_orders(comparison, context))

    def may_fit(self, comparison: Comparison, context: str) -> bool:
        """False where the texts have more characters than `max_length` tokens could hold."""
        return len(context) + len(comparison.a) + len(comparison.b) <= self._max_chars

    def fits(self, orders: Sequence[Sequence[int]]) -> bool:
        """Both orders are within `max_length` tokens."""
        return all(len(ids) <= self._max_length for ids in orders)

    def truncate(self, comparison: Comparison) -> list[list[int]] | None:
        """Both orders with as much of the context's end as fits, the same in both; None if the responses do not."""
        if not self.may_fit(comparison, ""):
            return None
        context = format_context(comparison.messages)

        def attempt(keep: int) -> list[list[int]] | None:
            orders = self.encode_orders(comparison, context[len(context) - keep :])
            return orders if self.fits(orders) else None

        return longest_end(len(context), CHARS_PER_TOKEN * self._max_length, attempt)

    def _apply(self, messages: list[dict[str, str]], generation: bool = True) -> str:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        return str(text)

    def _find_answer_ids(self) -> tuple[int, int]:
        ids = []
        for letter in "AB":
            encoded = self._tokenizer.encode(letter, add_special_tokens=False)
            if len(encoded) != 1 or encoded[0] == self._tokenizer.unk_token_id:
                raise InputError(
                    f"{self._name}: the answer {letter!r} is not a single token (got {encoded}); use another judge"
                )
            ids.append(int(encoded[0]))
        return ids[0], ids[1]

    def _leading_bos(self) -> str:
        """The BOS text to remove; empty where the same token also opens every turn (ChatML), for it is markup there."""
        bos = self._tokenizer.bos_token
        text = self._apply([{"role": "user", "content": _PROBE}])
        return str(bos) if bos and text.startswith(bos) and text.count(bos) == 1 else ""

    def _find_tail(self) -> str:
        """What follows the user's text: it has to end with a generation prompt, or right where an answer begins."""
        user = {"role": "user", "content": _PROBE}
        prompt = self._apply([user])
        plain = self._apply([user], generation=False)
        header = prompt.removeprefix(plain) if prompt.startswith(plain) else ""
        tail = prompt.rpartition(_PROBE)[2]
        # Older templates write the assistant's header always, so asking for it changes nothing: compare with the
        # text in front of a real answer instead.
        answered, found, _ = self._apply([user, {"role": "assistant", "content": _ANSWER}], False).partition(_ANSWER)
        starts_answer = bool(found) and answered.rstrip() == prompt.rstrip()
        if _PROBE not in prompt or not tail.strip() or not (header.strip() or starts_answer):
            raise InputError(
                f"{self._name}: a prompt through the chat template ends with {prompt[-40:]!r}, which is not where an "
                "answer starts; use a judge whose template honours add_generation_prompt"
            )
        return tail
