"""The policy against a baseline on the same prompts."""

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
) -> tuple[dict[str, float], list[Verdict]]:
    """Policy sample k (as A) against baseline sample k of the same prompt; `eval/*` metrics and the verdicts.

    A sample without a counterpart is left out. `eval/score` is the mean judge score of the policy's responses,
    absent for a judge without scores; the win rate is absent if no verdict is valid. `eval/length_mean` is in
    tokens. `seed` is the bootstrap's. Raises `RLHFError` if no sample has a counterpart.
    """
    baseline = {(rollout.uid, rollout.k): rollout for rollout in baseline_rollouts}
    messages = {prompt.uid: prompt.messages for prompt in prompts}
    matched = [
        rollout for rollout in policy_rollouts if rollout.uid in messages and (rollout.uid, rollout.k) in baseline
    ]
    if not matched:
        raise RLHFError("evaluation: no response of the policy has a baseline response to the same prompt")
    comparisons = [
        Comparison(r.uid, messages[r.uid], r.text, baseline[r.uid, r.k].text, index_a=r.k, index_b=r.k) for r in matched
    ]
    verdicts = await judge.compare(comparisons)
    check_complete(comparisons, verdicts)
    metrics = {
        "eval/length_mean": mean_length([rollout.token_ids for rollout in matched]),
        "eval/distinct_2": distinct_2([rollout.text for rollout in matched]),
    }
    wins = win_rate(verdicts, seed)
    if wins.n:
        metrics |= {"eval/win_rate": wins.win_rate, "eval/win_rate_low": wins.low, "eval/win_rate_high": wins.high}
    scores = [verdict.score_a for verdict in verdicts if verdict.score_a is not None]
    if scores:
        metrics["eval/score"] = math.fsum(scores) / len(scores)
    return metrics, verdicts
