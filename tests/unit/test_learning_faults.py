"""What stops a learner: too many steps that cannot be taken, and a GPU without memory."""

from typing import Any

import pytest
import torch

from actors.learner import LearnerActor, naming_memory
from rlhf.errors import RLHFError
from rlhf.learning.losses import PreferenceLoss
from rlhf.learning.steps import SUMS, StepRunner


def runner(in_a_row: int) -> StepRunner:
    nothing = None
    return StepRunner(nothing, nothing, nothing, nothing, skipped_in_a_row=in_a_row)  # type: ignore[arg-type]


def test_a_run_of_steps_that_are_not_finite_stops_the_run() -> None:
    runner(2).check_skipped(3)
    with pytest.raises(RLHFError, match=r"3 steps in a row .*learner\.max_skipped_steps = 3"):
        runner(3).check_skipped(3)


def test_a_gpu_without_memory_is_one_line_that_says_what_to_lower() -> None:
    with pytest.raises(RLHFError) as caught, naming_memory():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Much more text")
    assert str(caught.value).startswith(
        "learner: out of GPU memory (CUDA out of memory); lower learner.micro_batch_size"
    )
    with pytest.raises(ValueError, match="another"), naming_memory():
        raise ValueError("another")


class WithoutMemory:
    """A rank's learner on a GPU that has no memory left."""

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        return call


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("start", ("127.0.0.1", 1, 1.0)), ("score", ([],)), ("evaluate", ([],)), ("manifest", (1, ())), ("wake", ())],
)
def test_every_call_that_computes_names_the_memory(method: str, arguments: tuple[Any, ...]) -> None:
    actor = LearnerActor.__new__(LearnerActor)
    actor._learner = WithoutMemory()  # type: ignore[assignment]
    with pytest.raises(RLHFError, match="learner: out of GPU memory"):
        getattr(actor, method)(*arguments)


def test_accuracy_counts_ties_half_and_is_nothing_where_a_reward_is_nothing() -> None:
    nan, inf = float("nan"), float("inf")
    chosen = torch.tensor([1.0, 1.0, 1.0, nan, inf, 2.0, inf])
    rejected = torch.tensor([0.5, 1.0, 1.5, 1.0, 1.0, nan, inf])
    found = PreferenceLoss(chosen, chosen, rejected).accuracies
    assert torch.equal(found.nan_to_num(-1.0), torch.tensor([1, 0.5, 0, -1, 1, -1, -1], dtype=torch.float64))


@pytest.mark.parametrize(("reward", "accuracy"), [(2.0, 1.0), (1.0, 0.5), (float("nan"), None)])
def test_a_steps_accuracy_is_that_of_its_rewards(reward: float, accuracy: float | None) -> None:
    ones = torch.ones(2)
    sums = runner(1)._sums(PreferenceLoss(ones, reward * ones, ones), torch.ones(2, 2), torch.ones(2, 2))
    found = dict(zip(SUMS, sums.tolist(), strict=True))["rewards/accuracies"] / 2
    assert found == accuracy or (accuracy is None and found != found)
