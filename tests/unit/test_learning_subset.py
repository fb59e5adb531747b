"""A named subset of parameters: which names select what, tied weights, and patterns that are wrong."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config.learner import Learner
from rlhf.config.load import validate
from rlhf.config.trainable import Trainable
from rlhf.errors import InputError
from rlhf.learning.parametrisation import Full
from rlhf.learning.policy import PolicyModule
from rlhf.learning.subset import Subset


def llama(tied=True):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, num_hidden_layers=12, tie_word_embeddings=tied, **sizes))


def chosen(model, **options):
    subset = Subset(Trainable(**options), "the-model")
    assert subset.wrap(model) is model
    return [name for name, _ in subset.trainable(model)]


def test_shell_patterns_over_checkpoint_names():
    every = [name for name, _ in llama().named_parameters()]
    assert chosen(llama()) == every
    assert chosen(llama(), include=["*down_proj*"]) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(12)]
    last = chosen(llama(), include=["*.layers.1?.*", "model.norm.weight"], exclude=["*_proj.*"])
    norms = [f"model.layers.{i}.{part}_layernorm.weight" for i in (10, 11) for part in ("input", "post_attention")]
    assert last == [*norms, "model.norm.weight"]
    assert chosen(llama(), include=["*.layers.[0-2].self_attn.q_proj.weight"], exclude=["*.1.*"]) == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 2)
    ]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_either_name_of_a_tied_weight_counts(name):
    embedding = "model.embed_tokens.weight"
    assert chosen(llama(), include=[name]) == [embedding]
    assert embedding not in chosen(llama(), exclude=[name])
    assert chosen(llama(tied=False), include=[name]) == [name]


def test_the_whole_model_is_exported_and_the_rest_is_frozen():
    model = llama()
    chosen(model, include=["*mlp*"])
    assert dict(Subset(Trainable(), "").export(model)).keys() == dict(Full().export(llama())).keys()
    module = PolicyModule(model)
    assert all(p.requires_grad == ("mlp" in name) for name, p in module.named_parameters())
    assert len(list(Subset(Trainable(), "").trainable(module))) == 36


def test_a_wrapped_model_can_be_wrapped_anew():
    model = llama()
    chosen(model, include=["*norm*"])
    assert chosen(model, include=["*mlp*"]) == chosen(llama(), include=["*mlp*"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": ["*.mlp.*", "*.mpl.*"]}, r"trainable\.include = '\*\.mpl\.\*': fits no parameter of the-model;"),
        (
            {"exclude": ["norm"]},
            r"trainable\.exclude = 'norm': fits no .* model\.layers\.\*\.self_attn\.q_proj\.weight",
        ),
        ({"include": ["*norm*"], "exclude": ["*norm*"]}, r"trainable\.exclude = \['\*norm\*'\]: no parameter of"),
    ],
)
def test_a_pattern_that_means_nothing_is_one_line(options, words):
    with pytest.raises(InputError, match=words) as error:
        chosen(llama(), **options)
    assert "\n" not in str(error.value)
    assert "layers.3" not in str(error.value)


def test_the_config():
    found = validate({"trainable": {"include": ["*q_proj*"]}}, "c.yaml", Learner).trainable
    assert (found.include, found.exclude) == (("*q_proj*",), ())
    assert Learner().trainable is None
    with pytest.raises(InputError, match=r"learner\.trainable with learner\.lora"):
        validate({"trainable": {}, "lora": {}}, "c.yaml", Learner)
    with pytest.raises(InputError, match=r"trainable\.include"):
        validate({"trainable": {"include": []}}, "c.yaml", Learner)
    with pytest.raises(InputError, match="expected a list"):
        validate({"trainable": {"include": "*"}}, "c.yaml", Learner)
