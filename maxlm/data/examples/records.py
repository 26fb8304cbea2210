"""Records of a user's file: chats, preferences, prompts and tasks, in common formats.

The first error in such a file stops the run, with file and line. An unknown key is an error too, because it would be
ignored silently.
"""

import difflib
import json
import os
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config.data import RecordFormat
from maxlm.data.examples.messages import Messages, check_keys, parse_messages
from maxlm.data.examples.tool_calls import parse_tools
from maxlm.data.files import unreadable
from maxlm.data.json_values import Broken, lookup, read_values
from maxlm.errors import DataError

# A chat is messages, or a prompt and its completion; each is a string or messages.
Text = str | Messages


class Chat(NamedTuple):
    """A chat to train on: all of its messages as `answer`, or a prompt and its completion; and tools to call."""

    prompt: Text | None
    answer: Any  # messages, or a text after a prompt
    tools: list[dict[str, Any]] | None = None


# What `maxlm feedback` says about a pair: who judged, under which principles, how the votes went, how sure it is.
# Keys of PKU-SafeRLHF, of which the answers, their order and their safety are read.
_PKU_KEYS = (
    "better_response_id",
    "safer_response_id",
    "prompt_source",
    *(
        f"{before}response_{number}{after}"
        for number in (0, 1)
        for before, after in (
            ("", ""),
            ("is_", "_safe"),
            ("", "_source"),
            ("", "_harm_category"),
            ("", "_severity_level"),
            ("", "_sha256"),
        )
    ),
)
_JUDGMENT_KEYS = ("judge", "principles", "votes", "confidence")
_CHAT_KEYS = ("messages", "conversations")
# What a chat may call.
TOOL_KEYS = ("tools", "functions")
_ALPACA_KEYS = ("instruction", "input", "system", "history")
_CHAT_FORMS = (
    "messages or conversations (objects with role and content, or from and value), instruction and output with input,"
    " system and history, or prompt and completion"
)


def read_records(path: str | Path, form: RecordFormat | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """`FILE:LINE` and object of each record of a JSON, JSONL or Parquet file, compressed or not.

    Fields named by `form.fields` are also stored under their standard name.

    Raises:
      DataError: there is no such file, or something in it is not a JSON object or lacks a field that `form` names.
    """
    path = Path(os.path.expanduser(path))
    if problem := unreadable(path):
        raise DataError(f"{path}: {problem}")
    for item in read_values(path):
        if isinstance(item, Broken):
            if item.reason == "empty_file":  # the caller reports missing records
                return
            raise DataError(f"{item.where}: {item.detail}")
        if not isinstance(item.value, dict):
            raise DataError(f"{item.where}: must be a JSON object {{...}}, not {str(item.value)[:40]!r}")
        record = dict(item.value)
        for name, source in (form.fields if form else {}).items():
            if (value := lookup(item.value, source)) is None:
                raise DataError(f"{item.where}: lacks {source!r}, which objective.fields names for {name!r}")
            record[name] = value
        yield item.where, record


def field(record: dict[str, Any], name: str, where: str) -> Any:
    """A required field of a record.

    Raises:
      DataError: it lacks the field; the message suggests the closest existing one.
    """
    if name in record:
        return record[name]
    near = difflib.get_close_matches(name, record, 1)
    has = textwrap.shorten(", ".join(record), 200, placeholder=" ...") or "nothing"
    hint = f"; did you mean {name!r} instead of {near[0]!r}?" if near else f"; it has {has}"
    raise DataError(f"{where}: lacks {name!r}{hint}")


def check_encodable(record: dict[str, Any], where: str) -> None:
    """Refuse a record with lone surrogates, which JSON may hold, but no file, request or tokenizer.

    Raises:
      DataError: it has one.
    """
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: holds a lone surrogate, half of a character such as \\ud83d; repair or remove the line"
        ) from None


def parse_chat(record: dict[str, Any], where: str, form: RecordFormat) -> Chat:
    """Parse a record to train on: messages without a prompt, or a prompt and its completion.

    Raises:
      DataError: its format is not supported, or it has an unknown key.
    """
    if (found := _prompt(record, where, form)) is not None:
        prompt, known = found
        known = (*known, *TOOL_KEYS)
        tools = tools_of(record, where, form)
        if "instruction" in known:
            check_keys(record, (*known, "output"), where, form)
            answer = field(record, "output", where)
            if not isinstance(answer, str):
                raise DataError(f"{where}: output must be a string")
            return Chat(None, [*prompt, {"role": "assistant", "content": answer}], tools)
        if "prompt" not in known:
            check_keys(record, known, where, form)
            return Chat(None, prompt, tools)
        if "completion" in record:
            check_keys(record, (*known, "completion"), where, form)
            return Chat(prompt, _answer(record["completion"], where, form), tools)
    if {"role", "content"} <= {*record}:
        raise DataError(f'{where}: is one message; give all of a chat as one object: {{"messages": [...]}}')
    try:
        field(record, "messages", where)
    except DataError as error:
        raise DataError(f"{error}; a chat has {_CHAT_FORMS}") from None
    raise DataError(f"{where}: a chat has {_CHAT_FORMS}")


def parse_answer(record: dict[str, Any], where: str, form: RecordFormat) -> tuple[Text, Text]:
    """Parse a chat as the prompt and the last answer: its last message, if it is one list of messages.

    Raises:
      DataError: as `parse_chat`, or there is nothing before the answer.
    """
    prompt, answer, tools = parse_chat(record, where, form)
    if tools is not None:
        raise DataError(
            f"{where}: has tools, which only chats for SFT may have; remove them, or list them in ignore_keys"
        )
    if prompt is not None:
        return prompt, answer
    if not isinstance(answer, list) or len(answer) < 2:
        raise DataError(f"{where}: must have a prompt before its last answer")
    return answer[:-1], answer[-1:]


def parse_pair(
    record: dict[str, Any], where: str, form: RecordFormat, *, others: Collection[str] = ()
) -> tuple[Text, Text, Text]:
    """Parse prompt, chosen and rejected answer. Without a prompt, it is the common beginning of both answers.

    Args:
      others: known keys that the caller reads.

    Raises:
      DataError: it is not a pair, or has an unknown key.
    """
    if "preferred_output" in record:
        given = record.get("input")
        given = given if isinstance(given, dict) else {}
        tool_keys = tuple(key for key in TOOL_KEYS if key in others)
        check_keys(given, ("messages", *tool_keys), where, form, what="input")
        known = ("input", "preferred_output", "non_preferred_output", *others)
        check_keys(record, known, where, form)
        record = {
            "prompt": field(given, "messages", f"{where}: input"),
            "chosen": record["preferred_output"],
            "rejected": field(record, "non_preferred_output", where),
        }
    if "response_0" in record:
        prompt, responses, better = _two_responses(record, where, form, by="better_response_id", others=others)
        return prompt, responses[better], responses[1 - better]
    found = _prompt(record, where, form)
    prompt, known = found if found is not None else (None, ())
    chosen, rejected = (_answer(field(record, name, where), where, form) for name in ("chosen", "rejected"))
    check_keys(record, (*known, "chosen", "rejected", *_JUDGMENT_KEYS, *others), where, form)
    are_chats = isinstance(chosen, list) and isinstance(rejected, list)
    if isinstance(prompt, str) and are_chats and {"role": "user", "content": prompt} in chosen[:2]:
        prompt = None
    if prompt is None:
        count = _num_common(chosen, rejected)
        if count == 0 or type(chosen) is not type(rejected):
            raise DataError(f"{where}: lacks 'prompt', and chosen and rejected have no common beginning")
        return chosen[:count], chosen[count:], rejected[count:]
    if isinstance(prompt, list) and are_chats and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def parse_safety(
    record: dict[str, Any], where: str, form: RecordFormat
) -> tuple[Text, tuple[str, str], tuple[bool, bool]]:
    """Parse a pair of PKU-SafeRLHF (arXiv:2310.12773): the prompt, the safer and the other answer, and whether each is
    safe.

    Raises:
      DataError: it is not such a pair, its answers are equal, or the safer one is harmful and the other is not.
    """
    prompt, responses, safer = _two_responses(record, where, form, by="safer_response_id")
    names = (f"is_response_{safer}_safe", f"is_response_{1 - safer}_safe")
    flags = [field(record, name, where) for name in names]
    for name, flag in zip(names, flags):
        if not isinstance(flag, bool):
            raise DataError(f"{where}: {name} must be true or false, not {flag!r}")
    if flags == [False, True]:
        raise DataError(f"{where}: safer_response_id names a harmful answer, and the other one is safe; correct it")
    if responses[0] == responses[1]:
        raise DataError(f"{where}: response_0 and response_1 are the same, so neither is safer; remove the line")
    return prompt, (responses[safer], responses[1 - safer]), (flags[0], flags[1])


def _two_responses(
    record: dict[str, Any], where: str, form: RecordFormat, *, by: str, others: Collection[str] = ()
) -> tuple[Text, tuple[str, str], int]:
    """The prompt and both answers of a record of PKU-SafeRLHF, and which of them `by` names."""
    if (found := _prompt(record, where, form)) is None:
        field(record, "prompt", where)
        raise DataError(f"{where}: prompt must be a text or messages")
    prompt, known = found
    check_keys(record, (*known, *_PKU_KEYS, *others), where, form)
    responses = []
    for name in ("response_0", "response_1"):
        if not isinstance(text := field(record, name, where), str) or not text.strip():
            raise DataError(f"{where}: {name} must be a text that is not empty")
        responses.append(text)
    which = field(record, by, where)
    if isinstance(which, bool) or which not in (0, 1):
        raise DataError(f"{where}: {by} must be 0 or 1, not {which!r}")
    return prompt, (responses[0], responses[1]), int(which)


def is_undecided(record: dict[str, Any]) -> bool:
    """Whether a record is a vote for neither of two answers (`maxlm serve --votes`): it is no pair."""
    return "answers" in record and record.get("votes") in (["tie"], ["both_bad"])


def parse_judged(record: dict[str, Any], where: str, form: RecordFormat) -> list[tuple[Text, Text, bool]]:
    """Parse answers that were judged alone: prompt, answer, and whether it is good. A pair is a good and a bad one, a
    vote that both answers are bad two bad ones, and a tie none.

    Raises:
      DataError: it is neither, or has an unknown key.
    """
    if "chosen" in record or "preferred_output" in record:
        prompt, chosen, rejected = parse_pair(record, where, form)
        return [(prompt, chosen, True), (prompt, rejected, False)]
    if is_undecided(record):
        check_keys(record, ("prompt", "answers", *_JUDGMENT_KEYS), where, form)
        answers = record["answers"] if record["votes"] == ["both_bad"] else []
        return [(parse_prompt(record, where, form), _answer(answer, where, form), False) for answer in answers]
    label = field(record, "label", where)
    if label not in (True, False):
        raise DataError(f"{where}: label must be true for a good answer or false for a bad one, not {label!r}")
    prompt, answer = parse_answer({key: value for key, value in record.items() if key != "label"}, where, form)
    return [(prompt, answer, bool(label))]


def parse_prompt(record: dict[str, Any], where: str, form: RecordFormat) -> Text:
    """Parse the prompt of a record.

    Raises:
      DataError: the record has none, or its messages are malformed.
    """
    if (found := _prompt(record, where, form)) is not None:
        return found[0]
    return field(record, "prompt", where)


def _prompt(record: dict[str, Any], where: str, form: RecordFormat) -> tuple[Text, tuple[str, ...]] | None:
    """The prompt, or chat, of a record, and the keys that it uses; None if there is none."""
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"{where}: system must be a string")
    before = [{"role": "system", "content": system}] if system else []
    for key in _CHAT_KEYS:
        if record.get(key) is not None:
            return [*before, *parse_messages(record[key], where, form, name=key)], (key, "system")
    if record.get("instruction") is not None:
        return [*before, *_alpaca(record, where)], _ALPACA_KEYS
    if (prompt := record.get("prompt")) is None:
        return None
    if isinstance(prompt, str):
        return prompt, ("prompt",)
    return parse_messages(prompt, where, form, name="prompt"), ("prompt",)


def tools_of(record: dict[str, Any], where: str, form: RecordFormat) -> list[dict[str, Any]] | None:
    """The functions that the answers of a chat or pair may call; None if there are none.

    Raises:
      DataError: they are malformed, or given twice.
    """
    if "preferred_output" in record and isinstance(record.get("input"), dict):
        record = record["input"] | record
    keys = [key for key in TOOL_KEYS if record.get(key) and key not in form.ignore_keys]
    if len(keys) > 1:
        raise DataError(f"{where}: has both tools and functions; keep one")
    return parse_tools(record[keys[0]], where) if keys else None


def _alpaca(record: dict[str, Any], where: str) -> Messages:
    """Earlier turns, then instruction and input as one message."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DataError(f"{where}: history must be a list of [question, answer]")
    asked = [text for text in (record["instruction"], record.get("input")) if text]
    texts = [text for turn in history for text in turn]
    if not all(isinstance(text, str) for text in [*asked, *texts]):
        raise DataError(f"{where}: instruction, input and history must be strings")
    texts.append("\n".join(asked))
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def _answer(answer: Any, where: str, form: RecordFormat) -> Any:
    """Parse an answer's messages; one that is not a list or object is returned as it is."""
    if isinstance(answer, dict):
        answer = [answer]
    return parse_messages(answer, where, form, name="an answer") if isinstance(answer, list) else answer


def _num_common(first: Any, second: Any) -> int:
    """The number of messages, or of characters up to a word boundary, in the common beginning of two answers."""
    if not isinstance(first, Collection) or not isinstance(second, Collection):
        return 0
    count = next((index for index, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    if isinstance(first, str):
        while count and not first[count - 1 : count].isspace():
            count -= 1
    return count
