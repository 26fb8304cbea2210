"""Charts put points where their numbers say."""

import itertools
import re

import pytest

from maxlm.eval.svg import (
    Band,
    Bar,
    Line,
    Reference,
    bar_chart,
    format_number,
    line_chart,
    log_ticks,
    nice_ticks,
    smooth,
    thin,
)


def test_ticks_are_round_and_cover_the_range():
    assert nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(1.63, 2.48) == pytest.approx([1.6, 1.8, 2.0, 2.2, 2.4, 2.6])
    for low, high in [(3, 3), (0, 0), (-5e-9, 7e-9), (-1234.5, 98765.4), (0.999, 1.001)]:
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1] or low == high
        assert 3 <= len(ticks) <= 12


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (12.345, "12.35"),
        (2.0, "2"),
        (0.001234, "0.001234"),
        (-3.5, "-3.5"),
        (3.1e-4, "0.00031"),
        (9.99999, "10"),
    ],
)
def test_numbers_are_told_shortly(value, text):
    assert format_number(value) == text


def test_a_line_is_linear_in_its_values():
    svg = line_chart("t", "d", [Line("a", [(0, 0), (50, 5), (100, 10)], "series-1")], x_label="step")
    points = re.search(r'<polyline[^>]*points="([^"]*)"', svg)[1].split()
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in points)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x0 < x2
    assert y0 > y2
    grid = [float(y) for y in re.findall(r'class="grid"[^>]* y1="([\d.]+)"', svg)]
    assert grid[0] == pytest.approx(y0, abs=0.1)
    assert grid[-1] == pytest.approx(y2, abs=0.1)


def test_a_reference_lies_at_its_height_and_labels_do_not_touch():
    references = [Reference("b", 5.0), Reference("c", 5.05)]
    svg = line_chart("t", "d", [Line("a", [(0, 0), (1, 10)], "series-1")], references=references, x_label="step")
    heights = [float(y) for y in re.findall(r'class="reference"[^>]* y1="([\d.]+)"', svg)]
    assert heights[0] == pytest.approx(12 + (240 - 12 - 36) / 2, abs=0.1)
    labels = sorted(float(y) for y in re.findall(r'class="reference-label"[^>]* y="([\d.]+)"', svg))
    assert labels[1] - labels[0] >= 13


def test_hovering_tells_the_values_and_markup_is_escaped():
    svg = line_chart("<t>", "d&", [Line("<a>", [(10, 2.5)], "series-1")], x_label="step")
    assert "<title>step 10: &lt;a&gt; 2.5</title>" in svg
    assert "<title>&lt;t&gt;</title><desc>d&amp;</desc>" in svg
    assert "<circle" in svg


def test_bars_are_proportional_and_start_at_zero():
    svg = bar_chart(
        "t", "d", [("one", [Bar(2.0, "series-1", 1.5, 2.5)]), ("two", [Bar(1.0, "plain"), Bar(-1.0, "plain")])]
    )
    bars = re.findall(r'<rect class="bar [^"]*" x="([\d.]+)"[^>]* width="([\d.]+)"', svg)
    (x_one, one), (x_two, two), (x_minus, minus) = ((float(x), float(width)) for x, width in bars)
    assert one == pytest.approx(2 * two, abs=0.2)
    assert two == pytest.approx(minus, abs=0.2)
    assert x_one == x_two == pytest.approx(x_minus + minus, abs=0.2)
    assert "one: 2, 95 % 1.5 to 2.5" in svg


def test_smoothing_keeps_a_straight_line_and_its_ends():
    line = [(float(x), 3.0 * x) for x in range(20)]
    assert all(found == pytest.approx(point) for found, point in zip(smooth(line, span=7), line, strict=True))
    bumpy = [(float(x), float(x % 2)) for x in range(21)]
    assert all(0.3 < y < 0.7 for _, y in smooth(bumpy, span=6)[3:-3])


def test_thinning_keeps_both_ends():
    points = [(float(x), 0.0) for x in range(1001)]
    kept = thin(points, 100)
    assert len(kept) <= 102
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert thin([]) == []


def test_a_power_law_is_a_straight_line_on_logarithmic_axes():
    points = [(10.0**power, 5 * 10.0 ** (-power / 2)) for power in range(6, 13, 2)]
    svg = line_chart("t", "d", [Line("a", points, "series-1")], x_label="FLOPs", log_x=True, log_y=True)
    drawn = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', svg)[1].split()]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(drawn)]
    assert all(step == pytest.approx(steps[0], abs=0.2) for step in steps)
    assert steps[0][0] > 0
    assert steps[0][1] > 0
    assert all(f">{label}<" in svg for label in ("1e7", "1e9", "1e11", "0.001", "1e-4"))


def test_a_band_encloses_its_line_and_of_one_point_is_a_whisker():
    line = Line("a", [(1.0, 2.0), (10.0, 3.0)], "series-1")
    bands = [Band([(1.0, 1.0, 3.0), (10.0, 2.0, 4.0)], "series-1"), Band([(10.0, 1.5, 5.0)], "series-2")]
    svg = line_chart("t", "d", [line], bands=bands, x_label="x", log_x=True)
    corners = [tuple(map(float, p.split(","))) for p in re.search(r'<polygon[^>]*points="([^"]*)"', svg)[1].split()]
    drawn = [tuple(map(float, p.split(","))) for p in re.search(r'<polyline[^>]*points="([^"]*)"', svg)[1].split()]
    assert [corner[0] for corner in corners] == [drawn[0][0], drawn[1][0], drawn[1][0], drawn[0][0]]
    assert corners[0][1] > drawn[0][1] > corners[3][1]
    assert svg.count('class="whisker"') == 1


def test_ticks_of_a_logarithmic_axis_are_round_and_few():
    assert log_ticks(1e6, 1e9) == [1e6, 1e7, 1e8, 1e9]
    assert log_ticks(1e-3, 1e-1)[:5] == pytest.approx([1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    assert log_ticks(3.1, 3.4) == nice_ticks(3.1, 3.4)
    for low, high in [(2, 9), (1e-9, 1e20), (0.5, 60)]:
        assert 2 <= len([tick for tick in log_ticks(low, high) if low <= tick <= high]) <= 8
