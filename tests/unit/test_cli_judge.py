"""`rlhf judge bench` and `rlhf judge score` as commands: the sentiment judge on Ray, and every kind of bad input."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import cli
from rlhf.cli_judge import _identity
from rlhf.config import load_judge_config
from rlhf.config.judge import SentimentJudge as Config
from rlhf.judging.score_file import open_job
from rlhf.judging.score_file import score as score_lines
from rlhf.judging.sentiment import SentimentJudge

ROOT = Path(__file__).parents[2]
GOOD, BAD = "What a wonderful, happy day!", "This is a terrible, sad failure."


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    path = tmp_path / "judge.yaml"
    path.write_text(yaml.safe_dump({"judge": {"type": "sentiment"}}))
    return path


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, from the root so that local actors find the package."""
    return subprocess.run(
        [sys.executable, "-m", "rlhf.cli", "judge", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "120", "HF_HUB_OFFLINE": "1"},
    )


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr of a command that exits with 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["judge", *map(str, arguments)])
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.err.count("\n") == 1
    return shown.err


def test_bench(tmp_path: Path, judge: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": GOOD, "rejected": BAD, "subset": "donotanswer"},
        {"prompt": "q", "chosen": GOOD, "rejected": BAD, "subset": "math-prm"},
        {"prompt": "r", "chosen": BAD, "rejected": GOOD, "subset": "math-prm"},
        {"prompt": "s", "chosen": BAD, "rejected": BAD, "subset": "math-prm"},
        {"prompt": "t", "chosen": BAD, "rejected": GOOD, "subset": "math-prm"},
    ]
    data = lines(tmp_path / "pairs.jsonl", rows)
    done = command("bench", judge, "judge.scale=8", "--data", data, "--limit", "3", "--json", "-")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    report = json.loads(done.stdout)
    assert report["judge"]["scale"] == 8.0
    assert (report["data"]["examples"], report["data"]["dropped"]["identical"]) == (3, 1)
    assert (report["overall"]["correct"], report["overall"]["n"]) == (2, 3)
    scores = {each["name"]: each["score"] for each in report["rewardbench"]["categories"]}
    assert scores == {"Safety": 100.0, "Reasoning": 50.0}
    assert "RewardBench" in done.stderr


def test_score_and_again(tmp_path: Path, judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lines(tmp_path / "in.jsonl", [{"prompt": str(n), "a": GOOD, "b": BAD, "n": n} for n in range(5)])
    out = tmp_path / "out.jsonl"
    arguments = ("score", judge, "--input", source, "--output", out)
    done = command(*arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert done.stdout == f"{out}: 5 lines scored (5 win, 0 lose, 0 tie, 0 invalid), 0 were there before\n"
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(each["n"], each["line"], each["state"]) for each in results] == [(n, n + 1, "win") for n in range(5)]
    with pytest.raises(SystemExit) as caught:
        cli.main(["judge", *map(str, arguments)])
    assert not caught.value.code
    assert capsys.readouterr().out == f"{out}: all 5 lines are scored; nothing to do\n"
    assert "scored by another judge" in fails(capsys, "score", judge, "judge.scale=2", *arguments[2:])
    # more replicas give the same verdicts
    with pytest.raises(SystemExit) as caught:
        cli.main(["judge", "score", str(judge), "judge.replicas=2", *map(str, arguments[2:])])
    assert not caught.value.code


def test_a_whole_run_config_gives_its_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no.jsonl"
    assert f"data.path = {missing}: no such file" in fails(
        capsys, "bench", "configs/quickstart.yaml", "--data", missing
    )


def test_bad_input_is_one_line(tmp_path: Path, judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = lines(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": GOOD, "rejected": BAD}])
    scored = lines(tmp_path / "in.jsonl", [{"prompt": "p", "a": GOOD}])
    out = tmp_path / "out.jsonl"
    assert "judge.type" in fails(capsys, "bench", judge, "judge.type=oracle", "--data", data)
    assert "no usable preference" not in fails(capsys, "bench", judge, "--data", scored)
    assert "no column 'a'" in fails(capsys, "bench", judge, "--data", data, "--format", "labelled")
    assert "--json" in fails(capsys, "bench", judge, "--data", data, "--json", tmp_path / "no" / "report.json")
    assert f"{scored}: line 1: no key 'b'" in fails(capsys, "score", judge, "--input", scored, "--output", out)
    nowhere = ("judge.type=pair_model", f"judge.path={tmp_path / 'none'}")
    message = fails(capsys, "score", judge, *nowhere, "--input", data, "--output", out)
    assert message.startswith(f"rlhf: {judge}: judge.path")
    assert not out.exists()


def test_a_judge_without_its_path_is_one_line(tmp_path: Path, judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = lines(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": GOOD, "rejected": BAD, "a": GOOD, "b": BAD}])
    out = tmp_path / "out.jsonl"
    for arguments in (("bench", judge, "judge.type=pair_model", "--data", data),
                      ("score", judge, "judge.type=pair_model", "--input", data, "--output", out)):  # fmt: skip
        assert fails(capsys, *arguments).startswith(f"rlhf: {judge}: judge.path: required here; ")
    assert not out.exists()


def test_nothing_to_do_tells_what_is_invalid(tmp_path: Path, judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lines(tmp_path / "in.jsonl", [{"prompt": "p", "a": GOOD, "b": " "}, {"prompt": "q", "a": GOOD, "b": BAD}])
    out = tmp_path / "out.jsonl"
    identity = _identity(load_judge_config(str(judge), ()))
    with open_job(source, out, identity) as job:
        asyncio.run(score_lines(SentimentJudge(Config()), job, lambda amount: None))
    with pytest.raises(SystemExit) as caught:
        cli.main(["judge", "score", str(judge), "--input", str(source), "--output", str(out)])
    assert not caught.value.code
    assert capsys.readouterr().out == (
        f"{out}: all 2 lines are scored; nothing to do; 1 invalid, most frequent reason (1 times): "
        "response B is blank; --retry-invalid judges them again\n"
    )
