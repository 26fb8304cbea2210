"""Reports for the terminal and for documents."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from maxlm.verify.report import GRADIENT_TOLERANCE, LOSS_TOLERANCE, Finding, Report

_COLUMNS = ("variant", "loss", "gradient", "of parameter", "verdict", "CPU s")
_STYLES = {"same": "green", "differs": "bold red"}


def table(report: Report) -> RenderableType:
    """The report for a terminal, which may be 80 columns wide: reasons for skipped variants are below the table."""
    shown = Table(title=f"maxlm verify {report.title}", title_justify="left")
    for name in _COLUMNS:
        shown.add_column(name, overflow="fold", justify="right" if name in ("loss", "gradient", "CPU s") else "left")
    for finding in report.compared:
        *cells, verdict, seconds = _cells(finding)
        shown.add_row(*cells, Text(verdict, _STYLES[verdict]), seconds)
    parts: list[RenderableType] = [shown, *_skipped(report)] if report.compared else []
    return Group(Text(report.subject), *parts, Text(conclusion(report)))


def markdown(report: Report) -> str:
    """The report as a section of a document."""
    lines = [f"### {report.title}", "", f"{_sentence(report.subject)}", ""]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "| --- | ---: | ---: | --- | --- | ---: |"]
    lines += ["| " + " | ".join(_cells(finding)) + " |" for finding in report.findings]
    return "\n".join([*lines, "", _sentence(conclusion(report)), ""])


def summary(reports: Sequence[Report]) -> str:
    """The largest gradient difference of each recipe, by mesh axis and other group."""
    groups = list(dict.fromkeys(group for report in reports for group in report.largest()))
    lines = ["| largest gradient difference | " + " | ".join(report.title for report in reports) + " |"]
    lines.append("| --- |" + " ---: |" * len(reports))
    for group in groups:
        cells = [f"{found[group]:.1e}" if group in found else "" for found in (report.largest() for report in reports)]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def conclusion(report: Report) -> str:
    """The result, with a sentence for each failure."""
    if not report.compared:
        reasons = "; ".join(f"{finding.name}: {finding.skipped}" for finding in report.findings)
        return f"nothing was compared: {reasons or 'there are no variants'}"
    if report.passed:
        ways = "1 way gives" if len(report.compared) == 1 else f"{len(report.compared)} ways give"
        worst = max(report.compared, key=lambda finding: finding.gradient_difference)
        return (
            f"{ways} the same: largest gradient difference {worst.gradient_difference:.1e}"
            f" ({worst.name}; allowed {GRADIENT_TOLERANCE:.0e}), in {report.seconds:.0f} s"
        )
    return "\n".join(failure(finding) for finding in report.failed)


def failure(finding: Finding) -> str:
    """The parameters that differ first and most, and by how much."""
    parts = [f"{finding.name} differs"]
    if not finding.loss_difference <= LOSS_TOLERANCE:
        parts.append(f"{finding.term} by {finding.loss_difference:.1e} of it")
    if finding.first is not None:
        gradients = f"gradients from {finding.first} on, by {finding.first_difference:.1e} of its largest entry"
        if finding.parameter != finding.first:
            gradients += f", and most in {finding.parameter}, by {finding.gradient_difference:.1e}"
        parts.append(gradients)
    return f"{parts[0]}: {'; '.join(parts[1:])}"


def _cells(finding: Finding) -> tuple[str, ...]:
    if finding.skipped is not None:
        return finding.name, "", "", "", f"skipped: {finding.skipped}", ""
    gradient = f"{finding.gradient_difference:.1e}" if finding.parameter else ""
    seconds = f"{finding.seconds:.1f}"
    return finding.name, f"{finding.loss_difference:.1e}", gradient, finding.parameter, finding.verdict, seconds


def _skipped(report: Report) -> list[Text]:
    """A line per reason for skipped variants, with their names."""
    names: dict[str, list[str]] = {}
    for finding in report.findings:
        if finding.skipped is not None:
            names.setdefault(finding.skipped, []).append(finding.name)
    return [Text(f"skipped ({reason}): {'; '.join(found)}", "dim") for reason, found in names.items()]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].replace("\n", ".  \n") + "."
