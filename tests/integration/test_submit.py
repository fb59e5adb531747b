"""`rlhf submit` against a Ray of its own with token authentication: a tiny run to its end, and every refusal."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml

from tests.integration.conftest import ROOT, System
from tests.integration.ray_nodes import RayNodes, free_port, submission

SECRET = "rlhf-test-variable-value"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with RayNodes(tmp_path_factory.mktemp("home"), {"RLHF_TEST_VARIABLE": SECRET}) as nodes:
        yield nodes


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
def followed(cluster: RayNodes, run: System) -> subprocess.CompletedProcess[str]:
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


def test_status_and_log_of_an_ended_job(followed, cluster: RayNodes) -> None:
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


def test_no_secret_is_in_what_the_cluster_tells_of_a_job(followed, cluster: RayNodes) -> None:
    token = cluster.environment["RAY_AUTH_TOKEN"]
    answer = requests.get(f"{cluster.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=10)
    assert followed.stdout.splitlines()[0] in answer.text
    assert SECRET not in answer.text
    assert token not in answer.text


def test_the_exit_code_is_the_jobs(cluster: RayNodes, run: System) -> None:
    config = str(run.folder / "config.yaml")
    done = cluster.submit(config, "cluster.env=[RLHF_NOT_THERE]", "--address", cluster.address, "--follow")
    assert done.returncode == 2, done.stderr
    # The job's own one line stands in its log, and the last line tells what became of the job.
    assert "rlhf: config.yaml: cluster.env: RLHF_NOT_THERE not set" in done.stdout
    assert "FAILED" in done.stderr.splitlines()[-1]
    assert "exit code 2" in done.stderr.splitlines()[-1]


def test_ctrl_c_leaves_the_job_running_and_stop_ends_it(cluster: RayNodes, run: System) -> None:
    config = str(run.folder / "config.yaml")
    follower = subprocess.Popen(
        submission(config, "name=stopped", "--address", cluster.address, "--follow"),
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
def test_a_wrong_token_and_none(cluster: RayNodes, run: System, token: str | None, words: str) -> None:
    begun = time.monotonic()
    done = cluster.submit(str(run.folder / "config.yaml"), "--address", cluster.address, RAY_AUTH_TOKEN=token)
    assert time.monotonic() - begun < 15
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr


@pytest.mark.parametrize(
    ("token", "words"), [("wrong", "the cluster refused the token of RAY_AUTH_TOKEN"), (None, "none was found")]
)
def test_joining_with_a_wrong_token_and_with_none(cluster: RayNodes, token: str | None, words: str) -> None:
    code = (
        "import sys\nfrom actors.cluster import connect\nfrom rlhf.config.system import Cluster\n"
        "from rlhf.errors import InputError\n"
        "try:\n    connect('x', Cluster(address=sys.argv[1]), 1 << 28).__enter__()\n"
        "except InputError as error:\n    print(error)"
    )
    environment = {name: value for name, value in cluster.environment.items() if name != "RAY_AUTH_TOKEN"}
    environment |= {"RAY_AUTH_TOKEN": token} if token else {}
    done = subprocess.run(
        [sys.executable, "-c", code, cluster.gcs],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.startswith(f"cluster.address = '{cluster.gcs}': "), done.stderr
    assert words in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_dead_head(cluster: RayNodes, run: System) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    begun = time.monotonic()
    done = cluster.submit(str(run.folder / "config.yaml"), "--address", address, "--follow")
    assert time.monotonic() - begun < 15
    assert done.returncode == 1
    assert done.stderr == (
        f"rlhf: --address {address}: no Ray dashboard answers there; start the cluster's head (or the port-forward), "
        "or give the address of one that runs\n"
    )


def test_a_head_that_accepts_and_never_answers(cluster: RayNodes, run: System) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = cluster.submit(str(run.folder / "config.yaml"), "--address", address, timeout=30)
    assert done.returncode == 1
    assert "no Ray dashboard answers there" in done.stderr


def test_an_unknown_job(cluster: RayNodes) -> None:
    done = cluster.submit("--status", "rlhf-none", "--address", cluster.address)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rlhf: --status rlhf-none: no job of this id at {cluster.address}\n"
