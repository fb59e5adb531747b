"""Runs that are killed or stopped, and what the same command makes of them."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import Run, System, exists, state_reaches


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    run = System(tmp_path_factory.mktemp("undisturbed"), tiny_model).train("evaluation.every=0")
    assert run.code == 0, run.stderr[-3000:]
    return run


MOMENTS = {
    "planned": state_reaches(2, "PLANNED"),
    "sealed": state_reaches(2, "SEALED"),
    "writing a checkpoint": exists("checkpoints/round-0001.tmp/*"),
    "saved, not committed": exists("checkpoints/round-0002"),
    "exporting": exists("policy.tmp"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_every_round_is_done_once(system: System, undisturbed: Run, moment: str):
    killed = system.train("evaluation.every=0", stop=MOMENTS[moment])
    assert killed.code == -signal.SIGKILL
    resumed = system.train("evaluation.every=0")
    assert resumed.code == 0, resumed.stderr[-3000:]
    for round in (1, 2):
        assert resumed.manifest(round)["state"] == "PUBLISHED"
        # Same seeds, same weights: the very same pairs, whoever sampled them.
        assert resumed.manifest(round)["uids"] == undisturbed.manifest(round)["uids"]
        assert resumed.manifest(round)["pairs"]["sha256"] == undisturbed.manifest(round)["pairs"]["sha256"]
    steps = [event["step"] for event in resumed.events("step")]
    assert steps == [event["step"] for event in undisturbed.events("step")], "a step is missing or logged twice"
    expected = load_file(undisturbed.path / "policy" / "model.safetensors")
    found = load_file(resumed.path / "policy" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected), "not the weights of an undisturbed run"


def test_sigterm_saves_and_exits_143_and_the_run_goes_on(system: System):
    stopped = system.train("rounds.count=3", stop=state_reaches(2, "SEALED"), signal_number=signal.SIGTERM)
    assert stopped.code == 143, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr
    assert json.loads((stopped.path / "checkpoints" / "round-0001" / "manifest.json").read_text())["round"] == 1
    resumed = system.train("rounds.count=3")
    assert resumed.code == 0, resumed.stderr[-3000:]
    assert [event["round"] for event in resumed.events("round")] == [1, 2, 3]


def test_sigint_exits_130(system: System):
    stopped = system.train(stop=state_reaches(1, "SEALED"), signal_number=signal.SIGINT)
    assert stopped.code == 130, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr
