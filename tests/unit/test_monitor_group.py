"""All sinks behind one monitor: the same numbers everywhere, resume, W&B and its failures."""

import io
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.config import RunConfig
from rlhf.config.load import validate
from rlhf.errors import InputError
from rlhf.monitor.group import MonitorGroup, build_monitor

SECRET = "0123456789abcdef0123456789abcdef01234567"
METRICS = {"train/loss": 0.1, "rewards/margins": 1 / 3, "train/pairs": 16, "kl/mean": math.nan, "train/lr": 3e-5}


def config(**monitor: Any) -> RunConfig:
    data = {"name": "unit", "policy": {"path": "m"}, "prompts": {"path": "p"}, "monitor": monitor}
    data["generator"] = {"engine": {"note": f"x{SECRET}"}}
    return validate(data, "test.yaml")


def build(run_dir: Path, **monitor: Any) -> tuple[MonitorGroup, io.StringIO]:
    out = io.StringIO()
    return build_monitor(config(**monitor), run_dir, 8, Console(file=out, width=100)), out


def jsonl(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tensorboard(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {
        tag: [(item.step, float(tensor_util.make_ndarray(item.tensor_proto))) for item in accumulator.Tensors(tag)]
        for tag in accumulator.Tags()["tensors"]
    }


def wandb_records(run_dir: Path) -> Iterator[Any]:
    """The records of the offline runs, read from W&B's log file (blocks of 32 KiB as in LevelDB, 7 bytes of header)."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # finish() returns before W&B's service has written its log; this waits for it
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, position, buffer = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            _crc, length, kind = struct.unpack("<IHB", data[position : position + 7])
            body = data[position + 7 : position + 7 + length]
            position += 7 + length
            buffer = body if kind in (1, 2) else buffer + body
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(buffer)
                yield record


def wandb_history(run_dir: Path) -> list[dict[str, Any]]:
    rows = []
    for record in wandb_records(run_dir):
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def files_with_secret(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short-lived W&B home, and a key in the environment that must stay there."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return tmp_path / "run"


def test_every_sink_has_the_same_numbers_and_no_secret(offline: Path) -> None:
    monitor, out = build(offline, wandb={"mode": "offline"}, tensorboard=True)
    monitor.log("step", 1, METRICS, step=5)
    monitor.log("round", 1, {"pairs/kept": 27, "judge/flip_rate": 0.1 + 0.2})
    monitor.log("eval", 1, {"eval/score": 2 / 3})
    monitor.table("samples", ["prompt", "after", "score"], [["p", "a", 0.5], ["q", None, math.inf]])
    monitor.alert("mind the gap")
    monitor.close(0)
    records = jsonl(offline)
    expected = [
        {"train/loss": 0.1, "rewards/margins": 1 / 3, "train/pairs": 16, "train/lr": 3e-5},
        {"pairs/kept": 27, "judge/flip_rate": 0.1 + 0.2},
        {"eval/score": 2 / 3},
    ]
    fixed = ("event", "round", "step", "time")
    logged = [{k: v for k, v in record.items() if k not in fixed and v is not None} for record in records]
    assert logged == expected
    assert records[0]["kl/mean"] is None
    axes = [{"step": 5}, {"round": 1}, {"eval_round": 1}]
    history = wandb_history(offline)
    assert history[:3] == [{**axis, **values} for axis, values in zip(axes, expected, strict=True)]
    assert history[3]["tables/samples/nrows"] == 2
    points = {
        name: [(*axis.values(), value)]
        for axis, values in zip(axes, expected, strict=True)
        for name, value in values.items()
    }
    assert tensorboard(offline) == points
    assert "mind the gap" in out.getvalue()
    assert [r.alert.text for r in wandb_records(offline) if r.HasField("alert")] == ["mind the gap"]
    axis_of = {r.metric.name: r.metric.step_metric for r in wandb_records(offline) if r.HasField("metric")}
    assert axis_of["train/loss"] == "step"
    assert axis_of["pairs/kept"] == "round"
    assert axis_of["eval/score"] == "eval_round"
    assert len(list(offline.rglob("*"))) > 5
    assert files_with_secret(offline.parent) == []


def test_a_resumed_run_goes_on_in_the_same_wandb_run(offline: Path) -> None:
    for value in (1.0, 2.0):
        monitor, _ = build(offline, wandb={"mode": "offline"})
        monitor.log("round", int(value), {"x/y": value})
        monitor.close(0)
    ids = {record.run.run_id for record in wandb_records(offline) if record.HasField("run")}
    assert ids == {(offline / "wandb_id").read_text().strip()}
    assert sorted(row["x/y"] for row in wandb_history(offline)) == [1.0, 2.0]


def test_wandb_online_without_a_key_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"export WANDB_API_KEY or use monitor\.wandb\.mode=offline") as caught:
        build(tmp_path / "run", wandb={"mode": "online"})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_wandb_online_without_a_server_is_one_line(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf.monitor.wandb_monitor import WandbSink

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"W&B did not start .*mode=offline") as caught:
        WandbSink(config(wandb={"mode": "online"}), offline, pytest.fail, timeout=3.0)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert not (offline / "wandb_id").exists()
    assert files_with_secret(offline.parent) == []


def test_wandb_that_dies_is_warned_about_once_and_the_run_goes_on(offline: Path) -> None:
    monitor, out = build(offline, wandb={"mode": "offline"})
    monitor.log("round", 1, {"x/y": 1.0})
    import wandb

    wandb.teardown()  # the service process ends, as it would if it were killed
    for round in (2, 3, 4):
        monitor.log("round", round, {"x/y": 1.0})
        monitor.alert(f"alert {round}")
    monitor.close(0)
    assert out.getvalue().count("W&B stopped taking data") == 1
    assert [record["round"] for record in jsonl(offline)] == [1, 2, 3, 4]


def test_rewind_forgets_later_rounds_in_every_file(tmp_path: Path) -> None:
    monitor, _ = build(tmp_path, tensorboard=True)
    for round in (1, 2, 3):
        monitor.log("step", round, {"train/loss": round / 10}, step=round * 2)
        monitor.log("round", round, {"x/y": float(round)})
    monitor.close(1)
    monitor, _ = build(tmp_path, tensorboard=True)
    monitor.rewind(1)
    monitor.log("round", 2, {"x/y": 20.0})
    monitor.close(0)
    assert [(r["event"], r["round"]) for r in jsonl(tmp_path)] == [("step", 1), ("round", 1), ("round", 2)]
    assert tensorboard(tmp_path) == {"train/loss": [(2, 0.1)], "x/y": [(1, 1.0), (2, 20.0)]}


def test_a_resumed_run_still_compares_with_the_first_evaluation(tmp_path: Path) -> None:
    monitor, _ = build(tmp_path)
    monitor.log("eval", 0, {"eval/score": 0.395})
    monitor.close(1)
    monitor, out = build(tmp_path)
    monitor.log("eval", 4, {"eval/score": 0.5})
    monitor.close(0)
    assert "score 0.395 → 0.500" in out.getvalue()


def test_a_ragged_table_is_an_error(tmp_path: Path) -> None:
    monitor, _ = build(tmp_path)
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        monitor.table("t", ["a", "b"], [[1, 2], [3]])
    monitor.close(0)


def test_progress_is_the_consoles(tmp_path: Path) -> None:
    monitor, out = build(tmp_path)
    with monitor.progress("quick", 2) as part:
        part.advance(2)
    monitor.close(0)
    assert out.getvalue() == ""


def test_a_damaged_metrics_file_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError, match="not a metrics line"):
        build(tmp_path, tensorboard=True)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_heavy_libraries_are_loaded_only_when_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlhf.config.load import validate;"
        "from rlhf.monitor.group import build_monitor; import rlhf.monitor.report;"
        "c = validate({'name': 'n', 'policy': {'path': 'm'}, 'prompts': {'path': 'p'}}, 'x');"
        f"m = build_monitor(c, Path({str(tmp_path)!r}), 8); m.log('round', 1, {{'a/b': 1.0}}); m.close(0);"
        "print([name for name in ('torch', 'wandb', 'ray', 'vllm', 'tensorboard') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=dict(os.environ), check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
