"""Prompts for the records of a file, from a configuration with kind: prompt."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxlm.config.prompt import PromptConfig
from maxlm.data.examples.records import check_encodable, read_records
from maxlm.errors import DataError
from maxlm.prompts.builder import BuiltPrompt, PromptBuilder


def open_builder(config: PromptConfig, *, where: str) -> PromptBuilder:
    """The builder of a configuration, with its examples.

    Raises:
      ConfigError, DataError: see `PromptBuilder`, or the examples cannot be read.
    """
    examples = [] if config.examples is None else list(read_records(config.examples.file))
    for place, record in examples:
        check_encodable(record, place)
    return PromptBuilder(config, where=where, examples=examples)


def build_prompts(
    builder: PromptBuilder, path: str | Path, *, with_answers: bool = True
) -> Iterator[tuple[str, BuiltPrompt]]:
    """FILE:LINE and prompt of each record of a file.

    Args:
      with_answers: whether the records have the columns of the right answer.

    Raises:
      ConfigError: a template needs a column that the first record lacks.
      DataError: a record lacks a value, or the file has none.
    """
    is_first = True
    for place, record in read_records(path):
        if is_first:
            builder.check_columns([*record], place, with_answer=with_answers)
            is_first = False
        check_encodable(record, place)
        yield place, builder.build(record, place, with_answer=with_answers)
    if is_first:
        raise DataError(f"{path}: has no records")


def as_task(config: PromptConfig, built: BuiltPrompt, place: str) -> dict[str, Any]:
    """The record of a task file that `maxlm eval` reads, with the format by which it reads answers."""
    name = "prompt" if isinstance(built.prompt, str) else "messages"
    record: dict[str, Any] = {"id": place, name: built.prompt}
    if built.answer is not None:
        record["answer"] = built.answer.strip()
    if built.group is not None:
        record["kind"] = built.group
    if config.format is not None:
        record["format"] = config.format.model_dump(mode="json")
    return record
