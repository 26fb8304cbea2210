"""`index.html` of a sweep: the laws with their confidence bands, each field's curve, and all trials."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maxlm.config.load import dump_yaml
from maxlm.config.sweep import Range
from maxlm.report.charts import Band, Bar, Line, bar_chart, line_chart
from maxlm.report.page import Chart, Table, write_page
from maxlm.report.text import duration, format_number
from maxlm.sweep.analysis import Analysis, FieldLaw, best_config
from maxlm.sweep.outcome import Outcome, ranked
from maxlm.sweep.records import Record
from maxlm.sweep.trials import TARGET, Plan, describe_setting

AXES = {"flops": "training FLOPs", "parameters": "parameters", "tokens": "training tokens"}
# The largest size has the strongest color.
_SHADES = ("series-1", "shade-1", "shade-2", "shade-3", "shade-4")
_CURVE_POINTS = 60


def write_sweep_page(path: Path, plan: Plan, analysis: Analysis) -> None:
    """Write the page of a completed sweep."""
    name = plan.folder.resolve().name
    write_page(
        path,
        "sweep.html",
        title=f"{name} - maxlm sweep",
        name=name,
        subtitle=f"Trials of {plan.config.train}, by {plan.config.method.kind.replace('_', ' ')}.",
        headline=_headline(plan, analysis),
        notes=analysis.notes,
        law_facts=_law_facts(analysis),
        law=_law_chart(plan, analysis),
        field_laws=[_field_law_chart(plan, analysis, field) for field in analysis.field_laws if field.law],
        fields=[_field_chart(plan, analysis, name) for name in plan.config.fields],
        trials=_trials(plan, analysis),
        not_finished=_not_finished(plan, analysis),
        configs=[("best.yaml", dump_yaml(best_config(plan, analysis))), ("the sweep", dump_yaml(plan.config))],
    )


def _headline(plan: Plan, analysis: Analysis) -> list[tuple[str, str]]:
    summary, metric = analysis.summary(plan), plan.config.metric.replace("_", " ")
    counts = summary["trials"]
    lost = ", ".join(f"{counts[status]} {status}" for status in ("diverged", "failed") if counts[status])
    items = [
        (format_number(analysis.best.value), f"best {metric}: {_where(plan, analysis.best)}"),
        (f"{sum(counts.values())}", "trials" + (f", {lost}" if lost else "")),
        (duration(summary["seconds"]), "total time of trials"),
    ]
    prediction, measured = analysis.prediction, analysis.measured
    if prediction is not None:
        items.append((format_number(prediction.value), f"{metric} predicted for {plan.label(TARGET)}"))
        if measured is not None and measured.value is not None:
            off = prediction.value / measured.value - 1
            items.append((format_number(measured.value), f"measured there: prediction off by {100 * off:+.1f} %"))
    return items


def _where(plan: Plan, outcome: Outcome) -> str:
    size = f" ({plan.label(outcome.scale)})" if plan.config.scales else ""
    return describe_setting(outcome.setting) + size


def _law_facts(analysis: Analysis) -> list[tuple[str, str]]:
    law = analysis.law
    if law is None:
        return []
    facts = [(name, _with_interval(getattr(law, key), law.interval(key))) for name, key in _LAW_NAMES]
    if law.noise is not None:
        facts.append(("noise around the law", f"{100 * law.noise:.2g} %"))
    return facts


def _law_chart(plan: Plan, analysis: Analysis) -> Chart | None:
    law, prediction = analysis.law, analysis.prediction
    if law is None:
        return None
    against, metric = plan.config.scales.against, plan.config.metric.replace("_", " ")
    tops = [ranking[0] for ranking in analysis.final.values() if ranking]
    points = [(getattr(top.records[0], against), value) for top in tops for value in top.values]
    xs = [x for x, _ in points] + ([getattr(prediction.size, against)] if prediction else [])
    curve = np.geomspace(min(xs), max(xs), _CURVE_POINTS)
    lines = [
        Line(list(zip(curve.tolist(), law.loss(curve).tolist())), "series-1"),
        Line(points, "series-1", is_joined=False),
    ]
    bands, legend = _bands(law.band(curve), curve), [("series-1", "ladder: measured, law, 95% band")]
    if prediction is not None:
        x = float(getattr(prediction.size, against))
        if prediction.low is not None:
            bands.append(Band([(x, prediction.low, prediction.high)], "series-2"))
        lines.append(Line([(x, prediction.value)], "plain"))
        legend.append(("plain", "target, predicted, 95% for one run"))
        if analysis.measured is not None and analysis.measured.values:
            lines.append(Line([(x, v) for v in analysis.measured.values], "series-2", is_joined=False))
            legend.append(("series-2", "target, measured"))
    svg = line_chart(
        f"{metric} against {AXES[against]}",
        f"{len(points)} measured points, and the law fitted to them",
        lines,
        bands=bands,
        x_label=AXES[against],
        log_x=True,
        log_y=True,
    )
    numbers = Table(("size", AXES[against], "law", "measured"), analysis.law_rows(plan))
    title = f"{metric} = E + A · x^-α, x = {AXES[against]}"
    return Chart(title, svg, numbers, legend=legend)


_LAW_NAMES = (("E", "irreducible"), ("A", "coefficient"), ("α", "exponent"))


def _field_law_chart(plan: Plan, analysis: Analysis, field: FieldLaw) -> Chart:
    against, prediction = plan.config.scales.against, analysis.prediction
    points = [(x, optimum.value) for x, optimum in field.points]
    target = [float(getattr(prediction.size, against))] if prediction else []
    xs = [x for x, _ in points] + target
    curve = np.geomspace(min(xs), max(xs), _CURVE_POINTS)
    lines = [
        Line(list(zip(curve.tolist(), field.law.value(curve).tolist())), "series-1"),
        Line(points, "series-1", is_joined=False),
    ]
    legend = [("series-1", "ladder: best, law, 95% band")]
    if prediction is not None:
        lines.append(Line([(target[0], prediction.setting[field.name])], "series-2"))
        legend.append(("series-2", "target"))
    svg = line_chart(
        f"{field.name} against {AXES[against]}",
        f"the best value at {len(points)} sizes, and the power law through them",
        lines,
        bands=_bands(_within(field.law.band(curve), [y for line in lines for _, y in line.points]), curve),
        x_label=AXES[against],
        log_x=True,
        log_y=True,
    )
    rows = [
        (f"{x:.3g}", format_number(optimum.value), "edge of the tried range" if optimum.at_edge else "")
        for x, optimum in field.points
    ]
    note = f"∝ x^{_with_interval(field.law.exponent, field.law.exponent_interval)}"
    return Chart(field.name, svg, Table((AXES[against], "best", ""), rows), note=note, legend=legend)


def _field_chart(plan: Plan, analysis: Analysis, name: str) -> Chart:
    rankings = _groups(plan, analysis)
    outcomes = [outcome for ranking in rankings.values() for outcome in ranking]
    values = [outcome.setting[name] for outcome in outcomes]
    metric = plan.config.metric.replace("_", " ")
    rows = [
        (f"{label}: {outcome.setting[name]}", f"{outcome.value:.4f}")
        for label, ranking in rankings.items()
        for outcome in ranking
    ]
    numbers = Table((name, metric), rows)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        groups = [(label, _bars(ranking, name)) for label, ranking in rankings.items()]
        labels = [(f"{label}: {value}", [bar]) for label, bars in groups for value, bar in bars]
        return Chart(
            f"Best {metric} with each {name}", bar_chart(name, "the best value of each choice", labels), numbers
        )
    lines, legend = [], []
    for index, (label, ranking) in enumerate(reversed(rankings.items())):
        points = sorted((float(outcome.setting[name]), outcome.value) for outcome in ranking)
        # Settings that also differ in other fields are not on one line.
        joined = len(plan.config.fields) == 1
        style = _SHADES[min(index, len(_SHADES) - 1)]
        lines.append(Line(points, style, has_marks=True, is_joined=joined))
        legend.append((style, label))
    dimension = plan.config.fields[name]
    spread = min(values) > 0 and max(values) / min(values) >= 4
    is_log = dimension.log if isinstance(dimension, Range) else spread
    svg = line_chart(
        f"{metric} against {name}",
        f"{len(outcomes)} settings that finished",
        lines[::-1],
        x_label=name,
        log_x=is_log and min(values) > 0,
        log_y=all(outcome.value > 0 for outcome in outcomes),
    )
    return Chart(f"{metric.capitalize()} against {name}", svg, numbers, legend=legend[::-1] if len(legend) > 1 else ())


def _groups(plan: Plan, analysis: Analysis) -> dict[str, list[Outcome]]:
    """Outcomes drawn as one curve: the last round of each size or, for a single size, each round."""
    if plan.config.scales is not None:
        return {plan.label(scale): ranking for scale, ranking in analysis.final.items() if ranking}
    lengths = sorted({outcome.steps for outcome in analysis.outcomes if outcome.value is not None})
    return {
        f"{steps:,} steps": ranked([o for o in analysis.outcomes if o.steps == steps], plan.config.goal)
        for steps in lengths
    }


def _bars(ranking: Sequence[Outcome], name: str) -> list[tuple[str, Bar]]:
    best: dict[str, float] = {}
    for outcome in ranking:  # best first
        best.setdefault(str(outcome.setting[name]), outcome.value)
    return [(value, Bar(number, "series-1")) for value, number in best.items()]


def _trials(plan: Plan, analysis: Analysis) -> Table:
    """All trials; the largest size and its best settings first."""
    config = plan.config
    sizes, seeds = ("size",) if config.scales else (), ("seed",) if config.seeds else ()
    names = (name.rpartition(".")[2] for name in config.fields)
    header = (*sizes, *names, *seeds, "steps", config.metric, "seconds", "trial")
    rows = []
    for record in _records(plan, analysis):
        value = record.value(config.metric)
        size = (plan.label(record.scale),) if config.scales else ()
        settings = (str(record.setting[name]) for name in config.fields)
        seed = (str(record.seed),) if config.seeds else ()
        result = f"{value:.4f}" if value is not None else record.status
        rows.append((*size, *settings, *seed, f"{record.steps:,}", result, f"{record.seconds:.0f}", record.id))
    return Table(header, rows)


def _not_finished(plan: Plan, analysis: Analysis) -> Table:
    """The unfinished trials and their errors."""
    rows = []
    for record in _records(plan, analysis):
        if record.error:
            size = (plan.label(record.scale),) if plan.config.scales else ()
            where = ", ".join((record.id, *size))
            rows.append((f"{where}: {describe_setting(record.setting)} {record.status}: {record.error}",))
    return Table(("not finished",), rows)


def _records(plan: Plan, analysis: Analysis) -> list[Record]:
    measured = [analysis.measured] if analysis.measured else []
    order = sorted(
        (*analysis.outcomes, *measured),
        key=lambda o: (o.scale != TARGET, -o.scale, -o.steps, o.value is None, _signed(plan, o)),
    )
    return [record for outcome in order for record in outcome.records]


def _signed(plan: Plan, outcome: Outcome) -> float:
    return (outcome.value or 0.0) * (1 if plan.config.goal == "minimize" else -1)


def _bands(ends: tuple[np.ndarray, np.ndarray] | None, curve: np.ndarray) -> list[Band]:
    if ends is None:
        return []
    return [Band([*zip(curve.tolist(), ends[0].tolist(), ends[1].tolist())], "series-1")]


def _within(
    ends: tuple[np.ndarray, np.ndarray] | None, values: Sequence[float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Clip a band, which with few points may span orders of magnitude, so that it does not flatten the curve."""
    return ends and (np.maximum(ends[0], min(values) / 10), np.minimum(ends[1], max(values) * 10))


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return f"{value:.4g}"
    return f"{value:.4g} [{interval[0]:.3g}, {interval[1]:.3g}]"
