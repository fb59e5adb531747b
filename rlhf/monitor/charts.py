"""Small inline SVG charts for the report. Colours are CSS classes, so a page can follow light and dark mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 12, 38
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """Named (x, y) points in order of x; `band` holds (x, low, high) of an interval around them."""

    label: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart: `svg` is markup with all text escaped; `columns` and `rows` are its numbers, for a table."""

    title: str
    svg: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plot area's coordinates."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - _TOP - _BOTTOM)


def line_chart(
    title: str, series: Sequence[Series], x_label: str, *, reference: float | None = None, zero: bool = False
) -> Chart | None:
    """Lines with markers and intervals; None if there is no point.

    `reference` draws a dashed level (0.5 for a win rate); `zero` makes the axis start at 0.
    """
    series = [item for item in series if item.points]
    if not series:
        return None
    xs = [x for item in series for x, _ in item.points]
    ys = [y for item in series for _, y in item.points]
    ys += [edge for item in series for _, low, high in item.band for edge in (low, high)]
    ys += [reference] if reference is not None else []
    ticks = nice_ticks(min([*ys, 0.0] if zero else ys), max(ys))
    pad = 0.03 * (max(xs) - min(xs)) or 1.0
    frame = _Frame(min(xs) - pad, max(xs) + pad, ticks[0], ticks[-1])
    body = _axes(frame, ticks, _whole_ticks(min(xs), max(xs)), x_label)
    if reference is not None:
        y = frame.y(reference)
        body.append(f'<line class="ref" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for number, item in enumerate(series):
        body += _line(frame, item, number, x_label)
    summary = "; ".join(
        f"{item.label}: {number_text(item.points[0][1])} to {number_text(item.points[-1][1])}" for item in series
    )
    columns, rows = _line_rows(series, x_label)
    return Chart(title, _svg(title, summary, body), tuple(item.label for item in series), columns, rows)


def stacked_bars(
    title: str, xs: Sequence[int], parts: Sequence[tuple[str, Sequence[float]]], x_label: str, unit: str
) -> Chart | None:
    """One bar an x, the parts stacked from the bottom; None without bars. Values are not negative."""
    parts = [(label, values) for label, values in parts if any(value > 0 for value in values)]
    if not xs or not parts:
        return None
    totals = [sum(values[i] for _, values in parts) for i in range(len(xs))]
    ticks = nice_ticks(0.0, max(totals))
    frame = _Frame(min(xs) - 0.5, max(xs) + 0.5, ticks[0], ticks[-1])
    body = _axes(frame, ticks, _whole_ticks(min(xs), max(xs)), x_label)
    half = 0.36
    for i, x in enumerate(xs):
        base = 0.0
        left, width = frame.x(x - half), frame.x(x + half) - frame.x(x - half)
        for number, (label, values) in enumerate(parts):
            top = base + values[i]
            tip = _tip(f"{x_label} {x}, {label}: {number_text(values[i])} {unit}")
            body.append(
                f'<rect class="fill c{number % 6}" x="{left:.1f}" y="{frame.y(top):.1f}" width="{width:.1f}" '
                f'height="{frame.y(base) - frame.y(top):.1f}">{tip}</rect>'
            )
            base = top
    summary = f"total: {number_text(totals[0])} to {number_text(totals[-1])} {unit}"
    rows = tuple(
        (str(x), *(number_text(values[i]) for _, values in parts), number_text(totals[i])) for i, x in enumerate(xs)
    )
    labels = tuple(label for label, _ in parts)
    return Chart(title, _svg(title, summary, body), labels, (x_label, *labels, "sum"), rows)


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Evenly spaced round numbers that enclose [low, high]; a flat range is widened."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / target
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number_text(value: float) -> str:
    """At most four significant digits, thousands grouped, no exponent in the usual range."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.2e}"


def _whole_ticks(low: float, high: float) -> list[float]:
    """Whole numbers in [low, high], about eight at most."""
    step = max(1, math.ceil((high - low) / 8))
    step = next(factor * 10**power for power in range(12) for factor in (1, 2, 5) if factor * 10**power >= step)
    return [float(x) for x in range(math.ceil(low / step) * step, math.floor(high) + 1, step)]


def _axes(frame: _Frame, y_ticks: list[float], x_ticks: list[float], x_label: str) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    digits = max(0, 1 - math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9))
    digits = min((d for d in range(digits + 1) if all(abs(round(t, d) - t) < 1e-9 for t in y_ticks)), default=digits)
    parts = []
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick, digits)}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text class="tick" x="{frame.x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.0f}</text>'
        )
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return parts


def _tick(value: float, digits: int) -> str:
    return f"{value + 0.0:,.{digits}f}".replace("-", "−")  # adding 0.0 turns -0.0 into 0.0


def _line(frame: _Frame, item: Series, number: int, x_label: str) -> list[str]:
    color = f"c{number % 6}"
    parts = []
    if item.band:
        edge = [(x, high) for x, _, high in item.band] + [(x, low) for x, low, _ in reversed(item.band)]
        parts.append(f'<polygon class="band {color}" points="{_coordinates(frame, edge)}"/>')
        for x, low, high in item.band:
            at = f'x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}"'
            parts.append(f'<line class="whisker {color}" {at} y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"/>')
    parts.append(f'<polyline class="line {color}" points="{_coordinates(frame, item.points)}"/>')
    radius = 3.2 if len(item.points) <= 40 else 1.6
    intervals = {x: f" ({number_text(low)} to {number_text(high)})" for x, low, high in item.band}
    for x, y in item.points:
        tip = _tip(f"{x_label} {x:g}, {item.label}: {number_text(y)}{intervals.get(x, '')}")
        parts.append(
            f'<circle class="dot {color}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}">{tip}</circle>'
        )
    return parts


def _line_rows(series: Sequence[Series], x_label: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    columns = [x_label]
    cells: list[dict[float, str]] = []
    for item in series:
        columns.append(item.label)
        cells.append({x: number_text(y) for x, y in item.points})
        if item.band:
            columns.append(f"{item.label}, interval")
            cells.append({x: f"{number_text(low)} – {number_text(high)}" for x, low, high in item.band})
    xs = sorted({x for item in series for x, _ in item.points})
    return tuple(columns), tuple((f"{x:g}", *(column.get(x, "–") for column in cells)) for x in xs)


def _coordinates(frame: _Frame, points: Sequence[Point]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _svg(title: str, summary: str, body: list[str]) -> str:
    label = escape(f"{title}. {summary}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'
