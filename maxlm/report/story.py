"""What `summary.json` tells of a whole pipeline: text, tasks, time, int8, samples."""

from dataclasses import dataclass
from typing import Any

from maxlm.core.interval import Interval
from maxlm.report.charts import Bar, Format, Reference, bar_chart
from maxlm.report.page import Chart, Table
from maxlm.report.text import duration, format_number, percent, to_dict, to_interval, to_list, to_number

_BASELINES = {
    "unigram": "unigram over tokens",
    "bigram": "bigram over tokens",
    "byte_bigram": "bigram over bytes",
    "xz": "xz, alone",
    "xz_after_training": "xz, after the training text",
}
# Drawn across the curve of bits per byte: the others lie far above it.
_REFERENCES = ("bigram", "xz_after_training")
_BEFORE_AFTER = (("plain", "before"), ("series-1", "after"))


def references(summary: dict[str, Any]) -> list[Reference]:
    """Baselines to draw beside the curve of bits per byte."""
    bits = to_dict(summary.get("bits_per_byte"))
    found = [(name, to_interval(bits.get(name))) for name in _REFERENCES]
    return [Reference(_BASELINES[name], interval.value) for name, interval in found if interval]


@dataclass(frozen=True)
class Story:
    """What a page shows of a pipeline.

    checks: what had to be shown: `name`, `told` (what was measured, and what to do where it falls short), `passed`.
    answers: held-out questions with the last model's answers: `prompt`, `reply`, `answer`, `right`.
    samples: what the models write: `stage`, `prompt`, `text`.
    """

    checks: list[dict[str, Any]]
    results: list[Chart]
    answers: list[dict[str, Any]]
    samples: list[dict[str, str]]
    int8: list[tuple[str, str]]


def view_story(summary: dict[str, Any]) -> Story:
    """Whatever of it a summary has."""
    results = [chart for chart in (_bits(summary), _exact_match(summary), _reward(summary), _time(summary)) if chart]
    return Story(_checks(summary), results, _answers(summary), _samples(summary), _int8(summary))


def headline(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The few figures that are read first."""
    items = []
    seconds = [number for value in to_dict(summary.get("seconds")).values() if (number := to_number(value)) is not None]
    if seconds:
        items.append((duration(sum(seconds)), "from raw text to the end"))
    if rate := to_number(summary.get("tokens_per_second")):
        items.append((f"{rate:,.0f}", "tokens a second in pretraining"))
    bits = to_dict(summary.get("bits_per_byte"))
    if model := to_interval(bits.get("pretrain")):
        bigram = to_interval(bits.get("bigram"))
        what = "bits per byte, held out" + (f" (bigram: {bigram.value:.2f})" if bigram else "")
        items.append((f"{model.value:.3f}", what))
    for key, what, told in (
        ("sft_exact_match", "right answers, by fine-tuning", percent),
        ("align_reward", "reward, by alignment", lambda value: f"{value:.2f}"),
    ):
        before, after = (to_interval(to_dict(summary.get(key)).get(when)) for when in ("before", "after"))
        if before and after:
            items.append((f"{told(before.value)} → {told(after.value)}", what))
    if (change := to_number(to_dict(summary.get("int8")).get("perplexity_change"))) is not None:
        items.append((f"{100 * change:+.2f} %", "perplexity, by int8"))
    return items


def _bits(summary: dict[str, Any]) -> Chart | None:
    """Bits per byte of held-out text: models beside the baselines."""
    found = [(name, to_interval(value)) for name, value in to_dict(summary.get("bits_per_byte")).items()]
    rows = sorted(((name, interval) for name, interval in found if interval), key=lambda row: -row[1].value)
    if not rows:
        return None
    groups = [
        (_BASELINES.get(name, f"model after {name}"), [_bar(interval, "plain" if name in _BASELINES else "series-1")])
        for name, interval in rows
    ]
    described = ", ".join(f"{label} {format_number(bars[0].value)}" for label, bars in groups)
    chart = bar_chart("Bits per byte of held-out text", described, groups)
    numbers = Table(("", "bits per byte", "95 %"), [(label, *_cells(bars[0])) for label, bars in groups])
    legend = (("series-1", "model"), ("plain", "baseline"))
    note = (
        "What a byte of held-out text costs; fewer is better. The bigram and unigram models count the same training"
        " text, xz is a general compressor. Whiskers: 95 % intervals over documents."
    )
    return Chart("Bits per byte", chart, numbers, note=note, legend=legend)


def _exact_match(summary: dict[str, Any]) -> Chart | None:
    """Exact match before and after fine-tuning."""
    values = to_dict(summary.get("sft_exact_match"))
    groups = _before_after("all questions", values)
    for kind, both in to_dict(values.get("by_kind")).items():
        groups += _before_after(str(kind), to_dict(both))
    if not groups:
        return None
    chart = bar_chart(
        "Right answers before and after fine-tuning", _described(groups, percent), groups, value_format=percent
    )
    note = _change(values, "Right greedy answers to held-out questions", lambda value: f"{100 * value:+.1f} points")
    return Chart("Right answers, by fine-tuning", chart, _numbers(groups, percent), note=note, legend=_BEFORE_AFTER)


def _reward(summary: dict[str, Any]) -> Chart | None:
    """Mean reward before and after alignment."""
    values = to_dict(summary.get("align_reward"))
    groups = _before_after("mean reward", values)
    if not groups:
        return None
    chart = bar_chart("Reward before and after alignment", _described(groups, format_number), groups)
    note = _change(values, "Expected reward of a sampled answer to held-out questions", lambda value: f"{value:+.3f}")
    return Chart("Mean reward, by alignment", chart, _numbers(groups, format_number), note=note, legend=_BEFORE_AFTER)


def _time(summary: dict[str, Any]) -> Chart | None:
    """Where the time went."""
    found = [(str(stage), to_number(value)) for stage, value in to_dict(summary.get("seconds")).items()]
    stages = [(stage, seconds) for stage, seconds in found if seconds is not None]
    if not stages:
        return None
    total = sum(seconds for _, seconds in stages)
    groups = [(stage, [Bar(seconds, "series-1")]) for stage, seconds in stages]
    chart = bar_chart("Time of each stage", _described(groups, duration), groups, value_format=duration)
    numbers = Table(("stage", "seconds"), [(stage, f"{seconds:.1f}") for stage, seconds in stages])
    note = f"{duration(total)} in all"
    if rate := to_number(summary.get("tokens_per_second")):
        note += f"; pretraining ran at {rate:,.0f} tokens a second"
    return Chart("Time of each stage", chart, numbers, note=note)


def _checks(summary: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for check in map(to_dict, to_list(summary.get("checks"))):
        passed = check.get("passed") is True
        told = str(check.get("told") or "") + ("" if passed else f"; {check.get('remedy')}")
        found.append({"name": str(check.get("name")), "told": told, "passed": passed})
    return found


def _answers(summary: dict[str, Any]) -> list[dict[str, Any]]:
    answers = map(to_dict, to_list(to_dict(summary.get("chat")).get("answers")))
    keys = ("prompt", "reply", "answer")
    return [{**{key: str(each.get(key) or "") for key in keys}, "right": each.get("right") is True} for each in answers]


def _samples(summary: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    for sample in map(to_dict, to_list(summary.get("samples"))):
        stage, prompt, text = (str(sample.get(key) or "") for key in ("stage", "prompt", "text"))
        # A pretrained model goes on with a text; an answer stands under its question.
        gap = "" if stage == "pretrain" else "\n"
        if text or prompt:
            found.append({"stage": stage, "prompt": prompt, "text": gap + text})
    return found


def _int8(summary: dict[str, Any]) -> list[tuple[str, str]]:
    values = to_dict(summary.get("int8"))
    told = []
    if (change := to_number(values.get("perplexity_change"))) is not None:
        bounds = [to_number(values.get(f"perplexity_change_{end}")) for end in ("low", "high")]
        interval = "" if None in bounds else f" (95 %: {100 * bounds[0]:+.3f} to {100 * bounds[1]:+.3f})"
        told.append(("change of perplexity", f"{100 * change:+.3f} %{interval}"))
    if (kl := to_number(values.get("mean_kl"))) is not None:
        told.append(("mean KL divergence from the float model", f"{format_number(kl)} nats"))
    sizes = [to_number(values.get(f"bytes_{kind}")) for kind in ("float", "int8")]
    if None not in sizes:
        told.append(("weights", f"{sizes[0] / 1e6:.1f} MB to {sizes[1] / 1e6:.1f} MB"))
    return told


def _before_after(label: str, values: dict[str, Any]) -> list[tuple[str, list[Bar]]]:
    """One group of bars, or none where a figure is missing."""
    before, after = to_interval(values.get("before")), to_interval(values.get("after"))
    if before is None or after is None:
        return []
    return [(label, [_bar(before, "plain"), _bar(after, "series-1")])]


def _change(values: dict[str, Any], what: str, told: Format) -> str:
    """The difference as a sentence, with its interval where there is one."""
    before, after = to_interval(values.get("before")), to_interval(values.get("after"))
    if before is None or after is None:
        return ""
    text = f"{what}: {told(after.value - before.value)}"
    bounds = [to_number(bound) for bound in to_list(values.get("interval"))]
    if len(bounds) == 2 and None not in bounds:
        text += f" (95 % interval of the paired difference: {told(bounds[0])} to {told(bounds[1])})"
    return text


def _bar(interval: Interval, style: str) -> Bar:
    return Bar(interval.value, style, interval.low, interval.high)


def _cells(bar: Bar, told: Format = format_number) -> tuple[str, str]:
    return told(bar.value), "" if bar.low is None else f"{told(bar.low)} to {told(bar.high)}"


def _described(groups: list[tuple[str, list[Bar]]], told: Format) -> str:
    return "; ".join(f"{label}: {' to '.join(told(bar.value) for bar in bars)}" for label, bars in groups)


def _numbers(groups: list[tuple[str, list[Bar]]], told: Format) -> Table:
    return Table(("", "before", "after"), [(label, *(told(bar.value) for bar in bars)) for label, bars in groups])
