"""Lists of records as they travel between processes: as columns.

Pickled one by one, records cost more than all else that the driver does for a response: a call into Python for each
object, both ways. These lists pickle as a few flat arrays and lists of strings.
"""

import pickle
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhf.judging.verdicts import check_complete
from rlhf.packed import IDS, LOGPROBS, SEEDS, Lists, Numbers, cut, join
from rlhf.records import Comparison, Message, Prompt, Rollout, SampleRequest, Verdict, VerdictState, VersionSpan

Flat = tuple[str, bytes | memoryview, bytes]

Spans = tuple[tuple[int, int, int], ...]

Reduced = tuple[Callable[..., Any], tuple[Any, ...]]


class PackedRequests(list[SampleRequest]):
    """Requests for a generator, which can be passed on.

    They arrive with what is sampled from, uid, token ids and seeds: the same conversation as messages and as text would
    be most of what travels. Token ids are int32, seeds int64: raises `OverflowError` for larger ones.
    """

    def __reduce__(self) -> Reduced:
        """The requests as columns."""
        prompts = [request.prompt for request in self]
        columns = (
            [prompt.uid for prompt in prompts],
            _flat(join(IDS, [prompt.token_ids for prompt in prompts])),
            _flat(join(SEEDS, [request.seeds for request in self])),
        )
        return _requests, columns


class PackedRollouts(list[Rollout]):
    """Responses of a generator; they arrive as `Responses`.

    Token ids are int32, log-probs float32: raises `OverflowError` for larger ids.
    """

    def __reduce__(self) -> Reduced:
        """The responses as columns, pickled."""
        spans: dict[Spans, Spans] = {}
        columns = (
            [rollout.uid for rollout in self],
            [rollout.k for rollout in self],
            _flat(join(IDS, [rollout.token_ids for rollout in self])),
            _flat(join(LOGPROBS, [rollout.logprobs for rollout in self])),
            [rollout.text for rollout in self],
            [rollout.finish_reason for rollout in self],
            # Most are of one version and many of one length: equal ones are one object, which is pickled once.
            [spans.setdefault(each, each) for each in map(_plain_spans, self)],
        )
        return Responses, (pickle.dumps(columns, pickle.HIGHEST_PROTOCOL),)


class Responses:
    """Responses that arrived, unpickled when asked for: relays pass them on, and Ray unpickles streamed items twice."""

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def __reduce__(self) -> Reduced:
        """As they are."""
        return Responses, (self._pickled,)

    def rollouts(self) -> list[Rollout]:
        """The responses."""
        uids, ks, token_ids, logprobs, texts, reasons, versions = pickle.loads(self._pickled)
        spans = {each: tuple(VersionSpan(*span) for span in each) for each in set(versions)}
        columns = (uids, ks, _cut(token_ids), _cut(logprobs), texts, reasons, map(spans.__getitem__, versions))
        return list(map(Rollout, *columns))


class PackedComparisons(list[Comparison]):
    """Comparisons for a judge; they arrive as a `list[Comparison]`. A conversation that several share travels once."""

    def __reduce__(self) -> Reduced:
        """The comparisons as rows, and the conversations that they are about."""
        numbers: dict[int, int] = {}
        conversations: list[list[dict[str, str]]] = []
        rows = []
        for each in self:
            number = numbers.setdefault(id(each.messages), len(numbers))
            if number == len(conversations):
                conversations.append(_plain(each.messages))
            rows.append((each.uid, number, each.a, each.b, each.index_a, each.index_b, each.reference))
        return _comparisons, (conversations, rows)


class PackedVerdicts(list[Verdict]):
    """Verdicts of a judge; they arrive as `Findings`, without the comparisons, which whoever asked has."""

    def __reduce__(self) -> Reduced:
        """The verdicts as rows."""
        rows = [
            (each.p_ab, each.p_ba, each.state.value, each.score_a, each.score_b, each.reason, each.truncated)
            for each in self
        ]
        return Findings, (rows,)


class Findings:
    """What a judge found, in the order of the comparisons that it was asked about."""

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self._rows = rows

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """The verdicts on `comparisons`; raises `RLHFError` if there is not one for each."""
        check_complete(comparisons, self._rows)
        return [
            Verdict(comparison, p_ab, p_ba, _STATES[state], score_a, score_b, reason, truncated)
            for comparison, (p_ab, p_ba, state, score_a, score_b, reason, truncated) in zip(
                comparisons, self._rows, strict=True
            )
        ]


_STATES = {state.value: state for state in VerdictState}


def _requests(uids: list[str], token_ids: Flat, seeds: Flat) -> PackedRequests:
    prompts = [Prompt(uid, (), "", ids) for uid, ids in zip(uids, _cut(token_ids), strict=True)]
    return PackedRequests(map(SampleRequest, prompts, map(tuple, _cut(seeds))))


def _plain_spans(rollout: Rollout) -> Spans:
    return tuple([(span.version, span.start, span.end) for span in rollout.versions])


def _flat(lists: Lists) -> Flat:
    """Lists end to end as plain objects: for each other one, Ray's pickler calls back into Python."""
    return lists.kind, lists.values, lists.ends.tobytes()


def _cut(flat: Flat) -> list[Numbers]:
    kind, values, ends = flat
    return cut(Lists(kind, values, array("q", ends)))


def _comparisons(conversations: list[list[dict[str, str]]], rows: list[tuple[Any, ...]]) -> list[Comparison]:
    known = [_messages(conversation) for conversation in conversations]
    return [
        Comparison(uid, known[number], a, b, index_a, index_b, reference)
        for uid, number, a, b, index_a, index_b, reference in rows
    ]


def _plain(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [dict(message) for message in messages]


def _messages(conversation: list[dict[str, str]]) -> tuple[Message, ...]:
    return tuple([Message(message) for message in conversation])
