"""Which held-out pairs an offline training is measured on."""

import asyncio
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from rlhf.evaluation.preference import PreferenceEvaluator
from rlhf.records import Pair


def pair(prompt: int, chosen: int, rejected: int) -> Pair:
    return Pair("p", 0, (1,) * prompt, (2,) * chosen, (3,) * rejected, "", "", "", 1.0, 0, 0)


def test_pairs_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    nobody = None
    pairs = [pair(4, 6, 6), pair(5, 6, 1), pair(5, 1, 6)]
    some = PreferenceEvaluator(pairs, 10, nobody, nobody, tmp_path)  # type: ignore[arg-type]
    assert (some.left_out, some.due(1, last=False)) == (2, True)
    none = PreferenceEvaluator(pairs[1:], 10, nobody, nobody, tmp_path)  # type: ignore[arg-type]
    assert (none.left_out, none.due(1, last=False)) == (2, False)


class Measured:
    """A learner that measures `found`, and a monitor that keeps what it is told."""

    def __init__(self, found: dict[str, float]) -> None:
        self.found = found
        self.alerts: list[str] = []

    async def evaluate(self, pairs: object) -> dict[str, float]:
        return self.found

    def progress(self, name: str, total: int | None) -> AbstractContextManager[None]:
        return nullcontext()

    def log(self, kind: str, round: int, metrics: dict[str, float]) -> None: ...

    def alert(self, message: str) -> None:
        self.alerts.append(message)


@pytest.mark.parametrize(("found", "alerts"), [({"loss": 0.6}, 0), ({}, 1), ({"logps/chosen": -3.0}, 1)])
def test_a_loss_that_is_not_finite_is_told(tmp_path: Path, found: dict[str, float], alerts: int) -> None:
    both = Measured(found)
    evaluator = PreferenceEvaluator([pair(1, 1, 1)], 10, both, both, tmp_path / "evaluation")  # type: ignore[arg-type]
    metrics = asyncio.run(evaluator.evaluate(3))
    assert metrics == {f"eval/{name}": value for name, value in found.items()} | {"eval/pairs": 1.0}
    assert len(both.alerts) == alerts
    assert all("round 3: the loss of the held-out pairs is not finite" in alert for alert in both.alerts)
