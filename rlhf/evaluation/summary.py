"""The table a run ends with: before and after on held-out prompts."""

import json
from pathlib import Path

from rlhf.ports import Monitor

ROWS = (
    ("judge score", "eval/score", "{:.3f}"),
    ("win rate against round 0", "eval/win_rate", "{:.3f}"),
    ("  95 % interval, low", "eval/win_rate_low", "{:.3f}"),
    ("  95 % interval, high", "eval/win_rate_high", "{:.3f}"),
    ("win rate by the training judge", "eval/judge_win_rate", "{:.3f}"),
    ("  gap to the evaluation's judge", "eval/win_rate_gap", "{:+.3f}"),
    ("comparisons without a verdict", "eval/invalid_rate", "{:.0%}"),
    ("verdicts that flip with the order", "eval/flip_rate", "{:.0%}"),
    ("response length, tokens", "eval/length_mean", "{:.1f}"),
    ("distinct bigrams", "eval/distinct_2", "{:.3f}"),
)


Rows = tuple[tuple[str, str, str], ...]
"""(label, metric, format) of each row of a table."""


def show_summary(run_dir: Path, monitor: Monitor, rows: Rows = ROWS, what: str = "held-out prompts") -> None:
    """Show the first and the last `eval` event of metrics.jsonl side by side; what neither has is no row."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evals = [event for line in lines if (event := json.loads(line))["event"] == "eval"]
    if len(evals) < 2:
        return
    first, last = evals[0], evals[-1]

    def shown(event: dict[str, float], key: str, form: str) -> str:
        value = event.get(key)
        return "" if value is None else form.format(value)

    table = [(name, shown(first, key, form), shown(last, key, form)) for name, key, form in rows]
    table = [row for row in table if any(row[1:])]
    monitor.table("before and after", (what, f"round {first['round']}", f"round {last['round']}"), table)
