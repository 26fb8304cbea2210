"""The form that an answer must have: how it is asked for, and how it is read from a text that reasons first."""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jsonschema
import referencing
import regex

from maxlm.config.prompt import AnyFormatConfig, ChoiceFormatConfig, JsonFormatConfig, RegexFormatConfig
from maxlm.errors import ConfigError

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# How the references of GSM8K end (arXiv:2110.14168).
_FINAL_LINE = re.compile(r"(?:^|\n)####[ \t]*(\S.*)\s*$")
_OPENING = re.compile(r"[\[{]")
# How many brackets are tried as the beginning of a JSON value; each may take a pass over the rest of the text.
_MAX_STARTS = 1000
# Of a search for a pattern: a text of a model must not be able to stop its reader.
_SEARCH_SECONDS = 1.0
# Marks around a choice: Markdown, quotes, brackets, final punctuation.
_MARKS = " \t*_`'\"()[]{}<>“”‘’「」『』【】《》.。,，;；!！:："


class UnreadableAnswer(Exception):  # noqa: N818 - a result, which callers count
    """A text does not hold an answer of the format; the message says why."""


class AnswerFormat(Protocol):
    """A form of answers that evaluation, judges and prompts share."""

    def instruction(self) -> str:
        """A sentence that asks a model for this form."""
        ...

    def parse(self, text: str) -> Any:
        """The answer in a text; the last one, if it holds several.

        Raises:
          UnreadableAnswer: it holds none.
        """
        ...


@dataclass(frozen=True)
class ChoiceFormat:
    """One of a few words, in a last line such as `Answer: B`, or alone.

    Case, Markdown and quotes around it do not matter, nor does the width of the colon.

    Raises:
      ConfigError: the choices are fewer than two, empty, or equal but for case.
    """

    choices: tuple[str, ...]
    label: str = "Answer"

    def __post_init__(self):
        plain = [_plain(choice) for choice in self.choices]
        if len(plain) < 2 or not all(plain) or len({*plain}) < len(plain):
            raise ConfigError([f"choices: must be two or more different words, not {', '.join(self.choices)}"])

    def instruction(self) -> str:
        return f'End with one line, "{self.label}: X", where X is {_listed(self.choices)}.'

    def parse(self, text: str) -> str:
        by_plain = {_plain(choice): choice for choice in self.choices}
        labelled = re.findall(
            rf"^[^\S\n]*[*_#>`]*[^\S\n]*{re.escape(self.label)}[*_`]*[^\S\n]*[:：](.*)$",
            text,
            re.MULTILINE | re.IGNORECASE,
        )
        given = labelled[-1] if labelled else text
        if (found := by_plain.get(_plain(given))) is None:
            what = f"ends with {self.label}: {_short(given)}" if labelled else f"has no line {self.label}: X"
            raise UnreadableAnswer(f"{what}, where X is {_listed(self.choices)}")
        return found


@dataclass(frozen=True)
class RegexFormat:
    """What a regular expression finds: its first group, or all of it if it has none.

    Raises:
      ConfigError: it is not a regular expression.
    """

    pattern: str

    def __post_init__(self):
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise ConfigError([f"pattern: {self.pattern!r} is not a regular expression: {error}"]) from None

    def instruction(self) -> str:
        return f"The answer must match the regular expression {self.pattern}"

    def parse(self, text: str) -> str:
        try:
            matches = list(regex.finditer(self.pattern, text, regex.MULTILINE, timeout=_SEARCH_SECONDS))
        except TimeoutError:
            raise UnreadableAnswer(f"takes more than {_SEARCH_SECONDS:g} s to search for {self.pattern}") from None
        if not matches:
            raise UnreadableAnswer(f"has nothing that matches {self.pattern}")
        last = matches[-1]
        return next((group for group in last.groups() if group is not None), last[0])


class JsonFormat:
    """A JSON value that fits a JSON schema (draft 2020-12, unless the schema names another).

    It may stand alone, in a fenced block, or in other text. Schemas cannot refer to other files.

    Raises:
      ConfigError: the schema itself is wrong.
    """

    def __init__(self, schema: dict[str, Any]):
        self.schema = schema
        if not isinstance(schema.get("$schema", ""), str):
            raise ConfigError(["json_schema: $schema: must be a string"])
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema, format_checker=kind.FORMAT_CHECKER)  # patterns are regular expressions
            # An empty registry: references are never fetched.
            searching = jsonschema.validators.extend(kind, {"pattern": _pattern})
            self._validator = searching(schema, registry=referencing.Registry())
            self._problem({})
        except jsonschema.SchemaError as error:
            place = ".".join(map(str, error.absolute_path)) or "the schema"
            raise ConfigError([f"json_schema: {place}: {_short(error.message, 200)}"]) from None
        except referencing.exceptions.Unresolvable as error:
            raise ConfigError([f"json_schema: the reference {error.ref} is to nothing in the schema"]) from None
        except RecursionError:
            raise ConfigError(["json_schema: a reference leads back to itself"]) from None

    def instruction(self) -> str:
        return f"Answer with one JSON value that fits this JSON schema: {json.dumps(self.schema, ensure_ascii=False)}"

    def parse(self, text: str) -> Any:
        problem = "holds no JSON value"
        for value in _json_values(text):
            try:
                found = self._problem(value)
            except RecursionError:
                found = "the JSON value is nested too deeply"
            except TimeoutError:
                found = f"takes more than {_SEARCH_SECONDS:g} s to search for a pattern of the schema"
            if found is None:
                return value
            problem = found
        raise UnreadableAnswer(problem)

    def _problem(self, value: Any) -> str | None:
        error = jsonschema.exceptions.best_match(self._validator.iter_errors(value))
        if error is None:
            return None
        place = ".".join(map(str, error.absolute_path))
        return f"the JSON value does not fit the schema: {f'{place}: ' if place else ''}{_short(error.message, 160)}"


def answer_format(config: AnyFormatConfig, *, where: str) -> AnswerFormat:
    """The format of a configuration.

    Raises:
      ConfigError: its choices, schema or pattern are wrong; the message begins with `where`.
    """
    try:
        match config:
            case ChoiceFormatConfig():
                return ChoiceFormat(config.choices, config.label)
            case JsonFormatConfig():
                return JsonFormat(config.json_schema)
            case RegexFormatConfig():
                return RegexFormat(config.pattern)
    except ConfigError as error:
        raise ConfigError([f"{where}: {error}"]) from None


def tagged_answers(text: str) -> list[str]:
    """The content of each <answer>...</answer>."""
    return _TAGGED.findall(text)


def final_line(text: str) -> str:
    """The answer in a last line such as `#### 18`; the whole text if there is none."""
    found = _FINAL_LINE.search(text)
    return found[1].strip() if found else text


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """The keyword `pattern` of JSON schemas, with a time limit."""
    try:
        matches = not validator.is_type(value, "string") or regex.search(pattern, value, timeout=_SEARCH_SECONDS)
    except regex.error:  # one that only `re` understands
        matches = False
    if not matches:
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _no_number(name: str) -> None:
    """NaN and Infinity, which Python's reader accepts."""
    raise ValueError(name)


def _json_values(text: str) -> Iterator[Any]:
    """The JSON values of a text: all of it, or else the objects and lists in it, the last first."""
    try:
        yield json.loads(text, parse_constant=_no_number)
        return
    except (ValueError, RecursionError):
        pass
    decoder, found, position = json.JSONDecoder(parse_constant=_no_number), [], 0
    for _ in range(_MAX_STARTS):
        if (start := _OPENING.search(text, position)) is None:
            break
        try:
            value, position = decoder.raw_decode(text, start.start())
            found.append(value)
        except (ValueError, RecursionError):
            position = start.end()
    yield from reversed(found)


def _plain(choice: str) -> str:
    return unicodedata.normalize("NFKC", choice).strip().strip(_MARKS).casefold()


def _listed(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
