"""The long version: one run killed at random moments again and again, drawn from a seed. Behind `make chaos`."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import System

KILLS = 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])
def test_random_kills_end_in_the_weights_of_an_undisturbed_run(tmp_path: Path, tiny_model: Path, seed: int):
    overrides = ("rounds.count=6", "checkpoint.every=2", "evaluation.every=3")
    undisturbed = System(tmp_path / "undisturbed", tiny_model).train(*overrides)
    assert undisturbed.code == 0, undisturbed.stderr[-3000:]
    system, rng = System(tmp_path / "killed", tiny_model), random.Random(seed)
    for _ in range(KILLS):
        moment = time.monotonic() + rng.uniform(1, 40)
        run = system.train(*overrides, stop=lambda path, at=moment: time.monotonic() > at)
        assert run.code in (0, -signal.SIGKILL), run.stderr[-3000:]
    run = system.train(*overrides)
    assert run.code == 0, run.stderr[-3000:]
    uids = [uid for round in range(1, 7) for uid in run.manifest(round)["uids"]]
    assert len(uids) == len(set(uids)) == 24
    assert [event["step"] for event in run.events("step")] == [event["step"] for event in undisturbed.events("step")]
    expected = load_file(undisturbed.path / "policy" / "model.safetensors")
    found = load_file(run.path / "policy" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
