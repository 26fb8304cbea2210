"""Bodies of replies, whole and in chunks, as OpenAI shapes them."""

import time
import uuid
from collections.abc import Sequence

from maxlm.generate.request import Token
from maxlm.tokenizer.codec import Tokenizer


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict:
    """The shape of every error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(num_prompt_tokens: int, num_new_tokens: int) -> dict:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
    }


class CompletionReply:
    """Replies of `/v1/completions`; all chunks of one reply share its id."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, *, with_logprobs: bool):
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict], usage: dict) -> dict:
        return {**self._base, "object": self.whole_object, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict], usage: dict | None = None) -> dict:
        return {**self._base, "object": self.chunk_object, "choices": choices, "usage": usage}

    def opening(self, index: int) -> list[dict]:
        """Choices of the chunk that comes before the first token; none here."""
        return []

    def choice(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> dict:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(tokens) if self._with_logprobs else None,
            "finish_reason": finish_reason,
        }

    def delta(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> dict:
        return self.choice(index, text, tokens, finish_reason)

    def _logprobs(self, tokens: Sequence[Token]) -> dict:
        name = self._tokenizer.token_text
        names = [name(token.id) for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": [{name(id_): value for id_, value in token.top} for token in tokens],
        }


class ChatReply(CompletionReply):
    """Replies of `/v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def choice(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._choice(index, {"message": message}, tokens, finish_reason)

    def delta(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> dict:
        return self._choice(index, {"delta": {"content": text} if text else {}}, tokens, finish_reason)

    def _choice(self, index: int, content: dict, tokens: Sequence[Token], finish_reason: str | None) -> dict:
        logprobs = {"content": [self._entry(token) for token in tokens]} if self._with_logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _entry(self, token: Token) -> dict:
        top = [self._named(id_, value) for id_, value in token.top]
        return {**self._named(token.id, token.log_probability), "top_logprobs": top}

    def _named(self, id_: int, log_probability: float) -> dict:
        encoded = self._tokenizer.decode([id_]).encode()
        # A token that is a part of a character has no text of its own.
        is_text = len(encoded) == self._tokenizer.byte_lengths[id_]
        return {
            "token": self._tokenizer.token_text(id_),
            "logprob": log_probability,
            "bytes": list(encoded) if is_text else None,
        }
