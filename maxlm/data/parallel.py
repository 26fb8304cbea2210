"""A map over processes that keeps order and holds only a few items at a time."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from maxlm.errors import DataError

In = TypeVar("In")
Out = TypeVar("Out")

# Fewer batches than this are done before processes have started.
_BATCHES_WORTH_PROCESSES = 32
_PENDING_PER_WORKER = 4


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(make: Callable[[], Callable[[In], Out]], items: Iterable[In], *, workers: int) -> Iterator[Out]:
    """`make()(item)` for each item, in order.

    Args:
      make: picklable; called once in each process, so that what the function needs is loaded once.
      items: read only a little ahead of what has been taken.
      workers: processes. 0 takes one for each core if there are many items, and otherwise does without; 1 does without.

    Raises:
      DataError: if a process dies, as it does when memory runs out.
    """
    items = iter(items)
    if workers == 0:
        first = list(islice(items, _BATCHES_WORTH_PROCESSES))
        workers = 1 if len(first) < _BATCHES_WORTH_PROCESSES else num_cores()
        items = chain(first, items)
    if workers == 1:
        yield from map(make(), items)
        return
    pending: deque = deque()
    # "spawn": a fork of a process that has threads, as JAX starts them, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make,)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(_call, item))
                if len(pending) >= _PENDING_PER_WORKER * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"one of {workers} worker processes died, which mostly means that memory ran out; set workers lower"
            ) from None
        finally:
            for future in pending:
                future.cancel()


_function: Callable[[Any], Any]


def _start(make: Callable[[], Callable]) -> None:
    global _function
    _function = make()


def _call(item: Any) -> Any:
    return _function(item)
