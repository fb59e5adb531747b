"""What travels as columns arrives as it was, and pickles the way Ray does it."""

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from ray import cloudpickle

from rlhf.errors import RLHFError
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.packed import logprobs, token_ids
from rlhf.records import (
    Bucket,
    Comparison,
    Message,
    Pair,
    Probe,
    Prompt,
    Rollout,
    SampleRequest,
    SealedRound,
    TensorSpec,
    Verdict,
    VersionSpan,
    WeightManifest,
)
from rlhf.wire import Findings, PackedComparisons, PackedRequests, PackedRollouts, PackedVerdicts, Responses

TEXTS = st.text(max_size=12)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(token_ids)
MESSAGES = st.lists(st.builds(lambda role, content: Message(role=role, content=content), TEXTS, TEXTS), max_size=3).map(
    tuple
)
REFERENCES = st.none() | TEXTS
PROMPTS = st.builds(Prompt, TEXTS, MESSAGES, TEXTS, IDS, REFERENCES)
REQUESTS = st.builds(SampleRequest, PROMPTS, st.lists(st.integers(0, 2**63 - 1), max_size=4).map(tuple))
SPANS = st.lists(st.builds(VersionSpan, *[st.integers(-1, 9)] * 3), max_size=3).map(tuple)
LOGPROBS = st.lists(st.floats(max_value=0.0, allow_nan=False, width=32), max_size=6).map(logprobs)
ROLLOUTS = st.builds(Rollout, TEXTS, st.integers(0, 9), IDS, LOGPROBS, TEXTS, TEXTS, SPANS)
COMPARISONS = st.builds(Comparison, TEXTS, MESSAGES, TEXTS, TEXTS, st.integers(0, 9), st.integers(0, 9), REFERENCES)
P = st.floats(0.0, 1.0)
SCORES = st.none() | st.floats(allow_nan=False)


def arrived(packed: Any) -> Any:
    return pickle.loads(cloudpickle.dumps(packed, protocol=5))


@given(requests=st.lists(REQUESTS, max_size=5))
def test_requests_arrive_with_what_is_sampled_from(requests: list[SampleRequest]) -> None:
    found = arrived(PackedRequests(requests))
    assert found == [
        SampleRequest(Prompt(request.prompt.uid, (), "", request.prompt.token_ids), request.seeds)
        for request in requests
    ]
    assert type(found) is PackedRequests  # so that a relay can pass them on as they are
    assert arrived(found) == found


@given(rollouts=st.lists(ROLLOUTS, max_size=5))
def test_responses_arrive_as_they_were(rollouts: list[Rollout]) -> None:
    found = arrived(PackedRollouts(rollouts))
    assert found.rollouts() == rollouts


def test_responses_are_passed_on_without_a_look_at_them() -> None:
    passed = arrived(arrived(Responses(b"no pickle")))
    with pytest.raises(pickle.UnpicklingError):
        passed.rollouts()


def test_versions_of_responses_travel_once() -> None:
    def size(responses: int) -> int:
        spans = [(VersionSpan(7, 0, 300), VersionSpan(8, 300, 400)) for _ in range(responses)]
        given = [Rollout("u", 0, token_ids(()), logprobs(()), "", "stop", each) for each in spans]
        return len(pickle.dumps(PackedRollouts(given)))

    # Where its two lists end takes 16 bytes of each response; the rest are references to what is there already.
    assert size(2000) - size(1000) < 1000 * 32


@given(comparisons=st.lists(COMPARISONS, max_size=4), again=st.lists(st.integers(0, 3), max_size=6))
def test_comparisons_arrive_as_they_were(comparisons: list[Comparison], again: list[int]) -> None:
    # Some are about the same conversation object, and some about an equal one.
    given = [comparisons[n % len(comparisons)] for n in again] if comparisons else []
    assert arrived(PackedComparisons(given)) == given


@given(rows=st.lists(st.tuples(COMPARISONS, P, P, SCORES, SCORES), max_size=5), truncated=st.booleans())
def test_verdicts_are_put_back_onto_their_comparisons(rows: list[tuple[Any, ...]], truncated: bool) -> None:
    verdicts = [make_verdict(*row) for row in rows]
    verdicts = [Verdict(v.comparison, v.p_ab, v.p_ba, v.state, v.score_a, v.score_b, v.reason, truncated)
                for v in verdicts]  # fmt: skip
    comparisons = [verdict.comparison for verdict in verdicts]
    found = arrived(PackedVerdicts(verdicts))
    assert isinstance(found, Findings)
    assert found.verdicts(comparisons) == verdicts
    assert all(a.comparison is b for a, b in zip(found.verdicts(comparisons), comparisons, strict=True))
    with pytest.raises(RLHFError, match="one each is due"):
        found.verdicts([*comparisons, Comparison("u", (), "a", "b")])


def test_an_invalid_verdict_stays_one() -> None:
    comparison = Comparison("u", (), "a", "b")
    [found] = arrived(PackedVerdicts([invalid_verdict(comparison, "out of order", 1.5)])).verdicts([comparison])
    assert math.isnan(found.p_ab)
    assert math.isnan(found.p_ba)
    assert (found.state, found.score_a, found.reason) == ("invalid", 1.5, "out of order")


def test_a_conversation_that_is_shared_travels_once() -> None:
    messages = (Message(role="user", content="x" * 1000),)
    shared = [Comparison(f"u{n}", messages, "a", "b") for n in range(9)]
    assert len(cloudpickle.dumps(PackedComparisons(shared), protocol=5)) < 2000
    found = arrived(PackedComparisons(shared))
    assert {id(comparison.messages) for comparison in found} == {id(found[0].messages)}


PAIRS = st.builds(
    Pair, TEXTS, st.integers(1, 9), IDS, IDS, IDS, TEXTS, TEXTS, TEXTS, P, *[st.integers(-1, 9)] * 2, LOGPROBS, LOGPROBS
)


@given(pairs=st.lists(PAIRS, max_size=4).map(tuple), ordered=st.booleans())
def test_a_sealed_round_arrives_as_it_was_but_for_its_texts(pairs: tuple[Pair, ...], ordered: bool) -> None:
    sealed = SealedRound(3, pairs, "digest", ordered, 2, 0.5)
    bare = tuple(replace(pair, prompt="", chosen="", rejected="") for pair in pairs)
    assert arrived(sealed) == SealedRound(3, bare, "digest", ordered, 2, 0.5)


def test_a_manifest_arrives_as_it_was() -> None:
    specs = tuple(TensorSpec(f"t{n}", "bfloat16", (n, 2), 4 * n, 4, f"{n:x}") for n in range(3))
    bucket = Bucket(specs, 12, b"whole", b"patch", 5, 2)
    manifest = WeightManifest(4, (bucket, Bucket((), 0)), (Probe((1, 2), (-0.5,)),), "base")
    found = arrived(manifest)
    assert found == manifest
    # Equality leaves these out.
    assert (found.buckets[0].handle, found.buckets[0].patch) == (b"whole", b"patch")


def test_an_id_that_does_not_fit_is_no_other_id() -> None:
    with pytest.raises(OverflowError):
        arrived(PackedRollouts([Rollout("u", 0, (2**31,), (0.0,), "", "stop", ())]))


def test_other_sequences_arrive_as_arrays() -> None:
    [found] = arrived(PackedRollouts([Rollout("u", 0, (1, 2), [-0.5, -0.1], "", "stop", ())])).rollouts()
    assert (found.token_ids.typecode, found.token_ids) == ("i", token_ids([1, 2]))
    assert (found.logprobs.typecode, found.logprobs) == ("f", logprobs([-0.5, -0.1]))
