"""metrics.jsonl and stored tables."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import InputError
from rlhf.monitor.jsonl import JsonlSink, file_stem, read_records, to_event, to_record
from rlhf.monitor.sink import Event, clean_metrics, clean_rows, clean_text

NUMBERS = st.one_of(st.integers(-(2**62), 2**62), st.floats())
METRICS = st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1).map("m/{}".format), NUMBERS, max_size=5)


def event(round: int, step: int | None = None, **metrics: float) -> Event:
    return Event("round" if step is None else "step", round, step, 12.5, clean_metrics(metrics))


@settings(deadline=None)
@given(METRICS)
def test_numbers_survive_the_file_format_exactly(metrics: dict[str, float]) -> None:
    line = json.dumps(to_record(Event("step", 3, 7, 1.25, clean_metrics(metrics))), allow_nan=False)
    back = to_event(json.loads(line))
    assert (back.event, back.round, back.step, back.time) == ("step", 3, 7, 1.25)
    assert back.metrics == {k: v if math.isfinite(v) else None for k, v in metrics.items()}


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    cleaned = clean_metrics({"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(0.25), "d": True, "e": None})
    assert cleaned == {"a": 0.5, "b": 3, "c": 0.25, "d": 1, "e": None}
    assert [type(value) for value in cleaned.values()] == [float, int, float, int, type(None)]


def test_each_line_is_on_disk_before_the_sink_is_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log(event(1, step=4, loss=0.5, bad=math.inf))
    text = (tmp_path / "metrics.jsonl").read_text()
    sink.close(0)
    assert text == '{"event": "step", "round": 1, "step": 4, "time": 12.5, "loss": 0.5, "bad": null}\n'


def test_only_steps_have_a_step(tmp_path: Path) -> None:
    assert "step" not in to_record(event(1, loss=1.0))


def test_a_metric_cannot_take_the_name_of_a_field() -> None:
    with pytest.raises(ValueError, match="'round'"):
        to_record(Event("round", 1, None, 0.0, {"round": 2}))


@pytest.mark.parametrize("torn", ['{"event": "rou', '{"event": "round", "round": 9, "time": 1}', "\x00" * 9000])
def test_a_torn_last_line_is_dropped_when_the_file_is_opened_again(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(tmp_path)
    sink.log(event(1, x=1.0))
    sink.close(0)
    with path.open("a") as file:
        file.write(torn)
    assert [record["round"] for record in read_records(path)] == [1]
    again = JsonlSink(tmp_path)
    again.log(event(2, x=2.0))
    again.close(0)
    assert [record["round"] for record in read_records(path)] == [1, 2]


def test_a_file_that_holds_a_torn_line_only_becomes_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event"')
    JsonlSink(tmp_path).close(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12), st.integers(-1, 7))
def test_rewind_keeps_exactly_the_rounds_up_to_the_one_given(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[int], keep: int
) -> None:
    sink = JsonlSink(tmp_path_factory.mktemp("run"))
    for number, round in enumerate(rounds):
        sink.log(event(round, number=number))
    before = sink.path.read_text().splitlines()
    sink.rewind(keep)
    sink.log(event(keep + 1, number=99))
    sink.close(0)
    kept = [line for line, round in zip(before, rounds, strict=True) if round <= keep]
    assert sink.path.read_text().splitlines()[:-1] == kept
    assert read_records(sink.path)[-1]["number"] == 99


def test_rewind_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log(event(1, x=1.0))
    sink.log(event(2, x=1.0))
    with sink.path.open() as old:
        sink.rewind(1)
        assert len(old.readlines()) == 2, "the old file must stay whole until the new one takes its name"
    sink.close(0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", '{"event": "round", "time": 1}', '{"event": 1, "round": 1, "time": 1}']
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(to_record(event(1, x=1.0)))}\n{line}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a metrics line") as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_logging_after_close_is_an_error(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.close(0)
    sink.close(0)
    with pytest.raises(RuntimeError, match="after close"):
        sink.log(event(1))


def test_a_table_is_stored_under_a_safe_name_and_replaced(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.table("../samples of round 1", ["a", "b"], clean_rows([["x", math.nan]]))
    sink.table("../samples of round 1", ["a", "b"], clean_rows([["y\ud800", Path("z")]]))
    sink.close(0)
    files = list((tmp_path / "tables").iterdir())
    assert [path.name for path in files] == [f"{file_stem('../samples of round 1')}.json"]
    assert files[0].parent == tmp_path / "tables"
    assert json.loads(files[0].read_text()) == {
        "name": "../samples of round 1",
        "columns": ["a", "b"],
        "rows": [["y?", "z"]],
    }


@settings(deadline=None)
@given(st.text())
def test_clean_text_is_printable_anywhere(text: str) -> None:
    cleaned = clean_text(text)
    cleaned.encode("utf-8")
    assert not any(ord(char) < 32 and char != "\n" for char in cleaned)
    assert "\x7f" not in cleaned
    assert "\x9b" not in cleaned
    assert clean_text(cleaned) == cleaned
