"""A request to the engine, and how its tokens become text with an end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from maxlm.errors import RequestError
from maxlm.generate.stopping import StopScanner

MAX_TOP_TOKENS = 20


class ContextLengthError(RequestError):
    """A prompt with its new tokens is longer than the context."""


class BatchTooLargeError(RequestError):
    """Requests that are submitted together are more than the engine ever holds."""


class QueueFullError(RequestError):
    """As many requests wait as the engine lets wait; try again later."""


class EngineStoppedError(RuntimeError):
    """The engine has failed or was closed, and takes no more requests."""


FinishReason = Literal["stop", "length", "cancelled", "error"]


class TextDecoder(Protocol):
    """Token ids to text, piece by piece."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True)
class Request:
    """What to continue, and how.

    prompt_ids: at least one token.
    max_new_tokens: None takes as many as the context has room for; 0, with `score_prompt`, generates nothing.
    temperature, top_k, top_p: see `maxlm.generate.sampling.sample`.
    seed: any integer; its low 64 bits count. Prompt, settings, seed and stream decide the text, and nothing else does.
    stream: (index of the prompt, index of the choice) among the requests that share a seed. Each pair draws from a
      random stream of its own.
    stop: the text ends before the first of these.
    top_tokens: how many of the likeliest tokens to report at each place.
    score_prompt: the first event reports the prompt's own tokens.

    Raises:
      RequestError: a value is out of its range.
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
    """A token, its log-probability under the model (temperature 1), and the likeliest tokens at its place.

    The first token of a prompt has no log-probability.
    """

    id: int
    log_probability: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """One step of a request: the text that became certain, the token behind it, and at the end why it ended.

    end_token: the stop token that ended the answer. It is no part of the text, but counts in `Generation.num_tokens`.
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
        """Ask the engine to drop the request; its slot is free after the step that is running."""
        self.cancelled = True

    def accept(self, token: Token, is_stop: bool) -> bool:
        """Take the next token and emit its event; returns whether the request has ended."""
        self.num_tokens += 1
        text = "" if is_stop else self._scanner.push(self._decoder.push(token.id))
        finish_reason = None
        if is_stop or self._scanner.stopped:
            finish_reason = "stop"
        elif self.num_tokens == self.max_new_tokens:
            finish_reason = "length"
        if finish_reason is not None:
            text += self._scanner.push(self._decoder.flush()) + self._scanner.flush()
        taken = {"end_token": token} if is_stop else {"token": token}
        self.emit(Event(text, finish_reason=finish_reason, **taken))
        return finish_reason is not None

    def emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:
            # A listener that is gone (its event loop has closed) must not take the engine down.
            self.cancelled = True
