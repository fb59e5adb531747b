"""Shared GPUs in the plan: the largest turn by hand, what lies in CPU memory meanwhile, and what is printed."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.config import RunConfig
from rlhf.planning import Plan, RolePlan, make_plan, show_plan
from tests.unit.test_cli_planning import tiny_model

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("model")
    return folder, tiny_model(folder, tied=True)


def plan(model: tuple[Path, int], device: str = "cuda", colocate: bool = True, **sections: Any) -> Plan:
    config = {
        "name": "t",
        "policy": {"path": str(model[0])},
        "prompts": {"path": "p"},
        "cluster": {"device": device, "colocate": colocate},
    }
    return make_plan(RunConfig.model_validate(config | sections))


def role(found: Plan, name: str) -> RolePlan:
    return next(role for role in found.roles if role.name == name)


def test_a_shared_gpu_holds_the_largest_turn_and_not_their_sum(model: tuple[Path, int]) -> None:
    numbers = model[1]
    found = plan(model, judge={"type": "pair_model"}, sync={"bucket_mb": 1})
    assert [turn.name for turn in found.turns] == ["generator", "update", "judge", "learner"]
    # Two others sleep beside each; a gigabyte is a context.
    for turn in found.turns:
        assert turn.memory["asleep beside it"] == 2 * GIB
    generator, update, judge, learner = found.turns
    assert generator.total == role(found, "generator").total + 2 * GIB
    assert judge.total == role(found, "judge").total + 2 * GIB
    assert learner.total == role(found, "learner").total + 2 * GIB
    # bfloat16: the weights, the payload staged, and two buckets, which hold no more than it.
    assert "KV cache" not in update.memory
    assert (update.memory["weights"], update.memory["staging"]) == (2 * numbers, 2 * numbers)
    assert update.memory["buckets"] == 2 * min(2 * numbers, MIB)
    assert found.gpu_total == max(turn.total for turn in found.turns)
    alone = plan(model, colocate=False, judge={"type": "pair_model"})
    assert found.gpu_total < alone.gpu_total == sum(role.total for role in alone.roles)


def test_every_gpu_of_several_has_the_same_turns(model: tuple[Path, int]) -> None:
    found = plan(model, generator={"replicas": 2}, learner={"world_size": 2})
    assert found.gpu_total == 2 * max(turn.total for turn in found.turns)


def test_cpu_memory_has_what_sleeps(model: tuple[Path, int]) -> None:
    numbers = model[1]
    judged = plan(model, judge={"type": "pair_model"}, learner={"zero_stage": 2})
    # bf16 weights, and masters and two moments in fp32.
    assert role(judged, "learner").host["asleep"] == 2 * numbers + 12 * numbers
    assert role(judged, "generator").host["asleep"] == 2 * numbers
    assert role(judged, "judge").host["asleep"] == 2 * numbers
    # Without a judge between it and the learner a generator drops its weights.
    assert "asleep" not in role(plan(model), "generator").host
    adapters = plan(model, sync={"lora": "adapters"}, learner={"lora": {}})
    assert role(adapters, "generator").host["asleep"] == 2 * numbers
    alone = plan(model, colocate=False, judge={"type": "pair_model"}, learner={"zero_stage": 2})
    assert all("asleep" not in each.host for each in alone.roles)
    assert judged.total > alone.total


def test_a_shared_gpus_reference_is_in_cpu_memory(model: tuple[Path, int]) -> None:
    assert role(plan(model), "learner").host["reference"] == 2 * model[1]
    assert "reference" not in role(plan(model, colocate=False), "learner").host


@pytest.mark.parametrize("stage", [1, 3])
def test_a_learner_that_cannot_sleep_counts_in_every_turn(model: tuple[Path, int], stage: int) -> None:
    found = plan(model, learner={"zero_stage": stage})
    memory = role(found, "learner").memory
    stays = memory["weights"] + memory["optimizer"] + memory["gathered weights"]
    assert [turn.memory.get("learner that stays") for turn in found.turns] == [stays, stays, None]
    assert "asleep" not in role(found, "learner").host
    (note,) = found.notes
    assert note.startswith(f"the learner cannot leave the GPU with learner.zero_stage {stage}: 0.00 GiB")
    assert "zero_stage 2" in note
    assert plan(model, learner={"zero_stage": 2}).notes == ()


def test_nothing_is_staged_twice(model: tuple[Path, int]) -> None:
    by_ipc, by_store = plan(model), plan(model, sync={"transport": "object_store"})
    assert "staging" not in role(by_ipc, "generator").host
    assert role(by_store, "generator").host["staging"] == 2 * model[1]
    assert "staging" not in next(turn for turn in by_store.turns if turn.name == "update").memory


def test_without_gpus_memory_adds_up_and_the_plan_says_so(model: tuple[Path, int]) -> None:
    found, alone = plan(model, device="cpu"), plan(model, device="cpu", colocate=False)
    assert (found.turns, found.total) == ((), alone.total)
    assert found.notes == (
        "cluster.colocate without GPUs: actors take turns, but nothing sleeps and no memory is given back",
    )


def test_turns_are_printed(model: tuple[Path, int]) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_plan(plan(model, learner={"zero_stage": 3}), [], console)
    text = console.export_text()
    assert "Turns on each of 1 GPUs" in text
    assert "1 shared" in text
    assert [word for word in ("generator", "update", "learner", "largest") if word not in text] == []
    assert "note: the learner cannot leave the GPU" in text
