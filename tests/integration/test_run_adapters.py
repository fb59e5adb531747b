"""A whole run that sends LoRA adapters instead of weights."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.weights.payload import ALIGNMENT
from rlhf.config.data import Policy
from rlhf.config.lora import Lora
from rlhf.learning.lora import adapter_shapes
from tests.integration.conftest import System

LORA = {"rank": 5, "alpha": 10, "target_modules": ["q_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path):
    system = System(tmp_path_factory.mktemp("run"), tiny_model)
    system.config["learner"] |= {"lora": LORA, "optimizer": {"lr": 1e-2}}
    run = system.train("sync.lora=adapters")
    assert run.code == 0, run.stderr[-3000:]
    return run


def test_engine_and_learner_agree_after_every_update(finished):
    rounds = finished.events("round")
    assert [event["round"] for event in rounds] == [1, 2]
    for event in rounds:
        # The probe is taken of the round's own version, the mismatch of the version that sampled it.
        assert 0 < event["sync/probe_error"] < 1e-4
        assert 0 < event["mismatch/max"] < 1e-4
        assert event["pairs/staleness_max"] == 0
        assert event["sync/changed_fraction"] > 0.5
        assert finished.manifest(event["round"])["state"] == "PUBLISHED"


def test_the_bytes_sent_are_those_of_the_adapters(finished, tiny_model):
    shapes = adapter_shapes(Policy(path=str(tiny_model)), Lora(**LORA))
    assert len(shapes) == 2 * 2 * 3
    adapters = sum(-(-4 * math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes.values())
    assert [event["sync/bytes"] for event in finished.events("round")] == [adapters, adapters]
    assert adapters < (tiny_model / "model.safetensors").stat().st_size / 200


def test_the_exported_policy_is_merged_and_has_learned(finished, tiny_model):
    before, after = load_file(tiny_model / "model.safetensors"), load_file(finished.path / "policy/model.safetensors")
    assert before.keys() == after.keys()
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(LORA["target_modules"])
    ids = torch.tensor([[1, 2683, 253, 1528, 338, 253]])
    with torch.no_grad():
        base, policy = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits.log_softmax(-1)
            for path in (tiny_model, finished.path / "policy")
        )
    # Far beyond the probe's tolerance: an engine that served the base would have been found out.
    assert (base - policy).abs().mean() > 1e-2


def test_the_evaluation_compares_with_the_first_policy(finished):
    evals = finished.events("eval")
    assert [event["round"] for event in evals] == [0, 1, 2]
    assert all(0 <= event["eval/win_rate"] <= 1 for event in evals[1:])
