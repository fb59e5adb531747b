"""A round's files: rollouts, verdicts and pairs as Parquet, the pairs sealed under a digest.

What is trained is what is read back from the sealed file, on the first try and on every replay.
"""

import hashlib
import io
import itertools
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.errors import RLHFError
from rlhf.files import write_atomic
from rlhf.packed import IDS, LOGPROBS, Lists, cut, join
from rlhf.records import Comparison, Pair, Rollout, SealedRound, Verdict, VerdictState, VersionSpan

_IDS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float32())
PAIR_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("round", pa.int32()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("p_chosen", pa.float64()),
        ("chosen_version", pa.int32()),
        ("rejected_version", pa.int32()),
        ("chosen_logprobs", _LOGPROBS),
        ("rejected_logprobs", _LOGPROBS),
    ]
)
ROLLOUT_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("k", pa.int32()),
        ("token_ids", _IDS),
        ("logprobs", _LOGPROBS),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("versions", pa.list_(pa.struct([("version", pa.int32()), ("start", pa.int32()), ("end", pa.int32())]))),
    ]
)
VERDICT_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("index_a", pa.int32()),
        ("index_b", pa.int32()),
        ("p_ab", pa.float64()),
        ("p_ba", pa.float64()),
        ("state", pa.string()),
        ("score_a", pa.float64()),
        ("score_b", pa.float64()),
        ("reason", pa.string()),
        ("truncated", pa.bool_()),
    ]
)

_KINDS = {pa.int32(): IDS, pa.float32(): LOGPROBS}
_MATCH_FIELDS = ("uid", "index_a", "index_b")
_VERDICT_FIELDS = ("p_ab", "p_ba", "score_a", "score_b", "reason", "truncated")


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> str:
    """Write rollouts in the order (uid, k) and return the file's SHA-256."""
    ordered = sorted(rollouts, key=lambda item: (item.uid, item.k))
    columns: dict[str, Sequence[Any] | pa.Array] = {name: _values(ordered, name) for name in ROLLOUT_SCHEMA.names}
    columns["versions"] = _spans([rollout.versions for rollout in ordered])
    return _write(path, _parquet(columns, ROLLOUT_SCHEMA))


def read_rollouts(path: Path) -> list[Rollout]:
    """Read what `write_rollouts` wrote."""
    table = pq.read_table(path)
    columns = {name: _read_column(table.column(name)) for name in ROLLOUT_SCHEMA.names}
    columns["versions"] = [tuple(VersionSpan(**span) for span in spans) for spans in columns["versions"]]
    return list(map(Rollout, *columns.values()))


def write_verdicts(path: Path, verdicts: Sequence[Verdict]) -> str:
    """Write verdicts and return the file's SHA-256; the texts stand in the rollouts."""
    ordered = sorted(verdicts, key=lambda item: _match(item.comparison))
    matches = zip(*(_match(verdict.comparison) for verdict in ordered), strict=True)
    columns: dict[str, Sequence[Any] | pa.Array] = dict(zip(_MATCH_FIELDS, matches, strict=True)) if ordered else {}
    columns |= {name: _values(ordered, name) for name in _VERDICT_FIELDS}
    columns["state"] = [str(verdict.state) for verdict in ordered]
    return _write(path, _parquet(columns, VERDICT_SCHEMA))


def read_verdicts(path: Path) -> list[Verdict]:
    """Read what `write_verdicts` wrote: comparisons without their texts; of one comparison in the order of judging."""
    return [
        Verdict(
            Comparison(row["uid"], (), "", "", row["index_a"], row["index_b"]),
            state=VerdictState(row["state"]),
            **{name: row[name] for name in _VERDICT_FIELDS},
        )
        for row in pq.read_table(path).to_pylist()
    ]


def seal_pairs(path: Path, pairs: Sequence[Pair]) -> str:
    """Write pairs in the order (uid, chosen, rejected) and return the file's SHA-256."""
    return _write(path, pair_bytes(pairs))


def pair_bytes(pairs: Sequence[Pair]) -> bytes:
    """The sealed file of these pairs, in whatever order they come: the same one as long as Arrow and this code are."""
    ordered = sorted(pairs, key=lambda pair: (pair.uid, pair.chosen_ids, pair.rejected_ids))
    return _parquet({name: _values(ordered, name) for name in PAIR_SCHEMA.names}, PAIR_SCHEMA)


def read_sealed(path: Path, round: int, digest: str) -> SealedRound:
    """Read sealed pairs; raises `RLHFError` if the file is missing or not what was sealed."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RLHFError(
            f"{path}: the sealed pairs of round {round} are missing; restore the file or start over with --fresh"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise RLHFError(
            f"{path}: the sealed pairs of round {round} have changed (SHA-256 {found[:12]}, sealed as {digest[:12]}); "
            "restore the file or start over with --fresh"
        )
    table = pq.read_table(io.BytesIO(data))
    columns = [_read_column(table.column(name)) for name in Pair.__struct_fields__]
    return SealedRound(round, tuple(map(Pair, *columns)), digest)


def _write(path: Path, data: bytes) -> str:
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def _match(comparison: Comparison) -> tuple[str, int, int]:
    return comparison.uid, comparison.index_a, comparison.index_b


def _values(records: Sequence[Any], name: str) -> Sequence[Any]:
    return [getattr(record, name) for record in records]


def _spans(versions: Sequence[Sequence[VersionSpan]]) -> pa.Array:
    """The column of version spans."""
    spans = [span for each in versions for span in each]
    type = ROLLOUT_SCHEMA.field("versions").type
    parts = [pa.array(_values(spans, field.name), type=field.type) for field in type.value_type]
    ends = itertools.accumulate(map(len, versions), initial=0)
    return pa.ListArray.from_arrays(
        pa.array(ends, type=pa.int32()), pa.StructArray.from_arrays(parts, fields=list(type.value_type)), type=type
    )


def _numbers(lists: Lists, type: pa.ListType) -> pa.Array:
    """A column of lists of numbers, from memory that nobody writes to any more."""
    count = lists.ends[-1] if lists.ends else 0
    values = pa.Array.from_buffers(type.value_type, count, [None, pa.py_buffer(lists.values)])
    return pa.ListArray.from_arrays(pa.array([0, *lists.ends], type=pa.int32()), values, type=type)


def _read_column(column: pa.ChunkedArray) -> list[Any]:
    """A column's values, lists of numbers as arrays."""
    found = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    kind = _kind(found.type)
    if kind is None:
        return found.to_pylist()
    first, *ends = found.offsets.to_pylist() or [0]
    values = memoryview(found.flatten().to_numpy()).cast("B")
    return cut(Lists(kind, values, array("q", [end - first for end in ends])))


def _kind(type: pa.DataType) -> str | None:
    """The kind of array that a column's values are; None where they are no lists of numbers."""
    # Not by the whole type: Arrow and Parquet have different names for what a list holds.
    return _KINDS.get(type.value_type) if pa.types.is_list(type) else None


def _column(values: Sequence[Any] | pa.Array, type: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    kind = _kind(type)
    return _numbers(join(kind, values), type) if kind else pa.array(values, type=type)


def _parquet(columns: Mapping[str, Sequence[Any] | pa.Array], schema: pa.Schema) -> bytes:
    """The file's bytes; built by column, since rows of dictionaries cost many times the data."""
    arrays = [_column(columns.get(field.name, ()), field.type) for field in schema]
    sink = io.BytesIO()
    # A dictionary of token ids or log-probs takes up to four times as long to write, for a fifth more or fewer bytes.
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=schema),
        sink,
        compression="zstd",
        use_dictionary=[field.name for field in schema if pa.types.is_string(field.type)],
        use_byte_stream_split=[f"{field.name}.list.element" for field in schema if field.type == _LOGPROBS],
    )
    return sink.getvalue()
