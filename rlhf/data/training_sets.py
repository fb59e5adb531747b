"""A preference set as a training set and what is held out of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config.offline import PreferenceData, TrainingData
from rlhf.data.preferences import PreferenceExample, load_preferences
from rlhf.data.prompts import content_hash
from rlhf.errors import InputError


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Examples to train on, examples to measure on, and what a user should know of both."""

    train: tuple[PreferenceExample, ...]
    held_out: tuple[PreferenceExample, ...]
    notes: tuple[str, ...]


def read_training_set(data: TrainingData, key: str) -> TrainingSet:
    """Read the pairs of the config section `key`; none of the held-out conversations is trained on.

    Raises `InputError` where the data cannot be read or none is left to train on.
    """
    notes: list[str] = []
    examples = _load(data, key, notes)
    if data.held_out is not None:
        held_out, known = _load(data.held_out, f"{key}.held_out", notes), examples
    else:
        split = max(0, len(examples) - data.held_out_count)
        held_out, known = examples[split:], examples[:split]
    train = without_conversations(known, held_out)
    if len(train) < len(known):
        notes.append(f"{key}: {len(known) - len(train)} pairs left out: their conversations are held out")
    if not train:
        raise InputError(
            f"{key}.path = {data.path!r}: of {len(examples)} usable pairs none is left to train on; hold out fewer "
            f"({key}.held_out_count = {data.held_out_count}) or others"
        )
    return TrainingSet(train, held_out, tuple(notes))


def read_preference_data(data: PreferenceData, key: str) -> tuple[tuple[PreferenceExample, ...], tuple[str, ...]]:
    """All usable pairs of the config section `key`, and what a user should know of them.

    Raises `InputError` where the data cannot be read or holds no usable pair.
    """
    notes: list[str] = []
    return _load(data, key, notes), tuple(notes)


def without_conversations(
    examples: Sequence[PreferenceExample], held_out: Sequence[PreferenceExample]
) -> tuple[PreferenceExample, ...]:
    """The examples whose conversation none of `held_out` has: other responses to it would give its answers away."""
    taken = {content_hash(example.messages) for example in held_out}
    return tuple(example for example in examples if content_hash(example.messages) not in taken)


def _load(data: PreferenceData, key: str, notes: list[str]) -> tuple[PreferenceExample, ...]:
    found = load_preferences(data.path, split=data.split, name=data.name, format=data.format, key=key)
    dropped = [f"{count} {reason.replace('_', ' ')}" for reason, count in found.dropped.items() if count]
    if dropped:
        notes.append(f"{key}: rows left out: {', '.join(dropped)}")
    return found.examples[: data.limit]
