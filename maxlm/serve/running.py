"""The bridge between the engine's thread and the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from maxlm.generate.engine import Engine
from maxlm.generate.request import Event, Generation, Request
from maxlm.serve.metrics import ServerMetrics


class RunningRequests:
    """The engine requests of one HTTP call, submitted together, and their events as they arrive.

    Raises: as `Engine.submit_all`.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], metrics: ServerMetrics):
        self._metrics = metrics
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._submitted = time.perf_counter()
        self._first_token: dict[int, float] = {}
        self._generations: list[Generation] = engine.submit_all(requests, self._receive)
        metrics.prompt_tokens.add(sum(len(request.prompt_ids) for request in requests))

    @property
    def num_new_tokens(self) -> int:
        return sum(generation.num_tokens for generation in self._generations)

    def cancel(self) -> None:
        for generation in self._generations:
            generation.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(index of the request, event) until all have ended; leaving the iteration cancels those still running."""
        running = len(self._generations)
        try:
            while running:
                index, event = await self._events.get()
                running -= event.finish_reason is not None
                yield index, event
        finally:
            self.cancel()

    def _receive(self, index: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._note, index, event)

    def _note(self, index: int, event: Event) -> None:
        """Update the metrics; runs for every event, even if nobody iterates any more."""
        now = time.perf_counter()
        if index not in self._first_token and event.error is None and event.finish_reason != "cancelled":
            self._first_token[index] = now
            self._metrics.first_token.observe(now - self._submitted)
        if event.finish_reason is not None:
            num_tokens = self._generations[index].num_tokens
            self._metrics.generated_tokens.add(num_tokens)
            self._metrics.finished.add(reason=event.finish_reason)
            self._metrics.duration.observe(now - self._submitted)
            if num_tokens > 1:
                self._metrics.token_interval.observe((now - self._first_token[index]) / (num_tokens - 1))
        self._events.put_nowait((index, event))
