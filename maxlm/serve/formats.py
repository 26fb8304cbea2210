"""The form that a chat's answer must have: asked for in the prompt, and read from the answer."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from maxlm.errors import ConfigError
from maxlm.prompts.answer_formats import AnswerFormat, ChoiceFormat, JsonFormat, RegexFormat, UnreadableAnswer
from maxlm.runtime.time_limit import TimeLimitExceeded, within

# For a schema, and for reading one answer.
_SECONDS = 2.0


class JsonSchema(BaseModel):
    """`strict` cannot be promised yet: an answer that does not fit is reported as such."""

    model_config = ConfigDict(extra="forbid")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(BaseModel):
    """`response_format`: those of the OpenAI API, and as extensions `regex` and `choices`."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema", "regex", "choices"]
    json_schema: JsonSchema | None = None
    pattern: str | None = None
    choices: Annotated[list[str], Field(min_length=2, max_length=1000)] | None = None
    label: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _fields_of_its_type(self) -> Self:
        needed = {"json_schema": "json_schema", "regex": "pattern", "choices": "choices"}.get(self.type)
        allowed = {"type", needed, "label" if self.type == "choices" else None}
        for name in ("json_schema", "pattern", "choices", "label"):
            given = getattr(self, name) is not None
            if given and name not in allowed:
                raise PydanticCustomError("format", "{name} is not for type {type}", {"name": name, "type": self.type})
            if name == needed and not given:
                raise PydanticCustomError("format", "type {type} needs {name}", {"name": name, "type": self.type})
        return self

    def build(self) -> AnswerFormat | None:
        """The format that evaluation and judges use too; None for any text.

        Raises:
          ConfigError: the schema, pattern or choices are wrong.
        """
        try:
            return within(_SECONDS, self._build)
        except ConfigError as error:
            place = "response_format.json_schema.schema" if self.type == "json_schema" else "response_format"
            message = str(error).removeprefix("json_schema: ")
            raise ConfigError([f"{place}: {message}"]) from None
        except TimeLimitExceeded:
            raise ConfigError([f"response_format: takes more than {_SECONDS:g} s to check; simplify it"]) from None

    def _build(self) -> AnswerFormat | None:
        match self.type:
            case "json_object":
                return JsonFormat({"type": "object"})
            case "json_schema":
                if '"patternProperties":' in json.dumps(self.json_schema.schema_):
                    raise ConfigError(["patternProperties is not supported by this server; name the properties"])
                return JsonFormat(self.json_schema.schema_)
            case "regex":
                return RegexFormat(self.pattern)
            case "choices":
                return ChoiceFormat(tuple(self.choices), self.label or "Answer")
        return None


def asking_for(form: AnswerFormat | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with the sentence that asks for the form at the end of the last one of the user.

    Raises:
      ConfigError: there is no message of the user.
    """
    if form is None:
        return messages
    places = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        raise ConfigError(["response_format: needs a message of the user, which asks for it"])
    asked = list(messages)
    last = asked[places[-1]]
    asked[places[-1]] = {**last, "content": f"{last['content']}\n\n{form.instruction()}"}
    return asked


def read_answer(form: AnswerFormat, text: str, finish_reason: str | None) -> dict[str, Any]:
    """The fields of a message for a text: `parsed`, and `unreadable`, why there is no such value, or null."""

    def read() -> Any:
        value = form.parse(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return value

    try:
        return {"parsed": within(_SECONDS, read), "unreadable": None}
    except UnreadableAnswer as error:
        problem = str(error)
    except TimeLimitExceeded:
        problem = f"takes more than {_SECONDS:g} s to read"
    except (ValueError, RecursionError):
        problem = "holds a value that JSON cannot encode"
    return {"parsed": None, "unreadable": f"is cut off, and {problem}" if finish_reason == "length" else problem}
