"""Prompt sets for training and evaluation, and the order in which the rounds draw prompts."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from rlhf.config.data import Prompts
from rlhf.data.chat import encode_prompt
from rlhf.data.formats import Conversation, conversations, references
from rlhf.data.rows import load_rows
from rlhf.errors import InputError
from rlhf.records import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DROP_REASONS = ("too_long", "blank", "duplicate", "malformed", "held_out")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Usable prompts in file order, and how many rows were dropped for each of `DROP_REASONS`.

    The `uid` of a prompt in a set is its content hash: 16 hexadecimal digits.
    """

    prompts: tuple[Prompt, ...]
    dropped: dict[str, int]


def load_prompts(config: Prompts, tokenizer: "PreTrainedTokenizerBase") -> PromptSet:
    """The training prompts: distinct, not blank, at most `max_tokens` long, none of them an evaluation prompt.

    Raises `InputError` where the data cannot be read or no prompt is left.
    """
    held_out = load_eval_prompts(config, tokenizer).prompts if config.eval else ()
    rows = load_rows(config.path, split=config.split, name=config.name)
    found = conversations(rows, column=config.column, format=config.format, path=config.path)
    answers = references(rows, column=config.reference, path=config.path)
    usable = _Usable(zip(found, answers, strict=True), config, tokenizer, frozenset(prompt.uid for prompt in held_out))
    return _non_empty(PromptSet(tuple(usable), usable.dropped), len(rows), f"prompts.path = {config.path}")


def load_eval_prompts(config: Prompts, tokenizer: "PreTrainedTokenizerBase") -> PromptSet:
    """The first `eval.count` usable prompts of the evaluation data (fewer where it holds fewer); empty without `eval`.

    `dropped` counts the rows passed over to find them. Raises `InputError` as `load_prompts` does.
    """
    eval_ = config.eval
    if eval_ is None:
        return PromptSet((), dict.fromkeys(DROP_REASONS, 0))
    # What describes the training data describes the same data here, and says nothing about other data.
    source = config if eval_.path == config.path else Prompts(path=eval_.path)
    rows = load_rows(eval_.path, split=eval_.split or config.split, name=source.name, key="prompts.eval")
    found = conversations(
        rows,
        column=eval_.column or source.column,
        format=eval_.format or source.format,
        key="prompts.eval",
        path=eval_.path,
    )
    answers = references(rows, column=eval_.reference or source.reference, key="prompts.eval", path=eval_.path)
    usable = _Usable(zip(found, answers, strict=True), config, tokenizer, frozenset())
    prompts = tuple(islice(usable, eval_.count))
    return _non_empty(PromptSet(prompts, usable.dropped), len(rows), f"prompts.eval.path = {eval_.path}")


class _Usable:
    """Iterates over the usable prompts and counts the others in `dropped` on the way."""

    def __init__(
        self,
        found: Iterator[tuple[Conversation | None, str | None]],
        config: Prompts,
        tokenizer: "PreTrainedTokenizerBase",
        held_out: frozenset[str],
    ) -> None:
        self.dropped = dict.fromkeys(DROP_REASONS, 0)
        self._found, self._config, self._tokenizer, self._held_out = found, config, tokenizer, held_out

    def __iter__(self) -> Iterator[Prompt]:
        seen: set[str] = set()
        for messages, reference in self._found:
            prompt = self._prompt(messages, reference, seen)
            if isinstance(prompt, str):
                self.dropped[prompt] += 1
            else:
                yield prompt

    def _prompt(self, messages: Conversation | None, reference: str | None, seen: set[str]) -> Prompt | str:
        """The prompt, or the reason why there is none."""
        if messages is None:
            return "malformed"
        if not messages[-1]["content"].strip():
            return "blank"
        if self._config.system is not None and messages[0]["role"] != "system":
            messages = (Message(role="system", content=self._config.system), *messages)
        uid = content_hash(messages)
        if uid in self._held_out:
            return "held_out"
        if uid in seen:
            return "duplicate"
        seen.add(uid)
        text, token_ids = encode_prompt(self._tokenizer, messages)
        if len(token_ids) > self._config.max_tokens:
            return "too_long"
        return Prompt(uid=uid, messages=messages, text=text, token_ids=token_ids, reference=reference)


def content_hash(messages: Sequence[Message]) -> str:
    """16 hexadecimal digits of the SHA-256 of roles and contents; blanks around a content do not count."""
    plain = json.dumps([[message["role"], message["content"].strip()] for message in messages])
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _non_empty(prompts: PromptSet, rows: int, where: str) -> PromptSet:
    if prompts.prompts:
        return prompts
    counts = ", ".join(f"{count} {reason}" for reason, count in prompts.dropped.items() if count)
    raise InputError(
        f"{where}: no usable prompt in {rows} rows ({counts}); "
        "check the column, the format and prompts.max_tokens, and that prompts.eval leaves some"
    )


class PromptOrder:
    """An endless, deterministic order over a prompt set: epoch after epoch, each a permutation of its own.

    Stateless: whoever owns the cursor asks for slices, in any order, and always gets the same prompts.
    """

    _CACHED_EPOCHS = 2

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """`seed` is a non-negative integer; raises `ValueError` for an empty set."""
        if not prompts:
            raise ValueError("an order needs at least one prompt")
        self._prompts = prompts
        self._seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def slice(self, start: int, count: int) -> list[Prompt]:
        """The prompts at positions [start, start + count), each with the uid `<content hash>-<epoch>`."""
        if start < 0 or count < 0:
            raise ValueError(f"start {start} and count {count} must not be negative")
        size = len(self._prompts)
        result: list[Prompt] = []
        while count > 0:
            epoch, offset = divmod(start, size)
            chunk = self._permutation(epoch)[offset : offset + count]
            drawn = (self._prompts[index] for index in chunk.tolist())
            result.extend(
                Prompt(f"{each.uid}-{epoch}", each.messages, each.text, each.token_ids, each.reference)
                for each in drawn
            )
            start, count = start + len(chunk), count - len(chunk)
        return result

    def _permutation(self, epoch: int) -> np.ndarray:
        """int64 [prompts]. Sorts PCG64's raw stream, which numpy keeps stable; its shuffles may change by release."""
        if epoch not in self._permutations:
            while len(self._permutations) >= self._CACHED_EPOCHS:
                del self._permutations[next(iter(self._permutations))]
            raw = np.random.PCG64([self._seed, epoch]).random_raw(len(self._prompts))
            self._permutations[epoch] = np.argsort(raw, kind="stable")
        return self._permutations[epoch]
