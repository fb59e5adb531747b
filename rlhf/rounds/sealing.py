"""A round's files: rollouts, verdicts and pairs as Parquet, the pairs sealed under a digest.

What is trained is what is read back from the sealed file, on the first try and on every replay.
"""

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.errors import RLHFError
from rlhf.files import write_atomic
from rlhf.records import Pair, Rollout, SealedRound, Verdict, VersionSpan

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

_VERDICT_FIELDS = ("p_ab", "p_ba", "score_a", "score_b", "reason", "truncated")


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write rollouts in the order (uid, k)."""
    rows = [dataclasses.asdict(rollout) for rollout in sorted(rollouts, key=lambda item: (item.uid, item.k))]
    write_atomic(path, _parquet(rows, ROLLOUT_SCHEMA))


def read_rollouts(path: Path) -> list[Rollout]:
    """Read what `write_rollouts` wrote."""
    rows = pq.read_table(path).to_pylist()
    return [
        Rollout(
            **{
                **row,
                "token_ids": tuple(row["token_ids"]),
                "logprobs": tuple(row["logprobs"]),
                "versions": tuple(VersionSpan(**span) for span in row["versions"]),
            }
        )
        for row in rows
    ]


def write_verdicts(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write verdicts; the texts stand in the rollouts."""
    rows = [
        {
            "uid": verdict.comparison.uid,
            "index_a": verdict.comparison.index_a,
            "index_b": verdict.comparison.index_b,
            **{name: getattr(verdict, name) for name in _VERDICT_FIELDS},
            "state": str(verdict.state),
        }
        for verdict in verdicts
    ]
    rows.sort(key=lambda row: (row["uid"], row["index_a"], row["index_b"]))
    write_atomic(path, _parquet(rows, VERDICT_SCHEMA))


def seal_pairs(path: Path, pairs: Sequence[Pair]) -> str:
    """Write pairs in the order (uid, chosen, rejected) and return the file's SHA-256."""
    ordered = sorted(pairs, key=lambda pair: (pair.uid, pair.chosen_ids, pair.rejected_ids))
    data = _parquet([dataclasses.asdict(pair) for pair in ordered], PAIR_SCHEMA)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


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
    names = [field.name for field in dataclasses.fields(Pair)]
    rows = pq.read_table(io.BytesIO(data)).select(names).to_pylist()
    return SealedRound(round, tuple(_pair(row) for row in rows), digest)


def _pair(row: dict[str, Any]) -> Pair:
    fields: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in row.items()}
    return Pair(**fields)


def _parquet(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd")
    return sink.getvalue()
