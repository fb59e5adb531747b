"""Is the evaluation's judge to be trusted? Its rates, warnings and least share, and identical responses."""

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from rlhf.config import RunConfig
from rlhf.config.judge import Judge as JudgeConfig
from rlhf.config.judge import SentimentJudge as SentimentConfig
from rlhf.errors import RLHFError
from rlhf.evaluation.evaluate import evaluate
from rlhf.evaluation.loop import Evaluator
from rlhf.evaluation.summary import show_summary
from rlhf.judging.identical import gives_scores
from rlhf.judging.sentiment import SentimentJudge
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.ports import Judge
from rlhf.records import Comparison, Message, Prompt, Rollout, SampleRequest, Verdict, VerdictState, VersionSpan

PROMPTS = tuple(Prompt(f"u{n}", (Message(role="user", content=f"q{n}"),), f"q{n}", (n, 1)) for n in range(4))
PAIR_MODEL = {"type": "pair_model", "path": "m"}


ORDERS = {"w": (0.9, 0.9), "l": (0.1, 0.1), "t": (0.5, 0.5), "f": (0.9, 0.2)}


class Letters:
    """Judges by the first letter of A: (w)in, (l)oss, (t)ie, (f)lip, or x, which it cannot judge; no scores."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.asked += [(c.a, c.b) for c in comparisons]
        return [
            invalid_verdict(c, "HTTP 503") if c.a[0] == "x" else make_verdict(c, *ORDERS[c.a[0]]) for c in comparisons
        ]


class CountingSentiment(SentimentJudge):
    """The sentiment judge, and how often it was asked."""

    def __init__(self) -> None:
        super().__init__(SentimentConfig())
        self.asked = 0

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.asked += len(comparisons)
        return await super().compare(comparisons)


def rollouts(*texts: str) -> list[Rollout]:
    """One response a prompt."""
    return [
        Rollout(prompt.uid, 0, (5, 6), (-0.5,) * 2, text, "stop", (VersionSpan(0, 0, 2),))
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]


BASELINE = rollouts("w base", "l base", "x base", "x other")


async def test_identical_responses_tie_without_asking() -> None:
    judge, training = Letters(), Letters()
    policy = rollouts("w base", "w", "x base", "l")
    metrics, verdicts = await evaluate(policy, BASELINE, PROMPTS, judge, training_judge=training)
    assert judge.asked == training.asked == [("w", "l base"), ("l", "x other")]
    states = [VerdictState.TIE, VerdictState.WIN, VerdictState.TIE, VerdictState.LOSE]
    assert [verdict.state for verdict in verdicts] == states
    assert [verdict.p for verdict in verdicts] == [0.5, 0.9, 0.5, 0.1]
    assert verdicts[0].reason == "the responses are identical"
    assert [verdict.comparison.uid for verdict in verdicts] == [prompt.uid for prompt in PROMPTS]
    assert metrics["eval/win_rate"] == 0.5
    assert metrics["eval/judge_win_rate"] == 0.5


async def test_nothing_to_ask_has_no_rates() -> None:
    judge = Letters()
    metrics, verdicts = await evaluate(BASELINE, BASELINE, PROMPTS, judge)
    assert judge.asked == []
    assert metrics["eval/win_rate"] == 0.5
    assert not {"eval/invalid_rate", "eval/flip_rate", "eval/score"} & set(metrics)
    assert len(verdicts) == 4


async def test_identical_responses_are_scored_where_scores_are_given() -> None:
    judge, training = CountingSentiment(), CountingSentiment()
    policy = rollouts("wonderful", "l base", "x base", "x other")
    metrics, verdicts = await evaluate(policy, BASELINE, PROMPTS, judge, training_judge=training, scored=True)
    assert (judge.asked, training.asked) == (4, 1)
    assert metrics["eval/score"] == pytest.approx(sum(verdict.score_a or 0.0 for verdict in verdicts) / 4)
    assert verdicts[0].score_a is not None
    assert verdicts[0].score_a > 0.1


async def test_rates_are_of_what_was_asked() -> None:
    policy = rollouts("f", "w", "x", "x other")
    metrics, _ = await evaluate(policy, BASELINE, PROMPTS, Letters())
    assert metrics["eval/invalid_rate"] == pytest.approx(1 / 3)
    assert metrics["eval/flip_rate"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("fields", "scored"),
    [
        ({"type": "sentiment"}, True),
        ({"type": "verifier"}, True),
        ({"type": "reward_model", "path": "m"}, True),
        ({"type": "safety", "path": "m"}, True),
        ({"type": "python", "function": "m:f"}, True),
        ({"type": "python", "function": "m:f", "kind": "compare"}, False),
        (PAIR_MODEL, False),
        ({"type": "llm", "base_url": "https://h/v1", "model": "m"}, False),
        ({"type": "ensemble", "members": [{"judge": {"type": "sentiment"}}] * 2}, False),
    ],
    ids=lambda value: value["type"] + value.get("kind", "") if isinstance(value, dict) else "",
)
def test_judges_that_give_scores(fields: dict[str, Any], scored: bool) -> None:
    assert gives_scores(TypeAdapter(JudgeConfig).validate_python(fields)) is scored


class Ports:
    """Generators that answer with whatever texts are set, and a monitor that keeps what it hears."""

    def __init__(self) -> None:
        self.now = BASELINE
        self.logged: list[dict[str, float]] = []
        self.alerts: list[str] = []
        self.rows: list[Sequence[Any]] = []

    async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
        for rollout in self.now:
            yield rollout

    def log(self, event: str, round: int, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append(dict(metrics))

    def alert(self, message: str) -> None:
        self.alerts.append(message)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.rows = list(rows)

    def progress(self, name: str, total: int | None) -> "Ports":
        return self

    def advance(self, amount: int = 1) -> None:
        return None

    def __enter__(self) -> "Ports":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def evaluator(ports: Any, asked: Judge, run_dir: Path, **sections: Any) -> Evaluator:
    base = {"name": "r", "policy": {"path": "m"}, "prompts": {"path": "p.jsonl"}, "evaluation": {"samples": 1}}
    return Evaluator(RunConfig.model_validate(base | sections), PROMPTS, ports, asked, ports, run_dir)


@pytest.mark.parametrize("key", ["judge", "eval_judge"])
async def test_an_unhealthy_judge_is_said_by_its_key(key: str, tmp_path: Path) -> None:
    """Without eval_judge the thresholds are those of judge, with it they are its own."""
    ports = Ports()
    lax = {"max_flip_rate": 1, "max_invalid_rate": 1, "max_tie_rate": 1}
    sections = {"judge": PAIR_MODEL | {"health": lax}, "eval_judge": PAIR_MODEL | {"max_length": 99}}
    if key == "judge":
        sections = {"judge": PAIR_MODEL}
    running = evaluator(ports, Letters(), tmp_path, **sections)
    await running.evaluate(0)
    assert ports.alerts == []
    ports.now = rollouts("f", "x", "f", "x other")
    metrics = await running.evaluate(4)
    assert (metrics["eval/invalid_rate"], metrics["eval/flip_rate"]) == (pytest.approx(1 / 3), 1.0)
    flips, invalid = ports.alerts
    assert flips.startswith(f"evaluation of round 4: {key}: 100% of verdicts flip")
    assert f"{key}: 33% of comparisons could not be judged" in invalid
    file = tmp_path / "evaluation/round-0004-verdicts.parquet"
    assert "evaluation/round-0004-verdicts.parquet" in invalid
    rows = pq.read_table(file).to_pylist()
    assert [(row["state"], row["reason"]) for row in rows if row["uid"] == "u1"] == [("invalid", "HTTP 503")]


async def test_too_few_verdicts_stop_the_run_before_anything_is_logged(tmp_path: Path) -> None:
    ports = Ports()
    running = evaluator(ports, Letters(), tmp_path, judge=PAIR_MODEL | {"health": {"min_valid": 0.5}})
    await running.evaluate(0)
    ports.now = rollouts("x", "x", "w", "x other")  # the last one was not asked and counts for nothing
    with pytest.raises(
        RLHFError, match=r"^evaluation of round 4: only 33.3% of 3 .* judge\.health\.min_valid = 0.5.*503"
    ):
        await running.evaluate(4)
    assert len(ports.logged) == 1
    ports.now = rollouts("w", "x", "w", "x other")
    await running.catch_up(4, last=False)  # not marked as evaluated: a start again tries it again
    assert ports.logged[1]["eval/invalid_rate"] == pytest.approx(1 / 3)


async def test_round_0_keeps_the_score_and_asks_no_judge_without_one(tmp_path: Path) -> None:
    ports, judge, letters = Ports(), CountingSentiment(), Letters()
    metrics = await evaluator(ports, judge, tmp_path).evaluate(0)
    assert (judge.asked, "eval/score" in metrics) == (4, True)
    metrics = await evaluator(ports, letters, tmp_path, judge=PAIR_MODEL).evaluate(0)
    assert (letters.asked, set(metrics)) == ([], {"eval/length_mean", "eval/distinct_2"})
    assert ports.alerts == []


def test_the_closing_table_shows_the_rates(tmp_path: Path) -> None:
    ports: Any = Ports()
    events = [
        {"event": "eval", "round": 0},
        {"event": "eval", "round": 4, "eval/invalid_rate": 0.25, "eval/flip_rate": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    show_summary(tmp_path, ports)
    assert [tuple(row[1:]) for row in ports.rows] == [("", "25%"), ("", "100%")]
