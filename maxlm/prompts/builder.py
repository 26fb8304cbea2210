"""Prompts from templates: instructions, examples, a question, and the form of its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maxlm.config.prompt import PromptConfig
from maxlm.errors import ConfigError, DataError
from maxlm.prompts.answer_formats import UnreadableAnswer, answer_format
from maxlm.prompts.few_shot import ExampleSelector
from maxlm.prompts.prompt_template import PromptTemplate

# A record and its FILE:LINE.
Placed = tuple[str, Mapping[str, Any]]

FORMAT = "format"


@dataclass(frozen=True)
class BuiltPrompt:
    """A prompt for one record.

    prompt: messages, or a text to continue.
    answer: the right answer, if the configuration has a template of it.
    group: the kind of the question, if the configuration has a template of it.
    examples: FILE:LINE of the examples in it.
    """

    prompt: str | list[dict[str, str]]
    answer: str | None
    group: str | None
    examples: tuple[str, ...]


class PromptBuilder:
    """Builds the prompts of a configuration.

    Args:
      where: names the configuration in messages.
      examples: the records of `config.examples.file`.

    Raises:
      ConfigError: a template or format is wrong, or a template needs a column that the examples lack.
      DataError: an example lacks a value.
    """

    def __init__(self, config: PromptConfig, *, where: str, examples: Sequence[Placed] = ()):
        self._config = config
        self._templates = {
            name: PromptTemplate(source, where=f"{where}: {name}")
            for name in ("instructions", "question", "answer", "group")
            if (source := getattr(config, name)) is not None
        }
        self.format = None if config.format is None else answer_format(config.format, where=f"{where}: format")
        self._given = {} if self.format is None else {FORMAT: self.format.instruction()}
        self._examples: list[tuple[str, str]] = []
        self._places = [place for place, _ in examples]
        self._selector: ExampleSelector | None = None
        if config.examples is not None:
            self._add_examples(examples, where)

    def check_columns(self, columns: Sequence[str], place: str, *, with_answer: bool = True) -> None:
        """Refuse templates with variables that are no columns of the records at `place`.

        Raises:
          ConfigError: naming the variable and the columns.
        """
        self._check(columns, place, ("instructions", "question", "group", *(["answer"] if with_answer else [])))

    def build(self, record: Mapping[str, Any], place: str, *, with_answer: bool = True) -> BuiltPrompt:
        """The prompt of a record.

        Args:
          with_answer: whether the record has the columns of its answer.

        Raises:
          DataError: a value is missing, or there are too few examples; the message begins with `place`.
        """
        question = self._render("question", record, place)
        answer = self._answer(record, place) if with_answer and "answer" in self._templates else None
        instructions = self._render("instructions", record, place) if "instructions" in self._templates else None
        group = self._render("group", record, place) if "group" in self._templates else None
        indices: list[int] = []
        if self._selector is not None and self._config.examples is not None:
            indices = self._selector.select(question, self._config.examples.count)
        shown = [self._examples[index] for index in indices]
        as_form = self._as_text if self._config.form == "text" else _as_chat
        return BuiltPrompt(
            as_form(instructions, shown, question), answer, group, tuple(self._places[index] for index in indices)
        )

    def _as_text(self, instructions: str | None, shown: Sequence[tuple[str, str]], question: str) -> str:
        parts = [] if instructions is None else [instructions]
        return self._config.separator.join([*parts, *(asked + answered for asked, answered in shown), question])

    def _add_examples(self, examples: Sequence[Placed], where: str) -> None:
        settings = self._config.examples
        if not examples:
            raise DataError(f"{settings.file}: has no examples")
        self._check([*examples[0][1]], examples[0][0], ("question", "answer"))
        self._examples = [
            (self._render("question", record, place), self._answer(record, place)) for place, record in examples
        ]
        labels = None
        if settings.label is not None:
            if lacking := next((place for place, record in examples if record.get(settings.label) is None), None):
                raise DataError(f"{lacking}: lacks {settings.label!r}, which examples.label names")
            labels = [str(record[settings.label]) for _, record in examples]
        self._selector = ExampleSelector(
            [question for question, _ in self._examples],
            select=settings.select,
            labels=labels,
            seed=self._config.seed,
            where=settings.file,
        )

    def _check(self, columns: Sequence[str], place: str, names: Sequence[str]) -> None:
        if FORMAT in columns and self._given:
            raise ConfigError([f"{place}: has the column {FORMAT!r}, which names the form of the answer; rename it"])
        for name in names:
            if name in self._templates:
                self._templates[name].check([*columns, *self._given], what=f"{place} has")

    def _answer(self, record: Mapping[str, Any], place: str) -> str:
        """A right answer, which must have the format that is asked for."""
        answer = self._render("answer", record, place)
        if self.format is not None:
            try:
                self.format.parse(answer)
            except UnreadableAnswer as error:
                raise DataError(f"{place}: the right answer does not have the format: it {error}") from None
        return answer

    def _render(self, name: str, record: Mapping[str, Any], place: str) -> str:
        return self._templates[name].render({**record, **self._given}, where=place)


def _as_chat(instructions: str | None, shown: Sequence[tuple[str, str]], question: str) -> list[dict[str, str]]:
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    for asked, answered in shown:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]
