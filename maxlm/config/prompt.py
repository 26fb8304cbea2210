"""Prompts: templates, examples in them, and the form of the answers."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from maxlm.config.base import Count, Frozen, Seed


class ChoiceFormatConfig(Frozen):
    """One of a few words."""

    kind: Literal["choices"]
    choices: tuple[str, ...] = Field(min_length=2)
    label: str = Field("Answer", min_length=1, description="Begins the last line of an answer: `Answer: B`.")


class JsonFormatConfig(Frozen):
    """A JSON value."""

    kind: Literal["json"]
    json_schema: dict[str, Any] = Field(description="The JSON schema that it fits.")


class RegexFormatConfig(Frozen):
    """What a regular expression finds: its first group, or all of it."""

    kind: Literal["regex"]
    pattern: str


AnyFormatConfig = Annotated[ChoiceFormatConfig | JsonFormatConfig | RegexFormatConfig, Field(discriminator="kind")]


class ExamplesConfig(Frozen):
    """Examples that are shown before the question (few-shot)."""

    file: str = Field(description="JSON, JSONL or Parquet, with the columns of the templates.")
    count: Count = 4
    select: Literal["random", "similar", "balanced"] = Field(
        "random",
        description="At random; those most similar to the question (BM25); or as many of each label, at random.",
    )
    label: str | None = Field(None, description="The column with the labels that are balanced.")

    @model_validator(mode="after")
    def _label_if_balanced(self) -> Self:
        if (self.label is not None) != (self.select == "balanced"):
            raise ValueError("label: must be given with select: balanced, and only then")
        return self


class PromptConfig(Frozen):
    """`maxlm prompt`: a template for the records of a file, as Jinja texts with the file's columns as variables."""

    kind: Literal["prompt"]
    form: Literal["chat", "text"] = Field("chat", description="Messages, or one text to continue.")
    instructions: str | None = Field(None, description="The system message of a chat, or the beginning of a text.")
    question: str = Field(description="What is asked about a record. {{ format }} is how the answer must look.")
    answer: str | None = Field(None, description="The right answer of a record: shown in examples, and the reference.")
    group: str | None = Field(None, description="The kind of a question, by which `maxlm eval` groups its results.")
    separator: str = Field("\n\n", description="Between the parts of a text.")
    format: AnyFormatConfig | None = Field(None, description="The form of the answers, by which they are also read.")
    examples: ExamplesConfig | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _examples_have_answers(self) -> Self:
        if self.examples is not None and self.answer is None:
            raise ValueError("answer: must be given to show examples")
        return self
