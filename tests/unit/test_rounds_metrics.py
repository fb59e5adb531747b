"""Round metrics put together from the parts, and the table a run ends with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.evaluation.summary import show_summary
from rlhf.monitor.format import eval_cells
from rlhf.records import Pair, SealedRound, SyncReport
from rlhf.rounds import metrics as module
from rlhf.rounds.metrics import RoundClock, round_metrics, staleness


def sealed(round: int, *versions: tuple[int, int]) -> SealedRound:
    pairs = [Pair("u", round, (1,), (2,), (3,), "", "", "", 0.9, chosen, rejected) for chosen, rejected in versions]
    return SealedRound(round, tuple(pairs), "digest")


class Source:
    """What `round_metrics` asks of a source."""

    def metrics(self, round: int) -> tuple[dict[str, float], list[str]]:
        return {"pairs/kept": 2.0, "timing_s/judge": 1.5}, ["judge: it flips"]


def test_staleness_counts_versions_behind_the_one_being_trained() -> None:
    """Round 5 trains version 4: a response of version 4 is fresh, one of version 2 is two behind."""
    found = staleness(sealed(5, (4, 4), (4, 2), (3, 3)))
    assert found == {"pairs/staleness_mean": pytest.approx(4 / 6), "pairs/staleness_max": 2.0}
    assert staleness(sealed(5)) == {"pairs/staleness_mean": 0.0, "pairs/staleness_max": 0.0}


def test_the_clock_books_each_second_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.5, 13.0, 20.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    clock = RoundClock()
    clock.lap("idle")
    clock.lap("learn")
    assert clock.laps == {"idle": 2.5, "learn": 0.5}
    assert clock.total() == 10.0


def test_everything_measured_is_in_the_round_s_metrics() -> None:
    clock = RoundClock()
    clock.lap("idle")
    clock.lap("learn")
    statistics = {"timing_s/learn": 7.0, "perf/mfu": 0.25, "train/skipped": 2.0, "pairs/dropped_long": 3.0}
    synced = SyncReport(5, 0.5, 270, ("g",), {}, 0.01)
    found, warnings = round_metrics(Source(), statistics, sealed(5, (4, 3)), synced, clock, 4.5)  # type: ignore[arg-type]
    expected = {
        "pairs/kept": 2.0,
        "timing_s/judge": 1.5,
        "timing_s/learn": 7.0,  # the learner's own clock, not the loop's
        "perf/mfu": 0.25,
        "sync/seconds": 0.5,
        "sync/bytes": 270.0,
        "sync/probe_error": 0.01,
        "timing_s/checkpoint": 4.5,
        "pairs/staleness_max": 1.0,
        "pairs/staleness_mean": 0.5,
    }
    assert found.items() >= expected.items()
    assert found["timing_s/total"] >= found["timing_s/idle"] >= 0.0
    assert warnings[0] == "judge: it flips"
    assert [("2 steps were skipped" in warnings[1]), ("3 pairs are longer" in warnings[2]), len(warnings)] == [
        True,
        True,
        3,
    ]


def test_no_warning_where_nothing_is_wrong() -> None:
    statistics = {"train/skipped": 0.0, "pairs/dropped_long": 0.0}
    synced = SyncReport(1, 0.5, 270, ("g",), {}, 0.01)
    _, warnings = round_metrics(Source(), statistics, sealed(1), synced, RoundClock(), 0.0)  # type: ignore[arg-type]
    assert warnings == ["judge: it flips"]


class Tables:
    """Keeps the tables it is given."""

    def __init__(self) -> None:
        self.tables: list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]] = []

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables.append((name, tuple(columns), [tuple(row) for row in rows]))


def write_events(run_dir: Path, *events: dict[str, Any]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")


def summary(run_dir: Path) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    tables = Tables()
    show_summary(run_dir, tables)  # type: ignore[arg-type]
    return tables.tables


def test_the_summary_sets_the_first_evaluation_beside_the_last(tmp_path: Path) -> None:
    write_events(
        tmp_path,
        {"event": "eval", "round": 0, "eval/score": 0.4012, "eval/length_mean": 40.04, "eval/distinct_2": 0.9},
        {"event": "step", "round": 1, "eval/score": 9.0},
        {"event": "eval", "round": 4, "eval/score": 0.55, "eval/win_rate": 0.6},
        {
            **{"event": "eval", "round": 8, "eval/score": 0.7496, "eval/length_mean": 44.0, "eval/distinct_2": 0.85},
            **{"eval/win_rate": 0.8125, "eval/win_rate_low": 0.75, "eval/win_rate_high": 0.9},
        },
        {"event": "round", "round": 8, "eval/score": 9.0},
    )
    [(_, columns, rows)] = summary(tmp_path)
    assert columns[1:] == ("round 0", "round 8")
    assert {name.strip(): values for name, *values in rows} == {
        "judge score": ["0.401", "0.750"],
        "win rate against round 0": ["", "0.812"],
        "95 % interval, low": ["", "0.750"],
        "95 % interval, high": ["", "0.900"],
        "response length, tokens": ["40.0", "44.0"],
        "distinct bigrams": ["0.900", "0.850"],
    }


def test_one_evaluation_is_no_comparison(tmp_path: Path) -> None:
    write_events(tmp_path, {"event": "eval", "round": 0, "eval/score": 0.4}, {"event": "round", "round": 1})
    assert summary(tmp_path) == []


def test_the_summary_shows_both_judges_and_leaves_out_what_nobody_measured(tmp_path: Path) -> None:
    write_events(
        tmp_path,
        {"event": "eval", "round": 0, "eval/distinct_2": 0.9},
        {
            **{"event": "eval", "round": 8, "eval/distinct_2": 0.8, "eval/win_rate": 0.55},
            **{"eval/judge_win_rate": 0.8125, "eval/win_rate_gap": 0.2625},
        },
    )
    [(_, _, rows)] = summary(tmp_path)
    assert [(name.strip(), *values) for name, *values in rows] == [
        ("win rate against round 0", "", "0.550"),
        ("win rate by the training judge", "", "0.812"),
        ("gap to the evaluation's judge", "", "+0.263"),
        ("distinct bigrams", "0.900", "0.800"),
    ]


def test_the_console_shows_both_judges() -> None:
    both = {"eval/win_rate": 0.55, "eval/judge_win_rate": 0.8, "eval/win_rate_gap": 0.25}
    assert eval_cells(both, None) == ["win 0.55", "by judge 0.80", "gap +0.25"]
    assert eval_cells({"eval/win_rate": 0.55}, None) == ["win 0.55"]
