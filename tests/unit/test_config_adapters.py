"""`sync.lora: adapters` is refused, in one line that says what to do, where it does not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.adapters import AdapterSpec
from actors.weights.transport import pick_transport
from rlhf.config import load_config
from rlhf.config.adapters import SERVED_RANKS, served_rank
from rlhf.errors import InputError

CONFIG = """
name: t
policy: {path: m}
prompts: {path: p.jsonl}
learner: {lora: {rank: 16}}
sync: {lora: adapters}
"""


@pytest.fixture
def load(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return lambda *overrides: load_config(file, list(overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner.lora=null"], ["sync.lora = adapters without learner.lora", "set learner.lora"]),
        (["learner.lora.modules_to_save=[norm]"], ["learner.lora.modules_to_save = ['norm']", "sync.lora merged"]),
        (["learner.lora.bias=all"], ["learner.lora.bias", "'none'"]),
        (["learner.lora.rank=513"], ["learner.lora.rank = 513", "512", "sync.lora merged"]),
        (["sync.transport=nccl"], ["sync.transport = nccl", "object_store or auto"]),
        (["policy.dtype=float32", "cluster.device=cuda"], ["policy.dtype = float32", "bfloat16"]),
        (["generator.engine.max_loras=1"], ["generator.engine.max_loras", "remove it"]),
        (["generator.engine.enable_lora=false"], ["generator.engine.enable_lora", "remove it"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(load, overrides, words):
    with pytest.raises(InputError) as error:
        load(*overrides)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["learner.lora.rank=512"],
        ["learner.lora.dropout=0.1"],
        ["sync.transport=object_store"],
        ["policy.dtype=float32", "cluster.device=cpu"],
        ["generator.engine.fully_sharded_loras=true"],
    ],
)
def test_what_fits_is_taken(load, overrides):
    assert load(*overrides).sync.lora == "adapters"


@pytest.mark.parametrize("overrides", [["learner.lora=null"], ["learner.lora.modules_to_save=[norm]"]])
def test_merged_weights_know_no_such_limits(load, overrides):
    assert load("sync.lora=merged", *overrides).sync.lora == "merged"


def test_adapters_go_through_the_object_store_anywhere(load):
    assert pick_transport(load(), "cuda") == pick_transport(load(), "cpu") == "object_store"
    # What the config could not know, since it left the device open.
    with pytest.raises(InputError, match=r"policy\.dtype = float32 on GPUs"):
        pick_transport(load("policy.dtype=float32"), "cuda")
    assert pick_transport(load("policy.dtype=float32"), "cpu") == "object_store"


@given(st.integers(1, SERVED_RANKS[-1]))
def test_the_served_rank_is_the_least_that_holds_the_rank(rank):
    served = served_rank(rank)
    assert served in SERVED_RANKS
    assert served >= rank
    assert not any(rank <= other < served for other in SERVED_RANKS)


def test_the_engine_gets_room_for_the_run_and_no_more():
    shapes = {
        f"base_model.model.model.layers.{i}.{layer}.lora_{part}.weight": (1, 1)
        for i in (0, 1)
        for layer in ("self_attn.q_proj", "mlp.up_proj")
        for part in "AB"
    }
    arguments = AdapterSpec.of(17, 32, shapes).arguments()
    assert arguments["max_lora_rank"] == 32
    assert arguments["lora_target_modules"] == ["q_proj", "up_proj"]
