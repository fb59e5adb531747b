"""`rlhf report`: one self-contained HTML page about a run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf.files import write_atomic
from rlhf.monitor.charts import Chart, Series, line_chart, number_text, stacked_bars
from rlhf.monitor.format import StepMeans, duration, kept_and_seen
from rlhf.monitor.runfiles import RunFiles, StoredTable, read_run
from rlhf.monitor.sink import Cell, Event, Number

FILE_NAME = "report.html"
_PARTS = ("generate", "judge", "reference", "learn", "sync")
_DONE = {"TRAINED", "PUBLISHED"}


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html from metrics.jsonl, config.yaml, the manifests and the stored tables; returns its path.

    The page loads nothing from anywhere and escapes all data. Raises `InputError` if there is nothing to report.
    """
    run = read_run(run_dir)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # charts escape their own texts
    html = environment.get_template("template.html").render(page=_page(run))
    path = run_dir / FILE_NAME
    write_atomic(path, html.encode("utf-8", "replace"))
    return path


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with the responses before and after training; scores are texts, empty if there are none."""

    prompt: str
    before: str
    after: str
    score_before: str
    score_after: str
    before_title: str
    after_title: str

    COLUMNS: ClassVar[tuple[str, ...]] = ("prompt", "before", "after", "score before", "score after")


def _page(run: RunFiles) -> dict[str, Any]:
    rounds = _by_round(run.events, "round")
    evals = _by_round(run.events, "eval")
    config = run.config.get("config") if isinstance(run.config.get("config"), dict) else run.config
    assert isinstance(config, dict)
    samples = [sample for table in run.tables if (found := side_by_side(table)) for sample in found]
    status, tone = _status(run, config, rounds)
    charts = [chart for chart in _charts(run.events, rounds, evals) if chart]
    return {
        "name": config.get("name") or run.path.resolve().name,
        "policy": (config.get("policy") or {}).get("path", "") if isinstance(config.get("policy"), dict) else "",
        "status": status,
        "tone": tone,
        "times": _times(run.events),
        "tiles": _tiles(run.events, rounds, evals),
        "charts": charts,
        "samples": samples,
        "tables": [_shown(table) for table in run.tables if side_by_side(table) is None],
        "rounds": _round_table(run, rounds),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    }


def _by_round(events: Sequence[Event], kind: str) -> dict[int, dict[str, Number]]:
    """Metrics of a kind by round; where a round was logged twice, the later numbers."""
    found: dict[int, dict[str, Number]] = {}
    for event in events:
        if event.event == kind:
            found.setdefault(event.round, {}).update(event.metrics)
    return dict(sorted(found.items()))


def _status(run: RunFiles, config: dict[str, Any], rounds: dict[int, dict[str, Number]]) -> tuple[str, str]:
    last = max([*rounds, *(r for r, state in run.states.items() if state in _DONE)], default=0)
    section = config.get("rounds")
    count = section.get("count") if isinstance(section, dict) else None
    if not isinstance(count, int):
        return f"{last} rounds", "open"
    if last >= count:
        return f"finished: {count} of {count} rounds", "done"
    return f"not finished: {last} of {count} rounds", "open"


def _times(events: Sequence[Event]) -> str:
    first, last = min(event.time for event in events), max(event.time for event in events)
    start = datetime.fromtimestamp(first, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"first metrics {start}, last {duration(last - first)} later"


def _tiles(
    events: Sequence[Event], rounds: dict[int, dict[str, Number]], evals: dict[int, dict[str, Number]]
) -> list[tuple[str, str, str]]:
    """(label, figure, note) of the final figures."""
    tiles = []
    wins = [(r, m) for r, m in evals.items() if m.get("eval/win_rate") is not None]
    if wins:
        round, metrics = wins[-1]
        low, high = metrics.get("eval/win_rate_low"), metrics.get("eval/win_rate_high")
        interval = f"{low:.2f} to {high:.2f}, " if low is not None and high is not None else ""
        tiles.append(("Win rate against round 0", f"{metrics['eval/win_rate']:.2f}", f"{interval}round {round}"))
    scores = [(r, m["eval/score"]) for r, m in evals.items() if m.get("eval/score") is not None]
    if len(scores) > 1:
        figure = f"{scores[0][1]:.3f} → {scores[-1][1]:.3f}"
        tiles.append(("Held-out judge score", figure, f"round {scores[0][0]} → round {scores[-1][0]}"))
    elif scores:
        tiles.append(("Held-out judge score", f"{scores[0][1]:.3f}", f"round {scores[0][0]}"))
    counts = [pair for metrics in rounds.values() if (pair := kept_and_seen(metrics))]
    if counts:
        kept, seen = sum(pair[0] for pair in counts), sum(pair[1] for pair in counts)
        share = f"{kept / seen:.0%} of {seen:,} judged" if seen else "none judged"
        tiles.append(("Pairs trained on", f"{kept:,}", share))
    steps = sum(event.event == "step" for event in events)
    tiles.append(("Optimizer steps", f"{steps:,}", f"in {len(rounds)} rounds"))
    totals = [total for m in rounds.values() if (total := m.get("timing_s/total")) is not None]
    if totals:
        tiles.append(("Time in rounds", duration(sum(totals)), f"{duration(sum(totals) / len(totals))} a round"))
    return tiles


def _charts(
    events: Sequence[Event], rounds: dict[int, dict[str, Number]], evals: dict[int, dict[str, Number]]
) -> list[Chart | None]:
    win = Series("win rate", _points(evals, "eval/win_rate"), _band(evals))
    outcomes = {"pairs/kept": "kept", "pairs/dropped_tie": "dropped: tie", "pairs/dropped_invalid": "dropped: invalid"}
    outcomes |= {
        name: f"dropped: {name.removeprefix('pairs/dropped_')}"
        for metrics in rounds.values()
        for name in sorted(metrics)
        if name.startswith("pairs/dropped_") and name not in outcomes
    }
    speeds = [
        Series("generation", _points(rounds, "rollout/tokens_per_s")),
        Series("learning", _points(rounds, "perf/learner_tokens_per_s")),
    ]
    steps = {name: _steps(events, name) for name in _STEP_METRICS}
    rewards = [Series(label, steps[f"rewards/{label}"]) for label in ("margins", "chosen", "rejected")]
    seconds = {f"timing_s/{part}": part for part in _PARTS}
    step = "optimizer step"
    return [
        line_chart("Win rate against the first policy", [win], "round", reference=0.5),
        line_chart("Held-out judge score", [Series("score", _points(evals, "eval/score"))], "round"),
        line_chart("Loss", [Series("loss", steps["train/loss"])], step),
        line_chart("Rewards and their margin", rewards, step),
        line_chart("Reward accuracy", [Series("accuracy", steps["rewards/accuracies"])], step, reference=0.5),
        stacked_bars("Pairs by round", list(rounds), _stack(rounds, outcomes), "round", "pairs"),
        line_chart("KL from the reference", [Series("KL", steps["kl/mean"])], step, zero=True),
        stacked_bars("Time by round, in seconds", list(rounds), _stack(rounds, seconds), "round", "s"),
        line_chart("Tokens per second", speeds, "round", zero=True),
        line_chart(
            "Contradicting verdicts", [Series("flip rate", _points(rounds, "judge/flip_rate"))], "round", zero=True
        ),
    ]


_STEP_METRICS = ("train/loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "kl/mean")


def _points(by_round: dict[int, dict[str, Number]], name: str) -> list[tuple[float, float]]:
    return [(r, value) for r, metrics in by_round.items() if (value := metrics.get(name)) is not None]


def _band(evals: dict[int, dict[str, Number]]) -> list[tuple[float, float, float]]:
    low, high = dict(_points(evals, "eval/win_rate_low")), dict(_points(evals, "eval/win_rate_high"))
    return [(r, low[r], high[r]) for r in low if r in high and evals[int(r)].get("eval/win_rate") is not None]


def _steps(events: Sequence[Event], name: str) -> list[tuple[float, float]]:
    """A step metric against the step; where a step was logged twice, the later value."""
    found = {}
    for event in events:
        value = event.metrics.get(name)
        if event.event == "step" and event.step is not None and value is not None:
            found[float(event.step)] = float(value)
    return sorted(found.items())


def _stack(by_round: dict[int, dict[str, Number]], names: dict[str, str]) -> list[tuple[str, list[float]]]:
    return [(label, [max(0.0, m.get(name) or 0.0) for m in by_round.values()]) for name, label in names.items()]


def _round_table(run: RunFiles, rounds: dict[int, dict[str, Number]]) -> StoredTable:
    means = StepMeans()
    for event in run.events:
        if event.event == "step":
            means.add(event.round, event.metrics)
    names = {
        "train/loss": "loss",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
        "judge/score_mean": "score",
        "judge/flip_rate": "flips",
        "timing_s/total": "seconds",
    }
    rows: list[list[Cell]] = []
    for round in sorted(set(rounds) | set(run.states)):
        metrics = {**means.pop(round), **rounds.get(round, {})}
        counts = kept_and_seen(metrics)
        kept = f"{counts[0]} / {counts[1]}" if counts else "–"
        cells = [_text(metrics.get(name)) for name in names]
        rows.append([str(round), run.states.get(round, "") or "–", kept, *cells])
    return StoredTable("rounds", ["round", "state", "pairs kept", *names.values()], rows)


def side_by_side(table: StoredTable) -> list[Sample] | None:
    """The samples of a table with the columns prompt, before... and after... (and maybe scores); else None.

    A column may say more than its first word, as in `after (round 8)`.
    """
    index = {name: i for name in Sample.COLUMNS for i, column in enumerate(table.columns) if _means(column, name)}
    if not {"prompt", "before", "after"} <= index.keys():
        return None

    def cell(row: list[Cell], column: str) -> str:
        return _text(row[index[column]]) if column in index else ""

    titles = [_title(table.columns[index["before"]]), _title(table.columns[index["after"]])]
    texts = [[cell(row, name) for name in Sample.COLUMNS] + titles for row in table.rows]
    return [Sample(*row) for row in texts]


def _means(column: str, name: str) -> bool:
    return re.match(rf"{name}\b", column.strip().lower().replace("_", " ")) is not None


def _title(column: str) -> str:
    return column.strip()[:1].upper() + column.strip()[1:]


def _shown(table: StoredTable) -> StoredTable:
    return StoredTable(table.name, table.columns, [[_text(cell) for cell in row] for row in table.rows])


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, (bool, str)):
        return str(cell)
    return number_text(cell)
