"""The report's parts on a whole pipeline: what `summary.json` tells of text, tasks, time, int8 and samples."""

from html import escape
from typing import Any

from maxlm.core.interval import Interval
from maxlm.eval.html_parts import (
    charts,
    duration,
    facts,
    figure,
    paragraph,
    percent,
    section,
    table,
    to_dict,
    to_interval,
    to_list,
    to_number,
)
from maxlm.eval.svg import Bar, Format, Reference, bar_chart, format_number

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


def results_section(summary: dict[str, Any]) -> str:
    """What the stages reached, and what they took."""
    return section("Results", charts([_bits(summary), _exact_match(summary), _reward(summary), _time(summary)]))


def _bits(summary: dict[str, Any]) -> str:
    """Bits per byte of held-out text: models beside the baselines."""
    found = [(name, to_interval(value)) for name, value in to_dict(summary.get("bits_per_byte")).items()]
    rows = sorted(((name, interval) for name, interval in found if interval), key=lambda row: -row[1].value)
    if not rows:
        return ""
    groups = [
        (_BASELINES.get(name, f"model after {name}"), [_bar(interval, "plain" if name in _BASELINES else "series-1")])
        for name, interval in rows
    ]
    described = ", ".join(f"{label} {format_number(bars[0].value)}" for label, bars in groups)
    chart = bar_chart("Bits per byte of held-out text", described, groups)
    numbers = table(("", "bits per byte", "95 %"), [(label, *_cells(bars[0])) for label, bars in groups])
    legend = (("series-1", "model"), ("plain", "baseline"))
    note = (
        "What a byte of held-out text costs; fewer is better. The bigram and unigram models count the same training"
        " text, xz is a general compressor. Whiskers: 95 % intervals over documents."
    )
    return figure("Bits per byte", chart, numbers, note=note, legend=legend)


def _exact_match(summary: dict[str, Any]) -> str:
    """Exact match before and after fine-tuning."""
    values = to_dict(summary.get("sft_exact_match"))
    groups = _before_after("all questions", values)
    for kind, both in to_dict(values.get("by_kind")).items():
        groups += _before_after(str(kind), to_dict(both))
    if not groups:
        return ""
    chart = bar_chart(
        "Right answers before and after fine-tuning", _described(groups, percent), groups, value_format=percent
    )
    note = _change(values, "Right greedy answers to held-out questions", lambda value: f"{100 * value:+.1f} points")
    return figure("Right answers, by fine-tuning", chart, _numbers(groups, percent), note=note, legend=_BEFORE_AFTER)


def _reward(summary: dict[str, Any]) -> str:
    """Mean reward before and after alignment."""
    values = to_dict(summary.get("align_reward"))
    groups = _before_after("mean reward", values)
    if not groups:
        return ""
    chart = bar_chart("Reward before and after alignment", _described(groups, format_number), groups)
    note = _change(values, "Expected reward of a sampled answer to held-out questions", lambda value: f"{value:+.3f}")
    return figure("Mean reward, by alignment", chart, _numbers(groups, format_number), note=note, legend=_BEFORE_AFTER)


def _time(summary: dict[str, Any]) -> str:
    """Where the time went."""
    found = [(str(stage), to_number(value)) for stage, value in to_dict(summary.get("seconds")).items()]
    stages = [(stage, seconds) for stage, seconds in found if seconds is not None]
    if not stages:
        return ""
    total = sum(seconds for _, seconds in stages)
    groups = [(stage, [Bar(seconds, "series-1")]) for stage, seconds in stages]
    chart = bar_chart("Time of each stage", _described(groups, duration), groups, value_format=duration)
    numbers = table(("stage", "seconds"), [(stage, f"{seconds:.1f}") for stage, seconds in stages])
    note = f"{duration(total)} in all"
    if rate := to_number(summary.get("tokens_per_second")):
        note += f"; pretraining ran at {rate:,.0f} tokens a second"
    return figure("Time of each stage", chart, numbers, note=note)


def checks_section(summary: dict[str, Any]) -> str:
    """What had to be shown and was measured; with what to do where it falls short."""
    rows = []
    for check in map(to_dict, to_list(summary.get("checks"))):
        passed = check.get("passed") is True
        told = str(check.get("told") or "") + ("" if passed else f"; {check.get('remedy')}")
        verdict = '<td class="good">yes</td>' if passed else '<td class="bad">NO</td>'
        rows.append(f"<tr><td>{escape(str(check.get('name')))}</td><td>{escape(told)}</td>{verdict}</tr>")
    if not rows:
        return ""
    header = "<tr><th>must show</th><th>measured</th><th></th></tr>"
    return section(
        "Checks",
        f'<div class="scroll"><table><thead>{header}</thead><tbody>{"".join(rows)}</tbody></table></div>',
    )


def int8_section(summary: dict[str, Any]) -> str:
    """What quantisation cost."""
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
    return (
        section("int8", paragraph("What rounding the weights to 8 bits cost, on held-out text."), facts(told))
        if told
        else ""
    )


def chat_section(summary: dict[str, Any]) -> str:
    """The last model in conversation: held-out questions with its answers, right and wrong ones marked."""
    rows = []
    for answer in map(to_dict, to_list(to_dict(summary.get("chat")).get("answers"))):
        right = answer.get("right") is True
        verdict = (
            '<td class="good">right</td>' if right else f'<td class="bad">wrong: {escape(_text(answer, "answer"))}</td>'
        )
        cells = "".join(f"<td>{escape(_text(answer, key))}</td>" for key in ("prompt", "reply"))
        rows.append(f"<tr>{cells}{verdict}</tr>")
    if not rows:
        return ""
    header = "<tr><th>question</th><th>answer</th><th></th></tr>"
    return section(
        "A chat",
        paragraph("Questions that no stage has seen, asked of the running server."),
        f'<div class="scroll"><table><thead>{header}</thead><tbody>{"".join(rows)}</tbody></table></div>',
    )


def samples_section(summary: dict[str, Any]) -> str:
    """What the models write."""
    cards = []
    for sample in to_list(summary.get("samples")):
        sample = to_dict(sample)
        stage, prompt, text = (str(sample.get(key) or "") for key in ("stage", "prompt", "text"))
        if text or prompt:
            # A pretrained model goes on with a text; an answer stands under its question.
            gap = "" if stage == "pretrain" else "\n"
            cards.append(
                f'<div class="card"><span class="stage">{escape(stage)}</span>'
                f'<pre><span class="prompt">{escape(prompt)}</span>{gap}{escape(text)}</pre></div>'
            )
    return section("Samples", f'<div class="samples">{"".join(cards)}</div>') if cards else ""


def _text(values: dict[str, Any], key: str) -> str:
    return str(values.get(key) or "")


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


def _numbers(groups: list[tuple[str, list[Bar]]], told: Format) -> str:
    return table(("", "before", "after"), [(label, *(told(bar.value) for bar in bars)) for label, bars in groups])
