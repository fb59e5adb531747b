"""What `cluster.colocate` is refused with, in one line that says what to do."""

from typing import Any

import pytest

from rlhf.config import OfflineConfig, RunConfig
from rlhf.config.colocate import learner_sleeps, offloads_optimizer, sharing_gpu
from rlhf.config.judging import JudgeRun
from rlhf.config.learner import Learner


def config(colocate: bool = True, device: str = "auto", **sections: Any) -> RunConfig:
    return RunConfig(
        name="t",
        policy={"path": "models/x"},
        prompts={"path": "p.jsonl"},
        cluster={"colocate": colocate, "device": device},
        **sections,
    )


ENGINE = {"type": "pair_model"}
ENSEMBLE = {"type": "ensemble", "members": [{"judge": {"type": "sentiment"}}, {"judge": ENGINE | {"replicas": 3}}]}
TWO = {"generator": {"replicas": 2}, "learner": {"world_size": 2}}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"judge": ENGINE, "eval_judge": {"type": "reward_model", "path": "m"}},
        TWO | {"judge": ENGINE | {"replicas": 2}},
        TWO | {"judge": ENGINE},
        {"judge": {"type": "sentiment", "replicas": 5}},
        {"sync": {"transport": "ipc"}},
        {"sync": {"transport": "object_store"}},
        {"sync": {"lora": "adapters"}, "learner": {"lora": {}}},
    ],
)
def test_what_can_share_its_gpus(sections: dict[str, Any]) -> None:
    assert config(**sections).cluster.colocate


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rounds": {"lookahead": 1}}, r"rounds\.lookahead 1.*set rounds\.lookahead 0"),
        ({"sync": {"transport": "nccl"}}, r"sync\.transport nccl.*use ipc"),
        ({"generator": {"replicas": 2}}, r"generator\.replicas 2 and learner\.world_size 1.*set generator\.replicas 1"),
        ({"generator": {"replicas": {"max": 2}}}, r"generator\.replicas 1-2.*set generator\.replicas 1"),
        ({"learner": {"world_size": 2}}, r"generator\.replicas 1 and learner\.world_size 2.*set generator\.replicas 2"),
        ({"generator": {"tensor_parallel": 2}}, r"generator\.tensor_parallel 2.*set generator\.tensor_parallel 1"),
        ({"judge": ENGINE | {"replicas": 2}}, r"judge\.replicas 2.*set judge\.replicas 1 or fewer"),
        ({"judge": ENGINE | {"tensor_parallel": 2}}, r"with judge\.tensor_parallel 2"),
        ({"eval_judge": ENGINE | {"tensor_parallel": 2}}, r"with eval_judge\.tensor_parallel 2"),
        ({"judge": ENSEMBLE}, r"judge\.members\.1\.judge\.replicas 3"),
        ({"sync": {"transport": "ipc", "sparse": True}}, r"sync\.sparse needs sync\.transport object_store"),
        ({"sync": {"transport": "ipc", "lora": "adapters"}, "learner": {"lora": {}}}, r"sync\.transport = ipc"),
    ],
)  # fmt: skip
def test_what_cannot(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        config(**sections)
    assert all("\n" not in error["msg"] for error in refused.value.errors())  # type: ignore[attr-defined]


def test_ipc_needs_one_gpu_for_both_ends() -> None:
    with pytest.raises(ValueError, match=r"sync\.transport ipc.*cluster\.colocate true"):
        config(colocate=False, sync={"transport": "ipc"})
    with pytest.raises(ValueError, match=r"sync\.transport ipc needs a GPU"):
        config(device="cpu", sync={"transport": "ipc"})


def test_commands_that_have_nobody_to_share_with_refuse_it() -> None:
    with pytest.raises(ValueError, match=r"cluster\.colocate = true: a training on a set"):
        OfflineConfig(name="t", policy={"path": "m"}, preferences={"path": "p"}, cluster={"colocate": True})
    with pytest.raises(ValueError, match=r"cluster\.colocate = true: a judge on its own"):
        JudgeRun(judge={"type": "sentiment"}, cluster={"colocate": True})


@pytest.mark.parametrize(
    ("learner", "dtype", "sleeps"),
    [
        ({"zero_stage": 0}, "float32", False),
        ({"zero_stage": 1}, "float32", True),
        ({"zero_stage": 1}, "bfloat16", False),
        ({"zero_stage": 1, "offload": {"optimizer": True}}, "bfloat16", True),
        ({"zero_stage": 2}, "bfloat16", True),
        ({"zero_stage": 3}, "bfloat16", False),
    ],
)
def test_which_learners_can_leave_a_gpu(learner: dict[str, Any], dtype: str, sleeps: bool) -> None:
    assert learner_sleeps(Learner(**learner), dtype) == sleeps


def test_an_offloaded_optimizer_is_found_in_either_place() -> None:
    raw = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    assert not offloads_optimizer(Learner())
    assert offloads_optimizer(Learner(offload={"optimizer": True}))
    assert not offloads_optimizer(Learner(offload={"optimizer": True}, deepspeed=raw))


def test_the_reference_leaves_a_shared_gpu() -> None:
    assert sharing_gpu(Learner()).reference.offload
    assert not Learner().reference.offload
