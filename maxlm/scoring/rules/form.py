"""Rewards of the form of a completion: a pattern, tags, or JSON of a schema."""

import json
import re
from typing import Annotated, Any

import jsonschema
import regex
from pydantic import AfterValidator, Field

# `re` cannot be interrupted; a pattern whose time is exponential in the text would stop the run.
_SECONDS = 1.0
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


def _valid_pattern(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


def _valid_schema(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"is not a JSON schema: {error.message}") from None
    return schema


def _valid_tags(tags: list[str]) -> list[str]:
    for tag in tags:
        if not re.fullmatch(r"[A-Za-z][\w.-]*", tag):
            raise ValueError(f"{tag!r} is not the name of a tag; give think for <think>...</think>")
    if len(set(tags)) < len(tags):
        raise ValueError("a tag is named twice")
    return tags


def regex_match(
    prompt: Any,
    completions: list[str],
    record: dict[str, Any],
    *,
    pattern: Annotated[str, AfterValidator(_valid_pattern)],
    whole: bool = False,
) -> list[float]:
    """1 if the pattern (of the package `regex`) is found in the completion, or, if `whole`, matches all of it.

    A search that takes more than a second counts as none.
    """
    compiled = regex.compile(pattern)
    search = compiled.fullmatch if whole else compiled.search

    def found(text: str) -> bool:
        try:
            return search(text, timeout=_SECONDS, concurrent=True) is not None
        except TimeoutError:
            return False

    return [float(found(text)) for text in completions]


def tag_format(
    prompt: Any,
    completions: list[str],
    record: dict[str, Any],
    *,
    tags: Annotated[list[str], Field(min_length=1), AfterValidator(_valid_tags)],
    only: bool = True,
) -> list[float]:
    """1 if each <tag>...</tag> is there once, in this order, none within another, and none empty.

    Args:
      only: whether nothing but whitespace may be outside of the tags.
    """
    return [float(_has_tags(text, tags, only=only)) for text in completions]


def _has_tags(text: str, tags: list[str], *, only: bool) -> bool:
    place, outside = 0, ""
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return False
        start, end = text.index(opening), text.index(closing)
        if not place <= start < end or not text[start + len(opening) : end].strip():
            return False
        outside += text[place:start]
        place = end + len(closing)
    return not (only and (outside + text[place:]).strip())


def json_format(
    prompt: Any,
    completions: list[str],
    record: dict[str, Any],
    *,
    schema: Annotated[dict[str, Any], AfterValidator(_valid_schema)] = {},  # noqa: B006 - never modified
) -> list[float]:
    """1 if the completion is JSON that conforms to the schema, alone or in one ```json block."""
    validator = jsonschema.validators.validator_for(schema)(schema)

    def conforms(text: str) -> bool:
        blocks = _FENCED.findall(text)
        try:
            value = json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=_refuse)
            return validator.is_valid(value)
        except (ValueError, RecursionError):
            return False

    return [float(conforms(text)) for text in completions]


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
