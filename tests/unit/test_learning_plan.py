"""Planning of steps and micro-batches, learning rate, beta and FLOPs: closed forms and properties."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.learner import Loss, Optimizer
from rlhf.errors import InputError
from rlhf.learning.beta import build_beta
from rlhf.learning.plan import drop_long, plan_micro_batches, plan_packed, step_batches
from rlhf.learning.rng import restore_rng, rng_state, seed_all
from rlhf.learning.schedule import fraction_done, learning_rate
from rlhf.records import Pair, SealedRound
from rlhf.rounds.segments import Segments

lengths = st.lists(st.integers(1, 500), min_size=1, max_size=40)


def pair(prompt, chosen, rejected):
    return Pair("u", 1, (5,) * prompt, (6,) * chosen, (7,) * rejected, "", "", "", 1.0, 0, 0)


@given(lengths, st.integers(1, 5), st.integers(1, 6))
def test_every_pair_once_and_ranks_in_step(tokens, world_size, micro):
    plans = [plan_micro_batches(tokens, world_size, rank, micro) for rank in range(world_size)]
    assert sorted(i for plan in plans for batch in plan for i in batch) == list(range(len(tokens)))
    assert len({len(plan) for plan in plans}) == 1
    assert all(len(batch) <= micro for plan in plans for batch in plan)
    # The fewest forwards that the busiest rank can do with.
    assert len(plans[0]) == math.ceil(math.ceil(len(tokens) / world_size) / micro)
    for plan in plans:
        order = [tokens[i] for batch in plan for i in batch]
        assert order == sorted(order, reverse=True)


@given(lengths, st.integers(2, 5))
def test_ranks_are_balanced(tokens, world_size):
    shares = [[i for batch in plan_micro_batches(tokens, world_size, r, 4) for i in batch] for r in range(world_size)]
    loads = [sum(tokens[i] for i in share) for share in shares]
    # Greedy with room: no rank is ahead by more than what two of the longest pairs make.
    assert max(loads) - min(loads) <= 2 * max(tokens)
    assert max(len(share) for share in shares) <= math.ceil(len(tokens) / world_size)


@given(lengths, st.integers(1, 5), st.integers(1, 900))
def test_packed_every_pair_once_within_the_budget(tokens, world_size, budget):
    plans = [plan_packed(tokens, world_size, rank, budget) for rank in range(world_size)]
    assert sorted(i for plan in plans for batch in plan for i in batch) == list(range(len(tokens)))
    assert len({len(plan) for plan in plans}) == 1
    for plan in plans:
        filled = [batch for batch in plan if batch]
        assert all(len(batch) == 1 or sum(tokens[i] for i in batch) <= budget for batch in filled)
        # First fit: no two rows of a rank could be one, so at most one of them is half empty.
        assert sum(2 * sum(tokens[i] for i in batch) <= budget for batch in filled) <= 1
    loads = [sum(tokens[i] for batch in plan for i in batch) for plan in plans]
    assert max(loads) - min(loads) <= max(tokens)


def test_packed_nothing():
    assert plan_packed([], 2, 0, 10) == []


def test_balance_beats_dealing_in_order():
    tokens = [100, 10, 100, 10, 100, 10, 100, 10]
    loads = [sum(tokens[i] for batch in plan_micro_batches(tokens, 2, r, 2) for i in batch) for r in (0, 1)]
    assert loads == [220, 220]


def test_no_pairs_no_micro_batches():
    assert plan_micro_batches([], 2, 1, 4) == []


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 3), st.integers(1, 9))
def test_steps_cover_each_epoch(count, batch_size, epochs, round):
    steps = list(step_batches(count, batch_size, epochs, 3, round))
    assert steps == list(step_batches(count, batch_size, epochs, 3, round))
    flat = [i for step in steps for i in step]
    for epoch in range(epochs):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert all(0 < len(step) <= batch_size for step in steps)


def test_order_depends_on_seed_round_and_epoch():
    orders = {(s, r): next(iter(step_batches(50, 50, 1, s, r))) for s in (0, 1) for r in (1, 2)}
    two_epochs = list(step_batches(50, 50, 2, 0, 1))
    assert len({tuple(order) for order in [*orders.values(), two_epochs[1]]}) == 5


def test_long_pairs_are_dropped_and_counted():
    fits, long_chosen, long_rejected = pair(6, 4, 2), pair(6, 5, 1), pair(6, 1, 5)
    assert drop_long([fits, long_chosen, long_rejected], 10) == ([fits], 2)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_pairs_without_tokens_are_refused(sizes):
    with pytest.raises(InputError, match="round 1, pair u"):
        drop_long([pair(*sizes)], 10)


def test_schedules_closed_form():
    peak = 2e-4
    for x in np.linspace(0, 1, 11):
        assert learning_rate(Optimizer(lr=peak), x) == peak
        assert learning_rate(Optimizer(lr=peak, schedule="linear"), x) == pytest.approx(peak * (1 - x))
        cosine = learning_rate(Optimizer(lr=peak, schedule="cosine"), x)
        assert cosine == pytest.approx(peak * math.cos(math.pi * x / 2) ** 2)
    warm = Optimizer(lr=peak, schedule="linear", warmup_ratio=0.2)
    assert learning_rate(warm, 0.05) == pytest.approx(peak / 4)
    assert learning_rate(warm, 0.2) == pytest.approx(peak)
    assert learning_rate(warm, 0.6) == pytest.approx(peak / 2)
    assert learning_rate(warm, 1.0) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("betas", [[1.0, 0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 2.0]])
def test_betas_that_no_average_has_are_refused(betas):
    with pytest.raises(ValueError, match=r"learner\.optimizer\.betas = \[.*\]: both have to be at least 0 and below 1"):
        Optimizer(betas=betas)
    assert Optimizer(betas=[0.0, 0.999]).betas == (0.0, 0.999)


def test_fraction_is_the_middle_of_the_step():
    def done(round: int, step: int, steps: int, rounds: int) -> float:
        return fraction_done(SealedRound(round, (), ""), step, steps, rounds)

    assert done(1, 0, 2, 8) == pytest.approx(1 / 32)
    assert done(8, 1, 2, 8) == pytest.approx(31 / 32)
    fractions = [done(r, s, r + 1, 4) for r in range(1, 5) for s in range(r + 1)]
    assert fractions == sorted(fractions)


@given(steps=st.integers(1, 60), checkpoint=st.integers(1, 40), per_step=st.integers(1, 4), epochs=st.integers(1, 2))
def test_every_step_of_a_cut_training_is_an_equal_part_of_it(steps, checkpoint, per_step, epochs):
    segments = Segments(steps * per_step, epochs, checkpoint * per_step, 0)
    found = []
    for round in range(1, segments.count + 1):
        sealed = SealedRound(round, (), "", span=segments.span(round))
        count = len(segments.places(round)) // per_step
        found += [fraction_done(sealed, step, count, segments.count) for step in range(count)]
    assert found == pytest.approx([(step + 0.5) / (steps * epochs) for step in range(steps * epochs)])


def test_a_short_last_segment_decays_by_its_steps():
    segments = Segments(110, epochs=1, per_segment=100, seed=0)
    last_of_first = SealedRound(1, (), "", span=segments.span(1))
    rate = learning_rate(Optimizer(lr=1.0, schedule="linear"), fraction_done(last_of_first, 99, 100, segments.count))
    assert rate == pytest.approx(10.5 / 110)


def test_fixed_beta_stays():
    beta = build_beta(Loss(beta=0.25))
    beta.observe({"h_sum": 100.0, "abs_logratio_sum": 10.0, "count": 4.0})
    beta.load_state_dict(beta.state_dict())
    assert beta.beta() == 0.25


def test_random_state_returns(tmp_path):
    seed_all(5)
    # The state goes through a file that holds plain values only.
    torch.save(rng_state(), tmp_path / "rng.pt")
    first = (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn())
    restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert first == (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn())
