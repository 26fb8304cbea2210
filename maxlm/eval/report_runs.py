"""The report's part on training runs: curves from `metrics.jsonl`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maxlm.eval.html_parts import (
    charts,
    duration,
    facts,
    figure,
    flat_facts,
    folded_charts,
    percent,
    section,
    table,
    to_dict,
    to_number,
)
from maxlm.eval.svg import Bar, Line, Reference, bar_chart, format_number, line_chart, smooth, thin

Points = list[tuple[float, float]]

# How a run went rather than what it reached: shown folded, under the rest.
_MACHINERY = ("learning_rate", "grad_norm", "tokens_per_second", "mfu", "data_wait", "goodput", "skipped")
_HIDDEN = ("step", "time", "skipped_in_a_row", "perplexity")
_FIRST = ("loss", "bits_per_byte")
_TITLES = {
    "loss": "Loss, nats per token",
    "bits_per_byte": "Bits per byte",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilisation",
    "grad_norm": "Gradient norm",
    "data_wait": "Share of time waiting for data",
    "goodput": "Share of all time so far that was productive",
    "skipped": "Skipped steps",
}
_TABLE_ROWS = 20


@dataclass(frozen=True)
class Run:
    """A training run: its name, the records of its metrics file, and its manifest, which may be missing."""

    name: str
    records: list[dict[str, Any]]
    manifest: dict[str, Any]


def run_section(run: Run, *, references: Sequence[Reference] = ()) -> str:
    """Curves of one run; `references` are drawn into its bits per byte."""
    names = _metric_names(run.records)
    main = [name for name in names if name not in _MACHINERY]
    drawn = {
        name: _metric_figure(run, name, references if name == "bits_per_byte" else ()) for name in (*main, *_MACHINERY)
    }
    config, metrics = to_dict(run.manifest.get("config")), to_dict(run.manifest.get("metrics"))
    tokens = (to_number(config.get("batch_size")) or 0) * (to_number(config.get("row_length")) or 0)
    told = flat_facts({name: value for name, value in metrics.items() if name not in ("valid", "goodput")})
    if tokens:
        told.append(("tokens in a step", format_number(tokens)))
    return section(
        f"Training: {run.name}",
        facts(told),
        charts(drawn[name] for name in main),
        _by_source(run),
        folded_charts("Learning rate, gradient norm, speed", (drawn[name] for name in _MACHINERY)),
        folded_charts("Where the time went", [_goodput_figure(run.name, to_dict(metrics.get("goodput")))]),
    )


def last_value(run: Run, name: str) -> float | None:
    points = _points(run.records, name)
    return points[-1][1] if points else None


def _metric_names(records: list[dict[str, Any]]) -> list[str]:
    """Names without `valid_`: what matters most first, then in the order of the records."""
    found = dict.fromkeys(name.removeprefix("valid_") for record in records for name in record)
    shown = [name for name in found if name not in _HIDDEN and not _repeats_loss(records, name) and "/" not in name]
    return sorted(shown, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def _metric_figure(run: Run, name: str, references: Sequence[Reference]) -> str:
    train, valid = _points(run.records, name), _points(run.records, f"valid_{name}")
    if (not train and not valid) or not any(y for _, y in train + valid):
        return ""
    lines, legend = [], []
    if train and (name in _MACHINERY or len(train) < 8):
        lines.append(Line("training", thin(train), "series-1"))
    elif train:
        span = max(5, len(train) // 15)
        lines.append(Line("training", thin(train), "faint"))
        lines.append(Line("smoothed", thin(smooth(train, span=span)), "series-1"))
    if train:
        legend.append(("series-1", "training"))
    if valid:
        lines.append(Line("validation", thin(valid), "series-2", has_marks=len(valid) <= 40))
        legend.append(("series-2", "validation"))
    title = _TITLES.get(name, name.replace("_", " ").capitalize())
    kinds = [(kind, points) for kind, points in (("training", train), ("validation", valid)) if points]
    described = [_describe(kind, points) for kind, points in kinds]
    svg = line_chart(f"{run.name}: {title}", "; ".join(described), lines, references=references, x_label="step")
    ends = [f"{kind} {format_number(points[-1][1])}" for kind, points in kinds]
    note = f"at the end: {', '.join(ends)}" if name not in _MACHINERY else ""
    return figure(title, svg, _numbers(train, valid), note=note, legend=legend if valid else ())


def _by_source(run: Run) -> str:
    """What the last validation gave for each source: `valid_bits_per_byte/SOURCE`."""
    last = next((record for record in reversed(run.records) if any("/" in name for name in record)), {})
    found = {name.removeprefix("valid_"): to_number(value) for name, value in last.items() if "/" in name}
    rows = [
        (name.partition("/")[2], name.partition("/")[0].replace("_", " "), format_number(value))
        for name, value in found.items()
        if value is not None
    ]
    return table(("source", "figure", "last validation"), rows) if rows else ""


def _goodput_figure(name: str, goodput: dict[str, Any]) -> str:
    """Seconds of all attempts by what they went to."""
    found = [(str(part), to_number(value)) for part, value in to_dict(goodput.get("seconds")).items()]
    told = [(part.replace("_", " "), seconds) for part, seconds in found if seconds]
    share = to_number(goodput.get("productive"))
    if not told or share is None:
        return ""
    total = sum(seconds for _, seconds in told)
    described = "; ".join(f"{part} {duration(seconds)}" for part, seconds in told)
    groups = [
        (part, [Bar(seconds, "series-1" if part == "step" else "series-2")])
        for part, seconds in sorted(told, key=lambda item: -item[1])
    ]
    svg = bar_chart(f"{name}: where the time went", described, groups, value_format=duration)
    rows = [(part, f"{seconds:.2f}", percent(seconds / total)) for part, seconds in told]
    note = f"{percent(share)} of {duration(total)} went to steps that the result stands on"
    return figure("Where the time went", svg, table(("part", "seconds", "share"), rows), note=note)


def _points(records: list[dict[str, Any]], name: str) -> Points:
    pairs = [(to_number(record.get("step")), to_number(record.get(name))) for record in records]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _describe(kind: str, points: Points) -> str:
    if len(points) == 1:
        return f"{kind} {format_number(points[0][1])}"
    return f"{kind} from {format_number(points[0][1])} to {format_number(points[-1][1])}"


def _repeats_loss(records: list[dict[str, Any]], name: str) -> bool:
    """A run with one term logs it beside a total that is the same but for how windows are averaged."""
    losses = dict(_points(records, "loss"))
    values = [(losses[step], value) for step, value in _points(records, name) if step in losses]
    return name != "loss" and len(values) > 1 and all(math.isclose(a, b, rel_tol=0.02) for a, b in values)


def _numbers(train: Points, valid: Points) -> str:
    """Every validation, and some of the steps between."""
    by_step = {step: (format_number(value), "") for step, value in thin(train, _TABLE_ROWS)}
    training = dict(train)
    for step, value in thin(valid, _TABLE_ROWS):
        known = format_number(training[step]) if step in training else by_step.get(step, ("", ""))[0]
        by_step[step] = (known, format_number(value))
    rows = [(f"{step:,.0f}", *values) for step, values in sorted(by_step.items())]
    return table(("step", "training", "validation"), rows)
