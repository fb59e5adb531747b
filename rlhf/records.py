"""Frozen records that travel between the parts.

Token ids are exactly those that the engine sampled. They and log-probs are arrays (`rlhf.packed`) wherever there are
many of them; any other sequence does as well, but is not equal to an array.

What a round has tens of thousands of are structs of msgspec, made thirteen times as fast as frozen dataclasses.
Python's collector of cycles does not look at them (`gc=False`): they are trees, made from the leaves up.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import repeat
from operator import attrgetter
from typing import Any

import xxhash
from msgspec import Struct

from rlhf.packed import IDS, LOGPROBS, Lists, cut, join


class Message(dict[str, str]):
    """A chat message: `{"role": ..., "content": ...}`."""


class Prompt(Struct, frozen=True, gc=False):
    """A prompt as the policy sees it.

    `uid` is unique over the run: a content hash and the epoch. `text` is the rendered chat template,
    `messages` the conversation (the last turn is the user's), `token_ids` the encoded text, `reference` the answer that
    a verifier compares with, where the data has one.
    """

    uid: str
    messages: tuple[Message, ...]
    text: str
    token_ids: Sequence[int]
    reference: str | None = None


class SampleRequest(Struct, frozen=True, gc=False):
    """K responses wanted for one prompt; response k samples with `seeds[k]`."""

    prompt: Prompt
    seeds: tuple[int, ...]


class VersionSpan(Struct, frozen=True, gc=False):
    """Tokens [start, end) of a response were sampled under weight version `version`."""

    version: int
    start: int
    end: int


class Rollout(Struct, frozen=True, gc=False):
    """One sampled response. `logprobs[t]` is the engine's log-prob of `token_ids[t]` at temperature 1.

    A finished response ends with the end token the engine sampled; a truncated one (`finish_reason` "length") has none.
    """

    uid: str
    k: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    text: str
    finish_reason: str
    versions: tuple[VersionSpan, ...]

    @property
    def oldest_version(self) -> int:
        """The oldest version that wrote a token."""
        versions = self.versions
        return versions[0].version if len(versions) == 1 else min([span.version for span in versions])


class Comparison(Struct, frozen=True, gc=False):
    """Which of two responses to the same conversation is better? `a` and `b` are response texts."""

    uid: str
    messages: tuple[Message, ...]
    a: str
    b: str
    index_a: int = 0
    index_b: int = 1
    reference: str | None = None


class VerdictState(StrEnum):
    """What the judge found about response A."""

    WIN = "win"
    LOSE = "lose"
    TIE = "tie"
    INVALID = "invalid"


class Verdict(Struct, frozen=True, gc=False):
    """A judged comparison.

    `p_ab` is p(A wins) with A shown first, `p_ba` is p(A wins) with B shown first; a judge that does not see an
    order gives the same number twice. Both are NaN when invalid. `score_a` and `score_b` are set by judges that
    score a response alone; `truncated` says that the context was cut to fit the judge.
    """

    comparison: Comparison
    p_ab: float
    p_ba: float
    state: VerdictState
    score_a: float | None = None
    score_b: float | None = None
    reason: str = ""
    truncated: bool = False

    @property
    def p(self) -> float:
        """p(A wins), averaged over both orders (METHODS: half the sum of the two)."""
        return 0.5 * (self.p_ab + self.p_ba)

    @property
    def flipped(self) -> bool:
        """The two orders contradict each other."""
        return (self.p_ab - 0.5) * (self.p_ba - 0.5) < 0


class Pair(Struct, frozen=True, gc=False):
    """A token-exact preference pair. Versions are the oldest that wrote a token of the response.

    The log-probs are the engine's, one a token; empty where several versions wrote the response.
    """

    uid: str
    round: int
    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    prompt: str
    chosen: str
    rejected: str
    p_chosen: float
    chosen_version: int
    rejected_version: int
    chosen_logprobs: Sequence[float] = ()
    rejected_logprobs: Sequence[float] = ()


_PAIR_FIELDS = Pair.__struct_fields__
_TEXTS = ("prompt", "chosen", "rejected")
_PACKED = {name: IDS for name in _PAIR_FIELDS if name.endswith("_ids")} | {
    name: LOGPROBS for name in _PAIR_FIELDS if name.endswith("_logprobs")
}


@dataclass(frozen=True, slots=True)
class SealedRound:
    """The pairs of a round as read back from disk, with the digest they were sealed under.

    Pickled or copied, it has token ids and no texts: every rank gets it, and trains token ids.

    `ordered` says that they are to be trained as they come; otherwise the learner shuffles them. Of `group` neighbours
    none may be trained without the others in the same micro-batch. `weight` is that of a stream's loss beside the
    round's own pairs. `span` says which part of the run the round is, as two fractions of it; None is an equal share.
    """

    round: int
    pairs: tuple[Pair, ...]
    digest: str
    ordered: bool = False
    group: int = 1
    weight: float = 1.0
    span: tuple[float, float] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pairs as columns, since records by the ten thousand take long."""
        columns = [() if name in _TEXTS else _column(self.pairs, name) for name in _PAIR_FIELDS]
        return _sealed_round, (columns, self.round, self.digest, self.ordered, self.group, self.weight, self.span)


def _column(pairs: Sequence[Pair], name: str) -> Sequence[Any]:
    values = list(map(attrgetter(name), pairs))
    return join(_PACKED[name], values) if name in _PACKED else values


def _sealed_round(columns: list[Sequence[Any]], round: int, *others: Any) -> SealedRound:
    values = [cut(column) if isinstance(column, Lists) else column for column in columns]
    named = dict(zip(_PAIR_FIELDS, values, strict=True)) | dict.fromkeys(_TEXTS, repeat(""))
    return SealedRound(round, tuple(map(Pair, *named.values())), *others)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step: metrics by contract name, reduced over ranks and masked for padding."""

    round: int
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor in a packed buffer: bytes [offset, offset + nbytes), row-major, checkpoint name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Bucket:
    """A packed buffer of tensors. `handle` is what the transport resolves to bytes (an object reference, say).

    `patch`, of `patch_bytes` bytes, makes it of the version before, of which `changed` 16-bit words are other ones.
    """

    tensors: tuple[TensorSpec, ...]
    nbytes: int
    handle: Any = field(default=None, compare=False)
    patch: Any = field(default=None, compare=False)
    patch_bytes: int = 0
    changed: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Tensors as rows: every generator gets a manifest of its own, and records of hundreds of tensors take long."""
        rows = [(spec.name, spec.dtype, spec.shape, spec.offset, spec.nbytes, spec.checksum) for spec in self.tensors]
        return _bucket, (rows, self.nbytes, self.handle, self.patch, self.patch_bytes, self.changed)

    @property
    def sent_bytes(self) -> int:
        """What travels to who has the version before."""
        return self.nbytes if self.patch is None else self.patch_bytes


def _bucket(rows: list[tuple[Any, ...]], *others: Any) -> Bucket:
    return Bucket(tuple(TensorSpec(*row) for row in rows), *others)


@dataclass(frozen=True, slots=True)
class Probe:
    """Fixed tokens and the learner's log-prob of each token after the first, under the same version."""

    token_ids: Sequence[int]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """Everything a receiver needs to fetch, check and prove a version.

    `base` is the digest of the version that the buckets' patches are for; None if there are no patches.
    """

    version: int
    buckets: tuple[Bucket, ...]
    probes: tuple[Probe, ...]
    base: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(bucket.nbytes for bucket in self.buckets)

    def checksums(self) -> dict[str, str]:
        """Checksum of each tensor by name; empty strings where the transport takes none."""
        return {spec.name: spec.checksum for bucket in self.buckets for spec in bucket.tensors}

    @property
    def sent_bytes(self) -> int:
        """What travels to who has the base; `nbytes` without patches."""
        return sum(bucket.sent_bytes for bucket in self.buckets)

    def digest(self) -> str:
        """Names the weights: versions of equal digests are equal bit for bit."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.checksums()).encode())

    def changed_fraction(self, before: dict[str, str]) -> float:
        """Share of bytes that are not as `before`: of the patched words, else of tensors with another checksum.

        1.0 where nothing is known.
        """
        changed = 0
        for bucket in self.buckets:
            if bucket.patch is not None:
                changed += 2 * bucket.changed
                continue
            for spec in bucket.tensors:
                changed += spec.nbytes if not spec.checksum or before.get(spec.name) != spec.checksum else 0
        return changed / max(1, sum(spec.nbytes for bucket in self.buckets for spec in bucket.tensors))


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One published version. `failed` maps a target to why it did not take the version."""

    version: int
    seconds: float
    nbytes: int
    served: tuple[str, ...]
    failed: dict[str, str]
    probe_error: float
    changed_fraction: float = 1.0

    def timed(self, seconds: float) -> "SyncReport":
        """The same report with the seconds from the learner's call to serving."""
        return replace(self, seconds=seconds)


@dataclass(frozen=True, slots=True)
class RoundReport:
    """Metrics of one finished round, by contract name."""

    round: int
    metrics: dict[str, float]
    warnings: tuple[str, ...] = ()
