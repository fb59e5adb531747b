"""A step's loss in micro-batches equals the step taken whole, for losses that look beyond a pair too."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.learner import Loss
from rlhf.learning.batch import build_batch
from rlhf.learning.logprobs import token_logprobs, token_logprobs_and_squares
from rlhf.learning.losses import LOSSES, RewardShift, StepLoss, preference_loss
from rlhf.records import Pair

NEEDED = {"robust": {"label_smoothing": 0.1}}
BETA = 0.3


def pairs(sizes):
    return [
        Pair(str(i), 1, (5,), (1,) * chosen, (2,) * rejected, "", "", "", 1.0, 0, 0)
        for i, (chosen, rejected) in enumerate(sizes)
    ]


def drawn(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy, reference = -40 * torch.rand(2, count, 2, generator=generator)
    return policy.requires_grad_(), reference


def gradient(config, sizes, parts, weights=None):
    """Loss of a step and its gradient, [n, 2], with the step cut into `parts` (lists of indices)."""
    policy, reference = drawn(len(sizes))
    step = StepLoss.of(config, pairs(sizes), "cpu")
    if step.matches and len(parts) > 1:
        step.match(policy.detach(), reference)
    total = torch.zeros(())
    for part in parts:
        own = None if weights is None else weights[part]
        total = total + step(policy[part], reference[part], part, BETA, own).losses.sum() / len(sizes)
    total.backward()
    return total.detach(), policy.grad


CONFIGS = [
    *(Loss(type=name, **NEEDED.get(name, {})) for name in sorted(LOSSES)),
    Loss(type="sigmoid", rpo_alpha=0.5, f_divergence="js"),
    Loss(type="mix", terms=({"type": "aot", "label_smoothing": 0.1}, {"type": "aot_unpaired"}, {"type": "sft"})),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "+".join(config.names))
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_any_cut_gives_the_whole_steps_loss_and_gradient(config, data):
    size = st.tuples(st.integers(1, 9), st.integers(1, 9))
    sizes = data.draw(st.lists(size, min_size=1, max_size=7))
    order = data.draw(st.permutations(range(len(sizes))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes)), max_size=3)))
    bounds = [0, *cuts, len(sizes)]
    parts = [part for start, end in pairwise(bounds) if (part := list(order[start:end]))]
    whole, expected = gradient(config, sizes, [list(range(len(sizes)))])
    value, found = gradient(config, sizes, parts)
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(found, expected)


def test_micro_batches_of_aot_on_their_own_would_be_another_loss():
    sizes = [(3, 4)] * 6
    policy, reference = drawn(6)
    whole, _ = gradient(Loss(type="aot"), sizes, [[0, 1, 2], [3, 4, 5]])
    apart = sum(
        preference_loss("aot", *policy[part].unbind(1), *reference[part].unbind(1), beta=BETA).losses.sum() / 6
        for part in ([0, 1, 2], [3, 4, 5])
    )
    assert abs(whole - apart) > 1e-3


def test_aot_against_a_plain_sort_with_gradients():
    """Both sides sorted by torch.sort, which autograd goes through: the same loss and gradient."""
    policy, reference = drawn(9, seed=3)
    lines = {
        "aot": (policy[:, 0] - policy[:, 1]).sort().values - (reference[:, 0] - reference[:, 1]).sort().values,
        "aot_unpaired": (policy - reference)[:, 0].sort().values - (policy - reference)[:, 1].sort().values,
    }
    for name, difference in lines.items():
        expected = -torch.nn.functional.logsigmoid(BETA * difference).sum()
        found = preference_loss(name, *policy.unbind(1), *reference.unbind(1), beta=BETA).losses.sum()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value, policy)[0] for value in (found, expected)))


def test_the_likelihood_term_is_the_mean_over_the_steps_tokens():
    sizes = [(2, 1), (8, 1), (5, 1)]
    policy, _ = drawn(3)
    value, _ = gradient(Loss(type="sft"), sizes, [[2], [0, 1]])
    assert value.item() == pytest.approx(-policy[:, 0].sum().item() / 15)


def test_weights_go_with_their_pairs():
    weights = torch.tensor([0.5, 2.0, 0.0])
    whole, expected = gradient(Loss(), [(2, 3)] * 3, [[0, 1, 2]], weights)
    value, found = gradient(Loss(), [(2, 3)] * 3, [[2], [1, 0]], weights)
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(found, expected)
    assert found[2].abs().sum() == 0


def test_the_reward_shift_is_a_bias_corrected_mean_that_is_saved():
    shift = RewardShift()
    assert shift.value == 0.0
    shift.observe(3.0, -1.0)
    assert shift.value == pytest.approx(1.0)
    shift.observe(1.0, 5.0)
    assert shift.value == pytest.approx((0.9 * 1.0 + 3.0) / 1.9)
    again = RewardShift()
    again.load_state_dict(shift.state_dict())
    assert again == shift


def test_the_reward_shift_reaches_bco_only_where_it_is_on():
    policy, reference = drawn(2)
    on, off = (
        StepLoss.of(Loss(type="bco_pair", reward_shift=flag), pairs([(2, 2)] * 2), "cpu", 0.7) for flag in (True, False)
    )
    arguments = (*policy.unbind(1), *reference.unbind(1))
    shifted = preference_loss("bco_pair", *arguments, beta=BETA, reward_shift=0.7).losses
    plain = preference_loss("bco_pair", *arguments, beta=BETA).losses
    torch.testing.assert_close(on(policy, reference, [0, 1], BETA).losses, shifted)
    torch.testing.assert_close(off(policy, reference, [0, 1], BETA).losses, plain)


def test_tokens_past_the_shorter_response_weigh_less():
    batch = build_batch(pairs([(2, 4), (3, 1)]), prefix_sharing=True)
    logprobs = torch.arange(1.0, 11)  # 1 2 | 3 4 5 6 and 7 8 9 | 10
    assert batch.lengths.tolist() == [2, 4, 3, 1]
    assert batch.sums(logprobs).tolist() == [[3.0, 18.0], [24.0, 10.0]]
    assert batch.sums(logprobs, 0.5).tolist() == [[3.0, 3 + 4 + 0.5 * 11], [7 + 0.5 * 17, 10.0]]
    assert batch.sums(logprobs, 0.0).tolist() == [[3.0, 7.0], [7.0, 10.0]]


def test_sums_of_squared_probabilities_beside_the_log_probs():
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(7, 5, requires_grad=True),
        torch.randn(11, 5, requires_grad=True),
        torch.randn(11),
    )
    targets = torch.randint(11, (7,))
    found, squares = token_logprobs_and_squares(hidden, weight, bias, targets, chunk=3)
    expected = (hidden @ weight.t() + bias).log_softmax(-1)
    torch.testing.assert_close(squares, expected.detach().exp().square().sum(-1).log())
    assert not squares.requires_grad
    plain = token_logprobs(hidden, weight, bias, targets, chunk=3)
    assert torch.equal(found, plain)
    gradients = [torch.autograd.grad(value.sum(), (hidden, weight)) for value in (found, plain)]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
