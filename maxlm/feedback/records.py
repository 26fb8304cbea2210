"""The records that feedback is asked on: prompts, with or without answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config.data import RecordFormat
from maxlm.data.examples.messages import check_keys, parse_messages
from maxlm.data.examples.records import check_encodable, parse_pair, parse_prompt, read_records
from maxlm.errors import DataError
from maxlm.scoring.chat_models import Prompt
from maxlm.scoring.judge import Answer

_PROMPT_KEYS = ("prompt", "messages", "conversations", "instruction", "input", "system", "history")
_KEYS = (*_PROMPT_KEYS, "completion", "output", "answers", "answer")
_FORMS = (
    "a prompt alone (prompt, messages or instruction), with completion or output, with a list of answers, with chosen"
    " and rejected, or messages that end with the assistant's"
)


@dataclass(frozen=True)
class Item:
    """A prompt and the answers to it that its record has.

    place: FILE:LINE.
    """

    place: str
    prompt: Prompt
    answers: tuple[Answer, ...]


def read_items(path: str | Path, form: RecordFormat) -> list[Item]:
    """All records of a file.

    Raises:
      DataError: with file and line of the first record that has no accepted form, or an unknown key.
    """
    items = [_parse(record, where, form) for where, record in read_records(path, form)]
    if not items:
        raise DataError(f"{path}: has no records; a record is {_FORMS}")
    return items


def _parse(record: dict[str, Any], where: str, form: RecordFormat) -> Item:
    check_encodable(record, where)
    if {"chosen", "preferred_output"} & {*record}:
        prompt, chosen, rejected = parse_pair(record, where, form)
        return _item(where, prompt, [chosen, rejected])
    check_keys(record, _KEYS, where, form)
    given = [name for name in ("completion", "output", "answers") if record.get(name) not in (None, "", [])]
    if len(given) > 1:
        raise DataError(f"{where}: has {' and '.join(given)}; a record is {_FORMS}")
    prompt = parse_prompt(record, where, form)
    if given:
        answers = record[given[0]]
        answers = answers if given[0] == "answers" else [answers]
        if not isinstance(answers, list):
            raise DataError(f"{where}: answers must be a list")
        return _item(where, prompt, [_answer(answer, where, form) for answer in answers])
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        return _item(where, prompt[:-1], [prompt[-1]["content"]])
    return _item(where, prompt, [])


def _item(where: str, prompt: Any, answers: list[Answer]) -> Item:
    if isinstance(prompt, list):
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
        blank = not prompt or not prompt[-1]["content"].strip()
    else:
        blank = not isinstance(prompt, str) or not prompt.strip()
    if blank:
        raise DataError(f"{where}: the prompt is empty; a record is {_FORMS}")
    if isinstance(prompt, str) and not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{where}: if the prompt is a string, the answers must be strings")
    return Item(where, prompt, tuple(answers))


def _answer(answer: Any, where: str, form: RecordFormat) -> Answer:
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list):
        return parse_messages(answer, where, form, name="an answer")
    if not isinstance(answer, str):
        raise DataError(f"{where}: an answer must be a text or messages, not {str(answer)[:40]!r}")
    return answer
