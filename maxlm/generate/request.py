"""A request to the engine, and the decoding of its tokens to text up to a stop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from maxlm.errors import RequestError
from maxlm.generate.stopping import StopScanner

MAX_TOP_TOKENS = 20


class ContextLengthError(RequestError):
    """The prompt and its new tokens exceed the context."""


class BatchTooLargeError(RequestError):
    """Requests submitted together are more than the engine can hold."""


class QueueFullError(RequestError):
    """The queue of waiting requests is full; try again later."""


class EngineStoppedError(RuntimeError):
    """The engine has failed or was closed, and accepts no more requests."""


FinishReason = Literal["stop", "length", "cancelled", "error"]


class TextDecoder(Protocol):
    """Incremental detokenizer."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True)
class Request:
    """A prompt and its generation settings.

    prompt_ids: at least one token.
    max_new_tokens: None fills the context; 0, with `score_prompt`, generates nothing.
    temperature, top_k, top_p: see `maxlm.generate.sampling.sample`.
    seed: any integer; its low 64 bits count. The text depends only on prompt, settings, seed and stream.
    stream: (index of the prompt, index of the choice) among the requests that share a seed. Each pair has its own
      random stream.
    stop: the text ends before the first of these.
    top_tokens: how many of the most likely tokens to report at each position.
    score_prompt: the first event reports the prompt's own tokens.
    adapter: the name of the adapter that answers; None: the model itself.

    Raises:
      RequestError: a value is out of range.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stream: tuple[int, int] = (0, 0)
    stop: tuple[str, ...] = ()
    top_tokens: int = 0
    score_prompt: bool = False
    adapter: str | None = None

    def __post_init__(self):
        fewest = 0 if self.score_prompt else 1
        limits = [
            (len(self.prompt_ids) > 0, "the prompt is empty; give at least one token"),
            (
                self.max_new_tokens is None or self.max_new_tokens >= fewest,
                f"max_new_tokens must be at least {fewest}",
            ),
            (0 <= self.temperature < float("inf"), f"temperature is {self.temperature}; it must be 0 or more"),
            (0 <= self.top_k < 2**31, f"top_k is {self.top_k}; it must be 0 (all tokens) or more"),
            (0 <= self.top_p <= 1, f"top_p is {self.top_p}; it must be between 0 and 1"),
            (all(self.stop), "a stop string is empty; leave it out"),
            (0 <= self.top_tokens <= MAX_TOP_TOKENS, f"top_tokens must be between 0 and {MAX_TOP_TOKENS}"),
        ]
        for fits, problem in limits:
            if not fits:
                raise RequestError(problem)


@dataclass(frozen=True)
class Token:
    """A token, its log-probability under the model (temperature 1), and the most likely tokens at its position.

    The first token of a prompt has no log-probability.
    """

    id: int
    log_probability: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """One step of a request: newly final text, the token that produced it, and at the end the finish reason.

    end_token: the stop token that ended the answer. Not part of the text, but counted in `Generation.num_tokens`.
    prompt: the prompt's tokens, in the first event of a request with `score_prompt`.
    """

    text: str = ""
    token: Token | None = None
    end_token: Token | None = None
    prompt: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


class Generation:
    """A submitted request. `num_tokens` counts the tokens sampled so far."""

    def __init__(self, request: Request, max_new_tokens: int, decoder: TextDecoder, on_event: Callable[[Event], None]):
        self.request = request
        self.max_new_tokens = max_new_tokens
        self.num_tokens = 0
        self.cancelled = False
        self._decoder = decoder
        self._scanner = StopScanner(request.stop)
        self._on_event = on_event

    def cancel(self) -> None:
        """Ask the engine to drop the request; its slot is freed after the current step."""
        self.cancelled = True

    def accept(self, token: Token, is_stop: bool) -> bool:
        """Take the next token and emit its event; return whether the request has ended."""
        self.num_tokens += 1
        text = "" if is_stop else self._scanner.push(self._decoder.push(token.id))
        finish_reason: FinishReason | None = None
        if is_stop or self._scanner.stopped:
            finish_reason = "stop"
        elif self.num_tokens == self.max_new_tokens:
            finish_reason = "length"
        if finish_reason is not None:
            text += self._scanner.push(self._decoder.flush()) + self._scanner.flush()
        kept, end = (None, token) if is_stop else (token, None)
        self.emit(Event(text, kept, end, finish_reason=finish_reason))
        return finish_reason is not None

    def emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:
            # A listener that is gone (its event loop is closed) must not crash the engine.
            self.cancelled = True
