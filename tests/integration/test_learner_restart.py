"""A learner that loses a rank in mid-training, and again while it saves: the run goes on, to the very same weights."""

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.app import train
from actors.calls import within
from actors.cluster import connect
from actors.learner import LearnerGroup
from actors.learner_launch import start_learner
from actors.placement import Patience, actor_options, place, stop
from actors.preflight import Role
from rlhf.config import RunConfig
from rlhf.config.system import Cluster
from rlhf.health import RestartBudget
from rlhf.monitor.group import MonitorGroup, build_monitor
from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.ledger import Ledger
from rlhf.rounds.sealing import read_sealed
from tests.integration.conftest import System

ROUNDS = 3


class Killer:
    """Sends SIGKILL to rank 1, first at a step of round 2, then once the save of round 2 has written a file."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kills: list[str] = []
        self._pid = 0
        start, log, stage = LearnerGroup.start, MonitorGroup.log, CheckpointStore.stage

        async def started(group: LearnerGroup) -> list[str]:
            notes = await start(group)
            self._pid = await group._ranks.handles[1].__ray_call__.remote(lambda actor: os.getpid())
            return notes

        def logged(monitor: MonitorGroup, event: str, round: int, *arguments: Any, **options: Any) -> None:
            log(monitor, event, round, *arguments, **options)
            if (event, round) == ("step", 2) and not self.kills:
                self._kill("step")

        def staged(store: CheckpointStore, round: int) -> Path:
            path = stage(store, round)
            if round == 2 and self.kills == ["step"]:
                threading.Thread(target=self._when_written, args=(path,)).start()
            return path

        patch.setattr(LearnerGroup, "start", started)
        patch.setattr(MonitorGroup, "log", logged)
        patch.setattr(CheckpointStore, "stage", staged)

    def _when_written(self, path: Path) -> None:
        end = time.monotonic() + 60
        while not any(file.is_file() for file in path.rglob("*")) and time.monotonic() < end:
            time.sleep(0.001)
        self._kill("save")

    def _kill(self, when: str) -> None:
        self.kills.append(when)
        os.kill(self._pid, signal.SIGKILL)


async def undisturbed(config: RunConfig, run_dir: Path, out: Path) -> dict[str, torch.Tensor]:
    """The weights of ranks that train the sealed pairs of a run, one round after the other."""
    monitor, ledger = build_monitor(config, out, ROUNDS), Ledger(run_dir)
    with connect("undisturbed", config.cluster, 256 << 20, out) as cluster:
        budget = RestartBudget(0, 1.0)
        learner = await start_learner(config, cluster, config.cluster.deadlines, budget, monitor, lambda count: None)
        for round in range(1, ROUNDS + 1):
            digest = ledger.manifest(round)["pairs"]["sha256"]
            sealed = read_sealed(ledger.folder(round) / "pairs.parquet", round, digest)
            assert [report async for report in learner.train(sealed, {})]
        await learner.export(out / "policy")
    return load_file(out / "policy" / "model.safetensors")


@pytest.mark.slow
def test_killed_in_a_step_and_in_a_save_the_weights_are_those_of_an_undisturbed_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = System(tmp_path, tiny_model).config
    settings["prompts"].pop("eval")
    settings["rounds"] |= {"count": ROUNDS}
    settings["learner"] |= {"world_size": 2, "micro_batch_size": 1}
    settings["cluster"] = {"device": "cpu", "restarts": {"budget": 2}}
    settings["evaluation"] = {"every": 0}
    config = RunConfig.model_validate(settings)
    with monkeypatch.context() as patch:
        killer = Killer(patch)
        train(config)
    assert killer.kills == ["step", "save"]
    run_dir = tmp_path / "runs" / "tiny"
    said = capsys.readouterr().out
    assert said.count("learner is started again: rank 1 died (round 2)") == 1
    assert said.count("learner is started again: rank 1 died (save round-0002.tmp)") == 1

    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [(event["round"], event["step"]) for event in events if event["event"] == "step"]
    assert len({round for round, _ in steps}) == ROUNDS
    assert [step for _, step in steps] == list(range(1, len(steps) + 1)), "a step is missing or logged twice"
    rounds = [event for event in events if event["event"] == "round"]
    assert [event["round"] for event in rounds] == [1, 2, 3]
    ledger = Ledger(run_dir)
    assert [ledger.state(round).name for round in (1, 2, 3)] == ["PUBLISHED"] * ROUNDS
    uids = [uid for round in (1, 2, 3) for uid in ledger.plan(round)]
    assert len(set(uids)) == len(uids) == 12
    for event in rounds:
        # The engine went back to version 1 and on to 2 again: it samples with what the learner has.
        rollouts = pq.read_table(run_dir / "rounds" / f"{event['round']:04d}" / "rollouts.parquet").to_pylist()
        assert {span["version"] for row in rollouts for span in row["versions"]} == {event["round"] - 1}
        assert event["mismatch/max"] < 1e-3
        assert event["pairs/staleness_max"] == 0

    (tmp_path / "undisturbed").mkdir()
    expected = asyncio.run(undisturbed(config, run_dir, tmp_path / "undisturbed"))
    found = load_file(run_dir / "policy" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected), "not the weights of an undisturbed run"
    initial = load_file(tiny_model / "model.safetensors")
    assert not all(torch.equal(found[name], initial[name]) for name in initial)


class Stopped:
    """An actor that can be halted from outside, as a device that hangs halts a rank."""

    def pid(self) -> int:
        return os.getpid()


def test_a_process_that_is_halted_gives_way_to_another_in_its_place(tmp_path: Path) -> None:
    async def replaced() -> tuple[int, int]:
        role = Role("learner", 1, 1, 0, "PACK")
        group = await place(role, Patience(30))
        actor = ray.remote(Stopped)
        pids = []
        for _ in range(2):
            handle = actor.options(**actor_options("learner-0", group, 0, role, {})).remote()
            pids.append(await within(handle.pid.remote(), 30, "pid"))
            os.kill(pids[-1], signal.SIGSTOP)
            waiting = asyncio.ensure_future(handle.pid.remote())
            await stop("learner-0", orderly=False)
            with pytest.raises(ray.exceptions.RayActorError):
                await asyncio.wait_for(waiting, 30)
        return pids[0], pids[1]

    with connect("halted", Cluster(device="cpu"), 128 << 20, tmp_path):
        first, second = asyncio.run(replaced())
        assert first != second
        end = time.monotonic() + 20
        while any(alive(pid) for pid in (first, second)):
            assert time.monotonic() < end, "a halted process was left behind"
            time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
