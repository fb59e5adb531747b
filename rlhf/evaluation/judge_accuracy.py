"""How often a judge in training is right on pairs that it does not train on, both orders each."""

from collections.abc import Sequence
from pathlib import Path

from rlhf.data.preferences import PreferenceExample
from rlhf.errors import RLHFError
from rlhf.evaluation.winrate import bootstrap_interval, win_rate
from rlhf.files import write_json
from rlhf.judging.health import judge_metrics
from rlhf.judging.pair_prompt import PairPrompt
from rlhf.judging.training import answer_rows, comparison, encode_examples
from rlhf.judging.verdicts import make_verdict, sigmoid
from rlhf.ports import Learner, Monitor
from rlhf.records import Verdict, VerdictState

ROWS = (
    ("accuracy", "eval/accuracy", "{:.3f}"),
    ("  95 % interval, low", "eval/accuracy_low", "{:.3f}"),
    ("  95 % interval, high", "eval/accuracy_high", "{:.3f}"),
    ("contradicting orders half right", "eval/accuracy_strict", "{:.3f}"),
    ("orders that contradict", "eval/flip_rate", "{:.1%}"),
    ("length bias", "eval/length_bias", "{:+.2f}"),
    ("Brier score", "eval/brier", "{:.3f}"),
)
"""The table a training ends with."""


class JudgeAccuracy:
    """The `RoundEvaluator` of judge training: reads both answers' log-probs from the learner itself."""

    def __init__(
        self,
        examples: Sequence[PreferenceExample],
        prompt: PairPrompt,
        learner: Learner,
        monitor: Monitor,
        folder: Path,
    ) -> None:
        """Results go to `folder`, a file a round, written last: it marks the round as evaluated."""
        encoded = zip(examples, encode_examples(examples, prompt), strict=True)
        self._items = [(example, orders) for example, orders in encoded if orders is not None]
        self.left_out = len(examples) - len(self._items)
        self._answers = prompt.answer_ids
        self._learner = learner
        self._monitor = monitor
        self._folder = folder

    def due(self, round: int, last: bool) -> bool:
        """Every segment is evaluated, if anything is held out."""
        return bool(self._items)

    async def catch_up(self, round: int, last: bool) -> None:
        """Evaluate the untrained model, or the round a resume begins from."""
        if self._items and not self._mark(round).exists():
            await self.evaluate(round)

    async def evaluate(self, round: int) -> dict[str, float]:
        """`eval/*` of the held-out pairs; see `accuracy_metrics`."""
        with self._monitor.progress("evaluate", None):
            metrics = accuracy_metrics(await self._verdicts())
        self._monitor.log("eval", round, metrics)
        self._folder.mkdir(exist_ok=True)
        write_json(self._mark(round), metrics)
        return metrics

    async def _verdicts(self) -> list[Verdict]:
        rows = [
            row for example, orders in self._items for row in answer_rows(example.uid, orders, self._answers, round=0)
        ]
        scores = await self._learner.score(rows)
        right = scores[:, 0] - scores[:, 1]
        return [
            make_verdict(comparison(example), sigmoid(float(right[2 * i])), sigmoid(float(right[2 * i + 1])))
            for i, (example, _) in enumerate(self._items)
        ]

    def _mark(self, round: int) -> Path:
        return self._folder / f"round-{round:04d}.json"


def accuracy_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Metrics of verdicts whose A is the preferred response, over the valid ones.

    `eval/accuracy` goes by p averaged over both orders (one half counts half) and has a 95 % interval;
    `eval/accuracy_strict` counts a verdict that flips with the order as half right; `eval/brier` is the mean of
    (1 - p)². Raises `RLHFError` if no verdict is valid.
    """
    valid = [verdict for verdict in verdicts if verdict.state is not VerdictState.INVALID]
    if not valid:
        raise RLHFError(
            f"the judge gives no finite answer to any of {len(verdicts)} held-out pairs: the training has diverged; "
            "lower learner.optimizer.lr and start over with --fresh"
        )
    averaged = [[1.0 if verdict.p > 0.5 else 0.5 if verdict.p == 0.5 else 0.0] for verdict in valid]
    low, high = bootstrap_interval(averaged)
    health = judge_metrics(verdicts)
    return {
        "eval/accuracy": sum(point for (point,) in averaged) / len(averaged),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/accuracy_strict": win_rate(verdicts).win_rate,
        "eval/flip_rate": health["judge/flip_rate"],
        "eval/length_bias": health["judge/length_bias"],
        "eval/brier": sum((1.0 - verdict.p) ** 2 for verdict in valid) / len(valid),
        "eval/invalid_rate": health["judge/invalid_rate"],
    }
