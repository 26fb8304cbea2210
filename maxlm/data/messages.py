"""Convert chat messages of common formats to `{"role", "content"}` with an optional `weight`."""

import difflib
import math
from collections.abc import Collection
from typing import Any

from maxlm.config.data import RecordFormat
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
}
# Loss weight of an answer: a number, or true or false.
_WEIGHT_KEYS = ("weight", "train", "trainable", "training")
_KEYS = ("role", "content", "from", "value", *_WEIGHT_KEYS)
_TOOL_KEYS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Metadata keys that do not affect training.
_HARMLESS = ("id", "source", "dataset", "kind", "category", "language", "licence", "license", "url", "metadata", "tags")


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
      `{"role", "content"}` each, with a `weight` of 0 or more if given.

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
    calls = [key for key in _TOOL_KEYS if given.get(key)]
    if calls and calls[0] not in form.ignore_keys:
        raise DataError(
            f"{where}: {what} calls tools ({calls[0]}), which the chat template does not support;"
            " write the call as content, or list the key in ignore_keys"
        )
    check_keys(given, _KEYS, where, form, what=what)
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if not isinstance(role, str) or not isinstance(content, str | list):
        raise DataError(
            f"{where}: {what} must be an object with role and content, or from and value, which are strings"
        )
    if {"role", "from"} <= {*given} or {"content", "value"} <= {*given}:
        raise DataError(f"{where}: {what} must have either role and content, or from and value, not both")
    content = content if isinstance(content, str) else _text_of(content, what, where, form)
    if calls and not content.strip():
        raise DataError(f"{where}: {what} is empty without its {calls[0]}; remove the record")
    role = form.roles.get(role, _ROLES.get(role, role))
    weight = _weight(given, what, where)
    return {"role": role, "content": content} | ({} if weight is None else {"weight": weight})


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
