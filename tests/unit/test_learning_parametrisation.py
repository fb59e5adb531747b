"""Export of full weights: groups that are made whole together, names, and what a checkpoint leaves out."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rlhf.learning import parametrisation
from rlhf.learning.parametrisation import Entry, Full, export_entries


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), limit=st.integers(1, 100))
def test_groups_are_as_large_as_they_may_be(sizes, limit):
    parameters = [nn.Parameter(torch.full((size,), float(size))) for size in sizes]
    entries = [Entry.plain(str(index), parameter) for index, parameter in enumerate(parameters)]
    groups: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parametrisation, "GROUP_BYTES", 4 * limit)
        exported = list(export_entries(entries, [], lambda group: _record(groups, group)))
    assert [name for name, _ in exported] == [str(index) for index in range(len(sizes))]
    assert all(torch.equal(value, parameter) for (_, value), parameter in zip(exported, parameters, strict=True))
    assert [size for group in groups for size in group] == sizes
    assert all(sum(group) <= limit or len(group) == 1 for group in groups)
    assert all(sum(group) + following[0] > limit for group, following in pairwise(groups))


@contextmanager
def _record(groups, group):
    groups.append([parameter.numel() for parameter in group])
    yield


def test_a_tensor_is_taken_while_its_group_is_whole():
    whole = False
    parameter = nn.Parameter(torch.tensor([2.0, 3.0]))

    @contextmanager
    def gather(_):
        nonlocal whole
        whole = True
        yield
        whole = False

    def value():
        assert whole
        return parameter.detach() * 2

    (found,) = export_entries([Entry("twice", (parameter,), value)], [], gather)
    assert found[0] == "twice"
    assert found[1].tolist() == [4.0, 6.0]
    assert not whole


def test_ties_and_passing_buffers_are_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.all_tied_weights_keys = {"head.weight": "embed.weight"}
            self.head = nn.Linear(3, 5, bias=False)
            self.embed = nn.Embedding(5, 3)
            self.head.weight = self.embed.weight
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("passing", torch.ones(2), persistent=False)

    model = Model()
    exported = dict(Full().export(Full().wrap(model)))
    assert exported.keys() == {"embed.weight", "kept"}
    assert [name for name, _ in Full().trainable(model)] == ["head.weight"]
