"""Continuous batching: requests enter and leave a fixed set of slots between decode steps.

One thread drives the device. It admits waiting requests to free slots (one prefill each), advances all slots together,
and passes each new token to its request's callback. There is one device-to-host transfer per step.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.errors import RequestError
from maxlm.generate.decoding import (
    MIN_BUCKET,
    Programs,
    SamplingRow,
    SlotState,
    StepOutput,
    TokenScores,
    bucket_length,
    token_scores,
)
from maxlm.generate.request import (
    MAX_TOP_TOKENS,
    BatchTooLargeError,
    ContextLengthError,
    EngineStoppedError,
    Event,
    FinishReason,
    Generation,
    QueueFullError,
    Request,
    Token,
)
from maxlm.models.decoder import Decoder

# Tokens per call of the compiled program: each call costs the host about a millisecond.
TOKENS_PER_CALL = 4


class Engine:
    """Runs requests on `num_slots` slots of `max_length` tokens each, prompt included.

    Args:
      model, tokenizer: the tokenizer gives `stream_decoder()`.
      stop_ids: tokens that end an answer.
      adapters: the names of those that the model holds (`models.adapters.stacked`), in order, and the tokens that end
        their answers.
      max_length: None takes the model's context, which also bounds it.
      max_waiting: requests that may wait for a slot; None sets no limit.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        *,
        stop_ids: tuple[int, ...],
        adapters: Mapping[str, tuple[int, ...]] | None = None,
        num_slots: int = 8,
        max_length: int | None = None,
        max_waiting: int | None = None,
    ):
        if max_length is not None and max_length < MIN_BUCKET:
            raise RequestError(f"max_length is {max_length}; it must be at least {MIN_BUCKET}")
        self.max_length = min(max_length or model.execution.max_length, model.execution.max_length)
        self.num_slots = num_slots
        self._weights, structure = jax.tree.flatten(model)
        self._programs = Programs.of(structure)
        self._vocab_size = model.config.vocab_size
        self._has_prefixes = model.config.prefix_attention
        self._tokenizer = tokenizer
        self._stop_ids = {None: frozenset(stop_ids)} | {name: frozenset(x) for name, x in (adapters or {}).items()}
        self._adapter_numbers = {name: number for number, name in enumerate(self._stop_ids)}
        self._max_waiting = max_waiting
        self._num_top = min(MAX_TOP_TOKENS, model.config.vocab_size)
        cache_dtype = jnp.dtype(model.execution.activation_dtype)
        self._state = SlotState.create(model, self.num_slots, self.max_length, cache_dtype)
        self._active: dict[int, Generation] = {}
        self._waiting: deque[Generation] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="maxlm-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Generation:
        """Queue a request. `on_event` is called from the engine's thread; the last event has a finish reason.

        Raises:
          ContextLengthError: it does not fit the context.
          RequestError: it contains token ids outside the vocabulary.
          QueueFullError: the queue is full.
          EngineStoppedError: the engine has failed or was closed.
        """
        return self.submit_all([request], lambda _, event: on_event(event))[0]

    def submit_all(self, requests: Sequence[Request], on_event: Callable[[int, Event], None]) -> list[Generation]:
        """`submit` several requests, all or none; `on_event` also gets the index of the request.

        Raises:
          BatchTooLargeError: they are more than an idle engine accepts.
        """
        generations = [
            Generation(request, self._room_for(request), self._tokenizer.stream_decoder(), partial(on_event, index))
            for index, request in enumerate(requests)
        ]
        with self._wake:
            if self.failure is not None or self._closing:
                raise EngineStoppedError(f"the engine has stopped: {self.failure or 'closed'}")
            if self._max_waiting is not None:
                capacity = self.num_slots + self._max_waiting
                busy = len(self._active) + len(self._waiting)
                if len(requests) > capacity:
                    raise BatchTooLargeError(
                        f"{len(requests)} answers are requested at once, but at most {capacity} can run and wait;"
                        " send several smaller requests"
                    )
                if busy + len(requests) > capacity:
                    raise QueueFullError(f"{busy} requests are already running or waiting; try again later")
            self._waiting.extend(generations)
            self._wake.notify()
        return generations

    def stream(self, request: Request) -> Iterator[Event]:
        """Queue a request; yields its events as they arrive. Leaving the iteration cancels it."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        generation = self.submit(request, events.put)

        def follow() -> Iterator[Event]:
            try:
                while True:
                    event = events.get()
                    if event.error is not None:
                        raise RuntimeError(event.error)
                    yield event
                    if event.finish_reason is not None:
                        return
            finally:
                generation.cancel()

        return follow()

    def warm_up(self) -> None:
        """Compile by running two requests per prompt bucket, decoded singly and several tokens per call.

        Prompt scoring compiles on first use.
        """

        def run(length: int, **settings: Any) -> None:
            for _ in self.stream(Request((0,) * length, temperature=1.0, top_p=0.9, **settings)):
                pass

        length = 1
        while True:
            length = min(bucket_length(length, self.max_length), self.max_length - 2)
            run(length, max_new_tokens=2, top_tokens=1)
            run(min(length, self.max_length - 1 - TOKENS_PER_CALL), max_new_tokens=1 + TOKENS_PER_CALL)
            if length >= self.max_length - 2:
                return
            length += 1

    def close(self) -> None:
        """Cancel running and waiting requests, and stop the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _room_for(self, request: Request) -> int:
        """The largest number of new tokens for the request."""
        length = len(request.prompt_ids)
        vocab_size = self._vocab_size
        if request.adapter not in self._adapter_numbers:
            raise RequestError(f"adapter {request.adapter!r} is unknown; load the model with it")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab_size:
            raise RequestError(f"the prompt has a token id outside the vocabulary; ids are 0 to {vocab_size - 1}")
        if request.score_prompt and self._has_prefixes:
            raise RequestError(
                "the tokens of a prompt attend to one another in this model (model.prefix_attention), so they have no"
                " log-probabilities; ask for those of the answer only"
            )
        room = self.max_length - length
        wanted = 1 if request.max_new_tokens is None else request.max_new_tokens
        if wanted > room:
            raise ContextLengthError(
                f"the prompt has {length} tokens and {wanted} new ones are requested, but the context holds"
                f" {self.max_length}; shorten the prompt or ask for fewer tokens"
            )
        return room if request.max_new_tokens is None else request.max_new_tokens

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._admit()
                if self._active:
                    self._step()
            self._end_all(Event(finish_reason="cancelled"))
        except Exception as error:
            with self._wake:
                self.failure = f"{type(error).__name__}: {error}"
            self._end_all(Event(finish_reason="error", error=self.failure))
            raise

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._active or self._closing):
                self._wake.wait()
            return not self._closing

    def _drop_cancelled(self) -> None:
        with self._wake:
            dropped = [generation for generation in self._waiting if generation.cancelled]
            self._waiting = deque(generation for generation in self._waiting if not generation.cancelled)
        for slot, generation in list(self._active.items()):
            if generation.cancelled:
                dropped.append(self._active.pop(slot))
        for generation in dropped:
            generation.emit(Event(finish_reason="cancelled"))

    def _admit(self) -> None:
        for slot in range(self.num_slots):
            if slot in self._active:
                continue
            with self._wake:
                if not self._waiting:
                    return
                generation = self._waiting.popleft()
                self._active[slot] = generation
            request = generation.request
            length = len(request.prompt_ids)
            tokens_L = np.zeros(bucket_length(length, self.max_length), np.int32)
            tokens_L[:length] = request.prompt_ids
            if request.score_prompt:
                self._score_prompt(generation, tokens_L)
                if generation.max_new_tokens == 0:
                    del self._active[slot]
                    continue
            sampling = SamplingRow.from_values(
                seed=request.seed,
                stream=request.stream,
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                adapter=self._adapter_numbers[request.adapter],
            )
            self._state, output = self._programs.prefill(
                self._weights, self._state, tokens_L, np.int32(length), np.int32(slot), sampling
            )
            self._deliver(output, {0: slot})

    def _step(self) -> None:
        active_B = np.zeros(self.num_slots, bool)
        active_B[list(self._active)] = True
        num_tokens = self._num_tokens()
        self._state, outputs = self._programs.decode(self._weights, self._state, active_B, num_tokens=num_tokens)
        slots = {slot: slot for slot in self._active}
        if num_tokens == 1:
            self._deliver(jax.tree.map(lambda leaf: leaf[0], outputs), slots)
            return
        outputs = jax.device_get(outputs)
        for number in range(num_tokens):
            # Of an answer that has ended, the rest is dropped.
            running = {slot: slot for slot in slots if slot in self._active}
            self._deliver(jax.tree.map(lambda leaf, number=number: leaf[number], outputs), running)

    def _num_tokens(self) -> int:
        """Tokens to decode before the host looks at them: several, unless someone waits or wants alternatives."""
        requests = [generation.request for generation in self._active.values()]
        is_short = any(
            generation.max_new_tokens - generation.num_tokens < TOKENS_PER_CALL for generation in self._active.values()
        )
        return 1 if self._waiting or is_short or any(each.top_tokens for each in requests) else TOKENS_PER_CALL

    def _deliver(self, output: StepOutput, slot_of_row: dict[int, int]) -> None:
        wants_top = any(self._active[slot].request.top_tokens for slot in slot_of_row.values())
        scores = token_scores(output.logits_BV, output.tokens_B, count=self._num_top) if wants_top else None
        tokens_B, log_probabilities_B, scores = jax.device_get((output.tokens_B, output.log_probabilities_B, scores))
        for row, slot in slot_of_row.items():
            generation = self._active[slot]
            if generation.request.top_tokens:
                token = _scored_token(int(tokens_B[row]), scores, row, generation.request.top_tokens)
            else:
                token = Token(int(tokens_B[row]), float(log_probabilities_B[row]))
            if generation.accept(token, token.id in self._stop_ids[generation.request.adapter]):
                del self._active[slot]

    def _score_prompt(self, generation: Generation, tokens_L: np.ndarray) -> None:
        ids, top_tokens = generation.request.prompt_ids, generation.request.top_tokens
        adapter = np.int32(self._adapter_numbers[generation.request.adapter])
        scores = jax.device_get(
            self._programs.score_prompt(self._weights, tokens_L, np.int32(len(ids)), adapter, count=self._num_top)
        )
        scored = (_scored_token(id_, scores, row, top_tokens) for row, id_ in enumerate(ids[1:]))
        finish_reason: FinishReason | None = "length" if generation.max_new_tokens == 0 else None
        generation.emit(Event(prompt=(Token(ids[0], None), *scored), finish_reason=finish_reason))

    def _end_all(self, event: Event) -> None:
        with self._wake:
            ended = [*self._active.values(), *self._waiting]
            self._active.clear()
            self._waiting.clear()
        for generation in ended:
            generation.emit(event)


def _scored_token(id_: int, scores: TokenScores, row: int, top_tokens: int) -> Token:
    values, ids = (array[row, :top_tokens].tolist() for array in (scores.top_BK, scores.top_ids_BK))
    return Token(id_, float(scores.log_probabilities_B[row]), tuple(zip(ids, values)))
