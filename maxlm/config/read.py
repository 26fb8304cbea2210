"""Parse YAML text into a tree of dicts, lists and plain values that are safe to use.

Numbers follow YAML 1.2 (`3e-4` is a number, `1:30` and `010` are not base 60 and 8), and dates are strings.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_DEPTH = 50
_MAX_VALUES = 100_000  # aliases of aliases grow without bound
_MAX_DIGITS = 400  # longer than any float

_DIGITS = "[0-9](?:_?[0-9])*"
_FLOAT = (
    rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class BadYaml(Exception):  # noqa: N818 - always caught and reported with the name of the file
    """A YAML text is invalid; `line` counts from 1 and is None if unknown."""

    def __init__(self, message: str, line: int | None = None):
        self.line = line
        super().__init__(message)


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise BadYaml("is nested too deeply", self.peek_event().start_mark.line + 1)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in first:
                    raise BadYaml(f"{_short(key.value)} is given twice, first in line {first[key.value]}", line)
                first[key.value] = line
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = self.construct_scalar(node)
        if len(text) > _MAX_DIGITS:
            raise BadYaml(f"a number of {len(text):,} characters is too long", node.start_mark.line + 1)
        try:
            return (
                int(text)
                if node.tag.endswith(":int")
                else float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            )
        except ValueError:
            raise BadYaml(f"{_short(text)} is not a number", node.start_mark.line + 1) from None


# The first matching resolver wins, so the ones to replace are removed.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in (("int", rf"[-+]?{_DIGITS}"), ("float", _FLOAT)):
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})$"), list("-+.0123456789"))
    _Loader.add_constructor(_tag, _Loader.construct_number)


def read_yaml(text: str) -> Any:
    """Parse a YAML text into a value without shared parts.

    Raises:
      BadYaml: it is not YAML, has a duplicate key, is too deep or too large, or holds a value that is not a string,
        number, boolean, null, list or section.
    """
    try:
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadYaml(
            f"is not valid YAML: {_short(error.problem or error.context or '', 120)}", mark.line + 1 if mark else None
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadYaml(f"holds the character {text[error.position]!r}, which YAML does not allow", line) from None
    except BadYaml:
        raise
    except Exception as error:
        # The parser of a built-in YAML tag, such as !!binary, may raise anything.
        raise BadYaml(f"holds a value that cannot be read: {_short(str(error))}") from None
    return _plain(tree, 0, iter(range(_MAX_VALUES)))


def _plain(value: Any, depth: int, left: Iterator[int]) -> Any:
    """A copy with aliases expanded."""
    if depth > MAX_DEPTH:
        raise BadYaml("is nested too deeply")
    if next(left, None) is None:
        raise BadYaml(f"holds more than {_MAX_VALUES:,} values")
    match value:
        case dict():
            return {_key(key): _plain(inner, depth + 1, left) for key, inner in value.items()}
        case list():
            return [_plain(inner, depth + 1, left) for inner in value]
        case str():
            return _text(value)
        case None | bool() | int() | float():
            return value
    raise BadYaml(f"holds {_short(repr(value))}, which is not a string, number, list or section")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise BadYaml(f"the key {_short(str(key))} must be a string; write it in quotes")
    return _text(key)


def _text(text: str) -> str:
    """Reject NUL, which file systems refuse, and lone surrogates, which cannot be encoded."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise BadYaml(f"{_short(text)!a} holds a NUL or a lone surrogate, which no name or text can contain")
    return text


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
