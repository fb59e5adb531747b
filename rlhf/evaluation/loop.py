"""Evaluation during a run: held-out prompts, against the responses of the round-0 policy."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from rlhf.config import RunConfig
from rlhf.evaluation.evaluate import evaluate
from rlhf.files import write_json
from rlhf.judging.health import check_valid_share, health_warnings, judge_metrics
from rlhf.judging.identical import differs, gives_scores
from rlhf.ports import Generators, Judge, Monitor
from rlhf.records import Prompt, Rollout, Verdict
from rlhf.rounds.online import sample_requests
from rlhf.rounds.sealing import read_rollouts, write_rollouts, write_verdicts


class Evaluator:
    """Samples the held-out prompts with the same seeds each time and compares with the round-0 responses."""

    def __init__(
        self,
        config: RunConfig,
        prompts: tuple[Prompt, ...],
        generators: Generators,
        judge: Judge,
        monitor: Monitor,
        run_dir: Path,
        training_judge: Judge | None = None,
    ):
        """`judge` is the eval judge; `training_judge` is the one that trains the policy, where that is another."""
        self._config = config
        self._prompts = prompts
        self._generators = generators
        self._judge = judge
        self._training_judge = training_judge
        self._monitor = monitor
        self._folder = run_dir / "evaluation"

    def due(self, round: int, last: bool) -> bool:
        """Is this round evaluated? Round 0 is the baseline of all later ones."""
        return last or round % self._config.evaluation.every == 0

    async def catch_up(self, round: int, last: bool) -> None:
        """Evaluate the round that a start or a resume begins from, if it is due and was not evaluated to the end."""
        if self.due(round, last) and not self._mark(round).exists():
            await self.evaluate(round)

    async def evaluate(self, round: int) -> dict[str, float]:
        """Sample, judge, log an `eval` event and show samples; returns the metrics.

        Raises `RLHFError`, with nothing logged, if fewer of the comparisons are valid than the judge's
        health.min_valid; a resumed run evaluates the round again.
        """
        if round and not self._path(0).exists():
            self._monitor.alert(f"round {round} is not evaluated: this run began without an evaluation of round 0")
            return {}
        rollouts = await self._sample(round)
        baseline = rollouts if round == 0 else await asyncio.to_thread(read_rollouts, self._path(0))
        # Against itself the baseline has no win rate to compare.
        training_judge = self._training_judge if round else None
        scored = gives_scores(self._config.eval_judge or self._config.judge)
        metrics, verdicts = await evaluate(
            rollouts, baseline, self._prompts, self._judge, self._config.seed, training_judge, scored
        )
        if round == 0:
            metrics = {name: value for name, value in metrics.items() if "win_rate" not in name}
        warnings = await self._health(round, verdicts, scored)
        self._monitor.log("eval", round, metrics)
        for warning in warnings + gap_warnings(round, metrics, self._config.judge.health.max_win_rate_gap):
            self._monitor.alert(warning)
        if round:
            self._show(round, rollouts, baseline)
        write_json(self._mark(round), metrics)
        return metrics

    async def _health(self, round: int, verdicts: list[Verdict], scored: bool) -> list[str]:
        """Keep the verdicts and say what is wrong with the judge; raises `RLHFError` if it has too few of them."""
        path = self._path(round, "-verdicts")
        await asyncio.to_thread(write_verdicts, path, verdicts)
        key = "eval_judge" if self._config.eval_judge else "judge"
        thresholds = (self._config.eval_judge or self._config.judge).health
        where = f"evaluation of round {round}"
        differing = [verdict for verdict in verdicts if differs(verdict.comparison)]
        check_valid_share(verdicts if scored else differing, thresholds.min_valid, where, judge=key)
        reasons = f"{self._folder.name}/{path.name}"
        found = health_warnings(judge_metrics(differing), thresholds, judge=key, reasons=reasons) if differing else []
        return [f"{where}: {warning}" for warning in found]

    async def _sample(self, round: int) -> list[Rollout]:
        config = self._config
        requests = sample_requests(list(self._prompts), config.evaluation.samples, config.seed, "evaluation")
        rollouts = []
        with self._monitor.progress("evaluate", len(requests) * config.evaluation.samples) as bar:
            async for rollout in self._generators.sample(requests, config.cluster.deadlines.generate):
                rollouts.append(rollout)
                bar.advance()
        self._folder.mkdir(exist_ok=True)
        await asyncio.to_thread(write_rollouts, self._path(round), rollouts)
        return rollouts

    def _mark(self, round: int) -> Path:
        """Written last: the round has been evaluated and logged."""
        return self._folder / f"round-{round:04d}.json"

    def _path(self, round: int, kind: str = "") -> Path:
        return self._folder / f"round-{round:04d}{kind}.parquet"

    def _show(self, round: int, rollouts: list[Rollout], baseline: list[Rollout]) -> None:
        before = {(rollout.uid, rollout.k): rollout.text for rollout in baseline}
        now = {(rollout.uid, rollout.k): rollout.text for rollout in rollouts}
        rows = [
            (prompt.messages[-1]["content"], before[prompt.uid, 0].strip(), now[prompt.uid, 0].strip())
            for prompt in self._prompts[: self._config.monitor.samples]
        ]
        self._monitor.table("samples", ("prompt", "before (round 0)", f"after (round {round})"), rows)


def gap_warnings(round: int, metrics: Mapping[str, float], max_gap: float) -> list[str]:
    """A sentence if the training judge's win rate is more than `max_gap` above that of the eval judge."""
    gap = metrics.get("eval/win_rate_gap")
    if gap is None or gap <= max_gap:
        return []
    trained = metrics["eval/judge_win_rate"]
    return [
        f"round {round}: the judge sees a win rate of {trained:.2f}, eval_judge one of {trained - gap:.2f} on the same "
        f"comparisons: a gap of {gap:.2f} (judge.health.max_win_rate_gap = {max_gap:g}); the policy may be learning "
        "the judge's mistakes"
    ]
