"""A wall clock may jump, a run must not notice: waits and durations are measured on the monotonic clock only."""

import ast
import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.config import RunConfig
from rlhf.monitor.group import MonitorGroup, build_monitor
from rlhf.monitor.jsonl import read_records
from rlhf.monitor.report import write_report

ROOT = Path(__file__).parents[2]
WALL = {"time.time", "time.time_ns", "time.ctime", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
ALLOWED = {
    "actors/elastic.py": "a drained node's deadline is a date; a clock that jumps costs prompts that others sample",
    "rlhf/monitor/group.py": "the `time` of a metrics line",
    "rlhf/rounds/run_directory.py": "when a config was changed",
    "rlhf/judging/llm/client.py": "a server's Retry-After may be a date; what it gives is capped",
}


def wall_clocks(source: str) -> set[str]:
    """Calls of the wall clock, however it was imported."""
    tree = ast.parse(source)
    direct = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(".".join(ast.unparse(node).split(".")[-2:]))
        elif isinstance(node, ast.Name):
            found.add(direct.get(node.id, node.id))
    return found & WALL


def test_only_what_is_written_down_for_people_comes_from_the_wall_clock() -> None:
    users = {
        str(path.relative_to(ROOT))
        for folder in ("rlhf", "actors")
        for path in (ROOT / folder).rglob("*.py")
        if wall_clocks(path.read_text(encoding="utf-8"))
    }
    assert users == set(ALLOWED)


@pytest.mark.parametrize(
    "source",
    ["import time\nx = time.time()", "from time import time as now\nnow()", "import datetime\ndatetime.datetime.now()"],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert wall_clocks(source)
    assert not wall_clocks("import time\ntime.monotonic()\ntime.perf_counter()")


def test_a_resumed_run_whose_clock_went_back_has_sane_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.model_validate(
        {"name": "r", "policy": {"path": "m"}, "prompts": {"path": "p"}, "monitor": {"tensorboard": True}}
    )

    def started(now: float) -> tuple[MonitorGroup, io.StringIO]:
        # Nothing of the run is shown by the clock: its part in it is what is written down.
        monkeypatch.setattr(time, "time", lambda: now)
        out = io.StringIO()
        return build_monitor(config, tmp_path, 4, Console(file=out, width=100)), out

    monitor, _ = started(2_000_000_000.0)
    for round in (1, 2, 3):
        monitor.log("step", round, {"train/loss": 1.0 / round}, step=round)
        monitor.log("round", round, {"timing_s/total": 2.0})
    monitor.close(1)
    monitor, _ = started(1_000_000_000.0)
    monitor.rewind(2)
    for round in (3, 4):
        monitor.log("step", round, {"train/loss": 1.0 / round}, step=round)
        monitor.log("round", round, {"timing_s/total": 2.0})
    monitor.close(0)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["round"] for record in records] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [record["step"] for record in records if record["event"] == "step"] == [1, 2, 3, 4]
    assert [record["time"] for record in records] == [2e9] * 4 + [1e9] * 4
    assert all(record["timing_s/total"] == 2.0 for record in records if record["event"] == "round")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = EventAccumulator(str(tmp_path / "tensorboard"))
    points.Reload()
    assert [event.step for event in points.Tensors("train/loss")] == [1, 2, 3, 4]
    report = write_report(tmp_path)
    assert report is not None
    assert "2001-09-09" in report.read_text(encoding="utf-8")
