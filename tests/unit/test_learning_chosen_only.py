"""Pairs without a rejected response in the batch: what fine-tuning computes, in any layout."""

import itertools
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config.learner import Learner
from rlhf.learning.batch import build_batch
from rlhf.learning.mask_probe import Layout
from rlhf.learning.policy import PolicyModule
from rlhf.learning.setup import Setup, unique_tokens
from rlhf.records import Pair

SIZES = ((3, 4, 2), (1, 1, 5), (6, 2, 2))
LAYOUTS = list(itertools.product((True, False), (None, 40)))


def setup(loss: dict, sharing: bool = True, packed: int | None = None) -> Setup:
    learner = Learner.model_validate({"loss": loss})
    return Setup(learner, 0, 1, "cpu", torch.float32, Layout(prefix_sharing=sharing, pack_tokens=packed))


def pairs() -> list[Pair]:
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(50) for _ in range(count))

    return [
        Pair(f"{i}", 1, ids(p), ids(c), ids(r), "", "", "", 1.0, 0, 0, (0.0,) * c, (0.0,) * r)
        for i, (p, c, r) in enumerate(SIZES)
    ]


@torch.no_grad()
@pytest.mark.parametrize(("sharing", "packed"), LAYOUTS)
def test_fine_tuning_computes_the_chosen_responses_alone(sharing: bool, packed: int | None) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    own = setup({"type": "sft"}, sharing, packed)
    expected = []
    for pair in pairs():
        ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])
        logprobs = model(ids).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
        expected.append(logprobs[range(len(pair.chosen_ids)), list(pair.chosen_ids)].sum())
    trained = [own.trained(pair) for pair in pairs()]
    batch = own.batch(trained)
    # A row a pair, or one of all; the last token of a response is a target only.
    longest = max(p + c - 1 for p, c, _ in SIZES)
    assert batch.input_ids.shape == ((1, sum(p + c - 1 for p, c, _ in SIZES)) if packed else (len(SIZES), longest))
    assert batch.targets.tolist() == [token for pair in pairs() for token in pair.chosen_ids]
    sums = batch.sums(PolicyModule(model)(batch))
    torch.testing.assert_close(sums[:, 0], torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert sums[:, 1].tolist() == [0.0] * len(SIZES)
    assert all(not pair.rejected_logprobs for pair in trained), "they would be compared with log-probs of nothing"


def test_pairs_with_and_without_a_rejected_response_share_a_batch() -> None:
    first, second, third = pairs()
    own = setup({"type": "sft"})
    batch = build_batch([first, own.trained(second), third], prefix_sharing=False)
    assert batch.lengths.view(-1, 2).tolist() == [[4, 2], [1, 0], [2, 2]]
    assert batch.input_ids.shape[0] == 5


@pytest.mark.parametrize(
    ("loss", "chosen_only"),
    [
        ({"type": "sft"}, True),
        ({"type": "mix", "terms": [{"type": "sft"}, {"type": "sft"}]}, True),
        ({"type": "mix", "terms": [{"type": "sft"}, {"type": "sigmoid"}]}, False),
        ({"type": "choice"}, False),
        ({"type": "cpo"}, False),
    ],
)
def test_only_losses_of_the_chosen_response_leave_the_other_out(loss: dict, chosen_only: bool) -> None:
    pair = pairs()[0]
    assert (setup(loss).trained(pair) != pair) == chosen_only


def test_a_layout_costs_what_goes_through_the_model_and_throughput_counts_prompts_once() -> None:
    pair = pairs()[0]
    shared, padded = setup({}, True), setup({}, False)
    assert (shared.cost(pair), padded.cost(pair), unique_tokens(pair)) == (9, 12, 9)
    tuned = setup({"type": "sft"}, False)
    assert tuned.cost(tuned.trained(pair)) == unique_tokens(tuned.trained(pair)) == 7
