"""Charts as SVG text: lines over an axis, linear or logarithmic, and horizontal bars with intervals.

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
    """A series of (x, y) points; `style` holds classes of the style sheet."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    has_marks: bool = False
    is_joined: bool = True


@dataclass(frozen=True)
class Band:
    """What lies between `low` and `high` of (x, low, high) points; of a single one, a whisker."""

    points: Sequence[tuple[float, float, float]]
    style: str


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
    bands: Sequence[Band] = (),
    x_label: str,
    y_format: Format = format_number,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Lines with points of finite numbers; at least one line must have a point.

    The x axis begins at 0; a logarithmic one, whose numbers must be above zero, before the first point.
    """
    xs = [x for line in lines for x, _ in line.points] + [x for band in bands for x, *_ in band.points]
    ys = [y for line in lines for _, y in line.points] + [reference.value for reference in references]
    ys += [y for band in bands for _, *ends in band.points for y in ends]
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    across = _Axis.over(xs, left, right, log=True) if log_x else _Axis(min(0.0, *xs), max(xs), left, right)
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else nice_ticks(min(ys), max(ys))
    if log_y:
        up = _Axis.over(ys, bottom, top, log=True)
        y_ticks = [tick for tick in y_ticks if up.low <= tick <= up.high]
    else:
        up = _Axis(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), bottom, top)

    def place(x: float, y: float) -> tuple[float, float]:
        return across.place(x), up.place(y)

    parts = []
    for tick in y_ticks:
        y = up.place(tick)
        parts.append(f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = _power_label(tick) if log_y else _tick_label(tick, y_ticks)
        parts.append(_text(left - 6, y + 4, label, "tick", "end"))
    x_ticks = (log_ticks if log_x else nice_ticks)(across.low, across.high)
    x_ticks = [tick for tick in x_ticks if across.low <= tick <= across.high]
    for tick in x_ticks:
        label = _power_label(tick) if log_x else _tick_label(tick, x_ticks)
        parts.append(_text(across.place(tick), bottom + 15, label, "tick", "middle"))
    parts.append(_text((left + right) / 2, _HEIGHT - 5, x_label, "axis", "middle"))

    for band in bands:
        parts.append(_band(band, place))
    for reference in references:
        y = up.place(reference.value)
        parts.append(f'<line class="reference" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for line in lines:
        points = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        if len(points) > 1 and line.is_joined:
            parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if line.has_marks or len(points) == 1 or not line.is_joined:
            parts += [f'<circle class="mark {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    parts += _reference_labels(references, [up.place(reference.value) for reference in references], y_format)
    parts += _strips(lines, across.place, x_label, y_format)
    return _svg(title, description, _HEIGHT, parts)


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, log: bool) -> "_Axis":
        """With some room at both ends."""
        room = max((max(values) / min(values)) ** 0.04, 1.01)
        return cls(min(values) / room, max(values) * room, start, end, log)

    def place(self, value: float) -> float:
        scale = math.log if self.log else float
        span = scale(self.high) - scale(self.low)
        share = (scale(value) - scale(self.low)) / span if span > 0 else 0.5
        return self.start + share * (self.end - self.start)


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


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis: powers of ten, and between them as many as there is room for."""
    if high / low < 4:
        return [tick for tick in nice_ticks(low, high) if tick > 0]
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    factors = (1, 2, 3, 5) if high / low < 15 else (1, 3) if high / low < 1000 else (1,)
    step = max(1, -(-(last - first) // 6))
    return [factor * 10.0**power for power in range(first, last + 1, step) for factor in factors]


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


def _power_label(tick: float) -> str:
    """0.003, 500, 2e12: short, for an axis that spans powers of ten."""
    if 1e-3 <= tick < 1e5:
        return format_number(tick)
    mantissa, power = f"{tick:.2e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


def _band(band: Band, place: Callable) -> str:
    lows, highs = ([place(x, ends[side]) for x, *ends in band.points] for side in (0, 1))
    if len(lows) == 1:
        (x, low), (_, high) = lows[0], highs[0]
        path = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"
        return f'<path class="whisker" d="{path}"/>'
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*lows, *reversed(highs)])
    return f'<polygon class="band {band.style}" points="{corners}"/>'


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


def _strips(lines: Sequence[Line], place_x: Callable[[float], float], x_label: str, y_format: Format) -> list[str]:
    """One transparent strip for each x, which tells the values there."""
    told: dict[float, list[str]] = {}
    for line in lines:
        for x, y in line.points:
            told.setdefault(x, []).append(f"{line.name} {y_format(y)}")
    xs = sorted(told)
    xs = xs[:: max(1, -(-len(xs) // _MAX_STRIPS))]
    places = [place_x(x) for x in xs]
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
