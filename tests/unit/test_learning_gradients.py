"""Gradients of losses through a whole model against closed forms over plain logits, by autograd, in float64."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config.learner import Loss
from rlhf.learning.batch import build_batch
from rlhf.learning.losses import StepLoss
from rlhf.learning.policy import PolicyModule
from rlhf.records import Pair

BETA = 0.4
SIZES = ((3, 4, 2), (1, 1, 5), (5, 2, 2), (2, 6, 3))


def ipo(w, v, rw, rv, nw, nv):
    return ((w - rw) / nw - (v - rv) / nv - 1 / (2 * BETA)) ** 2


def hinge(w, v, rw, rv, nw, nv):
    return torch.clamp(1 - BETA * ((w - rw) - (v - rv)), min=0)


def simpo(w, v, rw, rv, nw, nv):
    return -torch.log(torch.sigmoid(BETA * (w / nw - v / nv) - 0.5))


def sppo_hard(w, v, rw, rv, nw, nv):
    return (w - rw - 1 / (2 * BETA)) ** 2 + (v - rv + 1 / (2 * BETA)) ** 2


def apo_zero(w, v, rw, rv, nw, nv):
    return 1 - torch.sigmoid(BETA * (w - rw)) + torch.sigmoid(BETA * (v - rv))


def nca_pair(w, v, rw, rv, nw, nv):
    a, b = BETA * (w - rw), BETA * (v - rv)
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)


def orpo(w, v, rw, rv, nw, nv):
    p, q = torch.exp(w / nw), torch.exp(v / nv)
    # The likelihood term is the mean over all tokens of the step.
    return -BETA * torch.log(torch.sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q)))) - w / nw.mean()


def cpo(w, v, rw, rv, nw, nv):
    return -torch.log(torch.sigmoid(BETA * (w - v))) - w / nw.mean()


# Of the chosen (w) and the rejected response (v): log-probs, reference log-probs, tokens.
CLOSED = {form.__name__: form for form in (ipo, hinge, simpo, sppo_hard, apo_zero, nca_pair, orpo, cpo)}


def pairs() -> list[Pair]:
    draw = random.Random(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(40) for _ in range(count))

    return [Pair(f"{i}", 1, *map(ids, sizes), "", "", "", 1.0, 0, 0) for i, sizes in enumerate(SIZES)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(sizes).train()


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("name", CLOSED)
def test_gradients_through_a_model_are_those_of_the_closed_form(model: nn.Module, name: str, sharing: bool) -> None:
    reference = torch.tensor([[-8.0, -7.5], [-2.0, -14.0], [-6.0, -6.5], [-17.0, -9.0]])
    plain, own = copy.deepcopy(model).double(), copy.deepcopy(model)
    sums = []
    for pair in pairs():
        for response in (pair.chosen_ids, pair.rejected_ids):
            logits = plain(torch.tensor([[*pair.prompt_ids, *response]])).logits[0, len(pair.prompt_ids) - 1 : -1]
            sums.append(logits.log_softmax(-1)[range(len(response)), list(response)].sum())
    lengths = torch.tensor([sizes[1:] for sizes in SIZES], dtype=torch.float64)
    values = CLOSED[name](*torch.stack(sums).view(-1, 2).unbind(1), *reference.double().unbind(1), *lengths.unbind(1))
    values.mean().backward()

    module, step = PolicyModule(own), StepLoss.of(Loss(type=name), pairs(), "cpu")
    batch = build_batch(pairs(), prefix_sharing=sharing)
    found = step(batch.sums(module(batch)), reference, range(len(SIZES)), BETA).losses
    found.mean().backward()
    torch.testing.assert_close(found.double(), values, rtol=1e-5, atol=1e-5)
    expected = dict(plain.named_parameters())
    norm = sum(parameter.grad.square().sum() for parameter in expected.values()) ** 0.5
    assert norm > 0.01
    for key, parameter in own.named_parameters():
        assert (parameter.grad.double() - expected[key].grad).norm() <= 1e-5 * norm, key
