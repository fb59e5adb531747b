"""Second streams: quotas from the ledger, the replay buffer from sealed rounds, a preference set as anchor."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config import OfflineConfig, RunConfig
from rlhf.config.buffer import Buffer
from rlhf.config.load import validate
from rlhf.config.offline import Anchor
from rlhf.data.anchor import AnchorPairs, read_anchor
from rlhf.data.preferences import PreferenceExample
from rlhf.errors import InputError, RLHFError
from rlhf.packed import logprobs, token_ids
from rlhf.ports import PairSource
from rlhf.records import Message, Pair, SealedRound
from rlhf.rounds.anchor import AnchorStream
from rlhf.rounds.buffer import ReplayBuffer
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.sealing import read_sealed, seal_pairs
from rlhf.rounds.segments import Passes, Segments
from rlhf.rounds.streams import quota, with_streams


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is proved in test_files."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def make_pair(round: int, number: int) -> Pair:
    ids = [token_ids(each) for each in ((1, 2), (3, number), (4,))]
    none = logprobs([])
    return Pair(f"{round:02d}-{number:03d}", round, *ids, "", "", "", 0.9, round - 1, round - 1, none, none)


def seal(folder: Path, *counts: int) -> Ledger:
    """Rounds of so many pairs."""
    ledger = Ledger(folder)
    for round, count in enumerate(counts, start=1):
        ledger.commit(round, RoundState.PLANNED, {"uids": [], "cursor": 0})
        digest = seal_pairs(ledger.folder(round) / "pairs.parquet", [make_pair(round, n) for n in range(count)])
        ledger.commit(round, RoundState.SEALED, {"pairs": {"sha256": digest, "count": count}})
    return ledger


def sealed(ledger: Ledger, round: int) -> SealedRound:
    digest = ledger.manifest(round)["pairs"]["sha256"]
    return read_sealed(ledger.folder(round) / "pairs.parquet", round, digest)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=5), share=st.floats(0.01, 2.5))
def test_quotas_join_and_add_up_to_the_share(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], share: float
) -> None:
    ledger = seal(tmp_path_factory.mktemp("quota"), *counts)
    bounds = [quota(ledger, round, share) for round in range(1, len(counts) + 1)]
    assert bounds[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    assert share * sum(counts) - 1 < bounds[-1][1] <= share * sum(counts)


def test_the_buffer_holds_the_newest_pairs_of_earlier_rounds(tmp_path: Path) -> None:
    ledger = seal(tmp_path, 3, 4, 0, 5, 2)
    buffer = ReplayBuffer(Buffer(size=6, share=1.0), ledger, 0)
    assert buffer.held(1) == []
    assert [pair.uid for pair in buffer.held(3)] == [
        *(f"01-{n:03d}" for n in (1, 2)),
        *(f"02-{n:03d}" for n in range(4)),
    ]
    assert [pair.uid for pair in buffer.held(5)] == ["02-003", *(f"04-{n:03d}" for n in range(5))]
    assert buffer.held(2) == list(sealed(ledger, 1).pairs)
    # A pair comes back as it was sealed.
    assert buffer.held(5)[1:] == list(sealed(ledger, 4).pairs)


def test_a_draw_is_of_the_round_alone_and_takes_no_pair_twice(tmp_path: Path) -> None:
    ledger = seal(tmp_path, 6, 6, 6, 6, 6)
    options = Buffer(size=10, share=0.5, weight=0.7)
    together = ReplayBuffer(options, ledger, 3)
    drawn = {round: together.pairs(sealed(ledger, round)) for round in (1, 2, 3, 4, 5)}
    assert [len(found.pairs) for found in drawn.values()] == [0, 3, 3, 3, 3]
    for round, found in drawn.items():
        assert (found.round, found.weight, found.ordered) == (round, 0.7, False)
        assert len({pair.uid for pair in found.pairs}) == len(found.pairs)
        held = ReplayBuffer(options, ledger, 3).held(round)
        assert all(pair in held for pair in found.pairs)
        # Another process that begins with this round draws the same.
        assert ReplayBuffer(options, ledger, 3).pairs(sealed(ledger, round)) == found
    assert len({found.digest for found in drawn.values()}) == 5
    assert ReplayBuffer(options, ledger, 4).pairs(sealed(ledger, 5)) != drawn[5]
    few = ReplayBuffer(Buffer(size=2, share=1.0), ledger, 3).pairs(sealed(ledger, 5))
    assert len(few.pairs) == 2


def test_every_pair_has_its_chance(tmp_path: Path) -> None:
    ledger = seal(tmp_path, 4, 4)
    found = {
        pair.uid
        for s in range(40)
        for pair in ReplayBuffer(Buffer(share=0.25), ledger, s).pairs(sealed(ledger, 2)).pairs
    }
    assert found == {f"01-{n:03d}" for n in range(4)}


def test_the_buffer_s_state_is_which_sealed_rounds_it_holds(tmp_path: Path) -> None:
    ledger = seal(tmp_path, 3, 3, 3)
    buffer = ReplayBuffer(Buffer(size=4), ledger, 0)
    expected = buffer.held(3)
    again = ReplayBuffer(Buffer(size=4), ledger, 0)
    again.load_state_dict(buffer.state_dict())
    assert again.state_dict() == buffer.state_dict() == {"rounds": {n: sealed(ledger, n).digest for n in (1, 2)}}
    assert again.held(3) == expected
    path = ledger.folder(2) / "pairs.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(RLHFError, match="the sealed pairs of round 2 have changed"):
        ReplayBuffer(Buffer(size=4), ledger, 0).pairs(sealed(ledger, 3))
    with pytest.raises(RLHFError, match="round 2 have changed"):
        again.load_state_dict(buffer.state_dict())


def test_passes_go_on_for_ever_and_segments_are_cut_from_them() -> None:
    passes = Passes(7, 5)
    places = passes.places(0, 21)
    assert [place for place, _, _ in places] == list(range(21))
    for epoch in range(3):
        assert sorted(index for _, number, index in places if number == epoch) == list(range(7))
    assert places[:7] != [(place - 7, 0, index) for place, _, index in places[7:14]]
    assert passes.places(4, 9) == places[4:9] == Passes(7, 5).places(4, 9)
    segments = Segments(7, epochs=2, per_segment=4, seed=5)
    assert [place for round in range(1, segments.count + 1) for place in segments.places(round)] == places[:14]


def test_an_anchor_goes_on_where_the_rounds_before_left_it(tmp_path: Path) -> None:
    ledger = seal(tmp_path, 4, 0, 3, 5)

    def encode(start: int, stop: int, round: int) -> list[Pair]:
        return [make_pair(round, place) for place in range(start, stop)]

    stream = AnchorStream(Anchor(path="x", share=0.5, weight=2.0), encode, ledger)
    found = [stream.pairs(sealed(ledger, round)) for round in (1, 2, 3, 4)]
    assert [[pair.chosen_ids[1] for pair in one.pairs] for one in found] == [[0, 1], [], [2], [3, 4, 5]]
    assert {(one.round, one.weight) for one in found} == {(n, 2.0) for n in (1, 2, 3, 4)}
    assert AnchorStream(Anchor(path="x", share=0.5, weight=2.0), encode, ledger).pairs(sealed(ledger, 4)) == found[3]


class Source:
    async def streams(self, round: int) -> dict[str, SealedRound]:
        return {"own": SealedRound(round, (make_pair(round, 0),), "digest")}

    def metrics(self, round: int) -> tuple[dict[str, float], list[str]]:
        return {"pairs/kept": 1.0}, ["beware"]


class Doubled:
    def pairs(self, main: SealedRound) -> SealedRound:
        return replace(main, pairs=main.pairs * 2, weight=0.5)


async def test_the_source_s_own_stream_comes_first() -> None:
    source: PairSource = with_streams(Source(), {"a": Doubled(), "b": Doubled()})
    found = await source.streams(4)
    assert list(found) == ["own", "a", "b"]
    assert [len(stream.pairs) for stream in found.values()] == [1, 2, 2]
    assert source.metrics(4) == ({"pairs/kept": 1.0}, ["beware"])
    plain = Source()
    assert with_streams(plain, {}) is plain


class Tokenizer:
    """One token a character, an end token, and prompts as they are."""

    eos_token_id: int | None = 1
    chat_template = "as it is"
    name_or_path = "tokens"

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) for char in text]}

    def apply_chat_template(self, messages: list[Message], **_: object) -> str:
        return "".join(f"{turn['role'][0]}:{turn['content']}" for turn in messages)


def write_rows(folder: Path, count: int) -> Path:
    file = folder / "set.jsonl"
    rows = (f'{{"prompt": "p{n}", "chosen": "good", "rejected": "bad"}}' for n in range(count))
    file.write_text("\n".join(rows))
    return file


def test_no_held_out_conversation_is_in_the_anchor(tmp_path: Path) -> None:
    options = Anchor(path=str(write_rows(tmp_path, 4)))
    system = Message(role="system", content="Be brief.")
    held_out = [(system, Message(role="user", content="p1")), (Message(role="user", content="p9"),)]
    pairs, notes = read_anchor(options, Tokenizer(), 0, held_out)  # type: ignore[arg-type]
    assert any("1 pairs left out" in note for note in notes)
    prompts = [pair.prompt for pair in pairs.between(0, 6, 3)]
    assert {prompt.split(":")[1][:2] for prompt in prompts} == {"p0", "p2", "p3"}
    assert pairs.between(4, 6, 3) == pairs.between(0, 6, 3)[4:]
    assert [pair.uid[:8] for pair in pairs.between(4, 6, 3)] == ["00000004", "00000005"]
    assert {pair.round for pair in pairs.between(0, 2, 3)} == {3}
    with pytest.raises(InputError, match="every conversation is held out"):
        read_anchor(options, Tokenizer(), 0, [(Message(role="user", content=f"p{n}"),) for n in range(4)])  # type: ignore[arg-type]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    endless = Tokenizer()
    endless.eos_token_id = None
    example = PreferenceExample("u", (Message(role="user", content="p"),), "a", "b", None, 0)
    with pytest.raises(InputError, match="no end token"):
        AnchorPairs([example], endless, Passes(1, 0))  # type: ignore[arg-type]


RUN = {"name": "x", "policy": {"path": "p"}, "prompts": {"path": "q"}}
OFFLINE = {"name": "x", "policy": {"path": "p"}, "preferences": {"path": "q"}}


def test_the_config() -> None:
    found = validate(RUN | {"buffer": {}, "anchor": {"path": "a", "share": 2.5}}, "c.yaml")
    assert isinstance(found, RunConfig)
    assert (found.buffer, found.anchor) == (Buffer(size=1024, share=0.25, weight=1.0), Anchor(path="a", share=2.5))
    plain = validate(RUN, "c.yaml")
    assert (plain.buffer, plain.anchor) == (None, None)
    assert validate(OFFLINE | {"anchor": {"path": "a"}}, "c.yaml", OfflineConfig).anchor == Anchor(path="a")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"buffer": {"size": 0}}, "buffer.size = 0"),
        ({"buffer": {"share": 1.5}}, "buffer.share = 1.5"),
        ({"buffer": {"share": 0}}, "buffer.share = 0"),
        ({"buffer": {"weight": -1}}, "buffer.weight = -1"),
        ({"anchor": {"share": 1}}, "anchor.path: required key is missing"),
        ({"anchor": {"path": "a", "format": "x"}}, "anchor.format = 'x'"),
    ],
)
def test_bad_keys_are_refused_in_one_line(keys: dict, words: str) -> None:
    with pytest.raises(InputError) as error:
        validate(RUN | keys, "c.yaml")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
