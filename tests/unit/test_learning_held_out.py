"""Which references are asked again about the same held-out pairs."""

import pytest
import torch
from msgspec.structs import replace

from rlhf.config.learner import Learner
from rlhf.learning.held_out import HeldOutScores
from rlhf.records import Pair


class Counting:
    """A reference whose log-probs say how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, pairs) -> torch.Tensor:
        self.asked += 1
        return torch.full((len(pairs), 2), float(self.asked))

    def stepped(self) -> None: ...

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state) -> None: ...


def pair(prompt=(1, 2), chosen=(3,), rejected=(4,), uid="p", round=0) -> Pair:
    return Pair(uid, round, prompt, chosen, rejected, "", "", "", 1.0, 0, 0)


def scores(policy: str, **learner) -> tuple[HeldOutScores, Counting]:
    counting = Counting()
    return HeldOutScores(counting, Learner.model_validate({"reference": {"policy": policy}, **learner})), counting


@pytest.mark.parametrize("learner", [{}, {"lora": {}}])
def test_a_reference_that_stays_is_asked_once(learner) -> None:
    held_out, counting = scores("initial", **learner)
    pairs = [pair(), pair(chosen=(5, 6))]
    first = held_out.score(pairs)
    # Another evaluation builds its pairs anew; names and rounds are no part of the log-probs.
    again = held_out.score([replace(one, uid="q", round=3) for one in pairs])
    assert counting.asked == 1
    assert torch.equal(first, again)


@pytest.mark.parametrize("policy", ["round_start", "ema"])
def test_a_reference_that_moves_is_asked_each_time(policy) -> None:
    held_out, counting = scores(policy)
    found = [held_out.score([pair()])[0, 0].item() for _ in range(3)]
    assert (found, counting.asked) == ([1.0, 2.0, 3.0], 3)


@pytest.mark.parametrize(
    "other",
    [
        [pair(chosen=(9,))],
        [pair(rejected=(9,))],
        [pair(prompt=(9, 2))],
        [pair(prompt=(1,), chosen=(2, 3))],
        [pair(chosen=(4,), rejected=(3,))],
        [pair(), pair()],
        [],
    ],
)
def test_other_pairs_are_scored(other) -> None:
    held_out, counting = scores("initial")
    held_out.score([pair()])
    assert held_out.score(other).shape == (len(other), 2)
    assert counting.asked == 2
