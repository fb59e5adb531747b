"""The losses by their closed forms and properties; TRL's code is the yardstick in test_learning_losses_trl."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.loss import LOSS_FACTS, LossOptions
from rlhf.errors import InputError
from rlhf.learning.losses import LOSSES, REFERENCE_FREE, preference_loss
from rlhf.learning.losses.divergence import score_function

BETA = 0.3
WITH_REFERENCE = sorted(set(LOSSES) - REFERENCE_FREE)
LENGTHS = {"chosen_lengths": torch.tensor([20.0]), "rejected_lengths": torch.tensor([30.0])}
NEEDED = {"robust": {"label_smoothing": 0.1}}
"""Options that a loss would be another one without."""


def loss(name, *tensors, **options):
    return preference_loss(name, *tensors, **{"beta": BETA, **NEEDED.get(name, {}), **options})


def s(x):
    return 1 / (1 + math.exp(-x))


# Pairs with log-ratios 0.7 and -0.4: rewards u, v; closed forms in plain floats.
POLICY, REFERENCE = (-10.3, -12.4), (-11.0, -12.0)
U, V = 0.7 * BETA, -0.4 * BETA
L = U - V
CLOSED = {
    "sigmoid": -math.log(s(L)),
    "robust": (-0.9 * math.log(s(L)) + 0.1 * math.log(s(-L))) / 0.8,
    "ipo": (0.7 / 20 + 0.4 / 30 - 1 / (2 * BETA)) ** 2,
    "hinge": 1 - L,
    "exo_pair": s(L) * math.log(s(L) / 0.999) + s(-L) * math.log(s(-L) / 0.001),
    "nca_pair": -math.log(s(U)) - 0.5 * math.log(s(-U)) - 0.5 * math.log(s(-V)),
    "bco_pair": -math.log(s(U)) - math.log(s(-V)),
    "sppo_hard": (0.7 - 0.5 / BETA) ** 2 + (-0.4 + 0.5 / BETA) ** 2,
    "aot": -math.log(s(L)),
    "aot_unpaired": -math.log(s(L)),
    "apo_zero": 1 - s(U) + s(V),
    "apo_down": s(U) + 1 - s(L),
    "discopop": -math.log(s(L)) * (1 - s(L / 0.05)) + math.exp(-L) * s(L / 0.05),
    "simpo": -math.log(s(BETA * (-10.3 / 20 + 12.4 / 30) - 0.5)),
    "cpo": -math.log(s(BETA * 2.1)) + 10.3 / 20,
    "sft": 10.3 / 20,
    "choice": -math.log(s(BETA * 2.1)),
    "orpo": 10.3 / 20
    - BETA
    * math.log(
        s(
            math.log(math.exp(-10.3 / 20) / (1 - math.exp(-10.3 / 20)))
            - math.log(math.exp(-12.4 / 30) / (1 - math.exp(-12.4 / 30)))
        )
    ),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_closed_forms(name):
    tensors = [torch.tensor([value]) for value in (*POLICY, *REFERENCE)]
    assert loss(name, *tensors, **LENGTHS).losses.item() == pytest.approx(CLOSED[name], rel=2e-6)


def test_options_have_their_closed_forms():
    tensors = [torch.tensor([value]) for value in (*POLICY, *REFERENCE)]

    def value(name, **options):
        return loss(name, *tensors, **LENGTHS, **options).losses.item()

    smooth = -0.8 * math.log(s(L)) - 0.2 * math.log(s(-L))
    assert value("sigmoid", label_smoothing=0.2) == pytest.approx(smooth, rel=1e-6)
    assert value("ipo", length_normalised=False) == pytest.approx((1.1 - 1 / (2 * BETA)) ** 2, rel=2e-6)
    shifted = -math.log(s(U - 0.3)) - math.log(s(0.3 - V))
    assert value("bco_pair", reward_shift=0.3) == pytest.approx(shifted, rel=1e-6)
    assert value("sigmoid", rpo_alpha=2.0) == pytest.approx(CLOSED["sigmoid"] + 2 * 10.3 / 20, rel=1e-6)
    assert value("sft", mean_chosen_length=5.0) == pytest.approx(10.3 / 5, rel=1e-6)
    assert loss("sft", *tensors).losses.item() == pytest.approx(10.3)


def test_the_table_of_facts_is_the_code():
    assert set(LOSSES) == set(LOSS_FACTS)
    assert {"simpo", "orpo", "cpo", "sft", "choice"} == REFERENCE_FREE
    for name, function in LOSSES.items():
        assert set(inspect.signature(function).parameters) - {"inputs", "matched"} == LOSS_FACTS[name].options, name
    assert set().union(*(facts.options for facts in LOSS_FACTS.values())) | {"rpo_alpha"} == set(
        LossOptions.model_fields
    )


@pytest.fixture(scope="module")
def logps():
    generator = torch.Generator().manual_seed(0)
    return -60 * torch.rand(4, 16, generator=generator)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_beta_per_pair_equals_beta_scalar(logps, name):
    lengths = {"chosen_lengths": torch.full((16,), 11.0), "rejected_lengths": torch.full((16,), 23.0)}
    scalar, each = (
        (inputs := logps.clone().requires_grad_(), loss(name, *inputs, beta=beta, **lengths))
        for beta in (BETA, torch.full((16,), BETA))
    )
    for one, other in zip(scalar[1], each[1], strict=True):
        torch.testing.assert_close(one, other)
    gradients = [torch.autograd.grad(result.losses.sum(), inputs)[0] for inputs, result in (scalar, each)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"aot", "aot_unpaired"}))
def test_each_pair_has_its_own_beta_and_no_other_pair_in_its_loss(logps, name):
    betas = torch.linspace(0.05, 1.0, 16)
    lengths = {"chosen_lengths": torch.arange(1.0, 17), "rejected_lengths": torch.arange(17.0, 1, -1)}
    together = loss(name, *logps, beta=betas, mean_chosen_length=8.5, **lengths)
    for i, beta in enumerate(betas.tolist()):
        own = {key: value[i : i + 1] for key, value in lengths.items()}
        alone = loss(name, *logps[:, i : i + 1], beta=beta, mean_chosen_length=8.5, **own)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[i : i + 1], part)


EXTREMES = st.lists(st.sampled_from([-1e4, -1.0, 0.0, -3e4, -1e-6]), min_size=4, max_size=4)


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    values=EXTREMES,
    beta=st.floats(1e-4, 10.0),
    lengths=st.tuples(st.sampled_from([1.0, 4096.0]), st.sampled_from([1.0, 4096.0])),
)
def test_extreme_inputs_stay_finite(name, values, beta, lengths):
    tensors = [torch.tensor([value], requires_grad=True) for value in values]
    chosen, rejected = (torch.tensor([length]) for length in lengths)
    result = loss(name, *tensors, beta=beta, chosen_lengths=chosen, rejected_lengths=rejected)
    result.losses.sum().backward()
    assert all(torch.isfinite(value).all() for value in result)
    assert all(tensor.grad is None or torch.isfinite(tensor.grad).all() for tensor in tensors)
    h = (values[0] - values[2]) - (values[1] - values[3])
    if name == "sigmoid" and beta * h < -50:
        assert result.losses.item() == pytest.approx(-beta * h, rel=1e-5)


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(name for name, facts in LOSS_FACTS.items() if facts.divergence)),
    divergence=st.sampled_from(["forward_kl", "js", "alpha"]),
    values=EXTREMES,
    alpha=st.sampled_from([-1.0, 0.3, 0.999, 3.0]),
)
def test_divergences_stay_finite(name, divergence, values, alpha):
    tensors = [torch.tensor([value], requires_grad=True) for value in values]
    result = loss(name, *tensors, **LENGTHS, f_divergence=divergence, f_alpha=alpha)
    result.losses.sum().backward()
    assert torch.isfinite(result.losses).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors[:2])


TURNING = {"ipo", "sppo_hard", "nca_pair", "exo_pair", "apo_down", "discopop"}
"""Losses with a target that they also fall back to, apo_down by design, and discopop, which has a dent at h = 0."""


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(set(LOSSES) - TURNING)),
    values=st.lists(st.floats(-50, -0.01), min_size=4, max_size=4),
)
def test_no_loss_pushes_chosen_down_or_rejected_up(name, values):
    tensors = [torch.tensor([value], requires_grad=True) for value in values]
    loss(name, *tensors, **LENGTHS).losses.sum().backward()
    assert tensors[0].grad.item() <= 1e-7
    assert tensors[1].grad.item() >= -1e-7


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"apo_down", "discopop"}))
def test_at_the_start_every_loss_prefers_chosen(name):
    """Policy and reference alike, responses alike in length: chosen goes up, rejected down or nowhere."""
    tensors = [torch.tensor([-20.0], requires_grad=True) for _ in range(4)]
    lengths = {"chosen_lengths": torch.tensor([10.0]), "rejected_lengths": torch.tensor([10.0])}
    loss(name, *tensors, **lengths).losses.sum().backward()
    assert tensors[0].grad.item() < 0
    assert tensors[1].grad.item() > 0 or name == "sft"


def test_apo_down_lowers_both_and_rejected_more():
    tensors = [torch.tensor([value], requires_grad=True) for value in (-18.0, -20.0, -20.0, -20.0)]
    loss("apo_down", *tensors).losses.sum().backward()
    start = [torch.tensor([-20.0], requires_grad=True) for _ in range(4)]
    loss("apo_down", *start).losses.sum().backward()
    assert start[0].grad.item() == pytest.approx(0.0, abs=1e-7)  # sigma' and -sigma' meet at 0
    assert start[1].grad.item() > 0
    assert tensors[0].grad.item() + tensors[1].grad.item() > 0


@settings(deadline=None)
@given(u=st.floats(-20, 20), name=st.sampled_from(["forward_kl", "js", "alpha"]), alpha=st.floats(-1, 3))
def test_scores_of_divergences(u, name, alpha):
    """f' of f(t) = -log t, t log t - (t + 1) log((t + 1) / 2), and the alpha family, at t = e^u; in fp64."""
    t, ratio = math.exp(u), torch.tensor([u], dtype=torch.float64)
    score = score_function(name, alpha)(ratio).item()
    if name == "forward_kl":
        expected = 1 - 1 / t
    elif name == "js":
        expected = math.log(2 * t / (t + 1))
    else:
        expected = (t ** (alpha - 1) - 1) / (alpha - 1) if abs(alpha - 1) > 1e-3 else score
    if (alpha - 1) * u < 40 and u > -40:
        assert score == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_divergence_of_order_one_is_reverse_kl_in_the_limit():
    ratio = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(score_function("alpha", 1 + 1e-5)(ratio), ratio, rtol=1e-4, atol=1e-4)
    assert torch.equal(score_function("alpha", 1.0)(ratio), ratio)


def test_all_ties_have_log_two():
    same = torch.full((3,), -12.5)
    result = preference_loss("sigmoid", same, same, same, same, beta=0.1)
    torch.testing.assert_close(result.losses, torch.full((3,), 0.6931472))
    assert result.chosen_rewards.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_weights_multiply_the_losses(logps, name):
    weights = torch.linspace(0.1, 2.0, 16)
    options = {"chosen_lengths": torch.full((16,), 9.0), "rejected_lengths": torch.full((16,), 9.0)}
    plain = loss(name, *logps, **options)
    torch.testing.assert_close(loss(name, *logps, weights=weights, **options).losses, plain.losses * weights)


def test_a_mix_is_the_weighted_sum(logps):
    terms = [("sigmoid", 0.8, {"label_smoothing": 0.1}), ("ipo", 0.5, {"length_normalised": False}), ("sft", 1.5, {})]
    mixed = preference_loss("mix", *logps, beta=BETA, terms=terms)
    parts = sum(weight * preference_loss(name, *logps, beta=BETA, **own).losses for name, weight, own in terms)
    torch.testing.assert_close(mixed.losses, parts)
    torch.testing.assert_close(mixed.chosen_rewards, BETA * (logps[0] - logps[2]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "sigmod", "beta": 0.1}, "'sigmod'"),
        ({"name": "sigmoid", "beta": 0.0}, "beta = 0.0"),
        ({"name": "sigmoid", "beta": float("nan")}, "beta = nan"),
        ({"name": "sigmoid", "beta": torch.ones(3)}, "beta has shape"),
        ({"name": "hinge", "label_smoothing": 0.1}, "unknown option 'label_smoothing'; it takes rpo_alpha"),
        ({"name": "sft", "rpo_alpha": 1.0}, "unknown option 'rpo_alpha'; it takes none"),
        ({"name": "simpo"}, "chosen_lengths and rejected_lengths are missing"),
        ({"name": "simpo", "f_divergence": "js"}, "f_divergence = 'js' does not apply"),
        ({"name": "sigmoid", "f_divergence": "kl"}, "expected one of reverse_kl"),
        ({"name": "mix"}, "mix: expected terms"),
        ({"name": "mix", "terms": [("nope", 1.0, {})]}, "'nope'"),
        ({"name": "robust", "label_smoothing": 0.5}, "label_smoothing = 0.5: expected less than 0.5"),
        ({"name": "sigmoid", "label_smoothing": 2.0}, "label_smoothing = 2.0: expected less than 0.5"),
        ({"name": "mix", "terms": [("cpo", 1.0, {"label_smoothing": -1.0})]}, "cpo: label_smoothing = -1.0"),
        ({"name": "exo_pair", "label_smoothing": 0}, "exo_pair: label_smoothing = 0: its log"),
        ({"name": "discopop", "tau": 5.0}, "discopop: tau = 5.0: expected less than or equal to 1"),
        ({"name": "simpo", "gamma": float("nan")}, "simpo: gamma = "),
        ({"name": "sigmoid", "beta": torch.tensor([0.1, 0.0])}, "beta = 0: expected positive"),
        ({"name": "sigmoid", "beta": torch.tensor([-0.1, 1.0])}, "beta = -0.1: expected positive"),
        ({"name": "sigmoid", "beta": torch.tensor(float("nan"))}, "beta = nan: expected positive"),
        ({"name": "sigmoid", "beta": [0.1, 0.1]}, "beta = .0.1, 0.1.: expected a positive number"),
        ({"name": "sft", "chosen_lengths": torch.ones(2, 1)}, r"chosen_lengths has shape \(2, 1\), expected \(2,\)"),
        ({"name": "sft", "chosen_lengths": torch.tensor([3, 0])}, "chosen_lengths = 0: expected 1 or more"),
        ({"name": "sft", "rejected_lengths": torch.tensor([3.0, float("nan")])}, "rejected_lengths = nan"),
        ({"name": "sft", "mean_chosen_length": 0.0}, "mean_chosen_length = 0.0: expected a positive number"),
        ({"name": "sigmoid", "weights": torch.ones(2, 1)}, r"weights has shape \(2, 1\)"),
        ({"name": "sigmoid", "weights": torch.tensor([1.0, -1.0])}, "weights = -1: expected 0 or more"),
    ],
)
def test_bad_arguments(arguments, words):
    pair = [torch.zeros(2)] * 4
    with pytest.raises(InputError, match=words):
        preference_loss(arguments.pop("name"), *pair, **{"beta": 0.1, **arguments})


def test_unequal_shapes_are_refused():
    with pytest.raises(InputError, match="1-D tensors"):
        preference_loss("sigmoid", torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(1), beta=0.1)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_lengths_may_be_integers(logps, name):
    lengths = {"chosen_lengths": torch.arange(1, 17), "rejected_lengths": torch.arange(17, 1, -1)}
    whole = {key: value.float() for key, value in lengths.items()}
    assert torch.equal(loss(name, *logps, **lengths).losses, loss(name, *logps, **whole).losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_halves_are_taken_as_float32(name, dtype):
    tensors = [torch.tensor([value], dtype=dtype).requires_grad_() for value in (-3e4, -2e4, -1e4, -1e4)]
    result = loss(name, *tensors, **LENGTHS, beta=torch.tensor([4.0], dtype=dtype))
    single = loss(name, *(tensor.detach().float() for tensor in tensors), **LENGTHS, beta=4.0)
    assert all(torch.equal(ours, other) for ours, other in zip(result, single, strict=True))
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in result)
    result.losses.sum().backward()
    assert tensors[0].grad is not None


@pytest.mark.parametrize("tau", [1.0, 0.05, 1e-3])
def test_discopop_is_finite_up_to_its_bound(tau):
    for ratio in (-1e4, -1.0, 0.0, 1.0, 1e4):
        policy = torch.tensor([ratio], requires_grad=True)
        found = loss("discopop", policy, *(torch.zeros(1),) * 3, beta=1.0, tau=tau).losses
        found.backward()
        assert torch.isfinite(found).all()
        assert torch.isfinite(policy.grad).all()
