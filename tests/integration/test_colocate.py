"""A run whose actors take turns: on a CPU without the sleep itself, but with the same calls in the same order."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.app import train
from rlhf.config import RunConfig
from tests.integration.conftest import System

pytestmark = pytest.mark.slow

SETTINGS = {
    "cluster": {"colocate": True},
    "judge": {"type": "pair_model", "dtype": "float32", "max_length": 256, "cache": False},
}
"""The judge is an engine of its own, on the tiny model."""


def settings(model: Path, colocate: bool) -> dict:
    engine = {"kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 1024}
    judge = SETTINGS["judge"] | {"path": str(model), "engine": engine}
    return {"cluster": {"colocate": colocate, "device": "cpu"}, "judge": judge}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_model):
    """A run in turns, in this process, so that these can be read: its folder, and what was said of them."""
    folder = tmp_path_factory.mktemp("colocated")
    system = System(folder, tiny_model)
    turns: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: turns.append(record.getMessage())
    logger = logging.getLogger("rlhf.rounds.turns")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train(RunConfig.model_validate(system.config | settings(tiny_model, True) | {"name": "shared"}))
    finally:
        logger.removeHandler(handler)
    return folder / "runs" / "shared", turns


@pytest.fixture(scope="module")
def alone(shared, tiny_model):
    """The same run without turns."""
    system = System(shared[0].parents[1], tiny_model)
    system.config |= settings(tiny_model, False)
    run = system.train("name=alone", timeout=600)
    assert run.code == 0, run.stderr[-3000:]
    return run


def test_the_devices_pass_from_one_to_the_next_and_nobody_has_them_twice(shared):
    """Who starts, then each round, then each evaluation. Updates are a part of the generators' turns."""
    _, turns = shared
    owners = [line.partition(":")[0] for line in turns if line.endswith(": turn")]
    start = ["generators", "judge", "learner"]
    # The baseline of round 0 is sampled, and compared with nothing.
    first, evaluated = ["generators", "judge", "learner"], ["generators", "judge"]
    assert owners == [*start, *first, *evaluated, "generators", "judge", "learner", *evaluated]


def test_whoever_had_the_turn_is_asleep_before_the_next_one_begins(shared):
    _, turns = shared
    owner = None
    for line, after in zip(turns, [*turns[1:], ""], strict=True):
        name, _, what = line.partition(": ")
        if what == "turn":
            assert owner in (None, name), f"{owner} was awake"
            owner = name
        elif what.startswith("sleep before"):
            assert name == owner
            assert after == f"{what.removeprefix('sleep before ')}: turn"
            owner = what.removeprefix("sleep before ")
        else:
            assert (what, name) == ("wake", owner)


@pytest.mark.slow
def test_turns_change_nothing_of_what_is_trained(shared, alone):
    one, other = (load_file(path / "policy" / "model.safetensors") for path in (shared[0], alone.path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any("timing_s/sleep" in event for event in alone.events("round"))


def test_what_the_turns_cost_is_in_each_rounds_metrics(shared):
    events = [json.loads(line) for line in (shared[0] / "metrics.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    assert [event["round"] for event in rounds] == [1, 2]
    for event in rounds:
        assert 0 < event["timing_s/sleep"] < event["timing_s/total"] + event["timing_s/generate"]
        assert event["timing_s/wake"] > 0
