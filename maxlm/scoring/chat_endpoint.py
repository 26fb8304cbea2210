"""A chat model behind an OpenAI-compatible HTTP API: rate, timeouts, retries, cost."""

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import httpx2

from maxlm.config.feedback import EndpointConfig
from maxlm.errors import ConfigError, RequestError
from maxlm.scoring.chat_models import ChatRequest, Reply, ReplyError, Stopped
from maxlm.scoring.ledger import Ledger

# No reply to a chat is longer; an endless one would fill the memory.
_MAX_BYTES = 8 << 20
# Servers may ask for any pause; the retry after this long shows whether they still mean it.
_MAX_PAUSE_SECONDS = 120.0
# What a chat template may add to a message, in tokens.
_TOKENS_AROUND_MESSAGE = 16


class _TransientError(Exception):
    """A request failed in a way that may not happen again.

    Attributes:
      pause: seconds that the server asks to wait.
      may_be_billed: whether the server may have computed a reply.
    """

    def __init__(self, message: str, *, pause: float | None = None, may_be_billed: bool = False):
        super().__init__(message)
        self.pause, self.may_be_billed = pause, may_be_billed


class ChatEndpoint:
    """See `ChatModel`.

    Args:
      stopping: when set, pauses end and nothing more is sent.

    Raises:
      ConfigError: the environment variable of the API key is not set.
    """

    def __init__(self, config: EndpointConfig, *, ledger: Ledger, stopping: threading.Event):
        self._config, self._ledger, self._stopping = config, ledger, stopping
        self.name = config.model
        self.identity = {"base_url": config.base_url, "model": config.model, "body": config.body}
        self.concurrent = config.concurrent
        self._key = _api_key(config.api_key_variable)
        self._pace = _Pace(config.requests_per_minute)
        self._client = httpx2.Client(
            headers={"authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(config.timeout_seconds, connect=min(config.timeout_seconds, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=config.concurrent),
            follow_redirects=False,
        )
        self._url = f"{config.base_url}/chat/completions"

    def reply(self, request: ChatRequest) -> Reply:
        """See `ChatModel.reply`.

        Raises:
          ReplyError: the request was refused, or failed `retries` times more than once.
          RequestError: the endpoint refuses all requests, or a limit is reached.
          Stopped: the run is ending.
        """
        body = self._body(request)
        worst_cost = self._cost(_most_prompt_tokens(body["messages"]), _most_new_tokens(body, request.max_tokens))
        cost = 0.0
        for attempt in range(self._config.retries + 1):
            self._pace.wait(self._stopping)
            if self._stopping.is_set():
                raise Stopped
            try:
                with self._ledger.request(worst_cost) as charge:
                    try:
                        text, is_complete, usage = self._post(body)
                        if usage is not None:
                            charge.cost = self._cost(*usage)
                    except _TransientError as error:
                        charge.cost = worst_cost if error.may_be_billed else 0.0
                        raise
                    except (ReplyError, RequestError):
                        charge.cost = 0.0
                        raise
                    finally:
                        cost += charge.cost
                prompt_tokens, completion_tokens = usage or (0, 0)
                return Reply(text, prompt_tokens, completion_tokens, is_complete, attempt + 1, cost)
            except _TransientError as error:
                if attempt == self._config.retries:
                    raise ReplyError(f"{self._url} {error}", requests=attempt + 1, cost=cost) from None
                self._wait(attempt, error)
            except ReplyError as error:
                raise ReplyError(str(error), requests=attempt + 1, cost=cost) from None
        raise AssertionError("a loop of at least one attempt returns or raises")

    def close(self) -> None:
        self._client.close()

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        prompt = request.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        body = {
            "model": self._config.model,
            "messages": [{"role": message["role"], "content": _encodable(message["content"])} for message in messages],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            **self._config.body,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _post(self, body: dict[str, Any]) -> tuple[str, bool, tuple[int, int] | None]:
        """The text, whether it is complete, and the tokens of prompt and reply if the API reports them."""
        with _as_transient(self._config.timeout_seconds):
            status, headers, content = self._exchange(body)
        if status == 200:
            return _parsed(content, headers)
        said = self._said(content)
        if status in (401, 403):
            where = f"the key in {self._config.api_key_variable}" if self._key else "requests without an API key"
            raise RequestError(f"{self._url} refuses {where} ({status}): {said}")
        if 300 <= status < 400:
            target = headers.get("location", "another address")
            raise RequestError(f"{self._url} redirects to {target[:200]}; set base_url to where it leads")
        if status in (404, 405):
            raise RequestError(
                f"{self._url} answers {status}: {said}; check base_url, which often ends with /v1, and the model"
                f" {self._config.model}"
            )
        if status == 402 or (status == 429 and b"insufficient_quota" in content):
            raise RequestError(f"{self._url} has no quota left ({status}): {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            # A gateway that gives up (504) does not stop the server behind it.
            raise _TransientError(
                f"answers {status}: {said}", pause=_pause(headers), may_be_billed=status in (408, 504)
            )
        raise ReplyError(f"{self._url} refuses the request ({status}): {said}")

    def _exchange(self, body: dict[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content; the timeout holds for all of it, however slowly it arrives."""
        deadline = time.monotonic() + self._config.timeout_seconds
        content = bytearray()
        with self._client.stream("POST", self._url, json=body) as response:
            for block in response.iter_bytes():
                content += block
                if len(content) > _MAX_BYTES:
                    raise _TransientError(f"sends more than {_MAX_BYTES >> 20} MiB", may_be_billed=True)
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("the whole reply takes too long")
            return response.status_code, response.headers, bytes(content)

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        prices = self._config.prices
        if prices is None:
            return 0.0
        return (prompt_tokens * prices.input + completion_tokens * prices.output) / 1e6

    def _wait(self, attempt: int, error: _TransientError) -> None:
        """Wait before a retry: longer each time, by a random factor that keeps threads apart, or as the server asks."""
        seconds = self._config.retry_seconds * 2**attempt * random.uniform(0.5, 1.5)
        if error.pause is not None:
            # Others would be refused as well.
            self._pace.pause(error.pause)
            seconds = max(seconds, error.pause)
        self._stopping.wait(min(seconds, _MAX_PAUSE_SECONDS))

    def _said(self, content: bytes) -> str:
        """What an error says, without the key that some servers quote."""
        text = content.decode("utf-8", "replace")
        try:
            error = json.loads(text)["error"]
            text = error if isinstance(error, str) else str(error["message"])
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        text = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return text[:200] or "nothing"


class _Pace:
    """Spaces requests evenly; thread-safe."""

    def __init__(self, requests_per_minute: float | None):
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stopping: threading.Event) -> None:
        """Wait for the next turn."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._interval
        if start > now:
            stopping.wait(start - now)

    def pause(self, seconds: float) -> None:
        """Give no turns for a while."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + min(seconds, _MAX_PAUSE_SECONDS))


@contextmanager
def _as_transient(timeout_seconds: float):
    try:
        yield
    except httpx2.ConnectTimeout:
        raise _TransientError("cannot be reached in time") from None
    except httpx2.TimeoutException:
        raise _TransientError(f"does not answer in {timeout_seconds:g} s", may_be_billed=True) from None
    except httpx2.ConnectError as error:
        raise _TransientError(f"cannot be reached: {error}") from None
    # A broken connection, an answer that is not HTTP, a wrong compression.
    except httpx2.HTTPError as error:
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise _TransientError(f"breaks off: {message}", may_be_billed=True) from None


def _parsed(content: bytes, headers: Mapping[str, str]) -> tuple[str, bool, tuple[int, int] | None]:
    try:
        tree = json.loads(content)
        [choice, *_] = tree["choices"]
        message, reason = choice["message"], choice.get("finish_reason")
        text, refusal = message["content"], message.get("refusal")
        if not isinstance(text, str) and not isinstance(refusal, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        kind = headers.get("content-type", "unknown type")[:60]
        start = " ".join(content[:120].decode("utf-8", "replace").split())
        raise _TransientError(
            f"answers 200 with what is no chat completion ({kind}): {start or 'nothing'}", may_be_billed=True
        ) from None
    if not isinstance(text, str):
        raise ReplyError(f"declines: {_encodable(refusal)[:200]}")
    usage = tree.get("usage")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    known = len(counts) == 2 and all(type(count) is int and 0 <= count < 2**31 for count in counts)
    return _encodable(text), reason in (None, "stop"), (counts[0], counts[1]) if known else None


def _encodable(text: str) -> str:
    """A text without lone surrogates, which JSON may hold, but no file or request."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _most_prompt_tokens(messages: list[dict[str, str]]) -> int:
    """More tokens than any tokenizer makes of these messages: each is of a byte at least."""
    sizes = [len(message["content"].encode()) + _TOKENS_AROUND_MESSAGE for message in messages]
    return sum(sizes) + _TOKENS_AROUND_MESSAGE


def _most_new_tokens(body: dict[str, Any], max_tokens: int) -> int:
    limits = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    return max((limit for limit in limits if type(limit) is int), default=max_tokens)


def _pause(headers: Mapping[str, str]) -> float | None:
    """The seconds of Retry-After, which is a number or a date."""
    value = headers.get("retry-after", "")
    if value.replace(".", "", 1).isdecimal():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError([f"api_key_variable: the environment variable {variable} is not set; set it to the API key"])
    if not key.isascii() or not key.isprintable():
        raise ConfigError([f"api_key_variable: {variable} holds characters that no API key has"])
    return key
