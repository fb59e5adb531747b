"""LoRA as a parametrisation: what trains, what the reference sees, and the merged export, against peft's own merge."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf.config.data import Policy
from rlhf.config.lora import Lora
from rlhf.errors import InputError
from rlhf.learning import parametrisation
from rlhf.learning.lora import LowRank, adapter_shapes
from rlhf.learning.policy import PolicyModule

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def tiny(tied=True, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, **changes)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def adapted(model, **options):
    """The adapted model with every trained parameter moved, and its parametrisation."""
    lora = LowRank(Lora(**options), "the model")
    lora.wrap(model)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in lora.trainable(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model, lora


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_wrapping_changes_no_log_prob():
    model, expected = tiny(), logits(tiny())
    LowRank(Lora(), "the model").wrap(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("make", [tiny, lambda: tiny(tied=False), gpt2], ids=["tied", "untied", "gpt2"])
def test_all_linear_takes_every_layer_but_the_head(make):
    model, lora = adapted(make())
    layers = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == (8 if isinstance(model, GPT2LMHeadModel) else 14)
    assert not any("lm_head" in name for name in layers)
    assert {name.rpartition(".lora_")[0] for name, _ in lora.trainable(model)} == layers
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


@settings(max_examples=10, deadline=None)
@given(rank=st.integers(1, 12), alpha=st.integers(1, 64), saved=st.booleans())
def test_export_is_pefts_own_merge(rank, alpha, saved):
    from peft import LoraConfig, get_peft_model

    model, lora = adapted(tiny(), rank=rank, alpha=alpha, modules_to_save=["model.norm"] if saved else [])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    other = tiny()
    peft = get_peft_model(
        other,
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, modules_to_save=["model.norm"] if saved else None),
    )
    other.load_state_dict(model.state_dict())
    merged = dict(peft.merge_and_unload().named_parameters())
    exported = dict(lora.export(model))
    assert exported.keys() == merged.keys()
    for name, value in exported.items():
        torch.testing.assert_close(value, merged[name].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [tiny, lambda: tiny(tied=False), gpt2], ids=["tied", "untied", "gpt2"])
def test_export_loads_as_a_plain_model_that_gives_the_same(make, tmp_path):
    plain = make()
    plain.save_pretrained(tmp_path / "base")
    model, lora = adapted(make(), modules_to_save=["norm"] if isinstance(plain, LlamaForCausalLM) else ["ln_f"])
    expected = logits(model)
    assert not torch.allclose(expected, logits(plain), atol=0.01)
    exported = dict(lora.export(PolicyModule(model).model))
    assert exported.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    model.save_pretrained(tmp_path / "merged", state_dict=exported)
    loaded = type(plain).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_a_bf16_merge_is_rounded_once():
    model, lora = adapted(tiny().bfloat16(), rank=3, alpha=7)
    layer = model.model.layers[0].mlp.up_proj
    weight, a, b = (
        part.weight.detach().double() for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    )
    exact = weight + 7 / 3 * (b @ a)
    found = dict(lora.export(model))["model.layers.0.mlp.up_proj.weight"]
    assert found.dtype == torch.bfloat16
    # Half a unit in the last of bf16's 8 bits, up to fp32's own rounding; two roundings would be off by more.
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() * 1.001).all()
    assert (found == exact.bfloat16()).double().mean() > 0.999


def test_adapters_are_in_the_models_dtype():
    model, lora = adapted(tiny().bfloat16())
    assert {parameter.dtype for _, parameter in lora.trainable(model)} == {torch.bfloat16}


@pytest.mark.parametrize("saved", [[], ["norm"]])
def test_the_initial_policy_is_the_base_and_training_goes_on(saved):
    model, lora = adapted(tiny(), modules_to_save=saved)
    before = {name for name, _ in lora.trainable(model)}
    moved = logits(model)
    with lora.initial(model):
        assert torch.equal(logits(model), logits(tiny()))
    assert torch.equal(logits(model), moved)
    assert {name for name, _ in lora.trainable(model)} == before
    with pytest.raises(RuntimeError), lora.initial(model):
        raise RuntimeError
    assert torch.equal(logits(model), moved)


def test_groups_hold_a_layers_parts_together(monkeypatch):
    monkeypatch.setattr(parametrisation, "GROUP_BYTES", 1)
    model, lora = adapted(tiny())
    groups = []

    def gather(parameters):
        groups.append([id(parameter) for parameter in parameters])
        return torch.no_grad()

    exported = dict(lora.export(model, gather))
    layer = model.model.layers[0].self_attn.q_proj
    parts = (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    assert [id(part.weight) for part in parts] in groups
    assert len(groups) == len(exported)


def test_exported_tensors_are_copies():
    model, lora = adapted(tiny())
    exported = dict(lora.export(model))
    kept = copy.deepcopy(exported)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(exported[name], value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_proj", "q_prj"]}, ["target_modules", "'q_prj'", "down_proj", "q_proj", "v_proj"]),
        ({"target_modules": ["proj"]}, ["target_modules", "'proj'"]),
        ({"target_modules": ["lm_head"]}, ["target_modules", "'lm_head'"]),
        ({"target_modules": ["input_layernorm"]}, ["target_modules", "'input_layernorm'"]),
        ({"modules_to_save": ["embed_tokens"]}, ["modules_to_save", "'embed_tokens'", "norm"]),
        ({"modules_to_save": ["layers.0"]}, ["modules_to_save", "'layers.0'"]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["mlp.act_fn"]}, ["modules_to_save", "'mlp.act_fn'"]),
    ],
)
def test_names_that_do_not_fit_are_refused_with_those_that_do(options, words):
    with pytest.raises(InputError) as error:
        LowRank(Lora(**options), "some/model").wrap(tiny())
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in ["learner.lora", "some/model", *words])


def test_a_name_may_say_which_layer():
    model, _ = adapted(tiny(), target_modules=["layers.1.self_attn.q_proj"])
    assert [name for name, module in model.named_modules() if hasattr(module, "lora_A")] == [
        "model.layers.1.self_attn.q_proj"
    ]


@pytest.mark.parametrize("make", [tiny, lambda: tiny(tied=False), gpt2], ids=["tied", "untied", "gpt2"])
def test_the_adapters_alone_are_pefts_own_checkpoint(make, tmp_path):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    names = ["c_attn", "c_fc"] if isinstance(make(), GPT2LMHeadModel) else ["q_proj", "down_proj"]
    model, lora = adapted(make(), rank=3, target_modules=names)
    peft = get_peft_model(make(), LoraConfig(r=3, target_modules=names))
    peft.base_model.model.load_state_dict(model.state_dict())
    expected = get_peft_model_state_dict(peft)
    sent = dict(lora.adapters(PolicyModule(model).model))
    assert sent.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in sent.items())
    kept = copy.deepcopy(sent)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(sent[name], value) for name, value in kept.items())
    # The receiver knows names and shapes from the policy's config alone.
    make().save_pretrained(tmp_path)
    shapes = adapter_shapes(Policy(path=str(tmp_path)), Lora(rank=3, target_modules=names))
    assert shapes == {name: tuple(value.shape) for name, value in sent.items()}


def test_a_base_with_its_adapters_is_the_merged_checkpoint():
    model, lora = adapted(tiny(), rank=3, alpha=7)
    base, merged, sent = dict(tiny().named_parameters()), dict(lora.export(model)), dict(lora.adapters(model))
    assert len(sent) == 28
    for name, value in merged.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in sent:
            delta = 7 / 3 * (sent[f"{layer}.lora_B.weight"] @ sent[f"{layer}.lora_A.weight"])
            torch.testing.assert_close(value, base[name].detach() + delta, rtol=0, atol=1e-6)
        else:
            assert torch.equal(value, base[name])


def test_what_trains_in_full_is_not_among_the_adapters():
    model, lora = adapted(tiny(), modules_to_save=["norm"], target_modules=["q_proj"])
    assert {name.rsplit(".", 2)[1] for name, _ in lora.adapters(model)} == {"lora_A", "lora_B"}
