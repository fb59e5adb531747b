"""A learner rank's memory against sums taken by hand, and against what a real model keeps for its backward pass."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config.learner import Learner
from rlhf.planning import ModelSize, Row, Trained, learner_memory
from rlhf.planning.learner import HEAD_CHUNK, RUNTIME

SIZE = ModelSize(parameters=1000, layers=2, hidden=8, query_hidden=8, kv_hidden=4, intermediate=16, vocabulary=100)
ALL = Trained(1000)
ROW = Row(tokens=20, responses=10)
BUCKET = 4 * 1000
"""Smaller than DeepSpeed's own limit."""


def memory(dtype="bfloat16", what=ALL, device="cpu", row=ROW, size=SIZE, **options):
    learner = Learner.model_validate({"micro_batch_size": 2, "batch_size": 840, **options})
    return learner_memory(learner, dtype, size, what, row, device)


def test_a_rank_by_hand():
    found = memory(zero_stage=2, world_size=2).device
    assert found["weights"] == 2000
    assert found["optimizer"] == 1000 * 12 // 2
    assert found["reference"] == 2000
    assert found["gradients"] == 1000 * 4 // 2 + BUCKET
    a_token = (6 * 8 + 2 * 8 + 2 * 8 + 4 * 16 + 2 * 8) * 2
    assert found["activations"] == 1.5 * 2 * 20 * (2 * a_token + 3 * 20)
    assert found["head"] == 2 * 10 * 100 * 10 + 4 * 100 * 8
    assert found["runtime"] == RUNTIME
    assert "export" not in found, "there are no gradients while it is written, and they are more"


@pytest.mark.parametrize(
    ("dtype", "stage", "ranks", "gradients"),
    [
        ("float32", 0, 2, 4000),
        ("bfloat16", 1, 2, 4000 + BUCKET + 2000),
        ("bfloat16", 2, 2, 2000 + BUCKET),
        ("float32", 2, 2, 2000 + BUCKET + 2000),
        ("bfloat16", 3, 4, 1000 + BUCKET + 1000),
    ],
)
def test_gradients_by_stage(dtype, stage, ranks, gradients):
    found = memory(dtype, zero_stage=stage, world_size=ranks).device
    assert found["gradients"] == gradients
    assert found["optimizer"] == (8000 if stage == 0 else 12000 // ranks)


def test_zero_3_gathers_what_it_has_split():
    found = memory(zero_stage=3, world_size=4).device
    assert (found["weights"], found["gathered weights"], found["reference"]) == (500, 2000, 500)
    limited = {"zero_optimization": {"stage3_max_live_parameters": 300, "reduce_bucket_size": 50}}
    found = memory(zero_stage=3, world_size=4, deepspeed=limited).device
    assert (found["gathered weights"], found["gradients"]) == (600, 1000 + 4 * 50 + 1000)
    assert memory(zero_stage=3).device["gathered weights"] == 0, "a lone rank has them whole"


@pytest.mark.parametrize(
    ("options", "bytes_held"),
    [
        ({}, 2000),
        ({"lora": {}}, 0),
        ({"reference": {"policy": "round_start"}}, 0),
        ({"reference": {"policy": "ema"}}, 4000),
        ({"loss": {"type": "sft"}}, 0),
        ({"loss": {"type": "simpo"}, "reference": {"policy": "none"}}, 0),
        ({"trainable": {"include": ["*.mlp.*"]}}, 2000),
    ],
)
def test_references(options, bytes_held):
    assert memory(**options).device["reference"] == bytes_held


def test_an_average_is_of_what_trains_and_scores_beside_the_policy():
    few = memory(what=Trained(100), reference={"policy": "ema"}).device
    # The export is larger than what is kept of the policy meanwhile, and than the gradients.
    assert (few["reference"], few["export"]) == (400, 2000)
    split = memory(what=Trained(100), reference={"policy": "ema"}, zero_stage=3, world_size=2).device
    assert split["reference"] == 200


def test_adapters_train_alone():
    what = Trained(numbers=50, added=50, kept=12.0)
    found = memory(what=what, lora={"rank": 2}).device
    assert (found["weights"], found["optimizer"]) == (2 * 1050, 50 * 12)
    a_token = (6 * 8 + 2 * 8 + 2 * 8 + 4 * 16 + 6.0) * 2
    assert found["activations"] == 1.5 * 2 * 20 * (2 * a_token + 3 * 20)


def test_padding_recomputation_and_packing_change_the_activations():
    shared = memory().device["activations"]
    padded = memory(prefix_sharing=False).device["activations"]
    # Neither repeated keys and values, nor a mask.
    assert shared - padded == 1.5 * 2 * 20 * (2 * 2 * (8 - 4) * 2 + 3 * 20)
    recomputed = memory(activation_checkpointing=True).device["activations"]
    assert recomputed == 1.5 * 2 * 20 * ((2 * 8 + 160) * 2 + 3 * 20)
    packed = memory(pack_tokens=35).device["activations"]
    assert packed == int(1.5 * 35 * (2 * 160 * 2 + 3 * 35))
    assert memory(pack_tokens=5).device["activations"] == 1.5 * 20 * (2 * 160 * 2 + 3 * 20), "a longer pair has a row"


def test_the_head_takes_a_chunk_at_a_time():
    from rlhf.learning.logprobs import CHUNK

    assert HEAD_CHUNK == CHUNK
    found = memory("float32", row=Row(10**6, 10**6)).device["head"]
    assert found == 512 * 100 * 8 + 4 * 100 * 8


@pytest.mark.parametrize(
    "options",
    [
        {"offload": {"optimizer": True}},
        {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}},
    ],
)
def test_an_offloaded_optimizer_lies_in_host_memory(options):
    plain, found = memory(device="cuda"), memory(device="cuda", **options)
    assert (plain.device["optimizer"], plain.device["gradients"]) == (12000, 4000 + BUCKET)
    assert "optimizer" not in plain.host
    assert "optimizer" not in found.device
    assert found.device["gradients"] == BUCKET
    assert (found.host["optimizer"], found.host["gradients"]) == (12000, 4000)
    # On a CPU there is no other memory for it to go to.
    assert memory(**options) == memory()
    assert memory().host == {}


def test_offloaded_weights_are_gathered_on_the_gpu():
    options = {"zero_stage": 3, "world_size": 2, "offload": {"parameters": True}}
    found = memory(device="cuda", **options)
    assert "weights" not in found.device
    assert (found.host["weights"], found.device["gathered weights"]) == (1000, 2000)
    raw = {"deepspeed": {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/d"}}}}
    on_disk = memory(device="cuda", zero_stage=3, world_size=2, **raw)
    assert "weights" not in on_disk.device | on_disk.host


def test_an_offloaded_reference_comes_back_to_score():
    what = Trained(10)
    found = memory(device="cuda", what=what, reference={"policy": "initial", "offload": True})
    assert (found.host["reference"], found.device["reference"]) == (2000, 2000)
    assert "gradients" not in found.device, "there are none, or fewer, while it scores"
    assert found.host["export"] == 2000


def test_zero_3_has_the_whole_model_in_cpu_memory_at_its_start():
    found = memory(device="cuda", zero_stage=3, world_size=4).host
    # Two bytes a number, policy and frozen reference; afterwards only the export is there.
    assert found == {"export": 2000, "start": 2 * 2000 - 2000, "runtime": RUNTIME}
    assert "start" not in memory(device="cuda", zero_stage=3, reference={"policy": "round_start"}).host
    assert "start" not in memory(device="cuda", zero_stage=2).host
    offloaded = memory(device="cuda", zero_stage=3, world_size=4, offload={"optimizer": True}).host
    assert "start" not in offloaded, "the optimizer needs more later"


def test_a_start_on_a_cpu_counts_where_it_is_more_than_training():
    few = {"what": Trained(1), "row": Row(1, 1), "size": replace(SIZE, parameters=10**6), "zero_stage": 3}
    assert "start" not in memory(**few).device
    limited = {"zero_optimization": {"stage3_max_live_parameters": 1000}}
    found = memory(world_size=8, deepspeed=limited, **few).device
    assert found["start"] > 0
    assert sum(size for name, size in found.items() if name != "runtime") == 2 * 2 * 10**6


@given(st.sampled_from([1, 2, 3]), st.integers(2, 8), st.sampled_from(["bfloat16", "float32"]))
def test_more_ranks_or_a_higher_stage_hold_no_more_of_the_state(stage, ranks, dtype):
    def state(stage, ranks):
        found = memory(dtype, zero_stage=stage, world_size=ranks).device
        return sum(found[part] for part in ("weights", "optimizer", "reference"))

    assert state(stage, ranks) <= state(stage, ranks - 1)
    assert state(stage, ranks) <= state(max(stage - 1, 1), ranks)


def saved_bytes(layers, dtype, masked, lora):
    """Bytes that a Llama's decoder keeps for its backward pass over 2 x 24 tokens, weights left out."""
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(sizes).to(dtype)
    if lora:
        from peft import LoraConfig, get_peft_model

        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    mask = None
    if masked:
        hidden = ~torch.ones(24, 24, dtype=torch.bool).tril()
        mask = torch.zeros(2, 1, 24, 24, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(2, 24, dtype=torch.long), attention_mask=mask, use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_a_layers_activations_are_those_that_autograd_keeps(dtype, masked, lora):
    size = ModelSize(0, layers=1, hidden=48, query_hidden=48, kv_hidden=16, intermediate=128, vocabulary=97)
    options = {"lora": {"rank": 4}} if lora else {}
    what = Trained(0, 0, 4.0 * 7 if lora else 0.0)
    row = Row(24, 2)
    found = memory(dtype, what, "cuda", row, size, prefix_sharing=masked, **options).device["activations"]
    masks = 2 * 24 * 24 * ((2 if dtype == "bfloat16" else 4) + 1) if masked else 0
    kind = getattr(torch, dtype)
    a_layer = saved_bytes(3, kind, masked, lora) - saved_bytes(2, kind, masked, lora)
    # Left out: the norms' scales and the softmax's normalisers, 8 numbers of a token in fp32.
    assert found - masks == a_layer - 2 * 24 * (2 + 6) * 4
