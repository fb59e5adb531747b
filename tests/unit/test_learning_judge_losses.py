"""The losses of judge training against a cross-entropy of the model's logits, and their layout without a mask."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.learning.batch import build_batch
from rlhf.learning.losses import REFERENCE_FREE, preference_loss
from rlhf.learning.policy import PolicyModule
from rlhf.records import Pair

A, B = 7, 11
PROMPTS = [(1, 5, 9, 3), (2, 8), (4, 4, 6, 1, 3, 9)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows():
    answers = [(A, B), (B, A), (A, B)]
    return [
        Pair(str(i), 1, prompt, (right,), (wrong,), "", "", "", 1.0, 0, 0)
        for i, (prompt, (right, wrong)) in enumerate(zip(PROMPTS, answers, strict=True))
    ]


def logits(model):
    """Logits at each prompt's last position, one prompt at a time: [3, vocabulary]."""
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])


def losses(model, name, beta=1.0):
    batch = build_batch(rows(), prefix_sharing=True)
    sums = batch.sums(PolicyModule(model)(batch))
    zeros = torch.zeros(3)
    return preference_loss(name, sums[:, 0], sums[:, 1], zeros, zeros, beta=beta)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["sft", "choice"])
def test_loss_and_gradient_are_a_cross_entropy(model, name):
    plain = logits(model)
    if name == "sft":
        expected = F.cross_entropy(plain, torch.tensor([A, B, A]), reduction="none")
    else:
        expected = F.cross_entropy(plain[:, [A, B]], torch.tensor([0, 1, 0]), reduction="none")
    wanted = gradient(model, expected.mean())
    found = losses(model, name).losses
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient(model, found.mean()), wanted, atol=1e-6, rtol=1e-4)


def test_choice_takes_beta(model):
    plain = logits(model)[:, [A, B]]
    expected = F.cross_entropy(3.0 * plain, torch.tensor([0, 1, 0]), reduction="none")
    torch.testing.assert_close(losses(model, "choice", beta=3.0).losses, expected, atol=1e-6, rtol=1e-5)


def test_single_token_answers_need_no_mask():
    batch = build_batch(rows(), prefix_sharing=True)
    assert batch.segments is None
    assert batch.input_ids.shape == (3, 6)
    assert batch.predict.tolist() == [3, 3, 7, 7, 17, 17]
    assert batch.targets.tolist() == [A, B, B, A, A, B]


def test_a_mask_stays_where_one_pair_needs_it():
    longer = Pair("3", 1, (1, 2), (A, B), (B, A), "", "", "", 1.0, 0, 0)
    assert build_batch([*rows(), longer], prefix_sharing=True).segments is not None


def test_both_are_known_to_need_no_reference():
    assert {"sft", "choice"} <= REFERENCE_FREE
    assert "sigmoid" not in REFERENCE_FREE
