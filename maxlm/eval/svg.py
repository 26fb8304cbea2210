"""Charts as SVG text: lines over an axis, and horizontal bars with intervals.

Colours are classes (`series-1`, `reference`, ...) that the page's style sheet fills for light and dark. Charts are
drawn for a width of 400 and scale with the page, which keeps their text readable on a telephone.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 400.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 16.0, 12.0, 36.0
_LABEL_HEIGHT = 13.0
_BAR_HEIGHT, _BAR_GAP, _GROUP_LABEL, _GROUP_GAP = 13.0, 3.0, 17.0, 9.0
# Of bold text, on a telephone.
_CHARACTER_WIDTH = 8.4
# Strips that show their values under the pointer.
_MAX_STRIPS = 100

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A series of (x, y) points; `style` is a class of the style sheet."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    has_marks: bool = False


@dataclass(frozen=True)
class Reference:
    """A value to compare with: a dashed line across the chart."""

    name: str
    value: float


@dataclass(frozen=True)
class Bar:
    """A bar from zero to `value`, with its interval."""

    value: float
    style: str
    low: float | None = None
    high: float | None = None


def format_number(value: float) -> str:
    """Four significant digits, thousands apart: 1,234,567, 12.34, 0.001234; three of what is smaller still."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.3g}"
    text = f"{value:.{3 - math.floor(math.log10(abs(value)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def line_chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    references: Sequence[Reference] = (),
    x_label: str,
    y_format: Format = format_number,
) -> str:
    """Lines with points of finite numbers, from x = 0 on; at least one line must have a point."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [reference.value for reference in references]
    x_low, x_high = min(0.0, *xs), max(xs)
    y_ticks = nice_ticks(min(ys), max(ys))
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low) if y_high > y_low else 0.5
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, _tick_label(tick, y_ticks), "tick", "end"))
    x_ticks = [tick for tick in nice_ticks(x_low, x_high) if x_low <= tick <= x_high]
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(_text(x, _HEIGHT - _BOTTOM + 15, _tick_label(tick, x_ticks), "tick", "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, x_label, "axis", "middle"))

    for reference in references:
        _, y = place(x_low, reference.value)
        parts.append(f'<line class="reference" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for line in lines:
        points = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        if len(points) > 1:
            parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if line.has_marks or len(points) == 1:
            parts += [f'<circle class="mark {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    parts += _reference_labels(references, [place(x_low, reference.value)[1] for reference in references], y_format)
    parts += _strips(lines, place, x_label, y_format)
    return _svg(title, description, _HEIGHT, parts)


def bar_chart(
    title: str, description: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, value_format: Format = format_number
) -> str:
    """Groups of horizontal bars under their labels, on one scale from zero."""
    bars = [bar for _, group in groups for bar in group]
    ends = [0.0, *(end for bar in bars for end in (bar.value, bar.low, bar.high) if end is not None)]
    low, high = min(ends), max(ends)
    value_width = 10 + _CHARACTER_WIDTH * max(len(value_format(bar.value)) for bar in bars)
    scale = (_WIDTH - value_width) / ((high - low) or 1.0)

    def place(value: float) -> float:
        return 1 + (value - low) * scale

    parts, y = [], 0.0
    for label, group in groups:
        shown = _shorten(label, _WIDTH / _CHARACTER_WIDTH)
        parts.append(f'<text class="label" x="0" y="{y + 12:.1f}">{escape(shown)}</text>')
        y += _GROUP_LABEL
        for bar in group:
            left, right = sorted((place(0.0), place(bar.value)))
            told = value_format(bar.value)
            hover = escape(f"{label}: {told}{_range(bar, value_format)}")
            middle = y + _BAR_HEIGHT / 2
            end = right
            parts.append(
                f'<rect class="bar {bar.style}" x="{left:.1f}" y="{y:.1f}" width="{max(right - left, 1):.1f}"'
                f' height="{_BAR_HEIGHT:g}" rx="2"><title>{hover}</title></rect>'
            )
            if bar.low is not None and bar.high is not None:
                start, end = place(bar.low), max(right, place(bar.high))
                parts.append(
                    f'<path class="whisker" d="M{start:.1f} {middle:.1f}H{place(bar.high):.1f}'
                    f'M{start:.1f} {middle - 3:.1f}v6M{place(bar.high):.1f} {middle - 3:.1f}v6"/>'
                )
            parts.append(_text(end + 6, middle + 4.5, told, "value", "start"))
            y += _BAR_HEIGHT + _BAR_GAP
        y += _GROUP_GAP
    if low < 0:
        zero = place(0.0)
        parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{y - _GROUP_GAP:.1f}"/>')
    return _svg(title, description, y - _GROUP_GAP + 2, parts)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, from one at or below `low` to one at or above `high`."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = magnitude * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def smooth(points: Sequence[tuple[float, float]], *, span: int) -> list[tuple[float, float]]:
    """The mean of each point and its neighbours, `span` in all, and fewer towards the ends.

    The neighbours are as many on either side, so that a falling curve is not drawn above its points.
    """
    result = []
    for index, (x, _) in enumerate(points):
        reach = min(span // 2, index, len(points) - 1 - index)
        window = points[index - reach : index + reach + 1]
        result.append((x, sum(y for _, y in window) / len(window)))
    return result


def thin(points: Sequence[tuple[float, float]], limit: int = 400) -> list[tuple[float, float]]:
    """Every k-th point and the last one, so that a long run stays a small page."""
    step = max(1, -(-len(points) // limit))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {height:.0f}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _tick_label(tick: float, ticks: Sequence[float]) -> str:
    """As many decimals as the step between ticks needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(tick) or 1.0
    if tick == 0:
        return "0"
    if max(map(abs, ticks)) >= 10_000:
        return f"{tick / 1000:,.{_decimals(step / 1000)}f}k"
    return f"{tick:.1e}" if step < 1e-4 else f"{tick:,.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    return next(count for count in range(12) if math.isclose(round(step, count), step, rel_tol=1e-6))


def _reference_labels(references: Sequence[Reference], heights: Sequence[float], y_format: Format) -> list[str]:
    """Names at the left end, where a falling curve leaves room, above their lines; moved up where two would touch."""
    parts, lowest_free = [], math.inf
    for height, reference in sorted(zip(heights, references), key=lambda pair: -pair[0]):
        y = min(height - 4, lowest_free)
        lowest_free = y - _LABEL_HEIGHT
        label = f"{reference.name} {y_format(reference.value)}"
        parts.append(_text(_LEFT + 3, y, label, "reference-label", "start"))
    return parts


def _strips(lines: Sequence[Line], place: Callable, x_label: str, y_format: Format) -> list[str]:
    """One transparent strip for each x, which tells the values there."""
    told: dict[float, list[str]] = {}
    for line in lines:
        for x, y in line.points:
            told.setdefault(x, []).append(f"{line.name} {y_format(y)}")
    xs = sorted(told)
    xs = xs[:: max(1, -(-len(xs) // _MAX_STRIPS))]
    places = [place(x, 0.0)[0] for x in xs]
    edges = [_LEFT, *((a + b) / 2 for a, b in itertools.pairwise(places)), _WIDTH - _RIGHT]
    height = _HEIGHT - _TOP - _BOTTOM
    parts = []
    for x, (left, right) in zip(xs, itertools.pairwise(edges)):
        hover = escape(f"{x_label} {x:g}: {', '.join(told[x])}")
        place_and_size = f'x="{left:.1f}" y="{_TOP:g}" width="{max(right - left, 0.5):.1f}" height="{height:g}"'
        parts.append(f'<rect class="strip" {place_and_size}><title>{hover}</title></rect>')
    return parts


def _range(bar: Bar, value_format: Format) -> str:
    if bar.low is None or bar.high is None:
        return ""
    return f", 95 % {value_format(bar.low)} to {value_format(bar.high)}"


def _shorten(text: str, length: float) -> str:
    return text if len(text) <= length else text[: int(length) - 1] + "…"
