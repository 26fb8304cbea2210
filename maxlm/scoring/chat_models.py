"""Models that reply to chats, one request at a time from any number of threads: ours, and recorded replies."""

import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from maxlm.errors import CheckpointError, RequestError, TokenizerError
from maxlm.scoring.ledger import Ledger

Item = TypeVar("Item")
Result = TypeVar("Result")

# A text to continue, or the messages of a chat to answer.
Prompt = str | list[dict[str, Any]]


class ReplyError(Exception):
    """One request has no reply; others may have. The message is a sentence for the user.

    Attributes:
      requests, cost: spent on it.
    """

    def __init__(self, message: str, *, requests: int = 1, cost: float = 0.0):
        super().__init__(message)
        self.requests, self.cost = requests, cost


class Stopped(Exception):  # noqa: N818 - not an error: the run ends
    """A request was not sent, because the run is ending."""


@dataclass(frozen=True)
class ChatRequest:
    """A prompt, and how to reply to it.

    seed: equal requests get equal replies from models that support it.
    """

    prompt: Prompt
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """A model's reply.

    is_complete: whether the model ended it, and not the limit on its tokens.
    requests, cost: spent on it, retries included; the cost in the currency of the prices.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_complete: bool = True
    requests: int = 1
    cost: float = 0.0


class ChatModel(Protocol):
    """A model that replies to chats; thread-safe.

    Attributes:
      name: for people.
      identity: what its replies depend on besides the request; JSON.
      concurrent: how many requests it handles at a time.
    """

    name: str
    identity: dict[str, Any]
    concurrent: int

    def reply(self, request: ChatRequest) -> Reply:
        """Reply to a chat.

        Raises:
          ReplyError: this request has no reply.
          MaxlmError: no request will have one.
        """
        ...

    def close(self) -> None: ...


class LocalChatModel:
    """A model on this machine. It is loaded by the first request, which a rerun may not need."""

    def __init__(self, path: str, *, content_hash: str, concurrent: int, ledger: Ledger):
        self._path = path
        self._ledger = ledger
        self.name = path
        self.identity = {"model": content_hash}
        self.concurrent = concurrent
        self._lock = threading.Lock()
        self._model: Any = None
        self._engine: Any = None

    def reply(self, request: ChatRequest) -> Reply:
        model, engine = self._loaded()
        from maxlm.generate.request import Request

        try:
            ids = model.encode(request.prompt)
            events = engine.stream(
                Request(
                    tuple(ids), max_new_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed
                )
            )
        except (RequestError, TokenizerError) as error:
            raise ReplyError(f"{self.name}: {error}") from None
        with self._ledger.request():
            found = list(events)
        return Reply(
            "".join(event.text for event in found),
            prompt_tokens=len(ids),
            completion_tokens=sum(event.token is not None or event.end_token is not None for event in found),
            is_complete=found[-1].finish_reason == "stop",
        )

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _loaded(self) -> tuple[Any, Any]:
        with self._lock:
            if self._engine is None:
                # Loading imports JAX, which endpoints do not need.
                from maxlm.generate.model import load

                model = load(self._path)
                if model.config.labels is not None:
                    raise CheckpointError(f"{self._path}: is a reward model or classifier, which writes no replies")
                self._model, self._engine = model, model.engine(num_slots=self.concurrent)
            return self._model, self._engine


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, stopping: threading.Event
) -> Generator[tuple[int, Result]]:
    """(index, function(item)) of all items, as they are done; few items are taken ahead.

    If the function raises, or the iteration is left, `stopping` is set, those that run are awaited and no others begin.
    """
    numbered = enumerate(items)
    pending: dict[Future, int] = {}
    errors: list[BaseException] = []

    def run(item: Item) -> Result:
        try:
            return function(item)
        except BaseException as error:
            # The first error is the reason; others may follow from the stop.
            errors.append(error)
            stopping.set()  # before this thread takes the next item
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="maxlm-replies") as pool:

        def submit(count: int) -> None:
            for index, item in islice(numbered, count):
                pending[pool.submit(run, item)] = index

        try:
            submit(2 * workers)
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    index = pending.pop(future)
                    if errors:
                        raise errors[0]
                    result = future.result()
                    submit(1)
                    yield index, result
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
