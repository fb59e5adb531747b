"""Preference examples as the policy's token ids: prompts through the chat template, responses with their end token."""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf import packed
from rlhf.data.chat import encode_prompt
from rlhf.data.preferences import PreferenceExample
from rlhf.errors import InputError
from rlhf.records import Pair
from rlhf.rounds.segments import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_pair(example: PreferenceExample, tokenizer: "PreTrainedTokenizerBase", uid: str, round: int) -> Pair:
    """The example as a pair; a response is its text's tokens and the end token that sampling would stop at."""
    prompt, prompt_ids = encode_prompt(tokenizer, example.messages)
    end = int(tokenizer.eos_token_id)

    def response(text: str) -> "array[int]":
        return packed.token_ids([*tokenizer(text, add_special_tokens=False)["input_ids"], end])

    return Pair(
        uid=uid,
        round=round,
        prompt_ids=prompt_ids,
        chosen_ids=response(example.chosen),
        rejected_ids=response(example.rejected),
        prompt=prompt,
        chosen=example.chosen,
        rejected=example.rejected,
        p_chosen=1.0,
        chosen_version=round - 1,
        rejected_version=round - 1,
    )


class Encoder:
    """Examples at given places as pairs."""

    def __init__(self, examples: Sequence[PreferenceExample], tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises `InputError` for a tokenizer without an end token."""
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"policy.path = {tokenizer.name_or_path}: the tokenizer has no end token (eos_token); set it in "
                "tokenizer_config.json"
            )
        self._examples = examples
        self._tokenizer = tokenizer

    def pairs(self, places: Sequence[tuple[int, int, int]], round: int) -> list[Pair]:
        """Pairs of (place, pass, index of the example), their uids beginning with the place."""
        return [
            encode_pair(self._examples[index], self._tokenizer, f"{place:08d}-{self._examples[index].uid}", round)
            for place, _, index in places
        ]


class PreferencePairs:
    """The pairs of an offline training, segment by segment; nothing is encoded before its segment is due."""

    def __init__(
        self, examples: Sequence[PreferenceExample], tokenizer: "PreTrainedTokenizerBase", segments: Segments
    ) -> None:
        """Raises `InputError` for a tokenizer without an end token."""
        self._encoder = Encoder(examples, tokenizer)
        self._segments = segments

    def segment(self, round: int) -> tuple[list[Pair], int]:
        """Pairs of segment `round` in training order, their uids beginning with their place; none is unusable."""
        return self._encoder.pairs(self._segments.places(round), round), 0
