"""From rows to conversations: every format, what auto decides, what is malformed, which column is missing."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.formats import conversations, parse_dialogue, resolve_format
from rlhf.errors import InputError

HH_FILE = Path(__file__).parents[2] / "../shared/data/hh-rlhf/harmless-base-a.jsonl.gz"


def _one(row: dict[str, Any], format: Any = "auto") -> list[tuple[str, str]] | None:
    (found,) = conversations([row], column="prompt", format=format)
    return None if found is None else [(turn["role"], turn["content"]) for turn in found]


def _turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_text_is_one_user_turn_kept_as_it_is() -> None:
    assert _one({"prompt": " Hello\n"}) == [("user", " Hello\n")]
    assert _one({"prompt": None}, "text") is None
    assert _one({"prompt": 3}, "text") is None


def test_messages_end_with_the_users_turn() -> None:
    talk = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    assert _one({"prompt": _turns(*talk)}) == talk
    assert _one({"prompt": _turns(*talk, ("assistant", "d"))}) == talk
    assert _one({"prompt": json.dumps(_turns(*talk))}, "messages") == talk


@pytest.mark.parametrize(
    "value",
    [
        [],
        _turns(("assistant", "a")),
        _turns(("system", "a")),
        _turns(("user", "a"), ("user", "b")),
        _turns(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        _turns(("user", " "), ("assistant", "b"), ("user", "c")),
        _turns(("user", "a"), ("tool", "b"), ("user", "c")),
        _turns(("user", "a"), ("system", "b"), ("user", "c")),
        [{"role": "user", "content": None}],
        [{"from": "human", "value": "a"}],
        ["a"],
        "no JSON",
        '{"role": "user"}',
        7,
    ],
)
def test_malformed_messages(value: Any) -> None:
    assert _one({"prompt": value}, "messages") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nHuman: a\n\nAssistant: b", [("user", "a")]),
        ("\n\nHuman: a\n\nAssistant:", [("user", "a")]),
        ("Human:a\n\nAssistant:b\n\nHuman:c\n\nAssistant:d", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ("\r\n\r\nHuman: a\r\n\r\nAssistant: b", [("user", "a")]),
        ("\n \n Human : a\n\n\n\tAssistant:  b", [("user", "a")]),
        ("Human: a\nAssistant: b\nHuman: c\nAssistant: d", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", [("user", "a")]),
        ("\n\nHuman: see\nHuman: x\nAssistant: y\n\nAssistant: b", [("user", "see\nHuman: x\nAssistant: y")]),
        ("\n\nHuman: one\n\ntwo\n\nAssistant: b", [("user", "one\n\ntwo")]),
        ("\n\nHuman: \n\nAssistant: b", [("user", "")]),
        ("", None),
        ("no markers", None),
        ("\n\nHuman: a", None),
        ("\n\nAssistant: b", None),
        ("preamble\n\nHuman: a\n\nAssistant: b", None),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", None),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant: c", None),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", None),
        (5, None),
        (None, None),
    ],
)
def test_hh_rlhf_dialogues(text: Any, expected: list[tuple[str, str]] | None) -> None:
    assert _one({"chosen": text, "rejected": "x"}, "hh_rlhf") == expected


WORDS = st.text(st.characters(codec="utf-8", exclude_characters=":\r"), min_size=1).map(str.strip).filter(bool)


@given(st.lists(WORDS, min_size=2, max_size=8).map(lambda turns: turns[: len(turns) // 2 * 2]))
def test_a_written_dialogue_reads_back(contents: list[str]) -> None:
    speakers = ("Human", "Assistant")
    text = "".join(f"\n\n{speakers[i % 2]}: {content}" for i, content in enumerate(contents))
    roles = ("user", "assistant")
    written = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    assert list(parse_dialogue(text) or ()) == written
    (found,) = conversations([{"chosen": text}], column="prompt", format="hh_rlhf")
    assert list(found or ()) == written[:-1]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": None}, {"prompt": "a"}], ("text", "prompt")),
        ([{"prompt": [{"role": "user", "content": "a"}]}], ("messages", "prompt")),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], ("text", "prompt")),
        ([{"chosen": "b", "rejected": "c"}], ("hh_rlhf", "chosen")),
        ([{"chosen": [{}], "rejected": [{}]}], ("messages", "chosen")),
    ],
)
def test_auto_decides_by_the_columns(rows: list[dict[str, Any]], expected: tuple[str, str]) -> None:
    assert resolve_format(rows, column="prompt", format="auto") == expected


def test_rows_that_lack_the_column_are_malformed_only_where_others_have_it() -> None:
    rows = [{"prompt": "a"}, {"text": "b"}]
    assert [found is None for found in conversations(rows, column="prompt", format="auto")] == [False, True]


@pytest.mark.parametrize(
    ("row", "column", "format", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "prompt",
            "auto",
            "prompts.column = prompt: p.csv has no column 'prompt'; its columns: question, answer",
        ),
        (
            {"prompt": "a"},
            "text",
            "messages",
            "prompts.column = text: p.csv has no column 'text'; its columns: prompt",
        ),
        (
            {"prompt": "a"},
            "prompt",
            "hh_rlhf",
            "prompts.format = hh_rlhf: p.csv has no column 'chosen'; its columns: prompt",
        ),
        (
            {"prompt": 5},
            "prompt",
            "auto",
            "prompts.column = prompt: p.csv holds int values there; expected strings or lists of {role, content}",
        ),
    ],
)
def test_wrong_columns_are_named_before_the_first_row(
    row: dict[str, Any], column: str, format: Any, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        conversations([row], column=column, format=format, path="p.csv")
    assert str(caught.value) == message


@pytest.mark.skipif(not HH_FILE.is_file(), reason="the hh-rlhf sample is not here")
def test_real_hh_rlhf() -> None:
    rows = [json.loads(line) for line in gzip.decompress(HH_FILE.read_bytes()).decode().strip().split("\n")]
    found = list(conversations(rows, column="prompt", format="auto"))
    assert len(found) == 1156
    # The independent reading: four dialogues have a speaker twice in a row, all others alternate.
    good = [(row, turns) for row, turns in zip(rows, found, strict=True) if turns is not None]
    assert len(good) == 1152
    for row, turns in good:
        head = row["chosen"][: row["chosen"].rindex("\n\nAssistant:")]
        pieces = head.replace("\n\nAssistant:", "\n\nHuman:").split("\n\nHuman:")[1:]
        assert [turn["content"] for turn in turns] == [piece.strip() for piece in pieces]
        assert turns[-1]["role"] == "user"
