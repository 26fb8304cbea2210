"""Chat templates in Jinja, as Hugging Face stores them, rendered as `transformers` does.

They are programs of strangers: they run in a sandbox, for a limited number of steps. Text of messages can never be
parsed as a control token, as `apply_chat_template(sanitize_control_tokens=True)` of transformers has it.
"""

import difflib
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from maxlm.errors import TokenizerError
from maxlm.prompts.chat_template import ChatTemplate, ChatTokens
from maxlm.prompts.tools import CALLS, NAMES, RESULTS, TOOLS, as_written, to_json

# Lines of Python that a template may run. A chat of a thousand messages takes some ten thousand.
_MAX_STEPS = 5_000_000
# Noncharacters of Unicode, which no text contains: they enclose control tokens in messages, and generated text.
_PLAIN, _PLAIN_END, _GENERATED, _GENERATED_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = re.compile(f"[{_PLAIN}-{_GENERATED_END}]")
# Names in the style of control tokens.
_LIKE_CONTROL = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>|<(?:start|end)_of_turn>|<reserved_\d+>|\[gMASK\]|<sop>")
# Of messages that templates may not write.
_SPECIAL_KEYS = {"tool_calls", "name"}
_ROLES = ("system", "user", "assistant", "tool")

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
        self._ends = functools.cache(self._find_ends)

    def encode(
        self,
        messages: Sequence[dict],
        encoder: RangeEncoder,
        *,
        tools: Sequence[dict] | None = None,
        generation_prompt: bool = False,
    ) -> ChatTokens:
        """The ids of a chat; see `ChatTemplate.encode`.

        Answers are what the template puts into `{% generation %}`; without such a mark, what it writes for an answer
        after its generation prompt, up to the last control token. If it writes none there, as those of GLM, the control
        token that begins the next question ends the answer, and is added to the last one.

        Raises:
          TokenizerError: a role is unknown, the template refuses the messages, fails, runs for too long, or writes an
            answer in another way than it prompts for one.
        """
        for message in messages:
            self._check_role(message.get("role"))
        is_control = _pattern(encoder.control_tokens)
        if tools or any(message.get("role") == "tool" or message.keys() & _SPECIAL_KEYS for message in messages):
            messages, tools = as_written(messages, tools, self.writes)
        marked = [_marked(self._as_given(message), is_control) for message in messages]
        render = functools.partial(self._render, tools=_marked(tools, is_control))
        rendered = render(marked, generation_prompt=generation_prompt)
        own_end, next_turn = self._ends(frozenset(encoder.control_tokens))
        ends_with_answer = messages[-1]["role"] == self.answering_role and not generation_prompt
        if ends_with_answer and not rendered.generated and own_end is None and next_turn is not None:
            rendered = replace(rendered, text=rendered.text.rstrip("\n") + next_turn)
        ids, ranges = encoder.encode_ranges(rendered.text, rendered.plain)
        starts, ends = np.array(ranges, np.int64).reshape(-1, 2).T
        loss_weights = np.zeros(len(ids))
        if not generation_prompt:
            found = self._answers(messages, marked, rendered, is_control, render, has_end=own_end is not None)
            for (start, end), weight in found:
                loss_weights[(start < ends) & (starts < end)] = weight
        return ChatTokens(ids, loss_weights.tolist())

    def end_of_turn(self, control_tokens: Iterable[str]) -> str | None:
        """The control token that ends an answer, or else begins the question after it; None if there is none, or a chat
        of two messages is refused."""
        own, following = self._ends(frozenset(control_tokens))
        return own or following

    def _find_ends(self, control_tokens: frozenset[str]) -> tuple[str | None, str | None]:
        """The first control tokens after an answer: if it is the last message, and if a question follows."""
        is_control = _pattern(control_tokens)

        def first(chat: list[dict]) -> str | None:
            try:
                _, found, rest = self._render(chat).text.partition(_CHAT[1]["content"])
            except TokenizerError:
                return None
            end = is_control.search(rest) if found else None
            return end[0] if end else None

        return first(_CHAT), first([*_CHAT, _CHAT[0]])

    def problem(self, encoder: RangeEncoder, tokens: Sequence[str] = ()) -> str | None:
        """Why answers in this template cannot be learned with this tokenizer: a sentence, or None.

        Args:
          tokens: texts that must be one token each, besides those that look like control tokens.
        """
        try:
            text = self._render(_CHAT).text
        except TokenizerError as error:
            # One that refuses this chat may take others.
            if isinstance(error.__context__, _RefusedError):
                return None
            remedy = "; name it in tokenizer_config.json, or use another template" if "_token'" in str(error) else ""
            return f"{error}{remedy}"
        for mark in [*tokens, *_LIKE_CONTROL.findall(text)]:
            if len(encoder.encode_ranges(mark, [])[0]) != 1:
                return (
                    f"the chat template writes {mark!r}, which is not one token of the tokenizer; add it to the"
                    " tokenizer, or use a chat template of this model"
                )
        if self.end_of_turn(encoder.control_tokens) is None:
            return (
                "the chat template ends an answer with no control token, so a model would not learn to end it; let it"
                " write eos_token after each answer"
            )
        return None

    @functools.cached_property
    def writes(self) -> set[str]:
        """What it writes as its own, and not as text, as it shows for examples: see `as_written`."""
        question, answer = _CHAT
        found = set()
        named = [question | {"name": "one_speaker"}, answer | {"name": "another_speaker"}]
        if self._shows(named, "one_speaker", "another_speaker"):
            found.add(NAMES)
        if self._shows([question, answer], _TOOL["function"]["name"], tools=[_TOOL]):
            found.add(TOOLS)
        if self._call_form is not None:
            found.add(CALLS)
            called = self._as_given(_CALL)
            if self._shows([question, called, _RESULT, answer], "a_result", tools=[_TOOL]):
                found.add(RESULTS)
        return found

    @functools.cached_property
    def _call_form(self) -> "_CallForm | None":
        """How it takes calls; those of DeepSeek need arguments in JSON, and no content. None: it ignores them."""
        forms = (_CallForm(content, is_json) for is_json in (False, True) for content in ("", None))
        return next((form for form in forms if self._shows([_CHAT[0], form.of(_CALL)], "a_value", tools=[_TOOL])), None)

    def _shows(self, messages: list[dict], *texts: str, tools: list[dict] | None = None) -> bool:
        """Whether the template takes these messages, and each of the texts is in what it writes."""
        try:
            text = self._render(messages, tools=tools).text
        except TokenizerError:
            return False
        return all(each in text for each in texts)

    def _as_given(self, message: dict) -> dict:
        """A message as the template is given it."""
        message = {key: value for key, value in message.items() if key != "weight" and value is not None}
        return self._call_form.of(message) if message.get("tool_calls") and self._call_form else message

    def _check_role(self, role: object) -> None:
        if role in _ROLES or (isinstance(role, str) and re.search(f"[\"']{re.escape(role)}[\"']", self.source)):
            return
        near = difflib.get_close_matches(str(role), _ROLES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"roles are {', '.join(_ROLES)}"
        raise TokenizerError(f"chat role {role!r} is unknown; {hint}")

    def _answers(
        self,
        messages: Sequence[dict],
        marked: list[dict],
        rendered: _Rendered,
        is_control: re.Pattern,
        render: Callable[..., _Rendered],
        *,
        has_end: bool,
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
            before = render(marked[:i], generation_prompt=True).text if i else ""
            through = render(marked[: i + 1])
            if not (rendered.text.startswith(through.text) and through.text.startswith(before)):
                raise TokenizerError(
                    f"the chat template writes message {i + 1} in another way than it prompts for it, or than later"
                    " messages leave it, so what is learned is not clear; enclose answers in {% generation %} and"
                    " {% endgeneration %} in the template, or set the weight of the message to 0"
                )
            if (end := _end_of(through, is_control)) is None:
                # Without an end of its own, the next message begins with it, or it is added.
                following = None if has_end else is_control.match(rendered.text, len(through.text.rstrip("\n")))
                end = following.end() if following else len(through.text)
            yield (len(before), end), weight

    def _render(
        self, messages: list[dict], *, tools: Sequence[dict] | None = None, generation_prompt: bool = False
    ) -> _Rendered:
        try:
            with _limited():
                text = self._template.render(
                    messages=messages,
                    tools=tools,
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


@dataclass(frozen=True)
class _CallForm:
    """How a template takes an answer with calls: `empty` for a content without text, arguments as objects or JSON."""

    empty: str | None
    is_json: bool

    def of(self, message: dict) -> dict:
        calls = message["tool_calls"]
        if self.is_json:
            functions = [call["function"] | {"arguments": to_json(call["function"]["arguments"])} for call in calls]
            calls = [call | {"function": function} for call, function in zip(calls, functions)]
        return message | {"content": message["content"] or self.empty, "tool_calls": calls}


# Examples that show what a template does.
_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "A question?"},
    {"role": "assistant", "content": "An answer."},
]
# Mistral's templates want ids of nine characters.
_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "a_function", "arguments": {"an_argument": "a_value"}},
        }
    ],
}
_RESULT = {"role": "tool", "name": "a_function", "tool_call_id": "call00001", "content": "a_result"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "a_listed_function",
        "description": "A description.",
        "parameters": {"type": "object", "properties": {"an_argument": {"type": "string", "description": "A value."}}},
    },
}


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


def _end_of(rendered: _Rendered, is_control: re.Pattern) -> int | None:
    """Where the last control token of a text ends, if only whitespace follows it, and it is not from a message."""
    ends = [found.span() for found in is_control.finditer(rendered.text)]
    if not ends or ends[-1] in rendered.plain or rendered.text[ends[-1][1] :].strip():
        return None
    return ends[-1][1]


def _marked(value: Any, is_control: re.Pattern) -> Any:
    """Parts of a chat, with control tokens in them marked as text."""
    if isinstance(value, str):
        return is_control.sub(lambda found: f"{_PLAIN}{found[0]}{_PLAIN_END}", _MARKS.sub("", value))
    if isinstance(value, dict):
        return {_marked(key, is_control): _marked(item, is_control) for key, item in value.items()}
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
