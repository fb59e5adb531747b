"""A preference set that is trained beside each round's own pairs: no end, pass after pass."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rlhf.config.offline import Anchor
from rlhf.data.preference_pairs import Encoder
from rlhf.data.preferences import PreferenceExample
from rlhf.data.prompts import content_hash
from rlhf.data.training_sets import read_preference_data
from rlhf.errors import InputError
from rlhf.records import Message, Pair
from rlhf.rounds.segments import Passes
from rlhf.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnchorPairs:
    """The set's pairs in endless order; nothing is encoded before it is asked for."""

    def __init__(
        self, examples: Sequence[PreferenceExample], tokenizer: "PreTrainedTokenizerBase", passes: Passes
    ) -> None:
        """Raises `InputError` for a tokenizer without an end token."""
        self._encoder = Encoder(examples, tokenizer)
        self._passes = passes

    def between(self, start: int, stop: int, round: int) -> list[Pair]:
        """The pairs at the places [start, stop) for `round`, their uids beginning with their place."""
        return self._encoder.pairs(self._passes.places(start, stop), round)


def read_anchor(
    options: Anchor, tokenizer: "PreTrainedTokenizerBase", seed: int, held_out: Iterable[Sequence[Message]]
) -> tuple[AnchorPairs, tuple[str, ...]]:
    """The pairs of the config section `anchor` without conversations that are `held_out`, and notes for the user.

    Raises `InputError` where the data cannot be read or no pair is left.
    """
    examples, notes = read_preference_data(options, "anchor")
    taken = {content_hash(_turns(messages)) for messages in held_out}
    kept = [example for example in examples if content_hash(_turns(example.messages)) not in taken]
    if not kept:
        raise InputError(
            f"anchor.path = {options.path!r}: every conversation is held out for the evaluation; use others"
        )
    if len(kept) < len(examples):
        notes = (*notes, f"anchor: {len(examples) - len(kept)} pairs left out: their conversations are held out")
    return AnchorPairs(kept, tokenizer, Passes(len(kept), derive_seed(seed, "anchor"))), notes


def _turns(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation without a system message: prompts may have got one from the config."""
    return tuple(message for message in messages if message["role"] != "system")
