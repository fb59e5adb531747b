"""A judge's report for a person."""

import math
from collections.abc import Iterator

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rlhf.evaluation.judge_bench import Accuracy, BenchReport
from rlhf.evaluation.rewardbench import PUBLISHED_MODEL


def show_bench(report: BenchReport, console: Console) -> None:
    """Print accuracies, RewardBench's categories where there are any, and the judge's habits."""
    parts = [_accuracies(report)]
    if report.rewardbench:
        parts.append(_categories(report))
    console.print(Group(*parts, *(Text(line) for line in _lines(report))))


def _accuracies(report: BenchReport) -> Table:
    table = Table(title=f"accuracy, ties {report.ties}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("pairs")
    for name in ("n", "accuracy", "95 % interval", "mean p", "ties", "invalid"):
        table.add_column(name, justify="right", no_wrap=True)
    groups = {"all": report.overall, **report.subsets, **report.by_length}
    for name, group in groups.items():
        table.add_row(Text(name), *_cells(group))
    return table


def _cells(group: Accuracy) -> tuple[str, ...]:
    interval = f"{group.low:.3f} to {group.high:.3f}"
    return (
        str(group.n),
        f"{group.accuracy:.3f}",
        interval,
        f"{group.mean_p:.3f}",
        str(group.ties),
        str(group.invalid),
    )


def _categories(report: BenchReport) -> Table:
    table = Table(title="RewardBench, by mean p", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("category")
    for name in ("score", "95 % interval", "rows", "expected"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in report.rewardbench:
        rows = str(each.rows) if each.rows == each.expected else f"{each.rows} of {each.expected}"
        interval = f"{each.low:.1f} to {each.high:.1f}"
        table.add_row(each.name, f"{each.score:.1f}", interval, rows, f"{each.published:.1f}")
    return table


def _lines(report: BenchReport) -> Iterator[str]:
    health, calibration = report.health, report.calibration
    yield (
        f"flips {health['flip_rate']:.1%}, ties {health['tie_rate']:.1%} (of the valid), "
        f"invalid {health['invalid_rate']:.1%}"
    )
    first = "none" if math.isnan(report.first_shown) else f"{report.first_shown:.3f}"
    yield f"length bias {health['length_bias']:+.3f}, mean p of the response shown first {first}"
    if calibration.n:
        yield f"calibration: ECE {calibration.ece:.3f}, Brier {calibration.brier:.3f}"
    if report.rewardbench:
        yield f"expected: published for {PUBLISHED_MODEL}"
        if missing := [name for each in report.rewardbench for name in each.missing]:
            yield f"categories are over the subsets present; missing: {', '.join(missing)}"
    for reason, count in report.invalid_reasons.items():
        yield f"invalid: {count} x {reason}"
