"""Replies on disk, so that no request is paid for twice."""

import json
import threading
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import xxhash
from etils import epath

from maxlm.runtime.storage import LineLog
from maxlm.runtime.written import read_written_lines
from maxlm.scoring.chat_models import ChatModel, ChatRequest, Reply, ReplyError


class ReplyLog:
    """An append-only JSONL file of replies by the hash of model and request, and of requests that failed.

    A killed process loses at most the replies that it was waiting for.

    Attributes:
      requests, cost: of all that the file records.

    Raises:
      DataError: the file was edited.
    """

    def __init__(self, path: epath.Path):
        self._replies: dict[str, Reply] = {}
        self.requests, self.cost = 0, 0.0
        for line in read_written_lines(path):
            self.requests += line["requests"]
            self.cost += line["cost"]
            if "error" not in line:
                fields = {name: line[name] for name in Reply.__dataclass_fields__}
                self._replies[line["key"]] = Reply(**fields)
        self._log = LineLog(path)
        self._lock = threading.Lock()

    def find(self, key: str) -> Reply | None:
        """The reply recorded under a key."""
        return self._replies.get(key)

    def add(self, key: str, model: str, result: Reply | ReplyError) -> None:
        """Record a reply, or a failure, after which the next run asks again."""
        line: dict[str, Any] = {"key": key, "model": model}
        if isinstance(result, Reply):
            line |= asdict(result)
        else:
            line |= {"error": str(result), "requests": result.requests, "cost": result.cost}
        with self._lock:
            self._log.append(json.dumps(line, ensure_ascii=False))
            if isinstance(result, Reply):
                self._replies[key] = result


class RecordedModel:
    """A chat model whose replies are looked up in a log first, and added to it; equal requests are sent once.

    Attributes:
      replies, from_log: how many it gave, and how many of them were in the log.
      retries, prompt_tokens, completion_tokens: that these replies took, whenever they were sent.
    """

    def __init__(self, model: ChatModel, log: ReplyLog):
        self._model, self._log = model, log
        self.name, self.identity, self.concurrent = model.name, model.identity, model.concurrent
        self.replies, self.from_log, self.retries = 0, 0, 0
        self.prompt_tokens, self.completion_tokens = 0, 0
        self._pending: dict[str, Future[Reply]] = {}
        self._lock = threading.Lock()

    def reply(self, request: ChatRequest) -> Reply:
        """See `ChatModel.reply`."""
        key = _key(self.identity, request)
        with self._lock:
            self.replies += 1
            if (known := self._log.find(key)) is not None:
                self.from_log += 1
                self._count(known)
                return known
            first = self._pending.get(key)
            mine = self._pending.setdefault(key, Future())
        if first is not None:
            return first.result()
        try:
            found = self._ask(key, request)
            mine.set_result(found)
            return found
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._pending[key]

    def close(self) -> None:
        self._model.close()

    def _ask(self, key: str, request: ChatRequest) -> Reply:
        try:
            found = self._model.reply(request)
        except ReplyError as error:
            self._log.add(key, self.name, error)
            with self._lock:
                self.retries += max(error.requests - 1, 0)
            raise
        self._log.add(key, self.name, found)
        with self._lock:
            self._count(found)
        return found

    def _count(self, reply: Reply) -> None:
        self.retries += reply.requests - 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens


def _key(identity: dict[str, Any], request: ChatRequest) -> str:
    content = json.dumps([identity, asdict(request)], sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(content.encode("utf-8", "surrogatepass"))
