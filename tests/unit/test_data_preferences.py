"""Preference sets: every layout, what METHODS keeps, what is dropped and why, what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.preferences import DROP_REASONS, PreferenceSet, load_preferences
from rlhf.data.prompts import content_hash
from rlhf.errors import InputError
from rlhf.records import Message
from rlhf.rounds.sealing import PAIR_SCHEMA

HH_FILE = Path(__file__).parents[2] / "../shared/data/hh-rlhf/harmless-base-a.jsonl.gz"
U1, A1, U2 = ("user", "one"), ("assistant", "two"), ("user", "three")


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def says(text: str) -> tuple[str, str]:
    return ("assistant", text)


def load(folder: Path, *rows: dict[str, Any], **options: Any) -> PreferenceSet:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_preferences(str(path), **options)


def shape(found: PreferenceSet) -> list[tuple[list[dict[str, str]], str, str]]:
    return [([dict(turn) for turn in each.messages], each.chosen, each.rejected) for each in found.examples]


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"prompt": "one", "chosen": "good", "rejected": "bad"}, [U1]),
        ({"prompt": turns(U1, A1, U2), "chosen": "good", "rejected": "bad"}, [U1, A1, U2]),
        ({"prompt": turns(U1), "chosen": turns(says("good")), "rejected": turns(says("bad"))}, [U1]),
        ({"prompt": "one", "chosen": turns(U1, says("good")), "rejected": turns(U1, says("bad"))}, [U1]),
        # the prompt is the first user text of a longer dialogue, or follows a system message
        (
            {
                "prompt": "one",
                "chosen": turns(U1, A1, U2, says("good")),
                "rejected": turns(U1, A1, U2, says("bad")),
            },
            [U1, A1, U2],
        ),
        (
            {
                "prompt": "one",
                "chosen": turns(("system", "s"), U1, says("good")),
                "rejected": turns(("system", "s"), U1, says("bad")),
            },
            [("system", "s"), U1],
        ),
        ({"chosen": turns(U1, says("good")), "rejected": turns(U1, says("bad"))}, [U1]),
        ({"chosen": "one good", "rejected": "one bad"}, [U1]),
        (
            {
                "chosen": "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: good",
                "rejected": "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: bad",
            },
            [U1, A1, U2],
        ),
        ({"prompt": "\n\nHuman: one\n\nAssistant:", "chosen": " good", "rejected": " bad"}, [U1]),
        ({"prompt": "one", "a": "good", "b": "bad", "label": "a"}, [U1]),
        ({"prompt": "one", "a": "bad", "b": "good", "label": " B"}, [U1]),
    ],
)
def test_layouts_found_by_auto(tmp_path: Path, row: dict[str, Any], context: list[tuple[str, str]]) -> None:
    found = load(tmp_path, row)
    assert shape(found) == [(turns(*context), "good", "bad")]
    assert set(found.dropped) == set(DROP_REASONS)
    assert not any(found.dropped.values())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "one", "chosen": "same ", "rejected": "same"}, "identical"),
        ({"prompt": "one", "chosen": "", "rejected": "bad"}, "blank"),
        ({"prompt": " ", "chosen": "good", "rejected": "bad"}, "blank"),
        ({"prompt": turns(U1, says(" "), U2), "chosen": "good", "rejected": "bad"}, "blank"),
        ({"prompt": "one", "chosen": None, "rejected": "bad"}, "malformed"),
        ({"prompt": "one", "chosen": "good", "rejected": 3}, "malformed"),
        ({"prompt": "one", "chosen": turns(U1), "rejected": "bad"}, "malformed"),
        ({"prompt": [], "chosen": "good", "rejected": "bad"}, "malformed"),
        ({"prompt": [{"role": "user", "content": ["x"]}], "chosen": "good", "rejected": "bad"}, "malformed"),
        ({"prompt": turns(U1, A1), "chosen": "good", "rejected": "bad"}, "roles"),
        ({"prompt": turns(U1, U2), "chosen": "good", "rejected": "bad"}, "roles"),
        ({"prompt": turns(U1, U1, U2), "chosen": "good", "rejected": "bad"}, "roles"),
        ({"prompt": turns(U1, ("system", "s"), U2), "chosen": "good", "rejected": "bad"}, "roles"),
        ({"prompt": "x", "chosen": turns(U1, says("good")), "rejected": turns(U1, says("bad"))}, "context"),
        ({"prompt": "one", "chosen": turns(U1, says("good")), "rejected": turns(U2, says("bad"))}, "context"),
    ],
)
def test_what_is_dropped_is_counted_by_reason(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    found = load(tmp_path, {"prompt": "keep", "chosen": "good", "rejected": "bad"}, row)
    assert shape(found) == [(turns(("user", "keep")), "good", "bad")]
    assert found.dropped == dict.fromkeys(DROP_REASONS, 0) | {reason: 1}


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "context"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: d", "roles"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "blank"),
        ("\n\nHuman: a\n\nAssistant: b", "no dialogue", "malformed"),
        ("\n\nAssistant: b", "\n\nAssistant: c", "roles"),
    ],
)
def test_dropped_dialogues(tmp_path: Path, chosen: str, rejected: str, reason: str) -> None:
    keep = {"chosen": "\n\nHuman: a\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nAssistant: bad"}
    found = load(tmp_path, keep, {"chosen": chosen, "rejected": rejected})
    assert len(found.examples) == 1
    assert found.dropped[reason] == 1


def test_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "a": "x", "b": "y", "label": label} for label in ("A", "tie", "1", 1)]
    found = load(tmp_path, *rows)
    assert (len(found.examples), found.dropped["no_preference"], found.dropped["malformed"]) == (1, 1, 2)


def test_subset_row_reference_and_uid(tmp_path: Path) -> None:
    bad = {"prompt": "p", "chosen": "x", "rejected": "x", "subset": "s", "kind": 1}
    good = {"prompt": "p", "chosen": "x", "rejected": "y", "subset": "s", "kind": 1, "reference": "4"}
    swapped = {"prompt": "p", "chosen": "y", "rejected": "x", "kind": 2}
    first, second = load(tmp_path, bad, good, swapped).examples
    assert (first.row, first.subset, first.reference) == (1, "s", "4")
    assert (second.row, second.subset, second.reference) == (2, None, None)
    assert [each.subset for each in load(tmp_path, good, swapped, subset_column="kind").examples] == ["1", "2"]
    texts = [("user", "p"), ("chosen", "x"), ("rejected", "y")]
    assert first.uid == content_hash([Message(role=role, content=text) for role, text in texts])
    assert first.uid != second.uid


@given(st.text(st.sampled_from("ab \n"), max_size=12), st.text(st.sampled_from("ab \n"), max_size=12))
def test_implicit_texts_lose_nothing(tmp_path_factory: pytest.TempPathFactory, left: str, right: str) -> None:
    rows = [{"chosen": "keep a", "rejected": "keep b"}, {"chosen": left, "rejected": right}]
    found = load(tmp_path_factory.mktemp("implicit"), *rows)
    assert len(found.examples) + sum(found.dropped.values()) == 2
    for each in found.examples[1:]:
        prompt = each.messages[0]["content"]
        assert left.strip().startswith(prompt)
        assert left.endswith(each.chosen)
        assert right.endswith(each.rejected)
        assert len(prompt.split()) + len(each.chosen.split()) == len(left.split())


def test_sealed_pairs_of_a_run_are_refused(tmp_path: Path) -> None:
    values: dict[str, Any] = {"uid": "u", "prompt": "<|im_start|>user", "chosen": "x", "rejected": "y"}
    row = {name: values.get(name) for name in PAIR_SCHEMA.names}
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([row], schema=PAIR_SCHEMA), path)
    with pytest.raises(InputError, match=r"data\.path = .*rendered chat templates"):
        load_preferences(str(path))


TALK = {"prompt": [U1, A1, U2], "chosen": [says("good")], "rejected": [says("bad")]}


@pytest.mark.parametrize("columns", [("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt",)])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_messages_as_json_texts(tmp_path: Path, kind: str, columns: tuple[str, ...]) -> None:
    """All three columns; whole dialogues; a prompt beside plain texts, of which one looks like a list."""
    talk = dict(TALK)
    if "prompt" not in columns:
        talk = {"chosen": [U1, A1, U2, says("good")], "rejected": [U1, A1, U2, says("bad")]}
    good = {name: json.dumps(turns(*pairs)) for name, pairs in talk.items()}
    if "chosen" not in columns:
        good |= {"chosen": "[good]", "rejected": "bad"}
    # Cut off by the program that wrote it: never a user's text of its own.
    rows = [good, good | {columns[0]: good[columns[0]][:-3]}]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(good))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = load_preferences(str(path))
    chosen = "good" if "chosen" in columns else "[good]"
    assert shape(found) == [(turns(U1, A1, U2), chosen, "bad")]
    assert found.dropped == dict.fromkeys(DROP_REASONS, 0) | {"malformed": 1}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}], {}, "no preferences in its columns (text)"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], {}, "no usable preference in 1 rows read as explicit"),
        ([{"chosen": "a b", "rejected": "a c"}], {"format": "explicit"}, "has no column 'prompt'"),
        ([{"chosen": "a b", "rejected": "a c"}], {"format": "xml"}, "pref.format = xml: expected one of auto"),
        ([{"chosen": "a b", "rejected": "a c"}], {"subset_column": "kind"}, "no subset column 'kind'"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, *rows, key="pref", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pref." in str(caught.value)


@pytest.mark.skipif(not HH_FILE.exists(), reason="needs ../shared/data")
def test_hh_rlhf_file() -> None:
    found = load_preferences(str(HH_FILE))
    assert (len(found.examples), found.dropped["context"], found.dropped["blank"]) == (1149, 5, 2)
    for each in found.examples:
        assert [turn["role"] for turn in each.messages] == ["user", "assistant"] * (len(each.messages) // 2) + ["user"]
