"""Responses, judges by table or score, and one prompt's pairs, for the tests of pairing."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from rlhf.config.pairing import Pairing
from rlhf.judging.verdicts import invalid_verdict, make_verdict, sigmoid
from rlhf.packed import logprobs, token_ids
from rlhf.records import Comparison, Message, Prompt, Rollout, Verdict, VersionSpan
from rlhf.rounds.pairing import Group, PairingResult, make_pairs

PROMPT = Prompt("p", (Message(role="user", content="Hi"),), "<user>Hi", (7, 8))


class TableJudge:
    """Verdicts by a function of the two texts; remembers each batch."""

    def __init__(self, rule: Callable[[str, str], tuple[float, float]]) -> None:
        self.rule = rule
        self.batches: list[list[Comparison]] = []

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.batches.append(list(comparisons))
        return [make_verdict(c, *self.rule(c.a, c.b)) for c in comparisons]


def rollout(k: int, text: str, versions: tuple[int, ...] = (3,), uid: str = "p") -> Rollout:
    ids = token_ids(list(text.encode()))
    spans = tuple(VersionSpan(version, i, i + 1) for i, version in enumerate(versions))
    return Rollout(uid, k, ids, logprobs(-0.1 * t for t in range(len(ids))), text, "stop", spans if ids else ())


def group(*texts: str) -> list[Rollout]:
    return [rollout(k, text) for k, text in enumerate(texts)]


async def pairs_of(
    rollouts: Sequence[Rollout],
    judge: object,
    strategy: str = "best_vs_worst",
    margin: float = 0.1,
    seed: int = 0,
    **kw: int,
) -> PairingResult:
    config = Pairing(strategy=strategy, min_margin=margin)
    group = Group(PROMPT, rollouts, np.random.default_rng(seed))
    [result] = await make_pairs([group], judge, config, 5, **kw)  # type: ignore[arg-type]
    return result


def by_strength(**strength: float) -> TableJudge:
    """Bradley-Terry over named strengths."""

    def rule(a: str, b: str) -> tuple[float, float]:
        p = 1 / (1 + math.exp(strength[b] - strength[a]))
        return p, p

    return TableJudge(rule)


def table(**p: float) -> TableJudge:
    """p(x beats y) under the name xy, the mirror filled in."""
    full = dict(p) | {key[::-1]: 1 - value for key, value in p.items()}
    return TableJudge(lambda a, b: (full[a + b], full[a + b]))


class ScoreJudge:
    """Scores one response alone, by a table; a response without an entry cannot be judged."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores
        self.batches: list[list[Comparison]] = []

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.batches.append(list(comparisons))
        return [self._verdict(c, self.scores.get(c.a), self.scores.get(c.b)) for c in comparisons]

    def _verdict(self, comparison: Comparison, a: float | None, b: float | None) -> Verdict:
        if a is None or b is None:
            return invalid_verdict(comparison, "no score", a, b)
        p = sigmoid(a - b)
        return make_verdict(comparison, p, p, a, b)
