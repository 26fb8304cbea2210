"""Charts: correct positions, colors from the page's CSS, and escaped text."""

import itertools
import re

import pytest

from maxlm.report.charts import Band, Bar, Line, Reference, bar_chart, line_chart
from maxlm.report.curves import smooth, thin
from maxlm.report.text import format_number


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
def test_numbers_are_formatted_briefly(value, text):
    assert format_number(value) == text


def paths(svg: str, color: str) -> list[list[tuple[float, float]]]:
    """The points of each stroked path of a color."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*style="[^"]*stroke: var\(--{color}\)', svg)
    return [[tuple(map(float, pair)) for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)] for path in found]


def test_line_is_linear_in_its_values():
    svg = line_chart("t", "d", [Line([(0, 0), (50, 5), (100, 10.5)], "series-1")], x_label="step")
    [[(x0, y0), (x1, y1), (x2, y2)]] = paths(svg, "one")
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(5 / 10.5, abs=0.01)
    assert x0 < x2
    assert y0 > y2


def test_power_law_is_a_straight_line_on_log_axes():
    points = [(10.0**power, 5 * 10.0 ** (-power / 2)) for power in range(6, 13, 2)]
    svg = line_chart("t", "d", [Line(points, "series-1")], x_label="FLOPs", log_x=True, log_y=True)
    [drawn] = paths(svg, "one")
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(drawn)]
    assert all(step == pytest.approx(steps[0], abs=0.2) for step in steps)
    assert ">1e7<" in svg


def test_colors_are_css_variables_and_ids_are_unique():
    lines = [Line([(0, 1), (1, 2)], "faint"), Line([(0, 1), (1, 2)], "series-2", has_marks=True)]
    band, reference = Band([(0, 0.5, 1.5), (1, 1.5, 2.5)], "series-1"), Reference("a bigram", 1.25)
    svg = line_chart("t", "d", lines, bands=[band], references=[reference], x_label="step")
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert {"one", "two", "muted", "grid"} <= set(re.findall(r"var\(--(\w+)\)", svg))
    assert "a bigram 1.25" in svg
    names = re.findall(r' id="([^"]*)"', svg)
    assert len(set(names)) == len(names)
    other = line_chart("another", "d", lines, bands=[band], x_label="step")
    assert not {*names} & {*re.findall(r' id="([^"]*)"', other)}
    assert svg == line_chart("t", "d", lines, bands=[band], references=[reference], x_label="step")


def test_markup_is_escaped():
    svg = line_chart("<t>", "d&", [Line([(10, 2.5)], "series-1")], x_label="<i>", references=[Reference("<b>", 1)])
    assert "<title>&lt;t&gt;</title><desc>d&amp;</desc>" in svg
    for raw in ("<i>", "<b>", "<t>"):
        assert raw not in svg
    assert "<script>" not in bar_chart("t", "d", [("<script>", [Bar(1.0, "plain")])])


def test_bars_are_proportional_and_show_their_values():
    groups = [("one", [Bar(2.0, "series-1", 1.5, 2.5)]), ("two", [Bar(1.0, "plain"), Bar(-1.0, "plain")])]
    svg = bar_chart("t", "d", groups)
    bars = re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--(?:one|plain)\)', svg)
    spans = []
    for bar in bars:
        xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+)", bar)]
        spans.append((min(xs), max(xs)))
    (zero, one), (start, two), (minus, end) = spans
    assert one - zero == pytest.approx(2 * (two - start), abs=0.3)
    assert two - start == pytest.approx(end - minus, abs=0.3)
    assert zero == pytest.approx(start, abs=0.1)
    for text in ("one", "two", ">2<", ">1<", "1<"):
        assert text in svg


def test_smoothing_keeps_a_straight_line_and_its_ends():
    line = [(float(x), 3.0 * x) for x in range(20)]
    assert all(found == pytest.approx(point) for found, point in zip(smooth(line), line, strict=True))
    bumpy = [(float(x), float(x % 2)) for x in range(90)]
    assert all(0.3 < y < 0.7 for _, y in smooth(bumpy)[3:-3])


def test_thinning_keeps_both_ends():
    points = [(float(x), 0.0) for x in range(1001)]
    kept = thin(points, 100)
    assert len(kept) <= 102
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert thin([]) == []
