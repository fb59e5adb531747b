"""How a round's steps share out other streams, and which pairs of a micro-batch are whose."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import InputError, RLHFError
from rlhf.learning.plan import step_batches
from rlhf.learning.streams import Part, Streams, split
from rlhf.records import Pair, SealedRound


def make_round(count, round=3, length=2, **changes):
    pairs = [Pair(f"{n}", round, (1,), (2,) * length, (3,), "", "", "", 1.0, 0, 0) for n in range(count)]
    return SealedRound(round, tuple(pairs), "digest", **changes)


def score(pairs):
    return torch.tensor([[float(pair.uid), len(pair.chosen_ids)] for pair in pairs])


def read(main, **others):
    return Streams.read(main, others, 10, score)


def shares(streams, batch_size, epochs, seed=0):
    count = len(streams.main.pairs)
    sizes = [len(batch) for batch in step_batches(count, batch_size, epochs, seed, 3)]
    return [{part.name: part for part in parts} for parts in streams.shares(sizes, seed)]


@given(
    main=st.integers(1, 20),
    other=st.integers(0, 30),
    batch_size=st.integers(1, 8),
    epochs=st.integers(1, 3),
    ordered=st.booleans(),
)
def test_a_stream_is_gone_through_once_an_epoch_in_even_shares(main, other, batch_size, epochs, ordered):
    streams = read(make_round(main), second=make_round(other, ordered=ordered, weight=0.3))
    steps = shares(streams, batch_size, epochs)
    per_epoch = -(-main // batch_size)
    assert len(steps) == epochs * per_epoch
    for start in range(0, len(steps), per_epoch):
        parts = [step.get("second") for step in steps[start : start + per_epoch]]
        uids = [int(pair.uid) for part in parts if part for pair in part.pairs]
        assert sorted(uids) == list(range(other))
        assert not ordered or uids == sorted(uids)
        taken = 0
        for number, part in enumerate(parts):
            taken += len(part.pairs) if part else 0
            done = min(main, (number + 1) * batch_size)
            assert abs(taken - other * done / main) < 1
    for part in (part for step in steps for part in step.values()):
        assert part.pairs
        assert part.weight == 0.3
        assert torch.equal(part.reference, score(part.pairs))


def test_each_stream_and_epoch_has_an_order_of_its_own():
    streams = read(make_round(4), a=make_round(40), b=make_round(40))
    first, second = shares(streams, 4, 2)
    orders = [[pair.uid for pair in step[name].pairs] for step in (first, second) for name in "ab"]
    assert len({tuple(order) for order in orders}) == 4
    again = shares(streams, 4, 2)[0]
    assert [pair.uid for pair in again["a"].pairs] == orders[0]
    assert [pair.uid for pair in shares(streams, 4, 2, seed=1)[0]["a"].pairs] != orders[0]


def test_all_streams_are_scored_at_once_and_long_pairs_are_dropped_from_each():
    calls = []

    def counted(pairs):
        calls.append([pair.uid for pair in pairs])
        return score(pairs)

    long = make_round(1, length=30).pairs
    main = replace(make_round(2), pairs=make_round(2).pairs + long)
    other = replace(make_round(1, length=4), pairs=long + make_round(1, length=4).pairs)
    streams = Streams.read(main, {"other": other, "off": make_round(5, weight=0.0)}, 10, counted)
    assert calls == [["0", "1", "0"]]
    assert (streams.dropped, len(streams.pairs)) == (2, 3)
    ((part, _),) = streams.others
    assert part.reference.tolist() == [[0.0, 4.0]]


def test_a_round_without_pairs_scores_nothing():
    streams = Streams.read(make_round(0), {"other": make_round(3)}, 10, lambda pairs: pytest.fail("nothing to score"))
    assert (streams.pairs, streams.others) == ([], ())
    assert list(streams.shares([], 0)) == []


def test_bad_streams():
    with pytest.raises(InputError, match="has no tokens"):
        read(make_round(2), other=make_round(1, length=0))
    with pytest.raises(RLHFError, match="the stream other cannot be trained beside pairs in groups"):
        read(make_round(2, group=2), other=make_round(2))


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=4), data=st.data())
def test_the_pairs_of_a_micro_batch_are_told_apart(counts, data):
    parts = [Part(str(n), make_round(count).pairs, torch.zeros(count, 2)) for n, count in enumerate(counts)]
    every = [(number, row) for number, count in enumerate(counts) for row in range(count)]
    micro = data.draw(st.lists(st.integers(0, max(0, len(every) - 1)), unique=True, max_size=len(every)))
    values = torch.tensor([float(index) for index in micro])
    found = {}
    for number, places, rows in split(parts, micro):
        starts = sum(counts[:number])
        assert values[places].tolist() == [float(starts + row) for row in rows]
        for row in rows:
            found[number, row] = True
    assert set(found) == {every[index] for index in micro}
