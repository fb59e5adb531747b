"""How good is a judge? Its verdicts on pairs with a known better response, as one report."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

from msgspec.structs import replace

from rlhf.data.preferences import PreferenceExample
from rlhf.data.prompts import content_hash
from rlhf.evaluation.calibration import Calibration, calibration
from rlhf.evaluation.rewardbench import PUBLISHED_MODEL, Category, category_scores, is_rewardbench
from rlhf.evaluation.winrate import bootstrap_interval, wilson_interval
from rlhf.judging.health import judge_metrics
from rlhf.judging.stream import CHUNK, judge_chunks
from rlhf.ports import Judge
from rlhf.records import Comparison, Verdict, VerdictState

Ties = Literal["half", "lost"]

_MIRRORED = {VerdictState.WIN: VerdictState.LOSE, VerdictState.LOSE: VerdictState.WIN}
_REASONS = 20  # most frequent reasons of invalid verdicts that a report names


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often the chosen response won among `n` comparisons; an invalid verdict is lost.

    `accuracy` goes by the verdicts, whose ties (contradicting orders among them) count as the report's `ties` says,
    with its 95 % interval. `ties_half` and `ties_lost` are the same share under either rule. `mean_p` goes by p
    averaged over both orders alone, as published figures do: above one half is right, and a p of exactly one half
    counts as a tie.
    """

    n: int
    correct: int
    wrong: int
    ties: int
    invalid: int
    accuracy: float
    low: float
    high: float
    ties_half: float
    ties_lost: float
    mean_p: float


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What `bench_report` finds. `by_length` splits by which response is longer in characters.

    `first_shown` is the mean probability given to the response shown first: 0.5 is no position bias. `health` is
    `judge/*` of `judge_metrics` without the prefix. `rewardbench` is empty unless the subsets are RewardBench's.
    """

    ties: Ties
    overall: Accuracy
    subsets: dict[str, Accuracy]
    by_length: dict[str, Accuracy]
    health: dict[str, float]
    first_shown: float
    calibration: Calibration
    rewardbench: tuple[Category, ...]
    invalid_reasons: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; a number that does not exist is null."""
        report: dict[str, Any] = _without_nan(asdict(self))
        categories = report.pop("rewardbench")
        whole = bool(categories) and not any(category["missing"] for category in categories)
        report["rewardbench"] = (
            {"published_model": PUBLISHED_MODEL, "complete": whole, "categories": categories} if categories else None
        )
        return report


async def bench(
    judge: Judge, examples: Sequence[PreferenceExample], advance: Callable[[int], None], ties: Ties = "half"
) -> BenchReport:
    """Let `judge` compare every example and report; `advance` is told how many more are done.

    About half of the examples, by a hash of the `uid`, are given with the rejected response as A, so that no judge
    gains from a habit about A; their verdicts are turned back.
    """
    remaining = iter(examples)
    chunks = iter(lambda: [_shown(example) for example in islice(remaining, CHUNK)], [])
    verdicts: list[Verdict] = []
    async with aclosing(judge_chunks(judge, chunks)) as judged:
        async for chunk in judged:
            for verdict in chunk:
                example = examples[len(verdicts)]
                verdicts.append(mirrored(verdict) if is_swapped(example.uid) else verdict)
            advance(len(chunk))
    return bench_report(examples, verdicts, ties)


def bench_report(
    examples: Sequence[PreferenceExample], verdicts: Sequence[Verdict], ties: Ties = "half"
) -> BenchReport:
    """The report of one verdict an example, response A of each being the chosen one."""
    valid = [verdict for verdict in verdicts if verdict.state is not VerdictState.INVALID]
    subsets = {
        name: accuracy(group, ties)
        for name, group in _grouped(verdicts, [example.subset for example in examples]).items()
    }
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.state is VerdictState.INVALID)
    first = [0.5 * (verdict.p_ab + 1.0 - verdict.p_ba) for verdict in valid]
    return BenchReport(
        ties=ties,
        overall=accuracy(verdicts, ties),
        subsets=subsets,
        by_length={
            name: accuracy(group, ties)
            for name, group in sorted(_grouped(verdicts, [_longer(verdict) for verdict in verdicts]).items())
        },
        health={name.removeprefix("judge/"): value for name, value in judge_metrics(verdicts).items()},
        first_shown=math.fsum(first) / len(first) if first else math.nan,
        calibration=calibration([verdict.p for verdict in valid]),
        rewardbench=category_scores({name: (group.mean_p, group.n) for name, group in subsets.items()})
        if is_rewardbench(subsets)
        else (),
        invalid_reasons=dict(reasons.most_common(_REASONS)),
    )


def accuracy(verdicts: Sequence[Verdict], ties: Ties = "half") -> Accuracy:
    """Accuracy of at least one verdict.

    The interval is Wilson's, or where a conversation has several comparisons the bootstrap over conversations.
    """
    tie = 0.5 if ties == "half" else 0.0
    points = {VerdictState.WIN: 1.0, VerdictState.TIE: tie}
    count = Counter(verdict.state for verdict in verdicts)
    n, correct, tied = len(verdicts), count[VerdictState.WIN], count[VerdictState.TIE]
    clusters: dict[str, list[float]] = {}
    for verdict in verdicts:
        conversation = content_hash(verdict.comparison.messages)
        clusters.setdefault(conversation, []).append(points.get(verdict.state, 0.0))
    total = correct + tie * tied
    low, high = wilson_interval(total, n) if len(clusters) == n else bootstrap_interval(list(clusters.values()))
    by_p = [1.0 if verdict.p > 0.5 else tie if verdict.p == 0.5 else 0.0 for verdict in verdicts]
    return Accuracy(
        n=n,
        correct=correct,
        wrong=count[VerdictState.LOSE],
        ties=tied,
        invalid=count[VerdictState.INVALID],
        accuracy=total / n,
        low=low,
        high=high,
        ties_half=(correct + 0.5 * tied) / n,
        ties_lost=correct / n,
        mean_p=sum(by_p) / n,
    )


def is_swapped(uid: str) -> bool:
    """Is the rejected response shown as A? So for about half of all uids, always the same ones."""
    return bool(hashlib.sha256(uid.encode()).digest()[0] & 1)


def mirrored(verdict: Verdict) -> Verdict:
    """The verdict on the same comparison with A and B named the other way round."""
    comparison = verdict.comparison
    return replace(
        verdict,
        comparison=replace(
            comparison, a=comparison.b, b=comparison.a, index_a=comparison.index_b, index_b=comparison.index_a
        ),
        p_ab=1.0 - verdict.p_ba,
        p_ba=1.0 - verdict.p_ab,
        state=_MIRRORED.get(verdict.state, verdict.state),
        score_a=verdict.score_b,
        score_b=verdict.score_a,
    )


def _shown(example: PreferenceExample) -> Comparison:
    a, b = example.chosen, example.rejected
    if is_swapped(example.uid):
        a, b = b, a
    return Comparison(example.uid, example.messages, a, b, reference=example.reference)


def _longer(verdict: Verdict) -> str:
    difference = len(verdict.comparison.a) - len(verdict.comparison.b)
    return "same length" if difference == 0 else "chosen longer" if difference > 0 else "rejected longer"


def _grouped(verdicts: Sequence[Verdict], names: Sequence[str | None]) -> dict[str, list[Verdict]]:
    """Verdicts by name in order of appearance; those without a name are in no group."""
    groups: dict[str, list[Verdict]] = {}
    for verdict, name in zip(verdicts, names, strict=True):
        if name is not None:
            groups.setdefault(name, []).append(verdict)
    return groups


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
