"""Comparison of several runs: an overlaid chart per metric, and the settings that differ."""

from collections.abc import Sequence
from typing import Any

from maxlm.config.resume import differences
from maxlm.report.charts import Line, line_chart
from maxlm.report.curves import MACHINERY, Run, RunView, metric_names, metric_title, points, smooth, thin
from maxlm.report.page import Chart, Table
from maxlm.report.text import format_number

MAX_RUNS = 4
_STYLES = ("series-1", "series-2", "series-3", "series-4")
_HIDDEN_SETTINGS = ("output",)


def view_comparison(runs: Sequence[Run]) -> RunView:
    """One chart for each metric that at least two runs have: validation if there is any, else smoothed training."""
    names = dict.fromkeys(name for run in runs for name in metric_names(run.records))
    charts = {name: chart for name in names if (chart := _chart(runs, name))}
    return RunView(
        " and ".join(run.name for run in runs),
        [],
        [chart for name, chart in charts.items() if name not in MACHINERY],
        None,
        [chart for name, chart in charts.items() if name in MACHINERY],
        [],
    )


def differing_settings(runs: Sequence[Run]) -> Table | None:
    """The settings in which any run differs from the first."""
    found: dict[str, list[str]] = {}
    for index, run in enumerate(runs[1:], 1):
        for key, first, other in differences(runs[0].config, run.config):
            if key not in _HIDDEN_SETTINGS:
                found.setdefault(key, [_shown(first)] * len(runs))[index] = _shown(other)
    header = ("setting", *(run.name for run in runs))
    return Table(header, [(key, *values) for key, values in found.items()], is_text=True) if found else None


def _chart(runs: Sequence[Run], name: str) -> Chart | None:
    lines, legend, rows = [], [], []
    has_valid = any(points(run.records, f"valid_{name}") for run in runs)
    for run, style in zip(runs, _STYLES):
        values = points(run.records, f"valid_{name}" if has_valid else name)
        if not values:
            continue
        curve = values if has_valid or name in MACHINERY or len(values) < 8 else smooth(values)
        lines.append(Line(thin(curve), style, has_marks=has_valid and len(values) <= 40))
        legend.append((style, run.name))
        rows.append((run.name, f"{values[-1][0]:,.0f}", format_number(values[-1][1])))
    if len(lines) < 2 or not any(y for line in lines for _, y in line.points):
        return None
    title = f"{metric_title(name)}, {'validation' if has_valid else 'training'}"
    described = "; ".join(f"{run} ends at {value}" for run, _, value in rows)
    svg = line_chart(title, described, lines, x_label="step")
    return Chart(title, svg, Table(("run", "last step", "value"), rows), legend=legend)


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)
