"""Parquet files of a round: exact round trips, and no pair is trained that is not the one that was sealed."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from rlhf.errors import RLHFError
from rlhf.packed import logprobs, token_ids
from rlhf.records import Comparison, Pair, Rollout, Verdict, VerdictState, VersionSpan
from rlhf.rounds.sealing import _read_column, read_rollouts, read_sealed, seal_pairs, write_rollouts, write_verdicts

CONTRACT = """uid, round, prompt_ids, chosen_ids, rejected_ids, prompt, chosen, rejected, p_chosen,
chosen_version, rejected_version""".replace("\n", " ").split(", ")

FEW = settings(max_examples=30, deadline=None)
FLOAT32 = st.floats(width=32, allow_nan=False)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(token_ids)
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
LOGPROBS = st.lists(FLOAT32, max_size=6).map(logprobs)
VERSION = st.integers(0, 2**31 - 1)
PAIRS = st.builds(
    Pair,
    uid=TEXT,
    round=st.integers(0, 9999),
    prompt_ids=IDS,
    chosen_ids=IDS,
    rejected_ids=IDS,
    prompt=TEXT,
    chosen=TEXT,
    rejected=TEXT,
    p_chosen=st.floats(0, 1),
    chosen_version=VERSION,
    rejected_version=VERSION,
    chosen_logprobs=LOGPROBS,
    rejected_logprobs=LOGPROBS,
)
SPANS = st.lists(st.builds(VersionSpan, VERSION, VERSION, VERSION), max_size=3).map(tuple)
ROLLOUTS = st.builds(
    Rollout,
    uid=TEXT,
    k=st.integers(0, 99),
    token_ids=IDS,
    logprobs=LOGPROBS,
    text=TEXT,
    finish_reason=st.sampled_from(["stop", "length"]),
    versions=SPANS,
)


def pair(uid: str = "u-0", chosen: tuple[int, ...] = (5, 2), rejected: tuple[int, ...] = (6,)) -> Pair:
    ids, scores = [token_ids(each) for each in ((1, 9), chosen, rejected)], logprobs([-0.5] * len(chosen))
    return Pair(uid, 3, *ids, "Hi é", "yes", "no", 0.75, 2, 1, scores, logprobs([]))


def same_bits(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    """Equal to the bit, so that -0.0 is not 0.0."""
    return [value.hex() for value in first] == [value.hex() for value in second]


@FEW
@given(pairs=st.lists(PAIRS, max_size=5))
def test_pairs_come_back_exactly(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "pairs-property.parquet"
    digest = seal_pairs(path, pairs)
    sealed = read_sealed(path, 3, digest)
    assert (sealed.round, sealed.digest) == (3, digest)
    assert sorted(map(repr, sealed.pairs)) == sorted(map(repr, pairs))  # repr tells -0.0 from 0.0


@FEW
@given(rollouts=st.lists(ROLLOUTS, max_size=5, unique_by=lambda item: (item.uid, item.k)))
def test_rollouts_come_back_exactly(rollouts: list[Rollout], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "rollouts-property.parquet"
    write_rollouts(path, rollouts)
    assert list(map(repr, read_rollouts(path))) == [
        repr(item) for item in sorted(rollouts, key=lambda item: (item.uid, item.k))
    ]


@FEW
@given(bits=st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_every_float32_log_prob_survives(bits: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any bit pattern but NaN's: subnormals, both zeros and the infinities included."""
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    logprobs = tuple(values[~np.isnan(values)].tolist())
    path = tmp_path_factory.getbasetemp() / "floats.parquet"
    [back] = read_sealed(path, 3, seal_pairs(path, [replace(pair(), chosen_logprobs=logprobs)])).pairs
    assert same_bits(back.chosen_logprobs, logprobs)


def test_columns_are_the_contract_s_and_every_field_of_the_record(tmp_path: Path) -> None:
    seal_pairs(tmp_path / "pairs.parquet", [pair()])
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.column_names[: len(CONTRACT)] == CONTRACT
    assert set(table.column_names) == set(Pair.__struct_fields__)
    [row] = table.to_pylist()
    assert row["chosen_ids"] == [5, 2]
    assert (row["prompt"], row["p_chosen"], row["chosen_version"], row["rejected_version"]) == ("Hi é", 0.75, 2, 1)


def test_the_digest_is_the_file_s_and_does_not_depend_on_the_order_of_judging(tmp_path: Path) -> None:
    """Prompts are judged in the order they finish in; a round sealed again must be the same round."""
    pairs = [pair("b"), pair("a", (1,), (2,)), pair("a", (1,), (1,)), pair("a", (0, 7), (9,))]
    digests = {seal_pairs(tmp_path / "pairs.parquet", order) for order in (pairs, pairs[::-1], pairs[2:] + pairs[:2])}
    assert digests == {hashlib.sha256((tmp_path / "pairs.parquet").read_bytes()).hexdigest()}
    assert digests != {seal_pairs(tmp_path / "other.parquet", [*pairs[1:], pair("b", (5, 3))])}


def test_a_round_without_pairs_is_sealed_too(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    sealed = read_sealed(path, 8, seal_pairs(path, []))
    assert (sealed.round, sealed.pairs) == (8, ())
    assert pq.read_table(path).column_names[: len(CONTRACT)] == CONTRACT


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    digest = seal_pairs(path, [pair(), pair("v")])
    whole = path.read_bytes()
    for position in [*range(0, len(whole), 23), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(RLHFError, match=r"pairs\.parquet: the sealed pairs of round 3 have changed") as error:
            read_sealed(path, 3, digest)
    assert "\n" not in str(error.value)
    path.write_bytes(whole)
    assert read_sealed(path, 3, digest).pairs == (pair(), pair("v"))


def test_another_round_s_file_is_not_taken(tmp_path: Path) -> None:
    digest = seal_pairs(tmp_path / "pairs.parquet", [pair()])
    seal_pairs(tmp_path / "pairs.parquet", [pair("other")])
    with pytest.raises(RLHFError, match="have changed"):
        read_sealed(tmp_path / "pairs.parquet", 3, digest)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RLHFError, match=r"pairs\.parquet: the sealed pairs of round 3 are missing"):
        read_sealed(tmp_path / "pairs.parquet", 3, "0" * 64)


def test_spans_stand_in_the_rollouts(tmp_path: Path) -> None:
    spans = (VersionSpan(4, 0, 3), VersionSpan(5, 3, 4))
    rollouts = [Rollout("u", k, (1, 2, 3, 4), (-1.0,) * 4, "text", "length", spans) for k in (10, 2)]
    write_rollouts(tmp_path / "rollouts.parquet", rollouts)
    back = read_rollouts(tmp_path / "rollouts.parquet")
    assert [item.k for item in back] == [2, 10]  # by number, not by text
    assert back[0].versions == spans
    assert back[0].oldest_version == 4


def test_verdicts_are_written_whole(tmp_path: Path) -> None:
    def comparison(uid: str, a: int, b: int) -> Comparison:
        return Comparison(uid, (), "text a", "text b", a, b)

    verdicts = [
        Verdict(comparison("v", 0, 1), 0.9, 0.8, VerdictState.WIN, 0.5, -0.25),
        Verdict(comparison("u", 2, 3), math.nan, math.nan, VerdictState.INVALID, reason="empty answer"),
        Verdict(comparison("u", 0, 10), 0.7, 0.2, VerdictState.TIE),
        Verdict(comparison("u", 0, 2), 0.1, 0.2, VerdictState.LOSE),
    ]
    write_verdicts(tmp_path / "verdicts.parquet", verdicts)
    rows = pq.read_table(tmp_path / "verdicts.parquet").to_pylist()
    assert [(row["uid"], row["index_a"], row["index_b"], row["state"]) for row in rows] == [
        ("u", 0, 2, "lose"),
        ("u", 0, 10, "tie"),
        ("u", 2, 3, "invalid"),
        ("v", 0, 1, "win"),
    ]
    assert (rows[1]["p_ab"], rows[1]["p_ba"], rows[1]["score_a"]) == (0.7, 0.2, None)
    assert math.isnan(rows[2]["p_ab"])
    assert math.isnan(rows[2]["p_ba"])
    assert rows[2]["reason"] == "empty answer"
    assert (rows[3]["score_a"], rows[3]["score_b"]) == (0.5, -0.25)
    write_verdicts(tmp_path / "verdicts.parquet", [])
    assert pq.read_table(tmp_path / "verdicts.parquet").num_rows == 0


def test_files_of_many_row_groups_are_read_whole(tmp_path: Path) -> None:
    """As other tools may write them again, and as Arrow reads large ones: in several pieces."""
    rollouts = [
        Rollout("u", k, token_ids(range(k % 5)), logprobs([-0.5] * (k % 5)), "t", "stop", ()) for k in range(40)
    ]
    path = tmp_path / "rollouts.parquet"
    write_rollouts(path, rollouts)
    pq.write_table(pq.read_table(path).slice(3), path, row_group_size=7)
    assert read_rollouts(path) == rollouts[3:]


def test_a_piece_that_begins_in_the_middle_is_read_from_there() -> None:
    column = pa.chunked_array([pa.array([[1, 2], [], [3], [4, 5]], type=pa.list_(pa.int32()))])
    assert _read_column(column.slice(2)) == [token_ids([3]), token_ids([4, 5])]
    assert _read_column(column.slice(4)) == []
