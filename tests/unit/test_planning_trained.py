"""What trains, from the headers alone: the same layers, counts and messages as in the model itself."""

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from rlhf.config.learner import Learner
from rlhf.config.lora import Lora
from rlhf.config.trainable import Trainable
from rlhf.errors import InputError
from rlhf.learning.lora import LowRank
from rlhf.learning.subset import Subset
from rlhf.planning import trained
from rlhf.planning.sizes import read_model


def llama(tied=False, vocabulary=32):
    """Its vocabulary is as large as a layer's input and output."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, num_hidden_layers=2, tie_word_embeddings=tied, **sizes, attention_bias=True)
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def opt():
    """Projections outside of the layers, and learned positions."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(vocab_size=97, num_hidden_layers=2, max_position_embeddings=64, **sizes))


MODELS = {"llama": llama, "tied": lambda: llama(tied=True), "gpt2": gpt2, "opt": opt}


def headers(model, folder: Path):
    model.save_pretrained(folder)
    size, shapes = read_model(str(folder), "policy.path")
    return shapes, size.vocabulary


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3, "target_modules": ["q_proj", "c_attn"]},
        {"target_modules": ["layers.0.self_attn.v_proj", "h.1.mlp.c_fc"], "dropout": 0.1},
        {"modules_to_save": ["norm", "ln_f", "final_layer_norm"]},
    ],
)
def test_adapters_are_counted_as_in_the_model(tmp_path, name, options):
    model = MODELS[name]()
    shapes, vocabulary = headers(model, tmp_path)
    for key in ("target_modules", "modules_to_save"):
        here = [part for part in options.get(key, ()) if any(f".{part}." in tensor for tensor in shapes)]
        options = {**options, **({key: here} if key in options else {})}
    before = sum(parameter.numel() for parameter in model.parameters())
    lora = LowRank(Lora.model_validate(options), "m")
    lora.wrap(model)
    found = trained(Learner.model_validate({"lora": options}), shapes, vocabulary, "m")
    assert found.numbers == sum(parameter.numel() for _, parameter in lora.trainable(model))
    assert found.added == sum(parameter.numel() for parameter in model.parameters()) - before
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    # A header does not tell GPT-2's layers, which are stored the other way round, from others.
    inputs = sum(module.out_features if name == "gpt2" else module.in_features for module in adapted)
    rank = options.get("rank", 16)
    assert found.kept == rank * len(adapted) + (1.5 * inputs if "dropout" in options else 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["nowhere"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["wpe", "embed_positions"]},
        {"modules_to_save": ["nowhere"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_a_name_that_fits_none_is_refused_with_the_models_own_words(tmp_path, name, options):
    model = MODELS[name]()
    shapes, vocabulary = headers(model, tmp_path)
    with pytest.raises(InputError) as expected:
        LowRank(Lora.model_validate(options), "some/model").wrap(model)
    with pytest.raises(InputError) as found:
        trained(Learner.model_validate({"lora": options}), shapes, vocabulary, "some/model")
    assert str(found.value) == str(expected.value)


def test_names_of_a_checkpoint_without_its_head_are_shorter(tmp_path):
    """A base model's tensors lack the first part of the module's names; both ways to name a layer are right."""
    shapes, vocabulary = headers(gpt2().transformer, tmp_path)
    assert "h.0.attn.c_attn.weight" in shapes
    whole = Learner.model_validate({"lora": {"target_modules": ["transformer.h.0.attn.c_attn"]}})
    assert trained(whole, shapes, vocabulary, "m").numbers == 16 * (32 + 3 * 32)


@pytest.mark.parametrize(
    ("include", "exclude"), [(["*.mlp.*"], []), (["*"], ["*norm*"]), (["*.layers.[01].*", "*.norm.weight"], ["*.1.*"])]
)
def test_a_subset_is_counted_as_in_the_model(tmp_path, include, exclude):
    model = llama()
    shapes, vocabulary = headers(model, tmp_path)
    subset = Subset(Trainable(include=include, exclude=exclude), "m")
    subset.wrap(model)
    expected = sum(parameter.numel() for _, parameter in subset.trainable(model))
    learner = Learner.model_validate({"trainable": {"include": include, "exclude": exclude}})
    found = trained(learner, shapes, vocabulary, "m")
    assert (found.numbers, found.added) == (expected, 0)
    assert trained(Learner(), shapes, vocabulary, "m").numbers == sum(p.numel() for p in model.parameters())
