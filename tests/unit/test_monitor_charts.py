"""Charts are exact: coordinates are checked against the scale they print."""

import itertools
import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.monitor.charts import HEIGHT, WIDTH, Chart, Series, line_chart, nice_ticks, number_text, stacked_bars

FLOATS = st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-6)


def parsed(chart: Chart | None) -> ET.Element:
    assert chart is not None
    return ET.fromstring(chart.svg)


def y_scale(root: ET.Element) -> tuple[float, float]:
    """(slope, offset) of pixel = offset + slope * value, from the first and last axis label."""
    ticks = [node for node in root.iter("text") if node.get("text-anchor") == "end"]
    values = [float((node.text or "").replace(",", "").replace("−", "-")) for node in ticks]
    pixels = [float(node.get("y", "nan")) - 4 for node in ticks]
    slope = (pixels[-1] - pixels[0]) / (values[-1] - values[0])
    return slope, pixels[0] - slope * values[0]


@settings(deadline=None)
@given(FLOATS, FLOATS)
def test_ticks_are_even_and_enclose_the_range(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= 8
    assert all(math.isclose(y - x, step, rel_tol=1e-6) for x, y in itertools.pairwise(ticks))
    assert f"{step:.4e}".split("e")[0] in {"1.0000", "2.0000", "2.5000", "5.0000"}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), FLOATS), min_size=1, max_size=20, unique_by=lambda point: point[0]))
def test_points_lie_where_the_axis_says(points: list[tuple[int, float]]) -> None:
    points.sort()
    root = parsed(line_chart("t", [Series("s", points)], "round"))
    slope, offset = y_scale(root)
    dots = list(root.iter("circle"))
    assert len(dots) == len(points)
    for dot, (_, y) in zip(dots, points, strict=True):
        assert float(dot.get("cy", "nan")) == pytest.approx(offset + slope * y, abs=0.75)
        assert 0 <= float(dot.get("cx", "nan")) <= WIDTH
        assert 0 <= float(dot.get("cy", "nan")) <= HEIGHT
    xs = [float(dot.get("cx", "nan")) for dot in dots]
    assert xs == sorted(xs)


def test_an_interval_is_drawn_from_low_to_high() -> None:
    series = Series("win", [(4, 0.6), (8, 0.8)], [(4, 0.5, 0.7), (8, 0.7, 0.9)])
    chart = line_chart("t", [series], "round", reference=0.5)
    root = parsed(chart)
    slope, offset = y_scale(root)
    polygon = next(root.iter("polygon")).get("points", "").split()
    drawn = [(float(point.split(",")[1]) - offset) / slope for point in polygon]
    assert drawn == pytest.approx([0.7, 0.9, 0.7, 0.5], abs=0.002)
    assert chart is not None
    assert chart.rows == (("4", "0.6", "0.5 – 0.7"), ("8", "0.8", "0.7 – 0.9"))
    assert "round 4, win: 0.6 (0.5 to 0.7)" in [node.text for node in root.iter("title")]


def test_bars_stack_to_their_sum() -> None:
    chart = stacked_bars("t", [1, 2], [("a", [3.0, 0.0]), ("none", [0.0, 0.0]), ("b", [1.0, 2.0])], "round", "s")
    root = parsed(chart)
    slope, offset = y_scale(root)
    bars = [(float(r.get("y", "nan")), float(r.get("height", "nan"))) for r in root.iter("rect")]
    values = [((y - offset) / slope, -height / slope) for y, height in bars]
    assert [value for pair in values for value in pair] == pytest.approx([3, 3, 4, 1, 0, 0, 2, 2], abs=0.01)
    assert chart is not None
    assert chart.labels == ("a", "b")
    assert chart.rows == (("1", "3", "1", "4"), ("2", "0", "2", "2"))


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("t", [Series("s", [])], "round") is None
    assert stacked_bars("t", [1], [("a", [0.0])], "round", "s") is None
    assert stacked_bars("t", [], [], "round", "s") is None


def test_labels_are_escaped() -> None:
    evil = '<script>"&'
    root = parsed(line_chart(evil, [Series(evil, [(1, 1.0)])], evil))
    assert root.get("aria-label", "").startswith(evil)
    assert "script" not in {node.tag for node in root.iter()}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.64567, "0.6457"), (27, "27"), (12345.6, "12,346"), (3e-5, "3.00e-05"), (-2.5, "-2.5")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number_text(value) == text
