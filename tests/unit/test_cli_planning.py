"""The memory estimate against sums taken by hand, and against a real module's parameters."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import RunConfig, load_config
from rlhf.config.load import validate
from rlhf.errors import InputError
from rlhf.planning import ModelSize, engine_memory, learner_memory, make_plan, model_size

SIZE = ModelSize(parameters=1000, layers=2, hidden=8, kv_hidden=4, intermediate=16, vocabulary=100)
BASE = {"name": "x", "policy": {"path": "p"}, "prompts": {"path": "q", "max_tokens": 10}}


def config(dtype: str = "bfloat16", **learner: object) -> RunConfig:
    data = BASE | {"policy": {"path": "p", "dtype": dtype}, "generator": {"sampling": {"max_tokens": 5}}}
    return validate(data | {"learner": {"micro_batch_size": 2} | learner}, "c.yaml")


def tiny_model(folder: Path, tied: bool) -> int:
    """Write a tiny Llama; returns the number of its distinct parameters, counted by torch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(sizes)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_read_from_the_headers(tmp_path: Path, tied: bool) -> None:
    count = tiny_model(tmp_path, tied)
    size = model_size(str(tmp_path), "policy.path")
    assert size == ModelSize(count, layers=3, hidden=16, kv_hidden=8, intermediate=40, vocabulary=64)


def test_a_learner_rank_by_hand() -> None:
    memory = learner_memory(config(zero_stage=2, world_size=2, batch_size=4), SIZE)
    tokens = 2 * (10 + 2 * 5)
    assert memory["weights"] == 2000
    assert memory["gradients"] == 1000 * (2 + 4) // 2
    assert memory["optimizer"] == 1000 * (4 + 8) // 2
    assert memory["reference"] == 2000
    assert memory["activations"] == 2 * tokens * (8 * 8 + 4 * 4 + 4 * 16) * 2
    assert memory["head"] == 3 * (2 * 2 * 5) * 100 * 4
    assert memory["export"] == 2000


def test_float32_has_no_masters_and_no_second_gradient() -> None:
    memory = learner_memory(config("float32", zero_stage=0), SIZE)
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (4000, 4000, 8000)


def test_padding_and_recomputation_change_the_activations() -> None:
    shared = learner_memory(config(), SIZE)["activations"]
    padded = learner_memory(config(prefix_sharing=False), SIZE)["activations"]
    assert padded * 20 == shared * 30
    kept, layer = 2 * 40 * 8 * 2, 40 * 144 * 2
    assert learner_memory(config(activation_checkpointing=True), SIZE)["activations"] == kept + layer


@given(st.sampled_from([1, 2, 3]), st.integers(1, 8))
def test_a_higher_stage_or_more_ranks_never_need_more(stage: int, ranks: int) -> None:
    def total(stage: int, ranks: int) -> int:
        return sum(learner_memory(config(zero_stage=stage, world_size=ranks, batch_size=840), SIZE).values())

    assert total(stage, ranks) <= total(stage, 1)
    assert total(stage, ranks) <= total(max(stage - 1, 1), ranks)


def test_an_engine_by_hand() -> None:
    cpu = engine_memory(SIZE, "bfloat16", 15, 2, {}, "cpu", staged=True)
    assert (cpu["weights"], cpu["KV cache"], cpu["staging"]) == (2000, 512 << 20, 2000)
    gpu = engine_memory(SIZE, "bfloat16", 16, 2, {}, "cuda", staged=False)
    assert (gpu["weights"], gpu["KV cache"]) == (1000, 2 * 2 * 4 * 2 * 16 // 2)
    assert "staging" not in gpu
    asked = engine_memory(SIZE, "float32", 16, 1, {"kv_cache_memory_bytes": 7}, "cuda", staged=False)
    assert (asked["weights"], asked["KV cache"]) == (4000, 7)


def test_a_plan_counts_every_actor(tmp_path: Path) -> None:
    count = tiny_model(tmp_path, tied=True)
    overrides = [
        f"policy.path={tmp_path}",
        "generator.replicas=3",
        "generator.tensor_parallel=2",
        "cluster.device=cuda",
    ]
    overrides += ["judge.type=pair_model", "eval_judge.type=sentiment", "learner.world_size=2"]
    plan = make_plan(load_config("configs/quickstart.yaml", overrides))
    roles = {role.name: role for role in plan.roles}
    assert {name: (role.actors, role.gpus) for name, role in roles.items()} == {
        "generator": (3, 2),
        "judge": (1, 1),
        "eval_judge": (1, 0),
        "learner": (2, 1),
    }
    assert plan.object_store == 4 * 2 * count + (256 << 20)
    assert plan.total == sum(role.actors * role.total for role in plan.roles) + plan.object_store


def test_a_config_without_sizes_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path, tied=True)
    file = tmp_path / "config.json"
    data = json.loads(file.read_text())
    del data["hidden_size"]
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"policy.path = .*: config.json has no hidden_size or n_embd"):
        model_size(str(tmp_path), "policy.path")
