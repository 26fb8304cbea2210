"""Response bodies in the OpenAI format, whole and in chunks.

A choice is built from its events; a chunk is the same choice built from one of them.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from maxlm.generate.request import Event, Token
from maxlm.prompts.answer_formats import AnswerFormat
from maxlm.prompts.tools import CALL_BEGINS
from maxlm.serve.formats import read_answer
from maxlm.serve.tools import answer_with_calls
from maxlm.tokenizer.codec import StreamDecoder, Tokenizer


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict:
    """Body of every error. Lone surrogates quoted from a request are replaced, as JSON cannot encode them."""
    message, param = (
        text if text is None else text.encode("utf-8", "backslashreplace").decode() for text in (message, param)
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(num_prompt_tokens: int, num_new_tokens: int) -> dict:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
    }


class Reply(ABC):
    """One reply; all its chunks share an id. `seed` reproduces its choices."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, tokenizer: Tokenizer, *, seed: int, with_logprobs: bool):
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._seed = {"seed": seed}

    def whole(self, choices: list[dict], usage: dict) -> dict:
        return {**self._base, "object": self.whole_object, "choices": choices, "usage": usage, **self._seed}

    def chunk(self, choices: list[dict], usage: dict | None = None) -> dict:
        return {**self._base, "object": self.chunk_object, "choices": choices, "usage": usage, **self._seed}

    @abstractmethod
    def opening(self, index: int) -> list[dict]:
        """Choices of the chunk before the first event."""

    @abstractmethod
    def choice(self, index: int, events: Sequence[Event]) -> dict:
        """A whole choice from all its events."""

    @abstractmethod
    def delta(self, index: int, event: Event) -> dict:
        """What one event adds to a streamed choice."""


class CompletionReply(Reply):
    """Replies of `/v1/completions`.

    Args:
      echo: the prompt that each choice's text begins with; empty for none.
    """

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, echo: Sequence[str] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._echo = echo
        self._places: dict[int, _TextPlaces] = {}

    def opening(self, index: int) -> list[dict]:
        if not self._echo:
            return []
        return [{"index": index, "text": self._echo[index], "logprobs": None, "finish_reason": None}]

    def choice(self, index: int, events: Sequence[Event]) -> dict:
        delta = self._delta(index, events)
        return {**delta, "text": "".join(choice["text"] for choice in (*self.opening(index), delta))}

    def delta(self, index: int, event: Event) -> dict:
        return self._delta(index, [event])

    def _delta(self, index: int, events: Sequence[Event]) -> dict:
        return {
            "index": index,
            "text": "".join(event.text for event in events),
            "logprobs": self._logprobs(index, events) if self._with_logprobs else None,
            "finish_reason": events[-1].finish_reason,
        }

    def _logprobs(self, index: int, events: Sequence[Event]) -> dict:
        """Logprobs of every sampled token, the stop token included, so that their number matches usage."""
        if index not in self._places:
            is_continued = bool(self._echo) and not events[0].prompt
            self._places[index] = _TextPlaces(self._tokenizer, len(self._echo[index]) if is_continued else 0)
        name = self._tokenizer.token_text
        tokens = [
            token for event in events for token in (*event.prompt, event.token, event.end_token) if token is not None
        ]
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [self._places[index].next(token.id) for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The most likely tokens, plus the token itself if it is not among them."""
        if token.log_probability is None:
            return None
        entries = (*token.top, (token.id, token.log_probability))
        return {self._tokenizer.token_text(id_): value for id_, value in entries}


class _TextPlaces:
    """Character offset of each token of a text; a token that is part of a character gets that character's offset."""

    def __init__(self, tokenizer: Tokenizer, start: int):
        self._decoder: StreamDecoder = tokenizer.stream_decoder()
        self._place = start

    def next(self, id_: int) -> int:
        place = self._place
        self._place += len(self._decoder.push(id_))
        return place


class ChatReply(Reply):
    """Replies of `/v1/chat/completions`.

    Args:
      form: of the answers, which are read by it; None for any text.
      tools: names of functions that they may call.
    """

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, form: AnswerFormat | None = None, tools: Sequence[str] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._form, self._tools = form, tools
        self._streamed: dict[int, list[str]] = {}
        # Of streamed text, what may be a call.
        self._held: dict[int, str] = {}

    def opening(self, index: int) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def choice(self, index: int, events: Sequence[Event]) -> dict:
        content, calls = self._read("".join(event.text for event in events))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content if content.strip() else None, "tool_calls": calls}
        elif self._form is not None:
            message |= read_answer(self._form, content, events[-1].finish_reason)
        return self._choice(index, {"message": message}, events, calls=bool(calls))

    def delta(self, index: int, event: Event) -> dict:
        text = event.text
        calls: list[dict[str, Any]] = []
        if self._tools:
            held = self._held.pop(index, "") + text
            if event.finish_reason:
                text, calls = self._read(held)
            else:
                start = _call_start(held)
                text, self._held[index] = held[:start], held[start:]
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        if self._form is not None:
            texts = self._streamed.setdefault(index, [])
            texts.append(text)
            if event.finish_reason and not calls:
                delta |= read_answer(self._form, "".join(texts), event.finish_reason)
        return self._choice(index, {"delta": delta}, [event], calls=bool(calls))

    def _read(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        return answer_with_calls(text, self._tools) if self._tools else (text, [])

    def _choice(self, index: int, content: dict, events: Sequence[Event], *, calls: bool) -> dict:
        entries = [self._entry(event.token) for event in events if event.token] if self._with_logprobs else []
        logprobs = {"content": entries, "refusal": None} if self._with_logprobs else None
        reason = "tool_calls" if calls else events[-1].finish_reason
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _entry(self, token: Token) -> dict:
        top = [self._named(id_, value) for id_, value in token.top]
        return {**self._named(token.id, token.log_probability), "top_logprobs": top}

    def _named(self, id_: int, log_probability: float | None) -> dict:
        return {
            "token": self._tokenizer.token_text(id_),
            "logprob": log_probability,
            "bytes": list(self._tokenizer.token_bytes(id_)),
        }


def _call_start(text: str) -> int:
    """Where a call begins in a text that may go on, or could begin; else its end."""
    if (place := text.find(CALL_BEGINS)) >= 0:
        return place
    sizes = range(min(len(CALL_BEGINS) - 1, len(text)), 0, -1)
    return len(text) - next((size for size in sizes if CALL_BEGINS.startswith(text[-size:])), 0)
