"""Charts of a training run, from its `metrics.jsonl` and manifest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from maxlm.report.charts import Bar, Line, Reference, bar_chart, line_chart
from maxlm.report.page import Chart, Table
from maxlm.report.text import duration, flat_facts, format_number, percent, to_dict, to_number

Points = list[tuple[float, float]]

# Machinery rather than quality metrics: shown collapsed, below the rest.
MACHINERY = ("learning_rate", "grad_norm", "tokens_per_second", "mfu", "data_wait", "goodput", "skipped")
_HIDDEN = ("step", "time", "skipped_in_a_row", "perplexity")
_FIRST = ("loss", "bits_per_byte")
_TITLES = {
    "loss": "Loss, nats per token",
    "bits_per_byte": "Bits per byte",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilization",
    "grad_norm": "Gradient norm",
    "data_wait": "Share of time waiting for data",
    "goodput": "Goodput: share of total time that was productive",
    "skipped": "Skipped steps",
}
_TABLE_ROWS = 20


@dataclass(frozen=True)
class Run:
    """A training run: its name, the records of its metrics file, and its manifest, which may be missing.

    config: its configuration; known before there is a manifest.
    samples: of its `samples.jsonl`: answers that it sampled during training, with their rewards.
    """

    name: str
    records: list[dict[str, Any]]
    manifest: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def last(self, name: str) -> float | None:
        found = points(self.records, name)
        return found[-1][1] if found else None


@dataclass(frozen=True)
class RunView:
    """A run as shown on a page."""

    name: str
    facts: list[tuple[str, str]]
    curves: list[Chart]
    by_source: Table | None
    machinery: list[Chart]
    goodput: list[Chart]
    samples: Table | None = None


def view_run(run: Run, *, references: Sequence[Reference] = ()) -> RunView:
    """Curves of one run; `references` are drawn in its bits-per-byte chart."""
    names = metric_names(run.records)
    main = [name for name in names if name not in MACHINERY]
    drawn = {name: _curve(run, name, references if name == "bits_per_byte" else ()) for name in (*main, *MACHINERY)}
    metrics = to_dict(run.manifest.get("metrics"))
    tokens = (to_number(run.config.get("batch_size")) or 0) * (to_number(run.config.get("row_length")) or 0)
    facts = flat_facts({name: value for name, value in metrics.items() if name not in ("valid", "goodput")})
    if tokens:
        facts.append(("tokens per step", format_number(tokens)))
    return RunView(
        run.name,
        facts,
        [chart for name in main if (chart := drawn[name])],
        _by_source(run),
        [chart for name in MACHINERY if (chart := drawn[name])],
        [chart for chart in [_goodput(run.name, to_dict(metrics.get("goodput")))] if chart],
        _samples(run),
    )


def metric_names(records: list[dict[str, Any]]) -> list[str]:
    """Metric names without `valid_`: the most important first, then in the order of the records."""
    found = dict.fromkeys(name.removeprefix("valid_") for record in records for name in record)
    shown = [name for name in found if name not in _HIDDEN and not _repeats_loss(records, name) and "/" not in name]
    return sorted(shown, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def metric_title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " ").capitalize())


def points(records: list[dict[str, Any]], name: str) -> Points:
    """(step, value) of the records that have a finite value of this metric."""
    pairs = [(to_number(record.get("step")), to_number(record.get(name))) for record in records]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def smooth(values: Points) -> Points:
    """Centered moving average, with smaller windows towards the ends.

    The window is symmetric, so that a falling curve is not drawn above its points.
    """
    half, result = max(5, len(values) // 15) // 2, []
    for index, (x, _) in enumerate(values):
        reach = min(half, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        result.append((x, sum(y for _, y in window) / len(window)))
    return result


def thin(values: Points, limit: int = 400) -> Points:
    """Every k-th point and the last one, to keep the page of a long run small."""
    step = max(1, -(-len(values) // limit))
    kept = list(values[::step])
    return kept if not values or kept[-1] == values[-1] else [*kept, values[-1]]


def _curve(run: Run, name: str, references: Sequence[Reference]) -> Chart | None:
    train, valid = points(run.records, name), points(run.records, f"valid_{name}")
    if not any(y for _, y in train + valid):
        return None
    lines, legend = [], []
    if train and (name in MACHINERY or len(train) < 8):
        lines.append(Line(thin(train), "series-1"))
    elif train:
        lines += [Line(thin(train), "faint"), Line(thin(smooth(train)), "series-1")]
    if train:
        legend.append(("series-1", "training"))
    if valid:
        lines.append(Line(thin(valid), "series-2", has_marks=len(valid) <= 40))
        legend.append(("series-2", "validation"))
    title = metric_title(name)
    kinds = [(kind, values) for kind, values in (("training", train), ("validation", valid)) if values]
    described = "; ".join(_describe(kind, values) for kind, values in kinds)
    svg = line_chart(f"{run.name}: {title}", described, lines, references=references, x_label="step")
    ends = [f"{kind} {format_number(values[-1][1])}" for kind, values in kinds]
    note = f"final: {', '.join(ends)}" if name not in MACHINERY else ""
    return Chart(title, svg, _numbers(train, valid), note=note, legend=legend if valid else ())


def _samples(run: Run) -> Table | None:
    """Answers from the beginning, the middle and the end of training."""
    steps = sorted({step for sample in run.samples if (step := to_number(sample.get("step"))) is not None})
    if not steps:
        return None
    chosen = {steps[0], steps[len(steps) // 2], steps[-1]}
    shown = [sample for sample in run.samples if to_number(sample.get("step")) in chosen]
    rewards = [name for name in shown[0] if name.startswith("reward")]
    rows = []
    for sample in shown:
        numbers = [value for name in (*rewards, "advantage") if (value := to_number(sample.get(name))) is not None]
        text = [str(sample.get(name, "")) for name in ("prompt", "answer")]
        rows.append((f"{sample['step']:,.0f}", *text, *map(format_number, numbers)))
    names = [name.removeprefix("reward_").replace("_", " ") for name in rewards]
    return Table(("step", "prompt", "answer", *names, "advantage"), rows, is_text=True)


def _by_source(run: Run) -> Table | None:
    """Results of the last validation per source: `valid_bits_per_byte/SOURCE`."""
    last: dict[str, Any] = next((record for record in reversed(run.records) if any("/" in name for name in record)), {})
    found = {name.removeprefix("valid_"): to_number(value) for name, value in last.items() if "/" in name}
    rows = [
        (name.partition("/")[2], name.partition("/")[0].replace("_", " "), format_number(value))
        for name, value in found.items()
        if value is not None
    ]
    return Table(("source", "metric", "last validation"), rows) if rows else None


def _goodput(name: str, goodput: dict[str, Any]) -> Chart | None:
    """Seconds of all attempts by activity."""
    found = [(str(part), to_number(value)) for part, value in to_dict(goodput.get("seconds")).items()]
    parts = [(part.replace("_", " "), seconds) for part, seconds in found if seconds]
    share = to_number(goodput.get("productive"))
    if not parts or share is None:
        return None
    total = sum(seconds for _, seconds in parts)
    described = "; ".join(f"{part} {duration(seconds)}" for part, seconds in parts)
    groups = [
        (part, [Bar(seconds, "series-1" if part == "step" else "series-2")])
        for part, seconds in sorted(parts, key=lambda item: -item[1])
    ]
    svg = bar_chart(f"{name}: where the time went", described, groups, value_format=duration)
    rows = [(part, f"{seconds:.2f}", percent(seconds / total)) for part, seconds in parts]
    note = f"{percent(share)} of {duration(total)} went to steps that count towards the result"
    return Chart("Where the time went", svg, Table(("part", "seconds", "share"), rows), note=note)


def _describe(kind: str, values: Points) -> str:
    if len(values) == 1:
        return f"{kind} {format_number(values[0][1])}"
    return f"{kind} from {format_number(values[0][1])} to {format_number(values[-1][1])}"


def _repeats_loss(records: list[dict[str, Any]], name: str) -> bool:
    """A run with one loss term logs it next to a total that differs only in how windows are averaged."""
    losses = dict(points(records, "loss"))
    values = [(losses[step], value) for step, value in points(records, name) if step in losses]
    return name != "loss" and len(values) > 1 and all(math.isclose(a, b, rel_tol=0.02) for a, b in values)


def _numbers(train: Points, valid: Points) -> Table:
    """Every validation, and some of the steps in between."""
    by_step = {step: (format_number(value), "") for step, value in thin(train, _TABLE_ROWS)}
    training = dict(train)
    for step, value in thin(valid, _TABLE_ROWS):
        known = format_number(training[step]) if step in training else by_step.get(step, ("", ""))[0]
        by_step[step] = (known, format_number(value))
    rows = [(f"{step:,.0f}", *values) for step, values in sorted(by_step.items())]
    return Table(("step", "training", "validation"), rows)
