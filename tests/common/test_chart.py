import math
import re

import pytest

from k_diffusion.common import chart, html


def polylines(figure):
    return [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r'<polyline[^>]* points="([^"]*)"', figure)
    ]


def values(figure, points):
    """The data that points of a figure stand for, by its own scale."""
    scale = [float(x) for x in re.search(r'data-scale="([^"]*)"', figure)[1].split()]
    x0, x1, y0, y1, log, left, width, top, height = scale
    found = []
    for x, y in points:
        share = y0 + (top + height - y) / height * (y1 - y0)
        found.append((x0 + (x - left) / width * (x1 - x0), 10**share if log else share))
    return found


@pytest.mark.parametrize("log", [True, False])
def test_points_lie_where_the_scale_says(log):
    data = [(0, 0.01), (50, 1.0), (100, 10.0)]
    figure = chart.chart("loss", [chart.Line("a", *zip(*data))], log)
    for got, (x, y) in zip(values(figure, polylines(figure)[0]), data):
        assert got[0] == pytest.approx(x, abs=0.2)
        assert got[1] == (pytest.approx(y, rel=0.01) if log else pytest.approx(y, abs=0.01))


def test_a_negative_value_has_no_logarithmic_axis():
    figure = chart.chart("loss", [chart.Line("a", [0, 1], [-2.0, 3.0])], log=True)
    ends = values(figure, polylines(figure)[0])
    assert [y for _, y in ends] == pytest.approx([-2, 3], abs=0.05)


def test_what_is_not_finite_is_left_out():
    xs, ys = [0, 1, 2, 3], [1.0, math.nan, math.inf, 2.0]
    assert len(polylines(chart.chart("a", [chart.Line("a", xs, ys)]))[0]) == 2
    assert chart.chart("a", [chart.Line("a", [1], [math.nan])]) == ""
    assert chart.chart("a", []) == ""
    assert "<circle" in chart.chart("a", [chart.Line("a", [5], [5.0])])  # one point, one place


def test_a_long_curve_keeps_its_peaks():
    ys = [1 + 1e-6 * i for i in range(100_000)]
    ys[31_415], ys[27_182] = 50.0, -50.0
    points = chart.thin(range(100_000), ys)
    assert len(points) <= 402
    assert {(31_415, 50.0), (27_182, -50.0), (0, 1.0)} <= set(points)
    assert points == sorted(points)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (112, 118), (1e-5, 3e-5), (0, 8e6)])
def test_ticks_are_round_and_within(low, high):
    found = chart.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * high <= x <= high * (1 + 1e-9) for x in found)


@pytest.mark.parametrize(("low", "high"), [(-3, 2), (0, 0.1), (2.95, 3.5), (-0.1, 0.6)])
def test_logarithmic_ticks(low, high):
    found = chart.log_ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-6 <= math.log10(x) <= high + 1e-6 for x in found)
    assert all("e" not in chart.number(x) or x < 1e-4 for x in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (25, "25"), (1000, "1k"), (1234, "1234"), (40000, "40k"), (3.2e6, "3.2M")],
)
def test_short_numbers(value, text):
    assert chart.number(value) == text


def test_pages_are_escaped():
    figure = chart.chart("<x>", [chart.Line("a & <i>", [1, 2], [1, 2])])
    page = html.document("<t>", [figure, html.table(["<h>"], [["<c>"]])])
    for text in "<x>", "& <i>", "<t>", "<h>", "<c>":
        assert text not in page
    assert "a &amp; &lt;i&gt;" in page
