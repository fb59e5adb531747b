"""SELM's and XPO's optimism: closed forms, gradients, which responses count, and what it is refused with."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import OfflineConfig
from rlhf.config.learner import Learner, Loss
from rlhf.config.load import validate
from rlhf.errors import InputError
from rlhf.learning.losses import StepLoss, preference_loss
from rlhf.records import Pair

BETA, ALPHA = 0.3, 0.02
POLICY, REFERENCE = (-10.3, -12.4), (-11.0, -12.0)
DPO = math.log1p(math.exp(-BETA * (0.7 + 0.4)))
CLOSED = {
    "selm": {"chosen": BETA * 0.7, "rejected": BETA * -0.4},
    "xpo": {"chosen": -10.3, "rejected": -12.4},
}


def loss(name, tensors, explored=None, **options):
    return preference_loss(
        "sigmoid", *tensors, beta=BETA, exploration=name, exploration_alpha=ALPHA, explored=explored, **options
    )


def drawn(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (-30 * torch.rand(4, count, generator=generator, dtype=dtype)).requires_grad_()


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("sides", [(), ("chosen",), ("rejected",), ("chosen", "rejected")])
def test_closed_forms(name, sides):
    tensors = [torch.tensor([value], dtype=torch.float64) for value in (*POLICY, *REFERENCE)]
    explored = torch.tensor([["chosen" in sides, "rejected" in sides]])
    expected = DPO + ALPHA * sum(CLOSED[name][side] for side in sides) / max(1, len(sides))
    found = loss(name, tensors, explored)
    assert found.losses.item() == pytest.approx(expected, rel=1e-9)
    plain = preference_loss("sigmoid", *tensors, beta=BETA)
    assert (found.chosen_rewards, found.rejected_rewards) == (plain.chosen_rewards, plain.rejected_rewards)
    if len(sides) == 2:
        assert torch.equal(loss(name, tensors).losses, found.losses)


def test_xpo_is_algorithm_1_on_the_logits_of_a_model():
    """sum_i alpha log pi(y_i) - log sigmoid(...), y_i the responses of pi_ref, gradients down to the logits."""
    generator = torch.Generator().manual_seed(0)
    logits, fixed = (torch.randn(2, 5, 7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(11, (2, 5, 7), generator=generator)
    logits.requires_grad_()

    def sums(values):  # [2, 5]: chosen and rejected of five pairs
        return values.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1).sum(-1)

    written = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0], [1, 1]]).bool()
    policy, reference = sums(logits), sums(fixed)
    ratios = BETA * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    expected = -F.logsigmoid(ratios).sum()
    for pair in range(5):
        own = [policy[side, pair] for side in (0, 1) if written[pair, side]]
        expected = expected + ALPHA * (sum(own) / len(own) if own else 0.0)
    found = loss("xpo", (*policy, *reference), written).losses.sum()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("beta", [BETA, "each"])
def test_gradients_by_finite_differences(name, beta):
    written = torch.tensor([[True, True], [True, False], [False, False]])
    betas = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64) if beta == "each" else beta

    def total(tensors):
        return preference_loss(
            "sigmoid", *tensors, beta=betas, exploration=name, exploration_alpha=0.7, explored=written
        ).losses.sum()

    assert torch.autograd.gradcheck(total, (drawn(3),))


def test_both_terms_pull_alike_up_to_beta():
    """log pi and beta log (pi / pi_ref) differ by beta and a constant."""
    tensors = drawn(4)
    plain, selm, xpo = (
        torch.autograd.grad(value.losses.sum(), tensors)[0][:2]
        for value in (preference_loss("sigmoid", *tensors, beta=BETA), loss("selm", tensors), loss("xpo", tensors))
    )
    torch.testing.assert_close(selm - plain, BETA * (xpo - plain))
    assert torch.all(xpo - plain > 0)  # descent lowers the likelihood of what the reference wrote


def test_extreme_log_probs_stay_finite():
    tensors = torch.tensor([[-1e4, 0.0], [-1e4, -1e4], [0.0, -1e4], [0.0, -1e4]], requires_grad=True)
    for name in CLOSED:
        losses = loss(name, tensors).losses
        assert torch.isfinite(losses).all()
        assert torch.isfinite(torch.autograd.grad(losses.sum(), tensors)[0]).all()


def make_pair(number, versions):
    return Pair(str(number), 4, (5,), (1, 2), (2,), "", "", "", 1.0, *versions)


@given(
    versions=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6),
    current=st.integers(0, 4),
    cut=st.integers(0, 6),
)
def test_only_responses_of_the_reference_s_version_count(versions, current, cut):
    config = Loss.model_validate({"exploration": {"type": "xpo", "alpha": ALPHA}, "beta": BETA})
    pairs = [make_pair(number, both) for number, both in enumerate(versions)]
    values = drawn(len(pairs), torch.float32).detach()
    policy, reference = values[:2].t(), values[2:].t()
    whole = StepLoss.of(config, pairs, "cpu", reference_version=current)
    rows = list(range(len(pairs)))
    found = torch.cat([whole(policy[part], reference[part], part, BETA).losses for part in (rows[:cut], rows[cut:])])
    plain = preference_loss("sigmoid", *values, beta=BETA).losses
    for row, both in enumerate(versions):
        own = [policy[row, side].item() for side in (0, 1) if both[side] == current]
        term = ALPHA * sum(own) / len(own) if own else 0.0
        assert found[row].item() == pytest.approx(plain[row].item() + term, rel=1e-5, abs=1e-6)
    nobody = StepLoss.of(config, pairs, "cpu")
    torch.testing.assert_close(nobody(policy, reference, rows, BETA).losses, plain)


EXPLORING = {"exploration": {"type": "selm", "alpha": 1e-3}}
ROUND_START = {"reference": {"policy": "round_start"}}
RUN = {"name": "x", "policy": {"path": "p"}, "prompts": {"path": "q"}}


def test_what_is_accepted():
    found = validate(RUN | {"learner": ROUND_START | {"loss": EXPLORING | {"label_smoothing": 0.1}}}, "c.yaml")
    assert (found.learner.loss.exploration.type, found.learner.loss.exploration.alpha) == ("selm", 1e-3)
    assert Learner().loss.exploration is None


@pytest.mark.parametrize(
    ("learner", "words"),
    [
        ({"loss": EXPLORING}, "exploration with learner.reference.policy initial"),
        ({"loss": EXPLORING, "reference": {"policy": "ema"}}, "exploration with learner.reference.policy ema"),
        (ROUND_START | {"loss": EXPLORING | {"type": "ipo"}}, "exploration.type = selm with learner.loss.type ipo"),
        (
            ROUND_START | {"loss": EXPLORING | {"type": "mix", "terms": [{"type": "sigmoid"}]}},
            "exploration.type = selm with learner.loss.type mix",
        ),
        (ROUND_START | {"loss": EXPLORING | {"f_divergence": "js"}}, "selm with learner.loss.f_divergence"),
        (ROUND_START | {"loss": EXPLORING | {"length_normalised": True}}, "selm with learner.loss.length_normalised"),
        (ROUND_START | {"loss": EXPLORING | {"ld_alpha": 0.5}}, "selm with learner.loss.ld_alpha"),
        (ROUND_START | {"loss": EXPLORING | {"use_weighting": True}}, "selm with learner.loss.use_weighting"),
        (ROUND_START | {"loss": {"exploration": {"type": "selm"}}}, "exploration.alpha: required key is missing"),
        (ROUND_START | {"loss": {"exploration": {"type": "xpo", "alpha": 0}}}, "exploration.alpha = 0: expected"),
        (ROUND_START | {"loss": {"exploration": {"type": "dpo", "alpha": 1}}}, "exploration.type = 'dpo': expected"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(learner, words):
    with pytest.raises(InputError) as refused:
        validate(RUN | {"learner": learner}, "c.yaml")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_lookahead_and_preference_sets_are_refused():
    learner = {"learner": ROUND_START | {"loss": EXPLORING}}
    with pytest.raises(InputError, match=r"learner\.loss\.exploration with rounds\.lookahead 1"):
        validate(RUN | learner | {"rounds": {"lookahead": 1}}, "c.yaml")
    offline = {"name": "x", "policy": {"path": "p"}, "preferences": {"path": "q"}}
    with pytest.raises(InputError, match="the reference wrote no response of a preference set"):
        validate(offline | learner, "c.yaml", OfflineConfig)


def test_the_function_refuses_it_too():
    tensors = drawn(2)
    for name, options in (("ipo", {"length_normalised": False}), ("sigmoid", {"weights": torch.ones(2)})):
        with pytest.raises(InputError, match="goes with plain sigmoid only"):
            preference_loss(name, *tensors, beta=BETA, exploration="xpo", exploration_alpha=1.0, **options)
    with pytest.raises(InputError, match="exploration = 'ucb': expected selm or xpo"):
        loss("ucb", tensors)
