"""Sealed files that a disk damaged: made again bit for bit from responses and verdicts, or named."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.pairing import Pairing
from rlhf.errors import RLHFError
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.records import Comparison, Pair, Verdict
from rlhf.rounds.ledger import Ledger
from rlhf.rounds.offline import OfflineSource
from rlhf.rounds.resume_sealed import RecordedJudge
from rlhf.rounds.sealing import read_verdicts, write_verdicts
from tests.unit.test_rounds_online import Ports, make_config, make_source

Damage = Callable[[Path], None]


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is proved in test_files."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


class Fussy(Ports):
    """A judge with every kind of verdict, which never says the same of a comparison twice."""

    async def compare(self, comparisons: Any) -> list[Verdict]:
        found = []
        for item in comparisons:
            self.judged.append(item.uid)
            kind = int(item.a[-1]) % 5
            p = 0.2 + 0.6 * (item.a > item.b)
            found.append(
                invalid_verdict(item, "unsure") if kind == 0 else make_verdict(item, p, 1 - p if kind == 1 else p)
            )
        return found


@pytest.mark.parametrize("strategy", sorted(Pairing.model_json_schema()["properties"]["strategy"]["enum"]))
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
async def test_pairs_are_made_again_as_they_were_sealed(strategy: str, damage: Damage, tmp_path: Path) -> None:
    config = make_config(prompts=9, pairing={"strategy": strategy, "min_margin": 0.0}, generator={"samples": 4})
    source = make_source(Fussy(), tmp_path, config, prompts=30)
    sealed = {round: (await source.streams(round))["online"] for round in (1, 2)}
    assert sealed[1].pairs
    path = tmp_path / "rounds" / "0001" / "pairs.parquet"
    whole = path.read_bytes()
    damage(path)
    ports = Fussy()
    again = make_source(ports, tmp_path, config, prompts=30)
    # Another round is asked for: what a replay buffer reads has to be whole as well.
    assert (await again.streams(2))["online"] == sealed[2]
    assert path.read_bytes() == whole
    assert (await again.streams(1))["online"] == sealed[1]
    assert (ports.requests, ports.judged) == ([], [])
    (told,) = ports.alerts
    assert told == f"{path}: the sealed pairs of round 1 were damaged; they have been made again, SHA-256 as sealed"


@pytest.mark.parametrize("other", ["rollouts", "verdicts"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
async def test_two_damaged_files_are_both_named_and_nothing_is_trained(
    other: str, damage: Damage, tmp_path: Path
) -> None:
    await make_source(Ports(), tmp_path, make_config()).streams(1)
    folder = tmp_path / "rounds" / "0001"
    flip(folder / "pairs.parquet")
    damaged = (folder / "pairs.parquet").read_bytes()
    damage(folder / f"{other}.parquet")
    ports = Ports()
    source = make_source(ports, tmp_path, make_config())
    with pytest.raises(RLHFError, match=r"0001/pairs\.parquet: the sealed pairs of round 1 have changed"):
        await source.streams(1)
    (told,) = ports.alerts
    assert "cannot be made again" in told
    assert f"{folder / other}.parquet is damaged too, or gone" in told
    assert "\n" not in told
    assert (folder / "pairs.parquet").read_bytes() == damaged


async def test_what_comes_out_otherwise_is_not_put_in_place(tmp_path: Path) -> None:
    """Another margin would keep other pairs: the digest that was sealed decides."""
    await make_source(Ports(), tmp_path, make_config()).streams(1)
    path = tmp_path / "rounds" / "0001" / "pairs.parquet"
    cut(path)
    ports = Ports()
    with pytest.raises(RLHFError, match="have changed"):
        await make_source(ports, tmp_path, make_config(pairing={"min_margin": 0.95})).streams(1)
    assert "gives another file now" in ports.alerts[0]


async def test_whole_files_are_left_alone(tmp_path: Path) -> None:
    await make_source(Ports(), tmp_path, make_config()).streams(1)
    path = tmp_path / "rounds" / "0001" / "pairs.parquet"
    before = path.stat().st_mtime_ns
    ports = Ports()
    await make_source(ports, tmp_path, make_config()).streams(1)
    assert (path.stat().st_mtime_ns, ports.alerts) == (before, [])


async def test_segments_of_a_preference_set_come_from_the_data_again(tmp_path: Path) -> None:
    def segment(round: int) -> tuple[list[Pair], int]:
        return [Pair(f"u{round}", round, (1,), (2, round), (3,), "", "", "", 1.0, 0, 0)], 0

    ledger = Ledger(tmp_path)
    sealed = await OfflineSource(segment, ledger, "d").streams(1)
    flip(tmp_path / "rounds" / "0001" / "pairs.parquet")
    told: list[str] = []
    again = OfflineSource(segment, ledger, "d", alert=told.append)
    assert await again.streams(1) == sealed
    assert "made again" in told[0]


async def test_a_judge_on_record_gives_each_verdict_once_in_order(tmp_path: Path) -> None:
    def comparison(uid: str, a: int, b: int, text: str = "") -> Comparison:
        return Comparison(uid, (), text, text, a, b)

    verdicts = [
        make_verdict(comparison("u", 0, 1), 0.9, 0.8, 1.5, None),
        make_verdict(comparison("u", 0, 1), 0.1, 0.2),
        invalid_verdict(comparison("v", 1, 0), "no answer"),
    ]
    write_verdicts(tmp_path / "v.parquet", verdicts)
    judge = RecordedJudge(read_verdicts(tmp_path / "v.parquet"))
    asked = [comparison("u", 0, 1, "x"), comparison("v", 1, 0, "y"), comparison("u", 0, 1, "x")]
    first, invalid, second = await judge.compare(asked)
    assert [first.comparison, invalid.comparison, second.comparison] == asked
    assert (first.p_ab, first.score_a, first.score_b, second.p_ab) == (0.9, 1.5, None, 0.1)
    assert (invalid.state, invalid.reason, math.isnan(invalid.p_ab)) == (verdicts[2].state, "no answer", True)
    with pytest.raises(RLHFError, match=r"no verdict on \('u', 0, 1\)"):
        await judge.compare(asked[:1])
