"""Preference sets: rows of any common layout as a conversation, a chosen and a rejected response."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.data.formats import message_list, parse_dialogue
from rlhf.data.prompts import content_hash
from rlhf.data.rows import Row, load_rows
from rlhf.errors import InputError
from rlhf.records import Message

PreferenceFormat = Literal["auto", "explicit", "implicit", "hh_rlhf", "labelled"]
DROP_REASONS = ("malformed", "context", "roles", "blank", "identical", "no_preference")


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """One usable preference: `chosen` answers `messages`, whose last turn is the user's, better than `rejected`.

    `uid` is 16 hexadecimal digits over the conversation and both texts, `row` the row's index in the data. The
    responses are as the data has them, except that the turns of hh_rlhf dialogues are stripped.
    """

    uid: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    subset: str | None
    row: int
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class PreferenceSet:
    """Usable examples in row order, and how many rows were dropped for each of `DROP_REASONS`.

    malformed: a value that is missing or of another type; context: the two sides answer different conversations;
    roles: not strictly user and assistant in turn (after an optional system message) up to a last user turn;
    blank: an empty turn or response; identical: equal responses; no_preference: labelled a tie.
    """

    examples: tuple[PreferenceExample, ...]
    dropped: dict[str, int]


def load_preferences(
    path: str,
    *,
    split: str = "train",
    name: str | None = None,
    format: PreferenceFormat = "auto",
    key: str = "data",
    subset_column: str | None = None,
) -> PreferenceSet:
    """The preferences of a JSONL, JSON, Parquet or CSV file or a Hugging Face dataset (see `load_rows`).

    Formats: `explicit` is TRL's prompt, chosen, rejected (strings or lists of {role, content}; responses may repeat
    the prompt); `implicit` is TRL's chosen and rejected that share a beginning (lists of messages that differ in the
    last one, or strings whose common whole words are the prompt); `hh_rlhf` is chosen and rejected
    `\\n\\nHuman: ...\\n\\nAssistant: ...` dialogues, or such a prompt beside two responses; `labelled` is prompt, a, b
    and a label that is a, b or tie. `auto` goes by the columns and the first row.

    Rows kept follow METHODS §1: same context on both sides, strict alternation, nothing empty; see `PreferenceSet`.
    CSV files, and some Parquet files, hold lists of messages as JSON: where the first value of prompt, chosen or
    rejected is such a text, the whole column is read so.

    The subset is read from `subset_column`, by default `subset` where there is one.

    Raises `InputError`, blaming the config section `key`, where the data cannot be read, lacks a column, or no row is
    usable. The pairs.parquet of a run is refused: its prompts are rendered templates, not conversations.
    """
    rows = _parse_json(load_rows(path, split=split, name=name, key=key))
    columns = set().union(*rows)
    where = f"{key}.path = {path}"
    if {"prompt_ids", "chosen_ids", "rejected_ids"} <= columns:
        raise InputError(
            f"{where}: these are the sealed pairs of a run, whose prompts are rendered chat templates; give a "
            "preference set with prompts as text or messages"
        )
    resolved = _resolve(rows, columns, format, key, where)
    if subset_column is not None and subset_column not in columns:
        raise InputError(f"{where}: no subset column {subset_column!r}; its columns: {', '.join(sorted(columns))}")
    examples: list[PreferenceExample] = []
    dropped = dict.fromkeys(DROP_REASONS, 0)
    for index, row in enumerate(rows):
        found = _example(row, index, _PARSERS[resolved], subset_column or "subset")
        if isinstance(found, str):
            dropped[found] += 1
        else:
            examples.append(found)
    if not examples:
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise InputError(
            f"{where}: no usable preference in {len(rows)} rows read as {resolved} ({counts}); "
            f"check the rows and {key}.format"
        )
    return PreferenceSet(tuple(examples), dropped)


_Sides = tuple[tuple[Message, ...], str, str]
_COLUMNS: dict[str, tuple[str, ...]] = {
    "explicit": ("prompt", "chosen", "rejected"),
    "implicit": ("chosen", "rejected"),
    "hh_rlhf": ("chosen", "rejected"),
    "labelled": ("prompt", "a", "b", "label"),
}


def _resolve(rows: Sequence[Row], columns: set[str], format: PreferenceFormat, key: str, where: str) -> str:
    """The concrete format; refuses an unknown one and data without its columns."""
    resolved: str = format
    if format == "auto":
        resolved = next((kind for kind in ("labelled", "explicit", "implicit") if columns >= set(_COLUMNS[kind])), "")
        text = _first(rows, "prompt" if resolved == "explicit" else "chosen")
        if (resolved == "explicit" and _is_dialogue(text) and text.rstrip().endswith("Assistant:")) or (
            resolved == "implicit" and _is_dialogue(text)
        ):
            resolved = "hh_rlhf"
    shown = ", ".join(sorted(columns))
    if not resolved:
        raise InputError(
            f"{where}: no preferences in its columns ({shown}); expected prompt, chosen and rejected, or chosen and "
            "rejected, or prompt, a, b and label"
        )
    if resolved not in _COLUMNS:
        raise InputError(f"{key}.format = {format}: expected one of auto, {', '.join(_COLUMNS)}")
    missing = [column for column in _COLUMNS[resolved] if column not in columns]
    if missing:
        raise InputError(f"{key}.format = {format}: {where} has no column {missing[0]!r}; its columns: {shown}")
    return resolved


def _first(rows: Sequence[Row], column: str) -> Any:
    return next((row[column] for row in rows if row.get(column) is not None), None)


def _parse_json(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows with columns of messages in JSON as lists; a value there that is none becomes None: malformed."""
    found = [column for column in ("prompt", "chosen", "rejected") if _json_messages(_first(rows, column)) is not None]
    if not found:
        return rows
    return [row | {column: _json_messages(row.get(column)) for column in found} for row in rows]


def _json_messages(value: Any) -> list[Any] | None:
    """The list that a text holds as JSON; None unless its items are {role, content}."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        parsed = json.loads(value)
    except ValueError:
        return None
    return parsed if message_list(parsed) else None


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and parse_dialogue(value) is not None


def _example(row: Row, index: int, parse: Callable[[Row], _Sides | str], subset_column: str) -> PreferenceExample | str:
    """The example of a row, or the reason why it is dropped."""
    sides = parse(row)
    if isinstance(sides, str):
        return sides
    messages, chosen, rejected = sides
    if reason := _objection(messages, chosen, rejected):
        return reason
    both = (Message(role="chosen", content=chosen), Message(role="rejected", content=rejected))
    subset, reference = row.get(subset_column), row.get("reference")
    return PreferenceExample(
        uid=content_hash((*messages, *both)),
        messages=messages,
        chosen=chosen,
        rejected=rejected,
        subset=None if subset is None else str(subset),
        row=index,
        reference=None if reference is None else str(reference),
    )


def _objection(messages: Sequence[Message], chosen: str, rejected: str) -> str:
    """Why METHODS §1 does not keep this row; empty if it does."""
    if not alternates(messages):
        return "roles"
    if not all(text.strip() for text in (chosen, rejected, *(turn["content"] for turn in messages))):
        return "blank"
    return "identical" if chosen.strip() == rejected.strip() else ""


def _explicit(row: Row) -> _Sides | str:
    prompt, chosen, rejected = read_prompt(row.get("prompt")), _answer(row.get("chosen")), _answer(row.get("rejected"))
    if prompt is None or chosen is None or rejected is None:
        return "malformed"
    (head, chosen_text), (other, rejected_text) = chosen, rejected
    if head != other:
        return "context"
    # Some sets repeat the conversation in front of each response; the prompt is then its beginning or its end.
    if head and prompt not in (head[: len(prompt)], head[-len(prompt) :]):
        return "context"
    return head or prompt, chosen_text, rejected_text


def _implicit(row: Row) -> _Sides | str:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_texts(chosen, rejected)
    left, right = message_list(chosen), message_list(rejected)
    if not left or not right:
        return "malformed"
    return _split_dialogues(left, right)


def _hh_rlhf(row: Row) -> _Sides | str:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return "malformed"
    if row.get("prompt") is not None:
        prompt = parse_dialogue(row["prompt"]) if isinstance(row["prompt"], str) else None
        if prompt is None or prompt[-1] != Message(role="assistant", content=""):
            return "malformed"
        return prompt[:-1], chosen.strip(), rejected.strip()
    left, right = parse_dialogue(chosen), parse_dialogue(rejected)
    if left is None or right is None:
        return "malformed"
    return _split_dialogues(left, right)


def _labelled(row: Row) -> _Sides | str:
    prompt, a, b, label = read_prompt(row.get("prompt")), row.get("a"), row.get("b"), row.get("label")
    if prompt is None or not isinstance(a, str) or not isinstance(b, str) or not isinstance(label, str):
        return "malformed"
    sides = {"a": (prompt, a, b), "b": (prompt, b, a)}
    label = label.strip().lower()
    return "no_preference" if label == "tie" else sides.get(label, "malformed")


def _split_dialogues(left: tuple[Message, ...], right: tuple[Message, ...]) -> _Sides | str:
    """Both dialogues' shared context and last turns, which have to be the assistant's."""
    if left[-1]["role"] != "assistant" or right[-1]["role"] != "assistant":
        return "roles"
    if left[:-1] != right[:-1]:
        return "context"
    return left[:-1], left[-1]["content"], right[-1]["content"]


def _split_texts(chosen: str, rejected: str) -> _Sides | str:
    """The words that both texts begin with are the prompt; what is left of each is the response."""
    same = next(
        (index for index, (left, right) in enumerate(zip(chosen, rejected, strict=False)) if left != right),
        min(len(chosen), len(rejected)),
    )
    while same and not chosen[same - 1].isspace():
        same -= 1
    prompt = chosen[:same].strip()
    if chosen.strip() == rejected.strip():
        return "identical"
    return ((Message(role="user", content=prompt),), chosen[same:], rejected[same:]) if prompt else "context"


def alternates(messages: Sequence[Message]) -> bool:
    """After an optional system message, user and assistant take turns from a first to a last user turn."""
    body = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = all(turn["role"] == ("assistant" if index % 2 else "user") for index, turn in enumerate(body))
    return len(body) % 2 == 1 and roles


def read_prompt(value: Any) -> tuple[Message, ...] | None:
    """A prompt that is text or a non-empty list of {role, content}; None for anything else."""
    return (Message(role="user", content=value),) if isinstance(value, str) else message_list(value) or None


def _answer(value: Any) -> tuple[tuple[Message, ...], str] | None:
    """The turns in front of a response, if any, and its text; None unless it is the assistant's."""
    if isinstance(value, str):
        return (), value
    turns = message_list(value)
    return (turns[:-1], turns[-1]["content"]) if turns and turns[-1]["role"] == "assistant" else None


_PARSERS: dict[str, Callable[[Row], _Sides | str]] = {
    "explicit": _explicit,
    "implicit": _implicit,
    "hh_rlhf": _hh_rlhf,
    "labelled": _labelled,
}
