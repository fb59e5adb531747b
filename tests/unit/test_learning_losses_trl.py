"""Every loss that TRL has, against TRL's own code on the same log-probs: values, rewards and gradients."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlhf.learning.batch import Batch
from rlhf.learning.losses import preference_loss
from rlhf.learning.losses.weighting import wpo_weights

BETA = 0.3
PAIRS = 6
LENGTHS = torch.tensor([[3, 5], [4, 1], [1, 1], [7, 2], [2, 6], [5, 5]])
LONGEST = 7


class _Accelerator:
    device = "cpu"

    def gather(self, value):
        return value

    gather_for_metrics = gather


class _Model:
    """Hands the trainer given log-probs of each token."""

    training = True

    def __init__(self, logprobs, squares):
        self.logprobs, self.squares = logprobs, squares

    def __call__(self, **_):
        zero = torch.zeros_like(self.logprobs)
        return SimpleNamespace(
            log_probs=self.logprobs,
            log_sum_sq_probs=self.squares,
            entropy=zero,
            mean_logits=zero,
            is_top1=zero.bool(),
        )


def by_side(lengths):
    """[2n] in TRL's order, all chosen then all rejected, from [n, 2]."""
    return lengths.t().reshape(-1)


def trl_dpo(tokens, reference, squares=None, **changes):
    """TRL's loss and mean rewards: `tokens` [2n, longest] all chosen first, `reference` [n, 2] sums."""
    from trl import DPOTrainer

    trainer = DPOTrainer.__new__(DPOTrainer)
    settings = {
        "model": SimpleNamespace(training=True),
        "accelerator": _Accelerator(),
        "args": SimpleNamespace(discopop_tau=0.05),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "beta": BETA,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "use_weighting": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    trainer.__dict__.update(settings | changes)
    mask = torch.cat([torch.zeros(2 * PAIRS, 1), tokens.detach() != 0], 1).long()
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    loss = trainer._compute_loss(_Model(tokens, squares), inputs, return_outputs=False)
    logged = settings["_metrics"]["train"]
    return loss, logged["rewards/chosen"][0], logged["rewards/rejected"][0]


def drawn(seed=0, scale=4.0):
    """Log-probs of tokens [2n, longest] of the policy and the reference, 0 past each response's end."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.arange(LONGEST) < by_side(LENGTHS).unsqueeze(1)
    policy, reference = (-scale * torch.rand(2, 2 * PAIRS, LONGEST, generator=generator) - 1e-3) * inside
    return policy.clone().requires_grad_(), reference


def sums(tokens):
    return tokens.sum(1).view(2, PAIRS).t()


def compare(ours, theirs, inputs):
    """The mean of our losses against their loss, gradients of each token included."""
    (found,) = torch.autograd.grad(ours, inputs, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs, inputs)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
    inside = torch.arange(LONGEST) < by_side(LENGTHS).unsqueeze(1)
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-5, atol=1e-6)
    assert found[inside].abs().max() > 1e-4


def ours(name, tokens, reference, **options):
    lengths = LENGTHS.float()
    return preference_loss(
        name,
        *sums(tokens).unbind(1),
        *reference.unbind(1),
        beta=options.pop("beta", BETA),
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        **options,
    )


CASES = [
    ("sigmoid", {}, {"loss_types": ["sigmoid"]}),
    ("sigmoid", {"length_normalised": True}, {"loss_types": ["sigmoid_norm"]}),
    ("robust", {"label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
    ("ipo", {}, {"loss_types": ["ipo"]}),
    ("hinge", {}, {"loss_types": ["hinge"]}),
    ("exo_pair", {"label_smoothing": 0.05}, {"loss_types": ["exo_pair"], "label_smoothing": 0.05}),
    ("exo_pair", {}, {"loss_types": ["exo_pair"], "label_smoothing": 1e-3}),
    ("nca_pair", {}, {"loss_types": ["nca_pair"]}),
    ("bco_pair", {}, {"loss_types": ["bco_pair"]}),
    ("sppo_hard", {}, {"loss_types": ["sppo_hard"]}),
    ("aot", {}, {"loss_types": ["aot"]}),
    ("aot", {"label_smoothing": 0.1}, {"loss_types": ["aot"], "label_smoothing": 0.1}),
    ("aot_unpaired", {"label_smoothing": 0.1}, {"loss_types": ["aot_unpaired"], "label_smoothing": 0.1}),
    ("apo_zero", {}, {"loss_types": ["apo_zero"]}),
    ("apo_down", {}, {"loss_types": ["apo_down"]}),
    ("discopop", {}, {"loss_types": ["discopop"]}),
    ("sft", {}, {"loss_types": ["sft"]}),
    ("sigmoid", {"rpo_alpha": 0.7}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    (
        "mix",
        {"terms": [("sigmoid", 0.8, {}), ("bco_pair", 0.2, {}), ("sft", 1.0, {})]},
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
]


@pytest.mark.parametrize(("name", "options", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_equals_trl(name, options, settings):
    tokens, reference = drawn()
    result = ours(name, tokens, sums(reference), **options)
    loss, chosen, rejected = trl_dpo(tokens, sums(reference), **settings)
    compare(result.losses.mean(), loss, tokens)
    if name != "sft":  # TRL logs rewards against a reference there, which the loss has none of
        assert result.chosen_rewards.mean().item() == pytest.approx(chosen, rel=1e-5, abs=1e-6)
        assert result.rejected_rewards.mean().item() == pytest.approx(rejected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "ipo", "hinge", "exo_pair", "discopop"])
@pytest.mark.parametrize(
    ("divergence", "alpha", "theirs"),
    [
        ("forward_kl", 0.5, "forward_kl"),
        ("js", 0.5, "js_divergence"),
        ("alpha", 0.3, "alpha_divergence"),
        ("alpha", 1.0, "alpha_divergence"),
        ("alpha", 2.0, "alpha_divergence"),
    ],
)
def test_divergences_equal_trl(name, divergence, alpha, theirs):
    tokens, reference = drawn(scale=0.5)
    smoothing = {"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {}
    result = ours(name, tokens, sums(reference), f_divergence=divergence, f_alpha=alpha, **smoothing)
    settings = {"loss_types": [name], "f_divergence_type": theirs, "f_alpha_divergence_coef": alpha, **smoothing}
    compare(result.losses.mean(), trl_dpo(tokens, sums(reference), **settings)[0], tokens)


def batch_of(lengths):
    """The parts of a batch that sums are taken by; sequences are chosen and rejected in turn."""
    flat = lengths.reshape(-1)
    nothing = torch.zeros(1, 1, dtype=torch.long)
    return Batch(
        nothing,
        None,
        None,
        predict=torch.zeros(int(flat.sum()), dtype=torch.long),
        targets=torch.zeros(int(flat.sum()), dtype=torch.long),
        sequence=torch.repeat_interleave(torch.arange(len(flat)), flat),
        offset=torch.cat([torch.arange(n) for n in flat.tolist()]),
        sequences=len(flat),
        longest=LONGEST,
    )


def in_turn(tokens):
    """The tokens of a batch [T], sequences chosen and rejected in turn, from TRL's [2n, longest]."""
    rows = tokens.view(2, PAIRS, LONGEST).transpose(0, 1).reshape(2 * PAIRS, LONGEST)
    return torch.cat([row[:n] for row, n in zip(rows, LENGTHS.reshape(-1).tolist(), strict=True)])


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_length_desensitising_equals_trl(ld_alpha):
    tokens, reference = drawn()
    batch = batch_of(LENGTHS)
    assert torch.equal(batch.lengths, LENGTHS.reshape(-1))
    policy, fixed = batch.sums(in_turn(tokens), ld_alpha), batch.sums(in_turn(reference), ld_alpha)
    result = preference_loss("sigmoid", *policy.unbind(1), *fixed.unbind(1), beta=BETA)
    compare(result.losses.mean(), trl_dpo(tokens, fixed, ld_alpha=ld_alpha)[0], tokens)
    assert ld_alpha != 1 or torch.equal(policy, batch.sums(in_turn(tokens)))


@pytest.mark.parametrize("name", ["sigmoid", "nca_pair", "ipo"])
def test_wpo_weights_equal_trl(name):
    tokens, reference = drawn()
    inside = torch.arange(LONGEST) < by_side(LENGTHS).unsqueeze(1)
    squares = -2 * torch.rand(2 * PAIRS, LONGEST, generator=torch.Generator().manual_seed(1)) * inside
    weights = wpo_weights(batch_of(LENGTHS).sums(in_turn(tokens.detach() - squares)), LENGTHS)
    result = ours(name, tokens, sums(reference), weights=weights)
    loss, *_ = trl_dpo(tokens, sums(reference), squares, loss_types=[name], use_weighting=True)
    compare(result.losses.mean(), loss, tokens)


@pytest.mark.parametrize(
    ("name", "beta", "options"),
    [
        ("cpo", 0.3, {}),
        ("cpo", 0.3, {"label_smoothing": 0.15}),
        ("simpo", 2.5, {"gamma": 1.1}),
        ("simpo", 2.0, {"label_smoothing": 0.1}),
    ],
)
def test_reference_free_losses_equal_trl_cpo(name, beta, options):
    from trl.experimental.cpo import CPOTrainer

    tokens, _ = drawn()
    trainer = CPOTrainer.__new__(CPOTrainer)
    settings = {
        "accelerator": _Accelerator(),
        "alpha": 0.0,
        "beta": beta,
        "loss_type": "simpo" if name == "simpo" else "sigmoid",
        "simpo_gamma": options.get("gamma", 0.5),
        "label_smoothing": options.get("label_smoothing", 0.0),
    }
    trainer.__dict__.update(settings)
    theirs = sums(tokens) / LENGTHS if name == "simpo" else sums(tokens)
    losses, chosen, rejected = trainer.cpo_loss(*theirs.unbind(1))
    result = ours(name, tokens, torch.full((PAIRS, 2), 9.0), beta=beta, rpo_alpha=0.0, **options)
    compare(result.losses.mean(), losses.mean(), tokens)
    torch.testing.assert_close(result.losses, losses)
    torch.testing.assert_close(result.chosen_rewards, chosen)
    torch.testing.assert_close(result.rejected_rewards, rejected)


def test_orpo_equals_trl():
    from trl.experimental.orpo import ORPOTrainer

    tokens, _ = drawn()
    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.__dict__.update({"accelerator": _Accelerator(), "beta": BETA})
    ratios, chosen, rejected, *_ = trainer.odds_ratio_loss(*(sums(tokens) / LENGTHS).unbind(1))
    result = ours("orpo", tokens, torch.full((PAIRS, 2), 9.0))
    nll = -sums(tokens)[:, 0].sum() / LENGTHS[:, 0].sum()
    compare(result.losses.mean(), nll - ratios.mean(), tokens)
    torch.testing.assert_close(result.chosen_rewards, chosen)
    torch.testing.assert_close(result.rejected_rewards, rejected)


def test_cpo_adds_the_likelihood_of_all_tokens():
    tokens, _ = drawn()
    with_nll = ours("cpo", tokens, torch.zeros(PAIRS, 2)).losses.mean()
    without = ours("cpo", tokens, torch.zeros(PAIRS, 2), rpo_alpha=0.0).losses.mean()
    chosen = tokens[:PAIRS]
    expected = -chosen[chosen != 0].mean()
    assert (with_nll - without).item() == pytest.approx(expected.item(), rel=1e-5)
