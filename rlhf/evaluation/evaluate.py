"""The policy against a baseline on the same prompts."""

import asyncio
import math
from collections.abc import Sequence

from rlhf.errors import RLHFError
from rlhf.evaluation.text import distinct_2, mean_length
from rlhf.evaluation.winrate import win_rate
from rlhf.judging.verdicts import check_complete
from rlhf.ports import Judge
from rlhf.records import Comparison, Prompt, Rollout, Verdict


async def evaluate(
    policy_rollouts: Sequence[Rollout],
    baseline_rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    judge: Judge,
    seed: int = 0,
    training_judge: Judge | None = None,
) -> tuple[dict[str, float], list[Verdict]]:
    """Policy sample k (as A) against baseline sample k of the same prompt; `eval/*` metrics and the verdicts.

    A sample without a counterpart is left out. `eval/score` is the mean judge score of the policy's responses,
    absent for a judge without scores; the win rate is absent if no verdict is valid. `eval/length_mean` is in
    tokens. `seed` is the bootstrap's. Raises `RLHFError` if no sample has a counterpart.

    A `training_judge` judges the same comparisons: `eval/judge_win_rate` is the policy's win rate by it and
    `eval/win_rate_gap` that less `eval/win_rate`, how much more the judge that trains the policy sees in it than one
    that does not (over-optimisation; Gao et al., 2023). Both are absent where a win rate is.
    """
    baseline = {(rollout.uid, rollout.k): rollout for rollout in baseline_rollouts}
    by_uid = {prompt.uid: prompt for prompt in prompts}
    matched = [rollout for rollout in policy_rollouts if rollout.uid in by_uid and (rollout.uid, rollout.k) in baseline]
    if not matched:
        raise RLHFError("evaluation: no response of the policy has a baseline response to the same prompt")
    comparisons = [_comparison(by_uid[r.uid], r, baseline[r.uid, r.k]) for r in matched]
    judges = [judge] if training_judge is None else [judge, training_judge]
    verdicts, *others = await asyncio.gather(*(_verdicts(item, comparisons) for item in judges))
    metrics = {
        "eval/length_mean": mean_length([rollout.token_ids for rollout in matched]),
        "eval/distinct_2": distinct_2([rollout.text for rollout in matched]),
    }
    wins = win_rate(verdicts, seed)
    if wins.n:
        metrics |= {"eval/win_rate": wins.win_rate, "eval/win_rate_low": wins.low, "eval/win_rate_high": wins.high}
    for training in (win_rate(other, seed) for other in others):
        if wins.n and training.n:
            metrics["eval/judge_win_rate"] = training.win_rate
            metrics["eval/win_rate_gap"] = training.win_rate - wins.win_rate
    scores = [v.score_a for v in verdicts if v.score_a is not None and math.isfinite(v.score_a)]
    if scores:
        metrics["eval/score"] = math.fsum(scores) / len(scores)
    return metrics, verdicts


def _comparison(prompt: Prompt, a: Rollout, b: Rollout) -> Comparison:
    return Comparison(prompt.uid, prompt.messages, a.text, b.text, a.k, b.k, prompt.reference)


async def _verdicts(judge: Judge, comparisons: Sequence[Comparison]) -> list[Verdict]:
    verdicts = await judge.compare(comparisons)
    check_complete(comparisons, verdicts)
    return verdicts
