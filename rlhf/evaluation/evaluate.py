"""The policy against a baseline on the same prompts."""

import asyncio
import math
from collections.abc import Sequence

from rlhf.errors import RLHFError
from rlhf.evaluation.text import distinct_2, mean_length
from rlhf.evaluation.winrate import win_rate
from rlhf.judging.health import judge_metrics
from rlhf.judging.identical import compare_differing, differs
from rlhf.judging.verdicts import check_complete
from rlhf.ports import Judge
from rlhf.records import Comparison, Prompt, Rollout, Verdict, VerdictState


async def evaluate(
    policy_rollouts: Sequence[Rollout],
    baseline_rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    judge: Judge,
    seed: int = 0,
    training_judge: Judge | None = None,
    scored: bool = False,
) -> tuple[dict[str, float], list[Verdict]]:
    """Policy sample k (as A) against baseline sample k of the same prompt; `eval/*` metrics and the verdicts.

    A sample without a counterpart is left out. Identical responses tie without asking; a judge that gives scores
    (`scored`) is asked all the same, for its scores. `eval/score` is the mean judge score of the policy's responses,
    absent for a judge without scores; the win rate is absent if no verdict is valid. `eval/invalid_rate` and
    `eval/flip_rate` are the judge's on responses that differ (see `judge_metrics`), absent if none do.
    `eval/length_mean` is in tokens. `seed` is the bootstrap's. Raises `RLHFError` if no sample has a counterpart.

    A `training_judge` judges the same comparisons: over those that both could judge, `eval/judge_win_rate` is the
    policy's win rate by it and `eval/win_rate_gap` that less the one by `judge`, how much more the judge that trains
    the policy sees in it than one that does not (over-optimisation; Gao et al., 2023). Without any both are absent.
    """
    baseline = {(rollout.uid, rollout.k): rollout for rollout in baseline_rollouts}
    by_uid = {prompt.uid: prompt for prompt in prompts}
    matched = [rollout for rollout in policy_rollouts if rollout.uid in by_uid and (rollout.uid, rollout.k) in baseline]
    if not matched:
        raise RLHFError("evaluation: no response of the policy has a baseline response to the same prompt")
    comparisons = [_comparison(by_uid[r.uid], r, baseline[r.uid, r.k]) for r in matched]
    verdicts, training = await asyncio.gather(
        _all(judge, comparisons) if scored else compare_differing(judge, comparisons),
        compare_differing(training_judge, comparisons) if training_judge else _none(),
    )
    metrics = {
        "eval/length_mean": mean_length([rollout.token_ids for rollout in matched]),
        "eval/distinct_2": distinct_2([rollout.text for rollout in matched]),
    }
    wins = win_rate(verdicts, seed)
    if wins.n:
        metrics |= {"eval/win_rate": wins.win_rate, "eval/win_rate_low": wins.low, "eval/win_rate_high": wins.high}
    scores = [v.score_a for v in verdicts if v.score_a is not None and math.isfinite(v.score_a)]
    if scores:
        metrics["eval/score"] = math.fsum(scores) / len(scores)
    return metrics | _gap(verdicts, training) | _rates(verdicts), verdicts


def _comparison(prompt: Prompt, a: Rollout, b: Rollout) -> Comparison:
    return Comparison(prompt.uid, prompt.messages, a.text, b.text, a.k, b.k, prompt.reference)


async def _all(judge: Judge, comparisons: Sequence[Comparison]) -> list[Verdict]:
    verdicts = await judge.compare(comparisons)
    check_complete(comparisons, verdicts)
    return verdicts


async def _none() -> list[Verdict]:
    return []


def _gap(verdicts: Sequence[Verdict], training: Sequence[Verdict]) -> dict[str, float]:
    pairs = zip(verdicts, training, strict=True) if training else ()
    both = [pair for pair in pairs if all(verdict.state is not VerdictState.INVALID for verdict in pair)]
    if not both:
        return {}
    independent, trained = (win_rate(side).win_rate for side in zip(*both, strict=True))
    return {"eval/judge_win_rate": trained, "eval/win_rate_gap": trained - independent}


def _rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    asked = [verdict for verdict in verdicts if differs(verdict.comparison)]
    health = judge_metrics(asked)
    return {f"eval/{name}": health[f"judge/{name}"] for name in ("invalid_rate", "flip_rate")} if asked else {}
