"""Over-optimisation: the win rate by the judge that trains against that of a judge the training never sees."""

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from rlhf.config import RunConfig
from rlhf.evaluation.evaluate import evaluate
from rlhf.evaluation.loop import Evaluator, gap_warnings
from rlhf.evaluation.winrate import win_rate
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.records import Comparison, Message, Prompt, Rollout, SampleRequest, Verdict, VersionSpan

PROMPTS = tuple(
    Prompt(f"u{n}", (Message(role="user", content=f"q{n}"),), f"q{n}", (n, 1), reference=str(n)) for n in range(4)
)


class Longer:
    """Likes the longer response: a judge that is easily fooled."""

    def __init__(self) -> None:
        self.calls: list[list[Comparison]] = []

    def p(self, c: Comparison) -> float:
        return 0.9 if len(c.a) > len(c.b) else 0.5 if len(c.a) == len(c.b) else 0.1

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.calls.append(list(comparisons))
        return [make_verdict(c, p, p, float(len(c.a)), float(len(c.b))) for c in comparisons for p in [self.p(c)]]


class Right(Longer):
    """Likes the response that holds the reference answer."""

    def p(self, c: Comparison) -> float:
        return 0.5 + 0.4 * ((str(c.reference) in c.a) - (str(c.reference) in c.b))


class Down(Longer):
    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [invalid_verdict(c, "down") for c in comparisons]


def rollouts(*texts: str) -> list[Rollout]:
    """One response a prompt."""
    return [
        Rollout(prompt.uid, 0, (5, 6), (-0.5,) * 2, text, "stop", (VersionSpan(0, 0, 2),))
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]


BASELINE = rollouts("0", "-", "-", "3")
POLICY = rollouts("long 0", "long 1", "long", "long")


async def test_both_judges_see_the_same_comparisons() -> None:
    judge, training = Right(), Longer()
    metrics, verdicts = await evaluate(POLICY, BASELINE, PROMPTS, judge, training_judge=training)
    assert judge.calls == training.calls
    assert [c.reference for c in judge.calls[0]] == ["0", "1", "2", "3"]
    # By reference: tie, win, tie, loss; the fooled judge sees four wins.
    assert metrics["eval/win_rate"] == win_rate(verdicts).win_rate == pytest.approx(0.5)
    assert metrics["eval/judge_win_rate"] == 1.0
    assert metrics["eval/win_rate_gap"] == pytest.approx(0.5)
    alone, _ = await evaluate(POLICY, BASELINE, PROMPTS, Right())
    extra = {"eval/judge_win_rate", "eval/win_rate_gap"}
    assert {name: value for name, value in metrics.items() if name not in extra} == alone


@pytest.mark.parametrize(("judge", "training"), [(Down(), Longer()), (Right(), Down())])
async def test_no_gap_without_both_win_rates(judge: Longer, training: Longer) -> None:
    metrics, _ = await evaluate(POLICY, BASELINE, PROMPTS, judge, training_judge=training)
    assert not {"eval/judge_win_rate", "eval/win_rate_gap"} & set(metrics)


class Texts(Longer):
    """Wins (w), ties (t) or fails (x) by the first letter of A."""

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.calls.append(list(comparisons))
        p = {"w": 0.9, "t": 0.5, "l": 0.1}
        return [
            invalid_verdict(c, "down") if c.a[0] == "x" else make_verdict(c, p[c.a[0]], p[c.a[0]]) for c in comparisons
        ]


class Second(Texts):
    """The same by the second letter."""

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        turned = await super().compare([replace(c, a=c.a[1:]) for c in comparisons])
        return [replace(v, comparison=c) for v, c in zip(turned, comparisons, strict=True)]


async def test_the_gap_is_over_what_both_could_judge() -> None:
    """A judge that fails on what the other finds lost would otherwise look fooled."""
    metrics, _ = await evaluate(rollouts("wl", "lx", "wt", "xl"), BASELINE, PROMPTS, Texts(), training_judge=Second())
    assert metrics["eval/win_rate"] == pytest.approx(2 / 3)
    assert metrics["eval/judge_win_rate"] == pytest.approx(0.25)  # l and t, against w and w
    assert metrics["eval/win_rate_gap"] == pytest.approx(0.25 - 1.0)
    nothing, _ = await evaluate(rollouts("wx", "xl", "wx", "xl"), BASELINE, PROMPTS, Texts(), training_judge=Second())
    assert not {"eval/judge_win_rate", "eval/win_rate_gap"} & set(nothing)


class Ports:
    """Generators that answer with whatever texts are set, and a monitor that keeps what it hears."""

    def __init__(self) -> None:
        self.now = BASELINE
        self.logged: list[tuple[str, int, dict[str, float]]] = []
        self.alerts: list[str] = []

    async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
        for rollout in self.now:
            yield rollout

    def log(self, event: str, round: int, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((event, round, dict(metrics)))

    def alert(self, message: str) -> None:
        self.alerts.append(message)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        return None

    def progress(self, name: str, total: int | None) -> "Ports":
        return self

    def advance(self, amount: int = 1) -> None:
        return None

    def __enter__(self) -> "Ports":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def evaluator(ports: Any, run_dir: Path, max_gap: float, training: Longer | None) -> Evaluator:
    config = RunConfig.model_validate(
        {
            **{"name": "r", "policy": {"path": "m"}, "prompts": {"path": "p.jsonl"}, "evaluation": {"samples": 1}},
            "judge": {"type": "sentiment", "health": {"max_win_rate_gap": max_gap}},
        }
    )
    return Evaluator(config, PROMPTS, ports, Right(), ports, run_dir, training_judge=training)


async def test_a_wide_gap_is_logged_and_said(tmp_path: Path) -> None:
    ports, training = Ports(), Longer()
    running = evaluator(ports, tmp_path, 0.3, training)
    await running.evaluate(0)
    assert training.calls == [], "the baseline has no win rate against itself"
    assert [name for name in ports.logged[0][2] if "win_rate" in name] == []
    ports.now = POLICY
    metrics = await running.evaluate(4)
    assert ports.logged[1] == ("eval", 4, metrics)
    assert metrics["eval/win_rate_gap"] == pytest.approx(0.5)
    assert json.loads((tmp_path / "evaluation/round-0004.json").read_text()) == metrics
    [alert] = ports.alerts
    assert [word for word in ("round 4", "1.00", "0.50", "max_win_rate_gap = 0.3") if word not in alert] == []


async def test_one_judge_has_no_gap(tmp_path: Path) -> None:
    ports = Ports()
    running = evaluator(ports, tmp_path, 0.0, None)
    await running.evaluate(0)
    ports.now = POLICY
    metrics = await running.evaluate(4)
    assert ("eval/win_rate" in metrics, "eval/win_rate_gap" in metrics, ports.alerts) == (True, False, [])


@pytest.mark.parametrize(("gap", "warned"), [(0.15, False), (0.16, True), (-0.5, False), (None, False)])
def test_only_a_gap_above_the_threshold_is_a_warning(gap: float | None, warned: bool) -> None:
    metrics = {} if gap is None else {"eval/win_rate_gap": gap, "eval/win_rate": 0.5, "eval/judge_win_rate": 0.5 + gap}
    assert bool(gap_warnings(8, metrics, 0.15)) is warned
