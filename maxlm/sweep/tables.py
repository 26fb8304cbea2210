"""Terminal output of `maxlm sweep`."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from maxlm.config.sweep import SweepConfig
from maxlm.report.text import duration
from maxlm.sweep.trials import describe_setting

_MAX_ROWS = 20


def print_plan(found: Mapping[str, Any]) -> None:
    """Print the trials of `--dry-run`."""
    console = wide_console()
    table = Table(box=None, pad_edge=False)
    for name in ("trial", "size", "setting"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "weights", "tokens", "FLOPs"):
        table.add_column(name, justify="right")
    for row in found["trials"]:
        setting = "as predicted" if row["is_target"] else f"the best of round {row['round'] - 1}"
        steps = f"{row['steps']:,}"
        table.add_row(
            "done" if row["done"] else row["trial"] or "",
            row["size"],
            brief(row["setting"]) if row["setting"] is not None else setting,
            f"{row['steps'] - row['new_steps']:,}-{row['steps']:,}" if row["new_steps"] < row["steps"] else steps,
            f"{row['parameters']:,}",
            f"{row['tokens']:,}",
            f"{row['flops']:.2e}",
        )
    console.print(table)
    counts = f"{len(found['trials'])} trials, {found['done']} of them done; to do: {found['steps']:,} steps"
    time = "no finished trial yet to estimate the time from"
    if found["seconds"] is not None:
        time = f"about {duration(found['seconds'])} at {found['flops_per_second']:.2e} FLOPs per second"
        time += "" if found["has_run"] else ", without the start-up of each trial"
    console.print(f"{counts}, {found['flops']:.2e} FLOPs; {time}", markup=False)


def wide_console() -> Console:
    """Standard output; in a file or a pipe, rows are not wrapped at 80 columns."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def brief(setting: Mapping[str, Any]) -> str:
    """A setting with only the last part of each key."""
    return describe_setting({name.rpartition(".")[2]: value for name, value in setting.items()})


def print_summary(config: SweepConfig, summary: Mapping[str, Any]) -> None:
    """Print the results of a sweep."""
    console = wide_console()
    metric = summary["metric"]
    table = Table(title="the best settings", title_justify="left", box=None, pad_edge=False)
    for name in ("size", "setting"):
        table.add_column(name, overflow="fold")
    for name in ("steps", metric):
        table.add_column(name, justify="right")
    for row in summary["ranking"][:_MAX_ROWS]:
        table.add_row(row["size"], brief(row["setting"]), f"{row['steps']:,}", f"{row['value']:.4f}")
    console.print(table)
    if (law := summary["law"]) is not None:
        console.print(f"law: {metric} = E + A x^-alpha, x = {config.scales.against}", markup=False)
        for name, symbol in (("irreducible", "E"), ("coefficient", "A"), ("exponent", "alpha")):
            console.print(f"  {symbol} = {law[name]['value']:.4g}{_interval(law[name]['interval'])}", markup=False)
        sizes = Table(box=None, pad_edge=False)
        sizes.add_column("size", overflow="fold")
        for name in (config.scales.against, "law", "measured"):
            sizes.add_column(name, justify="right")
        for row in summary["sizes"]:
            sizes.add_row(*row)
        console.print(sizes)
    for name, optimum in summary["optima"].items():
        if (exponent := optimum["exponent"]) is not None:
            power = f"{exponent['value']:.3g}{_interval(exponent['interval'])}"
            console.print(f"best {name} ∝ {config.scales.against}^{power}", markup=False)
    for note in summary["notes"]:
        console.print(f"note: {note}", markup=False)
    counts = ", ".join(f"{count} {status}" for status, count in summary["trials"].items() if count)
    best = summary["best"]
    console.print(
        f"best: {metric} {best['value']:.4f} with {describe_setting(best['setting'])} ({best['size']})", markup=False
    )
    console.print(f"trials: {counts}; {duration(summary['seconds'])}", markup=False)
    console.print(f"page:   {config.output}/index.html\ntrain:  maxlm train {config.output}/best.yaml", markup=False)


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" [{bounds[0]:.3g}, {bounds[1]:.3g}]"
