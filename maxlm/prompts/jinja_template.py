"""Chat templates in Jinja, as Hugging Face stores them, rendered as `transformers` does.

They are programs of strangers: they run in a sandbox, for a limited number of steps. Text of messages can never be
parsed as a control token, as `apply_chat_template(sanitize_control_tokens=True)` of transformers has it.
"""

import functools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from maxlm.errors import TokenizerError
from maxlm.prompts.chat_template import ChatTemplate, ChatTokens

# Lines of Python that a template may run. A chat of a thousand messages takes some ten thousand.
_MAX_STEPS = 5_000_000
# Noncharacters of Unicode, which no text contains: they enclose control tokens in messages, and generated text.
_PLAIN, _PLAIN_END, _GENERATED, _GENERATED_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = re.compile(f"[{_PLAIN}-{_GENERATED_END}]")

_Range = tuple[int, int]


class RangeEncoder(Protocol):
    """What a Jinja template needs of a tokenizer.

    Attributes:
      control_tokens: the id of each.
    """

    control_tokens: Mapping[str, int]

    def encode_ranges(self, text: str, plain: Sequence[_Range]) -> tuple[list[int], list[_Range]]:
        """The ids of a text, and the characters that each is of; control tokens in `plain` ranges are text."""
        ...


@dataclass(frozen=True)
class _Rendered:
    """A chat as text; `plain`: control tokens in messages; `generated`: what the template marks as generated."""

    text: str
    plain: list[_Range]
    generated: list[_Range]


class JinjaTemplate:
    """A chat template in Jinja.

    Attributes:
      source: the template.
      answering_role: the role that the model answers as.
    """

    answering_role = "assistant"

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """Compile a template.

        Args:
          special_tokens: variables of the template, such as `bos_token`.

        Raises:
          TokenizerError: it is not valid.
        """
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            raise TokenizerError(f"line {line} of the chat template is not valid Jinja: {error}") from None
        self.source = source
        self._special_tokens = dict(special_tokens)

    def encode(self, messages: Sequence[dict], encoder: RangeEncoder, *, generation_prompt: bool = False) -> ChatTokens:
        """The ids of a chat; see `ChatTemplate.encode`.

        Answers are what the template puts into `{% generation %}`; without such a mark, what it writes for an answer
        after its generation prompt, up to the last control token.

        Raises:
          TokenizerError: the template refuses the messages, fails, runs for too long, or writes an answer in another
            way than it prompts for one.
        """
        is_control = _pattern(encoder.control_tokens)
        marked = [_marked(message, is_control) for message in messages]
        rendered = self._render(marked, generation_prompt=generation_prompt)
        ids, ranges = encoder.encode_ranges(rendered.text, rendered.plain)
        weights = [0.0] * len(ids)
        if not generation_prompt:
            for (start, end), weight in self._answers(messages, marked, rendered, is_control):
                weights = [
                    weight if start < its_end and its_start < end else kept
                    for kept, (its_start, its_end) in zip(weights, ranges)
                ]
        return ChatTokens(ids, weights)

    def end_of_turn(self, control_tokens: Iterable[str]) -> str | None:
        """The control token that ends an answer; None if there is none, or a chat of two messages is refused."""
        answer = "An answer."
        chat = [{"role": "user", "content": "A question?"}, {"role": self.answering_role, "content": answer}]
        try:
            _, found, rest = self._render(chat).text.rpartition(answer)
        except TokenizerError:
            return None
        end = _pattern(control_tokens).search(rest) if found else None
        return end[0] if end else None

    def _answers(
        self, messages: Sequence[dict], marked: list[dict], rendered: _Rendered, is_control: re.Pattern
    ) -> Iterator[tuple[_Range, float]]:
        """What is learned, and its weight."""
        answers = [i for i, message in enumerate(messages) if message.get("role") == self.answering_role]
        weights = [float(messages[i].get("weight", 1.0)) for i in answers]
        if rendered.generated:
            if len(rendered.generated) != len(answers):
                raise TokenizerError(
                    f"the chat template marks {len(rendered.generated)} parts as generated, but the chat has"
                    f" {len(answers)} answers, so their weights are not clear; mark each answer once"
                )
            yield from zip(rendered.generated, weights)
            return
        for i, weight in zip(answers, weights):
            if not weight:
                continue
            before = self._render(marked[:i], generation_prompt=True).text if i else ""
            through = self._render(marked[: i + 1]).text
            if not (rendered.text.startswith(through) and through.startswith(before)):
                raise TokenizerError(
                    f"the chat template writes message {i + 1} in another way than it prompts for it, or than later"
                    " messages leave it, so what is learned is not clear; enclose answers in {% generation %} and"
                    " {% endgeneration %} in the template, or set the weight of the message to 0"
                )
            ends = [found.end() for found in is_control.finditer(through, len(before))]
            is_last = ends and not through[ends[-1] :].strip()
            yield (len(before), ends[-1] if is_last else len(through)), weight

    def _render(self, messages: list[dict], *, generation_prompt: bool = False) -> _Rendered:
        try:
            with _limited():
                text = self._template.render(
                    messages=messages,
                    tools=None,
                    documents=None,
                    add_generation_prompt=generation_prompt,
                    **self._special_tokens,
                )
        except _TooLongError:
            raise TokenizerError(
                f"the chat template has run for more than {_MAX_STEPS:,} steps; it may never end: mend its loops"
            ) from None
        except _RefusedError as error:
            raise TokenizerError(f"the chat template refuses the chat: {error}") from None
        except Exception as error:
            raise TokenizerError(f"the chat template fails: {type(error).__name__}: {error}") from None
        return _without_marks(text)


def to_jinja(template: ChatTemplate) -> str:
    """A template of ours as Jinja."""

    def text(parts: Iterable[dict[str, str]]) -> list[str]:
        written = "".join(part.get("control", part.get("text", "")) for part in parts)
        return [json.dumps(written, ensure_ascii=False)] if written else []

    def output(parts: list[str]) -> str:
        return "{{- " + " + ".join(parts) + " }}" if parts else ""

    branches = []
    for number, (name, role) in enumerate(template.roles.items()):
        test = f"{'elif' if number else 'if'} message['role'] == {json.dumps(name)}"
        branches.append(f"{{%- {test} %}}" + output([*text(role.prefix), "message['content']", *text(role.suffix)]))
    refusal = "{%- else %}{{- raise_exception('chat role ' + message['role'] + ' is unknown') }}{%- endif %}"
    prompt = output(text(template.role(template.answering_role).prefix))
    return "\n".join(
        [
            output(text(template.begin)),
            "{%- for message in messages %}",
            *branches,
            refusal,
            "{%- endfor %}",
            "{%- if add_generation_prompt %}" + prompt + "{%- endif %}",
        ]
    ).lstrip()


def _pattern(control_tokens: Iterable[str]) -> re.Pattern:
    """Matches a control token; a longer one first."""
    return re.compile("|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))) or "(?!)")


def _marked(value: Any, is_control: re.Pattern) -> Any:
    """A message, with its control tokens marked as text, and without what is not the template's."""
    if isinstance(value, str):
        return is_control.sub(lambda found: f"{_PLAIN}{found[0]}{_PLAIN_END}", _MARKS.sub("", value))
    if isinstance(value, dict):
        return {key: _marked(item, is_control) for key, item in value.items() if key != "weight" and item is not None}
    if isinstance(value, (list, tuple)):
        return [_marked(item, is_control) for item in value]
    return value


def _without_marks(text: str) -> _Rendered:
    parts: list[str] = []
    length = end = 0
    open_at: dict[str, int] = {}
    found: dict[str, list[_Range]] = {_PLAIN: [], _GENERATED: []}
    opening = {_PLAIN_END: _PLAIN, _GENERATED_END: _GENERATED}
    for mark in _MARKS.finditer(text):
        parts.append(text[end : mark.start()])
        length, end = length + len(parts[-1]), mark.end()
        if mark[0] in found:
            open_at[mark[0]] = length
        elif (start := open_at.pop(opening[mark[0]], None)) is not None:
            found[opening[mark[0]]].append((start, length))
    return _Rendered("".join([*parts, text[end:]]), found[_PLAIN], found[_GENERATED])


class _TooLongError(Exception):
    pass


class _RefusedError(jinja2.TemplateError):
    """The template called `raise_exception`."""


@contextmanager
def _limited() -> Iterator[None]:
    """Raise _TooLongError after `_MAX_STEPS` lines of Python."""
    steps = 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > _MAX_STEPS:
            raise _TooLongError
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: encloses what the model generates."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    @staticmethod
    def _enclose(caller: Any) -> str:
        return f"{_GENERATED}{caller()}{_GENERATED_END}"


def _refuse(message: str) -> None:
    raise _RefusedError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
