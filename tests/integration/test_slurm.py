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

from tests.integration.conftest import ROOT

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
    for number in range(os.getpid(), os.getpid() + 4000):
        base = 10000 + number % 4000 * 5
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
    """The script under way on a config whose run fails when it starts: its model is nowhere."""
    shims = tmp_path / "bin"
    shims.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (shims / name).write_text(text)
        (shims / name).chmod(0o755)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    config = tmp_path / "run.yaml"
    document = {
        "name": "slurm",
        "output_dir": str(tmp_path / "runs"),
        "policy": {"path": str(tmp_path / "no-model")},
        "prompts": {"path": str(prompts)},
    }
    config.write_text(yaml.safe_dump(document))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{shims}:{os.environ['PATH']}",
        "SHIM_LOG": str(tmp_path / "shims.log"),
        "HOME": str(tmp_path),
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


def test_the_script_starts_ray_submits_and_ends_with_the_runs_code(script, number: int, tmp_path: Path) -> None:
    started: dict[int, psutil.Process] = {}
    output: list[str] = []
    assert script.stdout is not None
    begun = time.monotonic()
    for line in script.stdout:
        output.append(line)
        if time.monotonic() - begun > 180:
            script.send_signal(signal.SIGKILL)
        started |= {child.pid: child for child in psutil.Process(script.pid).children(recursive=True)}
    code, text = script.wait(30), "".join(output)
    assert code == 2, text
    assert f"policy.path = '{tmp_path}/no-model': no model there" in text
    asked = (tmp_path / "shims.log").read_text()
    assert "--nodelist=localhost" in asked
    assert "requeue" not in asked
    # Nothing of its Ray is left.
    assert len(started) > 4
    _, alive = psutil.wait_procs(list(started.values()), timeout=20)
    assert alive == []
    assert list(Path("/tmp").glob(f"rlhf-{number}")) == []
