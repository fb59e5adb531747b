"""`rlhf submit` against a Ray of its own with token authentication: a tiny run to its end, and every refusal."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import yaml

from tests.integration.conftest import ROOT, System

SECRET = "rlhf-test-variable-value"
WAIT_S = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Cluster:
    """A head with its dashboard, and the environment that a client of it needs."""

    address: str
    environment: dict[str, str]

    def submit(self, *arguments: str, timeout: float = 60, **environment: str | None) -> subprocess.CompletedProcess[str]:
        changed = self.environment | {name: value for name, value in environment.items() if value is not None}
        for name, value in environment.items():
            if value is None:
                changed.pop(name, None)
        return subprocess.run(
            [sys.executable, "-m", "rlhf.cli", "submit", *arguments],
            env=changed,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head --block` in a process group of its own, which is all that is ended afterwards."""
    # Ray's sockets: paths over 107 bytes fail.
    temp = Path(tempfile.mkdtemp(prefix="rlhf-", dir="/tmp"))
    home = tmp_path_factory.mktemp("home")
    dashboard = free_port()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    client = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    client |= {"HF_HUB_OFFLINE": "1", "PATH": path, "HOME": str(home), "RAY_AUTH_MODE": "token"}
    client["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
    ports = {
        "--port": free_port(),
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": free_port(),
        "--min-worker-port": 0,
        "--max-worker-port": 0,
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
               "--num-cpus=16", "--object-store-memory=268435456", "--node-ip-address=127.0.0.1",
               "--dashboard-host=127.0.0.1", f"--temp-dir={temp}",
               *(f"{option}={value}" for option, value in ports.items())]  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    with (temp / "head.log").open("w") as log:
        head = subprocess.Popen(
            command,
            env={**client, "RLHF_TEST_VARIABLE": SECRET, "RAY_worker_niceness": "0"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + WAIT_S
        while not answers(address):
            if head.poll() is not None or time.monotonic() > until:
                pytest.fail(f"the head did not start:\n{(temp / 'head.log').read_text()[-3000:]}")
            time.sleep(0.2)
        yield Cluster(address, client)
    finally:
        end(head, temp)


def answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/api/version", timeout=1).status_code in (200, 401)
    except requests.RequestException:
        return False


def end(head: subprocess.Popen[bytes], temp: Path) -> None:
    """Ray's processes detach; those of this head, and no others, name its temporary folder or its session."""
    import psutil

    ours = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(20)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    _, alive = psutil.wait_procs(ours, timeout=10)
    for process in alive:
        process.kill()
    shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> System:
    """The tiny run with one round; its files stand on what the test calls shared storage."""
    system = System(tmp_path_factory.mktemp("run"), tiny_model)
    system.config["rounds"]["count"] = 1
    system.config["evaluation"]["every"] = 0
    system.config["cluster"] = {
        "shared": [str(tiny_model), system.config["output_dir"]],
        "env": ["RLHF_TEST_VARIABLE"],
        "device": "cpu",
    }
    system.config["generator"]["cpus"] = system.config["learner"]["cpus"] = 1
    (system.folder / "config.yaml").write_text(yaml.safe_dump(system.config))
    return system


@pytest.fixture(scope="module")
def followed(cluster: Cluster, run: System) -> subprocess.CompletedProcess[str]:
    """One job from its submission to its end."""
    config = str(run.folder / "config.yaml")
    return cluster.submit(config, "--address", cluster.address, "--follow", timeout=240)


def test_a_followed_job_runs_to_its_end(followed, run: System) -> None:
    assert followed.returncode == 0, (followed.stdout + followed.stderr)[-4000:]
    assert "report:" in followed.stdout
    path = run.folder / "runs" / "tiny"
    assert (path / "policy" / "model.safetensors").exists()
    config = yaml.safe_load((path / "config.yaml").read_text())
    # The prompts of this machine travelled with the job.
    assert config["prompts"]["path"].startswith("inputs/")
    assert config["cluster"]["address"] == "auto"
