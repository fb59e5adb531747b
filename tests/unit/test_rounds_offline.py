"""Segments of a preference set as rounds: sealed once, read back in order, refused when the data change."""

import pickle

import pytest
from msgspec.structs import replace

from rlhf.errors import InputError
from rlhf.packed import logprobs, token_ids
from rlhf.records import Pair, SealedRound
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.offline import NoFleet, OfflineSource


def pair(round: int, place: int) -> Pair:
    ids = [token_ids(each) for each in ((1, 2), (3,), (4,))]
    none = logprobs([])
    return Pair(f"{place:08d}-x", round, *ids, "", "A", "B", 1.0, round - 1, round - 1, none, none)


def segment(round: int) -> tuple[list[Pair], int]:
    return [pair(round, 10 * round + offset) for offset in range(3)], 2


async def test_a_segment_is_sealed_and_read_back_in_order(tmp_path):
    ledger = Ledger(tmp_path)
    sealed = (await OfflineSource(segment, ledger, "data").streams(1))["offline"]
    assert sealed.ordered
    assert sealed.span is None
    assert list(sealed.pairs) == segment(1)[0]
    assert ledger.state(1) == RoundState.SEALED
    assert OfflineSource(segment, ledger, "data").metrics(1) == (
        {"pairs/kept": 3.0, "pairs/dropped_invalid": 2.0},
        [],
    )


async def test_a_segment_says_which_part_of_the_training_it_is(tmp_path):
    spans = {1: (0.0, 0.8), 2: (0.8, 1.0)}
    source = OfflineSource(segment, Ledger(tmp_path), "data", span=spans.__getitem__)
    assert [(await source.streams(round))["offline"].span for round in (1, 2)] == [(0.0, 0.8), (0.8, 1.0)]


async def test_a_sealed_segment_is_not_made_again(tmp_path):
    ledger = Ledger(tmp_path)
    first = await OfflineSource(segment, ledger, "data").streams(1)

    def changed(round: int) -> tuple[list[Pair], int]:
        raise AssertionError("the data are asked for again")

    assert await OfflineSource(changed, ledger, "data").streams(1) == first


async def test_a_planned_segment_of_other_data_is_refused(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.commit(1, RoundState.PLANNED, {"uids": ["another"], "cursor": 0})
    with pytest.raises(InputError, match=r"my\.jsonl: not the data that segment 1"):
        await OfflineSource(segment, ledger, "my.jsonl").streams(1)
    assert not (ledger.folder(1) / "pairs.parquet").exists()


async def test_nobody_samples():
    fleet = NoFleet()
    assert fleet.members() == []
    with pytest.raises(LookupError):
        await fleet.admit("generator-0", 1)


def test_a_sealed_segment_travels_whole_but_for_its_texts():
    pairs = tuple(replace(pair(2, number), prompt="", chosen="", rejected="") for number in range(2))
    sealed = SealedRound(2, (pair(2, 0), pair(2, 1)), "digest", ordered=True, group=2, weight=0.5, span=(0.25, 0.5))
    bare = SealedRound(2, pairs, "digest", ordered=True, group=2, weight=0.5, span=(0.25, 0.5))
    assert pickle.loads(pickle.dumps(sealed)) == bare != sealed
