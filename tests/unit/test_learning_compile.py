"""Which layers of a model are compiled, in place and once, and what is refused."""

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf.config.learner import Learner
from rlhf.config.lora import Lora
from rlhf.errors import InputError
from rlhf.learning import compile as compiling
from rlhf.learning.batch import build_batch
from rlhf.learning.compile import compile_layers, decoder_layers
from rlhf.learning.lora import LowRank
from rlhf.learning.policy import PolicyModule
from rlhf.records import Pair


def llama():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, **sizes))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def with_adapters():
    return LowRank(Lora(rank=2), "tiny").wrap(llama())


@pytest.mark.parametrize(
    ("build", "kind", "count"),
    [(llama, "LlamaDecoderLayer", 3), (gpt2, "GPT2Block", 2), (with_adapters, "LlamaDecoderLayer", 3)],
)
def test_the_layers_of_a_model(build, kind, count):
    assert [type(layer).__name__ for layer in decoder_layers(PolicyModule(build()))] == [kind] * count


def test_a_unit_inside_a_unit_is_not_compiled_again():
    class Named(nn.Module):
        _no_split_modules = ("Block", "Inner")

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

    class Inner(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)

    model = Named()
    assert decoder_layers(model) == list(model.layers)


def test_compiled_layers_give_the_same_numbers_and_share_their_code(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = PolicyModule(llama())
    plain = copy.deepcopy(module)
    names = list(module.state_dict())
    compile_layers(module, "cpu")
    assert list(module.state_dict()) == names
    pairs = [Pair("p", 0, (1, 2, 3), (4, 5), (6, 7, 8), "", "", "", 1.0, 0, 0)]
    for shown in (pairs, pairs * 2, pairs * 3):
        batch = build_batch(shown, prefix_sharing=True)
        torch.testing.assert_close(module(batch), plain(batch), rtol=0, atol=1e-6)
    # One row, and any number of rows above one; three layers and three sizes share them.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match=r"learner\.compile.*no decoder layers in Linear"):
        compile_layers(nn.Linear(2, 2), "cpu")


def test_a_cpu_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"C\+\+ compiler.*no-such-compiler.*CXX"):
        compile_layers(llama(), "cpu")
    compile_layers(llama(), "cuda")


def test_zero_3_is_refused():
    assert Learner(compile=True).compile
    with pytest.raises(ValueError, match=r"learner\.compile = true with learner\.zero_stage 3"):
        Learner(compile=True, zero_stage=3)
