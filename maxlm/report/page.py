"""Pages from Jinja templates, which escape every text that comes from outside."""

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
    """The first column is text, the others are numbers, unless it is all text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_text: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture with its numbers beside it; `legend` holds (style, name)."""

    title: str
    svg: str
    numbers: Table
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()

    @property
    def picture(self) -> Markup:
        """The SVG, which `report/charts.py` has made and escaped."""
        return Markup(self.svg)


def write_page(path: Path, template: str, **context: Any) -> None:
    """A whole page from a template of this package; a reader sees the old one or the new one."""
    page = _environment.get_template(template).render(context)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
