"""Loss and rewards on held-out pairs, as a model card of preference optimisation shows them."""

from collections.abc import Sequence
from pathlib import Path

from rlhf.files import write_json
from rlhf.ports import Learner, Monitor
from rlhf.records import Pair

ROWS = (
    ("loss", "eval/loss", "{:.4f}"),
    ("reward, chosen", "eval/rewards/chosen", "{:+.4f}"),
    ("reward, rejected", "eval/rewards/rejected", "{:+.4f}"),
    ("margin", "eval/rewards/margins", "{:+.4f}"),
    ("accuracy", "eval/rewards/accuracies", "{:.4f}"),
    ("log-prob, chosen", "eval/logps/chosen", "{:.2f}"),
    ("log-prob, rejected", "eval/logps/rejected", "{:.2f}"),
)
"""The table a training ends with."""


class PreferenceEvaluator:
    """The `RoundEvaluator` of offline training: the training's own loss and rewards, without a step."""

    def __init__(
        self, pairs: Sequence[Pair], max_length: int, learner: Learner, monitor: Monitor, folder: Path
    ) -> None:
        """Results go to `folder`, a file a round, written last: it marks the round as evaluated.

        Pairs longer than `max_length` are left out, as in training; `left_out` says how many.
        """
        self._pairs = [
            pair
            for pair in pairs
            if len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max_length
        ]
        self.left_out = len(pairs) - len(self._pairs)
        self._learner = learner
        self._monitor = monitor
        self._folder = folder

    def due(self, round: int, last: bool) -> bool:
        """Every segment is evaluated, if anything is held out."""
        return bool(self._pairs)

    async def catch_up(self, round: int, last: bool) -> None:
        """Evaluate the untrained policy, or the round a resume begins from."""
        if self._pairs and not self._mark(round).exists():
            await self.evaluate(round)

    async def evaluate(self, round: int) -> dict[str, float]:
        """`eval/{loss,rewards/*,logps/*}` over the held-out pairs, under the names of the step metrics."""
        with self._monitor.progress("evaluate", None):
            found = await self._learner.evaluate(self._pairs)
        if "loss" not in found:
            self._monitor.alert(
                f"round {round}: the loss of the held-out pairs is not finite; lower learner.optimizer.lr or "
                "learner.loss.beta, or go back to an older checkpoint"
            )
        metrics = {f"eval/{name}": value for name, value in found.items()} | {"eval/pairs": float(len(self._pairs))}
        self._monitor.log("eval", round, metrics)
        self._folder.mkdir(exist_ok=True)
        write_json(self._mark(round), metrics)
        return metrics

    def _mark(self, round: int) -> Path:
        return self._folder / f"round-{round:04d}.json"
