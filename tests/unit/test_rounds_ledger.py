"""The ledger: states in order, commits that may be repeated, and one atomic write a commit."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rlhf.errors import RLHFError
from rlhf.rounds.ledger import Ledger, RoundState

STATES = [RoundState.PLANNED, RoundState.SEALED, RoundState.TRAINED, RoundState.PUBLISHED]


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is proved in test_files; here it would only cost time on a busy disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class Kill(BaseException):
    """Stands for the end of the process at this line."""


def manifest_file(run_dir: Path, round: int) -> Path:
    return run_dir / "rounds" / f"{round:04d}" / "manifest.json"


def advance(ledger: Ledger, round: int, state: RoundState) -> None:
    for step in STATES[: STATES.index(state) + 1]:
        ledger.commit(round, step, {"uids": ["a", "b"], "cursor": 0} if step == RoundState.PLANNED else {})


def test_a_new_round_has_no_state_no_plan_and_no_folder(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert (ledger.state(1), ledger.plan(1), ledger.manifest(1)) == (RoundState.NEW, [], {})
    assert list(tmp_path.iterdir()) == []


def test_payloads_add_up_and_another_process_reads_them(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for state in STATES:
        ledger.commit(12, state, {state.name: [1, "é"], "uids": ["a"]} if state == RoundState.PLANNED else {"x": 1.5})
        assert Ledger(tmp_path).state(12) == state
    expected = {"PLANNED": [1, "é"], "uids": ["a"], "x": 1.5, "round": 12, "state": "PUBLISHED"}
    assert Ledger(tmp_path).manifest(12) == expected
    assert manifest_file(tmp_path, 12).exists()


@pytest.mark.parametrize("reached", STATES)
@pytest.mark.parametrize("again", STATES)
def test_a_state_that_was_reached_changes_nothing(reached: RoundState, again: RoundState, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    advance(ledger, 1, reached)
    before = manifest_file(tmp_path, 1).read_bytes()
    if again <= reached:
        ledger.commit(1, again, {"uids": ["other"], "new": True})
    elif again > reached + 1:
        with pytest.raises(RLHFError, match=f"round 1 cannot go from {reached.name} to {again.name}"):
            ledger.commit(1, again, {"new": True})
    else:
        return
    assert manifest_file(tmp_path, 1).read_bytes() == before


@pytest.mark.parametrize("state", STATES[1:])
def test_a_new_round_cannot_skip_its_plan(state: RoundState, tmp_path: Path) -> None:
    with pytest.raises(RLHFError, match=f"from NEW to {state.name}"):
        Ledger(tmp_path).commit(1, state, {})
    assert Ledger(tmp_path).state(1) == RoundState.NEW


def test_the_cursor_is_the_sum_of_what_was_planned_before(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for round, count in enumerate((3, 0, 5), start=1):
        assert ledger.cursor(round) == [0, 3, 3][round - 1]
        uids = [f"{round}-{index}" for index in range(count)]
        ledger.commit(round, RoundState.PLANNED, {"uids": uids, "cursor": ledger.cursor(round)})
        assert ledger.plan(round) == uids
    assert ledger.cursor(4) == 8


def test_rounds_are_planned_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.commit(1, RoundState.PLANNED, {"uids": ["a"], "cursor": 0})
    assert ledger.cursor(2) == 1
    with pytest.raises(RLHFError, match="round 3 cannot be planned before round 2"):
        ledger.cursor(3)


def test_a_manifest_cut_off_anywhere_is_refused_and_named(tmp_path: Path) -> None:
    """Atomic writes exclude this; a disk or a user may not. A cut-off manifest must never pass as a new round."""
    ledger = Ledger(tmp_path)
    advance(ledger, 1, RoundState.SEALED)
    file = manifest_file(tmp_path, 1)
    whole = file.read_bytes()
    for length in range(len(whole.rstrip())):
        file.write_bytes(whole[:length])
        with pytest.raises(RLHFError, match=r"0001/manifest\.json: .*damaged"):
            ledger.state(1)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"null", b"{}", b"7", b"\xff\xfe", b'{"round": 1}', b'{"state": "DONE"}', b'{"state": 3}'],
)
def test_a_manifest_without_a_state_is_refused_and_named(content: bytes, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    advance(ledger, 1, RoundState.PLANNED)
    manifest_file(tmp_path, 1).write_bytes(content)
    with pytest.raises(RLHFError, match=r"0001/manifest\.json: .*damaged"):
        ledger.state(1)


@pytest.mark.parametrize("state", STATES)
def test_a_kill_before_the_rename_leaves_the_old_state(
    state: RoundState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    if state > RoundState.PLANNED:
        advance(ledger, 1, STATES[STATES.index(state) - 1])
    before = ledger.manifest(1)

    def killed(*_: object) -> None:
        raise Kill

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, killed)
            patch.setattr(os, name, killed)
        with pytest.raises(Kill):
            ledger.commit(1, state, {"uids": ["x"], "cursor": 0})
    again = Ledger(tmp_path)
    assert again.manifest(1) == before
    again.commit(1, state, {"uids": ["x"], "cursor": 0})
    assert again.state(1) == state


def test_a_half_written_temporary_file_is_ignored(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    advance(ledger, 1, RoundState.PLANNED)
    temporary = manifest_file(tmp_path, 1).with_name("manifest.json.tmp")
    temporary.write_text('{"state": "PUBLI')
    assert ledger.state(1) == RoundState.PLANNED
    ledger.commit(1, RoundState.SEALED, {})
    assert ledger.state(1) == RoundState.SEALED
    assert not temporary.exists()


def test_every_flipped_bit_is_noticed_and_mended_from_the_state_before(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    advance(ledger, 1, RoundState.TRAINED)
    file = manifest_file(tmp_path, 1)
    whole = file.read_bytes()
    for position in range(0, len(whole) - 1, 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 7
        file.write_bytes(bytes(damaged))
        if damaged.split() == whole.split():
            continue  # a blank more or less says nothing else
        with pytest.raises(RLHFError, match=r"0001/manifest\.json: .*damaged"):
            ledger.state(1)
        (told,) = Ledger(tmp_path).mend()
        assert told == f"{file}: damaged or gone; goes on from the state before, SEALED"
        assert ledger.state(1) == RoundState.SEALED
        ledger.commit(1, RoundState.TRAINED, {})
        assert file.read_bytes() == whole


@pytest.mark.parametrize("reached", STATES[1:])
def test_a_cut_off_manifest_goes_back_one_state_and_the_other_rounds_stay(reached: RoundState, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for round, state in ((1, RoundState.PUBLISHED), (2, reached), (3, RoundState.PLANNED)):
        advance(ledger, round, state)
    os.truncate(manifest_file(tmp_path, 2), 20)
    assert len(ledger.mend()) == 1
    states = [ledger.state(round) for round in (1, 2, 3)]
    assert states == [RoundState.PUBLISHED, STATES[STATES.index(reached) - 1], RoundState.PLANNED]
    assert ledger.plan(2) == ["a", "b"]
    assert ledger.mend() == []


def test_the_newest_round_s_first_manifest_is_set_aside(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    advance(ledger, 1, RoundState.SEALED)
    advance(ledger, 2, RoundState.PLANNED)
    os.truncate(manifest_file(tmp_path, 2), 20)
    (told,) = ledger.mend()
    assert "round 2 is planned again" in told
    assert (ledger.state(1), ledger.state(2)) == (RoundState.SEALED, RoundState.NEW)
    assert manifest_file(tmp_path, 2).with_name("manifest.damaged.json").stat().st_size == 20


def test_what_cannot_be_mended_is_left_to_be_refused(tmp_path: Path) -> None:
    """Round 1's only manifest: round 2 was planned after it, so it cannot be planned again as if it were new."""
    ledger = Ledger(tmp_path)
    advance(ledger, 1, RoundState.PLANNED)
    advance(ledger, 2, RoundState.PLANNED)
    os.truncate(manifest_file(tmp_path, 1), 20)
    assert ledger.mend() == []
    with pytest.raises(RLHFError, match=r"0001/manifest\.json: .*damaged"):
        ledger.state(1)


def test_a_file_system_without_links_keeps_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    ledger = Ledger(tmp_path)
    advance(ledger, 1, RoundState.SEALED)
    manifest_file(tmp_path, 1).write_bytes(b"")
    assert len(ledger.mend()) == 1
    assert ledger.state(1) == RoundState.PLANNED


class LedgerMachine(RuleBasedStateMachine):
    """Random commits, kills and restarts against a dictionary that holds what must be on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = Ledger(Path(self.folder.name))
        self.model: dict[int, tuple[RoundState, dict[str, object]]] = {}

    @rule(round=st.integers(1, 3), state=st.sampled_from(STATES), value=st.integers(), kill=st.booleans())
    def commit(self, round: int, state: RoundState, value: int, kill: bool) -> None:
        current, payload = self.model.get(round, (RoundState.NEW, {}))
        added: dict[str, object] = {"uids": [str(value)], "cursor": 0} if state == RoundState.PLANNED else {"v": value}
        if kill and state == current + 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Path, "rename", self._killed)
                with pytest.raises(Kill):
                    self.ledger.commit(round, state, added)
        elif state > current + 1:
            with pytest.raises(RLHFError):
                self.ledger.commit(round, state, added)
        else:
            self.ledger.commit(round, state, added)
            if state > current:
                self.model[round] = (state, payload | added)

    @rule()
    def restart(self) -> None:
        self.ledger = Ledger(Path(self.folder.name))

    @invariant()
    def disk_is_what_was_committed(self) -> None:
        for round in range(1, 4):
            state, payload = self.model.get(round, (RoundState.NEW, {}))
            expected = payload | {"round": round, "state": state.name} if state else {}
            assert self.ledger.state(round) == state
            assert self.ledger.manifest(round) == expected

    def teardown(self) -> None:
        self.folder.cleanup()

    @staticmethod
    def _killed(*_: object) -> None:
        raise Kill


LedgerMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
