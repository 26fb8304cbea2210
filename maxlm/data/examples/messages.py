"""Convert chat messages of common formats to `{"role", "content"}`, with optional `weight`, `name` and tool calls."""

import difflib
import math
from collections.abc import Collection
from types import NoneType
from typing import Any

from maxlm.config.data import RecordFormat
from maxlm.data.examples.tool_calls import Calls, parse_calls
from maxlm.errors import DataError

Messages = list[dict[str, Any]]

# Role names of ShareGPT and other formats; `RecordFormat.roles` may add to them.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
}
# Loss weight of an answer: a number, or true or false.
_WEIGHT_KEYS = ("weight", "train", "trainable", "training")
_CALL_KEYS = ("tool_calls", "function_call")
_KEYS = ("role", "content", "from", "value", "name", "tool_call_id", *_CALL_KEYS, *_WEIGHT_KEYS)
# The role of an answer in ShareGPT's form whose content is a call.
_CALL_ROLE = "function_call"
_TEXT_PARTS = ("text", "input_text", "output_text")
# Metadata keys that do not affect training.
_HARMLESS = (
    "id",
    "source",
    "dataset",
    "kind",
    "category",
    "language",
    "licence",
    "license",
    "url",
    "metadata",
    "tags",
    "parallel_tool_calls",
)


def check_keys(
    value: dict[str, Any], known: Collection[str], where: str, form: RecordFormat, *, what: str = "the record"
) -> None:
    """Reject unknown keys, except metadata, ignored keys and empty values.

    Raises:
      DataError: naming the first unknown key and the closest known one.
    """
    named = {source.partition(".")[0] for source in form.fields.values()} | {*form.fields}
    for key, given in value.items():
        if key in known or key in _HARMLESS or key in form.ignore_keys or key in named or given in (None, [], {}):
            continue
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)};"
        raise DataError(
            f"{where}: {what} has the unknown key {key!r}; {hint} or list it in ignore_keys, for eval in --ignore-keys"
        )


def parse_messages(messages: Any, where: str, form: RecordFormat, *, name: str = "messages") -> Messages:
    """Parse messages with role and content, or from and value; content is a string or a list of text parts.

    Returns:
      `{"role", "content"}` each, with a `weight` of 0 or more, a `name`, `tool_calls` (`parse_calls`) and a
      `tool_call_id` if given.

    Raises:
      DataError: they are not a list of messages, or one contains something other than text or has an unknown key.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: {name} must be a list of objects with role and content, and not empty")
    return [_parse(message, f"message {number}", where, form) for number, message in enumerate(messages, 1)]


def _parse(message: Any, what: str, where: str, form: RecordFormat) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: {what} must be an object with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    used = {key: value for key, value in given.items() if key not in form.ignore_keys}
    check_keys(used, _KEYS, where, form, what=what)
    role, content = used.get("role", used.get("from")), used.get("content", used.get("value"))
    call_keys = [key for key in _CALL_KEYS if used.get(key)]
    if not isinstance(role, str) or not isinstance(content, str | list | (NoneType if call_keys else str)):
        raise DataError(
            f"{where}: {what} must be an object with role and content, or from and value, which are strings; only an"
            " answer that calls tools may have no content"
        )
    if {"role", "from"} <= {*used} or {"content", "value"} <= {*used}:
        raise DataError(f"{where}: {what} must have either role and content, or from and value, not both")
    content = _text_of(content, what, where, form) if isinstance(content, list) else content or ""
    role = form.roles.get(role, _ROLES.get(role, role))
    calls = _calls(used, call_keys, f"{where}: {what}")
    if role == _CALL_ROLE:
        role, calls, content = "assistant", _shared_calls(content, f"{where}: {what}, a {_CALL_ROLE}"), ""
    if calls and role != "assistant":
        raise DataError(f"{where}: {what} of role {role!r} calls tools, but only the assistant can; correct its role")
    if not calls and not content.strip() and (ignored := [key for key in _CALL_KEYS if given.get(key)]):
        raise DataError(f"{where}: {what} is empty without its {ignored[0]}; remove the record")
    parsed = {"role": role, "content": content} | ({"tool_calls": calls} if calls else {})
    for key in ("name", "tool_call_id"):
        if key in used:
            parsed[key] = _string(used[key], f"{where}: {what}: {key}")
    weight = _weight(used, what, where)
    return parsed if weight is None else parsed | {"weight": weight}


def _calls(used: dict[str, Any], keys: list[str], what: str) -> Calls:
    if len(keys) > 1:
        raise DataError(f"{what} has both {keys[0]} and {keys[1]}; keep one")
    return parse_calls(used[keys[0]], f"{what}: {keys[0]}") if keys else []


def _shared_calls(content: str, what: str) -> Calls:
    try:
        return parse_calls(content, what)
    except DataError as error:
        raise DataError(f"{error}; to learn it as text, set objective.roles.{_CALL_ROLE}=assistant") from None


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{what} must be a string that is not empty, not {value!r}")
    return value


def _text_of(parts: list, what: str, where: str, form: RecordFormat) -> str:
    texts = []
    for number, part in enumerate(parts, 1):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in _TEXT_PARTS:
            raise DataError(f"{where}: part {number} of {what} is of type {kind!r}, but only text is supported")
        check_keys(part, ("type", "text"), where, form, what=f"part {number} of {what}")
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}: part {number} of {what} lacks a text")
        texts.append(part["text"])
    return "".join(texts)


def _weight(message: dict[str, Any], what: str, where: str) -> float | None:
    given = {key: message[key] for key in _WEIGHT_KEYS if key in message}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
            raise DataError(f"{where}: {what}: {key} must be a number of at least 0, true or false, not {value!r}")
    if len({float(value) for value in given.values()}) > 1:
        raise DataError(f"{where}: {what}: {' and '.join(given)} contradict each other")
    return next((float(value) for value in given.values()), None)
