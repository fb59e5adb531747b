"""`rlhf judge score` on a real endpoint: down, back again, and stopped by SIGTERM."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from tests.unit.llm_endpoint import completion, serving, shown_first

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """An endpoint that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        yield server


def written(folder: Path, base_url: str, **fields: Any) -> list[str]:
    """The command's arguments, for 6 lines to score."""
    judge = {"type": "llm", "base_url": base_url, "model": "m", "retries": 0, **fields}
    config, source = folder / "judge.yaml", folder / "in.jsonl"
    config.write_text(yaml.safe_dump({"judge": judge}))
    rows = [{"prompt": f"Question {n}?", "a": f"good {n}", "b": f"bad {n}", "n": n} for n in range(6)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(config), "--input", str(source), "--output", str(folder / "out.jsonl")]
    return [sys.executable, "-m", "rlhf.cli", "judge", "score", *arguments]


def command(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT, env=ENVIRONMENT
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def states(folder: Path) -> list[str]:
    return [json.loads(line)["state"] for line in (folder / "out.jsonl").read_text().splitlines()]


def test_an_endpoint_that_is_down_is_no_success_and_its_lines_can_be_judged_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = written(tmp_path, f"http://127.0.0.1:{port}/v1")
    done = command([*arguments, "judge.health.min_valid=0.5"])
    assert (done.returncode, states(tmp_path)) == (1, [])
    assert "only 0.0% of 6 comparisons could be judged, judge.health.min_valid = 0.5" in done.stderr
    done = command(arguments)  # by default any share is enough, but the reason is told
    assert (done.returncode, states(tmp_path)) == (0, ["invalid"] * 6)
    assert "6 invalid, most frequent reason (6 times): " in done.stdout
    done = command(arguments)
    assert "all 6 lines are scored; nothing to do; 6 invalid, most frequent reason (6 times): " in done.stdout

    def answer(body: dict[str, Any], n: int) -> web.Response:
        first = shown_first(body).startswith("good")
        return completion(logprobs={"A": -0.1 if first else -2.5, "B": -2.5 if first else -0.1})

    async def up() -> subprocess.CompletedProcess[str]:
        async with serving(answer, port):
            return await asyncio.to_thread(command, [*arguments, "--retry-invalid"])

    done = asyncio.run(up())
    assert (done.returncode, states(tmp_path)) == (0, ["win"] * 6), done.stderr
    assert "6 lines judged again (6 win, 0 lose, 0 tie, 0 invalid)\n" in done.stdout


@pytest.mark.parametrize("name", ["score", "bench"])
def test_sigterm_ends_the_command_with_143(tmp_path: Path, silent: socket.socket, name: str) -> None:
    arguments = written(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
    then = f"the same command goes on behind the last line of {tmp_path / 'out.jsonl'}"
    if name == "bench":
        data = tmp_path / "pairs.jsonl"
        data.write_text(json.dumps({"prompt": "p", "chosen": "good", "rejected": "bad"}) + "\n")
        arguments = [*arguments[:4], "bench", arguments[5], "--data", str(data)]
        then = "nothing is written; the same command starts over"
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=stderr, cwd=ROOT, env=ENVIRONMENT)
        try:
            connection, _ = silent.accept()  # the judge is at work
            with connection:
                process.send_signal(signal.SIGTERM)
                code = process.wait(60)
        finally:
            process.kill()
            process.wait()
    shown = log.read_text()
    assert (code, "Traceback" in shown) == (143, False), shown
    assert shown.splitlines()[-1] == f"rlhf: stopped by SIGTERM; {then}"
