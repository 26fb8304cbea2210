"""Pieces of the report's page. Every text that comes from outside is escaped here."""

import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from maxlm.core.interval import Interval
from maxlm.eval.svg import format_number

_LONGEST_FACT = 60


def write_page(path: Path, title: str, body: Iterable[str]) -> None:
    """A whole page of the parts that are not empty; a reader sees the old one or the new one."""
    template = Template(files("maxlm.eval").joinpath("report.html").read_text(encoding="utf-8"))
    page = template.substitute(title=escape(title), body="\n".join(filter(None, body)))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


def section(title: str, *parts: str) -> str:
    """Nothing at all where no part has content."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def paragraph(text: str) -> str:
    return f'<p class="muted">{escape(text)}</p>'


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """Headline figures: (value, what it is)."""
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in items)
    return f'<div class="tiles">{cells}</div>' if cells else ""


def figure(title: str, svg: str, table: str, *, note: str = "", legend: Sequence[tuple[str, str]] = ()) -> str:
    """A chart with its numbers beside it; `legend` holds (class, name)."""
    small = f"<small>{escape(note)}</small>" if note else ""
    items = "".join(f'<li class="{style}"><i></i><span>{escape(name)}</span></li>' for style, name in legend)
    return (
        f"<figure><figcaption>{escape(title)}{small}</figcaption>"
        + (f'<ul class="legend">{items}</ul>' if items else "")
        + f"{svg}<details><summary>Numbers</summary>{table}</details></figure>"
    )


def charts(figures: Iterable[str]) -> str:
    content = "".join(figures)
    return f'<div class="charts">{content}</div>' if content else ""


def folded_charts(title: str, figures: Iterable[str]) -> str:
    content = charts(figures)
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are numbers."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if index else ''}>{escape(cell)}</{tag}>" for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def facts(items: Iterable[tuple[str, str]]) -> str:
    """Names with values on a line that wraps."""
    content = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items)
    return f'<dl class="facts">{content}</dl>' if content else ""


def folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def to_number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def to_interval(value: Any) -> Interval | None:
    """A number, or an object with `value` and perhaps `low` and `high`."""
    if isinstance(value, dict):
        number = to_number(value.get("value"))
        low, high = to_number(value.get("low")), to_number(value.get("high"))
    else:
        number, low, high = to_number(value), None, None
    if number is None:
        return None
    return Interval(number, low, high) if low is not None and high is not None else Interval(number, None, None)


def to_dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def to_list(value: Any) -> list:
    return value if isinstance(value, list) else []


def percent(value: float) -> str:
    return f"{100 * value:.1f}\u00a0%"


def duration(seconds: float) -> str:
    """8.4 s, 3 min 20 s, 2 h 05 min"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def flat_facts(values: dict, *, limit: int = 24, prefix: str = "") -> list[tuple[str, str]]:
    """Scalars of nested objects as (name, text), at most `limit` of them."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        label = prefix + str(name).replace("_", " ")
        if isinstance(value, dict):
            found += flat_facts(value, limit=limit, prefix=f"{label}: ")
        elif isinstance(value, bool):
            found.append((label, "yes" if value else "no"))
        elif isinstance(value, str) and len(value) <= _LONGEST_FACT:
            found.append((label, value))
        elif (number := to_number(value)) is not None:
            found.append((label, format_number(number)))
    return found[:limit]
