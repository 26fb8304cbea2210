"""Print an evaluation in the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from maxlm.core.interval import Interval
from maxlm.eval.likelihood import bits_per_byte_by_source
from maxlm.eval.run import Evaluation, TaskEvaluation, TextEvaluation

_SHOWN_EXAMPLES = 4
_SHOWN_CHARACTERS = 60


def print_evaluation(evaluation: Evaluation) -> None:
    """Print tables to standard output; values have 95% intervals."""
    console = Console(highlight=False)
    if evaluation.text:
        _print_text(console, evaluation, evaluation.text)
    for task in evaluation.tasks:
        _print_task(console, evaluation, task)


def _print_text(console: Console, evaluation: Evaluation, text: TextEvaluation) -> None:
    title = f"{text.name}: {len(text.model.bits):,} held-out documents, {text.model.num_bytes.sum():,} bytes"
    console.print(escape(title), soft_wrap=True)
    table = Table()
    _add_columns(table, "bits per byte", "95 %", "perplexity")
    for name, likelihood in ((evaluation.model, text.model), (evaluation.other, text.other)):
        if likelihood is not None:
            perplexity = f"{likelihood.perplexity.value:.2f}"
            table.add_row(f"[bold]{escape(name)}[/]", *_figure(likelihood.bits_per_byte), perplexity, style="bold")
            for source, interval in bits_per_byte_by_source(likelihood, text.sources).items():
                table.add_row(f"  {escape(source)}", *_figure(interval), "")
    if text.difference is not None:
        table.add_row("difference", *_figure(text.difference, digits=5, signed=True), "")
    if text.baselines is not None:
        found = text.baselines
        table.add_section()
        table.add_row("unigram, tokens", *_figure(found.unigram), "")
        table.add_row("bigram, tokens", *_figure(found.bigram), "")
        table.add_row("bigram, bytes", *_figure(found.byte_bigram), "")
        table.add_row("xz", f"{found.xz:.4f}", "", "")
        table.add_row("xz, after the training text", f"{found.xz_after_training:.4f}", "", "")
    console.print(table)


def _print_task(console: Console, evaluation: Evaluation, task: TaskEvaluation) -> None:
    console.print(escape(f"{task.name}: {len(task.examples):,} examples"), soft_wrap=True)
    table = Table()
    _add_columns(table, "accuracy", "95 %")
    for name, result in ((evaluation.model, task.model), (evaluation.other, task.other)):
        if result is not None:
            table.add_row(escape(name), *_figure(result.accuracy, percent=True), style="bold")
            for kind, interval in result.by_kind.items():
                table.add_row(f"  {escape(str(kind))}", *_figure(interval, percent=True))
    if task.difference is not None:
        table.add_row("difference", *_figure(task.difference, signed=True, percent=True))
    console.print(table)
    if task.model.too_long:
        console.print(f"{task.model.too_long} examples exceed the model's context and count as wrong")
    if task.model.unreadable:
        console.print(f"{task.model.unreadable} outputs hold no answer of the format and count as wrong")
    for example, output, correct in list(zip(task.examples, task.model.outputs, task.model.correct))[:_SHOWN_EXAMPLES]:
        prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]
        mark = "[green]right[/]" if correct else "[red]wrong[/]"
        console.print(f"{mark} {_short(prompt)} -> {_short(output)}", soft_wrap=True)


def _add_columns(table: Table, *names: str) -> None:
    """A first column that wraps long paths, and number columns that are never truncated."""
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(name, no_wrap=True)


def _figure(interval: Interval, *, digits: int = 4, signed: bool = False, percent: bool = False) -> tuple[str, str]:
    form = f"{'+' if signed else ''}.{1 if percent else digits}{'%' if percent else 'f'}"
    if interval.low is None:
        return format(interval.value, form), "needs two or more"
    return format(interval.value, form), f"{interval.low:{form}} to {interval.high:{form}}"


def _short(text: str) -> str:
    text = repr(text)
    return escape(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…'")
