"""Task files: questions with one correct answer, generated or multiple choice."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from maxlm.config.data import RecordFormat
from maxlm.config.prompt import AnyFormatConfig
from maxlm.core.interval import Interval, proportion_interval
from maxlm.data.examples.messages import check_keys, parse_messages
from maxlm.data.examples.records import read_records
from maxlm.errors import ConfigError, DataError
from maxlm.generate.model import LoadedModel, Prompt
from maxlm.prompts.answer_formats import AnswerFormat, UnreadableAnswer, answer_format

_FIELDS = ("prompt", "messages", "conversations", "choices", "answer", "kind", "format")
_FORMAT: TypeAdapter[AnyFormatConfig] = TypeAdapter(AnyFormatConfig)


@dataclass(frozen=True)
class Example:
    """A question.

    prompt: a text to continue, or the messages of a chat to answer.
    answer: text of the correct answer.
    choices: the options, one of which is `answer`; empty if the answer is to be generated.
    kind: a label to group results by.
    format: how the answer is read from what is generated; None compares all of it.
    """

    prompt: Prompt
    answer: str
    choices: tuple[str, ...] = ()
    kind: str | None = None
    format: AnswerFormat | None = None

    def read(self, text: str) -> Any:
        """The answer in a text: its value in the format, or all of the text.

        Raises:
          UnreadableAnswer: it holds no answer of the format.
        """
        return text.strip() if self.format is None else self.format.parse(text)


@dataclass(frozen=True)
class TaskResult:
    """Results of a model on a task.

    accuracy: fraction of correct answers, over all examples.
    correct: [n], 0 or 1 for each example.
    outputs: [n], the generated or chosen answers.
    by_kind: accuracy per kind.
    too_long: examples that exceed the model's context; they count as wrong, with an empty output.
    unreadable: other outputs without an answer of the example's format; they count as wrong.
    """

    accuracy: Interval
    correct: np.ndarray
    outputs: tuple[str, ...]
    by_kind: dict[str, Interval]
    too_long: int
    unreadable: int = 0


def read_examples(path: str | Path, *, ignore_keys: Sequence[str] = ()) -> list[Example]:
    """Read examples, one object each: `prompt` or `messages`, `answer`, and optionally `choices`, `kind` and `format`.

    With `choices`, `answer` is the 0-based index of the correct one. Without, it is the text; it may be left out if
    the last message is the assistant's, which then is the answer.

    Raises:
      DataError: with file and line of the first mistake, such as an unknown key that is not in `ignore_keys`.
    """
    form = RecordFormat(ignore_keys=tuple(ignore_keys))
    examples = [parse_example(record, where=where, form=form) for where, record in read_records(path)]
    if not examples:
        raise DataError(f"{path}: has no examples")
    if len({bool(example.choices) for example in examples}) > 1:
        raise DataError(f"{path}: some examples have choices and some do not; put them into two files")
    return examples


def parse_example(record: dict, *, where: str, form: RecordFormat) -> Example:
    """Parse one object of a task file.

    Raises:
      DataError: its message starts with `where`.
    """
    check_keys(record, _FIELDS, where, form)
    chats = [key for key in ("messages", "conversations") if key in record]
    if len(chats) + ("prompt" in record) != 1:
        raise DataError(f"{where}: must have either prompt or messages")
    prompt, answer, choices = record.get("prompt"), record.get("answer"), record.get("choices")
    if isinstance(prompt, list):
        prompt = parse_messages(prompt, where, form, name="prompt")
    if chats:
        prompt = parse_messages(record[chats[0]], where, form)
        if answer is None and prompt[-1]["role"] == "assistant":
            *prompt, last = prompt
            answer = last["content"]
    if not prompt or not isinstance(prompt, str | list):
        raise DataError(f"{where}: prompt must be a non-empty string")
    if choices is not None:
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise DataError(f"{where}: choices must be a list of two or more strings")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise DataError(f"{where}: answer must be the index of the correct choice, 0 to {len(choices) - 1}")
        answer = choices[answer]
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{where}: answer must be a non-empty string")
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise DataError(f"{where}: kind must be a string")
    if record.get("format") is not None and choices is not None:
        raise DataError(
            f"{where}: has choices, one of which is chosen, so that no format is needed; remove one of them"
        )
    form = None if record.get("format") is None else _parse_format(record["format"], answer, where)
    return Example(prompt, answer, tuple(choices or ()), kind, form)


def _parse_format(given: Any, answer: str, where: str) -> AnswerFormat:
    """A record's format, by which its own answer can be read."""
    try:
        form = answer_format(_FORMAT.validate_json(json.dumps(given), strict=True), where=f"{where}: format")
        form.parse(answer)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("format", *first["loc"][1:])))  # without the tag of the union
        raise DataError(f"{where}: {place}: {first['msg'].lower()}") from None
    except ConfigError as error:
        raise DataError(str(error)) from None
    except UnreadableAnswer as error:
        raise DataError(f"{where}: answer does not have its own format: it {error}") from None
    return form


def answer_by_generation(
    model: LoadedModel,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> TaskResult:
    """Generate an answer to each prompt; correct if it holds the reference: see `Example.read`."""
    lengths = [len(model.encode(example.prompt)) + max_new_tokens for example in examples]
    fitting = [index for index, length in enumerate(lengths) if length <= model.execution.max_length]
    outputs = [""] * len(examples)
    if fitting:
        texts = model.generate(
            [examples[index].prompt for index in fitting],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
        )
        for index, text in zip(fitting, texts):
            outputs[index] = text
    right, unreadable = [], 0
    for index, (output, example) in enumerate(zip(outputs, examples)):
        try:
            right.append(example.read(output) == example.read(example.answer))
        except UnreadableAnswer:
            right.append(False)
            unreadable += index in fitting
    result = _result(examples, right, outputs, too_long=len(examples) - len(fitting), seed=seed)
    return replace(result, unreadable=unreadable)


def answer_by_choice(model: LoadedModel, examples: Sequence[Example], *, seed: int = 0) -> TaskResult:
    """Choose the continuation with the highest total log-probability, not normalized by length."""
    context = model.execution.max_length
    fitting = [index for index, example in enumerate(examples) if _longest(model, example) <= context]
    pairs = [(index, choice) for index in fitting for choice in examples[index].choices]
    scores = model.score([examples[index].prompt for index, _ in pairs], [choice for _, choice in pairs])
    best: dict[int, tuple[float, str]] = {}
    for (index, choice), score in zip(pairs, scores):
        if index not in best or score.log_probability > best[index][0]:
            best[index] = (score.log_probability, choice)
    outputs = [best[index][1] if index in best else "" for index in range(len(examples))]
    right = [output == example.answer for output, example in zip(outputs, examples)]
    return _result(examples, right, outputs, too_long=len(examples) - len(fitting), seed=seed)


def run_task(
    model: LoadedModel,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> TaskResult:
    """`answer_by_choice` if the examples have choices, else `answer_by_generation`."""
    if examples[0].choices:
        return answer_by_choice(model, examples, seed=seed)
    return answer_by_generation(
        model, examples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=stop
    )


def _result(
    examples: Sequence[Example], right: list[bool], outputs: list[str], *, too_long: int, seed: int
) -> TaskResult:
    correct = np.array(right, np.int64)
    kinds = sorted({example.kind for example in examples if example.kind is not None})
    return TaskResult(
        accuracy=proportion_interval(correct, seed=seed),
        correct=correct,
        outputs=tuple(outputs),
        by_kind={
            kind: proportion_interval(correct[[example.kind == kind for example in examples]], seed=seed)
            for kind in kinds
        },
        too_long=too_long,
    )


def _longest(model: LoadedModel, example: Example) -> int:
    """Number of tokens of the prompt with its longest choice, as `LoadedModel.score` counts them."""
    if isinstance(example.prompt, str):
        return max(len(model.encode(example.prompt + choice)) for choice in example.choices)
    return len(model.encode(example.prompt)) + max(len(model.tokenizer.encode(choice)) for choice in example.choices)
