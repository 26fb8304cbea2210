"""SVG charts styled by the page's CSS: line charts, and horizontal bar charts with intervals.

Matplotlib draws with placeholder colors, which become CSS variables, so that one picture works on a light
and a dark page. Charts are drawn for a width of 400 and scale with the page; their text is readable on a phone.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from maxlm.report.text import format_number

# Style: CSS color, line width, opacity.
STYLES = {
    "series-1": ("one", 1.5, 1.0),
    "series-2": ("two", 1.5, 1.0),
    "series-3": ("three", 1.5, 1.0),
    "series-4": ("four", 1.5, 1.0),
    "faint": ("one", 0.8, 0.3),
    "plain": ("plain", 1.5, 1.0),
    "shade-1": ("one", 1.5, 0.7),
    "shade-2": ("one", 1.5, 0.48),
    "shade-3": ("one", 1.5, 0.33),
    "shade-4": ("one", 1.5, 0.22),
}
_VARIABLES = ("one", "two", "three", "four", "plain", "text", "muted", "grid", "card")
_PLACEHOLDERS = {name: f"#0a0b{number:02x}" for number, name in enumerate(_VARIABLES)}
_SIZE = (4.0, 2.4)  # inches of 100 units
_BAR_HEIGHT, _GROUP_GAP = 0.16, 0.26  # inches

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A series of (x, y) points of finite numbers; `style` is one of STYLES."""

    points: Sequence[tuple[float, float]]
    style: str
    has_marks: bool = False
    is_joined: bool = True


@dataclass(frozen=True)
class Band:
    """The area between `low` and `high` of (x, low, high) points; a single point gives an error bar."""

    points: Sequence[tuple[float, float, float]]
    style: str


@dataclass(frozen=True)
class Reference:
    """A reference value: a dashed line across the chart."""

    name: str
    value: float


@dataclass(frozen=True)
class Bar:
    """A bar from zero to `value`, with an interval."""

    value: float
    style: str
    low: float | None = None
    high: float | None = None


def line_chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    references: Sequence[Reference] = (),
    bands: Sequence[Band] = (),
    x_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Draw lines, at least one of which has a point. `title` and `description` are for screen readers."""
    figure, axes = _new_figure(_SIZE)
    for line in lines:
        color, width, alpha = STYLES[line.style]
        xs, ys = zip(*line.points)
        has_marks = line.has_marks or len(xs) == 1 or not line.is_joined
        axes.plot(
            xs,
            ys,
            color=_PLACEHOLDERS[color],
            alpha=alpha,
            linewidth=width if line.is_joined else 0,
            marker="o" if has_marks else None,
            markersize=3.5,
        )
    for band in bands:
        _draw_band(axes, band)
    for reference in references:
        axes.axhline(reference.value, color=_PLACEHOLDERS["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
    if log_x:
        axes.set_xscale("log")
    elif lines:
        axes.set_xlim(left=min(0.0, *(x for line in lines for x, _ in line.points)))
    if log_y:
        axes.set_yscale("log")
    _label_references(axes, references)
    axes.set_xlabel(x_label)
    for axis, is_log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        _set_ticks(axis, is_log=is_log)
    axes.grid(axis="y", color=_PLACEHOLDERS["grid"], linewidth=0.7)
    axes.set_axisbelow(True)
    return _svg(figure, title, description)


def bar_chart(
    title: str, description: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, value_format: Format = format_number
) -> str:
    """Draw groups of horizontal bars under their labels, on one scale from zero."""
    num_bars = sum(len(bars) for _, bars in groups)
    height = num_bars * _BAR_HEIGHT + len(groups) * _GROUP_GAP
    figure, axes = _new_figure((_SIZE[0], height))
    y = 0.0
    for label, bars in groups:
        axes.annotate(
            label,
            (0, y + _GROUP_GAP - 0.05),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            color=_PLACEHOLDERS["text"],
        )
        y += _GROUP_GAP
        for bar in bars:
            _draw_bar(axes, bar, y + _BAR_HEIGHT / 2, value_format(bar.value))
            y += _BAR_HEIGHT
    axes.set_ylim(height, 0)
    longest = max(len(value_format(bar.value)) for _, bars in groups for bar in bars)
    low, high = axes.get_xlim()
    # Room for the values to the right of the bars.
    axes.set_xlim(low, high + (high - low) * 0.028 * longest)
    axes.axvline(0, color=_PLACEHOLDERS["muted"], linewidth=0.7)
    axes.axis("off")
    return _svg(figure, title, description)


def _new_figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01))
    axes = figure.add_subplot()
    axes.tick_params(colors=_PLACEHOLDERS["muted"], labelsize=8.5, which="both", left=False, bottom=False)
    axes.xaxis.label.set(color=_PLACEHOLDERS["muted"], fontsize=8.5)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _draw_band(axes: Axes, band: Band) -> None:
    color, _, _ = STYLES[band.style]
    xs, lows, highs = zip(*band.points)
    if len(xs) == 1:
        axes.vlines(xs, lows, highs, color=_PLACEHOLDERS["text"], linewidth=1)
    else:
        axes.fill_between(xs, lows, highs, color=_PLACEHOLDERS[color], alpha=0.16, linewidth=0)


def _draw_bar(axes: Axes, bar: Bar, y: float, label: str) -> None:
    color, _, alpha = STYLES[bar.style]
    axes.barh(y, bar.value, height=0.8 * _BAR_HEIGHT, color=_PLACEHOLDERS[color], alpha=alpha)
    end = max(bar.value, 0.0)
    if bar.low is not None and bar.high is not None:
        spread = [[max(bar.value - bar.low, 0)], [max(bar.high - bar.value, 0)]]
        axes.errorbar(
            bar.value, y, xerr=spread, color=_PLACEHOLDERS["text"], elinewidth=1, capsize=2, capthick=1, linestyle=""
        )
        end = max(end, bar.high)
    axes.annotate(
        label,
        (end, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=_PLACEHOLDERS["text"],
        weight="bold",
    )


def _label_references(axes: Axes, references: Sequence[Reference]) -> None:
    """Label the lines at their left end: the highest one above the line, the others below."""
    for number, reference in enumerate(sorted(references, key=lambda each: -each.value)):
        axes.annotate(
            f"{reference.name} {format_number(reference.value)}",
            (0.01, reference.value),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3 if number else 3),
            textcoords="offset points",
            va="top" if number else "bottom",
            color=_PLACEHOLDERS["muted"],
        )


def _set_ticks(axis: matplotlib.axis.Axis, *, is_log: bool) -> None:
    if not is_log:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        return
    low, high = axis.get_view_interval()
    subs = (1, 2, 3, 5) if high / low < 15 else (1, 3) if high / low < 1000 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    """0.003, 500, 20k, 2e12"""
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value / 1000:,g}k" if abs(value) >= 10_000 else f"{value:,.6g}"


def _svg(figure: Figure, title: str, description: str) -> str:
    """The figure as an inline SVG element: colors come from the page's CSS, the size from its container."""
    buffer = io.StringIO()
    # Keep text as text; identical charts get identical ids.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.size": 8.5,
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = svg.replace("xlink:href", "href").replace("\n", "")
    # Element ids repeat across charts; ids that are referenced are derived from the title.
    referred = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg))
    kept = {name for pair in referred for name in pair if name}
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in kept else "", svg)
    svg = re.sub(r"(\d+\.\d\d)\d+", r"\1", re.sub(r"> +<", "><", svg))
    svg = re.sub(r"font: [^;\"]*;? ?|font-size: [^;\"]*;? ?|font-family: [^;\"]*;? ?", "", svg)
    for name, color in _PLACEHOLDERS.items():
        svg = svg.replace(color, f"var(--{name})")
    described = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return re.sub(r'(<svg [^>]*role="img">)', lambda match: match[1] + described, svg, count=1)
