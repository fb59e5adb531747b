"""What judges share that score one response alone: each distinct response is scored once, then scores are compared."""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from rlhf.judging.verdicts import invalid_verdict, make_verdict, sigmoid
from rlhf.records import Comparison, Message, Verdict


@dataclass(frozen=True, slots=True)
class Answer:
    """One response to be scored, with the conversation it answers and the prompt's reference, if there is one."""

    messages: tuple[Message, ...]
    response: str
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """The score of an answer; None where there is none, and `reason` then completes the sentence "response A ...".

    `truncated` says that the conversation was cut to fit the judge.
    """

    value: float | None
    reason: str = ""
    truncated: bool = False


ScoreFunction = Callable[[Sequence[Answer]], Awaitable[Sequence[Score]]]
Probability = Callable[[float, float], float]


def bradley_terry(scale: float) -> Probability:
    """p(A wins) = sigmoid(scale * (score_a - score_b)) (Bradley and Terry, 1952)."""
    return lambda score_a, score_b: sigmoid(scale * (score_a - score_b))


async def compare_by_score(
    comparisons: Sequence[Comparison], score: ScoreFunction, probability: Probability
) -> list[Verdict]:
    """One verdict a comparison, in order; `score` is called once, with the distinct answers in order of appearance.

    Such a judge sees no order, so p_ab = p_ba. A score that is missing or not finite makes the verdict INVALID.
    """
    answers: dict[_Key, Answer] = {}
    keys = []
    for comparison in comparisons:
        turns = tuple((message["role"], message["content"]) for message in comparison.messages)
        pair = []
        for text in (comparison.a, comparison.b):
            key = (turns, text, comparison.reference)
            answers.setdefault(key, Answer(comparison.messages, text, comparison.reference))
            pair.append(key)
        keys.append(pair)
    scores = dict(zip(answers, await score(list(answers.values())), strict=True))
    return [
        _verdict(comparison, scores[a], scores[b], probability)
        for comparison, (a, b) in zip(comparisons, keys, strict=True)
    ]


_Key = tuple[tuple[tuple[str, str], ...], str, str | None]


def _verdict(comparison: Comparison, a: Score, b: Score, probability: Probability) -> Verdict:
    score_a, score_b = _finite(a), _finite(b)
    if score_a is None:
        verdict = invalid_verdict(comparison, f"response A {_why(a)}", None, score_b)
    elif score_b is None:
        verdict = invalid_verdict(comparison, f"response B {_why(b)}", score_a, None)
    else:
        p = probability(score_a, score_b)
        verdict = make_verdict(comparison, p, p, score_a, score_b)
    return replace(verdict, truncated=True) if a.truncated or b.truncated else verdict


def _finite(score: Score) -> float | None:
    return score.value if score.value is not None and math.isfinite(score.value) else None


def _why(score: Score) -> str:
    return score.reason or f"has no finite score: {score.value}"
