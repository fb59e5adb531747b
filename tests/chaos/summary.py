"""What chaos runs went through, as JSON and as a table."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.chaos.harness import Injection, Outcome
from tests.chaos.schedule import Kind

Summary = dict[str, Any]


def summarise(name: str, outcome: Outcome, wrong: Sequence[str]) -> Summary:
    """One run's summary."""
    return {
        "run": name,
        "faults": [_row(injection) for injection in outcome.injections],
        "kills": sum(injection.fault.kind != Kind.FULL_DISK for injection in outcome.injections),
        "controller_starts": outcome.starts,
        "failed_starts": outcome.failed_starts,
        "node_starts": outcome.nodes,
        "rounds": len(outcome.sealed),
        "minutes": round(outcome.seconds / 60, 2),
        "steps_again": sum(injection.steps_again for injection in outcome.injections),
        "wrong": list(wrong),
    }


def _row(injection: Injection) -> dict[str, Any]:
    fault, seconds = injection.fault, injection.recovered_s
    return {
        "kind": fault.kind,
        "moment": fault.moment,
        "found": injection.found,
        "at_s": round(injection.at_s, 1),
        "recovered_s": None if seconds is None else round(seconds, 1),
        "steps_again": injection.steps_again,
    }


def table(summaries: Sequence[Summary]) -> str:
    """All runs together, a line for each kind of fault, in Markdown."""
    rows = [row for summary in summaries for row in summary["faults"]]
    lines = [
        "| fault | times | while | next new step after, median (longest) | steps taken again |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in Kind:
        of_kind = [row for row in rows if row["kind"] == kind]
        if not of_kind:
            continue
        moments = Counter(str(row["moment"]) for row in of_kind)
        shown = ", ".join(f"{moment} {count}" if count > 1 else moment for moment, count in sorted(moments.items()))
        seconds = [row["recovered_s"] for row in of_kind if row["recovered_s"] is not None]
        waits = f"{statistics.median(seconds):.0f} s ({max(seconds):.0f} s)" if seconds else "none was left"
        again = sum(row["steps_again"] for row in of_kind)
        lines.append(f"| {kind} | {len(of_kind)} | {shown} | {waits} | {again} |")
    total = {key: sum(summary[key] for summary in summaries) for key in ("kills", "controller_starts", "rounds")}
    wrong = [f"{summary['run']}: {line}" for summary in summaries for line in summary["wrong"]]
    lines += [
        "",
        f"{len(summaries)} runs, {total['rounds']} rounds, {total['kills']} kills, "
        f"{total['controller_starts']} starts of the controller "
        f"({sum(len(summary['failed_starts']) for summary in summaries)} failed, of actors killed meanwhile), "
        f"{sum(summary['node_starts'] for summary in summaries)} of the second node, "
        f"{sum(summary['minutes'] for summary in summaries):.1f} minutes, "
        f"{sum(summary['steps_again'] for summary in summaries)} steps taken again.",
        "Nothing is wrong." if not wrong else "\n".join(["Wrong:", *wrong]),
    ]
    return "\n".join(lines)
