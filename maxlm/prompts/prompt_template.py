"""Templates of prompts: Jinja texts whose variables are checked before anything is rendered."""

import difflib
import functools
import json
from collections.abc import Collection, Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from maxlm.errors import ConfigError, DataError


class PromptTemplate:
    """A text with `{{ variables }}`, and Jinja's conditions, loops and filters.

    What a variable holds is inserted as it is, and never read as a template. A newline at the end is left out.

    Attributes:
      variables: the names that it needs.

    Raises:
      ConfigError: it is not a Jinja template; the message begins with `where`.
    """

    def __init__(self, source: str, *, where: str):
        self._where = where
        try:
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(source)))
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError([f"{where}: line {error.lineno} of the template: {error.message}"]) from None

    def check(self, available: Collection[str], *, what: str) -> None:
        """Refuse variables that nothing gives a value to.

        Args:
          available: the names that have values.
          what: what they are, for the message, such as "data.jsonl:1 has".

        Raises:
          ConfigError: naming the first unknown variable and the closest name.
        """
        for name in sorted(self.variables - set(available)):
            near = difflib.get_close_matches(name, available, 1)
            hint = f"did you mean {{{{ {near[0]} }}}}? " if near else ""
            raise ConfigError([f"{self._where}: {{{{ {name} }}}} is unknown; {hint}{what} {', '.join(available)}"])

    def render(self, values: Mapping[str, Any], *, where: str) -> str:
        """The text with the values of its variables.

        Raises:
          DataError: a value is missing, or does not fit what the template does with it; the message begins with
            `where`, the place of the values.
        """
        try:
            return self._template.render(values)
        # Filters and operators raise what they like.
        except Exception as error:
            message = " ".join(str(error).split())[:200]
            raise DataError(f"{where}: cannot be put into the template {self._where}: {message}") from None


def _shown(value: Any) -> Any:
    """A value that is inserted; what would appear in Python's notation is refused."""
    if value is None or isinstance(value, dict | list | tuple):
        what = "null" if value is None else "a list" if not isinstance(value, dict) else "an object"
        raise ValueError(f"a value is {what}; use if, for, join or tojson in the template")
    return value


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown
    )
    environment.filters["tojson"] = _to_json
    return environment
