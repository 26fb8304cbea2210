"""Pages from Jinja templates, with autoescaping of all external text."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_environment = Environment(
    loader=PackageLoader("maxlm.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Table:
    """A table: the first column is text, the others are numbers, unless it is all text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_text: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with a table of its numbers; `legend` has (style, name) pairs."""

    title: str
    svg: str
    numbers: Table
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()

    @property
    def picture(self) -> Markup:
        """The SVG, already escaped by `report/charts.py`."""
        return Markup(self.svg)


def write_page(path: Path, template: str, **context: Any) -> None:
    """Write a page from a template of this package, atomically."""
    page = _environment.get_template(template).render(context)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
