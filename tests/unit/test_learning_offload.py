"""CPU offload: what the keys generate, and what is refused because DeepSpeed would ignore it."""

import pytest
import torch

from rlhf.config.learner import Learner
from rlhf.learning.engine import deepspeed_config

CPU = {"device": "cpu"}
RAW = "learner.deepspeed.zero_optimization."


def zero(**learner):
    return deepspeed_config(Learner(**learner), torch.bfloat16)["zero_optimization"]


def test_nothing_is_offloaded_unless_asked_for():
    assert not {"offload_optimizer", "offload_param"} & zero(zero_stage=3).keys()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_key_generates_the_raw_config(stage):
    found = zero(zero_stage=stage, offload={"optimizer": True})
    assert found["offload_optimizer"] == CPU
    assert "offload_param" not in found
    # torch's AdamW stays: DeepSpeed's would be compiled at run time.
    assert deepspeed_config(Learner(), torch.bfloat16)["zero_force_ds_cpu_optimizer"] is False


def test_parameters_with_or_without_the_optimizer():
    both = zero(zero_stage=3, offload={"optimizer": True, "parameters": True})
    assert both["offload_param"] == both["offload_optimizer"] == CPU
    assert "offload_optimizer" not in zero(zero_stage=3, offload={"parameters": True})


def test_raw_overrides_lie_over_what_the_key_generates():
    raw = {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}
    found = zero(zero_stage=2, offload={"optimizer": True}, deepspeed=raw)
    assert found["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("stage", "settings", "key"),
    [
        (0, {"offload": {"optimizer": True}}, "learner.offload.optimizer"),
        (2, {"offload": {"parameters": True}}, "learner.offload.parameters"),
        (0, {"deepspeed": {"zero_optimization": {"offload_optimizer": CPU}}}, RAW + "offload_optimizer"),
        (1, {"deepspeed": {"zero_optimization": {"offload_param": {"device": "nvme"}}}}, RAW + "offload_param"),
        (2, {"deepspeed": {"zero_optimization": {"stage": 3}}}, RAW + "stage = 3: set learner.zero_stage (now 2)"),
    ],
)
def test_refused_where_the_stage_cannot(stage, settings, key):
    with pytest.raises(ValueError, match="learner") as caught:
        Learner(zero_stage=stage, **settings)
    assert key in str(caught.value)
    assert f"zero_stage {stage}" in str(caught.value) or "now" in str(caught.value)


def test_raw_overrides_that_turn_nothing_on_are_taken():
    Learner(zero_stage=0, deepspeed={"zero_optimization": {"offload_optimizer": {"device": "none"}, "stage": 0}})
