"""From a row of any supported format to a conversation whose last turn is the user's."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.config.data import PromptFormat
from rlhf.errors import InputError
from rlhf.records import Message

Conversation = tuple[Message, ...]

# A turn starts with its speaker after a blank line, or at the very start; spaces around are tolerated.
_TURN = re.compile(r"(?:\A\s*|\n[^\S\n]*\n\s*)(Human|Assistant)[^\S\n]*:")
_LOOSE_TURN = re.compile(r"^[^\S\n]*(Human|Assistant)[^\S\n]*:", re.MULTILINE)
_ROLE = {"Human": "user", "Assistant": "assistant"}


def conversations(
    rows: Sequence[Mapping[str, Any]], *, column: str, format: PromptFormat, key: str = "prompts", path: str = ""
) -> Iterator[Conversation | None]:
    """The conversation of each row in order, None for a malformed row.

    A conversation is an optional system message and then strictly alternating user and assistant turns that end
    with the user's: many chat templates, and the pair judge, refuse any other. Only its last turn may be blank.

    Raises `InputError`, before the first row, where the needed column is missing or of no usable type.
    """
    resolved, column = resolve_format(rows, column=column, format=format, key=key, path=path)
    parse = {"text": _from_text, "messages": _from_messages, "hh_rlhf": _from_hh_rlhf}[resolved]
    return (parse(row.get(column)) for row in rows)


def resolve_format(
    rows: Sequence[Mapping[str, Any]], *, column: str, format: PromptFormat, key: str = "prompts", path: str = ""
) -> tuple[PromptFormat, str]:
    """The concrete format of a row set and the column it reads.

    `auto` goes by the first value of `column`: a string is `text`, a list is `messages`. Without that column, a
    set of `chosen` and `rejected` dialogues is `hh_rlhf`, or `messages` where the dialogues are lists.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if format == "auto" and column not in columns and {"chosen", "rejected"} <= set(columns):
        format, column = ("messages" if isinstance(_first(rows, "chosen"), list) else "hh_rlhf"), "chosen"
    elif format == "hh_rlhf":
        column = "chosen"
    if column not in columns:
        wanted = f"{key}.format = hh_rlhf" if format == "hh_rlhf" else f"{key}.column = {column}"
        raise InputError(f"{wanted}: {path or 'the data'} has no column {column!r}; its columns: {', '.join(columns)}")
    if format != "auto":
        return format, column
    value = _first(rows, column)
    if value is None or isinstance(value, str):
        return "text", column
    if isinstance(value, list):
        return "messages", column
    raise InputError(
        f"{key}.column = {column}: {path or 'the data'} holds {type(value).__name__} values there; "
        "expected strings or lists of {role, content}"
    )


def references(
    rows: Sequence[Mapping[str, Any]], *, column: str | None, key: str = "prompts", path: str = ""
) -> Iterator[str | None]:
    """The reference answer of each row in order, as text; None where the row has none, or `column` is None.

    Raises `InputError`, before the first row, where the column is missing or holds no text and no numbers.
    """
    if column is not None:
        where, data = f"{key}.reference = {column}", path or "the data"
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if column not in columns:
            raise InputError(f"{where}: {data} has no column {column!r}; its columns: {', '.join(columns)}")
        value = _first(rows, column)
        if value is not None and not isinstance(value, (str, int, float)):
            raise InputError(f"{where}: {data} holds {type(value).__name__} values there; expected text or numbers")
    return (_reference(row.get(column)) if column is not None else None for row in rows)


def _reference(value: Any) -> str | None:
    return str(value) if isinstance(value, (str, int, float)) else None


def parse_dialogue(text: str) -> Conversation | None:
    """The turns of a `\\n\\nHuman: ...\\n\\nAssistant: ...` dialogue, stripped; None where text precedes the first."""
    text = text.replace("\r\n", "\n")
    pieces = _TURN.split(text)
    if len(pieces) < 5:  # one turn at most: perhaps single line breaks separate them
        pieces = _LOOSE_TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        return None
    return tuple(
        Message(role=_ROLE[speaker], content=content.strip())
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    )


def message_list(value: Any) -> Conversation | None:
    """A list of {role, content}, both text, as messages; None for anything else."""
    if not isinstance(value, list):
        return None
    turns = []
    for item in value:
        if not isinstance(item, Mapping):
            return None
        role, content = item.get("role"), item.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        turns.append(Message(role=role, content=content))
    return tuple(turns)


def _first(rows: Sequence[Mapping[str, Any]], column: str) -> Any:
    return next((row[column] for row in rows if row.get(column) is not None), None)


def _from_text(value: Any) -> Conversation | None:
    return (Message(role="user", content=value),) if isinstance(value, str) else None


def _from_messages(value: Any) -> Conversation | None:
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    turns = message_list(value)
    if turns is None:
        return None
    return _checked(turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns)


def _from_hh_rlhf(value: Any) -> Conversation | None:
    turns = parse_dialogue(value) if isinstance(value, str) else None
    if turns is None:
        return None
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    return _checked(turns[:last])


def _checked(turns: Sequence[Message]) -> Conversation | None:
    """`turns` if they are a conversation as `conversations` defines it, else None."""
    start = 1 if turns and turns[0]["role"] == "system" else 0
    body = turns[start:]
    if len(body) % 2 == 0 or any(not turn["content"].strip() for turn in turns[:-1]):
        return None
    alternates = all(turn["role"] == ("assistant" if index % 2 else "user") for index, turn in enumerate(body))
    return tuple(turns) if alternates else None
