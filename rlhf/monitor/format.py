"""The words of a round's summary: which metrics are shown, under which short names."""

from collections import defaultdict
from collections.abc import Mapping

from rlhf.monitor.sink import Number

# Reference log-probs are part of learning, and checkpoints are written meanwhile: both are left to the report.
_PARTS = {"generate": "gen", "judge": "judge", "reference": "ref", "learn": "learn", "sync": "sync", "total": "total"}
_INDENT = "    "


class StepMeans:
    """Means of a round's step metrics; what is null does not count."""

    def __init__(self) -> None:
        self._values: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, round: int, metrics: Mapping[str, Number]) -> None:
        """Take a step of a round."""
        for name, value in metrics.items():
            if value is not None:
                self._values[round][name].append(value)

    def rewind(self, round: int) -> None:
        """Forget the steps of rounds after `round`: they are taken again."""
        for later in [key for key in self._values if key > round]:
            del self._values[later]

    def pop(self, round: int) -> dict[str, float]:
        """The means of a round, which is then forgotten with all before it."""
        values: Mapping[str, list[float]] = self._values.get(round, {})
        for old in [key for key in self._values if key <= round]:
            del self._values[old]
        return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def round_cells(metrics: Mapping[str, Number]) -> list[str]:
    """`loss 0.621`, `margin  0.14`, ... of equal width from round to round; a missing metric has no cell."""
    cells = [
        _cell("loss", metrics.get("train/loss"), "5.3f"),
        _cell("margin", metrics.get("rewards/margins"), "5.2f"),
        _cell("acc", metrics.get("rewards/accuracies"), "4.2f"),
        _cell("score", metrics.get("judge/score_mean"), "4.2f"),
        _kept(metrics),
        _cell("flips", metrics.get("judge/flip_rate"), "3.0%"),
    ]
    return [cell for cell in cells if cell]


def timing_cells(metrics: Mapping[str, Number]) -> list[str]:
    """` 854 tok/s`, `gen  6.1s`, `judge  0.1s`, ...; a missing part has no cell."""
    speed = metrics.get("rollout/tokens_per_s")
    first = [] if speed is None else [f"{speed:4.0f} tok/s"]
    parts = [(label, metrics.get(f"timing_s/{part}")) for part, label in _PARTS.items()]
    return first + [f"{label} {seconds:4.1f}s" for label, seconds in parts if seconds is not None]


def eval_cells(metrics: Mapping[str, Number], first_score: float | None) -> list[str]:
    """`win 0.71 [0.62, 0.79]`, `by judge 0.80`, `gap +0.09`, `score 0.395 → 0.520`, ..., `invalid 0.8%`, `flips 12.5%`.

    A missing metric has no cell, nor has a judge without fault: `invalid` and `flips` are left out at 0.
    """
    low, high = metrics.get("eval/win_rate_low"), metrics.get("eval/win_rate_high")
    win = _cell("win", metrics.get("eval/win_rate"), "4.2f")
    if win and low is not None and high is not None:
        win += f" [{low:.2f}, {high:.2f}]"
    score = _cell("score", metrics.get("eval/score"), ".3f")
    if score and first_score is not None:
        score = f"score {first_score:.3f} → {metrics['eval/score']:.3f}"
    cells = [
        win,
        _cell("by judge", metrics.get("eval/judge_win_rate"), "4.2f"),
        _cell("gap", metrics.get("eval/win_rate_gap"), "+5.2f"),
        score,
        _cell("length", metrics.get("eval/length_mean"), ".1f"),
        _cell("distinct", metrics.get("eval/distinct_2"), ".2f"),
        _cell("invalid", metrics.get("eval/invalid_rate") or None, ".1%"),
        _cell("flips", metrics.get("eval/flip_rate") or None, ".1%"),
    ]
    return [cell for cell in cells if cell]


def pack(head: str, groups: list[list[str]], width: int) -> list[str]:
    """Lines of cells after `head`, no wider than `width` unless one cell alone is.

    Everything goes on one line if it fits. Otherwise each group starts a line, its cells two spaces apart, or one
    where that saves a further line.
    """
    whole = "  ".join([head, *(cell for group in groups for cell in group)])
    if len(whole) <= width:
        return [whole]
    lines: list[str] = []
    for group in groups:
        if group:
            lines += _pack_group(_INDENT if lines else head, group, width)
    return lines or [head]


def _pack_group(start: str, cells: list[str], width: int) -> list[str]:
    for gap in ("  ", " "):
        line = gap.join([start, *cells])
        if len(line) <= width:
            return [line]
    lines, bare = [start], True
    for cell in cells:
        if not bare and len(lines[-1]) + 1 + len(cell) > width:
            lines.append(_INDENT)
        lines[-1] += f" {cell}"
        bare = False
    return lines


def duration(seconds: float) -> str:
    """`7.2 s`, `3 min 05 s` or `2 h 14 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def kept_and_seen(metrics: Mapping[str, Number]) -> tuple[int, int] | None:
    """Pairs kept, and pairs kept or dropped for whatever reason; None if it was not logged."""
    kept = metrics.get("pairs/kept")
    if kept is None:
        return None
    dropped = sum(value or 0 for name, value in metrics.items() if name.startswith("pairs/dropped_"))
    return round(kept), round(kept + dropped)


def _kept(metrics: Mapping[str, Number]) -> str:
    counts = kept_and_seen(metrics)
    if counts is None:
        return ""
    digits = len(str(counts[1]))
    return f"kept {counts[0]:{digits}d}/{counts[1]}"


def _cell(label: str, value: Number, spec: str) -> str:
    return "" if value is None else f"{label} {value:{spec}}"
