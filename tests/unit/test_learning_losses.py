"""The sigmoid loss against TRL's own code, fed with the same log-probs."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import InputError
from rlhf.learning.losses import preference_loss

BETA = 0.3


class _Accelerator:
    device = "cpu"

    def gather(self, value):
        return value

    gather_for_metrics = gather


class _Model:
    """Hands the trainer given log-probs: one completion token a sequence, chosen first."""

    training = True

    def __init__(self, logprobs):
        self.logprobs = logprobs

    def __call__(self, **_):
        zero = torch.zeros_like(self.logprobs)
        return SimpleNamespace(log_probs=self.logprobs, entropy=zero, mean_logits=zero, is_top1=zero.bool())


def trl_loss(policy, reference, beta):
    """TRL's mean loss and logged rewards for one pair: `policy` and `reference` are [chosen, rejected]."""
    from trl import DPOTrainer

    trainer = DPOTrainer.__new__(DPOTrainer)
    settings = {
        "model": SimpleNamespace(training=True),
        "accelerator": _Accelerator(),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "beta": beta,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "use_weighting": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    trainer.__dict__.update(settings)
    inputs = {
        "input_ids": torch.ones(2, 2, dtype=torch.long),
        "attention_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1], [0, 1]]),
        "ref_chosen_logps": reference[:1],
        "ref_rejected_logps": reference[1:],
    }
    loss = trainer._compute_loss(_Model(policy.unsqueeze(1)), inputs, return_outputs=False)
    logged = settings["_metrics"]["train"]
    return loss, logged["rewards/chosen"][0], logged["rewards/rejected"][0]


@pytest.fixture(scope="module")
def logps():
    generator = torch.Generator().manual_seed(0)
    return -60 * torch.rand(4, 16, generator=generator), -60 * torch.rand(4, 16, generator=generator)


def test_sigmoid_equals_trl(logps):
    policy, reference = logps[0][:2], logps[0][2:]
    policy = policy.clone().requires_grad_()
    result = preference_loss("sigmoid", *policy, *reference, beta=BETA)
    (gradient,) = torch.autograd.grad(result.losses.sum(), policy)
    for i in range(policy.shape[1]):
        theirs = policy.detach()[:, i].clone().requires_grad_()
        loss, chosen, rejected = trl_loss(theirs, reference[:, i], BETA)
        (expected,) = torch.autograd.grad(loss, theirs)
        assert result.losses[i].item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
        assert result.chosen_rewards[i].item() == pytest.approx(chosen, rel=1e-6, abs=1e-6)
        assert result.rejected_rewards[i].item() == pytest.approx(rejected, rel=1e-6, abs=1e-6)
        torch.testing.assert_close(gradient[:, i], expected, rtol=1e-5, atol=1e-7)


def test_beta_per_pair(logps):
    policy, reference = logps[0][:2], logps[0][2:]
    betas = torch.linspace(0.01, 1.0, policy.shape[1])
    together = preference_loss("sigmoid", *policy, *reference, beta=betas)
    for i, beta in enumerate(betas.tolist()):
        alone = preference_loss("sigmoid", *policy[:, i : i + 1], *reference[:, i : i + 1], beta=beta)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[i : i + 1], part)


@given(st.lists(st.sampled_from([-1e4, -1.0, 0.0, -3e4, -1e-6]), min_size=4, max_size=4), st.floats(1e-4, 10.0))
def test_extreme_inputs_stay_finite(values, beta):
    tensors = [torch.tensor([value], requires_grad=True) for value in values]
    result = preference_loss("sigmoid", *tensors, beta=beta)
    result.losses.sum().backward()
    assert all(torch.isfinite(value).all() for value in result)
    assert all(tensor.grad is None or torch.isfinite(tensor.grad).all() for tensor in tensors)
    h = (values[0] - values[2]) - (values[1] - values[3])
    if beta * h < -50:
        assert result.losses.item() == pytest.approx(-beta * h, rel=1e-5)


def test_all_ties_have_log_two():
    same = torch.full((3,), -12.5)
    result = preference_loss("sigmoid", same, same, same, same, beta=0.1)
    torch.testing.assert_close(result.losses, torch.full((3,), 0.6931472))
    assert result.chosen_rewards.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "sigmod", "beta": 0.1}, "'sigmod'"),
        ({"name": "sigmoid", "beta": 0.0}, "beta = 0.0"),
        ({"name": "sigmoid", "beta": float("nan")}, "beta = nan"),
        ({"name": "sigmoid", "beta": torch.ones(3)}, "beta has shape"),
    ],
)
def test_bad_arguments(arguments, words):
    pair = [torch.zeros(2)] * 4
    with pytest.raises(InputError, match=words):
        preference_loss(arguments["name"], *pair, beta=arguments["beta"])


def test_unequal_shapes_are_refused():
    with pytest.raises(InputError, match="1-D tensors"):
        preference_loss("sigmoid", torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(1), beta=0.1)
