"""Groups of rows: kept whole over ranks and micro-batches, and averaged before the loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.judging import JudgeLearner, JudgeLoss
from rlhf.config.learner import Learner
from rlhf.learning.losses import preference_loss
from rlhf.learning.mask_probe import Layout
from rlhf.learning.setup import Setup
from rlhf.learning.steps import Grouping


def setup(rank: int, world_size: int, micro_batch_size: int) -> Setup:
    learner = Learner(batch_size=world_size, world_size=world_size, micro_batch_size=micro_batch_size)
    return Setup(learner, rank, world_size, "cpu", torch.float32, Layout(prefix_sharing=True))


@given(
    units=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    size=st.integers(1, 3),
    world_size=st.integers(1, 3),
    per_micro=st.integers(1, 3),
)
def test_every_row_is_computed_once_beside_its_group(units, size, world_size, per_micro):
    costs = [cost for cost in units for _ in range(size)]
    plans = [Grouping(size).plan(costs, setup(rank, world_size, per_micro * size)) for rank in range(world_size)]
    rows = [row for plan in plans for micro in plan for row in micro]
    assert sorted(rows) == list(range(len(costs)))
    assert len({len(plan) for plan in plans}) == 1, "ranks run the same number of micro-batches"
    for micro in (micro for plan in plans for micro in plan):
        assert len(micro) <= per_micro * size
        for start in range(0, len(micro), size):
            first = micro[start]
            assert first % size == 0
            assert micro[start : start + size] == list(range(first, first + size))


def test_the_mean_stands_in_the_place_of_each_member():
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0], [-1.0, 0.0], [1.0, 4.0]])
    assert Grouping(2, average=True).reduce(values).tolist() == [[2.0, 4.0], [2.0, 4.0], [0.0, 2.0], [0.0, 2.0]]
    assert torch.equal(Grouping(2).reduce(values), values)
    assert torch.equal(Grouping(1, average=True).reduce(values), values)


def test_a_preference_for_a_place_has_no_gradient_in_the_averaged_loss():
    """Rows of one pair: signal s and bias b give margins s + b and s - b; averaged, the loss does not know b."""
    signal, bias = torch.tensor(0.3, requires_grad=True), torch.tensor(1.7, requires_grad=True)
    margins = torch.stack([signal + bias, signal - bias])
    policy = torch.stack([margins, torch.zeros(2)], 1)
    zeros = torch.zeros(2)

    def loss(grouping: Grouping) -> torch.Tensor:
        return preference_loss("choice", *grouping.reduce(policy).unbind(1), zeros, zeros, beta=1.0).losses.mean()

    averaged = torch.autograd.grad(loss(Grouping(2, average=True)), (signal, bias), retain_graph=True)
    assert averaged[0].item() == pytest.approx(torch.sigmoid(-signal).neg().item())
    assert averaged[1].item() == pytest.approx(0.0, abs=1e-7)
    apart = torch.autograd.grad(loss(Grouping(2)), (signal, bias))
    wanted = 0.5 * (torch.sigmoid(bias - signal) - torch.sigmoid(-signal - bias))
    assert apart[1].item() == pytest.approx(wanted.item(), abs=1e-6)
    assert abs(apart[1].item()) > 0.1


def test_the_first_share_of_the_training_is_averaged():
    loss = JudgeLearner(loss=JudgeLoss(type="choice", average=0.6)).loss
    assert [loss.averages(fraction) for fraction in (0.0, 0.59, 0.6, 0.99)] == [True, True, False, False]
    assert not Learner().loss.averages(0.0)
