"""Request bodies: the part of the OpenAI API that this server supports.

Every field is used or rejected by name. A known but unsupported field is accepted with its no-op values, because
clients send those by default.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from maxlm.serve.formats import ResponseFormat

MAX_STOP_STRINGS = 16


def only(*values: Any) -> AfterValidator:
    """Restricts an unsupported field to null and its no-op values."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(one) and value == one for one in values):
            return value
        but = f" except as {' or '.join(map(repr, values))}" if values and isinstance(values[0], str) else ""
        raise PydanticCustomError("not_supported", f"is not supported by this server{but}; leave it out")

    return AfterValidator(check)


def _not_a(*kinds: type) -> BeforeValidator:
    """Reject what pydantic would convert: neither `true` nor "5" is a number."""

    def check(value: Any) -> Any:
        if isinstance(value, kinds):
            raise PydanticCustomError("wrong_type", f"{value!r:.40} is of the wrong type")
        return value

    return BeforeValidator(check)


Flag = Annotated[bool, _not_a(str)]
Whole = Annotated[int, _not_a(bool, str)]
Number = Annotated[float, _not_a(bool, str)]
# Client-side annotations of a request; they have no effect here.
Label = str | None


_FALSE_IS_NULL = BeforeValidator(lambda value: None if value is False else value)


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value or []
    if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
        raise ValueError("give a string, or a list of strings, none of them empty")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"there are {len(strings)} strings; at most {MAX_STOP_STRINGS} are allowed")
    return tuple(strings)


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids, as a list."""

    def is_ids(item: Any) -> bool:
        return isinstance(item, list) and len(item) > 0 and all(type(id_) is int for id_ in item)

    if isinstance(value, str) or is_ids(value):
        return [value]
    items = value if isinstance(value, list) else []
    if items and (all(isinstance(item, str) for item in items) or all(is_ids(item) for item in items)):
        return items
    raise ValueError("give a string, a list of token ids, or a list of either, none of them empty")


def _text(content: Any) -> Any:
    """The text of a message's content, which may be a list of parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content, 1):
        if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str):
            raise ValueError(f'part {number} is not of the form {{"type": "text", "text": ...}}')
        if kind != "text":
            raise ValueError(f"part {number} is of type {kind!r:.40}; only text is supported")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {number} has no text")
        if unknown := sorted({*part} - {"type", "text"}):
            raise ValueError(f"part {number} has the field {unknown[0]!r:.40}, which is unknown")
        texts.append(part["text"])
    return "".join(texts)


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with token counts."""

    model_config = ConfigDict(extra="forbid")
    include_usage: Flag | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class SamplingBody(BaseModel):
    """Fields of both endpoints. `top_k` is an extension of the OpenAI API."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0, lt=2**31)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop_strings, json_schema_input_type=str | list[str] | None)] = ()
    stream: Flag | None = None
    stream_options: StreamOptions | None = None

    user: Label = None
    metadata: dict[str, str] | None = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    frequency_penalty: Annotated[Any, only(0, 0.0)] = None
    presence_penalty: Annotated[Any, only(0, 0.0)] = None
    repetition_penalty: Annotated[Any, only(1, 1.0)] = None
    min_p: Annotated[Any, only(0, 0.0)] = None
    logit_bias: Annotated[Any, only({})] = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Message(BaseModel):
    """One message of a chat. `developer` is the newer name of `system`."""

    model_config = ConfigDict(extra="forbid")
    role: str
    content: Annotated[str | None, BeforeValidator(_text, json_schema_input_type=str | list[dict] | None)] = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    # Messages from this server have `refusal: null`, and clients may send them back unchanged.
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    name: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; only an answer that calls tools may have none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are only for messages of the assistant")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id is only for messages of the role tool")
        return self

    def to_chat(self) -> dict[str, Any]:
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        given = {"tool_calls": self.tool_calls, "tool_call_id": self.tool_call_id}
        return message | {name: value for name, value in given.items() if value}


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`. `continue_final_message` continues a final assistant message."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    continue_final_message: Flag | None = None
    add_generation_prompt: Flag | None = None

    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only()] = None
    parallel_tool_calls: Flag | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None
    echo: Annotated[Any, only(False)] = None

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        _check("top_logprobs", not self.top_logprobs or self.logprobs, "needs logprobs: true")
        _check("max_tokens", None in both or both[0] == both[1], "is the older name of max_completion_tokens; give one")
        ends_early = self.add_generation_prompt is False and not self.continue_final_message
        _check("add_generation_prompt", not ends_early, "can be false only with continue_final_message: true")
        opens_new_turn = self.add_generation_prompt and self.continue_final_message
        _check("add_generation_prompt", not opens_new_turn, "cannot be true with continue_final_message: true")
        return self


class CompletionBody(SamplingBody):
    """`POST /v1/completions`. `echo` puts the prompt before the answer, in its text and its log-probabilities."""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
    ]
    max_tokens: Annotated[Whole, Field(ge=0)] | None = None
    logprobs: Annotated[Annotated[Whole, Field(ge=0, le=20)] | None, _FALSE_IS_NULL] = None
    echo: Flag | None = None

    suffix: Annotated[Any, only("")] = None
    best_of: Annotated[Whole, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        _check("max_tokens", self.max_tokens != 0 or self.echo, "can be 0 only with echo: true")
        _check("best_of", self.best_of in (None, self.n or 1), "is supported only if equal to n; leave it out")
        return self


class SampledWith(BaseModel):
    """How both answers were sampled: the fields of the request, as its reply gives the seed."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Whole | None = None
    max_tokens: Whole | None = None
    seed: Whole | None = None


class VoteBody(BaseModel):
    """`POST /v1/votes`: what was asked, as messages or as a text, and both answers in the order shown."""

    model_config = ConfigDict(extra="forbid")
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    answers: Annotated[list[str], Field(min_length=2, max_length=2)]
    choice: Literal["first", "second", "tie", "both_bad"]
    sampling: SampledWith = SampledWith()
    voter: Annotated[str, Field(min_length=1, max_length=200)] = "person"

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        _check("messages", (self.messages is None) != (self.prompt is None), "or prompt: give one of the two")
        texts = [answer.strip() for answer in self.answers]
        _check("answers", all(texts), "must be two texts that are not empty")
        _check("answers", texts[0] != texts[1], "are equal, so there is nothing to vote on")
        return self

    @property
    def asked(self) -> str | list[dict[str, str]]:
        return self.prompt if self.messages is None else [message.to_chat() for message in self.messages]


def _check(field: str, holds: Any, problem: str) -> None:
    if not holds:
        raise PydanticCustomError("fields", "{problem}", {"field": field, "problem": problem})
