"""cluster/slurm.sh for real, except for Slurm: `srun` runs the step here, `scontrol` knows one node."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.integration.conftest import ROOT, SMOLLM2

SRUN = """#!/bin/bash
while [ "$1" != bash ]; do echo "$1" >>"$SHIM_LOG"; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$SHIM_LOG"
[ "$1" != show ] || echo localhost
"""


def job_number() -> int:
    """A job whose five ports are free."""
    for number in range(os.getpid(), os.getpid() + 2500):
        base = 20000 + number % 2500 * 5
        try:
            for port in range(base, base + 5):
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
        except OSError:
            continue
        return number
    pytest.fail("no five free ports in a row")


@pytest.fixture
def number() -> int:
    return job_number()


@pytest.fixture
def script(tmp_path: Path, number: int) -> Iterator[subprocess.Popen[str]]:
    """The script under way with a run that waits in its start: its judge's module sleeps when it is imported."""
    shims = tmp_path / "bin"
    shims.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (shims / name).write_text(text)
        (shims / name).chmod(0o755)
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "pathlib.Path(__file__).with_name('reached').touch()\n"
        "time.sleep(600)\n"
        "def score(messages, response, reference): return 1.0\n"
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    config = tmp_path / "run.yaml"
    document = {
        "name": "slurm",
        "output_dir": str(tmp_path / "runs"),
        "policy": {"path": str(SMOLLM2)},
        "prompts": {"path": str(prompts)},
        "judge": {"type": "python", "function": "slow:score"},
    }
    config.write_text(yaml.safe_dump(document))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{shims}:{os.environ['PATH']}",
        "SHIM_LOG": str(tmp_path / "shims.log"),
        "HOME": str(tmp_path),
        "PYTHONPATH": str(tmp_path),
        "RLHF_VENV": str(Path(sys.executable).parents[1]),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "4",
    }
    process = subprocess.Popen(
        ["bash", "cluster/slurm.sh", str(config), "rounds.count=1"],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    yield process
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()


def test_the_script_runs_a_job_and_queues_again_when_its_time_is_up(script, number: int, tmp_path: Path) -> None:
    started: dict[int, psutil.Process] = {}
    until = time.monotonic() + 180
    while script.poll() is None and not (tmp_path / "reached").exists() and time.monotonic() < until:
        started |= {child.pid: child for child in psutil.Process(script.pid).children(recursive=True)}
        time.sleep(0.5)
    script.send_signal(signal.SIGTERM)  # what Slurm sends to the batch script (--signal=B:TERM)
    text, _ = script.communicate(timeout=60)
    assert (tmp_path / "reached").exists(), text
    assert script.returncode == 143, text
    assert "asked to stop" in text
    assert "rlhf: stopped by SIGTERM" in text  # the run's own line: it ended by itself
    asked = (tmp_path / "shims.log").read_text().splitlines()
    assert "--nodelist=localhost" in asked
    assert asked[-1] == f"scontrol requeue {number}"
    # Nothing of its Ray is left.
    assert len(started) > 4
    _, alive = psutil.wait_procs(list(started.values()), timeout=20)
    assert alive == []
    assert list(Path("/tmp").glob(f"rlhf-{number}")) == []
