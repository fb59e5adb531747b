"""The state of a rank's random generators, through a file and back."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.learning.rng import restore_rng, rng_state, seed_all


def draw() -> list[float]:
    """Of each generator; the last two come in pairs, of which the second is kept for later."""
    return [
        random.random(),
        float(np.random.random()),
        float(torch.rand(())),
        float(np.random.standard_normal()),
        random.gauss(0, 1),
    ]


@pytest.mark.parametrize("drawn", [0, 1, 700])
def test_every_generator_goes_on_where_it_was(drawn: int, tmp_path: Path) -> None:
    seed_all(3)
    for _ in range(drawn):
        draw()
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = [draw() for _ in range(3)]
    seed_all(4)
    draw()
    # Plain values only: nothing that a file could make run.
    restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_a_seed_starts_all_three_and_another_seed_others() -> None:
    found = []
    for seed in (5, 5, 6, 2**32 - 1):
        seed_all(seed)
        found.append(draw())
    assert found[0] == found[1]
    for other in found[2:]:
        assert all(one != two for one, two in zip(found[0], other, strict=True))
