"""What a person sees."""

import io
import re
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from rlhf.monitor.console import MAX_CHARS, MAX_ROWS, ConsoleSink
from rlhf.monitor.format import StepMeans, duration, kept_and_seen, pack
from rlhf.monitor.sink import Event, clean_rows

STEP = {"train/loss": 0.621, "rewards/margins": 0.14, "rewards/accuracies": 0.71}
ROUND = {
    "judge/score_mean": 0.52,
    "judge/flip_rate": 0.0,
    "pairs/kept": 27,
    "pairs/dropped_tie": 4,
    "pairs/dropped_invalid": 1,
    "rollout/tokens_per_s": 818.4,
    "timing_s/generate": 6.1,
    "timing_s/judge": 0.1,
    "timing_s/learn": 9.8,
    "timing_s/sync": 0.5,
    "timing_s/total": 16.6,
}


def screen(width: int = 80, terminal: bool = True, rounds: int = 8) -> tuple[ConsoleSink, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    return ConsoleSink(console, rounds), out


def event(kind: str, round: int, metrics: Mapping[str, float | None], step: int | None = None) -> Event:
    return Event(kind, round, step, 0.0, metrics)


def test_a_round_is_one_line_in_a_log_file() -> None:
    sink, out = screen(terminal=False)
    sink.log(event("step", 3, STEP, 1))
    sink.log(event("round", 3, ROUND))
    assert out.getvalue() == (
        "round 3/8  loss 0.621  margin  0.14  acc 0.71  score 0.52  kept 27/32  flips  0%   818 tok/s"
        "  gen  6.1s  judge  0.1s  learn  9.8s  sync  0.5s  total 16.6s\n"
    )


@pytest.mark.parametrize(("width", "rounds"), [(80, 8), (80, 20), (120, 8), (120, 20)])
def test_a_round_takes_two_aligned_lines_on_a_terminal(width: int, rounds: int) -> None:
    sink, out = screen(width, rounds=rounds)
    for round, scale in ((3, 1.0), (4, 0.5)):
        sink.log(event("step", round, {name: value * scale for name, value in STEP.items()}, 1))
        sink.log(event("round", round, ROUND))
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= width
    assert [lines[0].index(label) for label in ("loss", "kept")] == [
        lines[2].index(label) for label in ("loss", "kept")
    ]


def test_step_metrics_are_averaged_over_their_own_round() -> None:
    sink, out = screen(terminal=False)
    for round, losses in ((1, (0.4, 0.6)), (2, (0.1, None))):
        for step, loss in enumerate(losses):
            sink.log(event("step", round, {"train/loss": loss}, step))
    sink.log(event("round", 1, {}))
    sink.log(event("round", 2, {}))
    assert out.getvalue().splitlines() == ["round 1/8  loss 0.500", "round 2/8  loss 0.100"]


def test_missing_and_null_metrics_leave_gaps_only() -> None:
    sink, out = screen(terminal=False)
    sink.log(event("round", 1, {"train/loss": None, "pairs/kept": 0}))
    sink.log(event("round", 2, {}))
    sink.log(event("eval", 2, {"eval/win_rate": None}))
    assert out.getvalue().splitlines() == ["round 1/8  kept 0/0", "round 2/8", "eval  2/8"]


def test_evaluations_are_compared_with_the_first() -> None:
    sink, out = screen(width=120)
    sink.log(event("eval", 0, {"eval/score": 0.395}))
    later = {"eval/win_rate": 0.71, "eval/win_rate_low": 0.62, "eval/win_rate_high": 0.79, "eval/score": 0.52}
    sink.log(event("eval", 4, later))
    assert out.getvalue().splitlines() == [
        "eval  0/8  score 0.395",
        "eval  4/8  win 0.71 [0.62, 0.79]  score 0.395 → 0.520",
    ]


def test_an_evaluations_faulty_verdicts_are_shown_where_there_are_any() -> None:
    sink, out = screen(terminal=False)
    for round, invalid, flips in ((0, 0.0, 0.0), (4, 0.008, 0.0), (8, 0.0, 0.125), (8, None, 0.48)):
        sink.log(event("eval", round, {"eval/win_rate": 0.5, "eval/invalid_rate": invalid, "eval/flip_rate": flips}))
    assert [line.partition("win 0.50")[2] for line in out.getvalue().splitlines()] == [
        "",
        "  invalid 0.8%",
        "  flips 12.5%",
        "  flips 48.0%",
    ]


def test_pairs_seen_count_every_way_to_be_dropped() -> None:
    assert kept_and_seen({**ROUND, "pairs/dropped_long": 3}) == (27, 35)
    assert kept_and_seen({}) is None


def test_alerts_are_one_message_and_cannot_forge_lines_or_colours() -> None:
    sink, out = screen(terminal=False)
    sink.alert("[red]a[/red]\nround 9/8 \x1b[2Jb")
    assert out.getvalue() == "! [red]a[/red] round 9/8 �[2Jb\n"


def test_long_alerts_hang_under_their_mark() -> None:
    sink, out = screen(width=40)
    sink.alert("word " * 20)
    lines = out.getvalue().splitlines()
    assert len(lines) > 1
    assert all(line.startswith("  ") and len(line) <= 40 for line in lines[1:])


@pytest.mark.parametrize("width", [80, 120])
def test_long_texts_fold_inside_the_table(width: int) -> None:
    sink, out = screen(width)
    words = [f"word{i}" for i in range(40)]
    rows = clean_rows(
        [["[b]prompt[/b] " + "x" * 200, " ".join(words), "日本語のテキスト" * 10, 0.5], ["short", "", None, -1]]
    )
    sink.table("samples", ["prompt", "before", "after", "score before"], rows)
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    cells = [line.split("│") for line in lines if line.startswith("│")]
    assert "".join(row[1].strip() for row in cells).count("x") == 200
    assert [word for row in cells for word in row[2].split() if word.startswith("word")] == words
    assert "[b]prompt[/b]" in "".join(lines)


def test_a_long_table_is_cut_and_says_so() -> None:
    sink, out = screen()
    sink.table("a title wider than its table", ["n"], [[i] for i in range(MAX_ROWS + 7)])
    assert "a title wider than its table" in out.getvalue()
    assert "7 more rows" in out.getvalue()
    assert f" {MAX_ROWS - 1} " in out.getvalue()
    assert f" {MAX_ROWS} " not in out.getvalue()


def test_a_very_long_text_is_cut_and_says_so() -> None:
    sink, out = screen(120)
    sink.table("t", ["text"], [["y" * (MAX_CHARS + 5)]])
    assert out.getvalue().count("y") == MAX_CHARS
    assert f"({MAX_CHARS + 5} characters)" in out.getvalue()


def test_a_console_that_is_not_utf8_does_not_crash(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        sink = ConsoleSink(Console(file=file, width=80), 8)
        sink.log(event("eval", 0, {"eval/score": 0.1}))
        sink.log(event("eval", 1, {"eval/score": 0.2}))
        sink.alert("naïve")
        sink.table("tablé", ["cólumn"], [["日本"], [None]])
    text = (tmp_path / "out").read_text(encoding="ascii")
    assert "score 0.100 ? 0.200" in text
    assert "na?ve" in text


def test_short_parts_leave_no_line_in_a_log_file_and_long_ones_leave_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sink, out = screen(terminal=False)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with sink.progress("generate", 8) as outer:
        with sink.progress("judge", None):
            now[0] += 2
        outer.advance(8)
        now[0] += 70
    assert out.getvalue() == "generate 8/8 in 1 min 12 s\n"


def test_a_part_that_fails_says_how_far_it_came() -> None:
    sink, out = screen(terminal=False)
    part = sink.progress("learn", 27)

    def learn() -> None:
        with part:
            part.advance(5)
            raise KeyError

    with pytest.raises(KeyError):
        learn()
    assert out.getvalue() == "learn stopped at 5/27 after 0.0 s\n"


def test_open_parts_have_a_bar_each_and_leave_nothing_behind() -> None:
    sink, out = screen()
    with sink.progress("generate", 8) as first, sink.progress("load [red]model", None) as second:
        first.advance(3)
        assert sink._bars._progress is not None
        tasks = {task.description: (task.completed, task.total) for task in sink._bars._progress.tasks}
        assert tasks == {"generate": (3, 8), "load [red]model": (0, None)}
        sink._bars._progress.refresh()
        shown = out.getvalue()
        assert "3/8" in shown
        assert "load [red]model" in shown
        second.advance()
    assert sink._bars._progress is None
    end = out.getvalue()[len(shown) :]
    rest = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", end.rpartition("\x1b[2K")[2])
    assert rest.strip() == "", "the display must erase its own lines"
    assert "\x1b[2K" in end
    with sink.progress("again", 1):
        assert sink._bars._progress is not None


def test_a_long_bar_moves_in_thousandths_and_shows_its_end() -> None:
    sink, _ = screen()
    with sink.progress("generate", 5_003) as part:
        assert sink._bars._progress is not None
        [task] = sink._bars._progress.tasks
        shown = []
        for _ in range(5_003):
            part.advance()
            shown.append(task.completed)
    assert shown[:11] == [0, 0, 0, 0, 5, 5, 5, 5, 5, 10, 10]
    assert shown[-1] == 5_003
    assert len(set(shown)) == 1002


def test_close_takes_open_bars_away() -> None:
    sink, _ = screen()
    part = sink.progress("generate", 8)
    part.__enter__()
    sink.close(1)
    assert sink._bars._progress is None
    part.advance()
    part.__exit__(None, None, None)


def test_pack_never_loses_a_cell() -> None:
    cells = [["a" * 30, "b" * 30, "c" * 30], [], ["d" * 90]]
    lines = pack("head", cells, 70)
    assert " ".join(lines).split() == ["head", "a" * 30, "b" * 30, "c" * 30, "d" * 90]
    assert [len(line) <= 70 for line in lines] == [True, True, False]
    assert pack("head", [[]], 70) == ["head"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"), (8070, "2 h 14 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_steps_that_are_taken_again_count_once() -> None:
    sink, out = screen(terminal=False)
    sink.log(event("step", 1, {"train/loss": 0.3}, 1))
    sink.log(event("step", 2, {"train/loss": 0.9}, 2))
    sink.rewind(1)
    sink.log(event("step", 2, {"train/loss": 0.1}, 2))
    sink.log(event("round", 1, {}))
    sink.log(event("round", 2, {}))
    assert out.getvalue().splitlines() == ["round 1/8  loss 0.300", "round 2/8  loss 0.100"]


def test_step_means_forget_earlier_rounds() -> None:
    means = StepMeans()
    means.add(1, {"x": 1.0})
    means.add(2, {"x": 3.0})
    assert means.pop(2) == {"x": 3.0}
    assert means.pop(1) == {}
