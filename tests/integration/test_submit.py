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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
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

    def submit(
        self, *arguments: str, timeout: float = 60, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
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
    """End the head and what descends from it, and nothing else; `ray stop` would end every Ray of this machine."""
    processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()
    psutil.wait_procs(processes, timeout=10)
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


def test_status_and_log_of_an_ended_job(followed, cluster: Cluster) -> None:
    job = followed.stdout.splitlines()[0]
    status = cluster.submit("--status", job, "--address", cluster.address)
    assert status.returncode == 0
    assert status.stdout.startswith(f"{job}: SUCCEEDED; run tiny (config ")
    assert status.stdout.count("\n") == 1
    logs = cluster.submit("--logs", job, "--address", cluster.address)
    assert logs.stdout == followed.stdout.partition("\n")[2]
    again = cluster.submit("--logs", job, "--follow", "--address", cluster.address)
    assert (again.returncode, again.stdout) == (0, logs.stdout)
    stopped = cluster.submit("--stop", job, "--address", cluster.address)
    assert (stopped.returncode, stopped.stdout) == (0, f"{job}: SUCCEEDED already\n")


def test_no_secret_is_in_what_the_cluster_tells_of_a_job(followed, cluster: Cluster) -> None:
    token = cluster.environment["RAY_AUTH_TOKEN"]
    answer = requests.get(f"{cluster.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=10)
    assert followed.stdout.splitlines()[0] in answer.text
    assert SECRET not in answer.text
    assert token not in answer.text


def test_the_exit_code_is_the_jobs(cluster: Cluster, run: System) -> None:
    config = str(run.folder / "config.yaml")
    done = cluster.submit(config, "cluster.env=[RLHF_NOT_THERE]", "--address", cluster.address, "--follow")
    assert done.returncode == 2, done.stderr
    # The job's own one line stands in its log, and the last line tells what became of the job.
    assert "rlhf: config.yaml: cluster.env: RLHF_NOT_THERE not set" in done.stdout
    assert "FAILED" in done.stderr.splitlines()[-1]
    assert "exit code 2" in done.stderr.splitlines()[-1]


def test_ctrl_c_leaves_the_job_running_and_stop_ends_it(cluster: Cluster, run: System) -> None:
    config = str(run.folder / "config.yaml")
    follower = subprocess.Popen(
        [sys.executable, "-m", "rlhf.cli", "submit", config, "name=stopped", "--address", cluster.address, "--follow"],
        env=cluster.environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert follower.stdout is not None
        job = follower.stdout.readline().strip()
        assert job.startswith("rlhf-stopped-")
        follower.stdout.readline()  # The log has begun: the job runs.
        follower.send_signal(signal.SIGINT)
        _, error = follower.communicate(timeout=30)
    finally:
        follower.kill()
    assert follower.returncode == 130
    assert error.count("\n") == 1
    assert f"the job runs on: `rlhf submit --logs {job} --follow --address {cluster.address}` follows it" in error
    at = ("--address", cluster.address)
    assert "RUNNING" in cluster.submit("--status", job, *at).stdout
    assert cluster.submit("--stop", job, *at).returncode == 0
    ended = cluster.submit("--logs", job, "--follow", *at)
    assert ended.returncode == 143, ended.stderr
    assert "STOPPED" in ended.stderr


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("wrong", "the cluster refused the token of RAY_AUTH_TOKEN; put the one"),
        (None, "asks for a token and none was found; put it into"),
    ],
)
def test_a_wrong_token_and_none(cluster: Cluster, run: System, token: str | None, words: str) -> None:
    begun = time.monotonic()
    done = cluster.submit(str(run.folder / "config.yaml"), "--address", cluster.address, RAY_AUTH_TOKEN=token)
    assert time.monotonic() - begun < 15
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr


def test_a_dead_head(cluster: Cluster, run: System) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    begun = time.monotonic()
    done = cluster.submit(str(run.folder / "config.yaml"), "--address", address, "--follow")
    assert time.monotonic() - begun < 15
    assert done.returncode == 1
    assert done.stderr == (
        f"rlhf: --address {address}: no Ray dashboard answers there; start the cluster's head (or the port-forward), "
        "or give the address of one that runs\n"
    )


def test_a_head_that_accepts_and_never_answers(cluster: Cluster, run: System) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = cluster.submit(str(run.folder / "config.yaml"), "--address", address, timeout=30)
    assert done.returncode == 1
    assert "no Ray dashboard answers there" in done.stderr


def test_an_unknown_job(cluster: Cluster) -> None:
    done = cluster.submit("--status", "rlhf-none", "--address", cluster.address)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rlhf: --status rlhf-none: no job of this id at {cluster.address}\n"
